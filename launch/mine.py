"""Mine hard negatives: the best-scoring passages below threshold x the positive's score.

python launch/mine.py --threshold 0.95 --model runs/stage1 --data data/train.jsonl --output data/mined.jsonl
torchrun --nproc-per-node 8 launch/mine.py --config configs/mine.yaml --output data/mined.jsonl
"""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.config import (
    DatasetConfig,
    MineConfig,
    ParallelConfig,
    UserError,
    load_config,
    run_rank,
    user_errors,
)


def main() -> None:
    config = load_config(MineConfig)
    with user_errors():
        check(config)
        from nemo_embed_core.parallel.layout import rank_from_env, world_size_from_env

        if config.write_texts:
            if rank_from_env() == 0:
                write_texts(config)
            return
        from nemo_embed_core.parallel.mesh import distributed

        # Ranks wait for each other only at the ends of encoding and of each block of queries: hours, when one resumes.
        parallel = ParallelConfig(dp_size=world_size_from_env(), timeout_s=24 * 3600)
        with distributed(parallel, config.device) as mesh:
            mine(config, mesh)


def check(config: MineConfig) -> None:
    """What can be wrong without reading anything, before the first hour of encoding."""
    from nemo_embed_core.mine.formats import FORMATS

    unknown = sorted(set(config.formats) - set(FORMATS))
    if unknown:
        raise UserError(f"formats={unknown}: none of {', '.join(FORMATS)}")
    for model in config.models:
        if not Path(model).is_dir():
            raise UserError(f"model {model} is not a folder; give a checkpoint, a run, a model folder or embeddings")
    single = len(config.datasets) <= 1
    if config.output and Path(config.output).exists() and Path(config.output).is_dir() == single:
        what = "a folder, and one dataset is written to a file" if single else "a file, and several need a folder"
        raise UserError(f"output {config.output} is {what}: choose another name")


def named_datasets(config: MineConfig) -> dict[str, DatasetConfig]:
    """The name of each dataset's file or folder, with a number where two have the same."""
    base = {"path": config.data, "task": config.task, "document_task": config.document_task, "split": config.split}
    named: dict[str, DatasetConfig] = {}
    for dataset in config.datasets or [DatasetConfig(**base)]:
        stem = Path(dataset.path).name.removesuffix(".gz").removesuffix(".jsonl")
        count = 1
        while (name := stem if count == 1 else f"{stem}-{count}") in named:
            count += 1
        named[name] = dataset
    return named


def read(config: MineConfig, dataset: DatasetConfig) -> tuple[list[Any], list[str]]:
    """(rows, other passages to search): of a BEIR folder the whole corpus, not only what the split judges relevant."""
    from nemo_embed_core.data.readers import read_beir, read_passages, read_rows

    passages = []
    if Path(dataset.path).is_dir():
        passages += read_beir(dataset.path, dataset.split).corpus.values()
    if config.corpus:
        passages += read_passages(config.corpus)
    return list(read_rows(dataset)), passages


def write_texts(config: MineConfig) -> None:
    """What a run embeds, once each, for those who embed elsewhere; then --model takes the folder with the two .npy."""
    from nemo_embed_core.mine.corpus import write_atomically
    from nemo_embed_core.mine.pool import Pool

    texts: dict[str, dict[str, None]] = {"documents": {}, "queries": {}}
    for dataset in named_datasets(config).values():
        rows, passages = read(config, dataset)
        texts["documents"] |= dict.fromkeys(Pool.of_rows(rows, passages).texts)
        texts["queries"] |= dict.fromkeys(row.query for row in rows)
    folder = Path(config.write_texts)
    folder.mkdir(parents=True, exist_ok=True)
    for side, lines in texts.items():
        jsonl = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in lines)
        write_atomically(folder / f"{side}.jsonl", (line.encode() for line in jsonl))
        print(f"wrote {folder / side}.jsonl: {len(lines):,} texts; put {side}.npy beside it, row i for line i")


def loader(config: MineConfig, device) -> Callable[[str, DatasetConfig], Any]:
    """(path, dataset) -> teacher; a single model is loaded once for all datasets."""
    kept: dict[str, Any] = {}

    def load(path: str, dataset: DatasetConfig) -> Any:
        from nemo_embed_core.checkpoint.source import resolve
        from nemo_embed_core.embedder import Embedder
        from nemo_embed_core.evaluation.encoders import SentenceTransformerEncoder
        from nemo_embed_core.mine.teachers import Teacher, open_precomputed

        kind = resolve(path).kind
        if kind == "precomputed":
            return open_precomputed(path, dataset)
        if path not in kept:
            kept.clear()  # before the next one is loaded
            if kind == "sentence-transformers":
                if importlib.util.find_spec("sentence_transformers") is None:
                    raise UserError(f"{path} needs sentence-transformers: pip install nemo_embed_core[eval]")
                precision = config.precision
                if precision == "auto":
                    precision = "bf16" if device.type == "cuda" else "fp32"
                kept[path] = Teacher.of_unit_rows(SentenceTransformerEncoder(path, str(device), precision))
            else:
                kept[path] = Embedder.load(path, config.device, config.precision, config.max_tokens)
        return kept[path]

    return load


def mine(config: MineConfig, mesh) -> None:
    from nemo_embed_core.data.prompts import query_prompt
    from nemo_embed_core.mine.corpus import Ranks, write_atomically
    from nemo_embed_core.mine.formats import convert_all
    from nemo_embed_core.mine.negatives import mine_negatives
    from nemo_embed_core.mine.report import plot_datasets, plot_report, print_groups
    from nemo_embed_core.mine.selection import Selection
    from nemo_embed_core.parallel.collectives import gather_objects

    load, datasets, reports = loader(config, mesh.device), named_datasets(config), {}
    failed: dict[str, str] = {}  # files of other formats, and why
    can_plot = importlib.util.find_spec("matplotlib") is not None
    single = len(datasets) == 1
    for name, dataset in datasets.items():
        output = Path(config.output) if single else Path(config.output) / f"{name}.jsonl"
        if mesh.rank == 0 and not single:
            print(f"\n{name}: {dataset.path}", flush=True)
        rows, passages = read(config, dataset)

        def teachers(dataset: DatasetConfig = dataset) -> Iterator[Any]:
            for path in config.models:
                yield load(path, dataset)

        reports[name] = mine_negatives(
            rows,
            teachers(),
            output,
            passages=passages,
            selection=Selection(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Selection)}),
            sweep=config.sweep,
            prompt=query_prompt(dataset.task),
            document_prompt=query_prompt(dataset.document_task),
            query_max_length=config.query_max_length,
            document_max_length=config.document_max_length,
            device=mesh.device,
            method=config.method,
            dtype=config.dtype,
            shard_size=config.shard_size,
            block_queries=config.block_queries,
            ranks=Ranks(mesh.dp_rank, mesh.dp_size, gather_objects),
            log=functools.partial(print, flush=True),  # a log file shows each line when it is said
        )
        if mesh.rank == 0:
            if can_plot:
                plot_report(reports[name], f"{output}.report.png")
            prompts = {"prompt": query_prompt(dataset.task), "document_prompt": query_prompt(dataset.document_task)}
            failed |= convert_all(output, config.formats, num_negatives=config.num_negatives, **prompts)
    if mesh.rank == 0 and not single:
        folder = Path(config.output)
        print()
        print_groups("dataset", reports, config.num_negatives)
        write_atomically(folder / "report.json", json.dumps(reports, indent=1, ensure_ascii=False).encode())
        if can_plot:
            plot_datasets(reports, f"{folder}/report.png")
        print(f"wrote {folder}/report.json; to train: --data.datasets, each with the task it was mined with")
    if mesh.rank == 0 and not can_plot:
        print("no pictures of the reports: pip install matplotlib")
    if failed:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in failed.items())
        raise UserError(f"all is mined, but {len(failed)} of --formats could not be written: {reasons}")


if __name__ == "__main__":
    run_rank(main)
