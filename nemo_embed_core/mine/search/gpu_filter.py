"""Candidates on a GPU: the GEMM compares its tile with each query's floor and writes few scores.

After a first block the best C keys are known. Of later blocks few can enter, and writing a tile of scores to
read it back takes as long as its products. So the kernel (kernels/filter_scores.py) appends the keys between
floor and limit to a candidate list per query, and the lists are merged into the best C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.kernels.filter_scores import filter_scores
from nemo_embed_core.kernels.pair_scores import pair_scores
from nemo_embed_core.mine.search.bounds import Rows, check_norms, split_bound
from nemo_embed_core.mine.search.candidates import Candidates
from nemo_embed_core.mine.search.streaming import merge_lists_

RESCORED_FROM = 131072  # documents after which candidates are scored on the way, and at each doubling
LIST = 1024  # places of a query's list beyond C


class FilteredCandidates(Candidates):
    """As Candidates; `overflowed` [Q]: queries whose full list lost candidates: their results are void."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.overflowed = torch.zeros(len(self.queries_QD), dtype=torch.bool, device=self.keys.device)
        self.rescored_at = RESCORED_FROM

    def search(self) -> tuple[Tensor, Tensor, Tensor]:
        blocks = self.documents.growing_blocks()
        self.add_tiles(*next(blocks))
        for first, documents_nD in blocks:
            self.add_filtered(first, documents_nD)
        return self.result()

    def add_filtered(self, first: int, documents_nD: Tensor) -> None:
        block, bound, limit = self.encode_block(documents_nD)
        num_seen = first - self.documents.first_id
        rescore = self.method == "int8" and self.documents.is_on_device and num_seen >= self.rescored_at
        if rescore:  # by bounds alone twice as many survive
            self.rescored_at = 2 * num_seen
        self.raise_floor(by_scores=rescore)
        # A key below the floor, or below the last candidate, cannot be among the k best.
        least = torch.maximum(self.keys[:, -1], self.floor)
        keys, columns, counts = self.survivors(block, bound, limit, least)
        everyone = slice(0, len(self.queries_QD))
        merge_lists_(keys, columns, counts, self.keys, self.ids, first, *self.excluded.of(everyone))

    def survivors(
        self, block: Rows, bound: Tensor, limit: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(keys [Q, L], columns [Q, L], counts [Q]) of the keys from `least` on and below the limit."""
        # A free place takes any finite key: the lowest finite number and not -inf.
        enters = least.clamp(min=torch.finfo(torch.float32).min)
        add, slope, spread = bound, None, None
        if self.method == "int8":  # bf16 documents have no residual, others nearly the same
            (add, slope), spread = split_bound(self.rows, block, self.rounding), block.residual
        length = LIST + self.keys.shape[1]
        rows_and_limits = (self.rows.values, block.values, enters, limit, length)
        keys, columns, counts = filter_scores(
            *rows_and_limits, self.rows.scale, block.scale, add, slope, spread
        )
        self.overflowed |= counts > length
        return keys, columns, counts


class PassingCandidates(FilteredCandidates):
    """Each candidate is scored while its block is on the device: documents that pass once.

    Of the first block the best C are candidates, of later ones all that reach the k-th score so far.
    """

    def search(self) -> tuple[Tensor, Tensor, Tensor]:
        blocks = self.documents.blocks()
        first, documents_nD = next(blocks)
        self.add_tiles(first, documents_nD)
        most_dropped = self.keys[:, -1]
        self.scores = torch.full((len(self.keys), self.k), -torch.inf, device=self.keys.device)
        self.best_ids = torch.full_like(self.scores, -1, dtype=torch.int64)
        columns, found = (self.ids - first).to(torch.int32), self.ids >= 0
        self.add_scored(first, documents_nD, columns, found)
        for first, documents_nD in blocks:
            block, bound, limit = self.encode_block(documents_nD)
            _, columns, counts = self.survivors(block, bound, limit, self.scores[:, -1])
            found = torch.arange(columns.shape[1], device=counts.device) < counts[:, None]
            self.add_scored(first, documents_nD, columns, found)
        check_norms(self.largest_norm, self.rows.norm.max())
        certified = torch.isneginf(most_dropped) | (most_dropped < self.scores[:, -1])
        certified &= ~self.overflowed
        return self.scores.cpu(), self.best_ids.cpu(), certified.cpu()

    def add_scored(self, first: int, documents_nD: Tensor, columns_QL: Tensor, found_QL: Tensor) -> None:
        """The k best of themselves and of those listed that are found."""
        rows, places = found_QL.nonzero(as_tuple=True)
        exact = torch.full(columns_QL.shape, -torch.inf, device=columns_QL.device)
        scores = pair_scores(self.queries_QD, rows, documents_nD, columns_QL[rows, places].long())
        exact[rows, places] = torch.where(scores < self.ceilings[rows], scores, -torch.inf)
        counts = torch.full_like(columns_QL[:, 0], columns_QL.shape[1])
        everyone = self.excluded.of(slice(0, len(self.queries_QD)))
        merge_lists_(exact, columns_QL, counts, self.scores, self.best_ids, first, *everyone)
