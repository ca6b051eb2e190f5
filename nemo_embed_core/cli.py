"""nemo-embed VERB: the launchers (train, mine, merge, ...) under one name, where it is installed.

nemo-embed train --config run.yaml                                    the same as python launch/train.py ...
torchrun --nproc-per-node 8 -m nemo_embed_core.cli train --config run.yaml
"""

import runpy
import sys

from nemo_embed_core.errors import user_errors

VERBS = ("prepare", "train", "mine", "merge", "evaluate", "plan", "experiment", "synthesize", "pipeline")
USAGE = (
    f"usage: nemo-embed {{{','.join(VERBS)}}} [options]\n\nnemo-embed VERB --help lists the options of each."
)


def main() -> None:
    with user_errors():
        verb, *options = sys.argv[1:] or [""]
        if verb in ("-h", "--help"):
            print(USAGE)
            return
        if verb not in VERBS:
            given = f"{verb!r} is no verb" if verb else "the verb is missing"
            print(f"{USAGE}\nerror: {given}: give one of {', '.join(VERBS)}", file=sys.stderr)
            raise SystemExit(2)
    sys.argv = [f"nemo-embed {verb}", *options]
    runpy.run_module(f"nemo_embed_core.launch.{verb}", run_name="__main__")


if __name__ == "__main__":
    main()
