"""MS MARCO's triples of ids: qidpidtriples.*.tsv (query, positive, negative), beside collection.tsv and
queries.{split}.tsv; without headers, plain or .gz. A row for each line.

The triples of texts (triples.train.small.tsv) need no corpus: containers.py reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.documents import Documents
from nemo_embed_core.data.formats.beir import Beir, usable
from nemo_embed_core.data.formats.dataset import joined
from nemo_embed_core.data.formats.msmarco import published, read_texts
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.lines import Findings, check_file, check_id, decode, raw_lines, short

NAME = "msmarco-triples"


def told_by(path: Path) -> str:
    return path.name if path.is_file() and path.name.startswith("qidpidtriples.") else ""


def files(config: DatasetConfig) -> list[Path]:
    """[collection, queries of the split, triples]"""
    path = Path(config.path)
    check_file(path)
    return [*published(path.parent, "collection.tsv", f"queries.{config.split}.tsv"), path]


def tasks(config: DatasetConfig) -> tuple[str, str]:
    return "", ""


def rows(config: DatasetConfig, findings: Findings) -> Iterator[Row]:
    collection, queries, file = files(config)
    found = _rows(read_texts(collection, findings), read_texts(queries, findings), file, findings)
    yield from (row._replace(id="") for row in found)  # a query has many lines


def _rows(documents: Documents, queries: Documents, file: Path, findings: Findings) -> Iterator[Row]:
    """Their ids are the queries'."""
    if not (documents.is_closed and queries.is_closed):
        return  # a text behind a bad line seems not to exist
    for line, raw in raw_lines(file, findings):
        try:
            cells = decode(raw).rstrip("\r\n").split("\t")
            if len(cells) != 3:
                raise ValueError(f"expected 3 ids between tabs (query, positive, negative), got {len(cells)}")
            key = check_id(cells[0], "query")
            if (query := queries.get(key)) is None:
                raise ValueError(f"query {short(key)} is not among the {len(queries):,} queries")
            names = ("positive", "negative")
            found = {name: [{"id": cell}] for name, cell in zip(names, cells[1:], strict=True)}
            row = joined(found, "", query, documents, str(file), line, findings, names)
        except ValueError as error:
            findings.bad(file, line, str(error), row=True)
            continue
        yield row._replace(id=key)


def open_corpus(config: DatasetConfig, findings: Findings) -> Documents:
    return read_texts(files(config)[0], findings)


def beir(config: DatasetConfig, corpus: Documents, findings: Findings) -> Beir:
    """The positives of a query's lines are what is relevant."""
    _, of_queries, file = files(config)
    queries = read_texts(of_queries, findings)
    qrels: dict[str, dict[str, int]] = {}
    for row in _rows(corpus, queries, file, findings):
        qrels.setdefault(row.id, {})[row.pos_ids[0]] = 1
    return Beir(usable(corpus), {key: queries[key] for key in qrels}, qrels)
