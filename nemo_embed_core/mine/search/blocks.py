"""One rank's documents, in blocks that pass through the device, and the exact scores of single pairs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.kernels.pair_scores import pair_scores

# Part of a block: documents in device memory whose scores are sorted before floors are known.
FIRST_BLOCK = 16
GATHERED = 8 << 20  # numbers of gathered rows at a time: 32 MiB


class Documents:
    """Rows of an array, a memory map, a tensor or a corpus; row i is the document first_id + i."""

    def __init__(self, rows: Any, first_id: int, block_size: int, device: torch.device):
        self.rows, self.first_id, self.block_size, self.device = rows, first_id, block_size, device
        self.is_on_device = isinstance(rows, Tensor) and rows.device == device  # no bus, no disk

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


def slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def blocks_of(documents: Any, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows as they are stored, on the device): two bytes a number are read rather than four."""
    blocks = slices(documents.shape[0], size)
    if isinstance(documents, Tensor):
        for rows in blocks:
            yield rows.start, documents[rows].to(device)
        return
    if device.type != "cuda":
        for rows in blocks:
            yield rows.start, fp32_rows(documents, rows, device)
        return
    # Two pinned buffers: the disk fills one while the GPU works on what came from the other. Nothing in the
    # tile loop waits for the device, so the host runs ahead until a buffer is still being copied.
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
    """The documents as one tensor on the GPU if they take at most `share` of its free memory; else unchanged.

    For several searches of the same documents: the bus carries them once. On a CPU a memory map will do.
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
    if isinstance(array, Tensor) and isinstance(index, np.ndarray):
        index = torch.from_numpy(index)
    rows = array[index]
    if not isinstance(rows, Tensor):
        rows = torch.from_numpy(np.array(rows, dtype=np.float32))
    return rows.to(device=device, dtype=torch.float32)
