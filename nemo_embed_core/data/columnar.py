"""Parquet and Arrow files as records, 64 rows at a time.

    for row, fields in parquet_rows(path, findings, problem): ...

What cannot be read is `bad` in findings, by its row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_embed_core.data.lines import Findings, need_pyarrow, short
from nemo_embed_core.errors import DataError
from nemo_embed_core.files.strict_json import parse

BATCH = 64  # rows of a columnar file that are in memory at once

Fields = Iterator[tuple[int, dict[str, Any]]]


def header_problem(names: list[str]) -> str:
    if not names:
        return "line 1 names the columns, and it is blank"
    if not all(name.strip() for name in names):
        return f"line 1 names the columns, and not all have a name: {short(names)}"
    if spaced := [name for name in names if name != name.strip()]:
        return f"column {short(spaced[0])} has spaces around its name: remove them"
    twice = [name for name, count in Counter(names).items() if count > 1]
    return f"column {short(twice[0])} stands twice: rename one" if twice else ""


class NotWhole(ValueError):
    """A Parquet file that is cut short or damaged."""


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """pyarrow.parquet.ParquetFile(path); NotWhole where it cannot be opened, or read in the block.

    Of iter_batches(BATCH) a few pages of each column are in memory, whatever the size of a row group.
    """
    pyarrow = need_pyarrow(path)
    try:
        # pre_buffer would hold all row groups at once, and without a buffer a whole column chunk.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise NotWhole(f"not a whole Parquet file: {one_line(error)}; copy it again") from None


def parquet_group_sizes(path: Path) -> list[int]:
    """Rows of each row group."""
    try:
        with open_parquet(path) as file:
            return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except NotWhole as error:
        raise DataError(path, 1, str(error)) from None


def num_parquet_rows(path: Path) -> int:
    return sum(parquet_group_sizes(path))


def parquet_rows(
    path: Path,
    findings: Findings,
    problem: Callable[[Any], str],
    groups: Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
) -> Fields:
    """(row from 1, fields); problem(schema): what is wrong with the columns, or "". groups: neighbouring row
    groups alone; columns: of those that are there, these alone."""
    try:
        with open_parquet(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            groups = range(len(sizes)) if groups is None else groups
            before, num_rows = sum(sizes[: groups[0]]) if groups else 0, sum(sizes[i] for i in groups)
            names = None if columns is None else [n for n in columns if n in file.schema_arrow.names]
            batches = file.iter_batches(BATCH, row_groups=list(groups), columns=names)
            yield from _batches(path, findings, file.schema_arrow, problem, num_rows, batches, before)
    except NotWhole as error:
        findings.bad(path, 1, str(error))


def parquet(path: Path, findings: Findings, wanted: str) -> Fields:
    yield from parquet_rows(path, findings, _column_problem)


def arrow(path: Path, findings: Findings, wanted: str) -> Fields:
    pyarrow = need_pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(mapped)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = batches = pyarrow.ipc.open_stream(mapped)
            yield from _batches(path, findings, reader.schema, _column_problem, 0, map(_valid, batches))
            if not is_file and (wrong := _stream_problem(mapped)):
                findings.bad(path, 1, wrong)
    except (pyarrow.ArrowException, OSError) as error:
        findings.bad(path, 1, f"not a whole Arrow file: {one_line(error)}; copy it again")


_CONTINUES = b"\xff\xff\xff\xff"  # in front of each message; of length 0, the end


def _stream_problem(mapped: Any) -> str:
    """What is wrong with the end of a stream that has been read: without its mark, batches may lack."""
    end = mapped.tell()
    if end != mapped.size():
        return f"not one Arrow stream: {mapped.size() - end:,} bytes follow its end; write one file for each"
    mapped.seek(0)
    is_of_old = mapped.read(4) != _CONTINUES  # before Arrow 0.15, whose mark is four zeros
    mapped.seek(max(0, end - 8))
    if is_of_old or mapped.read() == _CONTINUES + bytes(4):
        return ""
    return "the Arrow stream has no end mark: the file is truncated, copy or write it again"


def _valid(batch: Any) -> Any:
    """The batch; ArrowInvalid where its offsets are damaged, which nothing else looks at: to read it would be
    a crash. Text that is not UTF-8 is said by its row."""
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error) or column.type.num_fields:
                raise
    return batch


def _column_problem(schema: Any) -> str:
    return header_problem(list(schema.names)).replace("line 1 names the columns, and", "columns:")


def _batches(
    path: Path,
    findings: Findings,
    schema: Any,
    problem: Callable[[Any], str],
    num_rows: int,
    batches: Any,
    first: int = 0,
) -> Fields:
    """first: rows of the file before those of `batches`, which are num_rows (0: not known)."""
    if wrong := problem(schema):
        findings.bad(path, 1, wrong)
        return
    line, start, classes = first, time.monotonic(), _class_names(schema)
    for batch in batches:
        for at in range(0, batch.num_rows, BATCH):
            part, before = batch.slice(at, BATCH), line
            for line, fields in _python_rows(part, path, before, findings):
                for column, names in classes.items():
                    if isinstance(number := fields.get(column), int) and 0 <= number < len(names):
                        fields[column] = names[number]
                yield line, fields
            line = before + part.num_rows
            if num_rows:
                findings.progress(path, line, (line - first) / num_rows, start)


def _python_rows(batch: Any, path: Path, before: int, findings: Findings) -> Fields:
    """before: rows of the file before these. A row with a value that is none of Python's is `bad`."""
    try:
        yield from enumerate(batch.to_pylist(), before + 1)
        return
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond the year 9999
        pass
    for i in range(batch.num_rows):
        fields = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                fields[name] = column[i].as_py()
            except (ValueError, OverflowError) as error:
                message = f"column {short(name)} cannot be read: {one_line(error)}; remove or repair it"
                findings.bad(path, before + i + 1, message, row=True)
                break
        else:
            yield before + i + 1, fields


def _class_names(schema: Any) -> dict[str, list[str]]:
    """{column: names} of the columns whose numbers the datasets library calls ClassLabel."""
    try:
        features = parse((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {name: f["names"] for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: names for name, names in found.items() if isinstance(names, list) and name in schema.names}


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
