"""The rows of a step's global batch, and the documents that each brings: pure functions of (seed, step).

Nothing here knows ranks or has state: any world size draws the same rows, and resuming needs the step alone.
Randomness is Philox's raw stream and a 64-bit hash, not numpy's `Generator`, whose draws may change between
versions.

# B global batch (queries) · K hard negatives
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nemo_embed_core.errors import UserError

if TYPE_CHECKING:  # the tokenizers package is not needed to sample
    from nemo_embed_core.data.store import Store


class Sampler:
    """Epochs, each a permutation of all rows, cut into global batches; a batch may span an epoch's end.

    permutation(e) = argsort(Philox(key=[seed, e]).random_raw(num_rows)); position p of the run is row
    rows[permutation(p // num_rows)[p % num_rows]]; step s takes positions [s * B, (s + 1) * B).
    rows: those of the store to draw from, or how many there are, all of them.
    """

    def __init__(self, rows: int | np.ndarray, global_batch_size: int, seed: int):
        population = np.arange(rows) if isinstance(rows, int) else rows
        num_rows = len(population)
        if num_rows < global_batch_size:
            raise UserError(
                f"global_batch_size={global_batch_size} is more than the data has rows, {num_rows:,}: "
                f"lower global_batch_size to at most {num_rows} or add data"
            )
        if global_batch_size < 1:
            raise UserError(f"global_batch_size={global_batch_size} must be at least 1")
        self.population = population
        self.num_rows = num_rows
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def rows(self, step: int) -> np.ndarray:
        """int64 [B]: the rows of this step, in the order of the global batch."""
        positions = self._positions(step)
        epochs, offsets = positions // self.num_rows, positions % self.num_rows
        rows_B = np.empty(self.global_batch_size, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows_B[here] = self.population[self._permutation(epoch)[offsets[here]]]
        return rows_B

    def epochs(self, step: int) -> np.ndarray:
        """int64 [B]: the epoch that each row of this step belongs to."""
        return self._positions(step) // self.num_rows

    def _positions(self, step: int) -> np.ndarray:
        assert step >= 0, step
        return step * self.global_batch_size + np.arange(self.global_batch_size, dtype=np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            if len(self._permutations) == 2:  # a batch touches two epochs at most
                self._permutations.pop(min(self._permutations))
            philox = np.random.Philox(key=np.array([self.seed % 2**64, epoch], dtype=np.uint64))
            self._permutations[epoch] = np.argsort(philox.random_raw(self.num_rows), kind="stable")
        return self._permutations[epoch]


def choose_documents(
    store: Store, rows_B: np.ndarray, epochs_B: np.ndarray, num_hard_negatives: int, seed: int
) -> np.ndarray:
    """int64 [B, 1 + K] document ids: a positive of each row, then K of its negatives, -1 where it has fewer.

    A uniform draw without replacement keyed by (seed, epoch, row): the candidates with the smallest hashes,
    so a row gets the same documents in any batch and at any world size, and others in the next epoch.
    """
    assert rows_B.shape == epochs_B.shape, f"{rows_B.shape=} {epochs_B.shape=}"
    key = splitmix64(np.array([seed % 2**64], np.uint64))
    key_B = splitmix64(splitmix64(key ^ epochs_B.astype(np.uint64)) ^ rows_B.astype(np.uint64))
    positive_B1 = _draw(store.positive_offsets, store.positive_ids, rows_B, key_B, 1)
    negative_BK = _draw(store.negative_offsets, store.negative_ids, rows_B, ~key_B, num_hard_negatives)
    return np.concatenate([positive_B1, negative_BK], axis=1)


def _draw(
    offsets: np.ndarray, ids: np.ndarray, rows_B: np.ndarray, key_B: np.ndarray, count: int
) -> np.ndarray:
    """[B, count] of each row's ids in the order of their hashes, -1 where a row has fewer."""
    starts, ends = offsets[rows_B], offsets[rows_B + 1]
    sizes = ends - starts
    owner = np.repeat(np.arange(len(rows_B)), sizes)
    first = np.cumsum(sizes) - sizes
    place = np.arange(len(owner)) - first[owner]  # index of the candidate within its row's list
    hashes = splitmix64(key_B[owner] ^ splitmix64(place.astype(np.uint64)))
    order = np.lexsort((place, hashes, owner))  # by row, then hash
    chosen = order[place < count]  # the rank within the row is again place: rows keep their sizes
    out = np.full((len(rows_B), count), -1, np.int64)
    out[owner[chosen], place[place < count]] = ids[starts[owner[chosen]] + place[chosen]]
    return out


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
