"""Sharded checkpoints to a Hugging Face folder; several sources are averaged.

python launch/merge.py runs/stage2 -o exports/model
python launch/merge.py runs/a runs/b runs/c [--weights 0.5 0.3 0.2] -o exports/average    (or else the mean)
python launch/merge.py runs/a runs/b --method slerp --t 0.3 -o exports/between
python launch/merge.py runs/a runs/b runs/c --method soup --evaluate "python f.py {folder}" -o exports/soup
python launch/merge.py runs/stage2 --format onnx -o exports/onnx (compat: transformers >= 4.51; peft: of LoRA)
python launch/merge.py --check DIR [--with onnxruntime tei]     (prove it, also in programs that serve it)
python launch/merge.py --check DIR --push-to-hub USER/NAME [--dry-run] [--reports REPORT]   (or with -o DIR)
"""

import sys
from argparse import ArgumentParser

from nemo_embed_core.errors import user_errors
from nemo_embed_core.export.formats import LIBRARIES
from nemo_embed_core.export.hub import Push
from nemo_embed_core.merge.options import parser_of
from nemo_embed_core.merge.recipes import check_recipe


def options() -> ArgumentParser:
    return parser_of(__doc__)


def main() -> None:
    with user_errors():
        parser = options()
        given = vars(parser.parse_args())
        path, trusted, consumers = (given.pop(key) for key in ("check", "trust_remote_code", "with"))
        push = Push.of(*(given.pop(key) for key in ("push_to_hub", "private", "dry_run", "reports")))
        if bool(path) == bool(given["sources"] and given["output"]):
            parser.error("give sources and -o DIR, or --check DIR")
        if (trusted or consumers != LIBRARIES) and not path:
            parser.error("--trust-remote-code and --with go with --check DIR")
        check_recipe(given["method"], given["weights"], given["t"], given["evaluate"])
        from nemo_embed_core.merge import merge

        if path:
            merge.check(path, trusted, consumers=consumers, push=push)
        else:
            merge.merge(**given, push=push, command=sys.argv)


if __name__ == "__main__":
    main()
