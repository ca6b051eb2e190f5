"""The options of launch/merge.py. No torch import: --help is instant."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from nemo_embed_core.export.formats import CONSUMERS, FORMATS, LIBRARIES, VARIANTS


def parser_of(description: str | None) -> ArgumentParser:
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="*", help="runs, checkpoints or Hugging Face folders; several are averaged")
    add("-o", "--output", help="folder to make; must not exist or be empty")
    add("--check", metavar="DIR", help="only prove DIR: weights, causality, embeddings")
    add("--dtype", choices=("auto", "bf16", "fp32", "fp16"), default="auto", help="auto: the sources' own")
    readers = {"peft": "LoRA adapters alone"} | {name: format.readers for name, format in FORMATS.items()}
    add("--format", choices=readers, default="native", help="; ".join(map(": ".join, readers.items())))
    smaller = ", ".join(f"{name} of --format {one.format}" for name, one in VARIANTS.items())
    add("--variants", choices=VARIANTS, nargs="+", default=(), help=f"smaller files beside it: {smaller}")
    served = f"with --check: run there, or judged where not installed; of {', '.join(CONSUMERS)}"
    add("--with", choices=CONSUMERS, nargs="+", metavar="NAME", default=LIBRARIES, help=served)
    add("--push-to-hub", metavar="USER/NAME", help="once proven; token: `hf auth login`, or HF_TOKEN")
    add("--private", action="store_true", help="the repository, where --push-to-hub makes it")
    add("--dry-run", action="store_true", help="each file, its size, and the card; sends nothing")
    add("--reports", nargs="+", default=(), help="of launch/evaluate.py: scores for the card on the hub")
    add("--trust-remote-code", action="store_true", help="with --check: run code in DIR that is not ours")
    add("--task", help="instruction of the default query prompt; default: the sources' own")
    add("--document-task", help="the same of documents")
    add("--weights", type=float, nargs="+", metavar="W", help="one per source, sum 1; default: the mean")
    methods = "soup: of the sources that --evaluate scores best together; slerp: between two, on the arc"
    add("--method", choices=("average", "slerp", "soup"), default="average", help=methods)
    add("--t", type=float, help="slerp: 0 is the first source, 1 the second")
    add("--evaluate", metavar="COMMAND", help="soup: prints a score last, higher is better, of {folder}")
    return parser
