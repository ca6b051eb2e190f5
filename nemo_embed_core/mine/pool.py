"""The passages that are searched: every text once, and what a query must never be given."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nemo_embed_core.config import UserError
from nemo_embed_core.mine.topk import Exclude


class Row(Protocol):
    """One row of data/readers.py."""

    @property
    def query(self) -> str: ...
    @property
    def pos(self) -> list[str]: ...
    @property
    def neg(self) -> list[str]: ...


def normalize(text: str) -> str:
    """Texts that are equal after this are one text for mining: whitespace runs and case do not count."""
    return " ".join(text.split()).casefold()


@dataclass
class Pool:
    """Every text that can be a document, numbered: first those that are searched, then their spelling variants.

    A variant (equal after `normalize`) keeps its own embedding, since it may be a positive whose score is needed, but
    it is never searched: the same passage twice among the negatives of a query counts twice in the softmax.
    """

    texts: list[str] = field(default_factory=list)
    num_searched: int = 0
    _of_text: dict[str, int] = field(default_factory=dict)
    _of_key: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def build(cls, passages: Iterable[str]) -> Pool:
        pool, variants = cls(), []
        for text in passages:
            if text in pool._of_text:
                continue
            key = _key(text)
            if key in pool._of_key:
                pool._of_text[text] = -1
                variants.append(text)
            else:
                pool._of_key[key] = pool._of_text[text] = len(pool.texts)
                pool.texts.append(text)
        pool.num_searched = len(pool.texts)
        for text in variants:
            pool._of_text[text] = len(pool.texts)
            pool.texts.append(text)
        return pool

    @classmethod
    def of_rows(cls, rows: Sequence[Row], passages: Iterable[str] = ()) -> Pool:
        """The passages of all rows, row by row, then the others."""

        def texts() -> Iterable[str]:
            for i, row in enumerate(rows):
                if not row.pos:
                    raise UserError(f"row {i} ({row.query[:60]!r}) has no positive: without one there is no ceiling")
                yield from row.pos
                yield from row.neg
            yield from passages

        return cls.build(texts())

    def id(self, text: str) -> int:
        """Where the embedding of this very text is."""
        return self._of_text[text]

    def searched_id(self, text: str) -> int | None:
        """The searched document equal to this text after `normalize`, if any."""
        return self._of_key.get(_key(text))


def _key(text: str) -> bytes:
    return hashlib.blake2b(normalize(text).encode(), digest_size=16).digest()


def known_passages(rows: Sequence[Row], pool: Pool) -> Exclude:
    """Per row the documents equal, after `normalize`, to its query or to a positive of any row with that query."""
    of_query: dict[bytes, set[int]] = {}
    for row in rows:
        known = of_query.setdefault(_key(row.query), set())
        known.update(i for i in map(pool.searched_id, (row.query, *row.pos)) if i is not None)
    return Exclude.from_lists([sorted(of_query[_key(row.query)]) for row in rows])
