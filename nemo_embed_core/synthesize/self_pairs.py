"""Pairs from documents themselves, without a model: what their authors wrote over, before or within a text.

title      the document's title                          -> its first chunk
heading    a section's heading, with the title where the heading is short -> the chunks of the section
summary    a docstring's first paragraph, a description, an abstract       -> the first chunk of the rest
question   a question that stands in a chunk, or a heading that is one     -> the chunk without it
sentence   a sentence of a chunk                                           -> the chunk without it

A query is taken out of its document: no document holds its query's sentence or heading, so that a model
learns (and an evaluation on the held-out part asks) more than to find a copy. A chunk is one document of the
corpus, whatever was taken out of it, for all of its queries. A query of several chunks (equal in the normal
form) is one row with all of them; one of more than MOST chunks ("Parameters", "Notes") tells nothing and is
left out.

Splits are by document (documents.is_held_out), and a held-out row whose query or document stands in the other
split is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nemo_embed_core.config.synthesize import SelfPairsConfig, Way
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.normal_form import normal_form, normal_key
from nemo_embed_core.data.statistics import scripts
from nemo_embed_core.synthesize.chunks import chunks, sentences
from nemo_embed_core.synthesize.documents import Document, is_held_out
from nemo_embed_core.synthesize.structure import Section

MOST = 4  # chunks of a query
SHORT_WORDS = 4  # a heading of fewer words has the title before it
QUERY_CHARS = (12, 300)
_ASKS = re.compile(r"(how|what|why|when|where|which|who|whose|can|could|does|do|is|are|should)\b[^.!]*", re.I)


class Chunk(NamedTuple):
    id: str  # of its document, and its number in it: "guide.md#3"
    text: str  # without what was taken out of it


@dataclass
class Split:
    """rows: {normal form of a query: (query, its chunks' numbers)}, in the order of the documents."""

    chunks: list[Chunk] = field(default_factory=list)
    rows: dict[bytes, tuple[str, list[int]]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # of pairs by way, and of what was left out

    def rows_of(self) -> Iterator[Row]:
        for number, (query, places) in enumerate(self.rows.values()):
            found = [self.chunks[place] for place in places]
            texts, ids = [chunk.text for chunk in found], [chunk.id for chunk in found]
            yield Row(query, texts, [], ids[0].rpartition("#")[0], 1, id=f"q{number}", pos_ids=ids)


def self_pairs(documents: Iterable[Document], config: SelfPairsConfig, seed: int) -> tuple[Split, Split]:
    """(train, held out). Memory: the chunks' texts and the queries."""
    train, held_out = Split(), Split()
    for document in documents:
        split = held_out if is_held_out(document.id, config.held_out, seed) else train
        split.counts["files"] += 1
        _take(document, config, seed, split)
    for split in (train, held_out):
        _drop(split, "too general", {key for key, (_, places) in split.rows.items() if len(places) > MOST})
    texts = {normal_key(chunk.text) for chunk in train.chunks}
    both = {
        key
        for key, (_, places) in held_out.rows.items()
        if key in train.rows or any(normal_key(held_out.chunks[place].text) in texts for place in places)
    }
    _drop(held_out, "in train too", both)
    return train, held_out


def _drop(split: Split, reason: str, keys: set[bytes]) -> None:
    if keys:
        split.counts[reason] += len(keys)
        split.rows = {key: value for key, value in split.rows.items() if key not in keys}


def _take(document: Document, config: SelfPairsConfig, seed: int, split: Split) -> None:
    title, is_first, number = document.parsed.title, True, 0
    for section in document.parsed.sections:
        places = []
        for blocks in chunks(section, config.max_chars):
            name, number = f"{document.id}#{number}", number + 1
            taken = list(_taken_out(blocks, config, f"{seed}\0{name}"))
            text = "\n\n".join(blocks)
            if len(text) < config.min_chars:
                split.counts["short chunks"] += 1
                continue
            places.append(len(split.chunks))
            split.chunks.append(Chunk(name, text))
            for way, query in taken:
                _add(split, way, query, places[-1:], config)
        if places:
            for way, query, found in _of_section(section, title, places, is_first):
                _add(split, way, query, found, config)
            is_first = False


def _of_section(
    section: Section, title: str, places: list[int], is_first: bool
) -> Iterator[tuple[Way, str, list[int]]]:
    if section.summary:
        yield "summary", section.summary, places[:1]
    heading = section.headings[-1] if section.headings else ""
    if heading.endswith("?") or (heading and _ASKS.fullmatch(heading) and len(heading.split()) > SHORT_WORDS):
        yield "question", heading, places
    elif heading and not section.summary:  # else the name of a function
        whole = heading if len(heading.split()) >= SHORT_WORDS or not title else f"{title}: {heading}"
        yield "heading", whole, places
    if title and is_first:
        yield "title", title, places[:1]


def _taken_out(blocks: list[str], config: SelfPairsConfig, seed: str) -> Iterator[tuple[Way, str]]:
    """A question and a sentence of a chunk, which then are not in its blocks; what is left has min_chars."""
    for way in ("question", "sentence"):
        if way not in config.ways:
            continue
        found = [
            (hashlib.sha256(f"{seed}\0{way}\0{sentence}".encode()).digest(), number, sentence)
            for number, block in enumerate(blocks)
            for sentence in sentences(block)
            if _is_query(sentence) and sentence.endswith("?") == (way == "question")
        ]
        size = sum(map(len, blocks))
        found = [one for one in found if size - len(one[2]) >= config.min_chars]
        if found:
            _, number, sentence = min(found)
            blocks[number] = re.sub(r" {2,}", " ", blocks[number].replace(sentence, "")).strip()
            if not blocks[number]:
                del blocks[number]
            yield way, sentence


def _is_query(sentence: str) -> bool:
    """Prose of at least five words on one line, which begins and ends as a sentence does."""
    words = sentence.split()
    if not (QUERY_CHARS[0] <= len(sentence) <= QUERY_CHARS[1]) or "\n" in sentence:
        return False
    has_no_spaces = bool({"Kana", "Han"} & scripts(sentence).keys())
    letters = sum(character.isalpha() or character.isspace() for character in sentence)
    ends = re.search(r"[.!?。！？][\"'”’)]*$", sentence)
    return bool(ends) and letters >= 0.75 * len(sentence) and (has_no_spaces or len(words) >= 5)


def _add(split: Split, way: Way, query: str, places: list[int], config: SelfPairsConfig) -> None:
    if way not in config.ways:
        return
    query = " ".join(query.split())
    if not QUERY_CHARS[0] <= len(query) <= QUERY_CHARS[1] or not re.search(r"[^\W\d_]", query):
        split.counts["short or long queries"] += 1
        return
    form = normal_form(query)
    if any(form in normal_form(split.chunks[place].text) for place in places):
        split.counts["queries that stand in their document"] += 1
        return
    _, before = split.rows.setdefault(normal_key(query), (query, []))
    before += [place for place in places if place not in before]
    split.counts[way] += 1
