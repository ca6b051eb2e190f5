"""{id: text} of a corpus that does not fit into memory: texts and ids on disk, keys of the ids in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from nemo_embed_core.data.lines import Findings, short
from nemo_embed_core.data.normal_form import exact_key
from nemo_embed_core.data.texts import Texts


class Documents(Mapping[str, str]):
    """{id: text} on disk (data/texts.py): 40 bytes of memory a document, 80 while close() sorts.

    The offsets of its id and of its text, the 128-bit key of the id, its place. add() all, then close();
    until then 8 more for its line.
    """

    def __init__(self) -> None:
        self._ids, self._texts, self._keys = Texts(), Texts(), bytearray()
        self._lines = array("q")  # until close(): where each stands, of a columnar file the row
        self._ends: list[tuple[int, Path]] = []  # of each file the number of documents up to its end
        self._high = self._low = np.empty(0, np.uint64)
        self._order = np.empty(0, np.int64)
        self.is_closed = False

    def add(self, key: str, text: str, path: Path, line: int) -> None:
        self._ids.append(key)
        self._texts.append(text)
        self._keys += exact_key(key)
        self._lines.append(line)
        if self._ends and self._ends[-1][1] == path:
            self._ends.pop()
        self._ends.append((len(self._ids), path))

    def _path(self, place: int) -> Path:
        return next(path for end, path in self._ends if place < end)

    def close(self, findings: Findings) -> Documents:
        """Sorts the keys. An id that stands twice is `bad` in findings, by both places."""
        keys = np.frombuffer(self._keys, np.uint64).reshape(-1, 2)
        self._order = np.argsort(keys[:, 0], kind="stable")
        self._high, self._low = keys[self._order, 0], keys[self._order, 1]
        del keys
        self._keys = bytearray()
        for start in np.flatnonzero(self._high[1:] == self._high[:-1]).tolist():
            end = start + 1
            while end < len(self._high) and self._high[end] == self._high[start]:
                if self._low[end] == self._low[start]:
                    first, again = sorted((int(self._order[start]), int(self._order[end])))
                    where = f"row {self._lines[first]} of {self._path(first).name}"
                    message = f"id {short(self._ids[again])} is already the id of {where}: make ids unique"
                    findings.bad(self._path(again), self._lines[again], message)
                end += 1
        self._lines, self._ends, self.is_closed = array("q"), [], True
        return self

    def place(self, key: str) -> int:
        """-1: no document has this id."""
        high, low = np.frombuffer(exact_key(key), np.uint64)
        at = int(np.searchsorted(self._high, high))
        while at < len(self._high) and self._high[at] == high:
            if self._low[at] == low:
                return int(self._order[at])
            at += 1
        return -1

    def __getitem__(self, key: str) -> str:
        if (place := self.place(key)) < 0:
            raise KeyError(key)
        return self._texts[place]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.place(key) >= 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)
