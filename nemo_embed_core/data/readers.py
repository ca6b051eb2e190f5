"""Data as people write it, read strictly: a bad row stops with `path:line: what and why`.

A dataset is files of rows (records of a container, data/records.py, in a format, data/rows.py), or a corpus
with rows that name its texts by id (CORPUS_FORMATS here, BEIR among them).

Nothing is skipped, repaired or cast in silence (docs/data-formats.md has the list). What is read but has to
be said, as a null title, is noted in a Findings; with Findings() reading also goes on after a bad line and
the caller raises all of them:

    for line in check_sources(config.datasets).lines(): log(line)      # before anything else is done
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.formats import automodel_ids, beir, msmarco, msmarco_triples, ours, tevatron_ids
from nemo_embed_core.data.formats import dataset as dataset_folder
from nemo_embed_core.data.formats.beir import Beir, OnMissing, pool_texts
from nemo_embed_core.data.formats.row import Row, positive, with_grades
from nemo_embed_core.data.hub import hub_address, hub_commit
from nemo_embed_core.data.lines import MAX_NAMED, BadLines, Findings
from nemo_embed_core.data.records import Source, find, has_rows, records
from nemo_embed_core.data.rows import FORMATS, file_rows, format_of
from nemo_embed_core.errors import UserError

__all__ = [
    "BadLines", "Beir", "Findings", "Row",
    "check_sources", "checked_rows", "corpus_format", "files_of", "has_corpus", "is_beir", "read_beir",
    "read_documents", "read_passages", "read_rows", "read_splits", "reading", "source_files", "with_tasks",
]  # fmt: skip


class CorpusFormat(Protocol):
    """A module of data/formats/: texts in files of their own, which rows name by id."""

    @property
    def NAME(self) -> str: ...
    def told_by(self, path: Path) -> str: ...  # what in it says that it is one; "": nothing
    def files(self, config: DatasetConfig) -> list[Path]: ...  # that decide the rows; theirs last
    # Of queries and documents, as the data has them.
    def tasks(self, config: DatasetConfig) -> tuple[str, str]: ...
    def rows(self, config: DatasetConfig, findings: Findings) -> Iterator[Row]: ...
    def open_corpus(self, config: DatasetConfig, findings: Findings) -> Any: ...  # whole: what beir() takes
    def beir(self, config: DatasetConfig, corpus: Any, findings: Findings) -> Beir: ...  # for evaluation


CORPUS_FORMATS: tuple[CorpusFormat, ...] = (
    beir, dataset_folder, automodel_ids, tevatron_ids, msmarco, msmarco_triples,
)  # fmt: skip


WITH_SOURCE: tuple[CorpusFormat, ...] = (dataset_folder, tevatron_ids)


def corpus_format(config: DatasetConfig) -> CorpusFormat | None:
    """Named, or told by its files; None: its texts are in the rows. UserError where two formats fit, and for
    an option that the format would pass over."""
    one = _corpus_format(config)
    takes = {"ignore": (None, automodel_ids, tevatron_ids), "columns": (None,), "source": WITH_SOURCE}
    for option, formats in takes.items():
        if getattr(config, option) and one not in formats:
            what = f"a dataset of the format {one.NAME}" if one else "rows that have their texts"
            raise UserError(f"{config.path}: {option} is set, which does nothing for {what}: remove it")
    return one


def _corpus_format(config: DatasetConfig) -> CorpusFormat | None:
    path = Path(config.path)
    if config.format:
        names = [*(one.NAME for one in CORPUS_FORMATS), *(one.NAME for one in FORMATS)]
        if config.format not in names:
            raise UserError(f"format={config.format!r} is none of {', '.join(names)}")
        return next((one for one in CORPUS_FORMATS if config.format == one.NAME), None)
    found = [(one, mark) for one in CORPUS_FORMATS if (mark := one.told_by(path))]
    if len(found) > 1:
        both = " and ".join(f"{one.NAME} ({mark})" for one, mark in found)
        raise UserError(f"{path} is both {both}: remove the files of one, or set the dataset's format")
    if found:
        return found[0][0]
    return beir if path.is_dir() and not has_rows(path) else None  # whose files() say what it holds instead


def has_corpus(config: DatasetConfig) -> bool:
    """Whether it has documents that may be in no row."""
    return corpus_format(config) is not None


def is_beir(config: DatasetConfig) -> bool:
    return corpus_format(config) is beir


def with_tasks(config: DatasetConfig) -> DatasetConfig:
    """config with the task type and instructions that the data itself has, where it names none."""
    if (one := corpus_format(config)) is None:
        symmetric = config.task if config.task_type in ("sts", "bitext") else ""
        return replace(config, document_task=config.document_task or symmetric)
    task, document_task = one.tasks(config)
    kind: Any = config.task_type or (dataset_folder.task_type(config) if one is dataset_folder else "")
    config = replace(config, task=config.task or task, task_type=kind)
    return replace(config, document_task=config.document_task or document_task)


def read_rows(config: DatasetConfig, findings: Findings | None = None, graded: bool = False) -> Iterator[Row]:
    """The rows of a dataset, in the order of its files (of a BEIR split a row per judged query: score > 0 is
    pos, the others neg).

    DataError at the first bad line; a corpus is read whole before the first row, so at all of them.
    findings: the caller's; with one that is not strict the good rows are given and nothing is raised.
    graded: also graded pairs, as they are; else those of config.min_grade and above, without it an error.
    """
    one = corpus_format(config)
    # What the files of a corpus have wrong is collected, then raised before the first row.
    own = findings if findings is not None else Findings(strict=one is None)
    found = file_rows(config, find(config.path, config.split), own) if one is None else one.rows(config, own)
    if one not in (None, beir, dataset_folder) and not config.format:
        what = f"data sets read as {one.NAME} (set their format where it is another)"
        own.note(what, Path(config.path), 1)
    if config.grades:
        found = with_grades(found, own)
    elif not graded:
        found = positive(found, config.min_grade, own)
    for row in found:
        if findings is None:
            own.raise_bad()
        yield row
    if findings is None:
        own.raise_bad()


def read_beir(config: DatasetConfig, findings: Findings | None = None) -> Beir:
    """A dataset that has a corpus: every text of it, the queries that its split judges, and
    qrels[query id][document id] = score.

    With on_missing "allow" empty texts are "", and judgements of documents that do not exist stay in the
    qrels, as they do in mteb. DataError with the first 20 bad lines, unless the caller's `findings` collects
    them.
    """
    own = findings if findings is not None else Findings()
    (found,) = read_splits([config], [own])
    if findings is None:
        own.raise_bad()
    return found


def read_splits(configs: Sequence[DatasetConfig], findings: Sequence[Findings]) -> list[Beir]:
    """read_beir(config, findings) of each, which differ in their split and in what may be missing there: they
    share one corpus, read once as the first says and told of in the findings of each."""
    one = corpus_format(configs[0]) or beir  # a file of rows is no BEIR folder
    for config in configs:
        one.files(config)  # a split that is not there is said before the corpus is read
    is_one = all(own is findings[0] for own in findings)  # then lines that it knows already count once
    of_corpus = findings[0] if is_one else Findings(findings[0].strict, findings[0].log)
    corpus, found = one.open_corpus(configs[0], of_corpus), list[Beir]()
    for config, own in zip(configs, findings, strict=True):
        if own is not of_corpus:
            own.take(of_corpus.told())
        found.append(one.beir(config, corpus, own))
    return found


def read_documents(
    path: str | Path, on_missing: OnMissing = "error", findings: Findings | None = None
) -> Iterator[tuple[str, str]]:
    """(id or "", text) of a candidate pool: JSONL lines {"text": str, "title"?: str, "_id"?: str, ...}."""
    yield from pool_texts(Path(path), on_missing, findings if findings is not None else Findings(strict=True))


def read_passages(path: str | Path) -> Iterator[str]:
    """The texts of read_documents."""
    return (text for _, text in read_documents(path))


# ------------------------------------------------------------------------------------------ what is read


def source_files(config: DatasetConfig) -> list[Path]:
    """The files that read_rows(config) reads, in a fixed order."""
    if one := corpus_format(config):
        return one.files(config)
    return find(config.path, config.split).files


def files_of(datasets: Iterable[DatasetConfig]) -> list[list[Path]]:
    """source_files of each; UserError with all that is missing at once."""
    found, missing = [], []
    for dataset in datasets:
        try:
            found.append(source_files(dataset))
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("\n".join(dict.fromkeys(missing)))
    return found


GROUPED = "groups"  # of rows (the first has one), which stores from before knew nothing of


def reading(config: DatasetConfig) -> list[str]:
    """What decides the rows besides the bytes of source_files, for digests: nothing for files of our rows."""
    how, grade = list[str](), [] if config.min_grade is None else [f"min_grade={config.min_grade:g}"]
    grade += ["grades"] * config.grades
    if found := corpus_format(config):
        if found is beir:
            return beir.reading(config)
        is_grouped = found is dataset_folder and dataset_folder.has_groups(config)
        ignored = [f"ignore={','.join(sorted(config.ignore))}"] if config.ignore else []
        return [f"format={found.NAME}", *ignored, *grade, *[GROUPED] * is_grouped]
    source = find(config.path, config.split)
    one = format_of(config, source)
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
    is_grouped = one is ours and "group" not in config.ignore and _first_has(source, "group")
    return [*how, *grade, *[GROUPED] * is_grouped]


def _first_has(source: Source, field: str) -> bool:
    """Whether the first record that can be read has the field."""
    return next((r.fields.get(field) is not None for r in records(source, Findings(), ours.EXAMPLE)), False)


def checked_rows(
    config: DatasetConfig, findings: Findings, check: Callable[[DatasetConfig, Row], None] | None = None
) -> Iterator[Row]:
    """read_rows(config, findings) without those of which check(config, row) is a ValueError: they are `bad`,
    too."""
    for row in read_rows(config, findings):
        try:
            if check is not None:
                check(config, row)
        except ValueError as error:
            findings.bad(Path(row.path), row.line, str(error), row=True)
            continue
        yield row


def check_sources(
    datasets: Iterable[DatasetConfig],
    log: Callable[[str], None] | None = None,
    drop: bool = False,
    check: Callable[[DatasetConfig, Row], None] | None = None,
) -> Findings:
    """Reads every row of all data sets once, with progress, and returns what has to be said about them.

    DataError with the first 20 bad lines of all files and the number of them all. drop: rows that are bad are
    left out, see Findings; a data set of which none is left is an error with them.
    """
    datasets, findings = list(datasets), Findings(log=log, drop=drop)
    files_of(datasets)  # a missing file is said before the first one is read
    for dataset in datasets:
        first, before = len(findings.dropped), findings.num_rows
        for _ in checked_rows(dataset, findings, check):
            findings.num_rows += 1
        if drop and findings.num_rows == before and not findings.num_bad:
            named = findings.dropped[first : first + MAX_NAMED]
            what = f"{dataset.path}: no row is left; only rows can be left out, a corpus has to be whole"
            raise UserError(
                "\n".join([*named, f"{what} ({len(findings.dropped) - first:,} bad lines in all)"])
            )
    findings.raise_bad()
    return findings
