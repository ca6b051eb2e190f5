"""Lines, JSON objects, texts and ids of files that people write, read strictly; Findings has what was met."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.data.normal_form import has_content
from nemo_embed_core.data.texts import Texts
from nemo_embed_core.errors import DataError, UserError
from nemo_embed_core.files.strict_json import parse

MAX_LINE = 16 << 20  # bytes; longer is a broken file, not a row
MAX_NAMED = 20  # bad lines that an error names; it counts the others
PROGRESS_S = 10.0  # seconds between two lines of progress


class BadLines(DataError):
    """The first bad lines of all files, one a line of the message, and the number of all."""

    def __init__(self, named: list[str], count: int):
        # Not DataError's: every message has its own path and line.
        UserError.__init__(self, "\n".join([*named, *([f"{count:,} bad lines in all"] if count > 1 else [])]))


class Findings:
    """Bad lines, and what is read but has to be said (`lines()`). One serves all sources of a run.

    strict: the first bad line raises DataError. Otherwise reading goes on with the next line, the first 20
    bad ones are named, all are counted, and `raise_bad()` raises them together. log: gets a line of progress
    every ten seconds. drop: a row that is bad, where the rows behind it can be read, is left out instead:
    `dropped` lists them all.
    """

    def __init__(self, strict: bool = False, log: Callable[[str], None] | None = None, drop: bool = False):
        self.strict, self.log, self.drop, self._said = strict, log, drop, time.monotonic()
        self.named: list[str] = []  # path:line: message
        self.dropped: Sequence[str] = Texts() if drop else ()  # path:line: message, of each
        self.num_bad = self.num_rows = 0
        self.num_met = 0  # bad lines again each time that a file is read
        self.counts: dict[str, int] = {}  # what -> how many of it
        self._first: dict[str, str] = {}  # what -> path:line
        self._seen: dict[tuple[str, str], bytearray] = {}  # (what, path) -> a bit for every line

    def bad(self, path: Path, line: int, message: str, *, row: bool = False) -> None:
        """row: nothing but this row is wrong, and the rows behind it can be read."""
        error = DataError(path, line, message)
        if self.strict and not (row and self.drop):
            raise error
        self.num_met += 1
        if not self._is_new("", path, line):
            return
        if row and isinstance(self.dropped, Texts):
            self.dropped.append(str(error))
            return
        self.num_bad += 1
        if len(self.named) < MAX_NAMED:
            self.named.append(str(error))

    def note(self, what: str, path: Path, line: int, count: int = 1) -> None:
        """what: a plural, "documents with a null title, read as without"."""
        if self._is_new(what, path, line):
            self._first.setdefault(what, f"{path}:{line}")
            self.counts[what] = self.counts.get(what, 0) + count

    def _is_new(self, what: str, path: Path, line: int) -> bool:
        """Once a line: the corpus of two splits of a folder is read twice and counted once."""
        bits, (byte, bit) = self._seen.setdefault((what, str(path)), bytearray()), divmod(line, 8)
        bits.extend(bytes(max(0, byte + 1 - len(bits))))
        new = not bits[byte] >> bit & 1
        bits[byte] |= 1 << bit
        return new

    def progress(self, path: Path, line: int, done: float, start: float) -> None:
        """done: share of the file that is read, since `start` of the monotonic clock."""
        now = time.monotonic()
        if self.log and now - self._said >= PROGRESS_S:
            self._said = now
            left = (now - start) * (1 / done - 1) if done > 0 else 0
            self.log(f"reading {path}: {line:,} lines, {done:.0%}, {left:.0f} s left of this file")

    def told(self) -> tuple[list[str], int, int, dict[str, int], dict[str, str]]:
        """What another process's Findings takes."""
        return self.named, self.num_bad, self.num_met, self.counts, self._first

    def take(self, told: tuple[list[str], int, int, dict[str, int], dict[str, str]]) -> None:
        """Adds what another one met behind this one's lines, in files or parts of them that this one did not
        read."""
        named, num_bad, num_met, counts, first = told
        self.named += named[: MAX_NAMED - len(self.named)]
        self.num_bad, self.num_met = self.num_bad + num_bad, self.num_met + num_met
        for what, count in counts.items():
            self._first.setdefault(what, first[what])
            self.counts[what] = self.counts.get(what, 0) + count

    def raise_bad(self) -> None:
        if self.num_bad:
            raise BadLines(self.named, self.num_bad)

    def lines(self) -> list[str]:
        """For a log: "documents with a null title, read as without: 3 (first: corpus.jsonl:7)"."""
        return [f"{what}: {count:,} (first: {self._first[what]})" for what, count in self.counts.items()]


# ------------------------------------------------------------------------------------------ files


def check_file(path: Path) -> None:
    if path.is_file():
        return
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UserError(
            f"{path} is an address; only files and folders of this machine and hf://user/name are read: "
            "download it first"
        )
    near = sorted(p.name for p in path.parent.iterdir())[:10] if path.parent.is_dir() else []
    holds = f"{path.parent} holds: {', '.join(near) or 'nothing'}"
    where = holds if path.parent.is_dir() else "nor does its folder"
    if re.fullmatch(r"[\w.-]+/[\w-]+(\.\d[\w.-]*)?", str(path)) and not near:
        where += (
            f'. A data set of the Hugging Face hub is hf://{path}, or downloaded: "hf download {path} '
            '--repo-type dataset --local-dir DIR"'
        )
    raise UserError(f"{path} does not exist; {where}")


def raw_lines(path: Path, findings: Findings) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes with their newline); split on \\n only: a string may hold U+2028."""
    check_file(path)
    line, start, size = 0, time.monotonic(), max(1, path.stat().st_size)
    try:
        with open_bytes(path) as file:
            # readline with a limit: a file without newlines, or a gzip bomb, must not fill the memory.
            while raw := file.readline(MAX_LINE + 1):
                line += 1
                if len(raw) > MAX_LINE:
                    what = _other_format(raw) or "is a newline missing?"
                    findings.bad(path, line, f"the line is longer than {MAX_LINE} bytes: {what}")
                    return  # where the next line begins is a guess
                if line == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raw = raw[3:]  # byte order mark
                if line % 1024 == 0:
                    findings.progress(path, line, place(file) / size, start)
                yield line, raw
        if not line:
            findings.bad(path, 1, "the file is empty: at least one line is needed")
    except (EOFError, OSError, zlib.error) as error:
        findings.bad(path, line + 1, unreadable(path, error))


def open_bytes(path: Path) -> Any:
    """The bytes of the file, decompressed where its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return _Zstandard(path)
    return open(path, "rb")


class _Zstandard(io.BufferedReader):
    """A .zst file through pyarrow, which brings the codec with it."""

    def __init__(self, path: Path):
        pyarrow = need_pyarrow(path)
        self.fileobj = pyarrow.OSFile(str(path))
        super().__init__(pyarrow.CompressedInputStream(self.fileobj, "zstd"), 1 << 20)


def place(file: Any) -> int:
    """Bytes of the file on disk that are read, of what open_bytes gave."""
    return int(getattr(file, "fileobj", file).tell())  # fileobj: of a compressed file, the compressed bytes


def unreadable(path: Path, error: Exception) -> str:
    """Why open_bytes or a read failed, and what to do."""
    if isinstance(error, EOFError):
        return "the gzip stream ends early: the file is truncated, copy it again"
    if isinstance(error, gzip.BadGzipFile | zlib.error):
        return f"not a whole gzip file: {error}; copy it again or rename it"
    if path.suffix == ".zst":
        return f"not a whole Zstandard file: {str(error).splitlines()[0]}; copy it again or rename it"
    return f"cannot be read: {os.strerror(getattr(error, 'errno', 0) or 0)}"


def need_pyarrow(path: object) -> Any:
    """The module; UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    return pyarrow


def json_lines(path: Path, findings: Findings, wanted: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of every line. wanted: an example for messages."""
    for line, raw in raw_lines(path, findings):
        try:
            text = decode(raw)
            if not text.strip():
                raise ValueError("blank line: remove it")
            row = parse(text)
            if not isinstance(row, dict):
                raise ValueError(f'the row must be an object like {{"...": ...}}, got {type_name(row)}')
        except RecursionError:
            findings.bad(path, line, "JSON nested too deep", row=True)
        except ValueError as error:  # JSONDecodeError, numbers with too many digits, our own
            if line == 1 and (other := _other_format(raw)):
                findings.bad(path, line, f"not JSON lines but {other}; what is read has lines like {wanted}")
                return  # every other line would be as bad
            message = str(error)
            if isinstance(error, json.JSONDecodeError):
                message = f"not JSON: {error.msg} (character {error.pos + 1})"
            if not raw.endswith(b"\n"):
                message += " (the last line has no newline: is the file truncated?)"
            findings.bad(path, line, message, row=True)
        else:
            yield line, row


_MAGIC = (
    (b"PAR1", "a Parquet file: name it .parquet"),
    (b"ARROW1", "an Arrow file: name it .arrow"),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream: name it .arrow, or give the folder that the datasets library saved",
    ),
    (b"PK\x03\x04", "a zip archive or an Excel sheet"),
    (b"\xd0\xcf\x11\xe0", "an Excel sheet"),
    (b"\x1f\x8b", "gzip data: rename it to .jsonl.gz"),
    (b"BZh", "bzip2 data: decompress it"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data: rename it to .jsonl.zst"),
    (b"\xfd7zXZ", "xz data: decompress it"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    *((bytes([0x80, protocol]), "a pickle, which is never opened") for protocol in range(2, 6)),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file with git lfs pull"),
    (b"<", "HTML or XML (an error page saved instead of the file?)"),
    (b"%PDF", "a PDF file"),
)


def binary_format(raw: bytes) -> str | None:
    """ "a Parquet file" and the like, of a first line that is not UTF-8 text; else None."""
    for magic, what in _MAGIC:
        if raw.startswith(magic):
            return what
    if raw[257:262] == b"ustar":
        return "a tar archive"
    head = raw[:64]
    alternates = head.count(0) > len(head) // 3 and b"\0\0" not in head
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or alternates:
        return "UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8"
    return None


def _other_format(raw: bytes) -> str | None:
    """What a file is whose first line is not a JSON object."""
    if binary := binary_format(raw):
        return binary
    text = raw.decode("utf-8", "replace").strip("\r\n ")
    if text.startswith("["):
        return (
            "a JSON array: write one object a line, without brackets and commas around them, or name it .json"
        )
    if text == "{":
        return "one JSON object over several lines: write each object on one line, or name it .json"
    if re.search(r"\}\r+\{", text):
        return "text whose lines end in \\r alone: convert it with tr '\\r' '\\n'"
    if not text.startswith(("{", "#", "/")):
        for separator, what in (
            ("\t", "tab-separated columns (TSV): name the file .tsv, its first line names the columns"),
            (",", "comma-separated columns (CSV): name the file .csv, its first line names the columns"),
        ):
            if separator in text:
                return what
    return None


def decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "convert it, if it is Latin-1 with iconv -f ISO-8859-1 -t UTF-8"
        raise ValueError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}; {hint}"
        ) from None


# ------------------------------------------------------------------------------------------ fields


def check_text(value: Any, field: str) -> str:
    """A string with more than white space in it, and valid Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a string, got {type_name(value)}")
    if not value or value.isspace():
        raise ValueError(f"field {field!r} is empty or only spaces: give it text or remove the row")
    check_unicode(value, field)
    return value


def is_noise(text: str) -> bool:
    """Nothing but zero-width, control or replacement characters, which is read, counted and said."""
    return not (has_content(text[:64]) or has_content(text))  # the beginning of a long text mostly settles it


NOISE = "without content (zero-width, control or replacement characters only)"


def check_unicode(value: str, field: str) -> None:
    if value.isascii():
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {field!r} has a lone surrogate at character {error.start + 1}: not Unicode text, remove "
            "it"
        ) from None


_BAD_ID = re.compile(r"^\s|\s$|[\t\r\n]")


def check_id(value: Any, field: str) -> str:
    """Ids are strings; integers become strings once, here, so that 1 in a corpus meets 1 in a qrels file."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a string or an integer, got {type_name(value)}")
    if not value or _BAD_ID.search(value):
        raise ValueError(
            f"{field} {short(value)} is empty or has spaces around it or a tab or newline inside"
        )
    check_unicode(value, field)
    return value


def type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    kind = type(value).__name__
    return names.get(type(value), f"a number ({kind})" if isinstance(value, int | float) else f"a {kind}")


def short(value: Any) -> str:
    """repr for a message, never longer than a line."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
