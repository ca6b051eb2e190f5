"""Exact top-k of documents below each query's own ceiling, in bounded memory.

    scores, ids = topk_below(queries, documents, ceilings, k)

The score of a pair is a function of its two rows alone (kernels/pair_scores.py: fp64, one fixed order of summation,
rounded to fp32), never of the block a GEMM happened to compute it in. So the answer is the same bits for every block size, order
of blocks, number of ranks, device, and for the int8 path. A GEMM only finds candidates: its result is within a proven
bound of the score, the best C > k upper bounds are kept while the documents stream past, the kept ones are scored, and
a certificate (everything dropped is below the k-th kept) says whether that was enough. Rows without it go a slower way.

Q queries · N documents · D hidden_size · q, n rows of a tile of them · k asked for · C candidates kept (k + slack)
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.config import UserError
from nemo_embed_core.kernels.filter_scores import filter_scores
from nemo_embed_core.kernels.pair_scores import pair_scores
from nemo_embed_core.mine.bounds import METHODS, Rounding, check_norms, linear, matmul, pair_bound, split_bound
from nemo_embed_core.mine.int8_cpu import int8_candidates, score_places
from nemo_embed_core.mine.streaming import MAX_ID, best_first, excluded_places, merge_lists_, streaming_topk_

# C - k: candidates beyond k; the bound of int8 is 100x wider (docs/mining.md)
SLACK = {"fp32": 32, "bf16": 64, "int8": 128}
# On a GPU a candidate costs a few nanoseconds, and a query that is searched again costs a whole search.
SLACK_ON_GPU = SLACK | {"int8": 600}
FILTERING = {"cuda"}  # devices where tiles are filtered in the GEMM once the states are full
REACHED_FROM = 131072  # documents that are seen before candidates are scored on the way, at each doubling
MANY_QUERIES = 512  # on a CPU; fewer are searched faster in fp32
FIRST_BLOCK = 16  # part of a block: documents in device memory whose scores are sorted before floors are known
LIST = 1024  # places for what a block of documents adds to a query's candidates, at least
_DTYPES = ("float16", "bfloat16", "float32")  # others would be rounded by each method in its own way


class Exclude(NamedTuple):
    """CSR of document ids that a query must not be given: those of query i are ids[indptr[i]:indptr[i + 1]]."""

    indptr: np.ndarray  # [Q + 1] int64
    ids: np.ndarray  # int64

    @staticmethod
    def from_lists(lists: list[list[int]]) -> Exclude:
        indptr = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(x) for x in lists], out=indptr[1:])
        return Exclude(indptr, np.array([i for x in lists for i in x], np.int64))

    def of(self, i: int) -> np.ndarray:
        return self.ids[self.indptr[i] : self.indptr[i + 1]]

    def ascending(self) -> Exclude:
        """The ids of every query in ascending order: the kernel searches them by halves."""
        rows = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        return Exclude(self.indptr, self.ids[np.lexsort((self.ids, rows))])

    def take(self, rows: np.ndarray) -> Exclude:
        counts = np.diff(self.indptr)[rows]
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        assert self.ids.dtype == np.int64 and self.indptr.dtype == np.int64
        at = np.arange(indptr[-1]) - np.repeat(indptr[:-1], counts) + np.repeat(self.indptr[rows], counts)
        return Exclude(indptr, self.ids[at])


class Hidden:
    """Exclude on the device, where the kernel reads it."""

    def __init__(self, exclude: Exclude | None, device: torch.device):
        self.indptr = self.ids = None
        if exclude is not None:
            self.indptr, self.ids = (
                torch.from_numpy(exclude.indptr).to(device),
                torch.from_numpy(exclude.ids).to(device),
            )

    def of(self, tile: slice) -> tuple[Tensor | None, Tensor | None]:
        return (None if self.indptr is None else self.indptr[tile.start : tile.stop + 1]), self.ids

    def hide_(self, keys: Tensor, tile: slice, first_id: int) -> None:
        """-inf in place of the excluded documents of this tile."""
        indptr, ids = self.of(tile)
        if indptr is not None and ids is not None:
            keys[excluded_places(indptr, ids, first_id, keys.shape[1])] = -torch.inf


@dataclass
class SearchStats:
    """How the answer was found; the answer itself does not depend on it."""

    method: str = ""
    num_queries: int = 0
    num_certified: int = 0  # rows whose candidates were proven enough; the others were searched again the slower way
    num_exhaustive: int = 0  # rows (masses of ties) for which every document near the k-th had to be scored


def topk_below(
    queries: Any,
    documents: Any,
    ceilings: Any,
    k: int,
    exclude: Exclude | None = None,
    *,
    first_id: int = 0,
    method: str = "fp32",
    block_queries: int = 65536,
    tile_queries: int = 0,
    block_documents: int = 0,
    device: torch.device | str = "cpu",
    stats: SearchStats | None = None,
) -> tuple[Tensor, Tensor]:
    """s = queries @ documents.T; s[excluded or s >= ceilings[:, None] or not finite] = -inf; s.topk(k), ties by lower id.

    queries [Q, D], documents [N, D]: numpy arrays, memory maps, tensors, what has __dlpack__ (CuPy, JAX), or anything with
    .shape, [a:b] and [ids]; float16, bfloat16 or float32, any norm.  ceilings [Q]: kept scores are strictly below; +inf keeps all.
    method: how candidates are found, "fp32", "bf16", "int8" or "auto" (`pick_method`); never what is found.
    exclude: ids never returned, per query.  first_id: id of documents[0] when they are one rank's shard.
    Returns scores [Q, k] fp32, best first, and ids [Q, k] int64, on CPU; -inf and -1 where fewer than k qualify.
    Memory: block_queries x (C x 12 bytes + a row) + block_documents rows + tile_queries x block_documents x 9 bytes
    (0: 1,024 x 2,048 on a CPU, 4,096 x 32,768 on a GPU), whatever N is; docs/mining.md has int8 and what a GPU adds.
    """
    queries, documents = (
        torch.from_dlpack(x) if not isinstance(x, np.ndarray | Tensor) and hasattr(x, "__dlpack__") else x
        for x in (queries, documents)
    )
    num_queries, hidden_size = queries.shape
    num_documents = documents.shape[0]
    if k < 1:
        raise UserError(f"k={k} must be at least 1")
    if documents.shape[1] != hidden_size:
        raise UserError(
            f"queries have {hidden_size} columns and documents {documents.shape[1]}: they come from different models"
        )
    if len(ceilings) != num_queries:
        raise UserError(f"{len(ceilings)} ceilings for {num_queries} queries: give one per query")
    if exclude is not None and len(exclude.indptr) != num_queries + 1:
        raise UserError(f"exclude.indptr has {len(exclude.indptr)} entries for {num_queries} queries: give Q + 1")
    for name, rows in (("queries", queries), ("documents", documents)):
        if (dtype := str(getattr(rows, "dtype", "float32")).removeprefix("torch.")) not in _DTYPES:
            raise UserError(f"{name} are {dtype}: convert them to one of {', '.join(_DTYPES)}")
    device = torch.device(device)
    # On a GPU ids share a 64-bit word with their key, and a rank's own places are int32.
    if device.type == "cuda" and (first_id + num_documents > MAX_ID or num_documents >= 2**31):
        raise UserError(
            f"{num_documents:,} documents from id {first_id:,} on: a GPU searches ids up to {MAX_ID:,} and fewer than 2^31 of "
            "them; use more ranks, or device=cpu"
        )
    if method == "auto":
        method = pick_method(device, min(num_queries, block_queries))
    if method not in METHODS:
        raise UserError(f"method={method!r} is none of auto, {', '.join(METHODS)}")
    if method == "int8" and device.type == "cpu" and not _int8_is_exact():
        raise UserError(
            "int8 products saturate here, as oneDNN's do when ONEDNN_MAX_CPU_ISA takes VNNI away; unset it or choose fp32"
        )
    tile_queries = tile_queries or (4096 if device.type == "cuda" else 1024)
    if not block_documents:
        block_documents = 32768 if device.type == "cuda" else (4096 if method == "int8" else 2048)
    if device.type == "cuda" and device.index is None:  # a name that says which one, to compare and to cache by
        device = torch.device("cuda", torch.cuda.current_device())
    stats = stats if stats is not None else SearchStats()
    stats.method, stats.num_queries = method, num_queries
    search = _Search(documents, k, first_id, method, tile_queries, block_documents, device, stats)
    scores = torch.full((num_queries, k), -torch.inf)
    ids = torch.full((num_queries, k), -1, dtype=torch.int64)
    if num_documents == 0 or num_queries == 0:
        return scores, ids
    ceilings_Q = _round_up_fp32(ceilings)
    with ieee_fp32_matmul(), torch.inference_mode():
        for start in range(0, num_queries, block_queries):
            rows = slice(start, min(start + block_queries, num_queries))
            excluded = exclude.take(np.arange(rows.start, rows.stop)).ascending() if exclude is not None else None
            scores[rows], ids[rows] = search.block(fp32_rows(queries, rows, device), ceilings_Q[rows], excluded)
    return scores, ids


def pick_method(device: torch.device, num_queries: int) -> str:
    """The fastest way to find candidates here: bf16 tensor cores on a GPU; int8 on a CPU that multiplies it (VNNI), where the
    queries are as many as it takes to win back that every document is rotated and quantised."""
    if device.type == "cuda":
        return "bf16"
    return "int8" if num_queries >= MANY_QUERIES and _int8_is_exact() and _int8_is_fast() else "fp32"


@functools.cache
def _int8_is_exact() -> bool:
    """Whether this CPU's int8 GEMM keeps the largest sums: without VNNI pairs of products may be summed in 16 bits."""
    a = torch.full((64, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(a, a.T) == 256 * 127**2).all()) and bool((torch._int_mm(a, -a.T) == -256 * 127**2).all())


@functools.cache
def _int8_is_fast() -> bool:
    """Whether the int8 GEMM of this CPU takes less than half the time of that in fp32: candidates are scored twice."""
    a, b = torch.ones(512, 512), torch.ones(2048, 512)
    a8, b8 = a.to(torch.int8), b.to(torch.int8)

    def best_of_five(run: Callable[[], Tensor]) -> float:  # one alone may be that of a busy machine
        run()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return min(times)

    return 2 * best_of_five(lambda: torch._int_mm(a8, b8.T)) < best_of_five(lambda: linear(a, b))


def _kth_lower_bound(state_keys: Tensor, widest: Tensor, ceilings: Tensor, k: int) -> Tensor:
    """[Q]: k documents surely below the ceiling score at least this, -inf where so many are not known.

    state_keys [Q, C]: upper bounds, best first, none further than 2 widest [Q] above its score.
    """
    above = (state_keys >= ceilings[:, None]).sum(1)  # these come first, and may be above the ceiling themselves
    place = above + k - 1
    kth = state_keys.gather(1, place.clamp(max=state_keys.shape[1] - 1)[:, None])[:, 0] - 2 * widest
    return torch.where(place < state_keys.shape[1], kth, -torch.inf)


def merge_topk(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The top k of the union of (scores [Q, k], ids [Q, k]) of disjoint sets of documents, ties by lower id."""
    return best_first(torch.cat([s for s, _ in parts], 1), torch.cat([i for _, i in parts], 1), k)


def topk_below_ref(
    queries_QD: Tensor, documents_ND: Tensor, ceilings_Q: Tensor, k: int, exclude: Exclude | None = None
) -> tuple[Tensor, Tensor]:
    """What topk_below returns, by scoring every pair in fp64: for tests, and for benchmarks before they take the time."""
    num_queries, num_documents = len(queries_QD), len(documents_ND)
    rows, columns = torch.cartesian_prod(torch.arange(num_queries), torch.arange(num_documents)).unbind(1)
    scores = pair_scores(queries_QD, rows, documents_ND, columns).view(num_queries, num_documents)
    scores[~(scores.double() < ceilings_Q.double()[:, None]) | ~torch.isfinite(scores)] = -torch.inf
    if exclude is not None:
        for i in range(len(queries_QD)):
            scores[i, torch.from_numpy(exclude.ids[exclude.indptr[i] : exclude.indptr[i + 1]])] = -torch.inf
    scores = torch.nn.functional.pad(scores, (0, max(0, k - scores.shape[1])), value=-torch.inf)
    scores, ids = best_first(scores, torch.arange(scores.shape[1]).expand_as(scores), k)
    return scores, torch.where(torch.isneginf(scores), -1, ids)


class _Search:
    """One rank's documents and how to walk them."""

    def __init__(
        self,
        documents: Any,
        k: int,
        first_id: int,
        method: str,
        tile_queries: int,
        block_documents: int,
        device: torch.device,
        stats: SearchStats,
    ):
        self.documents, self.k, self.first_id, self.method = documents, k, first_id, method
        self.tile_queries, self.block_documents = tile_queries, block_documents
        self.device, self.stats = device, stats
        self.at_hand = isinstance(documents, Tensor) and documents.device == device  # no bus, no disk

    def block(self, queries_QD: Tensor, ceilings_Q: Tensor, exclude: Exclude | None) -> tuple[Tensor, Tensor]:
        """The fast way for all rows, then the slower ones for the rows whose certificate failed."""
        method = self.method
        scores, ids, certified = self.candidates(method, queries_QD, ceilings_Q, exclude)
        self.stats.num_certified += int(certified.sum())
        while not bool(certified.all()):
            rows = (~certified).nonzero()[:, 0]
            excluded = exclude.take(rows.numpy()) if exclude is not None else None
            args = (queries_QD[rows.to(queries_QD.device)], ceilings_Q[rows], excluded)
            # A wide bound was not enough (ceiling in the bulk of the scores): the next narrower one.
            if method != "fp32":
                method = "bf16" if method == "int8" and self.device.type in FILTERING else "fp32"
                scores[rows], ids[rows], certified[rows] = self.candidates(method, *args)
            else:  # more ties around the k-th than places
                scores[rows], ids[rows] = self.exhaustive(*args)
                self.stats.num_exhaustive += len(rows)
                break
        return scores, ids

    def candidates(
        self, method: str, queries_QD: Tensor, ceilings_Q: Tensor, exclude: Exclude | None, filters: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(scores [Q, k], ids [Q, k], certified [Q]): the best C upper bounds, scored."""
        if method == "int8" and self.device.type == "cpu" and "cpu" not in FILTERING:
            return self.candidates_int8_cpu(queries_QD, ceilings_Q, exclude)
        num_queries, hidden_size = queries_QD.shape
        slack = (SLACK_ON_GPU if self.device.type == "cuda" else SLACK)[method]
        num_kept = min(self.k + slack, self.documents.shape[0])
        rounding = Rounding(method, hidden_size)
        encode = METHODS[method](hidden_size, self.device)
        query_rows = encode(queries_QD)
        ceilings = ceilings_Q.to(self.device)
        hidden = Hidden(exclude, self.device)
        state_keys = torch.full((num_queries, num_kept), -torch.inf, device=self.device)
        state_ids = torch.full((num_queries, num_kept), -1, dtype=torch.int64, device=self.device)
        largest_norm, widest = torch.zeros((), device=self.device), torch.zeros(num_queries, device=self.device)
        lost = torch.zeros(num_queries, dtype=torch.bool, device=self.device)
        reached = torch.full((num_queries,), -torch.inf, device=self.device)  # k documents are known to score this
        seen, seen_before = 0, REACHED_FROM // 2
        filters = filters and self.device.type in FILTERING and method != "fp32" and hidden_size % 16 == 0
        for first, documents_nD in self.document_blocks(growing=filters):
            block = encode(documents_nD)
            largest_norm = torch.maximum(largest_norm, block.norm.max())
            bound = pair_bound(query_rows, block, rounding)
            widest = torch.maximum(widest, bound)
            # A document is out only when even its lower bound, key - 2 bound, reaches the ceiling.
            limit = next_after(ceilings + 2 * bound)
            if filters and first > self.first_id:
                if method == "int8" and self.at_hand and seen >= 2 * seen_before:
                    seen_before = seen  # the scores themselves: by bounds alone twice as many survive
                    reached = torch.maximum(reached, self.reached(queries_QD, ceilings, state_keys, state_ids))
                # What beats neither the last candidate nor what k documents reach cannot be among the k best. A free
                # place takes any finite key. Lists that overflow belong to rows that are searched again below.
                reached = torch.maximum(reached, _kth_lower_bound(state_keys, widest, ceilings, min(self.k, num_kept)))
                floor = torch.maximum(state_keys[:, -1], reached).clamp(min=torch.finfo(torch.float32).min)
                length = LIST + num_kept
                add, slope, spread = bound, None, None
                if method == "int8":  # bf16 documents have no residual, others nearly the same
                    (add, slope), spread = split_bound(query_rows, block, rounding), block.residual
                keys, columns, counts = filter_scores(
                    query_rows.values, block.values, floor, limit, length,
                    query_rows.scale, block.scale, add, slope, spread,
                )  # fmt: skip
                lost |= counts > length
                merge_lists_(keys, columns, counts, state_keys, state_ids, first, *hidden.of(slice(0, num_queries)))
                seen += len(documents_nD)
                continue
            seen += len(documents_nD)
            for tile in self.tiles(num_queries):
                q, add = query_rows[tile], bound[tile]
                in_gemm = method != "int8" and not bound.is_cuda
                scores, row_add = (matmul(q, block, add), None) if in_gemm else (matmul(q, block), add)
                streaming_topk_(
                    scores, limit[tile], state_keys[tile], state_ids[tile], first,
                    *hidden.of(tile), q.scale, block.scale, row_add,
                )  # fmt: skip
        check_norms(largest_norm, query_rows.norm.max())
        found = self.score_candidates(
            method, queries_QD, query_rows.norm, ceilings, state_keys, state_ids, largest_norm, widest, reached
        )
        rows = lost.nonzero()[:, 0]
        if len(rows):  # documents in an order that keeps getting better, say: through whole tiles
            excluded = exclude.take(rows.cpu().numpy()) if exclude is not None else None
            again = self.candidates(method, queries_QD[rows], ceilings_Q[rows.cpu()], excluded, filters=False)
            for whole, part in zip(found, again, strict=True):
                whole[rows.cpu()] = part
        return found

    def candidates_int8_cpu(
        self, queries_QD: Tensor, ceilings_Q: Tensor, exclude: Exclude | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_kept = min(self.k + SLACK["fp32"], self.documents.shape[0])
        places = int8_candidates(self, queries_QD, ceilings_Q, num_kept, Hidden(exclude, self.device))
        return score_places(self, queries_QD, places)

    def score_candidates(
        self,
        method: str,
        queries_QD: Tensor,
        norm_Q: Tensor,
        ceilings: Tensor,
        state_keys: Tensor,
        state_ids: Tensor,
        largest_norm: Tensor,
        widest: Tensor,
        reached: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_queries, num_kept = state_ids.shape
        hidden_size, k = queries_QD.shape[1], min(self.k, num_kept)
        dropped = state_keys[:, -1].clone()  # an upper bound of all that did not stay; -inf: nothing had to go
        if self.device.type == "cuda":
            reached = torch.maximum(reached, _kth_lower_bound(state_keys, widest, ceilings, k))
            if method == "int8" and self.at_hand:
                reached = torch.maximum(reached, self.reached(queries_QD, ceilings, state_keys, state_ids))
            exact = self.score_all(queries_QD, torch.where(state_keys >= reached[:, None], state_ids, -1))
        else:
            error = Rounding("fp32", hidden_size).relative * norm_Q * largest_norm + Rounding.ABSOLUTE
            exact = self.score_possible(method, queries_QD, error, ceilings, state_keys, state_ids)
        keep = torch.isfinite(exact) & (exact < ceilings[:, None])
        scores = torch.full((num_queries, self.k), -torch.inf, device=self.device)
        ids = torch.full((num_queries, self.k), -1, dtype=torch.int64, device=self.device)
        exact = torch.where(keep, exact, -torch.inf)
        if self.device.type == "cuda":  # one sort of packed words on the chip instead of two of the whole matrix
            columns = (state_ids - self.first_id).to(torch.int32)
            merge_lists_(exact, columns, torch.full_like(columns[:, 0], num_kept), scores, ids, self.first_id)
        else:
            scores[:, :k], ids[:, :k] = best_first(exact, torch.where(keep, state_ids, -1), k)
        kth = scores[:, k - 1]
        certified = torch.isneginf(dropped) | (dropped < kth)
        if num_kept >= self.documents.shape[0]:
            certified[:] = True  # every document had a place
        return scores.cpu(), ids.cpu(), certified.cpu()

    def reached(self, queries_QD: Tensor, ceilings: Tensor, state_keys: Tensor, state_ids: Tensor) -> Tensor:
        """[Q]: the k-th of the scores below the ceiling of the k candidates with the best bounds of those surely below it;
        -inf where there are fewer. By definition k documents that may be returned score at least this."""
        k = self.k
        above = (state_keys >= ceilings[:, None]).sum(1)
        places = above[:, None] + torch.arange(k, device=self.device)
        inside = places < state_keys.shape[1]
        ids = torch.where(inside, state_ids.gather(1, places.clamp(max=state_keys.shape[1] - 1)), -1)
        exact = self.score_all(queries_QD, ids)
        return torch.where(exact < ceilings[:, None], exact, -torch.inf).amin(1)

    def score_all(self, queries_QD: Tensor, state_ids: Tensor) -> Tensor:
        """[Q, C] scores, NaN where the id is -1."""
        exact = torch.full(state_ids.shape, torch.nan, device=self.device)
        for first, documents_nD in [(self.first_id, self.documents)] if self.at_hand else self.document_blocks():
            here = (state_ids >= first) & (state_ids < first + len(documents_nD))
            rows, places = here.nonzero(as_tuple=True)
            exact[rows, places] = pair_scores(queries_QD, rows, documents_nD, state_ids[rows, places] - first)
        return exact

    def score_possible(
        self, method: str, queries_QD: Tensor, error_Q: Tensor, ceilings: Tensor, state_keys: Tensor, state_ids: Tensor
    ) -> Tensor:
        """[Q, C] scores of what can be among the k best, -inf elsewhere."""
        num_queries, num_kept = state_ids.shape
        hidden_size, k = queries_QD.shape[1], min(self.k, num_kept)
        exact = torch.full(state_ids.shape, -torch.inf)
        step = max(1, (16 << 20) // (num_kept * hidden_size))  # at most 64 MiB of gathered rows
        for start in range(0, num_queries, step):
            rows = slice(start, min(start + step, num_queries))
            found, upper, error = state_ids[rows] >= 0, state_keys[rows], error_Q[rows, None]
            gathered = None
            if method != "fp32":
                gathered = self.gather(state_ids[rows].clamp(min=self.first_id).flatten())
                near = torch.bmm(gathered.view(*found.shape, hidden_size), queries_QD[rows, :, None])[:, :, 0]
                upper = torch.where(found, near + error, -torch.inf)
            lower = upper - 2 * error
            below = found & (lower < ceilings[rows, None])
            # The k-th lower bound of those surely below the ceiling: what cannot reach it need not be scored.
            sure = torch.where(found & (upper < ceilings[rows, None]), lower, -torch.inf)
            kth = sure.topk(k, dim=1).values[:, -1]
            at_row, at_column = (below & (upper >= kth[:, None])).nonzero(as_tuple=True)
            if gathered is None:
                documents, at = self.gather(state_ids[rows][at_row, at_column]), torch.arange(len(at_row))
            else:
                documents, at = gathered, at_row * num_kept + at_column
            exact[at_row + start, at_column] = pair_scores(queries_QD[rows], at_row, documents, at)
        return exact

    def exhaustive(self, queries_QD: Tensor, ceilings_Q: Tensor, exclude: Exclude | None) -> tuple[Tensor, Tensor]:
        """Every document whose bound allows it is scored: slow for masses of ties, right for any input."""
        num_queries, hidden_size = queries_QD.shape
        scores = torch.full((num_queries, self.k), -torch.inf, device=self.device)
        ids = torch.full((num_queries, self.k), -1, dtype=torch.int64, device=self.device)
        rounding, ceilings = Rounding("fp32", hidden_size), ceilings_Q.to(self.device)
        hidden = Hidden(exclude, self.device)
        encode = METHODS["fp32"](hidden_size, self.device)
        query_rows = encode(queries_QD)
        for first, documents_nD in self.document_blocks():
            block = encode(documents_nD)
            for tile in self.tiles(num_queries):
                bound = pair_bound(query_rows[tile], block, rounding)
                upper = matmul(query_rows[tile], block, bound)
                lower = upper - 2 * bound[:, None]
                kth = scores[tile, -1]
                if upper.shape[1] >= self.k:
                    sure = torch.where(upper < ceilings[tile, None], lower, -torch.inf)
                    hidden.hide_(sure, tile, first)
                    kth = torch.maximum(kth, sure.nan_to_num(-torch.inf).topk(self.k, dim=1).values[:, -1])
                alive = (upper >= kth[:, None]) & (lower < ceilings[tile, None])
                rows, columns = alive.nonzero(as_tuple=True)
                exact = torch.full_like(upper, torch.nan)
                exact[rows, columns] = pair_scores(queries_QD[tile], rows, documents_nD, columns)
                streaming_topk_(exact, ceilings[tile], scores[tile], ids[tile], first, *hidden.of(tile))
        return scores.cpu(), ids.cpu()

    def document_blocks(self, growing: bool = False) -> Iterator[tuple[int, Tensor]]:
        """growing: from a sixteenth of a block, each as large as all before it, up to eight blocks: a filtered block adds as
        many candidates as it is larger than what was seen, and costs a merge. For documents in device memory."""
        if growing and isinstance(self.documents, Tensor):
            start, size = 0, max(1, self.block_documents // FIRST_BLOCK)
            while start < len(self.documents):
                yield self.first_id + start, self.documents[start : start + size].to(self.device)
                start += size
                size = min(start, 8 * self.block_documents)
            return
        for start, rows in blocks_of(self.documents, self.block_documents, self.device):
            yield self.first_id + start, rows

    def tiles(self, num_queries: int) -> Iterator[slice]:
        for start in range(0, num_queries, self.tile_queries):
            yield slice(start, min(start + self.tile_queries, num_queries))

    def gather(self, ids: Tensor) -> Tensor:
        """[P, D] fp32 rows of the documents with these ids."""
        return fp32_rows(self.documents, (ids - self.first_id).cpu().numpy(), self.device)


def blocks_of(documents: Any, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows as they are stored, on the device): `encode` reads two bytes of a number rather than four."""
    blocks = [slice(a, min(a + size, documents.shape[0])) for a in range(0, documents.shape[0], size)]
    if isinstance(documents, Tensor):
        for rows in blocks:
            yield rows.start, documents[rows].to(device)
        return
    if device.type != "cuda":
        for rows in blocks:
            yield rows.start, fp32_rows(documents, rows, device)
        return
    # Two pinned buffers: the disk fills one while the GPU works on what came from the other. Nothing in the tile
    # loop waits for the device, so the host runs ahead until a buffer is still being copied.
    buffers: list[Tensor | None] = [None, None]
    copied = [torch.cuda.Event(), torch.cuda.Event()]
    for i, rows in enumerate(blocks):
        block = _read_only(documents[rows])
        buffer = buffers[i % 2]
        if buffer is None:
            buffer = buffers[i % 2] = torch.empty(size, block.shape[1], dtype=block.dtype, pin_memory=True)
        copied[i % 2].synchronize()
        buffer[: len(block)].copy_(block)
        on_device = buffer[: len(block)].to(device, non_blocking=True)
        copied[i % 2].record()
        yield rows.start, on_device


def resident(documents: Any, device: torch.device | str, share: float = 0.4) -> Any:
    """The documents as one tensor on the GPU when they take at most `share` of its free memory; else as they are.

    For several searches of the same documents: the bus carries them once. On a CPU a memory map is resident as it is.
    """
    device = torch.device(device)
    if device.type != "cuda" or isinstance(documents, Tensor) or documents.shape[0] == 0:
        return documents
    one = _read_only(documents[:1])
    if documents.shape[0] * one.nbytes > share * torch.cuda.mem_get_info(device)[0]:
        return documents
    held = torch.empty(tuple(documents.shape), dtype=one.dtype, device=device)
    for start, rows in blocks_of(documents, 32768, device):
        held[start : start + len(rows)] = rows
    return held


def _read_only(rows: np.ndarray) -> Tensor:
    """The rows without a copy. torch warns that a memory map cannot be written to; nobody does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(rows))


def fp32_rows(array: Any, index: Any, device: torch.device | str) -> Tensor:
    """array[index] as an fp32 tensor: numpy, memory map, tensor or corpus."""
    rows = (
        array[torch.from_numpy(index)] if isinstance(array, Tensor) and isinstance(index, np.ndarray) else array[index]
    )
    if not isinstance(rows, Tensor):
        rows = torch.from_numpy(np.array(rows, dtype=np.float32))
    return rows.to(device=device, dtype=torch.float32)


def _round_up_fp32(values: Any) -> Tensor:
    """The smallest fp32 not below each value: for fp32 s, s < value exactly when s < round_up(value). NaN: -inf."""
    exact = np.asarray(values.cpu() if isinstance(values, Tensor) else values, np.float64)
    if np.isnan(exact).any():
        row = int(np.isnan(exact).nonzero()[0][0])
        raise UserError(f"the ceiling of query {row} is NaN: its positive's score is not a number")
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return torch.from_numpy(rounded.astype(np.float32))


def next_after(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


@contextlib.contextmanager
def ieee_fp32_matmul() -> Iterator[None]:
    """fp32 GEMMs in fp32: "high" or "medium" precision (TF32, bf16) would break the error bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
