"""Which texts of an evaluation task are in training data: equal in normal form, near-duplicates, or cut.

    found = overlap(task.texts, ["runs/stage1"], log)      # {"queries": {"of", "exact", "near", ...}, ...}

Training texts of either side are read once, as training reads them, and looked for among the texts of both
sides of the task. Memory: 8 bytes for each distinct training text (16 while the sorted parts are merged), and
20 for each text of the task; 1.6 kB for each of at most SAMPLED of a side that near-duplicates and cut texts
are looked for; not the texts themselves (data/texts.py).

data/overlap.py answers the same for `--inspect`, the other way round: a dataset's distinct texts are on disk
there, signed once for its own near-duplicates and for every evaluation set, and exact copies are looked up
among their keys. Here they stream by and nothing of them is kept but that they were met.
"""

from __future__ import annotations

import heapq
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.checkpoint.manifest import read_manifest
from nemo_embed_core.checkpoint.runs import find_checkpoint, is_checkpoint
from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.build import with_store
from nemo_embed_core.data.contained import ContainedIndex
from nemo_embed_core.data.lines import PROGRESS_S
from nemo_embed_core.data.near import CHARACTERS, NEAR, NearIndex, pairs_of, signer, word_pairs, words_of
from nemo_embed_core.data.normal_form import exact_key, form_key, has_content, normal_form, normal_key
from nemo_embed_core.data.overlap import NAMED, SAMPLED
from nemo_embed_core.data.readers import Findings, files_of, read_rows
from nemo_embed_core.data.store import TOKEN_FILES
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.strict_json import read_object

OWN = "own"  # as a name of training data: that of each model's own run
PIECE, PIECE_CHARACTERS = 1024, 8 << 20  # training texts that are looked at together, and of them
PAIR_BITS = 27  # of the table of pairs of words, 16 MB
Log = Callable[[str], None]
Texts = Mapping[str, Mapping[str, str]]  # side -> id -> text


# ------------------------------------------------------------------------------------------ training data


def training_data(name: str) -> DataConfig:
    """Of a run or checkpoint the data that its manifest names; of a store its sources; else a dataset: a
    file or folder, split train, or FOLDER:SPLIT. UserError where it is none, or its files are not there."""
    path = Path(name)
    if is_checkpoint(path) and not (path / TOKEN_FILES[0]).is_file():
        data = DataConfig.from_dict(read_manifest(find_checkpoint(path))["config"]["data"])
        data = with_store(data) if not data.datasets else data
    elif (path / TOKEN_FILES[0]).is_file():
        data = _of_store(path)
    elif any((path / name).is_file() for name in ("config.json", "modules.json")):
        raise UserError(
            f"training={name} is a model folder, which does not say what it was trained on: give its run, or "
            "the data"
        )
    else:
        at, split = (name, "train") if path.exists() or ":" not in name else name.rsplit(":", 1)
        data = DataConfig(datasets=[DatasetConfig(path=at, split=split)])
    try:
        files_of(data.datasets)
    except UserError as error:
        raise UserError(f"training={name}: {error}") from None
    return data


def _of_store(folder: Path) -> DataConfig:
    data = with_store(DataConfig(store=str(folder)))
    sources = read_object(folder / "manifest.json")["sources"]
    is_split = [Path(source["row_file"]).parent.name == "qrels" for source in sources]
    datasets = [
        replace(d, split=Path(source["row_file"]).stem) if split else d
        for d, source, split in zip(data.datasets, sources, is_split, strict=True)
    ]
    return replace(data, datasets=datasets)


def training_texts(data: DataConfig) -> Iterator[tuple[str, str]]:
    """(text, path:line) of all rows."""
    for dataset in data.datasets:
        findings = Findings(strict=True, drop=data.on_bad == "drop")
        for row in read_rows(dataset, findings, graded=True):
            for text in (row.query, *row.pos, *row.neg):
                yield text, f"{row.path}:{row.line}"


class Seen:
    """Keys that were met, 8 bytes each: sorted parts, each twice as long as the next."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def new(self, keys: np.ndarray) -> np.ndarray:
        """bool [n]: which keys, uint64 [n], are met for the first time. They are then known."""
        values, first = np.unique(keys, return_index=True)
        known = np.zeros(len(values), bool)
        for part in self._parts:
            at = np.minimum(np.searchsorted(part, values), len(part) - 1)
            known |= part[at] == values
        fresh = values[~known]
        while self._parts and len(self._parts[-1]) <= 2 * len(fresh):
            fresh = np.sort(np.concatenate([self._parts.pop(), fresh]), kind="stable")
        if len(fresh):
            self._parts.append(fresh)
        is_new = np.zeros(len(keys), bool)
        is_new[first[~known]] = True
        return is_new


# ------------------------------------------------------------------------------------------ a task's texts


class Overlap:
    """The texts of a task, compared with training texts as these are shown."""

    def __init__(self, texts: Texts):
        self._sign = signer()
        self._texts, self._names = texts, [(side, i) for side in texts for i in texts[side]]
        keys = [_key(normal_key(text)) if has_content(text := self._text(place)) else None
                for place in range(len(self._names))]  # fmt: skip
        self._places = np.array([place for place, key in enumerate(keys) if key is not None], np.int64)
        self._keys = np.array([key for key in keys if key is not None], np.uint64)
        order = np.argsort(self._keys, kind="stable")
        self._places, self._keys = self._places[order], self._keys[order]
        self.sampled: dict[str, list[int]] = {}
        for side in texts:
            own = ((key, place) for place, key in zip(self._places.tolist(), self._keys.tolist(), strict=True)
                   if self._names[place][0] == side)  # fmt: skip
            self.sampled[side] = sorted(place for _, place in heapq.nsmallest(SAMPLED, own))
        sampled = np.array(sorted(itertools.chain(*self.sampled.values())), np.int64)
        self._near = NearIndex(sampled, self._text, self._sign, is_own=False)
        self._contained = ContainedIndex(sampled.tolist(), self._text)
        self._has_pair = np.zeros(1 << (PAIR_BITS - 3), np.uint8)
        for place in sampled.tolist():
            bits = _pair_bits(word_pairs(self._text(place)))
            np.bitwise_or.at(self._has_pair, bits >> 3, np.uint8(1) << (bits & 7).astype(np.uint8))
        self._exact: dict[int, tuple[str, str]] = {}  # place -> training text and where
        self._others: dict[int, tuple[str, str, str, float]] = {}  # and kind and similarity

    def _text(self, place: int) -> str:
        side, name = self._names[place]
        return self._texts[side][name]

    def show(self, texts: Sequence[str], where: Sequence[str]) -> None:
        forms = [normal_form(text) for text in texts]
        words = [words_of(form) for form in forms]
        keys = np.array([_key(form_key(form)) for form in forms], np.uint64)
        starts = np.searchsorted(self._keys, keys, side="left")
        ends = np.searchsorted(self._keys, keys, side="right")
        for i in np.flatnonzero(ends > starts).tolist():
            for place in self._places[starts[i] : ends[i]].tolist():
                self._exact.setdefault(place, (texts[i], where[i]))
        self._contained.show(range(len(texts)), words)
        # J >= NEAR takes that share of the pairs of what is shown: most texts are told without a signature.
        pairs = (pairs_of(form, own) if len(text) <= CHARACTERS else word_pairs(text)
                 for text, form, own in zip(texts, forms, words, strict=True))  # fmt: skip
        likely = [i for i, own in enumerate(pairs) if self._share(own) >= NEAR]
        if likely:
            own = [texts[i][:CHARACTERS] for i in likely]
            self._near.show(0, own, self._sign(own))
        for kind, found, number_of in (
            ("near", self._near.found, likely.__getitem__),
            ("cut", self._contained.found, int),
        ):
            for place in found.keys() - self._others.keys():
                number, similarity = found[place]
                i = number_of(number)
                self._others[place] = (texts[i], where[i], kind, similarity)

    def _share(self, pairs: set[str]) -> float:
        bits = _pair_bits(pairs)
        return float((self._has_pair[bits >> 3] >> (bits & 7).astype(np.uint8) & 1).mean())

    def kinds(self) -> dict[str, dict[str, str]]:
        """side -> id -> "exact", "near" or "cut", of what is found."""
        found: dict[str, dict[str, str]] = {side: {} for side in self._texts}
        for place in self._exact.keys() | self._others.keys():
            side, name = self._names[place]
            found[side][name] = "exact" if place in self._exact else self._others[place][2]
        return found

    def report(self) -> dict[str, dict[str, Any]]:
        """Of each side: "of" texts with content, "exact"; of "looked_at" of them, those without an exact
        copy, "near" and "cut"; "share" = exact / of + (near + cut) / looked_at; "first" examples."""
        found = {}
        for side in self._texts:
            mine = [place for place in self._places.tolist() if self._names[place][0] == side]
            exact = sorted(place for place in mine if place in self._exact)
            others = [place for place in self.sampled[side]
                      if place in self._others and place not in self._exact]  # fmt: skip
            kinds = [self._others[place][2] for place in others]
            share = len(exact) / max(1, len(mine)) + len(others) / max(1, len(self.sampled[side]))
            first = [(place, *self._exact[place], "exact", 1.0) for place in exact[:NAMED]]
            for kind in ("near", "cut"):
                of_kind = [place for place in others if self._others[place][2] == kind][:NAMED]
                first += [(place, *self._others[place]) for place in of_kind]
            found[side] = {
                **{"of": len(mine), "exact": len(exact), "near": kinds.count("near")},
                **{"cut": kinds.count("cut"), "looked_at": len(self.sampled[side])},
                "share": round(min(1.0, share), 6),
                "first": [
                    {"id": self._names[place][1], "text": self._text(place)[:200], "where": where,
                     "data": text[:200], "kind": kind, "similarity": round(similarity, 4)}
                    for place, text, where, kind, similarity in first
                ],
            }  # fmt: skip
        return found


def _key(key: bytes) -> int:
    """The half of 16 bytes: of 16 M and 1 M texts two that differ have one with a chance of 1e-6."""
    return int.from_bytes(key[:8], "little")


def _pair_bits(pairs: set[str]) -> np.ndarray:
    return np.array([zlib.crc32(pair.encode()) >> (32 - PAIR_BITS) for pair in pairs], np.int64)


def _pieces(shown: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """At most PIECE texts of PIECE_CHARACTERS together, or one: their words are in memory at once."""
    piece: list[tuple[str, str]] = []
    held = 0
    for text, where in shown:
        if piece and (held + len(text) > PIECE_CHARACTERS or len(piece) == PIECE):
            yield piece
            piece, held = [], 0
        piece.append((text, where))
        held += len(text)
    if piece:
        yield piece


def overlap(texts: Texts, training: Sequence[str], log: Log = print) -> dict[str, Any]:
    """Overlap.report() of the sides of `texts`, with "training", its "rows" of texts that were read, the
    "distinct" ones of them, and "seconds"."""
    sources = [training_data(name) for name in training]
    begun = said = time.monotonic()
    found, seen, read = Overlap(texts), Seen(), 0
    shown = itertools.chain.from_iterable(map(training_texts, sources))
    for piece in _pieces(shown):
        read += len(piece)
        is_new = seen.new(np.array([_key(exact_key(text)) for text, _ in piece], np.uint64))
        if fresh := [piece[i] for i in np.flatnonzero(is_new).tolist()]:
            found.show(*zip(*fresh, strict=True))
        if (now := time.monotonic()) - said >= PROGRESS_S:
            said = now
            log(f"compared {read:,} training texts, {len(seen):,} distinct, in {now - begun:.0f} s")
    if not read:
        raise UserError(f"training={', '.join(training)} has no texts")
    return {
        **{"training": list(training), "texts": read, "distinct": len(seen)},
        **{"seconds": round(time.monotonic() - begun, 1), **found.report()},
    }


# ------------------------------------------------------------------------------------------ to read


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """One for each side, and one for each example."""
    yield (
        f"overlap with {', '.join(found['training'])}: {found['distinct']:,} distinct texts of "
        f"{found['texts']:,}, {found['seconds']:.0f} s"
    )
    for side in sides(found):
        own = found[side]
        sample = "" if own["looked_at"] == own["of"] else f" of a sample of {own['looked_at']:,}"
        yield (
            f"  {side}: {own['exact']:,} of {own['of']:,} exact, {own['near']:,} near and {own['cut']:,} "
            f"cut{sample}, together {own['share']:.2%}"
        )
        for one in own["first"]:
            shown = " ".join(one["text"].split())[:60]
            yield f"    {one['id']} {shown!r}: {one['kind']} {one['similarity']:.2f} {one['where']}"


def sides(found: Mapping[str, Any]) -> list[str]:
    return [side for side in ("queries", "documents") if side in found]


def words(found: Mapping[str, Any] | None) -> str:
    """On a line of a table: `queries 1.30 %, documents 40.00 %`."""
    if found is None:
        return "not looked for"
    return ", ".join(f"{side} {found[side]['share']:.2%}" for side in sides(found))


def refuse(found: Mapping[str, Any], strict: float, name: str) -> None:
    """UserError where more than this share of the queries is in the training data; it names them."""
    own = found["queries"]
    if own["share"] <= strict:
        return
    first = "; ".join(f"{one['id']} {one['text'][:80]!r} at {one['where']}" for one in own["first"])
    raise UserError(
        f"{own['share']:.2%} of the queries of {name} are in {', '.join(found['training'])}, more than "
        f"strict={strict:.2%}: {first}. Train without these rows, evaluate on others, or raise strict"
    )
