"""Durable files: a streaming safetensors writer that hashes what it writes, and atomic publication of a folder.

The order that a crash at any point survives: write into a `.tmp-` folder, fsync every file, fsync the folder, rename,
fsync the parent; only then is anything reported as saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.config import UserError

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor (or piece by piece), so that no file is ever held in memory.

    `entries`: name -> (dtype, shape), in the order in which the bytes will come. The library writes whole files only.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
    ):
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, shape) in entries.items():
            start, end = end, end + dtype.itemsize * _numel(shape)
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins on a multiple of 8
        self.path = path
        self._missing = end
        self._hash = hashlib.sha256()
        self._file = path.open("xb")
        self._put(len(text).to_bytes(8, "little") + text)

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)

    def write(self, tensor: Tensor) -> None:
        """The next bytes in order; the caller keeps to the order of `entries`."""
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        self._missing -= data.numel()
        self._put(data.numpy().data)

    def close(self) -> dict[str, Any]:
        """fsync; returns {"size", "sha256"} of what was written."""
        assert self._missing == 0, f"{self.path}: {self._missing} bytes of its tensors were not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return {"size": size, "sha256": self._hash.hexdigest()}


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """A whole small file, fsynced."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(tmp: Path, final: Path) -> None:
    """Make a finished folder visible under its name: durable before and after the rename."""
    fsync_dir(tmp)
    if final.exists():  # the same step, saved again after a resume from an older checkpoint
        shutil.rmtree(final)
    os.rename(tmp, final)
    fsync_dir(final.parent)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and is removed when it does not.

    `final` must not exist, or be empty: results are never mixed with older ones.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists and is not empty; choose another output or delete it")
    final.parent.mkdir(parents=True, exist_ok=True)
    tmp = final.parent / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
        for file in tmp.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if final.exists():
            final.rmdir()
        publish(tmp, final)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
