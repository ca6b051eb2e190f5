"""The rows of a step's global batch, and the documents that each brings: pure functions of (seed, step).

Nothing here knows ranks or has state: any world size draws the same rows, and resuming needs the step alone.
Randomness is Philox's raw stream and a 64-bit hash, not numpy's `Generator`, whose draws may change between
versions.

# B global batch (queries) · K hard negatives
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nemo_embed_core.errors import UserError

if TYPE_CHECKING:  # the tokenizers package is not needed to sample
    from nemo_embed_core.data.store import Store


class Part(NamedTuple):
    """One dataset of a mix: its rows in the store [n], ascending, and how many of them an epoch draws."""

    rows: np.ndarray
    draws: int
    name: str = ""


class Sampler:
    """Epochs, each a permutation of the draws of all parts, cut into global batches; a batch may span an
    epoch's end.

    A part of n rows is drawn in passes over all of them: epoch e takes draws [e * draws, (e + 1) * draws),
    and draw p belongs to pass p // n. Whole passes need no order; of one that two epochs share,
    permutation(seed, part, pass) says which rows come first. So after any number of epochs no row was drawn
    twice more than another one of its part.

    order(e) = argsort(Philox(key=[seed, e]).random_raw(draws of all parts)); position p of the run is entry
    order(p // draws)[p % draws] of that epoch; step s takes positions [s * B, (s + 1) * B).
    parts: or rows of the store to draw once each, or how many there are.
    """

    def __init__(self, parts: Sequence[Part] | np.ndarray | int, global_batch_size: int, seed: int):
        if isinstance(parts, int):
            parts = np.arange(parts)
        if isinstance(parts, np.ndarray):
            parts = [Part(parts, len(parts))]
        num_rows = sum(part.draws for part in parts)
        if num_rows < global_batch_size:
            raise UserError(
                f"global_batch_size={global_batch_size} is more than the data has rows, {num_rows:,}: "
                f"lower global_batch_size to at most {num_rows} or add data"
            )
        if global_batch_size < 1:
            raise UserError(f"global_batch_size={global_batch_size} must be at least 1")
        self.parts = list(parts)
        self.num_rows = num_rows  # drawn in an epoch
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._epochs: dict[int, _Epoch] = {}

    def steps(self, epochs: int) -> int:
        """Until every draw of so many epochs is done; the last batch has rows of the next one too."""
        return -(-epochs * self.num_rows // self.global_batch_size)

    def rows(self, step: int) -> np.ndarray:
        """int64 [B]: the rows of this step, in the order of the global batch."""
        return self._draws(step)[0]

    def epochs(self, step: int) -> np.ndarray:
        """int64 [B]: how often the part of each row of this step was drawn whole before. Where every row is
        drawn once an epoch, the epoch."""
        return self._draws(step)[1]

    def _draws(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        assert step >= 0, step
        positions = step * self.global_batch_size + np.arange(self.global_batch_size, dtype=np.int64)
        epochs, offsets = positions // self.num_rows, positions % self.num_rows
        rows_B, passes_B = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows_B[here], passes_B[here] = self._epoch(epoch).draws(offsets[here])
        return rows_B, passes_B

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # a batch touches two epochs at most
                self._epochs.pop(min(self._epochs))
            pieces = [piece for i in range(len(self.parts)) for piece in self._pieces(i, epoch)]
            self._epochs[epoch] = _Epoch(_permutation(self.seed, epoch, self.num_rows), pieces)
        return self._epochs[epoch]

    def _pieces(self, i: int, epoch: int) -> Iterator[tuple[int, np.ndarray]]:
        """(pass, its rows) of what the epoch draws of part i."""
        rows, draws = self.parts[i].rows, self.parts[i].draws
        first, end = epoch * draws, (epoch + 1) * draws
        while first < end:
            which, place = divmod(first, len(rows))
            count = min(len(rows) - place, end - first)
            whole = count == len(rows)
            yield which, rows if whole else rows[permutation(self.seed, i, which, len(rows))[place:][:count]]
            first += count


class _Epoch:
    """draws(offsets) -> (rows, their passes), of an epoch's pieces in its order."""

    def __init__(self, order: np.ndarray, pieces: list[tuple[int, np.ndarray]]):
        self._order, self._pieces = order, pieces
        self._ends = np.cumsum([len(rows) for _, rows in pieces])

    def draws(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        entries = self._order[offsets]
        owners = np.searchsorted(self._ends, entries, side="right")
        rows_b, passes_b = np.empty(len(entries), np.int64), np.empty(len(entries), np.int64)
        for owner in np.unique(owners).tolist():
            here, (which, rows) = owners == owner, self._pieces[owner]
            rows_b[here] = rows[entries[here] - (self._ends[owner] - len(rows))]
            passes_b[here] = which
        return rows_b, passes_b


class OneSourceSampler(Sampler):
    """Global batches of one part each.

    A part is drawn as one stream over all epochs, its passes each in the order permutation(seed, part, pass);
    its batch number b takes draws [b * B, (b + 1) * B). It has ceil(e * draws / B) batches up to epoch e:
    what the last one draws beyond the epoch is not drawn again in the next. The batches of an epoch are in
    the order argsort(Philox(key=[seed, e]).random_raw(their number)).
    """

    def __init__(self, parts: Sequence[Part], global_batch_size: int, seed: int):
        super().__init__(parts, global_batch_size, seed)
        for part in parts:
            if 0 < len(part.rows) < global_batch_size:
                raise UserError(
                    f"data.datasets: {part.name} has {len(part.rows):,} rows to draw, fewer than "
                    f"global_batch_size={global_batch_size}, and data.batches=one_source would draw them "
                    "twice in a batch: lower global_batch_size, leave it out, or set data.batches=mixed"
                )
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def steps(self, epochs: int) -> int:
        return int(self._num_batches(epochs).sum())

    def _num_batches(self, epochs: int) -> np.ndarray:
        """int64 [parts]: up to the end of so many epochs."""
        return np.array([-(-epochs * part.draws // self.global_batch_size) for part in self.parts])

    def _draws(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        assert step >= 0, step
        epoch = step * self.global_batch_size // self.num_rows  # or an earlier one, as parts round up
        while self.steps(epoch) > step:
            epoch -= 1
        owners, numbers = self._order(epoch)
        at = step - self.steps(epoch)
        i, B = int(owners[at]), self.global_batch_size
        draws_B = int(numbers[at]) * B + np.arange(B, dtype=np.int64)
        rows = self.parts[i].rows
        passes_B, places_B = draws_B // len(rows), draws_B % len(rows)
        rows_B = np.empty_like(draws_B)
        for which in np.unique(passes_B).tolist():
            here = passes_B == which
            rows_B[here] = rows[self._permuted(i, which)[places_B[here]]]
        return rows_B, passes_B

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """([steps of the epoch] the part of each, number of the batch within its part)."""
        if epoch not in self._orders:
            first, end = self._num_batches(epoch), self._num_batches(epoch + 1)
            owners = np.repeat(np.arange(len(first)), end - first)
            numbers = np.concatenate([np.arange(a, b) for a, b in zip(first, end, strict=True)])
            order = _permutation(self.seed, epoch, len(owners))
            owners = owners[order]
            placed = np.empty_like(numbers)  # a part's batches stay in their order
            placed[np.argsort(owners, kind="stable")] = numbers
            self._orders = {epoch: (owners, placed)}
        return self._orders[epoch]

    def _permuted(self, i: int, which: int) -> np.ndarray:
        if (i, which) not in self._permutations:
            self._permutations.pop((i, which - 2), None)  # a batch touches two passes at most
            self._permutations[i, which] = permutation(self.seed, i, which, len(self.parts[i].rows))
        return self._permutations[i, which]


def sampler(parts: Sequence[Part], batches: str, global_batch_size: int, seed: int) -> Sampler:
    """batches: data.batches."""
    kind = OneSourceSampler if batches == "one_source" else Sampler
    return kind(parts, global_batch_size, seed)


def permutation(seed: int, part: int, which: int, count: int) -> np.ndarray:
    """int64 [count]: number `which`, from -1, of a part."""
    key = splitmix64(splitmix64(np.array([seed % 2**64], np.uint64)) ^ np.uint64(part + 1))
    return _permutation(int(key[0]), which, count)


def _permutation(key: int, number: int, count: int) -> np.ndarray:
    philox = np.random.Philox(key=np.array([key % 2**64, number % 2**64], dtype=np.uint64))
    return np.argsort(philox.random_raw(count), kind="stable")


def choose_documents(
    store: Store,
    rows_B: np.ndarray,
    epochs_B: np.ndarray,
    num_hard_negatives: int,
    seed: int,
    negatives: str = "sample",
) -> np.ndarray:
    """int64 [B, 1 + K] document ids: a positive of each row, then K of its negatives, -1 where it has fewer.

    A uniform draw without replacement keyed by (seed, epoch, row): the candidates with the smallest hashes,
    so a row gets the same documents in any batch and at any world size, and others in the next epoch. Of n
    negatives "first" takes numbers 0 to K - 1, "rotate" in epoch e those from e * K on, modulo n.
    """
    assert rows_B.shape == epochs_B.shape, f"{rows_B.shape=} {epochs_B.shape=}"
    key = splitmix64(np.array([seed % 2**64], np.uint64))
    key_B = splitmix64(splitmix64(key ^ epochs_B.astype(np.uint64)) ^ rows_B.astype(np.uint64))
    positive_B1 = _draw(store.positive_offsets, store.positive_ids, rows_B, key_B, 1)
    if negatives == "sample":
        negative_BK = _draw(store.negative_offsets, store.negative_ids, rows_B, ~key_B, num_hard_negatives)
    else:
        starts = store.negative_offsets[rows_B]
        sizes_B1 = (store.negative_offsets[rows_B + 1] - starts)[:, None]
        first_B = epochs_B * (num_hard_negatives if negatives == "rotate" else 0)
        numbers_K = np.arange(num_hard_negatives)
        places_BK = (first_B[:, None] + numbers_K) % np.maximum(sizes_B1, 1)
        exists_BK = numbers_K < sizes_B1
        negative_BK = np.full(places_BK.shape, -1, np.int64)
        negative_BK[exists_BK] = store.negative_ids[(starts[:, None] + places_BK)[exists_BK]]
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
