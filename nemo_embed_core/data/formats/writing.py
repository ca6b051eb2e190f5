"""Rows into a file of a peer's format: whole or not at all, with a part of it in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_embed_core.files.durable import replacing, write_atomically

ROWS_PER_GROUP, CHARACTERS_PER_GROUP = 4096, 32 << 20  # of a parquet file, at most: what is in memory at once


def document_id(text: str) -> str:
    """The same for the same text in every file, so that files may be trained on together."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
