"""Data as people write it, read strictly: a bad row stops with `path:line: what and why`.

Two questions: the container (JSON lines, CSV, Parquet, a folder of shards; data/records.py), told by the
name, and the format of a row (one module of data/formats/ each), told by its fields or named by the dataset.
A BEIR folder is both (formats/beir.py).

Nothing is skipped, repaired or cast in silence (docs/data-formats.md has the list). What is read but has to
be said, as a null title, is noted in a Findings; with Findings() reading also goes on after a bad line and
the caller raises all of them:

    for line in check_sources(config.datasets).lines(): log(line)      # before anything else is done
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.containers import HEADER
from nemo_embed_core.data.formats import (
    automodel,
    automodel_ids,
    bitext,
    contrastors,
    f2llm,
    flagembedding,
    labels,
    ms_swift,
    msmarco,
    ours,
    sentence_transformers,
    sts,
    tevatron,
)
from nemo_embed_core.data.formats import dataset as dataset_folder
from nemo_embed_core.data.formats.beir import (
    Beir,
    OnMissing,
    beir_files,
    beir_rows,
    beir_split,
    has_irrelevant,
    is_beir,
    pool_texts,
)
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.hub import hub_address, hub_commit
from nemo_embed_core.data.lines import NOISE, BadLines, Findings, is_noise, short
from nemo_embed_core.data.records import Record, Source, find, has_rows, records
from nemo_embed_core.errors import DataError, UserError

__all__ = [
    "BadLines", "Beir", "Findings", "Row",
    "check_sources", "corpus_format", "has_corpus", "is_folder_of_texts", "read_beir", "read_documents",
    "read_passages", "read_rows", "reading", "source_files", "with_tasks",
]  # fmt: skip


class Format(Protocol):
    """A module of data/formats/: how a record becomes a row.

    It may also have COLUMNS = True: fields count by their order; NUMBERS: fields that are numbers, also in
    CSV; scan(records): what row() gets as its fourth argument, of all records.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def EXAMPLE(self) -> str: ...  # of a row, for messages
    @property
    def OPTIONAL(self) -> tuple[str, ...]: ...  # fields that a row may lack: null, then, in a columnar file
    def sniff(self, fields: dict[str, Any]) -> bool: ...
    @property
    def row(self) -> Callable[..., Row]: ...  # (fields, path, line): ValueError says what is wrong


FORMATS: tuple[Format, ...] = (
    ours, flagembedding, sentence_transformers, tevatron, automodel, contrastors, f2llm, ms_swift, sts,
    labels, bitext,
)  # fmt: skip


class CorpusFormat(Protocol):
    """A module of data/formats/: texts in files of their own, which rows name by id."""

    @property
    def NAME(self) -> str: ...
    def takes(self, path: Path) -> bool: ...
    def files(self, config: DatasetConfig) -> list[Path]: ...  # that decide the rows; theirs last
    # Of queries and documents, as the data has them.
    def tasks(self, config: DatasetConfig) -> tuple[str, str]: ...
    def rows(self, config: DatasetConfig, findings: Findings) -> Iterator[Row]: ...
    def beir(self, config: DatasetConfig, findings: Findings) -> Beir: ...  # for evaluation: the whole corpus


CORPUS_FORMATS: tuple[CorpusFormat, ...] = (dataset_folder, automodel_ids, msmarco)


def read_rows(config: DatasetConfig, findings: Findings | None = None, graded: bool = False) -> Iterator[Row]:
    """The rows of a dataset, in the order of its files (of a BEIR split a row per judged query: score > 0 is
    pos, the others neg).

    DataError at the first bad line; a BEIR split is read whole before its first row, so at all of them.
    findings: the caller's; with one that is not strict the good rows are given and nothing is raised.
    graded: also graded pairs, as they are; else those of config.min_grade and above, without it an error.
    """
    one = corpus_format(config)
    if one is None and not is_folder_of_texts(config):
        rows = _rows(config, findings or Findings(strict=True))
        yield from rows if graded else _positive(rows, config.min_grade, findings or Findings(strict=True))
        return
    # Not `findings or`: what the split's files have wrong is collected, then raised before the first row.
    own = findings if findings is not None else Findings()
    if one is None:
        found = beir_rows(Path(config.path), config.split, config.on_missing, own)
    else:
        found = one.rows(config, own) if graded else _positive(one.rows(config, own), config.min_grade, own)
    for row in found:
        if findings is None:
            own.raise_bad()
        yield row
    if findings is None:
        own.raise_bad()


def corpus_format(config: DatasetConfig) -> CorpusFormat | None:
    """Named, or told by its files; None: it is BEIR, or has its texts in the rows."""
    path = Path(config.path)
    return next(
        (f for f in CORPUS_FORMATS if config.format == f.NAME or (not config.format and f.takes(path))), None
    )


def has_corpus(config: DatasetConfig) -> bool:
    """Whether it has documents that may be in no row."""
    return corpus_format(config) is not None or is_folder_of_texts(config)


def with_tasks(config: DatasetConfig) -> DatasetConfig:
    """config with the instructions that the data itself has, where it names none."""
    if (one := corpus_format(config)) is None:
        return config
    task, document_task = one.tasks(config)
    return replace(config, task=config.task or task, document_task=config.document_task or document_task)


def is_folder_of_texts(config: DatasetConfig) -> bool:
    """Whether it is a BEIR folder."""
    folder = Path(config.path)
    if config.format or not folder.is_dir() or corpus_format(config) is not None:
        return config.format == "beir"
    return is_beir(folder) or not has_rows(folder)  # neither: beir_files says so


def _positive(rows: Iterable[Row], min_grade: float | None, findings: Findings) -> Iterator[Row]:
    """Of graded pairs those that belong together."""
    found, row = False, None
    for row in rows:
        if (row.grade is None) != (min_grade is None):
            what, fix = "a row without a grade, and the dataset's min_grade is set", "remove that option"
            if row.grade is not None:
                what = f"a graded pair (grade {row.grade:g}), which the contrastive loss has no use for"
                fix = "set the dataset's min_grade to the grade from which pairs belong together"
            findings.bad(Path(row.path), row.line, f"{what}: {fix}")
            return  # every other line would be as bad
        if row.grade is not None and min_grade is not None and row.grade < min_grade:
            findings.note(
                f"pairs with a grade below min_grade={min_grade:g}, left out", Path(row.path), row.line
            )
            continue
        found = True
        yield row
    if row is not None and not found:
        findings.bad(
            Path(row.path), row.line, f"no row is left: none has a grade of min_grade={min_grade:g} or more"
        )


def _rows(config: DatasetConfig, findings: Findings) -> Iterator[Row]:
    source = find(config.path, config.split)
    one = _named(config.format) if config.format else None
    if "no_in_batch_neg" in Path(config.path).name:  # FlagEmbedding's mark
        what = "data sets named no_in_batch_neg, whose negatives in batch are used all the same"
        findings.note(f"{what} (loss.in_batch)", Path(config.path), 1)
    order = list(config.columns)
    ids: dict[str, tuple[Path, int]] = {}
    more: tuple[Any, ...] | None = None
    for record in records(source, findings, (one or ours).EXAMPLE):
        path, line, fields = _chosen(record, config)
        try:
            if one is None:
                one = _sniffed(fields)
                if one is None and source.is_text:
                    message = (
                        f"line 1 names the columns, {short(list(fields))}, and no format has these: {HEADER}"
                    )
                    findings.bad(path, 1, f"{message}; or rename them, or set the dataset's format")
                    return
                one = one or ours  # whose messages say how to write rows
                if one is not ours:
                    findings.note(
                        f"data sets read as {one.NAME} (set their format where it is another)", path, line
                    )
            if more is None:
                more = (one.scan(_fields(source, config, one)),) if hasattr(one, "scan") else ()
            fields = _as_written(fields, source, one)
            if getattr(one, "COLUMNS", False):
                order = order or list(fields)
                fields = _ordered(fields, order)
            elif order:
                raise ValueError(f"the dataset's columns are set, and {one.NAME} reads fields by their names")
            row = one.row(fields, str(path), line, *more)
            if row.id:
                first = ids.setdefault(row.id, (path, line))
                if first != (path, line):
                    where = f"line {first[1]}" if first[0] == path else f"{first[0]}:{first[1]}"
                    raise ValueError(f"id {short(row.id)} is already the id of {where}: make ids unique")
        except ValueError as error:
            findings.bad(path, line, str(error))
            continue
        _note_noise(row, path, line, findings)
        yield row


def _chosen(record: Record, config: DatasetConfig) -> Record:
    """Without the fields that are ignored, in the order of the dataset's columns."""
    fields, order = record.fields, config.columns
    if config.ignore:
        fields = {name: v for name, v in fields.items() if name not in config.ignore}
    if fields.keys() == set(order):
        fields = {name: fields[name] for name in order}
    return record._replace(fields=fields)


def _as_written(fields: dict[str, Any], source: Source, one: Format) -> dict[str, Any]:
    """Without what the container has to write where a row has nothing, and numbers where it has only text."""
    if source.is_columnar:
        return {name: v for name, v in fields.items() if v is not None or name not in one.OPTIONAL}
    if not source.is_text:
        return fields
    fields = {name: v for name, v in fields.items() if v or name not in one.OPTIONAL}
    for name in getattr(one, "NUMBERS", ()):
        if re.fullmatch(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", fields.get(name, ""), re.ASCII):
            fields[name] = float(fields[name])
    return fields


def _fields(source: Source, config: DatasetConfig, one: Format) -> Iterator[dict[str, Any]]:
    for record in records(source, Findings(), one.EXAMPLE):
        yield _as_written(_chosen(record, config).fields, source, one)


def _ordered(fields: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """In the order of the first row, or of the dataset's columns; the keys of a JSON object have none."""
    if fields.keys() != set(order):
        whose = "of the first row or of the dataset's columns"
        raise ValueError(f"columns {short(list(fields))} are not those {whose}, {short(order)}")
    return {name: fields[name] for name in order}


def _named(name: str) -> Format:
    for one in FORMATS:
        if name == one.NAME:
            return one
    names = ["beir", *(one.NAME for one in CORPUS_FORMATS), *(one.NAME for one in FORMATS)]
    raise UserError(f"format={name!r} is none of {', '.join(names)}")


def _sniffed(fields: dict[str, Any]) -> Format | None:
    """The format whose fields these are; ValueError where two take them."""
    found = [one for one in FORMATS if one.sniff(fields)]
    if len(found) > 1:
        names = " and ".join(one.NAME for one in found)
        raise ValueError(
            f"fields {short(list(fields))} are those of {names}: set the dataset's format to one"
        )
    return found[0] if found else None


def _format_of(config: DatasetConfig) -> tuple[Format, Source]:
    """As reading it would find it, of the first record that can be read."""
    source = find(config.path, config.split)
    if config.format:
        return _named(config.format), source
    for record in records(source, Findings(), ours.EXAMPLE):
        try:
            return _sniffed(_chosen(record, config).fields) or ours, source
        except ValueError as error:
            raise DataError(record.path, record.line, str(error)) from None
    return ours, source


def _note_noise(row: Row, path: Path, line: int, findings: Findings) -> None:
    if any(not text[0].isalnum() and is_noise(text) for text in (row.query, *row.pos, *row.neg)):
        for name, texts in {"queries": [row.query], "positives": row.pos, "negatives": row.neg}.items():
            if count := sum(map(is_noise, texts)):
                findings.note(f"{name} {NOISE}", path, line, count)


def source_files(config: DatasetConfig) -> list[Path]:
    """The files that read_rows(config) reads, in a fixed order."""
    if one := corpus_format(config):
        return one.files(config)
    if is_folder_of_texts(config):
        return beir_files(Path(config.path), config.split)
    return find(config.path, config.split).files


def reading(config: DatasetConfig) -> list[str]:
    """What decides the rows besides the bytes of source_files, for digests: nothing for files of our rows."""
    how = []
    if found := corpus_format(config):
        graded = [] if config.min_grade is None else [f"min_grade={config.min_grade:g}"]
        return [f"format={found.NAME}", *graded]
    if is_folder_of_texts(config):
        if config.on_missing != "error":
            how.append(f"on_missing={config.on_missing}")
        if has_irrelevant(Path(config.path), config.split):
            how.append("judged irrelevant: neg")  # what was made before they were read has none
        return how
    one, source = _format_of(config)
    if source.kind == "hf":
        hub = hub_address(source.path, source.split)
        how.append(f"hf={hub.name}/{hub.subset or ''}@{hub_commit(hub)}:{hub.split}")
    if one is not ours:
        how.append(f"format={one.NAME}")
    if source.kind not in ("jsonl", "json"):
        how.append(f"container={source.kind}")  # the same bytes under another name are other rows
    if config.ignore:
        how.append(f"ignore={','.join(sorted(config.ignore))}")
    if config.columns:
        how.append(f"columns={','.join(config.columns)}")
    if config.min_grade is not None:
        how.append(f"min_grade={config.min_grade:g}")
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
    path: str | Path,
    split: str,
    on_missing: OnMissing = "error",
    findings: Findings | None = None,
    source: str = "",
) -> Beir:
    """A BEIR split, or another folder with a corpus: every corpus text, the queries that it judges,
    qrels[query id][document id] = score.

    on_missing: see DatasetConfig; allowed empty texts are "", and judgements of documents that do not exist
    stay in the qrels, as they do in mteb. DataError with the first 20 bad lines, unless the caller's
    `findings` collects them.
    """
    own = findings if findings is not None else Findings()
    config = DatasetConfig(path=str(path), split=split, source=source)
    if one := corpus_format(config):
        beir = one.beir(config, own)
    else:
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
