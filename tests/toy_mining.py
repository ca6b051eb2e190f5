"""What tests of mining share: an embedder whose vectors are known, rows with traps in them, ranks that are
threads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from nemo_embed_core.config import Selection
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.negatives import mine_negatives
from nemo_embed_core.mine.pool import Pool
from nemo_embed_core.mine.teachers import Teacher


class Row(NamedTuple):
    query: str
    pos: list[str]
    neg: list[str]


class FakeEmbedder:
    """A unit vector per text, from its words' hashes: texts that share words are near each other."""

    def __init__(self, hidden_size: int = 32, digest: str = "fake", broken: str = ""):
        self.hidden_size, self.digest, self.broken = hidden_size, digest, broken
        self.encoded: list[str] = []
        self.calls_left = 10**9

    def encode(self, texts, prompt="", max_length=512):
        if self.calls_left == 0:
            raise KeyboardInterrupt
        self.calls_left -= 1
        self.encoded += texts
        rows = np.stack([self.vector(prompt + text) for text in texts]).astype(np.float32)
        for i, text in enumerate(texts):
            if text == self.broken:
                rows[i] = np.nan
        return rows

    def vector(self, text):
        total = np.zeros(self.hidden_size)
        for word in text.split() or [""]:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            total += np.random.default_rng(seed).standard_normal(self.hidden_size)
        return total / np.linalg.norm(total)


WORDS = [f"w{i}" for i in range(40)]


def make_rows(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)

    def text(n):
        return " ".join(rng.choice(WORDS, n))

    rows = []
    for i in range(count):
        query = text(4)
        pos = [f"{query} {text(3)}" for _ in range(rng.integers(1, 4))]
        neg = [text(6) for _ in range(rng.integers(0, 3))]
        if i % 7 == 0:  # the positive again, spelled differently, as another row's passage
            neg.append("  " + pos[0].upper().replace(" ", "\t "))
        if i % 5 == 0:
            neg.append(query.capitalize())  # the query itself as a passage
        rows.append(Row(query, pos, neg))
    rows.append(Row(rows[0].query, ["another positive of the first query"], []))
    return rows


def lines_of(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def pool_of(texts):
    pool = Pool()
    for text in texts:
        pool.add(text)
    return pool.close()


def mine(rows, output, embedder=None, **options):
    """embedder: a TextEncoder, which gets the options of a Teacher, a Teacher, or several of them."""

    def taken(names):
        return {name: options.pop(name) for name in names if name in options}

    selection = Selection(**taken(field.name for field in dataclasses.fields(Selection)))
    usage = taken(("prompt", "query_max_length", "document_max_length"))
    some = embedder or FakeEmbedder()
    some = some if isinstance(some, Iterable) else [some]
    teachers = (one if isinstance(one, Teacher) else Teacher.of(one, **usage) for one in some)
    small = {"log": lambda _: None, "shard_size": 16, "block_queries": 10, "selection": selection}
    return mine_negatives(rows, teachers, output, **small | options)


class KnownVectors:
    """A unit vector per text, given by the test; {text: vector}, or {(prompt, text): vector}."""

    def __init__(self, vectors: dict[Any, np.ndarray], digest: str = "known"):
        self.vectors, self.digest = vectors, digest
        self.hidden_size = len(next(iter(vectors.values())))

    def encode(self, texts, prompt="", max_length=512):
        return np.stack([self.vectors[text] for text in texts]).astype(np.float32)


def on_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """work(ranks) on `size` threads: encoding, searching and merging only meet in `gather`."""
    barrier = threading.Barrier(size, timeout=60)
    values: dict[int, Any] = {}
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            everyone = [values[r] for r in range(size)]
            barrier.wait()
            return everyone

        try:
            results[rank] = work(Ranks(rank, size, gather))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return [results[rank] for rank in range(size)]
