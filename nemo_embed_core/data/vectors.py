"""Vectors of texts in files, as mining keeps them beside its output: rows, and which text has which.

    work/documents/00000.npy, .json        shards of rows and their sidecars      (mine/corpus.py writes them)
    work/keys/documents.keys               16 bytes a text (normal_form.exact_key), ascending, each text once
    work/keys/documents.rows               int64: its row; of equal texts that of the first
    work/keys/documents.json               digests of the shards' texts: the keys belong to these shards
    work/queries/, work/keys/queries.*     likewise; a row's own instruction is part of its query's text

    vectors = Vectors(work)
    vectors.documents.find(keys)           [n] int64 rows, -1 where a text has none
    vectors.documents.rows[ids]            [n, D], read from memory maps: nothing here is in memory

A key is found by bisection in a file that is mapped, so that 100 million texts take no memory of a rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.data.normal_form import exact_key
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.files.strict_json import parse

SIDES = ("queries", "documents")
KEYS = np.dtype("S16")  # compared with all 16 bytes: a zero at the end is no end where all are equally long
ROWS = np.dtype("<i8")


class Corpus:
    """np.concatenate(arrays) without the copy: .shape, [a:b] and [ids], read from memory maps on touch."""

    def __init__(self, arrays: list[np.ndarray], start: int = 0, stop: int | None = None):
        self.arrays = arrays
        self.ends = np.cumsum([len(a) for a in arrays])
        self.start, self.stop = start, int(self.ends[-1]) if stop is None else stop
        self.shape = (self.stop - self.start, arrays[0].shape[1])
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def part(self, start: int, stop: int) -> Corpus:
        """Rows [start, stop) as a corpus: nothing is read."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        return Corpus(self.arrays, self.start + start, self.start + stop)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "only contiguous slices"
            pieces = []
            for array, end in zip(self.arrays, self.ends, strict=True):
                first = int(end) - len(array)
                a, b = max(self.start + start, first) - first, min(self.start + stop, int(end)) - first
                if a < b:
                    pieces.append(array[a:b])
            if not pieces:
                return np.empty((0, self.shape[1]), self.dtype)
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        ids = np.asarray(index)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < len(self)), "row ids outside of the corpus"
        ids = ids + self.start
        rows = np.empty((len(ids), self.shape[1]), self.dtype)
        shard = np.searchsorted(self.ends, ids, side="right")
        for i in np.unique(shard):
            here = shard == i
            rows[here] = self.arrays[i][ids[here] - (self.ends[i] - len(self.arrays[i]))]
        return rows


def open_shards(folder: Path, num_shards: int) -> Corpus:
    """Of a folder whose shards are all there."""
    paths = [folder / f"{i:05d}.npy" for i in range(num_shards)]
    return Corpus([np.load(path, mmap_mode="r", allow_pickle=False) for path in paths])


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The JSON object beside a published file; None when there is none or it is damaged."""
    try:
        sidecar = parse(path.with_suffix(".json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return sidecar if isinstance(sidecar, dict) else None


# ------------------------------------------------------------------------------------------ keys


def write_keys(work: Path, **sides: Iterable[str]) -> None:
    """work/keys/ of queries=, documents=: the texts of shards that are all there, in their order. What is
    there of them already is left. 56 bytes a text while they are sorted."""
    for side, texts in sides.items():
        _write_keys(work, side, texts)


def _write_keys(work: Path, side: str, texts: Iterable[str]) -> None:
    digests = [sidecar["texts"] for sidecar in _sidecars(work / side)]
    proof = work / "keys" / f"{side}.json"
    if (read_sidecar(proof) or {}).get("texts") == digests:
        return
    found = bytearray()
    for text in texts:
        found += exact_key(text)
    keys, rows = np.unique(np.frombuffer(found, KEYS), return_index=True)
    proof.parent.mkdir(exist_ok=True)
    write_atomically(proof.with_suffix(".keys"), keys.tobytes())
    write_atomically(proof.with_suffix(".rows"), rows.astype(ROWS).tobytes())
    write_atomically(proof, json.dumps({"texts": digests, "count": len(keys)}).encode())


def _sidecars(folder: Path) -> list[dict[str, Any]]:
    """Of the shards 0, 1, ... that have one."""
    found: list[dict[str, Any]] = []
    while (sidecar := read_sidecar(folder / f"{len(found):05d}.npy")) is not None:
        found.append(sidecar)
    return found


class Side:
    """rows: Corpus [n, D]; models: the digests of what encoded them, one."""

    def __init__(self, work: Path, side: str):
        sidecars, proof = _sidecars(work / side), read_sidecar(work / "keys" / f"{side}.json")
        if not sidecars:
            raise UserError(
                f"{work} holds no vectors of {side}: give the folder that mining keeps beside its output, "
                "<output>.work, or its teacher-1/ for the second of several models"
            )
        if proof is None or proof.get("texts") != [sidecar["texts"] for sidecar in sidecars]:
            what = "are not there" if proof is None else "are of other shards"
            raise UserError(
                f"{work}/keys/{side}.*, which say whose vectors are in {work / side}, {what}: delete the "
                "output and start the same mining again, which writes them and encodes nothing again"
            )
        files = [work / "keys" / f"{side}.{what}" for what in ("keys", "rows")]
        for file, dtype in zip(files, (KEYS, ROWS), strict=True):
            size, want = file.stat().st_size if file.is_file() else 0, proof["count"] * dtype.itemsize
            if size != want:
                raise UserError(
                    f"{file} has {size} bytes instead of {want}: delete {work / 'keys'}, mine again"
                )
        self._keys, self._places = (
            np.memmap(file, dtype, "r") for file, dtype in zip(files, (KEYS, ROWS), strict=True)
        )
        shapes = {tuple(sidecar["shape"][1:]) for sidecar in sidecars}
        self.models = {str(sidecar["model"]) for sidecar in sidecars}
        try:
            self.rows = open_shards(work / side, len(sidecars))
        except (OSError, ValueError) as error:
            raise UserError(f"{work / side} cannot be read: {error}; mine again") from None
        if len(self.rows) != sum(sidecar["shape"][0] for sidecar in sidecars) or len(shapes) > 1:
            raise UserError(f"{work / side}: the shards are not what their sidecars say; mine again")

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[n] int64 rows of the texts with these keys (S16), -1 where there is none."""
        at = np.searchsorted(self._keys, keys)
        at[at == len(self._keys)] = 0
        return np.where(self._keys[at] == keys, self._places[at], -1)


class Vectors:
    """Both sides of a folder, of one model. UserError where it is none, or one that was interrupted."""

    def __init__(self, work: str | Path):
        self.folder = Path(work)
        self.queries, self.documents = (Side(self.folder, side) for side in SIDES)
        widths = {side.rows.shape[1] for side in (self.queries, self.documents)}
        if len(widths) > 1:
            raise UserError(f"{work}: queries and documents have {sorted(widths)} columns: of two models")
        self.width: int = widths.pop()
        self.models = sorted(self.queries.models | self.documents.models)
