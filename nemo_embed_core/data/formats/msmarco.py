"""MS MARCO as published: collection.tsv (id, text), queries.{split}.tsv (id, text), qrels.{split}.tsv (query
0 document 1), without headers, plain or .gz.

A row per judged query, in the order of the qrels: documents above 0 are pos, the others neg.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.documents import Documents
from nemo_embed_core.data.formats.beir import Beir, usable
from nemo_embed_core.data.formats.dataset import joined
from nemo_embed_core.data.formats.qrels import read_qrels
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.lines import Findings, check_id, check_text, decode, raw_lines
from nemo_embed_core.errors import UserError

NAME = "msmarco"


def told_by(path: Path) -> str:
    return next((name for name in ("collection.tsv", "collection.tsv.gz") if (path / name).is_file()), "")


def files(config: DatasetConfig) -> list[Path]:
    """[collection, queries, qrels] of the split."""
    of_split = (f"{what}.{config.split}.tsv" for what in ("queries", "qrels"))
    return published(Path(config.path), "collection.tsv", *of_split)


def published(folder: Path, *names: str) -> list[Path]:
    """The folder's files of these names, each also .gz."""
    found: list[Path] = []
    for name in names:
        there = [file for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
        if len(there) != 1:
            holds = ", ".join(sorted(p.name for p in folder.iterdir())[:12])
            what = (
                f"both {name} and {name}.gz: remove one"
                if there
                else f"no {name} (or .gz); it holds: {holds}"
            )
            raise UserError(f"{folder} has {what}")
        found += there
    return found


def tasks(config: DatasetConfig) -> tuple[str, str]:
    return "", ""


def read_texts(path: Path, findings: Findings) -> Documents:
    """Lines of an id and a text; not closed where one is bad."""
    texts, before = Documents(), findings.num_met
    for line, raw in raw_lines(path, findings):
        try:
            cells = decode(raw).rstrip("\r\n").split("\t")
            if len(cells) != 2:
                raise ValueError(f"expected 2 tab-separated columns (id, text), got {len(cells)}")
            texts.add(check_id(cells[0], "id"), check_text(cells[1], "text"), path, line)
        except ValueError as error:
            findings.bad(path, line, str(error))
    return texts.close(findings) if findings.num_met == before else texts


def open_corpus(config: DatasetConfig, findings: Findings) -> Documents:
    return read_texts(files(config)[0], findings)


def rows(config: DatasetConfig, findings: Findings) -> Iterator[Row]:
    _, of_queries, file = files(config)
    documents, queries = open_corpus(config, findings), read_texts(of_queries, findings)
    qrels, lines = read_qrels(file, findings)
    if not (documents.is_closed and queries.is_closed):
        return  # a text behind a bad line seems not to exist
    for key, scores in qrels.items():
        line = lines[key, next(iter(scores))]
        try:
            if (query := queries.get(key)) is None:
                raise ValueError(f"query {key!r} is not among the {len(queries):,} queries")
            entries = {
                "pos_doc": [{"id": doc} for doc, score in scores.items() if score > 0],
                "neg_doc": [{"id": doc} for doc, score in scores.items() if score <= 0],
            }
            row = joined(entries, key, query, documents, str(file), line, findings)
        except ValueError as error:
            findings.bad(file, line, str(error), row=True)
            continue
        yield row


def beir(config: DatasetConfig, corpus: Documents, findings: Findings) -> Beir:
    _, of_queries, file = files(config)
    texts = usable(read_texts(of_queries, findings))
    qrels, _ = read_qrels(file, findings)
    return Beir(usable(corpus), {key: texts.get(key, "") for key in qrels}, qrels)
