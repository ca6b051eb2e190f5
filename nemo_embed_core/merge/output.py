"""The files of the merged weights: safetensors written at any place by any thread."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nemo_embed_core.files.durable import fsync, write_bytes, writing
from nemo_embed_core.files.safetensors import header_of, start_writing_back

SHARD_BYTES = 5_000_000_000
Shapes = Mapping[str, tuple[int, ...]]


def weight_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """sum(prod(shape)) * itemsize, and 200 of the header for each tensor."""
    return _value_bytes(shapes, dtype) + 200 * len(shapes)


def _value_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


class Output:
    """model.safetensors, or shards of at most SHARD_BYTES and their index; fsynced by finish()."""

    def __init__(self, folder: Path, shapes: Shapes, dtype: torch.dtype):
        self.folder, self.shapes, self.dtype = folder, shapes, dtype
        self._place: dict[str, tuple[int, int]] = {}  # name -> file descriptor, first byte
        self._files: dict[str, int] = {}
        self.total = _value_bytes(shapes, dtype)
        self._left = self.total  # bytes; also read by finish() alone, so += under a lock
        self._lock = threading.Lock()
        shards = _assign(shapes, dtype)
        self._weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, 1):
            part = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"model{part}.safetensors"
            header, _ = header_of({n: (dtype, shapes[n]) for n in names})
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = self._files[file] = os.open(folder / file, flags, 0o644)
            self._put(fd, memoryview(header), 0)
            end = len(header)
            for name in names:
                self._place[name], self._weight_map[name] = (fd, end), file
                end += torch.Size(shapes[name]).numel() * dtype.itemsize

    def write(self, name: str, first_row: int, values: Tensor) -> None:
        """Rows first_row, first_row + 1, ... of the tensor, in the output's dtype."""
        fd, start = self._place[name]
        data = values.view(torch.uint8).numpy().data
        at = start + first_row * torch.Size(self.shapes[name][1:]).numel() * self.dtype.itemsize
        with self._lock:
            self._left -= len(data)
        self._put(fd, data, at)
        start_writing_back(fd, at, len(data))

    def _put(self, fd: int, data: memoryview, at: int) -> None:
        with writing(self.folder, self.total, "the merged model"):
            while len(data):
                n = os.pwrite(fd, data, at)
                data, at = data[n:], at + n

    def finish(self) -> None:
        assert self._left == 0, f"{self.folder}: {self._left} bytes were not written"
        for fd in self._files.values():
            fsync(fd)
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self._weight_map}
            write_bytes(self.folder / "model.safetensors.index.json", json.dumps(index, indent=1).encode())

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._files.values():
            os.close(fd)


def _assign(shapes: Shapes, dtype: torch.dtype) -> list[list[str]]:
    """Names of the tensors of each shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        n = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + n > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    return shards
