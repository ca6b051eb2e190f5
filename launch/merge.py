"""Sharded checkpoints to a Hugging Face folder; several sources are averaged.

python launch/merge.py runs/stage2 -o exports/model
python launch/merge.py runs/a runs/b runs/c -o exports/average
python launch/merge.py --check exports/model        (prove any exported folder, also somebody else's)
"""

import argparse
from pathlib import Path

from nemo_embed_core.config import UserError, user_errors


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="runs, checkpoints or Hugging Face folders; several are averaged")
    parser.add_argument("-o", "--output", type=Path, help="folder to make; must not exist or be empty")
    parser.add_argument("--check", type=Path, metavar="DIR", help="only prove DIR: weights, causality, embeddings")
    dtypes = ("auto", "bf16", "fp32", "fp16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: the sources' own")
    parser.add_argument("--task", help="instruction of the query prompt; default: the one the model was trained with")
    args = parser.parse_args()
    if bool(args.check) == bool(args.sources and args.output):
        parser.error("give sources and -o DIR, or --check DIR")
    return args


def main() -> None:
    args = parse()
    with user_errors():
        if args.check:
            check(args.check)
        else:
            merge(args)


def merge(args: argparse.Namespace) -> None:
    from nemo_embed_core.checkpoint.files import new_folder
    from nemo_embed_core.checkpoint.merge import dtype_of, open_sources, source_name, training_facts, write_weights
    from nemo_embed_core.data.prompts import query_prompt
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.export.folder import write_folder

    sources = open_sources(args.sources)
    dtype = dtype_of(args.dtype, sources)
    facts = training_facts(sources)
    if args.task is None and len(facts.tasks) > 1:
        raise UserError(f"the model was trained with {len(facts.tasks)} tasks {facts.tasks}; choose one with --task")
    task = args.task if args.task is not None else "".join(facts.tasks)
    tokenizers = [load_tokenizer(source.folder) for source in sources]
    if len({tokenizer.digest for tokenizer in tokenizers}) > 1:
        raise UserError(f"the tokenizers of {', '.join(args.sources)} differ; only models that share one are averaged")
    card = {
        "title": args.output.name,
        "base_model": facts.init_from,
        "parents": [source_name(source) for source in sources],
        "datasets": facts.datasets,
        "recipe": facts.recipe,
    }
    name = str(dtype).removeprefix("torch.")
    with new_folder(args.output) as folder:
        write_weights(folder, sources, dtype)
        settings = {"query_prompt": query_prompt(task), "max_seq_length": facts.max_length, "card": card}
        write_folder(folder, sources[0].model, name, tokenizers[0].files, **settings)
        check(folder)  # a folder that fails is not published
    print(f"wrote {args.output} ({name}, mean of {len(sources)})")


def check(folder: Path) -> None:
    """transformers and sentence-transformers, in a fresh process, give our encoder's vectors, and no mask is causal."""
    from nemo_embed_core.embedder import Embedder
    from nemo_embed_core.export.verify import verify_folder
    from nemo_embed_core.model.hf_config import read_json

    max_length = int(read_json(folder / "sentence_bert_config.json").get("max_seq_length") or 512)
    embedder = Embedder.load(str(folder), device="cpu", precision="fp32")
    report = verify_folder(folder, lambda texts: embedder.encode(texts, max_length=max_length))
    print("\n".join(f"  {key}: {value}" for key, value in report.items()), flush=True)


if __name__ == "__main__":
    main()
