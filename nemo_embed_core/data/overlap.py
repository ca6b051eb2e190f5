"""Which texts of an evaluation set a dataset has: equal in normal form, or near-duplicates (data/near.py).

For a page on the dataset, whose distinct texts are on disk: each is signed once, for its own near-duplicates
and all evaluation sets. Training data that only streams by, and cut texts: evaluation/overlap.py.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.building import Log
from nemo_embed_core.data.lines import Findings
from nemo_embed_core.data.near import NearIndex
from nemo_embed_core.data.normal_form import has_content, normal_key
from nemo_embed_core.data.readers import Beir, has_corpus, read_beir, source_files
from nemo_embed_core.data.store import Store
from nemo_embed_core.data.texts import Texts
from nemo_embed_core.errors import UserError

SAMPLED = 20_000  # texts of a side whose near-duplicates are looked for, among all of them
NAMED = 5  # overlaps of each kind


class Distinct:
    """Texts, each normal form once: the first spelling on disk, its row, and its place by key."""

    def __init__(self) -> None:
        self.texts, self.rows = Texts(), array("q")
        self.places: dict[bytes, int] = {}

    def add(self, text: str, row: int) -> bool:
        key = normal_key(text)
        if key in self.places:
            return False
        self.places[key] = self.texts.append(text)
        self.rows.append(row)
        return True

    def sample(self, count: int) -> np.ndarray:
        """Places, ascending: of the smallest keys, which are hashes, so the same for the same texts."""
        places = [self.places[key] for key in heapq.nsmallest(count, self.places)]
        return np.array(sorted(places), np.int64)

    def near(self, sign: Callable[..., np.ndarray]) -> NearIndex:
        """To show all of them to: what it finds is a near-duplicate of another one."""
        return NearIndex(self.sample(SAMPLED), self.texts.__getitem__, sign, is_own=True)


def evaluation_set(name: str) -> DatasetConfig:
    """Of "FOLDER", split test, or of "FOLDER:SPLIT". UserError where its files are not there."""
    path, split = (name, "test") if Path(name).exists() or ":" not in name else name.rsplit(":", 1)
    config = DatasetConfig(path=path, split=split)
    if not has_corpus(config):
        raise UserError(f"{name} is no BEIR or dataset folder: only what has a corpus is compared with")
    source_files(config)
    return config


def texts_of(name: str, log: Log) -> Beir:
    """Queries and corpus; what is unusual in them is said."""
    config, findings = replace(evaluation_set(name), on_missing="allow"), Findings()
    found = read_beir(config, findings)
    findings.raise_bad()
    for line in findings.lines():
        log(f"{name}: {line}")
    return found


class Overlap:
    """One side of an evaluation set, beside the same side of the data."""

    def __init__(self, texts: Any, data: Distinct, sign: Callable[..., np.ndarray]):
        self._data, self._texts, self._exact = data, texts, list[tuple[str, int]]()
        self._num_texts = self._num_exact = 0
        self._ids = [key for _, key in heapq.nsmallest(SAMPLED, self._others())]
        self.near = NearIndex(np.arange(len(self._ids)), self._text, sign, is_own=False)

    def _others(self) -> Iterator[tuple[bytes, str]]:
        """(key, id) of texts that are none of the data's; counts those that are."""
        for name, text in self._texts.items():
            if not has_content(text):
                continue
            self._num_texts += 1
            if (place := self._data.places.get(key := normal_key(text))) is None:
                yield key, name
                continue
            self._num_exact += 1
            if len(self._exact) < NAMED:
                self._exact.append((name, place))

    def _text(self, place: int) -> str:
        return str(self._texts[self._ids[place]])

    def report(self, store: Store) -> dict[str, Any]:
        """near: of near_of texts, those without a copy in the data, or a sample of them."""
        near = [(self._ids[i], place, same) for i, (place, same) in sorted(self.near.found.items())]
        first = [*((name, place, 1.0) for name, place in self._exact), *near[:NAMED]]
        return {
            "of": self._num_texts,
            "exact": self._num_exact,
            "near": len(near),
            "near_of": len(self._ids),
            "first": [
                {
                    "id": name,
                    "text": self._texts[name][:200],
                    "where": store.where(self._data.rows[place]),
                    "data": self._data.texts[place][:200],
                    "similarity": round(same, 4),
                }
                for name, place, same in first
            ],
        }
