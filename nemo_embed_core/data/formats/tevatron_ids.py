"""tevatron with ids: rows {"query_id", "query" or "query_text", "positive_document_ids",
"negative_document_ids"}, whose texts are in another file or folder, the dataset's `source`: {"docid",
"title"?, "text" or "document_text"}.

A document is title + " " + text where it has a title. source, answer and answers are not used; an image, a
video or audio is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.dataset import document_text
from nemo_embed_core.data.documents import Documents
from nemo_embed_core.data.formats.beir import Beir
from nemo_embed_core.data.formats.dataset import joined
from nemo_embed_core.data.formats.ids import beir_of_ids, entries, read_corpus, without
from nemo_embed_core.data.formats.row import Row, check_known
from nemo_embed_core.data.lines import Findings, check_id, check_text, short
from nemo_embed_core.data.records import find, first_fields, records
from nemo_embed_core.errors import UserError

NAME = "tevatron-ids"
SIDES = ("positive_document_ids", "negative_document_ids")
REQUIRED = ("query_id", *SIDES)
NOT_USED = ("source", "answer", "answers")
EXAMPLE = '{"query_id": "1", "query": "...", "positive_document_ids": ["7"], "negative_document_ids": []}'
DOCUMENT = '{"docid": "7", "text": "..."}'


def told_by(path: Path) -> str:
    return SIDES[0] if SIDES[0] in first_fields(path) else ""


def files(config: DatasetConfig) -> list[Path]:
    """The corpus, then the rows."""
    if not config.source:
        raise UserError(
            f"{config.path} has ids and no texts of documents: set the dataset's source to the file or "
            f"folder of its corpus, rows {DOCUMENT}"
        )
    return [*find(config.source).files, *find(config.path, config.split).files]


def tasks(config: DatasetConfig) -> tuple[str, str]:
    return "", ""


def _text_of(fields: dict[str, Any], names: tuple[str, str]) -> tuple[str, str]:
    """(name, text) of the one of two spellings that is there; other media have to be null or ""."""
    kind = names[1].removesuffix("_text")
    media = [f"query_{what}" if kind == "query" else what for what in ("image", "video", "audio")]
    if given := [name for name in media if fields.get(name) not in (None, "")]:
        raise ValueError(f"field {given[0]!r} is {short(fields[given[0]])}: only texts are read")
    there = [name for name in names if name in fields]
    if len(there) != 1:
        raise ValueError(f"a row has either {names[0]!r} or {names[1]!r}, got {short(list(fields))}")
    known = REQUIRED + NOT_USED if kind == "query" else ("docid", "title")
    required = REQUIRED if kind == "query" else ("docid",)
    check_known(fields, (*known, *names, *media), required=required, example=EXAMPLE)
    return there[0], fields[there[0]]


def _id_and_text(fields: dict[str, Any]) -> tuple[str, str]:
    name, text = _text_of(fields, ("text", "document_text"))
    check_text(text, name)
    return check_id(fields["docid"], "docid"), document_text({"text": text, "title": fields.get("title")})


def open_corpus(config: DatasetConfig, findings: Findings) -> Documents:
    files(config)
    before, documents = findings.num_met, Documents()
    corpus = records(find(config.source), findings, DOCUMENT)
    read_corpus(corpus, _id_and_text, config.ignore, findings, documents)
    return documents.close(findings) if findings.num_met == before else documents


def rows(config: DatasetConfig, findings: Findings) -> Iterator[Row]:
    yield from _rows(config, open_corpus(config, findings), findings)


def _rows(config: DatasetConfig, documents: Documents, findings: Findings) -> Iterator[Row]:
    if not documents.is_closed:
        return  # a document behind a bad line of the corpus seems not to exist
    seen: dict[str, tuple[Path, int]] = {}
    for path, line, fields in records(find(config.path, config.split), findings, EXAMPLE):
        try:
            fields = without(fields, config.ignore)
            name, query = _text_of(fields, ("query", "query_text"))
            key = check_id(fields["query_id"], "query_id")
            first = seen.setdefault(key, (path, line))
            if first != (path, line):
                raise ValueError(
                    f"query_id {short(key)} is already on line {first[1]} of {first[0].name}: make ids unique"
                )
            found = {side: entries(fields[side], side) for side in SIDES}
            row = joined(found, key, check_text(query, name), documents, str(path), line, findings, SIDES)
        except ValueError as error:
            findings.bad(path, line, str(error), row=True)
            continue
        yield row


def beir(config: DatasetConfig, corpus: Documents, findings: Findings) -> Beir:
    return beir_of_ids(config, findings, corpus, _rows)
