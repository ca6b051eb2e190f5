"""A safetensors file written tensor by tensor and hashed meanwhile; the header of any. Imports no torch.

    u64 length, JSON {name: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}, bytes

The library writes only files whose tensors are all in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import fsync
from nemo_embed_core.files.strict_json import LFS_POINTER, lfs_pointer, parse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # by name, in the order of the bytes

# torch's name of a dtype -> the file's
DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64"}
PIECE_BYTES = 8 << 20  # hashed and written at a time
MAX_HEADER = 100 << 20  # bytes; the safetensors library's own limit


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def header_of(entries: Entries) -> tuple[bytes, int]:
    """The bytes before the tensors, which follow in the order of `entries`, and how many bytes those have."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        kind = DTYPES[dtype_name(dtype)]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins on a multiple of 8
    return len(text).to_bytes(8, "little") + text, end


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """name -> {"dtype", "shape", "data_offsets"}, and where the data begins. Its length is checked."""

    def broken(why: object) -> UserError:
        return UserError(f"{path} is not a readable safetensors file: {why}; get it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise lfs_pointer(path)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise broken(f"{size:,} bytes cannot hold a header of {length:,}")
            header = parse(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise broken(f"its header is damaged ({type(error).__name__}: {str(error)[:80]})") from None
    if 8 + length + end != size:
        raise broken(f"it has {size:,} bytes, its header says {8 + length + end:,}: cut short or changed")
    return tensors, 8 + length


def find_tensors(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """name -> (dtype, shape, first byte in the file), of a file that the library has opened, so checked."""
    import torch

    tensors, start = read_header(path)
    kinds = {text: getattr(torch, name) for name, text in DTYPES.items()}
    return {
        name: (kinds[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in tensors.items()
        if entry["dtype"] in kinds
    }


def start_writing_back(fd: int, begin: int, size: int) -> None:
    """Let the disk begin on what was just written, so that the fsync at the end has little to wait for."""
    # Linux first queues what is dirty there and then drops only what is clean: nothing, as it is on its way.
    os.posix_fadvise(fd, begin, size, os.POSIX_FADV_DONTNEED)


class SafetensorsWriter:
    """Writes one file tensor by tensor (or piece by piece), so that it is never held in memory.

    The bytes come in the order of `entries`. As a context manager it closes the file also when writing
    fails; the caller calls close() at the end of the block.
    """

    def __init__(self, path: Path, entries: Entries):
        header, self._missing = header_of(entries)
        self.path = path
        self._hash = hashlib.sha256()
        self._file = path.open("xb")
        try:
            self._put(header)
        except OSError:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # After a failed write the rest of the buffer cannot be written either; that error is on its way.
        with suppress(OSError):
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._hash.update(piece)
            begin = self._file.tell()
            self._file.write(piece)
            start_writing_back(self._file.fileno(), begin, len(piece))

    def write(self, tensor: Tensor) -> None:
        """The next bytes in order; the caller keeps to the order of `entries`."""
        import torch

        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        self._missing -= data.numel()
        self._put(data.numpy().data)

    def close(self) -> dict[str, Any]:
        """fsync; returns {"size", "sha256"} of what was written."""
        assert self._missing == 0, f"{self.path}: {self._missing} bytes of its tensors were not written"
        self._file.flush()
        fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return {"size": size, "sha256": self._hash.hexdigest()}
