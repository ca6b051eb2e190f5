"""Candidates on a CPU that multiplies int8 fast: int8 products rule documents out, fp32 scores what is left.

One scale for a whole block of documents: then what a document's product must reach to matter is one integer per query, and a
tile of products is read once, as integers, for the maxima of FOLD neighbours. The few documents that reach it are scored in
fp32 while the block is in the cache, and those that can still be among the k best are kept.

q, n rows of a tile of queries and of a block of documents · D = a b hidden_size · C candidates kept of the W = 4 C places
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.kernels.pair_scores import pair_scores
from nemo_embed_core.kernels.quantize_rows import quantize_rows
from nemo_embed_core.mine.bounds import (
    _UNIT,
    SHRINK,
    Rounding,
    Rows,
    _norm,
    _orthogonal,
    _root,
    check_norms,
    pair_bound,
)
from nemo_embed_core.mine.streaming import best_first, excluded_places

ROTATED = 1024  # documents whose fp32 entries fit into the cache
FOLD = 8  # products whose maximum is compared first
SEED = 512  # documents that are all scored in fp32 when nothing is known yet
DENSE_ROWS = 256  # queries of a tile of fp32 scores


class Rotation:
    """x -> (A (x) B) x, orthogonal, A [a, a] and B [b, b]: no channel stands out afterwards (bounds.py).

    The random signs are those of the columns of A and of B, so that no pass over x is needed for them.
    """

    def __init__(self, hidden_size: int):
        self.a = max(i for i in range(1, math.isqrt(hidden_size) + 1) if hidden_size % i == 0)
        self.b = hidden_size // self.a
        generator = torch.Generator().manual_seed(20240817)
        self.left, left_error = _orthogonal(self.a, generator)
        self.right, right_error = _orthogonal(self.b, generator)
        for matrix in (self.left, self.right):
            matrix *= torch.randint(0, 2, (len(matrix),), generator=generator) * 2 - 1
        # As in bounds.py, and the rounding of right * factor.
        self.error = left_error + right_error + 1.01 * (self.a + self.b + 4) * _UNIT * math.sqrt(hidden_size)

    def __call__(self, x_nD: Tensor, factor: float, limit: float = math.inf) -> Tensor:
        """factor (A (x) B) x, cut to -limit..limit, a column per row of x: [D, n]. Both products come out transposed."""
        n = len(x_nD)
        half = linear(self.right * factor, x_nD.reshape(n * self.a, self.b))  # [b, n a]
        return linear(self.left, half.view(self.b * n, self.a), limit).view(-1, n)


def linear(x: Tensor, weight: Tensor, limit: float = math.inf) -> Tensor:
    """(x @ weight.T).clamp(-limit, limit)"""
    if torch.backends.mkldnn.is_available():  # MKL is half as fast on an AMD CPU
        post = ("none", []) if math.isinf(limit) else ("hardtanh", [-limit, limit])
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, *post, "")
    return (x @ weight.T).clamp_(-limit, limit)


@dataclass(frozen=True)
class Block:
    """Documents x with |R x - scale codes| <= residual and |x| <= norm; those with NaN or infinity have codes 0."""

    x_nD: Tensor  # fp32
    codes_Dn: Tensor  # int8
    scale: float
    norm: Tensor  # [1]
    residual: Tensor  # [1]

    def columns(self, start: int, stop: int) -> Block:
        return Block(self.x_nD[start:stop], self.codes_Dn[:, start:stop], self.scale, self.norm, self.residual)

    def bounds(self) -> Rows:
        return Rows(self.codes_Dn, None, self.norm, self.residual)


class Quantiser:
    def __init__(self, queries_QD: Tensor):
        self.hidden_size = queries_QD.shape[1]
        self.rotation, self.query_norm = Rotation(self.hidden_size), _norm(queries_QD).max()
        self.spread = 6.0  # the largest entry expected after the rotation, in root mean squares of the longest row
        self.codes, self.rounded = torch.empty(0, dtype=torch.int8), torch.empty(0)

    def queries(self, x_qD: Tensor) -> Rows:
        """One scale per row; that of a row with NaN or infinity is NaN."""
        values, scale, _, error = quantize_rows(self.rotation(x_qD, 1 / SHRINK).T.contiguous(), torch.int8)
        norm_q = _norm(x_qD)
        residual = _root(error, self.hidden_size) * SHRINK + (self.rotation.error + 2 * _UNIT) * norm_q
        return Rows(values, scale * SHRINK, norm_q, residual)

    def documents(self, x_nD: Tensor) -> Block:
        """One scale for all: guessed from the norms and the blocks before, larger where a code was cut off."""
        parts = x_nD.split(ROTATED)
        norms = [_norm(x) for x in parts]
        norm = torch.stack([x.max() for x in norms]).max()[None]
        check_norms(norm, self.query_norm)
        if any(bool((x == 0).any()) for x in norms):  # zeros, or not finite
            parts = [torch.where(torch.isfinite(x).all(1, keepdim=True), x, 0) for x in parts]
        shape = self.hidden_size, len(x_nD)
        if self.codes.numel() < math.prod(shape):
            self.codes = torch.empty(shape, dtype=torch.int8)
        codes = self.codes.view(-1)[: math.prod(shape)].view(shape)
        unit = float(norm) / math.sqrt(self.hidden_size)
        scale = max(self.spread * unit / 126, 1e-30)
        while True:
            squares = [self.quantise(part, 1 / scale, to) for part, to in zip(parts, codes.split(ROTATED, dim=1), strict=True)]
            least, most = codes.aminmax()
            largest = max(-int(least), int(most))
            if largest < 127:
                break
            scale *= 1.25
        if unit > 1e-20:
            self.spread = 1.1 * largest * scale / unit
        residual = _root(torch.stack(squares).max(), self.hidden_size) * scale * (1 + 2 * _UNIT)
        return Block(x_nD, codes, scale, norm, residual + self.rotation.error * norm)

    def quantise(self, x_nD: Tensor, factor: float, codes_Dn: Tensor) -> Tensor:
        """codes = factor R x, rounded, -127 and 127 where it was cut off. Returns the largest square of what a column lost."""
        entries = self.rotation(x_nD, factor, 127)
        # Into the same memory every time: fresh pages would cost more than what is computed.
        if self.rounded.numel() < entries.numel():
            self.rounded = torch.empty(entries.numel())
        rounded = torch.round(entries, out=self.rounded[: entries.numel()].view(entries.shape))
        codes_Dn.copy_(rounded)
        return torch.ops.aten.mse_loss.out(entries, rounded, 0, out=entries).sum(0).max()


class Places:
    """What may be among the k best of each query, unsorted, and the lower bound that the k-th best is known to have.

    A document whose upper bound is below that `floor` is out for good, and is not counted as dropped.
    """

    def __init__(self, num_queries: int, k: int, num_kept: int, ceilings: Tensor):
        self.k, self.num_kept, self.ceilings = k, num_kept, ceilings
        self.keys = torch.full((num_queries, 4 * num_kept), -torch.inf)  # upper bounds
        self.ids = torch.full((num_queries, 4 * num_kept), -1, dtype=torch.int64)
        self.taken = torch.zeros(num_queries, dtype=torch.int64)
        self.floor = torch.full((num_queries,), -torch.inf)
        self.dropped = torch.full((num_queries,), -torch.inf)  # the best upper bound that had to go
        self.bound = torch.zeros(num_queries)  # the widest so far: lower bound = key - 2 bound

    def add(self, at: Tensor, rows: Tensor, ids: Tensor, keys: Tensor) -> None:
        """at: the queries; rows ascend and index them, at most 3 num_kept each."""
        counts = torch.bincount(rows, minlength=len(at))
        if int((self.taken[at] + counts).max()) > self.keys.shape[1]:
            self.keep_best(at)
        place = self.taken[at][rows] + torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        self.keys[at[rows], place], self.ids[at[rows], place] = keys, ids
        self.taken[at] += counts

    def keep_best(self, at: Tensor) -> None:
        keys, order = self.keys[at].topk(self.num_kept + 1, dim=1)
        self.dropped[at] = torch.maximum(self.dropped[at], keys[:, -1])
        ids = self.ids[at].gather(1, order)
        self.keys[at] = torch.nn.functional.pad(keys[:, :-1], (0, 3 * self.num_kept), value=-torch.inf)
        self.ids[at, : self.num_kept] = ids[:, :-1]
        self.taken[at] = self.taken[at].clamp(max=self.num_kept)

    def raise_floor(self, tile: slice) -> None:
        """The k-th best lower bound of the documents that are surely below the ceiling."""
        keys = self.keys[tile, : int(self.taken[tile].max())]
        if keys.shape[1] >= self.k:
            sure = torch.where(keys < self.ceilings[tile, None], keys, -torch.inf)
            floor = sure.topk(self.k, dim=1).values[:, -1] - 2 * self.bound[tile]
            self.floor[tile] = torch.maximum(self.floor[tile], floor)


def int8_candidates(search: Any, queries_QD: Tensor, ceilings: Tensor, num_kept: int, hidden: Any) -> Places:
    """The candidates among all documents of a `_Search`; hidden: what it excludes."""
    num_queries = len(queries_QD)
    quantiser = Quantiser(queries_QD)
    queries = quantiser.queries(queries_QD)
    places = Places(num_queries, search.k, num_kept, ceilings)
    assert queries.scale is not None
    places.floor[~torch.isfinite(queries.scale)] = torch.inf  # nothing has a score with NaN or infinity
    tile_of_products = torch.empty(0, dtype=torch.int32)
    for number, (first, documents_nD) in enumerate(search.document_blocks()):
        block = quantiser.documents(documents_nD.float())
        n = len(documents_nD)
        for start, stop in [(0, n)] if number else pieces(n):
            part = block.columns(start, stop)
            for tile in search.tiles(num_queries):
                size = (tile.stop - tile.start) * (stop - start)
                if len(tile_of_products) < size:
                    tile_of_products = torch.empty(size, dtype=torch.int32)
                add_tile(places, tile, queries_QD[tile], queries[tile], part, first + start, hidden.of(tile), tile_of_products[:size])
                if number & (number - 1) == 0 or number % 3 == 0 and (number // 3) & (number // 3 - 1) == 0:
                    places.raise_floor(tile)
    return places


def pieces(n: int) -> Iterator[tuple[int, int]]:
    """0, SEED, 2 SEED, 4 SEED, ..., n: what is known of the first ones keeps most of the next ones out."""
    start, stop = 0, min(SEED, n)
    while start < n:
        yield start, stop
        start, stop = stop, min(2 * stop, n)


def add_tile(places: Places, tile: slice, x_qD: Tensor, q: Rows, block: Block, first: int, hidden: Any, products: Tensor) -> None:
    num_rows, num_columns, hidden_size = len(x_qD), len(block.x_nD), x_qD.shape[1]
    if num_columns == 0:
        return
    narrow = Rounding("fp32", hidden_size).relative * q.norm * block.norm + Rounding.ABSOLUTE
    places.bound[tile] = torch.maximum(places.bound[tile], narrow)
    excluded = None if hidden[0] is None else excluded_places(*hidden, first, num_columns)
    unknown = torch.isneginf(places.floor[tile])
    dense = unknown.nonzero()[:, 0]
    if len(dense) < num_rows:
        rows, columns, crowded = survivors(places, tile, q, block, products)
        dense = (unknown | crowded).nonzero()[:, 0]
        keys = sampled_scores(x_qD, block.x_nD, rows, columns) + narrow[rows]
        enter = (keys >= places.floor[tile][rows]) & (keys - 2 * narrow[rows] < places.ceilings[tile][rows])
        if excluded is not None:
            enter &= torch.isin(rows * num_columns + columns, excluded[0] * num_columns + excluded[1], invert=True)
        places.add(torch.arange(tile.start, tile.stop), rows[enter], columns[enter] + first, keys[enter])
    for some in dense.split(DENSE_ROWS) if len(dense) else ():
        keys = linear(x_qD[some], block.x_nD).add_(narrow[some, None])
        if excluded is not None:
            at = torch.full((num_rows,), -1)
            at[some] = torch.arange(len(some))
            here = at[excluded[0]] >= 0
            keys[at[excluded[0][here]], excluded[1][here]] = -torch.inf
        add_scores(places, some + tile.start, keys, narrow[some], first)


def survivors(places: Places, tile: slice, q: Rows, block: Block, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns) of the products that the bounds do not rule out, and [q] which rows have too many and are left out."""
    num_rows, num_columns = len(q.values), len(block.x_nD)
    assert q.scale is not None
    products = torch._int_mm(q.values, block.codes_Dn, out=products.view(num_rows, num_columns))
    bound = pair_bound(q, block.bounds(), Rounding("int8", len(block.codes_Dn)))
    slope = q.scale.double() * block.scale
    least = integers((places.floor[tile] - bound.double()) / slope - 1)
    most = integers((places.ceilings[tile] + bound.double()) / slope + 1)
    fold = math.gcd(FOLD, num_columns)
    num_groups = num_columns // fold
    groups = products.view(-1, fold)
    hit = groups.amax(1).view(num_rows, num_groups) >= least[:, None]
    crowded = 2 * hit.sum(1) > num_groups
    hit[crowded] = False
    at = hit.flatten().nonzero()[:, 0]
    rows = at // num_groups
    chosen = groups.index_select(0, at)
    inside, inner = ((chosen >= least[rows, None]) & (chosen <= most[rows, None])).nonzero(as_tuple=True)
    rows, columns = rows[inside], at[inside] % num_groups * fold + inner
    many = torch.bincount(rows, minlength=num_rows) > 3 * places.num_kept
    if bool(many.any()):
        crowded |= many
        rows, columns = rows[~many[rows]], columns[~many[rows]]
    return rows, columns, crowded


def integers(x: Tensor) -> Tensor:
    """Rounded down, within int32; NaN: the largest, which nothing reaches."""
    largest = 2.0**31 - 1
    return x.floor().nan_to_num(largest, largest, -largest).clamp_(-largest, largest).to(torch.int32)


def sampled_scores(x_qD: Tensor, y_nD: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(x[rows] * y[columns]).sum(1) in fp32; rows ascend. Nothing is gathered."""
    starts = torch.zeros(len(x_qD) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(rows, minlength=len(x_qD)), 0, out=starts[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR tensors are in beta, says torch
        wanted = torch.sparse_csr_tensor(starts, columns, x_qD.new_zeros(len(rows)), (len(x_qD), len(y_nD)))
        return torch.sparse.sampled_addmm(wanted, x_qD, y_nD.T, beta=0.0).values()


def add_scores(places: Places, at: Tensor, keys: Tensor, bound: Tensor, first: int) -> None:
    """keys [q, n] for the queries `at`: all that can be among the k best, the best num_kept of them where that is more."""
    kept, ceilings = places.num_kept, places.ceilings[at, None]
    keys = torch.where((keys - 2 * bound[:, None] < ceilings) & torch.isfinite(keys), keys, -torch.inf)
    if keys.shape[1] > kept:
        keys, columns = keys.topk(kept + 1, dim=1)
        places.dropped[at] = torch.maximum(places.dropped[at], keys[:, -1])
        keys, columns = keys[:, :-1], columns[:, :-1]
    else:
        columns = torch.arange(keys.shape[1]).expand_as(keys)
    rows, place = torch.isfinite(keys).nonzero(as_tuple=True)
    places.add(at, rows, columns[rows, place] + first, keys[rows, place])


def score_places(search: Any, queries_QD: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [Q, k], ids [Q, k], certified [Q])"""
    num_queries, k = len(queries_QD), search.k
    scores = torch.full((num_queries, k), -torch.inf)
    ids = torch.full((num_queries, k), -1, dtype=torch.int64)
    for tile in search.tiles(num_queries):
        places.raise_floor(tile)
        possible = torch.isfinite(places.keys[tile]) & (places.keys[tile] >= places.floor[tile, None])
        most = int(possible.sum(1).max())
        keys, at = torch.where(possible, places.keys[tile], -torch.inf).topk(most, dim=1)
        candidates = places.ids[tile].gather(1, at)
        rows, columns = torch.isfinite(keys).nonzero(as_tuple=True)
        exact = score_pairs(search, queries_QD[tile], rows, candidates[rows, columns])
        counts = torch.isfinite(exact) & (exact < places.ceilings[tile][rows])
        keys[rows, columns] = torch.where(counts, exact, -torch.inf)
        take = min(k, most)
        scores[tile, :take], ids[tile, :take] = best_first(keys, candidates, take)
    ids[torch.isneginf(scores)] = -1
    return scores, ids, torch.isneginf(places.dropped) | (places.dropped < scores[:, -1])


def score_pairs(search: Any, x_qD: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    if isinstance(search.documents, Tensor):
        return pair_scores(x_qD, rows, search.documents, ids - search.first_id)
    step = max(1, (16 << 20) // x_qD.shape[1])  # at most 64 MiB of gathered rows
    parts = zip(rows.split(step), ids.split(step), strict=True)
    return torch.cat([pair_scores(x_qD, r, search.gather(i), torch.arange(len(i))) for r, i in parts])
