"""Processes of a plan's steps as forks, which have the imports: for tests of experiments and pipelines."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def forked(main: Callable[[], None], log: int, env: dict[str, str], argv: list[str]) -> int:
    """The process id of a fork that runs main() and ends, as a Python of its own with these arguments."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        os.environ.update(env)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        sys.argv = argv
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


class Forked:
    """Of subprocess.Popen what steps/runner.py asks for."""

    def __init__(self, command: list[str], log: Any, env: dict[str, str]):
        from nemo_embed_core.steps.child import main

        assert command[:3] == [sys.executable, "-m", "nemo_embed_core.steps.child"]
        self.pid = forked(main, log.fileno(), env, command[2:])

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Reloads:
    """Of the module subprocess what export/consumers.py asks for: reload.py in a fork."""

    CompletedProcess = subprocess.CompletedProcess

    @staticmethod
    def run(argv: list[str], cwd: Path, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        import runpy

        def main() -> None:
            os.chdir(cwd)
            runpy.run_path(argv[1], run_name="__main__")

        with (Path(cwd) / "reload.log").open("w+") as log:
            pid = forked(main, log.fileno(), env, argv[1:])
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            log.seek(0)
            return subprocess.CompletedProcess(argv, code, "", log.read())
