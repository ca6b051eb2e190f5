"""Sharded checkpoints to a Hugging Face folder; several sources are averaged.

python launch/merge.py runs/stage2 -o exports/model
python launch/merge.py runs/a runs/b runs/c [--weights 0.5 0.3 0.2] -o exports/average    (or else the mean)
python launch/merge.py runs/a runs/b --method slerp --t 0.3 -o exports/between
python launch/merge.py runs/a runs/b runs/c --method soup --evaluate "python f.py {folder}" -o exports/soup
python launch/merge.py runs/stage2 --format onnx -o exports/onnx (compat: transformers >= 4.51; peft: of LoRA)
python launch/merge.py --check DIR [--with onnxruntime tei]     (prove it, also in programs that serve it)
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from nemo_embed_core.errors import user_errors
from nemo_embed_core.export.formats import CONSUMERS, FORMATS, LIBRARIES
from nemo_embed_core.merge.recipes import check_recipe


def options() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="*", help="runs, checkpoints or Hugging Face folders; several are averaged")
    add("-o", "--output", help="folder to make; must not exist or be empty")
    add("--check", metavar="DIR", help="only prove DIR: weights, causality, embeddings")
    add("--dtype", choices=("auto", "bf16", "fp32", "fp16"), default="auto", help="auto: the sources' own")
    readers = {"peft": "LoRA adapters alone"} | {name: format.readers for name, format in FORMATS.items()}
    add("--format", choices=readers, default="native", help="; ".join(map(": ".join, readers.items())))
    served = f"with --check: run there, or judged where not installed; of {', '.join(CONSUMERS)}"
    add("--with", choices=CONSUMERS, nargs="+", metavar="NAME", default=LIBRARIES, help=served)
    add("--trust-remote-code", action="store_true", help="with --check: run code in DIR that is not ours")
    add("--task", help="instruction of the default query prompt; default: the sources' own")
    add("--document-task", help="the same of documents")
    add("--weights", type=float, nargs="+", metavar="W", help="one per source, sum 1; default: the mean")
    methods = "soup: of the sources that --evaluate scores best together; slerp: between two, on the arc"
    add("--method", choices=("average", "slerp", "soup"), default="average", help=methods)
    add("--t", type=float, help="slerp: 0 is the first source, 1 the second")
    add("--evaluate", metavar="COMMAND", help="soup: prints a score last, higher is better, of {folder}")
    return parser


def main() -> None:
    with user_errors():
        parser = options()
        given = vars(parser.parse_args())
        path, trusted, consumers = (given.pop(key) for key in ("check", "trust_remote_code", "with"))
        if bool(path) == bool(given["sources"] and given["output"]):
            parser.error("give sources and -o DIR, or --check DIR")
        if (trusted or consumers != LIBRARIES) and not path:
            parser.error("--trust-remote-code and --with go with --check DIR")
        check_recipe(given["method"], given["weights"], given["t"], given["evaluate"])
        from nemo_embed_core.merge import merge

        if path:
            merge.check(path, trusted, consumers=consumers)
        else:
            merge.merge(**given, command=sys.argv)


if __name__ == "__main__":
    main()
