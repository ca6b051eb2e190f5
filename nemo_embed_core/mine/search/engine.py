"""From the fastest way to the surest: a query is searched again until its answer is certified exact.

Candidates                  every score of every tile; any method, any device
FilteredCandidates          GPU, bf16 and int8: keys are compared inside the GEMM
int8_cpu.search             CPU, int8: integer products rule documents out
exhaustive                  every document that its bound allows is scored: masses of ties

Documents that pass once (StoredRows) are scored while their block is there: by PassingCandidates on a GPU,
by int8_cpu.search or exhaustive on a CPU, which certifies every answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_embed_core.kernels.pair_scores import pair_scores
from nemo_embed_core.mine.search import int8_cpu
from nemo_embed_core.mine.search.blocks import slices
from nemo_embed_core.mine.search.bounds import METHODS, Rounding, matmul, pair_bound
from nemo_embed_core.mine.search.candidates import Candidates
from nemo_embed_core.mine.search.documents import Documents
from nemo_embed_core.mine.search.exclude import DeviceExclude, Exclude
from nemo_embed_core.mine.search.gpu_filter import FilteredCandidates, PassingCandidates
from nemo_embed_core.mine.search.streaming import streaming_topk_

FILTERING = {"cuda"}  # devices that filter inside the GEMM

Found = tuple[Tensor, Tensor, Tensor]  # scores [Q, k], ids [Q, k], certified [Q], on the CPU


@dataclass
class SearchStats:
    """How the answer was found; the answer itself does not depend on it."""

    method: str = ""
    num_queries: int = 0
    num_certified: int = 0  # rows that the first way certified; the others were searched again
    num_exhaustive: int = 0  # rows (masses of ties) for which every document near the k-th had to be scored


class Engine:
    """One rank's documents and the ways to search them."""

    def __init__(self, documents: Documents, k: int, method: str, tile_queries: int, stats: SearchStats):
        self.documents, self.k, self.method = documents, k, method
        self.tile_queries, self.stats = tile_queries, stats

    def search(
        self, queries_QD: Tensor, ceilings_Q: Tensor, exclude: Exclude | None
    ) -> tuple[Tensor, Tensor]:
        """(scores [Q, k], ids [Q, k]), exact."""
        scores, ids, certified = self.candidates(self.method, queries_QD, ceilings_Q, exclude)
        self.stats.num_certified += int(certified.sum())
        rows = (~certified).nonzero()[:, 0]
        for method in self.narrower():
            if not len(rows):
                return scores, ids
            again = self.candidates(method, *take(rows, queries_QD, ceilings_Q, exclude))
            scores[rows], ids[rows], certified = again
            rows = rows[~certified]
        if len(rows):
            scores[rows], ids[rows] = self.exhaustive(*take(rows, queries_QD, ceilings_Q, exclude))
            self.stats.num_exhaustive += len(rows)
        return scores, ids

    def narrower(self) -> list[str]:
        """The methods after the first, for queries whose ceiling stands in the bulk of the scores."""
        if self.documents.pass_once:
            return []
        if self.method == "int8" and self.documents.device.type in FILTERING:
            return ["bf16", "fp32"]
        return [] if self.method == "fp32" else ["fp32"]

    def candidates(
        self, method: str, queries_QD: Tensor, ceilings_Q: Tensor, exclude: Exclude | None
    ) -> Found:
        """By the fastest way that this device has for the method."""
        search = (method, self.documents, self.k, self.tile_queries)
        query = (queries_QD, ceilings_Q, exclude)
        filters = self.documents.device.type in FILTERING
        if method == "int8" and self.documents.device.type == "cpu" and not filters:
            return int8_cpu.search(*search[1:], *query)
        in_tiles = method == "fp32" or not filters or queries_QD.shape[1] % 16
        if self.documents.pass_once and in_tiles:
            return *self.exhaustive(*query), torch.ones(len(queries_QD), dtype=torch.bool)
        if self.documents.pass_once:
            return PassingCandidates(*search, *query).search()
        if in_tiles:
            return Candidates(*search, *query).search()
        filtered = FilteredCandidates(*search, *query)
        found = filtered.search()
        rows = filtered.overflowed.nonzero()[:, 0].cpu()
        if len(rows):  # documents in an order that keeps getting better, say
            again = Candidates(*search, *take(rows, *query)).search()
            for whole, part in zip(found, again, strict=True):
                whole[rows] = part
        return found

    def exhaustive(
        self, queries_QD: Tensor, ceilings_Q: Tensor, exclude: Exclude | None
    ) -> tuple[Tensor, Tensor]:
        """Every document whose fp32 bound allows it is scored: slow for many ties, right for any input."""
        (num_queries, hidden_size), device = queries_QD.shape, self.documents.device
        scores = torch.full((num_queries, self.k), -torch.inf, device=device)
        ids = torch.full((num_queries, self.k), -1, dtype=torch.int64, device=device)
        rounding, ceilings = Rounding("fp32", hidden_size), ceilings_Q.to(device)
        excluded = DeviceExclude(exclude, device)
        encode = METHODS["fp32"](hidden_size, device)
        query_rows = encode(queries_QD)
        for first, documents_nD in self.documents.blocks():
            block = encode(documents_nD)
            for tile in slices(num_queries, self.tile_queries):
                bound = pair_bound(query_rows[tile], block, rounding)
                upper = matmul(query_rows[tile], block, bound)
                lower = upper - 2 * bound[:, None]
                kth = scores[tile, -1]
                # Once k scores are known, the k-th best bound of a block adds little for what it costs.
                if upper.shape[1] >= self.k and bool(torch.isneginf(kth).any()):
                    sure = torch.where(upper < ceilings[tile, None], lower, -torch.inf)
                    at = excluded.positions(tile, first, sure.shape[1])
                    if at is not None:
                        sure[at] = -torch.inf
                    kth = torch.maximum(kth, sure.nan_to_num(-torch.inf).topk(self.k, dim=1).values[:, -1])
                alive = (upper >= kth[:, None]) & (lower < ceilings[tile, None])
                rows, columns = alive.nonzero(as_tuple=True)
                exact = torch.full_like(upper, torch.nan)
                exact[rows, columns] = pair_scores(queries_QD[tile], rows, documents_nD, columns)
                streaming_topk_(exact, ceilings[tile], scores[tile], ids[tile], first, *excluded.of(tile))
        return scores.cpu(), ids.cpu()


def take(rows: Tensor, queries_QD: Tensor, ceilings_Q: Tensor, exclude: Exclude | None) -> tuple:
    """These queries (rows on the CPU), with their ceilings and exclusions."""
    excluded = None if exclude is None else exclude.take(rows.numpy())
    return queries_QD[rows.to(queries_QD.device)], ceilings_Q[rows], excluded
