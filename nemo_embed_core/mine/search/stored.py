"""Rows of .npy files that need not fit into memory: plain reads, one block ahead of the work.

Nothing is mapped: pages of a mapped file count as this process's memory, and faults wait in the middle of the
work. Of a file that was not in the page cache before, what has been read leaves it again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.errors import UserError
from nemo_embed_core.files.page_cache import available_memory, is_cached

BEHIND = 8 << 20  # bytes that stay in the page cache behind the reader; what comes takes their pages


class _File(NamedTuple):
    path: Path
    first: int  # row of the whole
    rows: int
    offset: int  # byte of its first row


class StoredRows:
    """np.concatenate(arrays)[start:stop] of memory maps of .npy files, read in order; no page is touched.

    `bytes_read` and `seconds_waited` (of the work, for the disk) are sums over all passes so far.
    """

    def __init__(self, arrays: Sequence[np.memmap], start: int = 0, stop: int | None = None):
        self.arrays, self.dtype = arrays, arrays[0].dtype
        self.files: list[_File] = []
        count, hidden_size = 0, arrays[0].shape[1]
        for array in arrays:
            if array.ndim != 2 or not array.flags.c_contiguous or array.shape[1] != hidden_size:
                what = f"[N, {hidden_size}] of {self.dtype} in C order"
                raise UserError(f"{array.filename}: {array.dtype} {list(array.shape)} is not {what}")
            if array.dtype != self.dtype:
                raise UserError(f"{array.filename} is {array.dtype}, and {arrays[0].filename} {self.dtype}")
            self.files.append(_File(Path(str(array.filename)), count, len(array), _offset(array)))
            count += len(array)
        self.start, self.stop = start, count if stop is None else stop
        assert 0 <= self.start <= self.stop <= count, (start, stop, count)
        self.shape = (self.stop - self.start, hidden_size)
        self.bytes_read, self.seconds_waited = 0, 0.0

    @classmethod
    def open(cls, paths: Sequence[str | Path]) -> StoredRows:
        """Of the files' rows, one file after the other."""
        return cls([np.load(path, mmap_mode="r", allow_pickle=False) for path in paths])

    def part(self, start: int, stop: int) -> StoredRows:
        """Rows [start, stop): a rank's share, say."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        return StoredRows(self.arrays, self.start + start, self.start + stop)

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """(first row, `size` rows as they are stored, on the device); on a CPU they are good until the next.

        Two buffers: a thread fills one from the disk while the other is worked on.
        """
        on_gpu, dtype = device.type == "cuda", getattr(torch, self.dtype.name)
        starts = range(0, len(self), size)
        buffers = [
            torch.empty(min(size, len(self)), self.shape[1], dtype=dtype, pin_memory=on_gpu) for _ in range(2)
        ]
        copied = [torch.cuda.Event() if on_gpu else None for _ in range(2)]
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(_Reader(self))
            thread = stack.enter_context(ThreadPoolExecutor(1))

            def ahead(i: int) -> Future[Tensor]:
                if (event := copied[i % 2]) is not None:
                    event.synchronize()
                rows = buffers[i % 2][: min(size, len(self) - starts[i])]
                return thread.submit(reader.read, self.start + starts[i], rows)

            coming = ahead(0) if len(starts) else None
            for i, start in enumerate(starts):
                assert coming is not None
                began = time.perf_counter()
                rows = coming.result()
                self.seconds_waited += time.perf_counter() - began
                self.bytes_read += rows.nbytes
                # Into the other buffer, which who asks for this block is done with.
                coming = ahead(i + 1) if i + 1 < len(starts) else None
                if (event := copied[i % 2]) is not None:
                    rows = rows.to(device, non_blocking=True)
                    event.record()
                yield start, rows


class _Reader:
    """Bytes of the files into the caller's memory, by one thread and in the order of the files."""

    def __init__(self, rows: StoredRows):
        self.files, self.row_bytes = rows.files, rows.shape[1] * rows.dtype.itemsize
        self.file: _File | None = None
        self.fd, self.is_passing = -1, False
        self.begin = self.end = 0  # bytes of the file that were read; others may be another rank's

    def read(self, first: int, out_nD: Tensor) -> Tensor:
        """Rows first, first + 1, ... of all files."""
        buffer, end = out_nD.view(torch.uint8).numpy().data.cast("B"), first + len(out_nD)
        for file in self.files:
            low, high = max(first, file.first), min(end, file.first + file.rows)
            if low < high:
                part = buffer[(low - first) * self.row_bytes : (high - first) * self.row_bytes]
                self._read_bytes(file, file.offset + (low - file.first) * self.row_bytes, part)
        return out_nD

    def _read_bytes(self, file: _File, offset: int, out: memoryview) -> None:
        try:
            if file is not self.file:
                self.close()
                self.fd, self.file = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC), file
                self.is_passing, self.begin = not is_cached(self.fd), offset
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._drop(offset - BEHIND)
            while len(out):
                if (n := os.preadv(self.fd, [out], offset)) == 0:
                    what = "it was changed while it was read; embed its texts again"
                    raise UserError(f"{file.path} ended at byte {offset:,}: {what}")
                out, offset = out[n:], offset + n
                self.end = offset
        except OSError as error:
            raise UserError(f"{file.path} cannot be read: {error.strerror}") from None

    def _drop(self, end: int) -> None:
        """What was read up to this byte, from the page cache."""
        if self.is_passing and end > self.begin:  # a length of 0 would be all the rest
            os.posix_fadvise(self.fd, self.begin, end - self.begin, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self.fd >= 0:
            self._drop(self.end)
            os.close(self.fd)
        self.fd, self.file = -1, None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def beyond_memory(documents: Any, share: float = 0.5) -> Any:
    """Memory maps, or a corpus of them, as StoredRows where their files take more than `share` of the memory
    that is available; else unchanged."""
    arrays = getattr(documents, "arrays", [documents])
    if isinstance(documents, StoredRows) or not all(isinstance(array, np.memmap) for array in arrays):
        return documents
    if sum(array.nbytes for array in arrays) <= share * available_memory():
        return documents
    return StoredRows(arrays, getattr(documents, "start", 0), getattr(documents, "stop", None))


def _offset(array: np.memmap) -> int:
    """The byte of the file that the array begins at; it may be a part of a map."""
    whole = array
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    begins, ends = (x.__array_interface__["data"][0] for x in (whole, array))
    return whole.offset + ends - begins
