"""Files as records: lists of JSON objects, CSV and TSV; columnar.py has Parquet and Arrow, lines.py JSON
lines.

    for line, fields in READERS["csv"](path, findings, wanted='{"query": ...}'): ...

What cannot be read is `bad` in findings, by its line or row. One item, line or batch is in memory at a time.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.data.columnar import Fields, arrow, header_problem, parquet
from nemo_embed_core.data.lines import (
    MAX_LINE,
    Findings,
    binary_format,
    check_file,
    decode,
    json_lines,
    open_bytes,
    raw_lines,
    short,
    type_name,
    unreadable,
)
from nemo_embed_core.files.strict_json import raw_decode

# ------------------------------------------------------------------------------------------ JSON


def _json(path: Path, findings: Findings, wanted: str) -> Fields:
    """A .json file: lines, or one list or object with the list under "data"."""
    check_file(path)
    try:
        with open_bytes(path) as file:
            head = file.read(4096)
    except (EOFError, OSError, zlib.error) as error:
        findings.bad(path, 1, unreadable(path, error))
        return
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first = text.split(b"\n", 1)[0]
    is_whole = text.startswith(b"[") or bool(re.match(rb'\{\s*("data"|"corpus")\s*:|\{\s*$', first))
    if not is_whole:
        yield from json_lines(path, findings, wanted)
        return
    for line, name, value in json_items(path, findings):
        if name != "data":
            message = f'field {short(name)} beside the list "data": remove it, or write one row a line'
            findings.bad(path, line, message)
        elif isinstance(value, dict):
            yield line, value
        else:
            message = f'a row must be an object like {{"...": ...}}, got {type_name(value)}'
            findings.bad(path, line, message, row=True)


def json_items(path: Path, findings: Findings) -> Iterator[tuple[int, str, Any]]:
    """(line, "data", item) of a list, and of the list "data" of an object, whose other fields come as
    (line, name, value). One item is in memory at a time."""
    text = _Text(path)
    try:
        if text.peek() == "[":
            yield from text.items()
        else:
            text.take("{")
            while text.peek() != "}":
                line, name = text.line, text.value()
                text.take(":")
                if name == "data" and text.peek() == "[":
                    yield from text.items()
                else:
                    yield line, str(name), text.value()
                if text.peek() != "}":
                    text.comma("}")
            text.take("}")
        if text.peek():
            raise ValueError("more text behind the end of the list")
    except RecursionError:
        findings.bad(path, text.line, "JSON nested too deep")
    except json.JSONDecodeError as error:
        findings.bad(path, text.line, f"not JSON: {error.msg} (in what begins on this line)")
    except ValueError as error:
        findings.bad(path, text.line, f"{error}; what follows is not read")
    except (EOFError, OSError, zlib.error) as error:
        findings.bad(path, text.line, unreadable(path, error))
    finally:
        text.file.close()


class _Text:
    """A JSON file as a window that moves over it; line: of the place where it stands."""

    def __init__(self, path: Path):
        self.file, self.window, self.at, self.line, self.is_end = open_bytes(path), "", 0, 1, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self._go_to(_white(self.window, self.at))
            if self.at < len(self.window) or self.is_end:
                return self.window[self.at : self.at + 1]
            self._read()

    def take(self, wanted: str) -> None:
        if self.peek() != wanted:
            raise ValueError(
                f"not JSON: {wanted!r} expected, got {short(self.peek() or 'the end of the file')}"
            )
        self.at += 1

    def comma(self, end: str) -> None:
        self.take(",")
        if self.peek() == end:
            raise ValueError(f"not JSON: a comma before {end!r}: remove it")

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = raw_decode(self.window, self.at)
                if end < len(self.window) or self.is_end:  # else a number may go on
                    self._go_to(end)
                    return value
            except json.JSONDecodeError:
                if self.is_end or len(self.window) - self.at > MAX_LINE:
                    raise
            self._read()

    def items(self) -> Iterator[tuple[int, str, Any]]:
        self.take("[")
        while self.peek() != "]":
            line = self.line
            yield line, "data", self.value()
            if self.peek() != "]":
                self.comma("]")
        self.take("]")

    def _go_to(self, end: int) -> None:
        self.line += self.window.count("\n", self.at, end)
        self.at = end

    def _read(self) -> None:
        raw = self.file.read(1 << 20)
        try:
            new = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x}") from None
        self.window, self.at, self.is_end = self.window[self.at :] + new, 0, not raw


def _white(text: str, at: int) -> int:
    """Where the white space ends that begins here."""
    found = _WHITE.match(text, at)
    return found.end() if found else at


_WHITE = re.compile(r"[ \t\r\n]+")


# ------------------------------------------------------------------------------------------ CSV and TSV


def _separated(delimiter: str, columns: list[str] | None = None) -> Callable[[Path, Findings, str], Fields]:
    """The first line names the columns, where `columns` does not. CSV has quotes; a tab-separated cell is all
    between two tabs."""

    def read(path: Path, findings: Findings, wanted: str) -> Fields:
        line, start = 0, 1

        def lines() -> Iterator[str]:
            nonlocal line
            for line, raw in raw_lines(path, findings):
                if line == 1 and (other := binary_format(raw)):
                    raise ValueError(f"not text but {other}")
                yield decode(raw)

        csv.field_size_limit(MAX_LINE)
        cells = csv.reader(lines(), strict=True)
        if delimiter == "\t":
            cells = csv.reader(lines(), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        names = columns
        before = findings.num_met
        while True:
            start = line + 1
            try:
                row = next(cells, None)
            except (csv.Error, ValueError) as error:  # where the next row begins is a guess
                message = next((ours for theirs, ours in _CSV_ERRORS if theirs in str(error)), str(error))
                findings.bad(path, start, message)
                return
            if row is None:
                break
            if names is None:
                names = row
                if problem := header_problem(names) or _separator_problem(names, delimiter):
                    findings.bad(path, 1, problem)
                    return
                continue
            if names is columns and start == 1 and "positive" in (cell.strip().lower() for cell in row):
                findings.bad(path, 1, "line 1 names columns, as in no file of triples: rename the file")
                return
            if len(row) != len(names):
                what = (
                    "blank line: remove it" if not any(row) else f"{len(row)} cells and {len(names)} columns"
                )
                findings.bad(path, start, what, row=True)
                continue
            yield start, dict(zip(names, row, strict=True))
        if names is not columns and line == 1 and findings.num_met == before:
            findings.bad(path, 1, f"no rows: line 1 names the columns, {short(names)}; {HEADER}")

    return read


HEADER = "where it is a row already, put a line such as anchor,positive (in TSV with a tab) above it"


_CSV_ERRORS = (
    ("new-line character", "lines end in \\r alone: convert the file with tr '\\r' '\\n'"),
    ("unexpected end of data", "a quote opens in this row and is not closed: close it"),
    (
        "expected after",
        'a quote inside a quoted cell has to be doubled (""), and a comma follows the last one',
    ),
)


def _separator_problem(names: list[str], delimiter: str) -> str:
    if len(names) > 1 or not (found := [mark for mark in "\t;|," if mark in names[0]]):
        return ""
    fix = {"\t": "name the file .tsv", ",": "name the file .csv"}.get(found[0], "write commas")
    return f"columns are separated by {found[0]!r} here and not by {delimiter!r}: {fix}"


READERS: dict[str, Callable[[Path, Findings, str], Fields]] = {
    "jsonl": json_lines,
    "json": _json,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "triples": _separated("\t", ["query", "positive", "negative"]),
    "parquet": parquet,
    "arrow": arrow,
}
