"""A dataset folder, read once by all ranks together: keys of its texts and its rows as places in the corpus.

Each rank reads its own row groups, and hashes files of its own; what is wrong in one part is said by all.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.dataset import (
    Metadata,
    RowGroup,
    check_against,
    read_documents,
    read_metadata,
    read_records,
    row_groups,
)
from nemo_embed_core.data.formats.dataset import files, row_of, stands_twice
from nemo_embed_core.data.formats.row import Row, is_below, none_left, positive
from nemo_embed_core.data.lines import Findings, check_id, short
from nemo_embed_core.data.normal_form import exact_key, has_content, normal_key
from nemo_embed_core.data.statistics import script
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.keys import KEY, Numbers, as_keys, first_of
from nemo_embed_core.mine.pool import Noise

T = TypeVar("T")
NAMED = 20  # documents and questions whose id an error gives


def read_parts(
    config: DatasetConfig, ranks: Ranks, findings: Findings
) -> tuple[FolderDocuments, list[Questions]] | None:
    """The documents, and the rows by rank, on every rank; None where one is bad, which is in findings."""
    folder, before = Path(config.path), findings.num_met
    files(config)
    metadata = read_metadata(folder, findings)

    def corpus(own: Findings) -> tuple[bytes, ...]:
        check_against(folder, metadata, ranks.rank, ranks.size)
        return _document_keys(folder, _part(row_groups(folder, "corpus"), ranks), own)

    parts = _together(corpus, ranks, findings)
    ids, exact, normal, content = (b"".join(column) for column in zip(*parts, strict=True))
    del parts
    places = row_groups(folder, "corpus")
    if findings.num_met == before and not content:
        findings.bad(places[0].path if places else folder, 1, "the corpus has no rows")
    if findings.num_met == before:
        _refuse_twice(folder, "corpus", as_keys(ids), findings)
    if findings.num_met > before:
        return None  # else places and rows would not go together
    documents = FolderDocuments(Numbers(as_keys(ids)), first_of(as_keys(exact)), normal, content)
    del ids, exact, normal, content

    def questions(own: Findings) -> Questions:
        groups = _part(row_groups(folder, "queries"), ranks)
        return _read_questions(folder, metadata, groups, documents, config.min_grade, own)

    found = _together(questions, ranks, findings)
    if odd := [part.odd for part in found if part.odd is not None][:1]:
        list(positive(odd, config.min_grade, findings))  # says what is wrong
    if findings.num_met == before:
        ids = b"".join(part.ids for part in found)
        if not ids:
            findings.bad(row_groups(folder, "queries")[0].path, 1, "there are no rows")
        _refuse_twice(folder, "queries", as_keys(ids), findings)
        if ids and not any(len(part.at) for part in found):
            assert config.min_grade is not None
            last = row_groups(folder, "queries")[-1]
            none_left(last.path, last.before + last.num_rows, config.min_grade, findings)
    if findings.num_met > before:
        return None
    return documents, found


def _part(groups: list[RowGroup], ranks: Ranks) -> list[RowGroup]:
    """This rank's neighbouring row groups: those that begin in its share of the rows."""
    starts = np.cumsum([0, *(group.num_rows for group in groups)])
    first, last = ranks.span(int(starts[-1]))
    return [group for group, start in zip(groups, starts[:-1], strict=True) if first <= start < last]


def _together(work: Callable[[Findings], T], ranks: Ranks, findings: Findings) -> list[T]:
    """work() of every rank, on every rank; a UserError of one is one of all, and so is what it found."""
    own, failure, value = Findings(log=findings.log), "", None
    try:
        value = work(own)
    except UserError as error:
        failure = str(error)
    everyone = ranks.gather((failure, own.told(), value))
    if failed := [failure for failure, _, _ in everyone if failure]:
        raise UserError("\n".join(dict.fromkeys(failed)))
    for _, told, _ in everyone:
        findings.take(told)
    return [value for _, _, value in everyone]


def _refuse_twice(folder: Path, side: str, keys: np.ndarray, findings: Findings) -> None:
    """An id that stands twice is `bad` by its later place."""
    first, name = first_of(keys), {"corpus": "id", "queries": "question_id"}[side]
    again = np.flatnonzero(first != np.arange(len(keys)))
    for count, place in enumerate(again.tolist()):
        group, line = _where(folder, side, place)
        key = "of this row"
        if count < NAMED:
            records = read_records(folder, side, False, Findings(strict=True), [group], [name])
            key = check_id(next(row[name] for _, at, row in records if at == line), name)
        message = stands_twice(key)
        if side == "corpus":
            other, row = _where(folder, side, int(first[place]))
            where = f"row {row} of {other.path.name}"
            message = f"id {short(key)} is already the id of {where}: make ids unique"
        findings.bad(group.path, line, message)


def _where(folder: Path, side: str, place: int) -> tuple[RowGroup, int]:
    """The row group of a record of all files, and its row from 1 in its file."""
    for group in row_groups(folder, side):
        if place < group.num_rows:
            return group, group.before + place + 1
        place -= group.num_rows
    raise AssertionError("a place behind the end")


# ------------------------------------------------------------------------------------------ what is read


def _document_keys(folder: Path, groups: list[RowGroup], findings: Findings) -> tuple[bytes, ...]:
    """Of each document: the keys of id, text and normal form, and 1 where it has content."""
    ids, exact, normal, content = bytearray(), bytearray(), bytearray(), bytearray()
    for key, text, _, _ in read_documents(folder, findings, None, groups):
        ids += exact_key(key)
        exact += exact_key(text)
        normal += normal_key(text)
        content.append(has_content(text))
    return bytes(ids), bytes(exact), bytes(normal), bytes(content)


@dataclass(frozen=True)
class FolderDocuments:
    """By place in the corpus; `get` gives the first place with the text of a document."""

    ids: Numbers
    same_text: np.ndarray
    normal: bytes
    content: bytes

    def get(self, key: str) -> int | None:
        place = int(self.ids.of(as_keys(exact_key(key)))[0])
        return None if place < 0 else int(self.same_text[place])

    def __len__(self) -> int:
        return len(self.content)

    def keys(self, places: Iterable[int]) -> list[bytes]:
        return [self.normal[place * KEY : place * KEY + KEY] for place in places]


@dataclass(frozen=True)
class Questions:
    """The rows of one rank."""

    ids: bytes  # keys of 16 bytes, of all records; as are
    at: np.ndarray  # which of them are rows: those that no grade leaves out
    keys: bytes  # those of the normal form
    groups: bytes  # and of the groups (zeros: none)
    noise: Noise
    places: dict[str, np.ndarray]  # of "pos" and "neg"
    counts: dict[str, np.ndarray]
    words: dict[str, list[str]]  # "lang" and "script" of each row
    odd: Row | None  # the first row with a grade where none is asked for, or without one


def _read_questions(
    folder: Path,
    metadata: Metadata,
    groups: list[RowGroup],
    documents: FolderDocuments,
    min_grade: float | None,
    findings: Findings,
) -> Questions:
    at = array("q")
    ids, keys, of_group, noise = bytearray(), bytearray(), bytearray(), Noise()
    places, counts = ({side: array("q") for side in ("pos", "neg")} for _ in range(2))
    words: dict[str, list[str]] = {"lang": [], "script": []}
    once: dict[str, str] = {}  # one object for each word
    odd: Row | None = None
    for path, line, fields in read_records(folder, "queries", False, findings, groups):
        try:
            row = row_of(fields, metadata, documents, path, line, findings)
        except ValueError as error:
            findings.bad(path, line, str(error), row=True)
            continue
        if (row.grade is None) != (min_grade is None):
            odd = row
            break  # as the others are
        ids += exact_key(row.id)
        if is_below(row, min_grade, findings):
            continue
        at.append(len(ids) // KEY - 1)
        sides: dict[str, Any] = {"pos": row.pos, "neg": row.neg}
        for side, found in sides.items():
            places[side].extend(found)
            counts[side].append(len(found))
        keys += (key := normal_key(row.query))
        of_group += exact_key(row.group) if row.group else bytes(KEY)
        is_empty = not all(documents.content[place] for place in chain(*sides.values()))
        pos, neg = map(documents.keys, sides.values())
        noise.add(key, pos, neg, not has_content(row.query), is_empty)
        for name, word in (("lang", row.lang), ("script", script(row.query))):
            words[name].append(once.setdefault(word, word))
    columns = (_columns(places), _columns(counts), words, odd)
    return Questions(bytes(ids), np.array(at, np.int64), bytes(keys), bytes(of_group), noise, *columns)


def _columns(values: dict[str, array[int]]) -> dict[str, np.ndarray]:
    return {side: np.array(one, np.int64) for side, one in values.items()}
