"""The C best upper bounds of each query's scores, kept while documents stream past; and were C enough?

A key is an upper bound of a document's score: what a GEMM of rounded rows gives, plus the bound of bounds.py.
The score is no further below it than two such bounds. Once all documents have passed, the kept ones are
scored exactly. The answer is certified where the best key that was dropped is below the k-th score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_embed_core.kernels.pair_scores import pair_scores
from nemo_embed_core.mine.search.blocks import slices
from nemo_embed_core.mine.search.bounds import METHODS, Rounding, Rows, check_norms, matmul, pair_bound
from nemo_embed_core.mine.search.documents import Documents
from nemo_embed_core.mine.search.exclude import DeviceExclude, Exclude
from nemo_embed_core.mine.search.streaming import best_first, merge_lists_, streaming_topk_

# Q queries · D hidden_size · q, n rows of a tile · k asked for · C candidates kept (k + slack)

# C - k: candidates beyond k; the bound of int8 is 100x wider (docs/mining.md)
SLACK = {"fp32": 32, "bf16": 64, "int8": 128}
# On a GPU a candidate costs a few nanoseconds, and a query that is searched again costs a whole search.
SLACK_ON_GPU = SLACK | {"int8": 600}


class Candidates:
    """Every score of every tile, through the streaming top-k: `Candidates(...).search()`.

    documents, k, tile_queries: of the whole search. queries_QD fp32 on the device, ceilings_Q on the CPU.
    """

    def __init__(
        self,
        method: str,
        documents: Documents,
        k: int,
        tile_queries: int,
        queries_QD: Tensor,
        ceilings_Q: Tensor,
        exclude: Exclude | None,
    ):
        num_queries, hidden_size = queries_QD.shape
        device = documents.device
        self.method, self.documents, self.k, self.tile_queries = method, documents, k, tile_queries
        self.queries_QD, self.ceilings = queries_QD, ceilings_Q.to(device)
        self.excluded = DeviceExclude(exclude, device)
        self.rounding = Rounding(method, hidden_size)
        self.encode = METHODS[method](hidden_size, device)
        self.rows = self.encode(queries_QD)
        num_kept = min(k + (SLACK_ON_GPU if device.type == "cuda" else SLACK)[method], len(documents))
        # Best first, -inf in free places.
        self.keys = torch.full((num_queries, num_kept), -torch.inf, device=device)
        self.ids = torch.full((num_queries, num_kept), -1, dtype=torch.int64, device=device)
        self.largest_norm = torch.zeros((), device=device)  # of a document
        self.bound = torch.zeros(num_queries, device=device)  # the widest so far: score >= key - 2 bound
        # The k-th best score is at least this.
        self.floor = torch.full((num_queries,), -torch.inf, device=device)

    def search(self) -> tuple[Tensor, Tensor, Tensor]:
        """(scores [Q, k], ids [Q, k], certified [Q])"""
        for first, documents_nD in self.documents.blocks():
            self.add_tiles(first, documents_nD)
        return self.result()

    def encode_block(self, documents_nD: Tensor) -> tuple[Rows, Tensor, Tensor]:
        """(the rows as the GEMM takes them, bound [Q], limit [Q]): keys from the limit on are out."""
        block = self.encode(documents_nD)
        self.largest_norm = torch.maximum(self.largest_norm, block.norm.max())
        bound = pair_bound(self.rows, block, self.rounding)
        self.bound = torch.maximum(self.bound, bound)
        # A document is surely above the ceiling only when its lower bound, key - 2 bound, reaches it.
        return block, bound, next_after(self.ceilings + 2 * bound)

    def add_tiles(self, first: int, documents_nD: Tensor) -> None:
        """keys, ids = the best C of themselves and of the block's scores + bound, below the limit."""
        block, bound, limit = self.encode_block(documents_nD)
        for tile in slices(len(self.queries_QD), self.tile_queries):
            q, add = self.rows[tile], bound[tile]
            # On a CPU the GEMM adds the bound to its result in place; elsewhere the top-k does, after scales.
            in_gemm = self.method != "int8" and not bound.is_cuda
            scores, row_add = (matmul(q, block, add), None) if in_gemm else (matmul(q, block), add)
            streaming_topk_(
                scores, limit[tile], self.keys[tile], self.ids[tile], first,
                *self.excluded.of(tile), q.scale, block.scale, row_add,
            )  # fmt: skip

    def raise_floor(self, by_scores: bool = False) -> None:
        """By the candidates' lower bounds, or by exact scores of the k best surely below the ceiling."""
        k = min(self.k, self.keys.shape[1])
        if by_scores:
            self.floor = torch.maximum(self.floor, self._kth_score())
        self.floor = torch.maximum(self.floor, kth_lower_bound(self.keys, self.bound, self.ceilings, k))

    def _kth_score(self) -> Tensor:
        """[Q]: the lowest score of the k best keys below the ceiling; -inf where there are fewer than k.

        Each of these k may be returned, so the k-th best of all is at least as good.
        """
        first = (self.keys >= self.ceilings[:, None]).sum(1)
        places = first[:, None] + torch.arange(self.k, device=self.keys.device)
        last = self.keys.shape[1] - 1
        ids = torch.where(places <= last, self.ids.gather(1, places.clamp(max=last)), -1)
        exact = self.documents.scores(self.queries_QD, ids)
        return torch.where(exact < self.ceilings[:, None], exact, -torch.inf).amin(1)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """(scores [Q, k], ids [Q, k], certified [Q]) of the candidates, on the CPU."""
        check_norms(self.largest_norm, self.rows.norm.max())
        exact = self._exact_scores()
        below = torch.isfinite(exact) & (exact < self.ceilings[:, None])
        scores, ids = self._best(torch.where(below, exact, -torch.inf))
        num_kept = self.keys.shape[1]
        # No document that was dropped scores above the last key that was kept; -inf: none was dropped.
        most_dropped, kth = self.keys[:, -1], scores[:, min(self.k, num_kept) - 1]
        certified = torch.isneginf(most_dropped) | (most_dropped < kth)
        if num_kept >= len(self.documents):
            certified[:] = True  # every document had a place
        return scores.cpu(), ids.cpu(), certified.cpu()

    def _exact_scores(self) -> Tensor:
        """[Q, C]: the score of each candidate that can be among the k best; of others NaN or -inf."""
        if self.keys.is_cuda:
            self.raise_floor(by_scores=self.method == "int8" and self.documents.is_on_device)
            possible = torch.where(self.keys >= self.floor[:, None], self.ids, -1)
            return self.documents.scores(self.queries_QD, possible)
        relative = Rounding("fp32", self.queries_QD.shape[1]).relative
        error = relative * self.rows.norm * self.largest_norm + Rounding.ABSOLUTE
        candidates = (self.ceilings, self.keys, self.ids, self.method != "fp32")
        k = min(self.k, self.keys.shape[1])
        return possible_scores(self.documents, k, self.queries_QD, error, *candidates)

    def _best(self, exact: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [Q, k], ids [Q, k]) of the highest of these scores of the candidates; -inf is none."""
        num_queries, num_kept = self.ids.shape
        scores = torch.full((num_queries, self.k), -torch.inf, device=exact.device)
        ids = torch.full((num_queries, self.k), -1, dtype=torch.int64, device=exact.device)
        if exact.is_cuda:  # one sort of packed words on the chip instead of two of the whole matrix
            first = self.documents.first_id
            columns = (self.ids - first).to(torch.int32)
            merge_lists_(exact, columns, torch.full_like(columns[:, 0], num_kept), scores, ids, first)
        else:
            k = min(self.k, num_kept)
            scores[:, :k], ids[:, :k] = best_first(exact, torch.where(exact.isfinite(), self.ids, -1), k)
        return scores, ids


def kth_lower_bound(keys: Tensor, bound: Tensor, ceilings: Tensor, k: int) -> Tensor:
    """[Q]: k documents below the ceiling score at least this for sure; -inf where so many are not known.

    keys [Q, C]: upper bounds, best first, none further than 2 bound [Q] above its score.
    """
    # Keys from the ceiling on come first; their scores may be above it.
    place = (keys >= ceilings[:, None]).sum(1) + k - 1
    kth = keys.gather(1, place.clamp(max=keys.shape[1] - 1)[:, None])[:, 0] - 2 * bound
    return torch.where(place < keys.shape[1], kth, -torch.inf)


def possible_scores(
    documents: Documents,
    k: int,
    queries_QD: Tensor,
    error_Q: Tensor,
    ceilings: Tensor,
    keys: Tensor,
    ids: Tensor,
    rescore: bool,
) -> Tensor:
    """[Q, C] exact scores of the candidates that can be among the k best, -inf elsewhere.

    rescore: the keys are of rounded rows and far above the scores, so fp32 products, which are within
    error_Q, replace them first. Exact scores are fp64 and take several times as long.
    """
    (num_queries, num_kept), hidden_size = ids.shape, queries_QD.shape[1]
    exact = torch.full(ids.shape, -torch.inf)
    # 64 MiB of gathered rows.
    for rows in slices(num_queries, max(1, (16 << 20) // (num_kept * hidden_size))):
        found, upper, error = ids[rows] >= 0, keys[rows], error_Q[rows, None]
        gathered = None
        if rescore:
            gathered = documents.gather(ids[rows].clamp(min=documents.first_id).flatten())
            near = torch.bmm(gathered.view(*found.shape, hidden_size), queries_QD[rows, :, None])[:, :, 0]
            upper = torch.where(found, near + error, -torch.inf)
        lower = upper - 2 * error
        # An upper bound below the k-th lower bound of documents that are below the ceiling for sure is out.
        sure = torch.where(found & (upper < ceilings[rows, None]), lower, -torch.inf)
        kth = sure.topk(k, dim=1).values[:, -1]
        may_count = found & (lower < ceilings[rows, None]) & (upper >= kth[:, None])
        at_row, at_column = may_count.nonzero(as_tuple=True)
        if gathered is None:
            scores = documents.pair_scores(queries_QD[rows], at_row, ids[rows][at_row, at_column])
        else:
            scores = pair_scores(queries_QD[rows], at_row, gathered, at_row * num_kept + at_column)
        exact[at_row + rows.start, at_column] = scores
    return exact


def next_after(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))
