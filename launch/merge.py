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
    parser.add_argument("--task", help="instruction of the query prompt; default: the one the model was trained with")
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
            check(args.check, args.trust_remote_code)
        else:
            merge(args)


def merge(args: argparse.Namespace) -> None:
    from nemo_embed_core.checkpoint import merge as m
    from nemo_embed_core.checkpoint.files import new_folder
    from nemo_embed_core.data.prompts import query_prompt
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.export.card import describe, shown_command
    from nemo_embed_core.export.folder import write_folder

    sources = m.open_sources(args.sources)
    if args.weights:
        m.check_weights(args.weights, len(sources))
    dtype = m.dtype_of(args.dtype, sources)
    facts = m.training_facts(sources)
    if args.task is None and len(facts.query_prompts) > 1:
        raise UserError(
            f"the sources have {len(facts.query_prompts)} query prompts {facts.query_prompts}; choose with --task"
        )
    prompt = query_prompt(args.task) if args.task is not None else "".join(facts.query_prompts)
    tokenizers = [load_tokenizer(source.folder) for source in sources]
    if len({tokenizer.digest for tokenizer in tokenizers}) > 1:
        raise UserError(f"the tokenizers of {', '.join(args.sources)} differ; only models that share one are averaged")
    name = str(dtype).removeprefix("torch.")

    def write(folder: Path, members: Sequence[int], **how: Any) -> dict[str, Any]:
        chosen = [sources[i] for i in members]
        report = m.write_weights(folder, chosen, dtype, **how)
        card = {**describe(chosen, report), "title": args.output.name, "command": shown_command(sys.argv)}
        if decisions:
            score = next(decision["score"] for decision in decisions if decision["members"] == list(members))
            card["metrics"] = {shown_command(shlex.split(args.evaluate)): {"score": score}}
        settings = {"format": args.format, "query_prompt": prompt, "max_seq_length": facts.max_length, "card": card}
        write_folder(folder, sources[0].model, name, tokenizers[0].files, **settings)
        return report

    with new_folder(args.output) as folder:
        members, decisions = list(range(len(sources))), list[dict[str, Any]]()
        if args.method == "soup":
            names = [m.source_name(source) for source in sources]
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


def check(folder: Path, trust_remote_code: bool = False) -> None:
    """transformers and sentence-transformers, in a fresh process, give our encoder's vectors, and no mask is causal."""
    from nemo_embed_core.embedder import Embedder
    from nemo_embed_core.export.verify import verify_folder
    from nemo_embed_core.model.hf_config import read_json

    max_length = int(read_json(folder / "sentence_bert_config.json").get("max_seq_length") or 512)

    def embed(texts: list[str]) -> Any:  # our copy of the weights is gone when it returns
        return Embedder.load(str(folder), device="cpu", precision="fp32").encode(texts, max_length=max_length)

    report = verify_folder(folder, embed, trust_remote_code)
    print("\n".join(f"  {key}: {value}" for key, value in report.items()), flush=True)


if __name__ == "__main__":
    main()
