"""Rows into a file of a peer's format: whole or not at all, with a part of it in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_embed_core.data.lines import short
from nemo_embed_core.data.normal_form import exact_key
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import replacing, write_atomically

ROWS_PER_GROUP, CHARACTERS_PER_GROUP = 4096, 32 << 20  # of a parquet file, at most: what is in memory at once


def document_id(text: str) -> str:
    """The same for the same text in every file, so that files may be trained on together."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class RowIds:
    """of(i, own): the id of row i, its own or, where it has none, q{i} or the next that no row before has."""

    def __init__(self) -> None:
        self._taken: set[bytes] = set()

    def of(self, number: int, own: str) -> str:
        """UserError for an id of its own that another row has."""
        key, count = own or f"q{number}", 1
        while exact_key(key) in self._taken:
            if own:
                fix = "make ids unique, and give them to all rows or to none"
                raise UserError(f"id {short(own)} is the id of another row, maybe of one without: {fix}")
            count += 1
            key = f"q{number}-{count}"
        self._taken.add(exact_key(key))
        return key

    def __len__(self) -> int:
        return len(self._taken)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """At least one row, whose fields are the columns."""
    import pyarrow
    import pyarrow.parquet

    writer = None
    group: list[dict[str, Any]] = []
    size = 0
    with replacing(path) as temporary:

        def flush() -> None:
            nonlocal writer, size
            table = pyarrow.Table.from_pylist(group)
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
            group.clear()
            size = 0

        for row in rows:
            group.append(row)
            size += sum(len(value) for value in row.values())
            if len(group) == ROWS_PER_GROUP or size >= CHARACTERS_PER_GROUP:
                flush()
        if group:
            flush()
        assert writer is not None, f"{path}: no rows"
        writer.close()
