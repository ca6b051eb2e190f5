"""A dataset folder as what is mined: no text is held or written, they are read when they are encoded.

    rows = read_folder(config, ranks, Findings(), known, excluded)   # Rows, whose pool is numbered too

What stays in memory is in docs/mining.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.dataset import document_text, read_metadata, read_records, row_groups
from nemo_embed_core.data.formats import dataset as dataset_format
from nemo_embed_core.data.lines import Findings, check_id
from nemo_embed_core.data.readers import corpus_format
from nemo_embed_core.data.texts import Texts
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.folder_parts import FolderDocuments, Questions, read_parts
from nemo_embed_core.mine.keys import KEY, Numbers, as_keys, first_of
from nemo_embed_core.mine.pool import Known, Noise, Pool, Rows
from nemo_embed_core.mine.search.exclude import Exclude


def is_read_by_ids(config: DatasetConfig, has_more_documents: bool) -> bool:
    """A dataset folder that has its texts and is the whole pool."""
    is_folder = corpus_format(config) is dataset_format
    return is_folder and not has_more_documents and not read_metadata(Path(config.path)).ids_only


def read_folder(
    config: DatasetConfig,
    ranks: Ranks,
    findings: Findings,
    known: Known | None = None,
    excluded: Set[bytes] = frozenset(),
) -> FolderRows | None:
    """The folder's rows, on every rank; None where a row is bad, which is in findings. All ranks call it.

    known: relevant documents of the whole run; None: of these rows. excluded: normal keys of documents that
    are not searched.
    """
    if (parts := read_parts(config, ranks, findings)) is None:
        return None
    return FolderRows(Path(config.path), *parts, known, excluded)


class FolderTexts(Sequence[str]):
    """The text of each document or question at `places` of the folder (None: of all), read when it is asked
    for: in ascending order one batch of rows after the other, else a row group from its beginning."""

    def __init__(self, folder: Path, side: str, places: np.ndarray | None = None):
        self.folder, self.side, self.places = folder, side, places
        self.groups = row_groups(folder, side)
        self.ends = np.cumsum([group.num_rows for group in self.groups])
        self._group, self._next, self._text = -1, 0, ""  # the last text stands at place _next - 1
        self._records: Iterator[tuple[Path, int, dict[str, Any]]] = iter(())

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.places is None else len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        place = int(index if self.places is None else self.places[index])
        group = int(np.searchsorted(self.ends, place, side="right"))
        if group != self._group or place < self._next - 1 or not self._text:
            self._group, self._next = group, int(self.ends[group]) - self.groups[group].num_rows
            strict, columns = Findings(strict=True), ("title", "text", "question")
            part = [self.groups[group]]
            self._records = read_records(self.folder, self.side, False, strict, part, columns)
            self._text = ""
        if place == self._next - 1:
            return self._text
        while self._next <= place:
            _, _, fields = next(self._records)
            self._next += 1
        self._text = document_text(fields) if self.side == "corpus" else fields["question"]
        return self._text


class FolderPool(Pool):
    """The documents of a folder, numbered as those of a Pool, in the order of its corpus."""

    def __init__(self, folder: Path, documents: FolderDocuments, of_rows: np.ndarray, excluded: Set[bytes]):
        """of_rows: places of documents that rows name."""
        self.excluded, self.counts, self.folder = excluded, Counter(), folder
        normal, same_text = as_keys(documents.normal), documents.same_text
        is_of_row = np.zeros(len(documents), bool)
        is_of_row[of_rows] = True
        is_excluded = np.isin(normal, as_keys(b"".join(excluded))) if excluded else np.zeros_like(is_of_row)
        is_free = is_excluded | ~np.frombuffer(documents.content, bool)
        is_first = same_text == np.arange(len(documents))
        kept = np.flatnonzero(is_first & (is_of_row | ~is_free))
        # Of no row and not searched: kept where it is a spelling of one that is.
        others = np.flatnonzero(is_first & is_free & ~is_of_row)
        others = others[Numbers(normal[kept]).of(normal[others]) >= 0]
        kept = np.concatenate([kept, others])
        stands = kept[first_of(normal[kept])]
        is_aside = (stands != kept) | is_free[kept]
        arrival = np.argsort(kept)
        kept, stands, is_aside = kept[arrival], stands[arrival], is_aside[arrival]
        order = np.concatenate([np.flatnonzero(~is_aside), np.flatnonzero(is_aside)])
        number = np.full(len(documents), -1, np.int64)
        number[kept[order]] = np.arange(len(kept))
        self.place, self.num_searched = kept[order], int((~is_aside).sum())
        self._stand = number[stands[order]]
        self.of_place = number[same_text]  # until the rows have theirs
        is_left_out = self.of_place < 0
        of_form = stands == kept
        for name, is_so in (("excluded", is_excluded), ("without_content", is_free & ~is_excluded)):
            self.counts[name] = int((is_so & is_left_out).sum() + (is_so[kept] & of_form).sum())
        self.counts["variants"] = int((~of_form).sum())
        self.counts = +self.counts  # those that are not 0
        self.texts = FolderTexts(folder, "corpus", self.place)
        self._forms = Numbers(normal[self.place[: self.num_searched]])
        self._names: Texts | None = None

    def searched_by_keys(self, keys: np.ndarray) -> np.ndarray:
        return self._forms.of(keys)

    def searched_by_key(self, key: bytes) -> int | None:
        number = int(self._forms.of(as_keys(key))[0])
        return None if number < 0 else number

    def stands(self, numbers: np.ndarray) -> np.ndarray:
        found = self._stand[numbers]
        return np.where(found < self.num_searched, found, -1)

    def held(self, numbers: np.ndarray) -> Mapping[int, str]:
        """On disk, from one pass over the row groups that have them."""
        numbers = np.unique(numbers)
        numbers = numbers[np.argsort(self.place[numbers])]
        texts = Texts()
        for number in numbers.tolist():
            texts.append(self.texts[number])
        return _Held(numbers, texts)

    def document_ids(self, numbers: Iterable[int]) -> list[str | None]:
        if self._names is None:  # on the rank that writes; 8 bytes a document
            self._names, strict = Texts(), Findings(strict=True)
            for _, _, row in read_records(self.folder, "corpus", False, strict, None, ["id"]):
                self._names.append(check_id(row["id"], "id"))
        return [self._names[int(self.place[number])] for number in numbers]


class _Held(Mapping[int, str]):
    def __init__(self, numbers: np.ndarray, texts: Texts):
        self._order = np.argsort(numbers)
        self._numbers, self._texts = numbers[self._order], texts

    def __getitem__(self, number: int) -> str:
        at = int(np.searchsorted(self._numbers, number))
        if at == len(self._numbers) or self._numbers[at] != number:
            raise KeyError(number)
        return self._texts[int(self._order[at])]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __len__(self) -> int:
        return len(self._numbers)


class FolderRows(Rows):
    """The rows of a folder, as Rows are."""

    def __init__(
        self,
        folder: Path,
        documents: FolderDocuments,
        parts: list[Questions],
        known: Known | None,
        excluded: Set[bytes],
    ):
        self.folder, self.known, self.prompts = folder, known or Known(), {}
        self.keys = b"".join(part.keys for part in parts)
        before = np.cumsum([0, *(len(part.ids) // KEY for part in parts)])
        at = np.concatenate([part.at + start for part, start in zip(parts, before[:-1], strict=True)])
        self._at = None if len(at) == before[-1] else at  # of each row its record of the folder
        noise = Noise()
        for part in parts:
            noise.rows += part.noise.rows
            for name, count in part.noise.of_one.items():
                noise.of_one[name] += count
        self.noise = noise.count(self.keys)
        del noise
        groups = as_keys(b"".join(part.groups for part in parts))
        none = groups == b""
        self._classes = np.full(len(groups), -1, np.int64)
        self._classes[~none] = np.unique(groups[~none], return_inverse=True)[1]
        self.langs, self._scripts = (
            list(chain.from_iterable(part.words[name] for part in parts)) for name in ("lang", "script")
        )
        places = {side: np.concatenate([part.places[side] for part in parts]) for side in ("pos", "neg")}
        ends = {
            side: np.concatenate([[0], *(part.counts[side] for part in parts)]).cumsum() for side in places
        }
        parts.clear()
        self.pool = FolderPool(folder, documents, np.concatenate([*places.values()]), excluded)
        is_excluded = np.zeros(1, bool)
        if excluded:
            is_excluded = np.isin(as_keys(documents.normal), as_keys(b"".join(excluded)))[places["pos"]]
        self.num_excluded = (
            int(np.logical_or.reduceat(is_excluded, ends["pos"][:-1]).sum()) if excluded else 0
        )
        self.pos, self.neg = (Exclude(ends[side], self.pool.of_place[places[side]]) for side in places)
        if known is None:
            self.known.queries += np.repeat(as_keys(self.keys), np.diff(ends["pos"])).tobytes()
            self.known.documents += as_keys(documents.normal)[places["pos"]].tobytes()
        del self.pool.of_place
        self.queries = FolderTexts(folder, "queries", self._at)

    def read(self, at: Iterable[int] | None = None) -> Iterator[tuple[str, dict[str, str]]]:
        columns, strict = ("question_id", "question", "lang", "group"), Findings(strict=True)
        rows = range(len(self)) if at is None else at
        wanted = iter(rows if self._at is None else (int(self._at[row]) for row in rows))
        place, next_at = 0, next(wanted, None)
        for group in row_groups(self.folder, "queries"):
            if next_at is None or next_at >= place + group.num_rows:
                place += group.num_rows
                continue
            for _, _, row in read_records(self.folder, "queries", False, strict, [group], columns):
                if place == next_at:
                    names = {"lang": "lang", "id": "question_id", "group": "group"}
                    known = {name: row.get(column) for name, column in names.items()}
                    more = {name: str(x) for name, x in known.items() if x not in (None, "")}
                    yield row["question"], more
                    next_at = next(wanted, None)
                place += 1

    @property
    def scripts(self) -> list[str]:
        return self._scripts

    @property
    def classes(self) -> np.ndarray:
        return self._classes
