"""Weights of a Hugging Face folder, a checkpoint or run of ours, or a seed; and how they fill a model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nemo_embed_core.checkpoint.adapter import AdaptedReader, Adapter, adapter_of
from nemo_embed_core.checkpoint.hf_folder import open_folder
from nemo_embed_core.checkpoint.hf_reader import HFReader, Stored
from nemo_embed_core.checkpoint.manifest import (
    PROJECTION,
    CheckpointError,
    check_digest,
    is_state,
    parameter_of,
    verify_checkpoint,
)
from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.checkpoint.rounding import round_once
from nemo_embed_core.checkpoint.source import Source, resolve, say_note
from nemo_embed_core.config import LoraConfig, ModelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.page_cache import is_cached
from nemo_embed_core.files.safetensors import find_tensors
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.kernels.adamw import from_fp32_
from nemo_embed_core.model.hf_config import text_part
from nemo_embed_core.model.llama import initial_weight
from nemo_embed_core.model.spec import (
    FAMILIES,
    hf_rows,
    hf_shapes,
    parameter_shapes,
    tp_dim,
    tp_unit,
    trained_shapes,
)
from nemo_embed_core.parallel.boxes import Box, local_box, unpadded
from nemo_embed_core.parallel.fsdp import plain_name
from nemo_embed_core.parallel.grad_norm import local_tensor


class BoxReader(Protocol):
    def read_box(self, name: str, box: Box) -> Tensor: ...


class FileReader(BoxReader, Protocol):
    """Of weights in files: HFReader or Reader."""

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Of a checkpoint of ours."""

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """Hugging Face names and where rows of these tensors stand; no row is left out or comes twice."""


@dataclass(frozen=True)
class Weights:
    """The shape of a model, boxes of its parameters, its tokenizer's folder and the digest of its values."""

    model: ModelConfig
    reader: FileReader
    folder: Path
    dtype: torch.dtype  # of the stored values
    digest: str  # changes when a weight changes; "" when opened without hashing
    files: Mapping[str, str] = field(default_factory=dict)  # weight files -> sha256, where it is known

    @property
    def name(self) -> str:
        """run/step-00000500 or the folder's own name: no path of this machine goes into a model card."""
        parts = self.folder.absolute().parts
        return parts[-1] if self.reader.manifest is None else "/".join(parts[-2:])

    @property
    def adapted(self) -> AdaptedReader | None:
        """The reader, of a checkpoint of LoRA adapters, which is folded into its base."""
        return self.reader if isinstance(self.reader, AdaptedReader) else None


class RandomReader:
    """Boxes of freshly initialised weights: a function of (seed, name), the same under every layout."""

    def __init__(self, config: ModelConfig, seed: int):
        self.config, self.seed = config, seed
        self.shapes = parameter_shapes(config)

    def read_box(self, name: str, box: Box) -> Tensor:
        whole = initial_weight(name, self.shapes[name], self.seed, self.config.initializer_range)
        return whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))]


def read_model_config(path: str) -> ModelConfig:
    """The shape alone, without touching a weight: for checks that must come before any process group."""
    return _llama(resolve(path), base=True)[0]


def _llama(source: Source, base: bool) -> tuple[ModelConfig, Mapping[str, tuple[str, str]]]:
    """Shape and tensors. base: of any Llama; else of one that is run as we run it."""
    if source.model is not None:
        return source.model, source.where or {}
    if source.kind == "precomputed":
        raise UserError(
            f"{source.folder} holds embeddings and no model; give a Hugging Face folder, a checkpoint or a "
            "run"
        )
    if not base:
        raise UserError(
            f"{source.folder} is a sentence-transformers model with {source.foreign}; its weights as we run "
            "them would give other embeddings: train them as one first, or delete "
            "modules.json if it is out of date"
        )
    opened = open_folder(source.folder)
    return opened.model, opened.where


def _is_causal(folder: Path) -> bool:
    """Whether transformers and servers run it causally because config.json says nothing of it."""
    raw = text_part(read_object(folder / "config.json"))
    is_said = isinstance(raw.get("is_causal"), bool) or raw.get("use_bidirectional_attention") is True
    return FAMILIES[raw["model_type"]].is_causal and not is_said


def open_weights(path: str | Path | Source, hashed: bool = True, base: bool = False) -> Weights:
    """Names and shapes are checked; of a checkpoint of ours the sha256 of every file with weights too.

    hashed=False: nothing but headers is read; who reads the rest compares `Rows.sha256` itself.
    base=True: training starts from them, so that how the folder pools does not matter.
    """
    source = resolve(path)
    folder, (config, where) = source.folder, _llama(source, base)
    if source.kind == "checkpoint":
        manifest = verify_checkpoint(folder, weights_only=True, hashed=hashed)
        reader, adapter = Reader(folder, manifest), adapter_of(manifest)
        expected = trained_shapes(config, adapter.lora if adapter is not None else LoraConfig())
        known = {*expected, PROJECTION}
        states = [n for n in manifest["tensors"] if is_state(n) and parameter_of(n) in known]
        # An optimizer's, of whichever parameters and shapes: they are no weights.
        reader.check(expected | {n: tuple(manifest["tensors"][n]["shape"]) for n in states})
        files = {n: f["sha256"] for n, f in manifest["files"].items() if n.startswith("model-")}
        dtype = getattr(torch, manifest["export_dtype"])
        digest = hashlib.sha256("".join(sorted(files.values())).encode()).hexdigest() if hashed else ""
        if adapter is not None:
            return _folded(reader, adapter, config, dtype, digest)
        return Weights(config, reader, folder, dtype, digest, files)
    if not base and _is_causal(folder):
        here = "here it is run bidirectionally"
        say_note(
            f"{folder}: config.json does not say is_causal: false, so transformers runs it causally; {here}"
        )
    hf = HFReader(folder, config, where)
    files = hf.sha256() if hashed else {}
    digest = hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest() if hashed else ""
    return Weights(config, hf, folder, hf.dtype, digest, files)


def _folded(
    adapters: Reader, adapter: Adapter, model: ModelConfig, dtype: torch.dtype, digest: str
) -> Weights:
    """Adapters and what they adapt as one model; digest: of their files, "" where nothing is hashed yet.

    Adapters are small and read here, so that they are hashed here; the base's files as open_weights says.
    """
    folder, is_hashed = adapters.folder, bool(digest)
    if not is_hashed:
        for name in {piece["file"] for pieces in adapters.manifest["pieces"].values() for piece in pieces}:
            if name.startswith("model-"):
                check_digest(folder / name, adapters.manifest["files"][name]["sha256"])
    if not Path(adapter.base).is_dir():
        raise CheckpointError(
            f"{folder} holds LoRA adapters alone, of {adapter.base}, which is not there: put that folder "
            "back, or a link to it, as it is not copied"
        )
    base = open_weights(adapter.base, hashed=is_hashed, base=True)
    if base.files:
        adapter.check_base(base, folder)
    if (shape := replace(base.model, pooling=model.pooling, is_causal=model.is_causal)) != model:
        raise CheckpointError(f"{folder} holds LoRA adapters of {model}, and {adapter.base} is {shape}")
    known = json.dumps([base.digest, digest, adapter.lora.scale])
    digest = hashlib.sha256(known.encode()).hexdigest() if is_hashed else ""
    return Weights(model, AdaptedReader(adapters, base, adapter, model), folder, dtype, digest)


@dataclass(frozen=True)
class _Segment:
    """Rows of a Hugging Face tensor together in a file: [rows, columns] from `offset` (bytes) on."""

    first: int  # row of the tensor
    rows: int
    column: int
    columns: int
    path: Path
    offset: int


class Rows:
    """Rows of Hugging Face tensors by plain reads into the caller's memory, of any source; thread-safe.

    Nothing is mapped: pages of a mapped file count as this process's memory. `sha256` has what the files
    should hash to, where the source says it (checkpoints of ours); who compares reads the same files.

    behind: rows are read about in the order of the file and not again, so what lies this many bytes behind
    leaves the page cache, 0 for nothing. What comes takes its place there; on a virtual machine new pages for
    every byte cost a cold read more time than the disk. Files that were in the page cache before stay there,
    as do those that are hashed beside.
    """

    def __init__(self, weights: Weights, behind: int = 0):
        self.shapes, self._adapted = hf_shapes(weights.model), weights.adapted
        self._behind, self._passing = behind, set[int]()  # file descriptors whose pages leave
        self.sha256: dict[Path, str] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # of what is read: fp64 where adapters are folded in
        self._kinds: dict[str, torch.dtype] = {}  # in the files
        self._segments: dict[str, list[_Segment]] = {}
        self._files: dict[Path, int] = {}
        self._headers: dict[Path, dict[str, tuple[torch.dtype, tuple[int, ...], int]]] = {}
        try:
            for name, stored in weights.reader.stored():
                if stored.sha256:
                    self.sha256[stored.file] = stored.sha256
                self._add(name, stored)
        except BaseException:
            self.close()
            raise

    def _add(self, name: str, stored: Stored) -> None:
        path, shape = stored.file, stored.shape
        if path not in self._headers:
            try:
                fd = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if self._behind and path not in self.sha256 and not is_cached(fd):
                    self._passing.add(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                with safe_open(path, framework="pt"):  # checks the header and the size of the file
                    self._headers[path] = find_tensors(path)
            except (
                SafetensorError,
                OSError,
                RuntimeError,
            ) as error:  # RuntimeError: torch, of too many open files
                raise CheckpointError(f"{path}: {error}") from None
        dtype, have, offset = self._headers[path].get(stored.name, (None, None, 0))
        if dtype is None or have != shape or self._kinds.setdefault(name, dtype) != dtype:
            raise CheckpointError(f"{path}: {stored.name} is {dtype} {have}, expected {shape}")
        is_folded = self._adapted is not None and self._adapted.is_adapted(name)
        self.dtypes[name] = torch.float64 if is_folded else dtype
        columns = torch.Size(shape[1:]).numel()
        offset += stored.skip * columns * dtype.itemsize
        segment = _Segment(stored.first, stored.rows, stored.column, columns, path, offset)
        self._segments.setdefault(name, []).append(segment)

    def read(self, name: str, first: int, out_RC: Tensor) -> None:
        """Rows first, first + 1, ... of the tensor (a vector: one column) into `out_RC`, of dtypes[name]."""
        if self._adapted is None or not self._adapted.is_adapted(name):
            self._read(name, first, out_RC)
            return
        base_RC = torch.empty(out_RC.shape, dtype=self._kinds[name])
        self._read(name, first, base_RC)
        torch.add(base_RC.double(), self._adapted.delta(name, first, len(out_RC)), out=out_RC)

    def _read(self, name: str, first: int, out_RC: Tensor) -> None:
        R, C = out_RC.shape
        filled = 0
        for segment in self._segments[name]:
            low, high = max(first, segment.first), min(first + R, segment.first + segment.rows)
            if low >= high:
                continue
            target = out_RC[low - first : high - first, segment.column : segment.column + segment.columns]
            part = target if segment.columns == C else torch.empty(target.shape, dtype=out_RC.dtype)
            offset = segment.offset + (low - segment.first) * segment.columns * out_RC.itemsize
            self._read_bytes(segment.path, offset, part.view(-1).view(torch.uint8).numpy().data)
            if part is not target:
                target.copy_(part)
            filled += part.numel()
        assert filled == out_RC.numel(), f"{name}: {filled} of {out_RC.numel()} elements from row {first}"

    def _read_bytes(self, path: Path, offset: int, out: memoryview) -> None:
        fd = self._files[path]
        if fd in self._passing and offset > self._behind:  # a length of 0 would be the whole file
            os.posix_fadvise(fd, 0, offset - self._behind, os.POSIX_FADV_DONTNEED)
        while len(out):
            try:
                n = os.preadv(fd, [out], offset)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
            if n == 0:
                raise CheckpointError(f"{path} ended at byte {offset}; it was changed while it was read")
            out, offset = out[n:], offset + n

    def close(self) -> None:
        for fd in self._files.values():
            if fd in self._passing:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        self._files.clear()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def fill(
    model: nn.Module,
    reader: BoxReader,
    config: ModelConfig,
    tp: tuple[int, int] = (0, 1),
    dp: tuple[int, int] = (0, 1),
    remainder_of: Callable[[nn.Parameter], Tensor | None] = lambda p: None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Read this rank's box of every parameter into it, zeros into its padding; tp and dp are (rank, size).

    remainder_of: the lower half of an fp32 master whose upper half the parameter is (kernels/adamw.py), which
    is filled with it.  shapes: of a model with more than config says (LoRA).
    UserError with the tensors' names when a value is NaN or infinite.
    """
    shapes = shapes or parameter_shapes(config)
    bad: list[str] = []
    with torch.no_grad():
        for full_name, parameter in model.named_parameters():
            name = plain_name(full_name)
            box = local_box(shapes[name], tp_dim(name), *tp, *dp, tp_unit(name, config))
            halves = [local_tensor(t) for t in (parameter, remainder_of(parameter)) if t is not None]
            inside, *remainder = [unpadded(half, box) for half in halves]
            if inside.shape != halves[0].shape:
                for half in halves:
                    half.zero_()
            if inside.numel():
                write_values(reader.read_box(name, box), inside, *remainder)
                bad += _non_finite(inside, name, box, config)
    if bad:
        raise UserError(non_finite_weights(getattr(reader, "folder", "the initial weights"), bad))


def write_values(values: Tensor, tensor: Tensor, rest: Tensor | None = None) -> None:
    """In place: into the tensor, or into the two that stand for fp32 values (kernels/adamw.py)."""
    if rest is None:
        tensor.copy_(round_once(values, tensor.dtype) if values.dtype == torch.float64 else values)
    else:
        from_fp32_(values.float().to(tensor.device), tensor, rest)


def _non_finite(target: Tensor, name: str, box: Box, config: ModelConfig) -> list[str]:
    """Hugging Face's names of the tensors with a NaN or an infinite value in this box of parameter `name`."""
    if all(x.isfinite() for x in target.aminmax()):  # NaN comes through; one pass, no copy of the weight
        return []
    rows = (~target.isfinite()).reshape(len(target), -1).any(1).nonzero()[:, 0].tolist()
    ends, end = [], 0
    for hf_name, _, count in hf_rows(name, config):
        end += count
        ends.append((end, hf_name))
    return sorted({next(hf_name for end, hf_name in ends if box[0][0] + row < end) for row in rows})


def non_finite_weights(folder: object, names: Sequence[str]) -> str:
    """What to say of a folder with such tensors."""
    names = sorted(set(names))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"{folder}: NaN or infinite values in {', '.join(names[:5])}{more}; the file is damaged or the run "
        "that wrote it diverged: no loss could be finite. Use another copy or an earlier checkpoint"
    )
