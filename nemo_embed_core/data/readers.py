"""Data as people write it, read strictly: a bad row stops with `path:line: what and why`.

Two formats, plain or .gz:
- JSONL rows {"query": str, "pos": [str, ...], "neg": [str, ...]} (formats/ours.py);
- a BEIR folder: corpus.jsonl, queries.jsonl, qrels/{split}.tsv (formats/beir.py).

Nothing is skipped, repaired or cast in silence (docs/data-formats.md has the list). What is read but has to
be said, as a null title, is noted in a Findings; with Findings() reading also goes on after a bad line and
the caller raises all of them:

    for line in check_sources(config.datasets).lines(): log(line)      # before anything else is done
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.formats.beir import (
    Beir,
    OnMissing,
    beir_files,
    beir_rows,
    beir_split,
    has_irrelevant,
    pool_texts,
)
from nemo_embed_core.data.formats.ours import jsonl_rows
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.lines import BadLines, Findings, check_file

__all__ = [
    "BadLines", "Beir", "Findings", "Row",
    "check_sources", "read_beir", "read_documents", "read_passages", "read_rows", "reading", "source_files",
]  # fmt: skip


def read_rows(config: DatasetConfig, findings: Findings | None = None) -> Iterator[Row]:
    """The rows of a JSONL file or a BEIR split (a row per judged query: score > 0 is pos, the others neg).

    DataError at the first bad line of a JSONL file; a BEIR split is read whole before its first row, so at
    all of them. findings: the caller's; with one that is not strict the good rows are given and nothing is
    raised.
    """
    path = Path(config.path)
    if not path.is_dir():
        yield from jsonl_rows(path, findings or Findings(strict=True))
        return
    # Not `findings or`: what the split's files have wrong is collected, then raised before the first row.
    own = findings if findings is not None else Findings()
    for row in beir_rows(path, config.split, config.on_missing, own):
        if findings is None:
            own.raise_bad()
        yield row
    if findings is None:
        own.raise_bad()


def source_files(config: DatasetConfig) -> list[Path]:
    """The files that read_rows(config) reads, in a fixed order."""
    path = Path(config.path)
    if path.is_dir():
        return beir_files(path, config.split)
    check_file(path)
    return [path]


def reading(config: DatasetConfig) -> list[str]:
    """Options that decide the rows besides the bytes of source_files, for digests: mostly none."""
    path, how = Path(config.path), []
    if path.is_dir():
        if config.on_missing != "error":
            how.append(f"on_missing={config.on_missing}")
        if has_irrelevant(path, config.split):
            how.append("judged irrelevant: neg")  # what was made before they were read has none
    return how


def check_sources(datasets: Iterable[DatasetConfig], log: Callable[[str], None] | None = None) -> Findings:
    """Reads every row of all data sets once, with progress, and returns what has to be said about them.

    DataError with the first 20 bad lines of all files and the number of them all.
    """
    datasets, findings = list(datasets), Findings(log=log)
    for dataset in datasets:
        source_files(dataset)  # a missing file is said before the first one is read
    for dataset in datasets:
        for _ in read_rows(dataset, findings):
            findings.num_rows += 1
    findings.raise_bad()
    return findings


def read_beir(
    path: str | Path, split: str, on_missing: OnMissing = "error", findings: Findings | None = None
) -> Beir:
    """A split: every corpus text, the queries that it judges, qrels[query id][document id] = score.

    on_missing: see DatasetConfig; allowed empty texts are "", and judgements of documents that do not exist
    stay in the qrels, as they do in mteb. DataError with the first 20 bad lines, unless the caller's
    `findings` collects them.
    """
    own = findings if findings is not None else Findings()
    beir = beir_split(Path(path), split, on_missing, own)
    if findings is None:
        own.raise_bad()
    return beir


def read_documents(
    path: str | Path, on_missing: OnMissing = "error", findings: Findings | None = None
) -> Iterator[tuple[str, str]]:
    """(id or "", text) of a candidate pool: JSONL lines {"text": str, "title"?: str, "_id"?: str, ...}."""
    yield from pool_texts(Path(path), on_missing, findings if findings is not None else Findings(strict=True))


def read_passages(path: str | Path) -> Iterator[str]:
    """The texts of read_documents."""
    return (text for _, text in read_documents(path))
