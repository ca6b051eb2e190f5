"""The documents that are searched, every text once; the rows; and the documents that no query may be given.

All texts are on disk (data/texts.py), keys have 16 bytes, and data/normal_form.py says which are equal.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from nemo_embed_core.data.normal_form import exact_key, has_content, normal_key
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.statistics import script
from nemo_embed_core.data.texts import Texts
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.keys import KEY, Numbers, as_keys, lists_of, rows_of
from nemo_embed_core.mine.search.exclude import Exclude


class Row(Protocol):
    """One row of data/readers.py; `id`, `lang`, `group`, `pos_ids` and `neg_ids` are used if it has them."""

    @property
    def query(self) -> str: ...
    @property
    def pos(self) -> Sequence[str]: ...
    @property
    def neg(self) -> Sequence[str]: ...


class Document(NamedTuple):
    text: str
    id: str = ""


class Known:
    """Which documents are relevant for a query, over all data of a run: 32 bytes a pair."""

    def __init__(self) -> None:
        self.queries, self.documents = bytearray(), bytearray()  # the normal keys of each pair

    def add(self, query: str, documents: Iterable[str]) -> None:
        key = normal_key(query)
        for text in documents:
            self.queries += key
            self.documents += normal_key(text)


class Pool:
    """Every text that can be a document, numbered: first those that are searched, then those set aside.

    Set aside are spelling variants (of texts equal in normal form only the first is searched: twice among the
    negatives of a query it counts twice in the softmax), texts of `excluded` keys, and texts without content.
    They keep embeddings of their own, since they may be positives whose scores are needed.
    """

    def __init__(self, excluded: Set[bytes] = frozenset()):
        self.excluded = excluded
        self.counts: Counter[str] = Counter()  # of texts set aside: variants, excluded, without_content
        self._store = Texts()
        self._exact = bytearray()  # the key of every text, in the order in which they were met
        self._first: dict[bytes, int] = {}  # normal key -> place of the text that stands for it
        self._others: dict[bytes, int] = {}  # exact key -> place of the other spellings
        self._aside = bytearray()
        self._stands = array("q")  # place -> place of the text that stands for it
        self._ids: dict[int, str] = {}
        self._number = np.empty(0, np.int64)
        self._is_open = True
        self.texts: Sequence[str] = self._store
        self.num_searched = 0

    def add(self, text: str, document_id: str = "", is_of_a_row: bool = True) -> int:
        """The place of the text, one for equal texts: `number` has its number once all texts are there.

        Of no row and not searched: it is counted, and not kept (-1).
        """
        key, exact = normal_key(text), exact_key(text)
        place = self._first.get(key)
        if place is not None and self._exact[place * KEY : (place + 1) * KEY] != exact:
            place = self._others.get(exact)
            if place is None:
                place = self._others[exact] = self._append(text, exact, "variants")
                self._stands[place] = self._first[key]
        elif place is None:
            why = "" if self._is_open else "not_in_the_corpus"
            why = "excluded" if key in self.excluded else why if has_content(text) else "without_content"
            if why and not is_of_a_row:
                self.counts[why] += 1
                return -1
            place = self._first[key] = self._append(text, exact, why)
        if document_id:
            self._ids.setdefault(place, document_id)
        return place

    def add_all(self, documents: Iterable[Document]) -> None:
        """Documents that no row brings."""
        for text, document_id in documents:
            self.add(text, document_id, is_of_a_row=False)

    def _append(self, text: str, exact: bytes, aside: str) -> int:
        self._exact += exact
        self._aside.append(bool(aside))
        if aside:
            self.counts[aside] += 1
        self._stands.append(len(self._stands))
        return self._store.append(text)

    def searched_so_far(self) -> None:
        """What is added from now on is not searched, unless it is a text that is here already."""
        self._is_open = False

    def close(self) -> Pool:
        """All texts are there: the searched ones get the first numbers, in the order of their arrival."""
        aside = np.frombuffer(self._aside, np.uint8).astype(bool)
        order = np.concatenate([np.flatnonzero(~aside), np.flatnonzero(aside)])
        self._number = np.empty(len(order), np.int64)
        self._number[order] = np.arange(len(order))
        self._order = order  # number -> place
        self.num_searched = len(order) - int(aside.sum())
        self.texts = _Ordered(self._store, order)
        return self

    def number(self, places: np.ndarray) -> np.ndarray:
        return self._number[places]

    def id(self, text: str) -> int:
        """The number of this very text."""
        place = self._first.get(normal_key(text), -1)
        if place < 0 or self._exact[place * KEY : (place + 1) * KEY] != exact_key(text):
            place = self._others[exact_key(text)]
        return int(self._number[place])

    def searched_by_keys(self, keys: np.ndarray) -> np.ndarray:
        """[n] int64: searched_by_key of each, -1 where there is none."""
        found = map(self.searched_by_key, (key.ljust(KEY, b"\0") for key in keys.tolist()))
        return np.array([-1 if number is None else number for number in found], np.int64)

    def searched_by_key(self, key: bytes) -> int | None:
        """The number of the searched document with this normal key, if any."""
        place = self._first.get(key)
        return None if place is None or self._aside[place] else int(self._number[place])

    def searched(self, numbers: np.ndarray) -> np.ndarray:
        """The searched documents that are the same texts; a document of which none is searched has none."""
        found = self.stands(numbers)
        return found[found >= 0]

    def stands(self, numbers: np.ndarray) -> np.ndarray:
        """[n] int64: the searched document that is the same text as each of these, -1 where none is."""
        found = self._number[np.frombuffer(self._stands, np.int64)[self._order[numbers]]]
        return np.where(found < self.num_searched, found, -1)

    def held(self, numbers: np.ndarray) -> Sequence[str] | Mapping[int, str]:
        """number -> text, to be read in any order."""
        return self.texts

    def document_ids(self, numbers: Iterable[int]) -> list[str | None]:
        """The ids of these documents, None where it is not known; [] where none is."""
        ids = [self._ids.get(int(self._order[number])) for number in numbers]
        return ids if any(ids) else []


class _Ordered(Sequence[str]):
    """[texts[i] for i in order], read when it is asked for."""

    def __init__(self, texts: Texts, order: np.ndarray):
        self.stored, self.order = texts, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.stored[int(i)] for i in self.order[index]]
        return self.stored[int(self.order[index])]


class Noise:
    """Rows, counted by what is wrong with them. add(keys of a row's texts) each, then count()."""

    def __init__(self) -> None:
        self.of_one = dict.fromkeys(
            ("query_without_content", "document_without_content", "query_equals_positive",
             "query_equals_negative", "negative_equals_positive"), 0,
        )  # fmt: skip
        self.rows = bytearray()  # a key of each whole row

    def add(
        self, query: bytes, pos: list[bytes], neg: list[bytes], query_is_empty: bool, one_is_empty: bool
    ) -> None:
        """Normal keys; whether the query, and whether any document, is without content."""
        parts = [query, *sorted(pos), b"-", *sorted(neg)]
        self.rows += hashlib.blake2b(b"|".join(parts), digest_size=KEY).digest()
        found = {
            "query_without_content": query_is_empty,
            "document_without_content": one_is_empty,
            "query_equals_positive": query in pos,
            "query_equals_negative": query in neg,
            "negative_equals_positive": not set(pos).isdisjoint(neg),
        }
        for name, is_so in found.items():
            self.of_one[name] += is_so

    def count(self, queries: bytes | bytearray) -> dict[str, int]:
        """queries: the normal keys of all rows."""
        twice = {
            name: len(keys) // KEY - len(np.unique(as_keys(keys)))
            for name, keys in (("duplicate_rows", self.rows), ("same_query_rows", queries))
        }
        return twice | self.of_one


class Rows:
    """The rows with their texts once, on disk: queries here, documents in the pool.

    pos, neg: CSR of document numbers. noise: rows, counted by what is wrong with them.
    """

    def __init__(self, rows: Iterable[Row], pool: Pool, known: Known | None = None):
        """known: of the whole run; None: of these rows. Adds texts to the pool, which the caller closes."""
        self.pool: Pool = pool
        self.queries: Sequence[str] = Texts()
        self.keys: bytes | bytearray = bytearray()  # of the queries, 16 bytes each
        self.ids: list[str] = []
        self.langs: list[str] = []
        self.groups: list[str] = []
        self.prompts: dict[int, str] = {}  # instructions that rows bring themselves
        self.num_excluded = 0  # rows with a positive that is excluded from the search
        self.known = known or Known()
        places = {"pos": array("q"), "neg": array("q")}
        ends = {"pos": array("q", [0]), "neg": array("q", [0])}
        queries, keys, noise = Texts(), bytearray(), Noise()
        for i, row in enumerate(rows):
            if not row.pos:
                which = f"row {i} ({row.query[:60]!r})"
                raise UserError(f"{which} has no positive: without one there is no ceiling")
            if known is None:
                self.known.add(row.query, row.pos)
            for side, texts in (("pos", row.pos), ("neg", row.neg)):
                ids = getattr(row, f"{side}_ids", None) or [""] * len(texts)
                places[side].extend(map(pool.add, texts, ids))
                ends[side].append(len(places[side]))
            queries.append(row.query)
            query, pos, neg = normal_key(row.query), [*map(normal_key, row.pos)], [*map(normal_key, row.neg)]
            keys += query
            self.num_excluded += not pool.excluded.isdisjoint(pos)
            is_empty = not all(map(has_content, (*row.pos, *row.neg)))
            noise.add(query, pos, neg, not has_content(row.query), is_empty)
            for name, values in (("id", self.ids), ("lang", self.langs), ("group", self.groups)):
                values.append(getattr(row, name, ""))
            if (prompt := getattr(row, "prompt", None)) is not None:
                self.prompts[i] = prompt
        self.queries, self.keys, self.noise = queries, keys, noise.count(keys)
        self._places, self._ends = places, ends

    def __len__(self) -> int:
        return len(self.queries)

    def read(self, at: Iterable[int] | None = None) -> Iterator[tuple[str, dict[str, str]]]:
        """(query, its lang, id and group where they are known) of the rows `at` (ascending; None: of all)."""
        names = {"lang": self.langs, "id": self.ids, "group": self.groups}
        for i in range(len(self)) if at is None else at:
            more = {name: values[i] for name, values in names.items() if values[i]}
            yield self.queries[i], more | ({"prompt": self.prompts[i]} if i in self.prompts else {})

    @property
    def scripts(self) -> list[str]:
        """Of each query."""
        return [script(text) for text in self.queries]

    @property
    def classes(self) -> np.ndarray:
        """[rows] int64: equal for rows of the same group, -1 without one."""
        numbers = {"": -1}
        return np.array([numbers.setdefault(group, len(numbers) - 1) for group in self.groups], np.int64)

    def prompted(self, prompt: str) -> tuple[Sequence[str], str]:
        """(queries, prompt) to encode; where rows bring their own instruction it stands in every text."""
        if not self.prompts:
            return self.queries, prompt
        texts = Texts()
        for i, query in enumerate(self.queries):
            own = self.prompts.get(i)
            texts.append((prompt if own is None else query_prompt(own)) + query)
        return texts, ""

    @cached_property
    def pos(self) -> Exclude:  # once the pool is closed
        return self._numbered("pos")

    @cached_property
    def neg(self) -> Exclude:
        return self._numbered("neg")

    def _numbered(self, side: str) -> Exclude:
        places = np.array(self._places[side], np.int64)
        return Exclude(np.array(self._ends[side], np.int64), self.pool.number(places))


class Exclusions:
    """Per row the documents that it must not be given, as classes that rows share: bytes by row, not by pair.

    of_row: CSR, the classes of each row; members: CSR, the documents of each class.
    """

    def __init__(self, of_row: Exclude, members: Exclude):
        self.of_row, self.members = of_row, members

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """At most how many documents `take` gives each of these rows."""
        taken = self.of_row.take(rows)
        sizes = np.concatenate([[0], np.cumsum(np.diff(self.members.indptr)[taken.ids])])
        return sizes[taken.indptr[1:]] - sizes[taken.indptr[:-1]]

    def take(self, rows: np.ndarray) -> Exclude:
        taken = self.of_row.take(rows)
        documents = self.members.take(taken.ids)
        return Exclude(documents.indptr[taken.indptr], documents.ids)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((*self.of_row, *self.members))


def exclusions(rows: Rows, cuts: Iterable[Cut] = ()) -> Exclusions:
    """What no row is given: documents equal in normal form to its query or to a document known to be relevant
    for it, documents of its group, and documents that are equal to one of its positives after truncation
    (`cuts`, one per teacher)."""
    pool, positives, keys = rows.pool, rows.pos, as_keys(rows.keys)
    distinct, class_of = np.unique(keys, return_inverse=True)
    known = Numbers(distinct).of(as_keys(rows.known.queries))
    documents = pool.searched_by_keys(as_keys(rows.known.documents)[known >= 0])
    classes = [(known[known >= 0], documents), (np.arange(len(distinct)), pool.searched_by_keys(distinct))]
    of_row, first = [(np.arange(len(rows)), class_of)], len(distinct)
    del distinct, known, documents
    same = _lists(classes, first)  # as query: by class of equal queries
    groups = rows.classes
    if (some := np.flatnonzero(groups >= 0)).size:
        of_row.append((some, first + groups[some]))
        in_group = positives.take(some)
        classes.append((first + np.repeat(groups[some], np.diff(in_group.indptr)), pool.stands(in_group.ids)))
        classes.append((first + groups[some], pool.searched_by_keys(keys[some])))
        first += int(groups.max()) + 1
    for cut in cuts:
        number, of_document = np.array(list(cut.of_document.items()), np.int64).reshape(-1, 2).T
        is_searched = number < pool.num_searched
        classes.append((first + of_document[is_searched], number[is_searched]))
        table = np.full(len(pool.texts) if len(number) else 0, -1, np.int64)
        table[number] = of_document
        if len(number):  # a row's classes are those of its positives and of what else is known for it
            of_class = _lists([(rows_of(same), table[same.ids])], len(same.indptr) - 1).take(class_of)
            of_row.append((rows_of(positives), _behind(first, table[positives.ids])))
            of_row.append((rows_of(of_class), first + of_class.ids))
        first += len(cut.members)
    return Exclusions(_lists(of_row, len(rows)), _lists(classes, first))


def _behind(first: int, numbers: np.ndarray) -> np.ndarray:
    return np.where(numbers >= 0, first + numbers, -1)


def _lists(pairs: list[tuple[np.ndarray, np.ndarray]], num_rows: int) -> Exclude:
    """lists_of all of these (rows, ids), without the ids below 0."""
    rows, ids = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return lists_of(rows[ids >= 0], ids[ids >= 0], num_rows)


class Cut:
    """Documents that are equal once they are cut at the model's length: classes of two and more.

    numbers, keys: of the documents that fill the length, and the key of the tokens that are left of each.
    """

    def __init__(self, numbers: Iterable[int], keys: Iterable[bytes]):
        same: dict[bytes, list[int]] = {}
        for number, key in zip(numbers, keys, strict=True):
            same.setdefault(key, []).append(number)
        self.members = [found for found in same.values() if len(found) > 1]
        self.of_document = {number: i for i, found in enumerate(self.members) for number in found}
