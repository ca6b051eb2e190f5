"""Sharded checkpoints to a Hugging Face folder; several sources are averaged.

python launch/merge.py runs/stage2 -o exports/model
python launch/merge.py runs/a runs/b runs/c -o exports/average                       (the mean)
python launch/merge.py runs/a runs/b runs/c --weights 0.5 0.3 0.2 -o exports/average
python launch/merge.py runs/a runs/b --method slerp --t 0.3 -o exports/between
python launch/merge.py runs/a runs/b runs/c --method soup --evaluate "python score.py {folder}" -o exports/soup
python launch/merge.py runs/stage2 --format compat -o exports/compat      (for transformers 4.51 and later; brings its code)
python launch/merge.py --check exports/model        (prove any exported folder, also somebody else's)
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.config import UserError, user_errors

BESIDE_BYTES = 1 << 20  # per source: card, licences, report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="runs, checkpoints or Hugging Face folders; several are averaged")
    parser.add_argument("-o", "--output", type=Path, help="folder to make; must not exist or be empty")
    parser.add_argument("--check", type=Path, metavar="DIR", help="only prove DIR: weights, causality, embeddings")
    dtypes = ("auto", "bf16", "fp32", "fp16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: the sources' own")
    formats = ("native", "compat")
    parser.add_argument(
        "--format", choices=formats, default="native", help="native: transformers >= 5.2; compat: >= 4.51"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="with --check: run code in DIR that we did not write"
    )
    parser.add_argument("--task", help="instruction of the default query prompt; default: the sources' own")
    parser.add_argument("--document-task", help="the same of documents")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one per source, sum 1; default: the mean"
    )
    parser.add_argument("--method", choices=("average", "slerp", "soup"), default="average")
    parser.add_argument("--t", type=float, help="slerp: 0 is the first source, 1 the second")
    parser.add_argument(
        "--evaluate",
        metavar="COMMAND",
        help="soup: prints a score on its last line, higher is better; {folder} is filled in",
    )
    args = parser.parse_args()
    if bool(args.check) == bool(args.sources and args.output):
        parser.error("give sources and -o DIR, or --check DIR")
    if args.trust_remote_code and not args.check:
        parser.error("--trust-remote-code goes with --check DIR")
    if (args.t is not None) != (args.method == "slerp"):
        parser.error("--method slerp and --t T belong together")
    if (args.evaluate is not None) != (args.method == "soup"):
        parser.error("--method soup and --evaluate COMMAND belong together")
    if args.weights and args.method != "average":
        parser.error(f"--weights are of an average; --method {args.method} has its own")
    if args.evaluate is not None and "{folder}" not in args.evaluate:
        parser.error("--evaluate COMMAND has no {folder}, the place of the folder to score")
    return args


def main() -> None:
    args = parse()
    with user_errors():
        if args.check:
            check(args.check, args.trust_remote_code, ours=False)
        else:
            merge(args)


def merge(args: argparse.Namespace) -> None:
    from nemo_embed_core.checkpoint import merge as m
    from nemo_embed_core.checkpoint.files import new_folder, writing
    from nemo_embed_core.checkpoint.source import resolve
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.data.tokenizer_files import check_servable, difference
    from nemo_embed_core.export.card import describe, shown_command
    from nemo_embed_core.export.folder import check_mergeable, write_folder

    origins = [resolve(path) for path in args.sources]
    for origin in origins:
        check_mergeable(origin)
    sources = m.open_sources(args.sources)
    if args.weights:
        m.check_weights(args.weights, len(sources))
    dtype = m.dtype_of(args.dtype, sources)
    named = [(source.name, origin.usage) for source, origin in zip(sources, origins, strict=True)]
    usage, said = m.united_usage(named, args.task, args.document_task)
    tokenizers = [load_tokenizer(source.folder) for source in sources]
    said += check_servable(tokenizers[0].files)
    for path, tokenizer in zip(args.sources, tokenizers, strict=True):
        tokenizer.check_fits(sources[0].model.vocab_size)
        if tokenizer.digest != tokenizers[0].digest and (
            how := difference(tokenizers[0].files["tokenizer.json"], tokenizer.files["tokenizer.json"])
        ):
            raise UserError(
                f"the tokenizers of {args.sources[0]} and {path} differ: {how}; only models that share one are averaged"
            )
    print("\n".join(usage.lines() + said), flush=True)
    name = str(dtype).removeprefix("torch.")
    beside = sum(map(len, tokenizers[0].files.values())) + BESIDE_BYTES * len(sources)
    needed = m.weight_bytes(sources[0], dtype) + beside

    def write(folder: Path, members: Sequence[int], **how: Any) -> dict[str, Any]:
        chosen = [sources[i] for i in members]
        report = m.write_weights(folder, chosen, dtype, beside=beside, **how)
        card = {**describe(chosen, report), "title": args.output.name, "command": shown_command(sys.argv)}
        card["choices"] = said
        if decisions:
            score = next(decision["score"] for decision in decisions if decision["members"] == list(members))
            card["metrics"] = {shown_command(shlex.split(args.evaluate)): {"score": score}}
        write_folder(folder, sources[0].model, name, tokenizers[0].files, format=args.format, usage=usage, card=card)
        return report

    with writing(args.output, needed, "the merged model"), new_folder(args.output) as folder:
        members, decisions = list(range(len(sources))), list[dict[str, Any]]()
        if args.method == "soup":
            names = [source.name for source in sources]
            members, decisions = m.greedy_soup(names, lambda tried: evaluate(args, folder / "candidate", tried, write))
        report = write(folder, members, weights=args.weights, slerp=args.t, hashed=not decisions)
        if decisions:
            report |= {"method": "soup", "evaluate": args.evaluate, "decisions": decisions}
        check(folder)  # a folder that fails is not published
        if len(sources) > 1:
            m.write_report(folder, report)
            print("\n".join(m.report_lines(report)))
    what = "converted" if len(members) == 1 else f"{report['method']} of {len(members)}"
    print(f"wrote {args.output} ({name}, {what})")


def evaluate(args: argparse.Namespace, folder: Path, members: Sequence[int], write: Any) -> float:
    """The score that the user's command gives the average of these sources, in a folder that is gone afterwards."""
    folder.mkdir()
    try:
        write(folder, members, hashed=len(members) == 1)  # each source is hashed once, alone
        command = [word.replace("{folder}", str(folder)) for word in shlex.split(args.evaluate)]
        try:
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise UserError(f"--evaluate: {command[0]} does not start: {error}") from None
    finally:
        shutil.rmtree(folder)
    lines = run.stdout.split("\n") if run.returncode == 0 else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    chosen = ", ".join(args.sources[i] for i in members)
    try:
        score = float(last)
        if score != score:
            raise ValueError
    except ValueError:
        ended = (
            f"ended with code {run.returncode}"
            if run.returncode
            else f"printed {last!r} on its last line, not a number"
        )
        raise UserError(f"--evaluate {args.evaluate!r} {ended} for the average of {chosen}") from None
    print(f"  {score:.6g}  {chosen}", flush=True)
    return score


def check(folder: Path, trust_remote_code: bool = False, ours: bool = True) -> None:
    """transformers and sentence-transformers, in a fresh process, give our encoder's vectors, and no mask is causal."""
    from nemo_embed_core.checkpoint.source import usage_of_folder
    from nemo_embed_core.embedder import Embedder
    from nemo_embed_core.export.verify import verify_folder
    from nemo_embed_core.model.hf_folder import find_folder

    folder, notes = find_folder(folder)
    for note in notes:
        print(f"  note: {note}", flush=True)

    def embed(texts: list[str], max_length: int) -> Any:  # our copy of the weights is gone when it returns
        return Embedder.load(str(folder), device="cpu", precision="fp32").encode(texts, max_length=max_length)

    verify_folder(folder, embed, trust_remote_code, ours=ours, say=lambda line: print(f"  {line}", flush=True))
    if not ours:
        print("\n".join(f"  {line}" for line in usage_of_folder(folder).lines()))


if __name__ == "__main__":
    main()
