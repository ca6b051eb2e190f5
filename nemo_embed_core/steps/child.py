"""A module that ends with its parent: python -m nemo_embed_core.steps.child PARENT MODULE [ARGUMENTS].

A launcher whose command was killed would go on writing into the folder that the next one goes on with.
PARENT: its process, or 0 for whoever started this, as torchrun does its ranks.
"""

import ctypes
import os
import runpy
import signal
import sys


def main() -> None:
    parent, module, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        pid = int(parent) or os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != pid:  # it died before that
            os.kill(os.getpid(), signal.SIGKILL)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
