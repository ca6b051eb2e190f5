"""The rows of a dataset folder (data/dataset.py): questions joined with their documents by id.

One folder is read corpus first, its texts to disk and 40 bytes a document in memory, then queries by batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.dataset import (
    METADATA,
    Metadata,
    check_against,
    dataset_files,
    is_dataset,
    read_corpus,
    read_metadata,
    read_records,
    shards,
)
from nemo_embed_core.data.dataset_source import SourceTexts, source_files, source_texts
from nemo_embed_core.data.documents import Documents
from nemo_embed_core.data.formats.beir import Beir, beir_of
from nemo_embed_core.data.formats.row import Row, check_number, check_string, positive
from nemo_embed_core.data.lines import Findings, check_id, check_text, short
from nemo_embed_core.data.normal_form import exact_key
from nemo_embed_core.data.prompts import task_of
from nemo_embed_core.errors import UserError

NAME = "dataset"


def told_by(path: Path) -> str:
    return METADATA if is_dataset(path) else ""


def tasks(config: DatasetConfig) -> tuple[str, str]:
    """The tasks (data/prompts.py) of its queries and documents, as its metadata has them."""
    metadata = read_metadata(Path(config.path))
    return task_of(metadata.prefix("query")), task_of(metadata.prefix("passage"))


def task_type(config: DatasetConfig) -> str:
    """Our word for what its metadata says, as mteb names it (BitextMining); "" where that is empty."""
    word = read_metadata(Path(config.path)).task_type.lower()
    ours = {"bitextmining": "bitext", "multilabelclassification": "classification"}.get(word, word)
    return ours if ours in ("", "classification", "clustering", "sts", "bitext", "nli") else "retrieval"


def has_groups(config: DatasetConfig) -> bool:
    """Whether its queries have a column group."""
    import pyarrow.parquet

    try:
        return "group" in pyarrow.parquet.read_schema(shards(Path(config.path), "queries")[0]).names
    except (pyarrow.ArrowException, OSError):
        return False  # a damaged file is said where it is read


def files(config: DatasetConfig) -> list[Path]:
    """All that decides the rows, the queries last."""
    folder = Path(config.path)
    metadata = read_metadata(folder)
    if metadata.ids_only:
        return [*source_files(folder, config.source), *dataset_files(folder)]
    if config.source:
        raise UserError(f"{folder} has its texts: source={config.source} is for a folder of ids only")
    return dataset_files(folder)


def open_folder(
    config: DatasetConfig, findings: Findings, languages: dict[str, str] | None = None
) -> tuple[Metadata, Documents]:
    """UserError where files are missing or are not those that were written. languages: gets {id: lang} of the
    documents that say so."""
    folder = Path(config.path)
    files(config)
    metadata = read_metadata(folder, findings)
    check_against(folder, metadata)
    return metadata, read_corpus(folder, metadata, findings, config.source, languages)


Corpus = tuple[Metadata, Documents, dict[str, str]]  # and the languages of documents


def open_corpus(config: DatasetConfig, findings: Findings) -> Corpus:
    languages: dict[str, str] = {}
    return (*open_folder(config, findings, languages), languages)


def beir(config: DatasetConfig, corpus: Corpus, findings: Findings) -> Beir:
    """The whole corpus, and the positives as what is relevant: no negative is known to be irrelevant."""
    metadata, documents, languages = corpus
    rows = positive(_rows(config, metadata, documents, findings), config.min_grade, findings)
    return beir_of(documents, rows, languages)


def rows(config: DatasetConfig, findings: Findings) -> Iterator[Row]:
    yield from _rows(config, *open_folder(config, findings), findings)


def _rows(
    config: DatasetConfig, metadata: Metadata, documents: Documents, findings: Findings
) -> Iterator[Row]:
    folder, source, before = Path(config.path), config.source, findings.num_met
    if not documents.is_closed:
        return  # a document behind a bad row of the corpus seems not to exist
    texts = source_texts(folder, "queries", source, findings) if metadata.ids_only else None
    if findings.num_met > before:
        return  # a question behind a bad one would get the text of another
    seen: set[bytes] = set()
    num_rows = 0
    for path, line, fields in read_records(folder, "queries", metadata.ids_only, findings):
        num_rows += 1
        try:
            row = row_of(fields, metadata, documents, path, line, findings, texts)
            if (hashed := exact_key(row.id)) in seen:
                raise ValueError(stands_twice(row.id))
            seen.add(hashed)
        except ValueError as error:
            findings.bad(path, line, str(error), row=True)
            continue
        yield row
    if texts is not None and findings.num_met == before:
        texts.check_count(findings)
    if not num_rows and findings.num_met == before:
        findings.bad(shards(folder, "queries")[0], 1, "there are no rows")


def stands_twice(key: str) -> str:
    return f"question_id {short(key)} stands twice: make ids unique"


class ById(Protocol):
    """What stands for each document: its text, or what is equal where the texts are."""

    def get(self, key: str, /) -> Any: ...
    def __len__(self) -> int: ...


def row_of(
    fields: dict[str, Any],
    metadata: Metadata,
    documents: ById,
    path: Path,
    line: int,
    findings: Findings,
    texts: SourceTexts | None = None,
) -> Row:
    """The row of one record of the queries, of what `documents` has for texts; ValueError says what is wrong.
    texts: of a folder of ids only."""
    key = check_id(fields["question_id"], "question_id")
    query = check_text(fields["question"], "question") if texts is None else texts.at(key)
    corpus_id = fields["corpus_id"]
    if corpus_id != metadata.corpus_id:
        raise ValueError(
            f"corpus_id is {short(corpus_id)}, and the folder's corpus is {short(metadata.corpus_id)}"
        )
    return joined(fields, key, query, documents, str(path), line, findings)


def joined(
    fields: dict[str, Any],
    key: str,
    query: str,
    documents: ById,
    path: str,
    line: int,
    findings: Findings,
    names: tuple[str, str] = ("pos_doc", "neg_doc"),
) -> Row:
    """fields: those of `names`, lists of {id, score?}, and where known grade, lang, group."""
    pos, pos_scores = _entries(fields, names[0], documents)
    neg, neg_scores = _entries(fields, names[1], documents)
    if not pos:
        raise ValueError(f"{names[0]} is empty: at least one document is needed")
    if both := [name for name in pos if name in neg]:
        raise ValueError(f"document {short(both[0])} is in {names[0]} and in {names[1]}: remove it from one")
    relevant = set(pos.values())
    if same := [name for name, text in neg.items() if text in relevant]:
        findings.note("negatives with the text of a positive, left out", Path(path), line, len(same))
        if neg_scores:
            pairs = zip(neg_scores, neg.values(), strict=True)
            neg_scores = [score for score, text in pairs if text not in relevant]
        neg = {name: text for name, text in neg.items() if text not in relevant}
    grade = fields.get("grade")
    lang, group = fields.get("lang"), fields.get("group")
    return Row(
        query, list(pos.values()), list(neg.values()), path, line,
        lang=check_string(lang or "", "lang", '"de"'),
        id=key,
        group="" if group is None else check_id(group, "group"),
        pos_ids=list(pos), neg_ids=list(neg),
        grade=None if grade is None else check_number(grade, "grade"),
        pos_scores=pos_scores, neg_scores=neg_scores,
    )  # fmt: skip


def _entries(fields: dict[str, Any], field: str, documents: ById) -> tuple[dict[str, Any], list[float]]:
    """({id: text}, scores); no scores where the file has none."""
    if fields[field] is None:
        raise ValueError(f"{field} is null: write an empty list where there is none")
    found: dict[str, Any] = {}
    scores: list[float] = []
    for i, entry in enumerate(fields[field]):
        if entry is None:
            raise ValueError(f"{field}[{i}] is null")
        key = check_id(entry["id"], f"{field}[{i}].id")
        if key in found:
            raise ValueError(f"{field}[{i}] has the id {short(key)} again: name a document once")
        place = documents.get(key)
        if place is None:
            raise ValueError(
                f"{field}[{i}] names document {short(key)}, which is not in the corpus "
                f"({len(documents):,} documents)"
            )
        found[key] = place
        if entry.get("score") is not None:
            scores.append(check_number(entry["score"], f"{field}[{i}].score"))
    if scores and len(scores) != len(found):
        raise ValueError(f"{field}: {len(scores)} of {len(found)} documents have a score: give all or none")
    return found, scores
