"""Sharded checkpoints: every rank writes its own boxes, rank 0 joins the manifest and publishes the folder.

    step-00000500/
      model-00003-of-00016.safetensors     fp32 weights of one rank        (docs/checkpoint-format.md)
      optim-00003-of-00016.safetensors     exp_avg/NAME and exp_avg_sq/NAME
      tokenizer.json, tokenizer_config.json
      manifest.json                        shapes, boxes, sha256 of every file, config, step, data digest

A box is one contiguous block of a tensor's global shape, so any tp x dp layout loads any other. No pickle: safetensors
and JSON only. Nodes share the file system.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_embed_core.checkpoint.files import (
    SafetensorsWriter,
    fsync_dir,
    publish,
    sha256_file,
    write_bytes,
)
from nemo_embed_core.config import UserError
from nemo_embed_core.model.hf import Box
from nemo_embed_core.model.hf_config import read_json
from nemo_embed_core.parallel.collectives import gather_objects

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OPTIM_PREFIXES = ("exp_avg/", "exp_avg_sq/")


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete or of another model: names the file and what is wrong with it."""


@dataclass(frozen=True)
class Piece:
    """This rank's part of one tensor; `tensor` is None where another rank writes the same box (tp replicas)."""

    shape: tuple[int, ...]
    box: Box
    tensor: Tensor


# ------------------------------------------------------------------------------------------ save


def save(
    root: Path,
    step: int,
    pieces: Mapping[str, Piece],
    *,
    rank: int,
    world_size: int,
    meta: dict[str, Any],
    extra_files: Mapping[str, bytes],
    keep: int,
    failpoint: Callable[[str, int], None] = lambda name, step: None,
) -> Path:
    """Write and publish root/step-XXXXXXXX; every rank calls it. Returns only when the checkpoint is durable.

    `pieces` are what this rank writes (an owner per box); names under exp_avg/ and exp_avg_sq/ go to the optim file. A
    failure on any rank is raised on all of them. Then the oldest beyond `keep` are deleted.
    """
    final, tmp = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
    failpoint("save.begin", step)

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()

    _on_all_ranks(prepare if rank == 0 else None, "preparing", tmp)

    def write() -> dict[str, Any]:
        files, boxes = {}, {}
        for part in ("model", "optim"):
            mine = {n: p for n, p in pieces.items() if n.startswith(OPTIM_PREFIXES) == (part == "optim")}
            name = f"{part}-{rank:05d}-of-{world_size:05d}.safetensors"
            entries = {n: (p.tensor.dtype, p.box[1]) for n, p in mine.items()}
            writer = SafetensorsWriter(tmp / name, entries, {"format": "pt"})
            for piece in mine.values():
                writer.write(piece.tensor)
            files[name] = writer.close()
            failpoint(f"save.{part}_written", step)
            boxes.update({n: [{"file": name, "offset": p.box[0], "size": p.box[1]}] for n, p in mine.items()})
        shapes = {n: {"dtype": str(p.tensor.dtype).removeprefix("torch."), "shape": p.shape} for n, p in pieces.items()}
        return {"files": files, "pieces": boxes, "tensors": shapes}

    parts = _on_all_ranks(write, "writing", tmp)

    def finish() -> None:
        manifest: dict[str, Any] = {"format": FORMAT_VERSION, "step": step, **meta}
        manifest.update({"files": {}, "tensors": {}, "pieces": {}})
        for name, data in extra_files.items():
            manifest["files"][name] = write_bytes(tmp / name, data)
        for part in parts:
            manifest["files"].update(part["files"])
            manifest["tensors"].update(part["tensors"])
            for name, boxes in part["pieces"].items():
                manifest["pieces"].setdefault(name, []).extend(boxes)
        failpoint("save.before_manifest", step)
        write_bytes(tmp / MANIFEST, json.dumps(manifest, indent=1).encode())
        failpoint("save.before_rename", step)
        publish(tmp, final)
        failpoint("save.after_rename", step)
        for old in checkpoints(root)[keep:]:
            if old != final:
                shutil.rmtree(old)
        for stale in root.glob(".tmp-step-*"):
            shutil.rmtree(stale, ignore_errors=True)
        fsync_dir(root)

    _on_all_ranks(finish if rank == 0 else None, "publishing", final)
    return final


def _on_all_ranks(work: Callable[[], Any] | None, what: str, path: Path) -> list[Any]:
    """Run `work` on the ranks that have it; an OSError anywhere becomes a CheckpointError everywhere (no rank hangs)."""
    result, error = None, None
    try:
        if work is not None:
            result = work()
    except OSError as caught:
        error = f"{type(caught).__name__}: {caught}"
    outcomes = gather_objects((result, error))
    failed = {rank: error for rank, (_, error) in enumerate(outcomes) if error}
    if failed:
        rank, message = next(iter(failed.items()))
        raise CheckpointError(f"{what} {path} failed on rank {rank}: {message}; nothing was published")
    return [result for result, _ in outcomes]


# ------------------------------------------------------------------------------------------ find and verify


def checkpoints(root: Path) -> list[Path]:
    """step-* folders, newest first by the step in the name (clocks differ between nodes)."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if re.fullmatch(r"step-\d{8}", p.name)), reverse=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT_VERSION}; "
            "merge it with the version that wrote it"
        )
    for key in ("step", "files", "tensors", "pieces", "model"):
        if key not in manifest:
            raise CheckpointError(f"{path}: field {key!r} is missing; the checkpoint is damaged")
    for name in manifest["files"]:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
            raise CheckpointError(f"{path}: {name!r} is not a plain file name")
    for name, tensor in manifest["tensors"].items():
        if tensor["dtype"] not in ("float32", "float64"):
            raise CheckpointError(f"{path}: {name} has dtype {tensor['dtype']!r}; weights and moments are float32")
        for piece in manifest["pieces"].get(name, []):
            if piece["file"] not in manifest["files"]:  # the verified ones, so never a path out of the folder
                raise CheckpointError(f"{path}: {name} is in {piece['file']!r}, which is not among its files")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Every file is there with the size and sha256 of the manifest, every tensor is covered by its boxes exactly once."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {expected['size']}")
        if sha256_file(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: sha256 differs from the manifest; the file was changed or damaged")
    for name, tensor in manifest["tensors"].items():
        _check_coverage(folder, name, tensor["shape"], manifest["pieces"].get(name, []))
    return manifest


def _check_coverage(folder: Path, name: str, shape: list[int], pieces: list[dict[str, Any]]) -> None:
    covered = 0
    for i, piece in enumerate(pieces):
        box = (piece["offset"], piece["size"])
        covered += torch.Size(piece["size"]).numel()
        if any(o < 0 or o + s > full for o, s, full in zip(*box, shape, strict=True)):
            raise CheckpointError(f"{folder}: a piece of {name} in {piece['file']} lies outside its shape {shape}")
        for other in pieces[:i]:
            if _overlap(box, (other["offset"], other["size"])) is not None:
                raise CheckpointError(f"{folder}: {name} is stored twice, in {piece['file']} and {other['file']}")
    if covered != torch.Size(shape).numel():
        raise CheckpointError(f"{folder}: {name} has {covered} of {torch.Size(shape).numel()} elements")


def newest(root: Path, log: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is named and skipped, never deleted. None: there is none.

    If there are checkpoints and all are damaged, that is an error: a run never starts over silently.
    """
    reasons = []
    for folder in checkpoints(root):
        try:
            verify(folder)
        except UserError as error:
            reasons.append(str(error))
            log(f"WARNING: skipping a damaged checkpoint: {error}")
            continue
        return folder
    if reasons:
        raise CheckpointError(f"every checkpoint of {root} is damaged: " + "; ".join(reasons))
    return None


def find(path: Path) -> Path:
    """A checkpoint folder, or the newest one of a run folder."""
    if (path / MANIFEST).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(f"{path} is neither a checkpoint (no {MANIFEST}) nor a run folder with step-* checkpoints")
    return found[0]


def is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file() or bool(checkpoints(path))


# ------------------------------------------------------------------------------------------ load


def _overlap(a: tuple[Iterable[int], Iterable[int]], b: tuple[Iterable[int], Iterable[int]]) -> Box | None:
    """The common block of two boxes, or None."""
    starts, sizes = [], []
    for (ao, asize), (bo, bsize) in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        start, stop = max(ao, bo), min(ao + asize, bo + bsize)
        if start >= stop:
            return None
        starts.append(start)
        sizes.append(stop - start)
    return tuple(starts), tuple(sizes)


class Reader:
    """Boxes of a verified checkpoint's tensors, reading only the bytes they need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._open: dict[str, Any] = {}

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Every expected tensor is there with its shape, and nothing else."""
        found = {n: tuple(t["shape"]) for n, t in self.manifest["tensors"].items()}
        problems = [f"{n} is missing" for n in expected if n not in found]
        problems += [f"{n} is not part of this model" for n in found if n not in expected]
        problems += [
            f"{n} has shape {found[n]}, expected {shape}"
            for n, shape in expected.items()
            if found.get(n, shape) != shape
        ]
        if problems:
            more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
            raise CheckpointError(f"{self.folder} does not fit this model: " + "; ".join(problems[:10]) + more)

    def read_box(self, name: str, box: Box) -> Tensor:
        """The block of the global tensor `name`, joined from the pieces that hold it."""
        dtype = getattr(torch, self.manifest["tensors"][name]["dtype"])
        out = torch.empty(box[1], dtype=dtype)
        filled = 0
        for piece in self.manifest["pieces"][name]:
            common = _overlap(box, (piece["offset"], piece["size"]))
            if common is None:
                continue
            file = piece["file"]
            source = [slice(o - p, o - p + s) for o, s, p in zip(*common, piece["offset"], strict=True)]
            target = [slice(o - b, o - b + s) for o, s, b in zip(*common, box[0], strict=True)]
            try:
                if file not in self._open:
                    self._open[file] = safe_open(self.folder / file, framework="pt")
                out[tuple(target)] = self._open[file].get_slice(name)[tuple(source)]
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / file}: {name}: {error}") from None
            filled += torch.Size(common[1]).numel()
        if filled != out.numel():
            raise CheckpointError(f"{self.folder}: {name} has {filled} of the {out.numel()} elements asked for")
        return out
