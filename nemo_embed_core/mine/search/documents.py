"""One rank's documents, in blocks that pass through the device, and the exact scores of single pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.kernels.pair_scores import pair_scores
from nemo_embed_core.mine.search.blocks import blocks_of, fp32_rows
from nemo_embed_core.mine.search.stored import StoredRows

# Part of a block: documents in device memory whose scores are sorted before floors are known.
FIRST_BLOCK = 16
GATHERED = 8 << 20  # numbers of gathered rows at a time: 32 MiB


class Documents:
    """Rows of an array, a memory map, a tensor, a corpus or files; row i is the document first_id + i."""

    def __init__(self, rows: Any, first_id: int, block_size: int, device: torch.device):
        self.rows, self.first_id, self.block_size, self.device = rows, first_id, block_size, device
        self.is_on_device = isinstance(rows, Tensor) and rows.device == device  # no bus, no disk
        self.pass_once = isinstance(rows, StoredRows)  # a block that is gone costs another pass

    def __len__(self) -> int:
        return self.rows.shape[0]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(id of the first row, rows on the device)"""
        for start, rows in blocks_of(self.rows, self.block_size, self.device):
            yield self.first_id + start, rows

    def growing_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Of documents in memory: from a sixteenth of a block, each as large as all before, up to eight.

        A filtered block adds as many candidates as it is larger than what came before it, and costs a merge.
        """
        if not isinstance(self.rows, Tensor):
            yield from self.blocks()
            return
        start, size = 0, max(1, self.block_size // FIRST_BLOCK)
        while start < len(self):
            yield self.first_id + start, self.rows[start : start + size].to(self.device)
            start += size
            size = min(start, 8 * self.block_size)

    def gather(self, ids: Tensor) -> Tensor:
        """[P, D] fp32 rows of the documents with these ids."""
        return fp32_rows(self.rows, (ids - self.first_id).cpu().numpy(), self.device)

    def pair_scores(self, queries_QD: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """[P] the score of each pair (query rows[i], document ids[i])."""
        if self.is_on_device:
            return pair_scores(queries_QD, rows, self.rows, ids - self.first_id)
        step = max(1, GATHERED // queries_QD.shape[1])
        scores = []
        for r, i in zip(rows.split(step), ids.split(step), strict=True):
            scores.append(pair_scores(queries_QD, r, self.gather(i), torch.arange(len(i), device=i.device)))
        return torch.cat(scores)

    def scores(self, queries_QD: Tensor, ids_QC: Tensor) -> Tensor:
        """[Q, C] scores of each query's documents, NaN where the id is -1: one pass, no random read."""
        exact = torch.full(ids_QC.shape, torch.nan, device=self.device)
        for first, documents_nD in [(self.first_id, self.rows)] if self.is_on_device else self.blocks():
            here = (ids_QC >= first) & (ids_QC < first + len(documents_nD))
            rows, places = here.nonzero(as_tuple=True)
            exact[rows, places] = pair_scores(queries_QD, rows, documents_nD, ids_QC[rows, places] - first)
        return exact
