"""A dataset folder: every document once, queries that name them by id. Laid out as embed-nemotron-dataset-v1.

    corpus.parquet          id, text, and where known title, lang, group
    queries.parquet         question_id, question, corpus_id, pos_doc and neg_doc: lists of {id, score?}, and
                            where known grade, lang, group
    dataset_metadata.json   class, corpus_id, query_instruction, passage_instruction, task_type, ids_only, and
                            in folders of ours source, licence, counts, files (rows, sha256 of each), made_of

Large ones are in shards, corpus-00000-of-00002.parquet. An instruction stands before each text, with a space
between. formats/dataset.py makes rows of such a folder; docs/data-formats.md is for whoever writes one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from nemo_embed_core.data.columnar import num_parquet_rows, parquet_group_sizes, parquet_rows
from nemo_embed_core.data.dataset_source import SOURCE_CONFIG, SourceTexts, source_texts
from nemo_embed_core.data.documents import Documents
from nemo_embed_core.data.lines import Findings, check_id, check_text, check_unicode, short, type_name
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import sha256_file
from nemo_embed_core.files.strict_json import read_object

METADATA = "dataset_metadata.json"
CORPUS_COLUMNS = {"id": "id", "text": "text", "title": "text", "lang": "text", "group": "id"}
QUERY_COLUMNS = {
    "question_id": "id", "question": "text", "corpus_id": "id", "pos_doc": "documents",
    "neg_doc": "documents", "grade": "number", "lang": "text", "group": "id",
}  # fmt: skip
REQUIRED = {
    "corpus": ("id", "text"),
    "queries": ("question_id", "question", "corpus_id", "pos_doc", "neg_doc"),
}
COLUMNS = {"corpus": CORPUS_COLUMNS, "queries": QUERY_COLUMNS}
_SHARD = re.compile(r"(corpus|queries)-(\d{5})-of-(\d{5})\.parquet")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """dataset_metadata.json. An instruction is the whole prefix, without the space behind it; "": none."""

    corpus_id: str
    query_instruction: str = ""
    passage_instruction: str = ""
    task_type: str = ""
    ids_only: bool = False
    source: str = ""
    licence: str = ""
    made_of: str = ""  # digest of the sources, where prepare wrote the folder
    generator: dict[str, Any] = field(default_factory=dict)  # what wrote the texts: models, prompts, seed
    counts: dict[str, int] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> rows, sha256

    def prefix(self, side: str) -> str:
        """In front of each text of "query" or "passage"."""
        instruction: str = getattr(self, f"{side}_instruction")
        return f"{instruction} " if instruction else ""


def is_dataset(path: str | Path) -> bool:
    return (Path(path) / METADATA).is_file()


def read_metadata(folder: Path, findings: Findings | None = None, name: str = METADATA) -> Metadata:
    """UserError for a field that is missing or of another type; a field that is not known is noted."""
    path = folder / name
    value = read_object(path)
    if (kind := value.pop("class", None)) != "TextQADataset":
        raise UserError(f'{path}: class is {short(kind)}, and a dataset folder is a "TextQADataset"')
    known = {f.name: f for f in fields(Metadata)}
    if "corpus_id" not in value:
        raise UserError(f"{path}: corpus_id is missing")
    for name, entry in value.items():
        want = {"ids_only": bool, "counts": dict, "files": dict, "generator": dict}.get(name, str)
        if name in known and type(entry) is not want:
            raise UserError(f"{path}: {name} must be {type_name(want())}, got {type_name(entry)}")
        if name not in known and findings is not None:
            findings.note(f"fields of {METADATA} that are not known ({short(name)}), passed over", path, 1)
    for name in ("queries", "documents"):
        if type(count := value.get("counts", {}).get(name, 0)) is not int:
            raise UserError(f"{path}: counts.{name} must be an integer, got {type_name(count)}")
    return Metadata(**{name: entry for name, entry in value.items() if name in known})


# ------------------------------------------------------------------------------------------ files


def shards(folder: Path, side: str) -> list[Path]:
    """The files of "corpus" or "queries" in order; UserError where some are missing or stand twice."""
    whole, numbered = folder / f"{side}.parquet", sorted(folder.glob(f"{side}-*-of-*.parquet"))
    if whole.is_file() and numbered:
        raise UserError(f"{folder} has both {whole.name} and {numbered[0].name}: remove one")
    if whole.is_file():
        return [whole]
    if not numbered:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:10])
        raise UserError(f"{folder} has no {side}.parquet and no {side}-00000-of-...; it holds: {names}")
    found = [_SHARD.fullmatch(file.name) for file in numbered]
    totals = {match[3] if match else "" for match in found}
    if len(totals) > 1 or "" in totals:
        names = ", ".join(file.name for file in numbered[:5])
        raise UserError(f"{folder} has {side} shards of several sets: {names}")
    total = int(totals.pop())
    missing = sorted(set(range(total)) - {int(match[2]) for match in found if match})
    if missing or len(numbered) != total:
        name = f"{side}-{missing[0]:05d}-of-{total:05d}.parquet" if missing else numbered[-1].name
        raise UserError(f"{folder} has {len(numbered)} of {total} {side} shards: {name} is missing")
    return numbered


def dataset_files(folder: Path) -> list[Path]:
    """Queries last, as rows are told by their place in them."""
    more = [file for file in (folder / METADATA, folder / SOURCE_CONFIG) if file.is_file()]
    return [*more, *shards(folder, "corpus"), *shards(folder, "queries")]


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(path)


def check_against(folder: Path, metadata: Metadata, rank: int = 0, size: int = 1) -> None:
    """Rows and digests of all files, where the metadata has them: once a process for each state of a file.

    Of several ranks each hashes files of its own.
    """
    num_rows = {"corpus": 0, "queries": 0}
    for side in num_rows:
        for number, file in enumerate(shards(folder, side)):
            rows = num_parquet_rows(file)
            num_rows[side] += rows
            if not metadata.files:
                continue
            entry = metadata.files.get(file.name)
            if not isinstance(entry, dict):
                raise UserError(f"{folder / METADATA}: files has no {file.name}; write the folder again")
            if entry.get("rows") != rows:
                raise UserError(f"{file} has {rows:,} rows, and {METADATA} says {short(entry.get('rows'))}")
            if number % size != rank:
                continue
            stat = file.stat()
            if entry.get("sha256") != _sha256(file.resolve(), stat.st_size, stat.st_mtime_ns):
                raise UserError(
                    f"{file} is not the one that was written: its sha256 is not {METADATA}'s; copy it again"
                )
    for name, side in (("documents", "corpus"), ("queries", "queries")):
        said = metadata.counts.get(name, num_rows[side])
        if said != num_rows[side]:
            raise UserError(
                f"{folder}: {side} has {num_rows[side]:,} rows, and {METADATA} counts {said:,} {name}: is a "
                "shard missing?"
            )


class RowGroup(NamedTuple):
    """A part of a Parquet file that is read on its own."""

    path: Path
    number: int  # in its file
    before: int  # rows of its file before it
    num_rows: int


def row_groups(folder: Path, side: str) -> list[RowGroup]:
    """Of all files of "corpus" or "queries", in order; nothing but the files' ends is read."""
    found = []
    for path in shards(folder, side):
        before = 0
        for number, num_rows in enumerate(parquet_group_sizes(path)):
            found.append(RowGroup(path, number, before, num_rows))
            before += num_rows
    return found


def read_records(
    folder: Path,
    side: str,
    ids_only: bool,
    findings: Findings,
    groups: Sequence[RowGroup] | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, row from 1, fields) of "corpus" or "queries", one batch of rows in memory; columns checked.

    groups: these alone; columns: of those that the files have, these alone.
    """
    problem = partial(_column_problem, side, ids_only)
    if groups is None:
        for path in shards(folder, side):
            for row, values in parquet_rows(path, findings, problem, None, columns):
                yield path, row, values
        return
    for group in groups:
        for row, values in parquet_rows(group.path, findings, problem, [group.number], columns):
            yield group.path, row, values


def _column_problem(side: str, ids_only: bool, schema: Any) -> str:
    names, known = list(schema.names), COLUMNS[side]
    if twice := [name for name in names if names.count(name) > 1]:
        return f"column {twice[0]!r} stands twice: keep one"
    if unknown := [name for name in names if name not in known]:
        return f"unknown columns {short(unknown)}: remove them ({side} has {', '.join(known)})"
    texts = ("text", "question") if ids_only else ()
    if missing := [name for name in REQUIRED[side] if name not in names and name not in texts]:
        return f"columns {short(missing)} are missing ({side} has {', '.join(REQUIRED[side])})"
    for column in schema:
        if wrong := _type_problem(column.type, known[column.name]):
            return f"column {column.name!r} is {column.type}: it must be {wrong}"
    return ""


def _type_problem(kind: Any, want: str) -> str:
    from pyarrow import types

    if types.is_null(kind):
        return ""  # no row has a value
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if want == "text":
        return "" if is_text else "of strings"
    if want == "id":
        return "" if is_text or types.is_integer(kind) else "of strings or integers"
    if want == "number":
        return "" if types.is_floating(kind) or types.is_integer(kind) else "of numbers"
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind)
    if is_list and types.is_null(kind.value_type):
        return ""  # all are empty
    if is_list and types.is_struct(kind.value_type):
        inner = {
            kind.value_type.field(i).name: kind.value_type.field(i).type
            for i in range(kind.value_type.num_fields)
        }
        wants = {"id": "id", "score": "number"}
        if "id" in inner and not any(n not in wants or _type_problem(t, wants[n]) for n, t in inner.items()):
            return ""
    return "a list of {id: string} or {id: string, score: number}"


# ------------------------------------------------------------------------------------------ the corpus


def read_corpus(
    folder: Path,
    metadata: Metadata,
    findings: Findings,
    source: str = "",
    languages: dict[str, str] | None = None,
) -> Documents:
    """{id: title + " " + text}; what is wrong with a row is `bad` in findings. source: see source_texts.
    languages: gets {id: lang} of the documents that say so."""
    documents, before = Documents(), findings.num_met
    texts = source_texts(folder, "corpus", source, findings) if metadata.ids_only else None
    for document in read_documents(folder, findings, texts, languages=languages):
        documents.add(*document)
    if findings.num_met == before:  # else places and rows would not go together
        if not len(documents):
            findings.bad(shards(folder, "corpus")[0], 1, "the corpus has no rows")
        if texts is not None:
            texts.check_count(findings)
        documents.close(findings)
    return documents


def read_documents(
    folder: Path,
    findings: Findings,
    texts: SourceTexts | None = None,
    groups: Sequence[RowGroup] | None = None,
    languages: dict[str, str] | None = None,
) -> Iterator[tuple[str, str, Path, int]]:
    """(id, text, file, row from 1) of each document. texts: of a folder of ids only; groups: these alone;
    languages: gets {id: lang} where there is one."""
    for path, line, row in read_records(folder, "corpus", texts is not None, findings, groups):
        try:
            key = check_id(row["id"], "id")
            if row.get("group") is not None:
                check_id(row["group"], "group")
            if row.get("lang") is not None:
                check_unicode(row["lang"], "lang")
            text = document_text(row) if texts is None else texts.at(key)
            if languages is not None and row.get("lang") is not None:
                languages[key] = sys.intern(row["lang"])
        except ValueError as error:
            findings.bad(path, line, str(error))
            continue
        yield key, text, path, line


def document_text(row: dict[str, Any]) -> str:
    text, title = check_text(row["text"], "text"), row.get("title")
    if title is None or (isinstance(title, str) and not title.strip()):
        return text
    if not isinstance(title, str):
        raise ValueError(f"field 'title' must be a string, got {type_name(title)}")
    check_unicode(title, "title")
    return f"{title} {text}"
