"""What a run reads: every row and document before anything is encoded, and again when it is mined.

Texts of a dataset folder are read from it when they are encoded; all others stand on disk beside the output
until then (data/texts.py), a copy for each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from nemo_embed_core.config import DatasetConfig, MineConfig, MineDatasetConfig
from nemo_embed_core.data.formats.beir import splits as beir_splits
from nemo_embed_core.data.normal_form import normal_key
from nemo_embed_core.data.readers import (
    BadLines,
    Beir,
    Findings,
    has_corpus,
    is_beir,
    read_beir,
    read_documents,
    read_rows,
    read_splits,
    source_files,
)
from nemo_embed_core.data.texts import texts_in
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.folder import FolderRows, is_read_by_ids, read_folder
from nemo_embed_core.mine.pool import Document, Known

Log = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """known: relevant documents over all data sets and splits. excluded: normal keys of --exclude. counts: by
    data set of documents and queries. num_bytes: of the texts that a rank keeps on disk, at most."""

    known: Known
    excluded: set[bytes]
    counts: dict[str, tuple[int, int]]
    num_bytes: int


def documents_of(config: MineConfig, dataset: MineDatasetConfig) -> Iterator[Document]:
    """Documents to search beside those of the rows: of a BEIR folder the whole corpus, and --corpus."""
    if has_corpus(dataset.as_data()) and config.pool == "all":
        corpus = read_beir(dataset.as_data()).corpus
        yield from (Document(corpus[key], key) for key in corpus)
    if config.corpus:
        yield from (Document(text, key) for key, text in read_documents(config.corpus, config.on_missing))


def input_files(config: MineConfig, datasets: Iterable[MineDatasetConfig]) -> list[Path]:
    """Every file of data that is read."""
    found = [file for dataset in datasets for file in source_files(dataset.as_data())]
    found += map(Path, [config.corpus] if config.corpus else [])
    for path in config.exclude:
        folder, _, split = path.rpartition(":")
        is_split = folder and Path(folder).is_dir()
        found += source_files(DatasetConfig(path=folder, split=split)) if is_split else [Path(path)]
    return found


def by_ids(config: MineConfig, dataset: MineDatasetConfig) -> bool:
    return is_read_by_ids(dataset.as_data(), has_more_documents=bool(config.corpus))


def read_all(config: MineConfig, datasets: dict[str, MineDatasetConfig], log: Log, ranks: Ranks) -> Inputs:
    """UserError with every file that does not exist, the first 20 bad lines of all others and their
    number."""
    known, findings, excluded = Known(), Findings(log=log), set[bytes]()
    unread: list[str] = []

    def readable(items: Iterable[T]) -> Iterator[T]:
        try:
            yield from items
        except UserError as error:  # the file is missing, say; its bad lines go to `findings`
            unread.append(str(error))

    corpus = read_documents(config.corpus, config.on_missing, findings) if config.corpus else ()
    num_corpus = of_corpus = 0
    for _, text in readable(corpus):
        num_corpus, of_corpus = num_corpus + 1, of_corpus + len(text.encode())
    for paths in _by_folder(config.exclude):
        excluded.update(readable(_excluded(paths, findings)))
    counts: dict[str, tuple[int, int]] = {}
    num_bytes: dict[str, int] = {}
    for name, dataset in datasets.items():
        if by_ids(config, dataset):
            counts[name] = (0, 0)
            for table in readable(_folders(dataset, ranks, findings)):
                known.queries += table.known.queries
                known.documents += table.known.documents
                counts[name] = (len(table.pool.texts), len(table))
            continue
        documents, num_rows, num_bytes[name] = set[int](), 0, 0
        for row in readable(read_rows(dataset.as_data(), findings)):
            known.add(row.query, row.pos)
            if config.output_format == "dataset" and row.prompt is not None:
                what = "the row has an instruction of its own, a dataset folder one for all: output_format"
                findings.bad(Path(row.path), row.line, f"{what} jsonl keeps it")
            new = [text for text in (*row.pos, *row.neg) if hash(text) not in documents]
            num_bytes[name] += sum(len(text.encode()) for text in (row.query, *new))
            documents.update(map(hash, new))
            num_rows += 1
        counts[name] = (len(documents) + num_corpus, num_rows)
    if unread:
        bad = [str(BadLines(findings.named, findings.num_bad))] if findings.num_bad else []
        raise UserError("\n".join([*dict.fromkeys(unread), *bad]))
    findings.raise_bad()
    for line in findings.lines():
        log(line)
    for name in num_bytes:
        dataset = datasets[name]
        if has_corpus(dataset.as_data()):
            with texts_in(config.output or None) as kept:
                num_documents = _read_splits(config, name, dataset, known, log)
            counts[name] = (num_documents + num_corpus, counts[name][1])
            num_bytes[name] = 2 * kept.num_bytes  # as the reader has them, and each once for the search
    if excluded:
        log(f"--exclude: {len(excluded):,} documents are not searched")
    return Inputs(known, excluded, counts, of_corpus + max(num_bytes.values(), default=0))


def _folders(dataset: MineDatasetConfig, ranks: Ranks, findings: Findings) -> Iterator[FolderRows]:
    """One, or none where a row is bad."""
    if (table := read_folder(dataset.as_data(), ranks, findings)) is not None:
        yield table


def _by_folder(paths: Iterable[str]) -> list[list[str]]:
    """Splits of one folder together, whose corpus is then read once."""
    found: dict[str, list[str]] = {}
    for path in paths:
        folder = path.rpartition(":")[0]
        found.setdefault(folder if folder and Path(folder).is_dir() else path, []).append(path)
    return list(found.values())


def _excluded(paths: list[str], findings: Findings) -> Iterator[bytes]:
    """Normal keys of the documents of `file.jsonl[.gz]`, or of those judged in `beir/folder:split`, several
    splits of one."""
    folder = paths[0].rpartition(":")[0]
    if folder and Path(folder).is_dir():
        splits = dict.fromkeys(path.rpartition(":")[2] for path in paths)
        configs = [DatasetConfig(path=folder, split=split, on_missing="allow") for split in splits]
        for beir in read_splits(configs, [findings] * len(configs)):
            judged = dict.fromkeys(doc for scores in beir.qrels.values() for doc in scores)
            yield from (normal_key(beir.corpus[doc]) for doc in judged if doc in beir.corpus)
    elif Path(paths[0]).is_dir():
        add = f"add the split whose documents are meant, as {paths[0]}:test"
        raise UserError(f"exclude {paths[0]} is a folder: {add}")
    else:
        yield from (normal_key(text) for _, text in read_documents(paths[0], "allow", findings))


def _read_splits(config: MineConfig, name: str, dataset: MineDatasetConfig, known: Known, log: Log) -> int:
    """How many documents there are. Adds the judgements of a BEIR folder's other splits to `known`; says how
    many only they have."""
    data = dataset.as_data()
    others = [split for split in beir_splits(Path(data.path)) if split != data.split] if is_beir(data) else []
    configs = [data, *(replace(data, split=split, on_missing="allow") for split in others)]
    findings = [Findings(log=log) for _ in configs]
    first, *beirs = read_splits(configs, findings)
    own = {key for _, relevant in _relevant(first) for key in relevant}
    for split, beir, met in zip(others, beirs, findings[1:], strict=True):
        judged = set[str]()
        for query, relevant in _relevant(beir):
            known.add(query, relevant.values())
            judged.update(relevant)
        if met.num_bad:
            bad = f"{met.num_bad:,} bad lines, the first {met.named[0]}"
            log(f"{name}: split {split} has {bad}: what it judges relevant is not all known")
        option = f"{dataset.path}:{split}"
        if only := len(judged - own):
            what = f"searched too; --exclude {option} leaves them out"
            what = "not searched" if option in config.exclude else what
            log(f"{name}: {only:,} documents are relevant in split {split} only: {what}")
    return len(first.corpus)


def _relevant(beir: Beir) -> Iterator[tuple[str, dict[str, str]]]:
    """(query, its documents above 0 by id), of texts with content."""
    for key, scores in beir.qrels.items():
        found = {doc: beir.corpus.get(doc, "") for doc, score in scores.items() if score > 0}
        relevant = {doc: text for doc, text in found.items() if text}
        if relevant and (query := beir.queries.get(key, "")):
            yield query, relevant
