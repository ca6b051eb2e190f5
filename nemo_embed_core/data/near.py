"""Near-duplicates: texts that have most of their pairs of neighbouring words in common, found by MinHash.

    J(a, b) = |pairs(a) & pairs(b)| / |pairs(a) | pairs(b)| >= NEAR, of the normal forms, CHARACTERS from each

datasketch signs a text with 128 minima. Two texts are compared where the 6 minima of one of 21 bands are
equal: of the pairs with J = 0.8 that is 1 - (1 - 0.8 ** 6) ** 21 = 99.8 %. J is then that of the texts, not
its estimate. (datasketch's own MinHashLSH takes 3.3 kB a text and looks at all pairs of a bucket.)

# n texts that are shown · m texts of the index
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nemo_embed_core.data.normal_form import normal_form
from nemo_embed_core.data.sampler import splitmix64
from nemo_embed_core.errors import UserError

NEAR = 0.8  # of the pairs of words
CHARACTERS = 8192  # of a text: time and memory do not grow with its length
PERMUTATIONS, BANDS, BAND = 128, 21, 6
LOOKED_AT = 8  # texts of a bucket at most: boilerplate would be quadratic
# Runs of letters and digits; of scripts without spaces (Thai to Khmer, kana, Han) each letter is a word.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORDS = re.compile(rf"[^\W{_ALONE}]+|\w")


def words_of(form: str) -> list[str]:
    """Of a normal form."""
    return _WORDS.findall(form)


def word_pairs(text: str) -> set[str]:
    """Neighbouring words; the word, or the text, of one that has fewer than two."""
    form = normal_form(text[:CHARACTERS])
    return pairs_of(form, words_of(form))


def pairs_of(form: str, words: Sequence[str]) -> set[str]:
    return {f"{a} {b}" for a, b in itertools.pairwise(words)} or {words[0] if words else form}


def similarity(a: str, b: str) -> float:
    """J of the module's formula, exact."""
    ours, theirs = word_pairs(a), word_pairs(b)
    return len(ours & theirs) / len(ours | theirs)


def signer() -> Callable[[Sequence[str]], np.ndarray]:
    """sign(texts) -> uint32 [n, PERMUTATIONS]. UserError where datasketch is not installed."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise UserError(
            "near-duplicates are found with datasketch, which is not installed: pip install "
            "'nemo_embed_core[inspect]' or 'datasketch>=2'"
        ) from None
    # Its own hash, SHA-1, takes a third of the time.
    empty: Any = MinHash(num_perm=PERMUTATIONS, seed=1, scheme="affine32", hashfunc=zlib.crc32)

    def sign(texts: Sequence[str]) -> np.ndarray:
        out = np.empty((len(texts), PERMUTATIONS), np.uint32)
        for i, text in enumerate(texts):
            one = empty.copy()
            one.update_batch([pair.encode() for pair in word_pairs(text)])
            out[i] = one.hashvalues
        return out

    return sign


class NearIndex:
    """Texts that others are compared with as they are shown: 0.8 kB of memory a text.

    places [m]: what found and text_of call them. found[place] = (place of a text that was shown, their J).
    is_own: what is shown has the same places, and both of a pair are found.
    """

    def __init__(
        self, places: np.ndarray, text_of: Callable[[int], str], sign: Callable[..., np.ndarray], is_own: bool
    ):
        self._text_of, self._is_own, self.count = text_of, is_own, len(places)
        self._known = set(places.tolist()) if is_own else set()
        self.found: dict[int, tuple[int, float]] = {}
        parts = [places[start : start + 512] for start in range(0, max(1, len(places)), 512)]
        self._set(places, np.concatenate([sign([text_of(place) for place in part]) for part in parts]))

    def _set(self, places: np.ndarray, signatures: np.ndarray) -> None:
        self._places, self._signatures, keys = places, signatures, _band_keys(signatures)
        self._order = np.argsort(keys, axis=0, kind="stable").astype(np.int32)
        self._keys = np.take_along_axis(keys, self._order, axis=0)

    def show(self, first: int, texts: Sequence[str], signatures: np.ndarray) -> None:
        """texts [n], whose places are first, first + 1, ..."""
        while self._look(first, texts, signatures) and not self._is_own:
            # To be found once is enough, and others of the bucket may stand behind it.
            left = np.array([place not in self.found for place in self._places.tolist()], bool)
            self._set(self._places[left], self._signatures[left])

    def _look(self, first: int, texts: Sequence[str], signatures: np.ndarray) -> int:
        """How many more are found."""
        keys, pairs, before = _band_keys(signatures), set[tuple[int, int]](), len(self.found)
        for band in range(BANDS):
            ours = self._keys[:, band]
            starts = np.searchsorted(ours, keys[:, band], side="left")
            ends = np.searchsorted(ours, keys[:, band], side="right")
            for step in range(LOOKED_AT):
                (shown,) = np.nonzero(starts + step < ends)
                candidates = self._order[starts[shown] + step, band]
                pairs |= set(zip(shown.tolist(), candidates.tolist(), strict=True))
        for i, j in sorted(pairs):
            place, other = int(self._places[j]), first + i
            if (self._is_own and place == other) or (place in self.found and other not in self._known):
                continue
            # The estimate is off by 0.035 at J = 0.8 (a standard deviation): none is lost here.
            if (signatures[i] == self._signatures[j]).mean() < NEAR - 0.15:
                continue
            if (same := similarity(texts[i], self._text_of(place))) >= NEAR:
                self.found.setdefault(place, (other, same))
                if other in self._known:
                    self.found.setdefault(other, (place, same))
        return len(self.found) - before


def _band_keys(signatures: np.ndarray) -> np.ndarray:
    """uint64 [n, BANDS]: equal where the minima of the band are."""
    minima = np.ascontiguousarray(signatures[:, : BANDS * BAND])
    bands = minima.view(np.uint64).reshape(len(signatures), BANDS, BAND // 2)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for column in np.moveaxis(bands, 2, 0):
        keys = splitmix64(keys ^ column)
    return keys
