"""Texts cut from one another: most runs of eight words of the shorter one are in the longer one.

    C(a, b) = |runs(a) & runs(b)| / min(|runs(a)|, |runs(b)|) >= CONTAINED, of the normal forms

A text that was shortened, or stands in a longer one, has a small J with it (data/near.py) and C near 1. A
changed word costs up to RUN of the runs. The index keeps the KEPT smallest hashes of a text's runs, and none
that more than COMMON texts have: boilerplate is no evidence. C is then that of the texts, not its estimate.
Both texts count whole: a passage may stand anywhere in a long page. Time grows with a text, the index not.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from nemo_embed_core.data.near import words_of
from nemo_embed_core.data.normal_form import normal_form
from nemo_embed_core.data.sampler import splitmix64

RUN = 8  # words
CONTAINED = 0.8
FEWEST = 8  # runs of the shorter text: 15 words, below which a sentence of boilerplate is "contained"
KEPT, COMMON = 64, 64
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def run_hashes(words: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 [R], text [R]): hashes of the runs of words of several texts, in their order."""
    lengths = np.array([len(part) for part in words], np.int64)
    hashes = np.fromiter((zlib.crc32(w.encode()) for part in words for w in part), np.uint64, lengths.sum())
    owner = np.repeat(np.arange(len(words)), lengths)
    if len(hashes) < RUN:
        return hashes[:0], owner[:0]
    ends = len(hashes) - RUN + 1
    found = np.zeros(ends, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(RUN):
            found = found * _FACTOR + hashes[i : i + ends]
    whole = owner[:ends] == owner[RUN - 1 :]
    return splitmix64(found[whole]), owner[:ends][whole]


def runs_of(text: str) -> np.ndarray:
    """Distinct hashes, ascending."""
    return np.unique(run_hashes([words_of(normal_form(text))])[0])


def contained(a: str, b: str) -> float:
    """C of the module's formula; 0 where the shorter one has fewer than FEWEST runs."""
    return _contained(runs_of(a), runs_of(b))


def _contained(ours: np.ndarray, theirs: np.ndarray) -> float:
    fewer = min(len(ours), len(theirs))
    both = len(np.intersect1d(ours, theirs, assume_unique=True))
    return both / fewer if fewer >= FEWEST else 0.0


class ContainedIndex:
    """Texts that others are compared with as they are shown: 0.8 kB of memory a text.

    places [m]: what found and text_of call them. found[place] = (number of the text that was shown, their C).
    """

    def __init__(self, places: Iterable[int], text_of: Callable[[int], str]):
        self._places, self._text_of = list(places), text_of
        self.found: dict[int, tuple[int, float]] = {}
        runs = [runs_of(text_of(place)) for place in self._places]
        self._sizes = np.array([len(part) for part in runs], np.int64)
        kept = [part[:KEPT] if len(part) >= FEWEST else part[:0] for part in runs]
        hashes = np.concatenate([np.empty(0, np.uint64), *kept])
        owner = np.repeat(np.arange(len(kept), dtype=np.int32), [len(part) for part in kept])
        _, inverse, times = np.unique(hashes, return_inverse=True, return_counts=True)
        order = np.argsort(hashes, kind="stable")
        order = order[times[inverse[order]] <= COMMON]
        self._hashes, self._owner = hashes[order], owner[order]
        self._indexed = np.bincount(self._owner, minlength=len(kept))

    def show(self, numbers: Sequence[int], words: Sequence[Sequence[str]]) -> None:
        """words [n] of texts that are shown, whole."""
        hashes, text = run_hashes(words)
        starts = np.searchsorted(self._hashes, hashes, side="left")
        times = np.searchsorted(self._hashes, hashes, side="right") - starts
        ends = np.searchsorted(text, np.arange(len(words) + 1))
        for i in np.unique(text[times > 0]).tolist():
            part = slice(ends[i], ends[i + 1])
            runs, first = np.unique(hashes[part], return_index=True)
            spans = zip(starts[part][first].tolist(), times[part][first].tolist(), strict=True)
            owners = np.concatenate([self._owner[start : start + count] for start, count in spans])
            candidates, hits = np.unique(owners, return_counts=True)
            # Of a longer text as much is kept of the shorter one that is shown as the kept share of its runs.
            share = np.minimum(1.0, len(runs) / np.maximum(1, self._sizes[candidates]))
            for j in candidates[hits >= 0.5 * CONTAINED * share * self._indexed[candidates]].tolist():
                self._look(numbers[i], runs, j)

    def _look(self, number: int, runs: np.ndarray, j: int) -> None:
        if (place := self._places[j]) in self.found:
            return
        if (share := _contained(runs, runs_of(self._text_of(place)))) >= CONTAINED:
            self.found[place] = (number, share)
