"""What int8_cpu.py keeps of the documents that passed: candidates with bounds, or the k best with scores."""

# C candidates kept · k asked for · n documents of a block

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_embed_core.kernels.pair_scores import pair_scores
from nemo_embed_core.mine.search.streaming import insert_

if TYPE_CHECKING:
    from nemo_embed_core.mine.search.int8_cpu import Tile

SCORED = 32768  # pairs that are scored, and put into their places, at a time


class CandidateBuffer:
    """Each query's candidates, unsorted, and its floor: a lower bound of its k-th best score.

    A document whose upper bound is below the floor is out for good, and is not counted as dropped.
    """

    def __init__(self, num_queries: int, k: int, num_kept: int, ceilings: Tensor):
        self.k, self.num_kept, self.ceilings = k, num_kept, ceilings
        self.keys = torch.full((num_queries, 4 * num_kept), -torch.inf)  # upper bounds
        self.ids = torch.full((num_queries, 4 * num_kept), -1, dtype=torch.int64)
        self.counts = torch.zeros(num_queries, dtype=torch.int64)
        self.floor = torch.full((num_queries,), -torch.inf)
        self.dropped = torch.full((num_queries,), -torch.inf)  # the best upper bound that had to go
        self.bound = torch.zeros(num_queries)  # the widest so far: lower bound = key - 2 bound

    def add(self, tile: Tile, at: Tensor, rows: Tensor, columns: Tensor, keys: Tensor) -> None:
        """at: the queries; rows ascend and index them, at most 3 num_kept each."""
        ids = columns + tile.first
        counts = torch.bincount(rows, minlength=len(at))
        if int((self.counts[at] + counts).max()) > self.keys.shape[1]:
            self.keep_best(at)
        position = self.counts[at][rows] + torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        self.keys[at[rows], position], self.ids[at[rows], position] = keys, ids
        self.counts[at] += counts

    def keep_best(self, at: Tensor) -> None:
        keys, order = self.keys[at].topk(self.num_kept + 1, dim=1)
        self.dropped[at] = torch.maximum(self.dropped[at], keys[:, -1])
        ids = self.ids[at].gather(1, order)
        self.keys[at] = torch.nn.functional.pad(keys[:, :-1], (0, 3 * self.num_kept), value=-torch.inf)
        self.ids[at, : self.num_kept] = ids[:, :-1]
        self.counts[at] = self.counts[at].clamp(max=self.num_kept)

    def best_of(self, keys: Tensor, at: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, columns, keys) of the keys of a whole block for the queries `at` that have a place."""
        columns = torch.arange(keys.shape[1]).expand_as(keys)
        if keys.shape[1] > self.num_kept:
            keys, columns = keys.topk(self.num_kept + 1, dim=1)
            self.dropped[at] = torch.maximum(self.dropped[at], keys[:, -1])
            keys, columns = keys[:, :-1], columns[:, :-1]
        rows, place = torch.isfinite(keys).nonzero(as_tuple=True)
        return rows, columns[rows, place], keys[rows, place]

    def raise_floor(self, tile: slice) -> None:
        """The k-th best lower bound of the documents that are surely below the ceiling."""
        keys = self.keys[tile, : int(self.counts[tile].max())]
        if keys.shape[1] >= self.k:
            sure = torch.where(keys < self.ceilings[tile, None], keys, -torch.inf)
            floor = sure.topk(self.k, dim=1).values[:, -1] - 2 * self.bound[tile]
            self.floor[tile] = torch.maximum(self.floor[tile], floor)


class ScoredBuffer:
    """The k best so far, scored exactly while their block is in memory: documents that pass once.

    Nothing that a bound allows is dropped, so every answer is certified, and the floor is the k-th score.
    """

    def __init__(self, num_queries: int, k: int, num_kept: int, ceilings: Tensor):
        self.k, self.num_kept, self.ceilings = k, num_kept, ceilings
        self.scores = torch.full((num_queries, k), -torch.inf)
        self.best_ids = torch.full((num_queries, k), -1, dtype=torch.int64)
        self.floor = torch.full((num_queries,), -torch.inf)
        self.bound = torch.zeros(num_queries)

    def add(self, tile: Tile, at: Tensor, rows: Tensor, columns: Tensor, keys: Tensor) -> None:
        for part in torch.arange(len(rows)).split(SCORED):
            here, there = at[rows[part]], columns[part]
            exact = pair_scores(tile.x_qD, here - tile.rows.start, tile.block.x_nD, there)
            # What ties with the k-th came later and has a higher id.
            enters = (exact > self.scores[here, -1]) & (exact < self.ceilings[here]) & torch.isfinite(exact)
            changed, row = here[enters].unique_consecutive(return_inverse=True)
            scores, ids = self.scores[changed], self.best_ids[changed]
            insert_(exact[enters], row, there[enters] + tile.first, scores, ids)
            self.scores[changed], self.best_ids[changed] = scores, ids
            self.floor[changed] = torch.maximum(self.floor[changed], scores[:, -1])

    def best_of(self, keys: Tensor, at: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        floor = self.floor[at]
        if keys.shape[1] >= self.k:  # the k-th lower bound of those that are surely below the ceiling
            sure = torch.where(keys < self.ceilings[at, None], keys - 2 * narrow, -torch.inf)
            floor = torch.maximum(floor, sure.topk(self.k, dim=1).values[:, -1])
        rows, columns = (torch.isfinite(keys) & (keys >= floor[:, None])).nonzero(as_tuple=True)
        return rows, columns, keys[rows, columns]

    def raise_floor(self, tile: slice) -> None:
        """It is the k-th score at any time."""
