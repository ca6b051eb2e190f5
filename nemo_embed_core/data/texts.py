"""list[str] and dict[str, str] of texts on disk: a corpus takes 8 bytes of memory a text, and its ids.

with texts_in("runs"):      # a verb says where it has room: beside its output, in its cache
    texts = Texts()        # an unnamed file there, gone with the process; outside of such a block in TMPDIR
index = texts.append("a document")
texts[index], texts[10:20], len(texts), for text in texts
TextsById({"d1": index}, texts)["d1"]
"""

from __future__ import annotations

import itertools
import os
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

from nemo_embed_core.errors import UserError

BLOCK = 1 << 20  # bytes that are written, and read by an iteration, at a time


class Kept:
    """Where Texts stand, and the bytes of all of them."""

    def __init__(self, folder: str | None = None):
        self.folder = folder  # None: TMPDIR
        self.num_bytes = 0

    def said(self) -> str:
        """For a log: "1.5 GiB of texts stand in /tmp (TMPDIR)"."""
        where = f"{tempfile.gettempdir()} (TMPDIR)" if self.folder is None else self.folder
        return f"{self.num_bytes / 2**30:,.1f} GiB of texts stand in {where}"


_kept = Kept()  # of the process, as TMPDIR is: texts are made deep inside readers, by several threads


@contextmanager
def texts_in(folder: str | Path | None) -> Iterator[Kept]:
    """Texts() of this block stand in `folder`, or in the nearest one above it that is there, in place of
    TMPDIR, which may be a small tmpfs. None: in TMPDIR, and counted."""
    global _kept
    before, found = _kept, None if folder is None else Path(folder).absolute()
    while found is not None and not found.is_dir():
        found = found.parent
    _kept = Kept(None if found is None else str(found))
    try:
        yield _kept
    finally:
        _kept = before


class Texts(Sequence[str]):
    """list[str] over an unlinked UTF-8 file in `folder` (None: see texts_in); append and read in any order,
    also after a fork.

    Only valid Unicode is taken: a lone surrogate is a UnicodeEncodeError. UserError when the disk is full.
    """

    def __init__(self, folder: str | Path | None = None):
        self._kept = _kept
        self._is_temporary = folder is None and _kept.folder is None
        self._folder = str(folder) if folder is not None else _kept.folder or ""
        try:
            self._folder = self._folder or tempfile.gettempdir()
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 (closed in __del__)
        except OSError as error:
            raise self._error(error) from error
        self._ends = array("q", [0])  # text i is bytes[_ends[i]:_ends[i + 1]]
        self._pending = bytearray()  # the end of the file, not written yet
        self._written = 0  # bytes

    def append(self, text: str) -> int:
        """The index that the text gets."""
        data = text.encode("utf-8")
        self._pending += data
        self._kept.num_bytes += len(data)
        self._ends.append(self._written + len(self._pending))
        if len(self._pending) >= BLOCK:
            self._write()
        return len(self._ends) - 2

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._read(start, max(start, stop))
            return [self[i] for i in range(start, stop, step)]
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return self._bytes(self._ends[i], self._ends[i + 1]).decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        start = 0
        while start < len(self):
            stop = start + 1
            while stop < len(self) and self._ends[stop + 1] - self._ends[start] <= BLOCK:
                stop += 1
            yield from self._read(start, stop)
            start = stop

    def _read(self, start: int, stop: int) -> list[str]:
        ends = self._ends[start : stop + 1]
        data = self._bytes(ends[0], ends[-1])
        return [data[a - ends[0] : b - ends[0]].decode("utf-8") for a, b in itertools.pairwise(ends)]

    def _bytes(self, start: int, stop: int) -> bytes:
        if stop > self._written:
            self._write()
        data = os.pread(self._file.fileno(), stop - start, start)
        while len(data) < stop - start:  # one call reads at most 2 GiB
            more = os.pread(self._file.fileno(), stop - start - len(data), start + len(data))
            if not more:
                raise UserError(
                    f"a temporary file in {self._folder} was cut short by another program; start again"
                )
            data += more
        return data

    def _write(self) -> None:
        try:
            while self._pending:
                count = os.pwrite(self._file.fileno(), self._pending, self._written)
                self._written += count
                del self._pending[:count]
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> UserError:
        fix = "set TMPDIR to a folder with room" if self._is_temporary else "it has to have room"
        where = self._folder or "a folder for temporary files"
        return UserError(f"texts cannot be kept in {where}: {error.strerror}; {fix} for the whole text")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class TextsById(Mapping[str, str]):
    """{key: texts[index] for key, index in indices.items()}, read when it is asked for."""

    def __init__(self, indices: dict[str, int], texts: Texts):
        self.indices, self.texts = indices, texts

    def __getitem__(self, key: str) -> str:
        return self.texts[self.indices[key]]

    def __contains__(self, key: object) -> bool:
        return key in self.indices  # Mapping's own would read the text

    def __iter__(self) -> Iterator[str]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
