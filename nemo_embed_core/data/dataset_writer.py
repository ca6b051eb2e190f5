"""Rows into a dataset folder (data/dataset.py): documents once, whole or not at all, the same bytes again.

counts = write_dataset(folder, read_rows(config), Metadata(corpus_id="nq", query_instruction="..."))
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from nemo_embed_core.data.columnar import BATCH, num_parquet_rows
from nemo_embed_core.data.dataset import COLUMNS, METADATA, Metadata, read_corpus, read_metadata, shards
from nemo_embed_core.data.documents import Documents
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.formats.writing import RowIds
from nemo_embed_core.data.lines import Findings
from nemo_embed_core.data.normal_form import exact_key, has_content, normal_key
from nemo_embed_core.data.store import DROPPED
from nemo_embed_core.data.texts import Texts
from nemo_embed_core.errors import DataError, UserError, failpoint
from nemo_embed_core.files.durable import new_folder, sha256_file, write_bytes

ROWS_PER_GROUP, BYTES_PER_GROUP = 4096, 32 << 20  # of a row group, at most
BYTES_PER_SHARD = 1 << 30  # of text, before compression


def write_dataset(
    folder: Path,
    rows: Iterable[Row],
    metadata: Metadata,
    documents: Iterable[tuple[str, str]] = (),
    shared: Path | None = None,
    made_of: str = "",
    dropped: Sequence[str] = (),
) -> dict[str, int]:
    """The folder of these rows, whole or not at all; the same rows give the same bytes. What was counted.

    documents: further (id or "", text), in no row. A document is written where its normal form is met first:
    later spellings of it ("variants") become that one, and a negative that so is a positive of its row is
    left out ("negatives_left_out"). Ids are the rows'; where they have none, or two texts have one id
    ("renamed"), made of the text. shared: a dataset folder whose corpus the rows' ids are of: its files are
    linked (copied, between file systems), and only documents that it lacks are written. dropped: what reading
    `rows` left out, listed in dropped.txt.

    Memory: 350 bytes a document that is written and 150 a query, for keys and ids; 40 a document of `shared`.
    """
    with new_folder(folder) as tmp:
        corpus = _Corpus(tmp, shared)
        queries = _Shards(tmp, "queries")
        names, num_left_out = RowIds(), 0
        for i, row in enumerate(rows):
            failpoint("dataset.row", i)
            try:
                key = names.of(i, row.id)
            except UserError as error:
                raise DataError(row.path, row.line, str(error)) from None
            pos = corpus.entries(row.pos, row.pos_ids, row.pos_scores)
            neg = corpus.entries(row.neg, row.neg_ids, row.neg_scores)
            num_left_out += len(pos.keys() & neg.keys())
            queries.add_question(metadata.corpus_id, key, row, pos, neg)
        for key, text in documents:
            corpus.entries([text], [key] if key else (), ())
        if not len(names):
            raise UserError(f"{folder}: there are no rows to write")
        files = {**corpus.close(), **queries.close()}
        counts = {
            "queries": len(names),
            "documents": sum(entry["rows"] for name, entry in files.items() if name.startswith("corpus")),
            "variants": corpus.num_variants,
            "renamed": corpus.num_renamed,
            "negatives_left_out": num_left_out,
        }
        if dropped:
            write_bytes(tmp / DROPPED, "".join(f"{line}\n" for line in dropped).encode())
            counts["bad_lines_left_out"] = len(dropped)
        failpoint("dataset.metadata", folder.name)
        write_metadata(tmp, replace(metadata, made_of=made_of), counts, files)
        return counts


def write_rows_of_ids(folder: Path, rows: Iterable[Row], metadata: Metadata, shared: Path) -> dict[str, int]:
    """The folder of rows whose documents are those of `shared` by pos_ids and neg_ids: its corpus files are
    linked (copied, between file systems), and no document is read. Whole or not at all, the same bytes again.
    """
    with new_folder(folder) as tmp:
        corpus, queries, num_rows = _Shards(tmp, "corpus"), _Shards(tmp, "queries"), 0
        corpus.link(shared)
        for num_rows, row in enumerate(rows, 1):
            failpoint("dataset.row", num_rows - 1)
            pos, neg = (
                dict(zip(ids, scores or cycle([None]), strict=False))
                for ids, scores in ((row.pos_ids, row.pos_scores), (row.neg_ids, row.neg_scores))
            )
            queries.add_question(metadata.corpus_id, row.id, row, pos, neg)
        files = {**corpus.close(), **queries.close()}
        counts = {
            "queries": num_rows,
            "documents": sum(entry["rows"] for name, entry in files.items() if name.startswith("corpus")),
        }
        write_metadata(tmp, metadata, counts, files)
        return counts


def write_metadata(
    folder: Path, metadata: Metadata, counts: dict[str, int], files: dict[str, dict[str, Any]]
) -> None:
    value = {"class": "TextQADataset", **{f.name: getattr(metadata, f.name) for f in fields(Metadata)}}
    value |= {"counts": counts, "files": files}
    if not metadata.generator:  # of texts that people wrote
        del value["generator"]
    write_bytes(folder / METADATA, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


class _Corpus:
    """Documents on their way into the corpus, each normal form once."""

    def __init__(self, folder: Path, shared: Path | None):
        self._shards = _Shards(folder, "corpus")
        self._base: Documents | None = None
        if shared is not None:
            self._shards.link(shared)
            self._base = read_corpus(shared, read_metadata(shared), Findings(strict=True))
        self._ids = Texts(folder)
        self._exact = bytearray()  # of the text that was written, 16 bytes each
        self._of_form: dict[bytes, int] = {}
        self._taken: set[bytes] = set()
        self.num_variants = self.num_renamed = 0

    def entries(self, texts: Any, ids: Any, scores: Any) -> dict[str, float | None]:
        """{id: score or None} of these documents, written where they are new."""
        found: dict[str, float | None] = {}
        for i, text in enumerate(texts):
            key = self._id(text, ids[i] if ids else "")
            if key not in found:
                found[key] = scores[i] if scores else None
        return found

    def _id(self, text: str, key: str) -> str:
        if self._base is not None and key and self._base.get(key) == text:
            return key
        exact = exact_key(text)
        form = normal_key(text) if has_content(text) else b"-" + exact
        index = self._of_form.get(form)
        if index is not None:
            self.num_variants += self._exact[16 * index : 16 * index + 16] != exact
            return self._ids[index]
        is_taken = key and (exact_key(key) in self._taken or (self._base is not None and key in self._base))
        if not key or is_taken:
            self.num_renamed += bool(key)
            key = exact.hex()
        self._taken.add(exact_key(key))
        self._of_form[form] = self._ids.append(key)
        self._exact += exact
        self._shards.add({"id": key, "text": text}, len(text))
        return key

    def close(self) -> dict[str, dict[str, Any]]:
        return self._shards.close()


class _Shards:
    """Parquet files of one side, zstd; row groups and files are bounded in rows and bytes."""

    def __init__(self, folder: Path, side: str):
        import pyarrow

        text, number = pyarrow.string(), pyarrow.float64()
        scored = pyarrow.list_(pyarrow.struct([("id", text), ("score", number)]))
        kinds = {"documents": scored, "number": number}
        names = ("id", "text") if side == "corpus" else tuple(COLUMNS["queries"])
        self.schema = pyarrow.schema([(name, kinds.get(COLUMNS[side][name], text)) for name in names])
        self.folder, self.side = folder, side
        self._parts: list[dict[str, Any]] = []  # rows and, where it is known, sha256 of each file so far
        self._writer: Any = None
        self._group: list[dict[str, Any]] = []
        self._group_size = self._size = self._rows = 0

    def link(self, other: Path) -> None:
        """The other folder's files of this side, as the first ones."""
        for file in shards(other, self.side):
            target = self._part(len(self._parts))
            try:
                os.link(file, target)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(file, target)
            self._parts.append({"rows": num_parquet_rows(target)})

    def _part(self, number: int) -> Path:
        return self.folder / f"{self.side}.{number}.part"

    def add(self, row: dict[str, Any], size: int) -> None:
        self._group.append(row)
        self._group_size += size
        if len(self._group) == ROWS_PER_GROUP or self._group_size >= BYTES_PER_GROUP:
            self._flush()
            if self._size >= BYTES_PER_SHARD:
                self._end()

    def add_question(
        self, corpus_id: str, key: str, row: Row, pos: dict[str, Any], neg: dict[str, Any]
    ) -> None:
        """pos, neg: {id: score or None}."""
        question = {
            "question_id": key,
            "question": row.query,
            "corpus_id": corpus_id,
            "pos_doc": [{"id": name, "score": score} for name, score in pos.items()],
            "neg_doc": [{"id": name, "score": score} for name, score in neg.items() if name not in pos],
            "grade": row.grade,
            "lang": row.lang or None,
            "group": row.group or None,
        }
        self.add(question, len(row.query) + 64 * (len(pos) + len(neg)))

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        if not self._group:
            return
        if self._writer is None:
            path = self._part(len(self._parts))
            # A page has 1 MiB, or the values of one write: a reader holds a page, so writes are small.
            options = {"compression": "zstd", "write_batch_size": BATCH}
            self._writer = pyarrow.parquet.ParquetWriter(path, self.schema, **options)
        self._writer.write_table(pyarrow.Table.from_pylist(self._group, self.schema))
        self._rows += len(self._group)
        self._size += self._group_size
        self._group, self._group_size = [], 0

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._parts.append({"rows": self._rows})
            self._writer, self._rows, self._size = None, 0, 0

    def close(self) -> dict[str, dict[str, Any]]:
        """{name: rows and sha256} of the files, which get their names now that their number is known."""
        self._flush()
        self._end()
        total, files = len(self._parts), {}
        for number, entry in enumerate(self._parts):
            name = (
                f"{self.side}.parquet" if total == 1 else f"{self.side}-{number:05d}-of-{total:05d}.parquet"
            )
            self._part(number).rename(self.folder / name)
            files[name] = {**entry, "sha256": sha256_file(self.folder / name)}
        return files
