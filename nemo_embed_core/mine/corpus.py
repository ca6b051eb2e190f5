"""Texts encoded once into memory-mapped shards, so that no failure costs more than one shard.

    folder/00000.npy     [n, D] float16 or float32, readable by numpy.load
    folder/00000.json    model, texts, prompt, max_length, dtype, rows, sha256 of the .npy; and of texts that
                         fill max_length the indices and keys of their tokens, where the model tells them

Texts are read a few megabytes at a time, so a shard of long ones need not fit in memory. Both files are
written beside, synced and renamed, the sidecar last: a shard without a sidecar does not exist. A shard whose
sidecar says what this run would write, and whose bytes have the sha256 it gives, is not encoded again; one
that says something else is refused by name, never reused.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.data.vectors import Corpus, open_shards, read_sidecar
from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.encoders.sentence_transformer import pieces
from nemo_embed_core.errors import UserError, failpoint
from nemo_embed_core.files.durable import sha256_file, write_atomically
from nemo_embed_core.mine.progress import Progress

FORMAT = 1
UNIT_TOLERANCE = 1e-3  # of |row| - 1; bf16 activations, normalised in fp32, stay below 1e-6
BATCH_CHARACTERS = 4 << 20  # of the texts that are in memory at once


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work. gather(value) -> every rank's value, in rank order; all call it."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def span(self, count: int) -> tuple[int, int]:
        """This rank's contiguous share of count items."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size


def encode_corpus(
    texts: Sequence[str],
    embedder: TextEncoder,
    folder: Path,
    *,
    prompt: str = "",
    max_length: int = 512,
    dtype: str = "float16",
    unit: bool = True,
    shard_size: int = 16384,
    ranks: Ranks | None = None,
    name: str = "texts",
    log: Callable[[str], None] = print,
) -> Corpus:
    """np.concatenate([embedder.encode(texts[i : i + shard_size], prompt, max_length).astype(dtype) ...]).

    unit: rows of another length than 1 are refused; else only rows that are zero, or not finite in dtype.
    With several ranks, rank r encodes shards r, r + size, ... of one shared folder; all return the whole.
    """
    if not len(texts):
        raise UserError(f"{folder}: there are no {name} to encode")
    if dtype not in ("float16", "float32"):
        raise UserError(f"dtype={dtype} of the {name} embeddings must be float16 or float32")
    ranks = ranks or Ranks()
    folder.mkdir(parents=True, exist_ok=True)
    num_shards = -(-len(texts) // shard_size)
    mine, reused = range(ranks.rank, num_shards, ranks.size), 0
    sizes = [min(shard_size, len(texts) - i * shard_size) for i in mine]
    progress = Progress("encoded", name, sum(sizes), log, shown=ranks.rank == 0)
    for i, size in zip(mine, sizes, strict=True):
        first, path = i * shard_size, folder / f"{i:05d}.npy"
        shape = [size, embedder.hidden_size]
        sidecar: dict[str, Any] = {
            "format": FORMAT,
            "model": embedder.digest,
            "texts": texts_digest(texts[j] for j in range(first, first + size)),
            "prompt": prompt,
            "max_length": max_length,
            "dtype": dtype,
            "shape": shape,
        }
        parts = pieces((texts[j] for j in range(first, first + size)), BATCH_CHARACTERS)
        cuts = _Cuts(embedder, prompt, max_length) if hasattr(embedder, "tokenize") else None
        if _is_done(folder, i, sidecar, log):
            reused += 1
            progress.skip(size)
            have = read_sidecar(path) or {}
            # Of a run from before it was counted.
            if cuts is not None and "truncated" not in have:
                for part in parts:
                    cuts.add(part)
                _publish_sidecar(path, have | cuts.found())
            continue
        once, encoded = hasattr(embedder, "encode_tokens"), []
        for part in parts:
            if cuts is not None:
                cuts.add(part, keep=once)
            if not once:
                encoded.append(np.asarray(embedder.encode(part, prompt, max_length)))
        if once and cuts is not None:
            encoded.append(np.asarray(embedder.encode_tokens(cuts.tokens)))  # type: ignore[attr-defined]
        rows = _checked(np.concatenate(encoded), texts, first, shape, dtype, unit)
        failpoint(f"{name}.encoded", i)
        publish(path, _npy_bytes(rows), sidecar | (cuts.found() if cuts is not None else {}))
        progress.step(size)
    progress.close()
    if reused and ranks.rank == 0:
        log(f"{reused} of {len(mine)} shards of {name} were already there")
    ranks.gather(None)  # a shard is opened only when every rank has published its own
    return open_shards(folder, num_shards)


@dataclass(frozen=True)
class Truncation:
    """How many texts of a corpus lost tokens (None: not known), and which fill the length with what."""

    num_truncated: int | None
    numbers: list[int]
    keys: list[bytes]


def read_truncation(folder: Path, num_shards: int) -> Truncation:
    total, numbers, keys = 0, [], []
    start = 0
    for i in range(num_shards):
        sidecar = read_sidecar(folder / f"{i:05d}.npy") or {}
        if "truncated" not in sidecar:
            return Truncation(None, [], [])
        total += sidecar["truncated"]
        numbers += (start + np.frombuffer(base64.b64decode(sidecar["full"]), "<i4")).tolist()
        found = base64.b64decode(sidecar["full_keys"])
        keys += [found[at : at + 16] for at in range(0, len(found), 16)]
        start += sidecar["shape"][0]
    return Truncation(total, numbers, keys)


def texts_digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class _Cuts:
    """Truncation of a shard's texts, as its sidecar has it; texts with one key are one to the model."""

    def __init__(self, embedder: Any, prompt: str, max_length: int):
        self.embedder, self.prompt, self.max_length = embedder, prompt, max_length
        self.tokens: list[np.ndarray] = []
        self.count = self.truncated = 0
        self.full: list[int] = []
        self.keys = bytearray()

    def add(self, part: list[str], keep: bool = False) -> None:
        tokens, truncated = self.embedder.tokenize(part, self.prompt, self.max_length)
        self.truncated += truncated
        for i, ids in enumerate(tokens, self.count):
            if len(ids) >= self.max_length:
                self.full.append(i)
                self.keys += hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()
        self.count += len(part)
        if keep:
            self.tokens += tokens

    def found(self) -> dict[str, Any]:
        full = base64.b64encode(np.array(self.full, "<i4").tobytes()).decode()
        return {"truncated": self.truncated, "full": full, "full_keys": base64.b64encode(self.keys).decode()}


def _checked(
    rows: np.ndarray, texts: Sequence[str], first: int, shape: list[int], dtype: str, unit: bool
) -> np.ndarray:
    """rows as dtype, when every one is a vector that may be searched."""
    assert list(rows.shape) == shape, f"the embedder returned {rows.shape} for {shape}"
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    good = np.abs(norms - 1) <= UNIT_TOLERANCE if unit else (norms > 0) & np.isfinite(norms)  # both: not NaN
    bad = np.flatnonzero(~good)
    if len(bad):
        i = int(bad[0])
        what = "unit vectors" if unit else "finite vectors other than 0"
        raise UserError(
            f"{len(bad)} of {len(rows)} embeddings are not {what}; the first is text {first + i} "
            f"({texts[first + i][:60]!r}...) with norm {norms[i]:.4g}. The model is broken or overflows "
            "(try --precision fp32 and look at the last lines of its metrics.jsonl), or the row of a "
            "precomputed embedding is"
        )
    with np.errstate(over="ignore"):
        stored = rows.astype(dtype)
    if not np.isfinite(stored).all():
        most = f"{np.abs(rows).max():.4g}"
        raise UserError(f"embeddings have values up to {most}, which {dtype} cannot hold: --dtype float32")
    return stored


# ------------------------------------------------------------------------------------------ published files


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def publish(path: Path, data: bytes, sidecar: dict[str, Any]) -> None:
    """data at path and {**sidecar, sha256} beside it, or, after a crash at any point, no sidecar."""
    write_atomically(path, data)
    _publish_sidecar(path, {**sidecar, "sha256": hashlib.sha256(data).hexdigest()})


def _publish_sidecar(path: Path, sidecar: dict[str, Any]) -> None:
    text = json.dumps(sidecar, indent=1, ensure_ascii=False)
    write_atomically(path.with_suffix(".json"), text.encode())


def _is_done(folder: Path, index: int, want: dict[str, Any], log: Callable[[str], None]) -> bool:
    path = folder / f"{index:05d}.npy"
    have = read_sidecar(path)
    if have is None:
        if path.with_suffix(".json").exists():
            log(f"{path.with_suffix('.json')} is damaged: its shard is encoded again")
        return False
    for key, value in want.items():
        if have.get(key) != value:
            how = {
                "texts": "of other texts (or other options that choose them)",
                "format": "in another format",
            }
            what = how.get(key, f"with {key} {have.get(key)!r}, and this run has {value!r}")
            raise UserError(
                f"{path} was encoded {what}. Shards of another model or data are never reused: delete the "
                f"folder {folder} to encode again, or choose another output"
            )
    if path.exists() and sha256_file(path) == have.get("sha256"):
        return True
    log(f"{path} is damaged or missing (its sha256 is not that of {index:05d}.json): it is encoded again")
    return False
