"""Candidates on a CPU that multiplies int8 fast: int8 products rule documents out, fp32 scores what is left.

One scale for a whole block of documents: then what a document's product must reach to matter is one integer
per query, and a tile of products is read once, as integers, for the maxima of FOLD neighbours. The few
documents that reach it are scored in fp32 while the block is cached; possible members of the k best are kept.

q, n rows of a tile of queries and documents · D = a b hidden_size · C candidates kept of the W = 4 C places
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_embed_core.kernels.quantize_rows import quantize_rows
from nemo_embed_core.mine.search.blocks import slices
from nemo_embed_core.mine.search.bounds import (
    ROTATION_SEED,
    SHRINK,
    UNDERFLOW,
    UNIT,
    Rounding,
    Rows,
    check_norms,
    linear,
    norm_above,
    pair_bound,
    root_above,
    rotation_factors,
)
from nemo_embed_core.mine.search.buffers import CandidateBuffer, ScoredBuffer
from nemo_embed_core.mine.search.candidates import SLACK
from nemo_embed_core.mine.search.documents import Documents
from nemo_embed_core.mine.search.exclude import DeviceExclude, Exclude, not_excluded
from nemo_embed_core.mine.search.streaming import best_first

ROTATED = 512  # documents whose fp32 entries fit into the cache
FOLD = 8  # products whose maximum is compared first
MARGIN = 1.15  # of the largest code, for the next block
GROWTH = 1.5  # of the number of documents, after which what the k-th best is known to have is looked at again
DENSE_ROWS = 256  # queries at a time where more than what is left of a tile is converted


class Rotation:
    """x -> (A (x) B) x, orthogonal, A [a, a] and B [b, b]: no channel stands out afterwards (bounds.py).

    The random signs are those of the columns of A and of B, so that no pass over x is needed for them.
    """

    def __init__(self, hidden_size: int):
        generator = torch.Generator().manual_seed(ROTATION_SEED)
        # 4: two more than in bounds.py, for the rounding of right * factor.
        self.left, self.right, self.error = rotation_factors(hidden_size, generator, roundings=4)
        for matrix in (self.left, self.right):
            matrix *= torch.randint(0, 2, (len(matrix),), generator=generator) * 2 - 1

    def __call__(self, x_nD: Tensor, factor: float, limit: float = math.inf) -> Tensor:
        """factor (A (x) B) x, cut to -limit..limit: [D, n]. Both products come out transposed."""
        n, a, b = len(x_nD), len(self.left), len(self.right)
        half = linear(self.right * factor, x_nD.reshape(n * a, b))  # [b, n a]
        return linear(self.left, half.view(b * n, a), limit).view(-1, n)


@dataclass(frozen=True)
class Block:
    """Documents x with |R x - scale codes| <= residual, |x| <= norm; with NaN or infinity codes are 0."""

    x_nD: Tensor  # fp32
    codes_Dn: Tensor  # int8
    scale: float
    norm: Tensor  # [1]
    residual: Tensor  # [1]

    def bounds(self) -> Rows:
        return Rows(self.codes_Dn, None, self.norm, self.residual)


class Quantiser:
    def __init__(self, queries_QD: Tensor):
        self.hidden_size = queries_QD.shape[1]
        self.rotation, self.query_norm = Rotation(self.hidden_size), norm_above(queries_QD).max()
        # The largest entry expected after the rotation, in root mean squares of the longest row.
        self.spread = 6.0
        # Of the next block. Documents are mostly as long as queries.
        self.scale = max(self.spread * float(self.query_norm) / math.sqrt(self.hidden_size) / 126, 1e-30)
        self.codes, self.rounded = torch.empty(0, dtype=torch.int8), torch.empty(0)

    def queries(self, x_QD: Tensor) -> Rows:
        """One scale per row; that of a row with NaN or infinity is NaN."""
        parts = []
        for x_qD in x_QD.split(DENSE_ROWS):
            rotated_qD = self.rotation(x_qD, 1 / SHRINK).T.contiguous()
            values, scale, _, error = quantize_rows(rotated_qD, torch.int8)
            norm = norm_above(x_qD)
            lost = root_above(error, self.hidden_size) + UNDERFLOW * math.sqrt(self.hidden_size)
            residual = lost * SHRINK + (self.rotation.error + 2 * UNIT) * norm
            parts.append((values, scale * SHRINK, norm, residual))
        return Rows(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def documents(self, x_nD: Tensor) -> Block:
        """One scale for all: that of the block before where it fits."""
        if self.codes.numel() < x_nD.numel():
            self.codes = torch.empty(x_nD.numel(), dtype=torch.int8)
        codes = self.codes[: x_nD.numel()].view(self.hidden_size, len(x_nD))
        first_try = True
        while True:
            parts = zip(x_nD.split(ROTATED), codes.split(ROTATED, dim=1), strict=True)
            norms, squares = zip(*(self.quantise(*part) for part in parts), strict=True)
            norm, square = torch.stack(norms).max()[None], torch.stack(squares).max()
            scale, least_and_most = self.scale, codes.aminmax()
            largest = max(abs(int(x)) for x in least_and_most)
            unit = float(norm) / math.sqrt(self.hidden_size)
            expected = max(self.spread * unit / 126, 1e-30)
            if largest >= 127 or not bool(torch.isfinite(square)):  # may have been cut off, or overflowed
                self.scale = max(1.25 * scale, expected)
            elif first_try and scale > 2 * expected:  # coarser than these rows need
                self.scale = expected
            else:
                break
            first_try = False
        if largest > 0:
            self.spread = MARGIN * largest * scale / unit
            self.scale = self.spread * unit / 126
        residual = root_above(square, self.hidden_size) * scale * (1 + 2 * UNIT)
        return Block(x_nD, codes, scale, norm, residual + self.rotation.error * norm)

    def quantise(self, x_nD: Tensor, codes_Dn: Tensor) -> tuple[Tensor, Tensor]:
        """codes = R x / scale, rounded, within 127; (largest norm, largest square of a row's loss / scale)"""
        norm_n = norm_above(x_nD)
        norm = norm_n.max()
        check_norms(norm, self.query_norm)
        if bool((norm_n == 0).any()):  # not finite
            x_nD = torch.where(torch.isfinite(x_nD).all(1, keepdim=True), x_nD, 0)
        entries = self.rotation(x_nD, 1 / self.scale, 127)
        # Into the same memory every time: fresh pages would cost more than what is computed.
        if self.rounded.numel() < entries.numel():
            self.rounded = torch.empty(entries.numel())
        rounded = torch.round(entries, out=self.rounded[: entries.numel()].view(entries.shape))
        codes_Dn.copy_(rounded)
        return norm, torch.ops.aten.mse_loss.out(entries, rounded, 0, out=entries).sum(0).max()


def search(
    documents: Documents,
    k: int,
    tile_queries: int,
    queries_QD: Tensor,
    ceilings: Tensor,
    exclude: Exclude | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [Q, k], ids [Q, k], certified [Q])"""
    num_kept = min(k + SLACK["fp32"], len(documents))
    excluded = DeviceExclude(exclude, documents.device)
    quantiser = Quantiser(queries_QD)
    queries = quantiser.queries(queries_QD)
    assert queries.scale is not None
    kind: type[CandidateBuffer | ScoredBuffer] = ScoredBuffer if documents.pass_once else CandidateBuffer
    buffer = kind(len(queries_QD), k, num_kept, ceilings)
    buffer.floor[~torch.isfinite(queries.scale)] = torch.inf  # nothing has a score with NaN or infinity
    memory, raise_at = torch.empty(0, dtype=torch.int32), 1
    for number, (first, documents_nD) in enumerate(documents.blocks(), 1):
        block = quantiser.documents(documents_nD.float())
        for rows in slices(len(queries_QD), tile_queries):
            size = (rows.stop - rows.start) * len(documents_nD)
            memory = memory if len(memory) >= size else torch.empty(size, dtype=torch.int32)
            out = excluded.positions(rows, first, len(documents_nD))
            Tile(buffer, rows, queries_QD[rows], queries[rows], block, first, out).search(memory[:size])
            if number >= raise_at:
                buffer.raise_floor(rows)
        if number >= raise_at:
            raise_at = max(number + 1, int(number * GROWTH))
    if isinstance(buffer, ScoredBuffer):
        return buffer.scores, buffer.best_ids, torch.ones(len(queries_QD), dtype=torch.bool)
    return result(documents, tile_queries, queries_QD, buffer)


class Tile:
    """Some queries (the `rows` of all of them) and a block of documents."""

    def __init__(
        self,
        buffer: CandidateBuffer | ScoredBuffer,
        rows: slice,
        x_qD: Tensor,
        q: Rows,
        block: Block,
        first: int,
        excluded: tuple[Tensor, Tensor] | None,
    ):
        self.buffer, self.rows, self.x_qD, self.q = buffer, rows, x_qD, q
        self.block, self.first, self.excluded = block, first, excluded  # (row, column)
        self.num_rows, self.num_columns = len(x_qD), len(block.x_nD)
        self.ceilings = buffer.ceilings[rows]
        self.has_ceilings = bool((self.ceilings < torch.inf).any())
        rounding = Rounding("fp32", x_qD.shape[1])
        self.narrow = rounding.relative * q.norm * block.norm + Rounding.ABSOLUTE  # bound of a score in fp32
        self.bound = pair_bound(q, block.bounds(), Rounding("int8", x_qD.shape[1])).double()
        assert q.scale is not None
        self.slope = q.scale.double() * block.scale
        buffer.bound[rows] = torch.maximum(buffer.bound[rows], self.narrow)

    def search(self, memory: Tensor) -> None:
        buffer = self.buffer
        out = memory.view(self.num_rows, self.num_columns)
        products = torch._int_mm(self.q.values, self.block.codes_Dn, out=out)
        if self.num_columns >= buffer.k:
            for some in chunks(torch.isneginf(buffer.floor[self.rows])):
                self.seed_floor(some, products)
        rows, columns, crowded = self.survivors(products)
        narrow = self.narrow[rows]
        keys = sampled_scores(self.x_qD, self.block.x_nD, rows, columns).add_(narrow)
        enter = keys >= buffer.floor[self.rows][rows]
        if self.has_ceilings:
            enter &= keys - 2 * narrow < self.ceilings[rows]
        if self.excluded is not None:
            enter &= not_excluded(rows, columns, self.excluded, self.num_columns)
        enter = enter.nonzero()[:, 0]
        if len(enter):
            at = torch.arange(self.rows.start, self.rows.stop)
            buffer.add(self, at, rows[enter], columns[enter], keys[enter])
        for some in chunks(crowded):
            self.score_all(some)

    def excluded_of(self, some: Tensor) -> tuple[Tensor, Tensor]:
        """(position in `some`, column) of what is excluded for these rows."""
        if self.excluded is None:
            return (torch.empty(0, dtype=torch.int64),) * 2
        position = torch.full((self.num_rows,), -1)
        position[some] = torch.arange(len(some))
        rows, columns = position[self.excluded[0]], self.excluded[1]
        return rows[rows >= 0], columns[rows >= 0]

    def seed_floor(self, some: Tensor, products: Tensor) -> None:
        """The k largest products of these rows are scored: the k-th best is no worse than the last."""
        k = self.buffer.k
        sure = integers((self.ceilings - self.bound) / self.slope - 1)[some, None]
        lowest = torch.iinfo(torch.int32).min
        ours = torch.where(products[some] < sure, products[some], lowest)
        ours[self.excluded_of(some)] = lowest
        largest, columns = ours.topk(k, dim=1)
        columns = columns.sort(dim=1).values
        rows = torch.arange(len(some)).repeat_interleave(k)
        scores = sampled_scores(self.x_qD[some], self.block.x_nD, rows, columns.flatten()).view(-1, k)
        floor = scores.amin(1) - self.narrow[some]
        known = (largest[:, -1] > lowest) & torch.isfinite(scores).all(1)
        self.buffer.floor[self.rows.start + some[known]] = floor[known]

    def survivors(self, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, columns) of products that no bound rules out; [q] rows with too many, which are left out."""
        floor = self.buffer.floor[self.rows]
        least = integers((floor - self.bound) / self.slope - 1)
        fold = math.gcd(FOLD, self.num_columns)
        num_groups = self.num_columns // fold
        groups = products.view(-1, fold)
        at = (groups.amax(1).view(self.num_rows, num_groups) >= least[:, None]).flatten().nonzero()[:, 0]
        rows = at // num_groups
        crowded = torch.isneginf(floor) | (4 * torch.bincount(rows, minlength=self.num_rows) > num_groups)
        if bool(crowded.any()):
            at = at[~crowded[rows]]
            rows = at // num_groups
        chosen = groups.index_select(0, at)
        may_enter = chosen >= least[rows, None]
        if self.has_ceilings:
            most = integers((self.ceilings + self.bound) / self.slope + 1)
            may_enter &= chosen <= most[rows, None]
        inside, inner = may_enter.nonzero(as_tuple=True)
        rows, columns = rows[inside], at[inside] % num_groups * fold + inner
        many = torch.bincount(rows, minlength=self.num_rows) > 3 * self.buffer.num_kept
        if bool(many.any()):
            crowded |= many
            rows, columns = rows[~many[rows]], columns[~many[rows]]
        return rows, columns, crowded

    def score_all(self, some: Tensor) -> None:
        """Every document for these rows, in fp32: the best num_kept that can be below the ceiling."""
        buffer, at, narrow = self.buffer, self.rows.start + some, self.narrow[some, None]
        keys = linear(self.x_qD[some], self.block.x_nD).add_(narrow)
        keys[self.excluded_of(some)] = -torch.inf
        may_count = (keys - 2 * narrow < self.ceilings[some, None]) & torch.isfinite(keys)
        keys = torch.where(may_count, keys, -torch.inf)
        buffer.add(self, at, *buffer.best_of(keys, at, narrow))


def chunks(chosen: Tensor) -> tuple[Tensor, ...]:
    at = chosen.nonzero()[:, 0]
    return at.split(DENSE_ROWS) if len(at) else ()


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


def result(
    documents: Documents, tile_queries: int, queries_QD: Tensor, buffer: CandidateBuffer
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [Q, k], ids [Q, k], certified [Q]): the candidates at or above the floor, scored."""
    num_queries, k = len(queries_QD), buffer.k
    scores = torch.full((num_queries, k), -torch.inf)
    ids = torch.full((num_queries, k), -1, dtype=torch.int64)
    for tile in slices(num_queries, tile_queries):
        buffer.raise_floor(tile)
        possible = torch.isfinite(buffer.keys[tile]) & (buffer.keys[tile] >= buffer.floor[tile, None])
        most = int(possible.sum(1).max())
        keys, at = torch.where(possible, buffer.keys[tile], -torch.inf).topk(most, dim=1)
        candidates = buffer.ids[tile].gather(1, at)
        rows, columns = torch.isfinite(keys).nonzero(as_tuple=True)
        exact = documents.pair_scores(queries_QD[tile], rows, candidates[rows, columns])
        counts = torch.isfinite(exact) & (exact < buffer.ceilings[tile][rows])
        keys[rows, columns] = torch.where(counts, exact, -torch.inf)
        num_found = min(k, most)
        scores[tile, :num_found], ids[tile, :num_found] = best_first(keys, candidates, num_found)
    ids[torch.isneginf(scores)] = -1
    return scores, ids, torch.isneginf(buffer.dropped) | (buffer.dropped < scores[:, -1])
