"""Vectors that were made elsewhere: rows of arrays, looked up by the texts that they belong to.

    precomputed_sides("embeddings/", dataset)                 # documents.npy and queries.npy, mapped
    Lookup(rows, texts, "embeddings", "cosine")               # a TextEncoder; rows: numpy, torch, CuPy

similarity: "cosine" brings rows to unit length, "dot" gives them as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.normal_form import exact_key
from nemo_embed_core.data.readers import is_beir, read_passages, source_files
from nemo_embed_core.errors import UserError

Similarity = Literal["cosine", "dot"]
BLOCK_BYTES = 64 << 20  # of an array read at once to hash it


def scaled(rows: np.ndarray, similarity: Similarity) -> np.ndarray:
    return unit(rows) if similarity == "cosine" else rows


def unit(rows: np.ndarray) -> np.ndarray:
    """rows / |rows| in fp32, each row by itself; a zero row gives NaN, which encode_corpus refuses."""
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rows / norms[:, None]).astype(np.float32)


def precomputed_sides(
    folder: str | Path, dataset: DatasetConfig | None = None, texts: bool = True
) -> list[tuple[np.ndarray, Iterable[str]]]:
    """[(documents, their texts), (queries, their texts)], mapped and not read; texts: they must be there."""
    folder = Path(folder)
    if not texts:
        return [(_open_npy(folder / f"{side}.npy"), ()) for side in ("documents", "queries")]
    sides: list[tuple[np.ndarray, Iterable[str]]] = []
    for side, beir in (("documents", 0), ("queries", 1)):
        rows = _open_npy(folder / f"{side}.npy")
        names = (folder / f"{side}.jsonl", folder / f"{side}.jsonl.gz")
        found = next((file for file in names if file.is_file()), None)
        if found is None and dataset is not None and is_beir(dataset):
            found = source_files(dataset)[beir]
        if found is None:
            raise UserError(
                f"{folder}: which texts do the rows of {side}.npy belong to? Put {side}.jsonl beside it, "
                "line i "
                '{"text": ...} for row i: launch/mine.py --write_texts FOLDER writes the texts that a run '
                "needs, "
                "to be embedded in that order"
            )
        sides.append((rows, _Counted(found, len(rows), folder / f"{side}.npy")))
    return sides


def _open_npy(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: precomputed embeddings are documents.npy and queries.npy in one folder"
        )
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable .npy file of numbers: {error}") from None
    if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(
            f"{path} holds {rows.dtype} {list(rows.shape)}: save [N, D] as float16, float32 or float64"
        )
    return rows


class _Counted:
    """The texts of a JSONL file, which must be as many as there are rows."""

    def __init__(self, path: Path, num_rows: int, array: Path):
        self.path, self.num_rows, self.array = path, num_rows, array

    def __iter__(self) -> Iterator[str]:
        count = 0
        for count, text in enumerate(read_passages(self.path), 1):  # noqa: B007
            yield text
        if count != self.num_rows:
            raise UserError(
                f"{self.array} has {self.num_rows} rows and {self.path} {count} lines: row i must be the "
                "embedding of line i"
            )


class Lookup:
    """Encodes by looking up: the rows of an array, keyed by their texts."""

    def __init__(self, rows: Any, texts: Iterable[str], name: str, similarity: Similarity):
        self.rows, self.name, self.similarity = as_rows(rows, name), name, similarity
        self.hidden_size = self.rows.shape[1]
        self.places: dict[bytes, int] = {}
        digest, count = hashlib.sha256(f"{tuple(self.rows.shape)}".encode()), 0
        for text in texts:
            key = exact_key(text)
            digest.update(key)
            self.places.setdefault(key, count)
            count += 1
        if count != len(self.rows):
            raise UserError(f"{name}: {len(self.rows)} rows and {count} texts: give one text per row")
        step = max(1, BLOCK_BYTES // (4 * self.hidden_size))
        for start in range(0, len(self.rows), step):
            digest.update(_numpy(self.rows[start : start + step]).tobytes())
        self.digest = digest.hexdigest() + ("" if similarity == "cosine" else f"-{similarity}")

    def encode(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512, side: str | None = None
    ) -> np.ndarray:
        places = [self.places.get(exact_key(text), -1) for text in texts]
        missing = [text for text, place in zip(texts, places, strict=True) if place < 0]
        if missing:
            more = f"and {len(missing) - 1} more of {len(texts)} texts"
            raise UserError(
                f"{self.name} have no row for {missing[0][:60]!r}... {more}: were they embedded from other "
                "data? launch/mine.py --write_texts FOLDER writes the texts that this run needs"
            )
        index = np.array(places, np.int64)
        is_torch = isinstance(self.rows, Tensor)
        rows = self.rows[torch.from_numpy(index).to(self.rows.device) if is_torch else index]
        return scaled(_numpy(rows), self.similarity)


def as_rows(array: Any, name: str = "embeddings") -> np.ndarray | Tensor:
    """A 2-D array of floats (numpy, torch, DLPack) as numpy or torch, without a copy; maps stay on disk."""
    if not isinstance(array, np.ndarray | Tensor):
        if not hasattr(array, "__dlpack__"):
            raise UserError(
                f"{name} are a {type(array).__name__}: give a numpy, torch or DLPack (CuPy, JAX) array"
            )
        array = torch.from_dlpack(array)
    is_float = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    if array.ndim != 2 or not is_float or 0 in array.shape:
        raise UserError(
            f"{name} have shape {tuple(array.shape)} and dtype {array.dtype}: they must be [rows, columns] "
            "of float16, float32 or float64"
        )
    return array


def _numpy(rows: np.ndarray | Tensor) -> np.ndarray:
    return rows.float().cpu().numpy() if isinstance(rows, Tensor) else np.ascontiguousarray(rows, np.float32)
