"""Blocks of an array's rows on their way through the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.mine.search.stored import StoredRows


def slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def blocks_of(documents: Any, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows as they are stored, on the device): two bytes a number are read rather than four."""
    if isinstance(documents, StoredRows):
        yield from documents.blocks(size, device)
        return
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
    if device.type != "cuda" or isinstance(documents, Tensor | StoredRows) or documents.shape[0] == 0:
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
