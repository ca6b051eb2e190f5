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

import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_embed_core.checkpoint.files import (
    DTYPES,
    SafetensorsWriter,
    check_free_space,
    free_bytes,
    fsync_dir,
    publish,
    sha256_file,
    write_bytes,
)
from nemo_embed_core.config import ModelConfig, RopeScaling, UserError, failpoint
from nemo_embed_core.model.hf import Box, Stored
from nemo_embed_core.model.hf_config import read_json
from nemo_embed_core.model.spec import hf_rows, parameter_shapes
from nemo_embed_core.parallel.collectives import gather_objects

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OPTIM_PREFIXES = ("exp_avg/", "exp_avg_sq/")


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete or of another model: names the file and what is wrong with it."""


class AllDamagedError(CheckpointError):
    """There are checkpoints and none of them verifies: names each and why."""

    exit_code = 3


@dataclass(frozen=True)
class Piece:
    """The part of one tensor that this rank writes; of boxes that several ranks hold (tp replicas) one writes."""

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
    meta: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
    keep: int,
    keep_every: int = 0,
    damaged: set[str] | None = None,
    check: Callable[[], None] = lambda: None,
    gather: Callable[[Any], list[Any]] = gather_objects,
    log: Callable[[str], None] = print,
) -> Path:
    """Write and publish root/step-XXXXXXXX; every rank calls it. Returns only when the checkpoint is durable.

    `pieces` are what this rank writes (an owner per box); names under exp_avg/ and exp_avg_sq/ go to the optim file. A
    failure on any rank is raised on all of them, and leaves nothing. Then the oldest beyond the `keep` newest are
    deleted, but none of a step that `keep_every` divides and none that was found `damaged`; those do not count. A damaged one
    whose step is saved again gets another name.
    `check` runs on rank 0 before anything is written (the lock is still ours); `gather` exchanges small objects.
    """
    final, tmp = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
    failpoint("save.begin", step)
    needed = sum(gather(sum(p.tensor.nbytes for p in pieces.values())))

    made = False

    def prepare() -> None:
        nonlocal made
        check()
        for stale in root.glob(".tmp-*step-*"):  # of a killed run
            try:
                shutil.rmtree(stale)
            except OSError as error:  # _prune has said so; only what is in the way must go
                if stale == tmp:
                    raise
                log(f"WARNING: {stale} could not be deleted: {error}")
        check_free_space(root, needed, f"the checkpoint of step {step}")
        tmp.mkdir()
        made = True

    def write() -> dict[str, Any]:
        files, boxes = {}, {}
        for part in ("model", "optim"):
            mine = {n: p for n, p in pieces.items() if n.startswith(OPTIM_PREFIXES) == (part == "optim")}
            name = f"{part}-{rank:05d}-of-{world_size:05d}.safetensors"
            entries = {n: (p.tensor.dtype, p.box[1]) for n, p in mine.items()}
            with SafetensorsWriter(tmp / name, entries, {"format": "pt"}) as writer:
                for piece in mine.values():
                    writer.write(piece.tensor)
                files[name] = writer.close()
            failpoint(f"save.{part}_written", step)
            boxes.update({n: [{"file": name, "offset": p.box[0], "size": p.box[1]}] for n, p in mine.items()})
        shapes = {n: {"dtype": _dtype_name(p.tensor.dtype), "shape": p.shape} for n, p in pieces.items()}
        return {"files": files, "pieces": boxes, "tensors": shapes}

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
        write_bytes(tmp / MANIFEST, seal(manifest))
        failpoint("save.before_rename", step)
        check()
        if aside := publish(tmp, final):
            log(
                f"WARNING: the damaged checkpoint of step {step} is kept as {aside}; delete it when you need it no more"
            )
        (damaged or set()).discard(final.name)
        failpoint("save.after_rename", step)

    first = rank == 0
    try:
        _on_all_ranks(prepare if first else None, "preparing", final, needed, gather)
        parts = _on_all_ranks(write, "writing", final, needed, gather)
        _on_all_ranks(finish if first else None, "publishing", final, needed, gather)
    except BaseException:
        if made:  # by this rank; every rank has stopped writing: its outcome was gathered
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    if first:
        _prune(root, final, keep, keep_every, damaged or set(), log)
    return final


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prune(root: Path, newest: Path, keep: int, keep_every: int, damaged: set[str], log: Callable[[str], None]) -> None:
    """A folder loses its name durably before its files go: neither a kill nor a power cut leaves half a checkpoint."""
    try:
        whole = [p for p in checkpoints(root) if p.name not in damaged]
        gone = []
        for old in whole[keep:]:
            if old == newest or (keep_every and _step_of(old) % keep_every == 0):
                continue
            gone.append(root / f".tmp-old-{old.name}")
            os.rename(old, gone[-1])
        if gone:
            fsync_dir(root)
        for folder in gone:
            shutil.rmtree(folder)
    except OSError as error:  # the new checkpoint is safe: the run need not end, the next save tries again
        log(f"WARNING: an old checkpoint of {root} could not be deleted: {error}")


def _on_all_ranks(
    work: Callable[[], Any] | None, what: str, path: Path, needed: int, gather: Callable[[Any], list[Any]]
) -> list[Any]:
    """Run `work` on the ranks that have it; an error anywhere becomes a CheckpointError everywhere (no rank hangs)."""
    result, error = None, None
    caught: Exception | None = None
    try:
        if work is not None:
            result = work()
    except UserError as expected:
        error, caught = str(expected), expected
    except OSError as failed:
        free = free_bytes(path)
        error, caught = f"{failed}; the checkpoint needs {needed:,} bytes in all, {free:,} are free", failed
    except Exception as bug:
        error, caught = f"{type(bug).__name__}: {bug}", bug
    outcomes = gather((result, error))
    failures = {rank: error for rank, (_, error) in enumerate(outcomes) if error}
    if failures:
        if not isinstance(caught, UserError | OSError | None):
            raise caught  # with its traceback
        rank, message = next(iter(failures.items()))
        raise CheckpointError(
            f"{what} {path} failed on rank {rank}: {message}. Nothing was published and what was saved before is as it "
            "was; when the cause is gone, continue with --checkpoint.resume auto"
        ) from caught
    return [result for result, _ in outcomes]


class Saver:
    """save() behind training's back: the caller's thread copies to host memory, another thread writes and publishes.

        saver = Saver(partial(save, root, rank=..., ...), log)
        saver.save(step, pieces, meta=..., extra_files=...)   # returns when the values are copied; weights may change
        saver.failed                                          # looked at every step: the background has met an error
        saver.wait()                                          # until it is published; raises that error

    One save is in flight: the next one waits for it. The host buffers (pinned beside a GPU) are made once, as large as
    what this rank writes. `background=False` writes straight from the tensors and returns when they are durable.
    `stall_s` is how long the last save kept its caller; take_stall() reads it once.
    """

    def __init__(self, write: Callable[..., Path], log: Callable[[str], None] = print, background: bool = True):
        self._write, self._log, self._background = write, log, background
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.stall_s = 0.0

    @property
    def failed(self) -> bool:
        return self._error is not None

    def take_stall(self) -> float:
        seconds, self.stall_s = self.stall_s, 0.0
        return seconds

    def save(self, step: int, pieces: Mapping[str, Piece], **rest: Any) -> None:
        start = time.perf_counter()
        self.wait()
        if not self._background:
            path = self._write(step, pieces, **rest)
            self.stall_s = time.perf_counter() - start
            self._log(f"saved {path} in {self.stall_s:.2f} s")
            return
        snapshot = self.snapshot(pieces)
        self.stall_s = time.perf_counter() - start
        self._thread = threading.Thread(
            target=self._publish, args=(step, snapshot, rest, start, self.stall_s), name="checkpoint", daemon=True
        )
        self._thread.start()

    def snapshot(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Pieces of the same values in host memory, complete on return."""
        copies = {}
        for name, piece in pieces.items():
            cuda = piece.tensor.is_cuda
            if name not in self._buffers:
                self._buffers[name] = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=cuda)
            self._buffers[name].copy_(piece.tensor.detach(), non_blocking=cuda)
            copies[name] = Piece(piece.shape, piece.box, self._buffers[name])
        if any(piece.tensor.is_cuda for piece in pieces.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _publish(
        self, step: int, pieces: Mapping[str, Piece], rest: dict[str, Any], start: float, copied: float
    ) -> None:
        try:
            path = self._write(step, pieces, **rest)
            self._log(f"saved {path}: copied in {copied:.2f} s, published after {time.perf_counter() - start:.2f} s")
        except BaseException as error:  # raised by wait() on the caller's thread
            self._error = error

    def join(self) -> None:
        """Until nothing is in flight; an error is kept for wait()."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """join() on the way out; an error that nobody has seen is printed."""
        self.join()
        if self._error is not None:
            self._log(f"WARNING: the last save failed: {self._error}")

    def wait(self) -> None:
        """join(), and the error of what was in flight, once."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error


# ------------------------------------------------------------------------------------------ find and verify


def checkpoints(root: Path) -> list[Path]:
    """step-* folders, newest first by the step in the name (clocks differ between nodes)."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if re.fullmatch(r"step-\d{8}", p.name)), reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


_COUNT = (int, "a whole number >= 0")
_BLOCK = {"file": str, "offset": [_COUNT], "size": [_COUNT]}
# What a reader relies on, so that it may index without looking: a type, {field: ...}, {str: ...} for any name, [...].
_MANIFEST: dict[str, Any] = {
    "step": _COUNT,
    "model": dict,
    "config": {
        "seed": int,
        "global_batch_size": int,
        "init_from": str,
        "data": {"num_hard_negatives": int, "query_max_length": int, "document_max_length": int, "datasets": [dict]},
    },
    "export_dtype": str,
    "ledger": str,
    "data_digest": str,
    "files": {str: {"size": _COUNT, "sha256": str}},
    "tensors": {str: {"dtype": str, "shape": [_COUNT]}},
    "pieces": {str: [_BLOCK]},
}


def _digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything in the manifest but its own digest."""
    rest = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(manifest: Mapping[str, Any]) -> bytes:
    """manifest.json with the digest that read_manifest asks for: one field a line."""
    # No indent: that encoder is Python and would hold the interpreter for seconds, while training goes on.
    fields = {**manifest, "digest": _digest(manifest)}.items()
    return ("{" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in fields) + "}\n").encode()


def _conform(value: Any, schema: Any, where: str) -> None:
    """CheckpointError unless the JSON value has the types of the schema; fields beyond it are allowed."""
    if isinstance(schema, tuple):
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{where} is {_short(value)}, not {schema[1]}; the checkpoint is damaged")
        return
    kind: type = schema if isinstance(schema, type) else type(schema)
    if type(value) is not kind:
        raise CheckpointError(f"{where} is {_short(value)}, not of type {kind.__name__}; the checkpoint is damaged")
    fields: Any = value
    if isinstance(schema, list):
        for i, item in enumerate(fields):
            _conform(item, schema[0], f"{where}[{i}]")
    elif isinstance(schema, dict) and str in schema:
        for name, item in fields.items():
            _conform(item, schema[str], f"{where}.{name}")
    elif isinstance(schema, dict):
        for key, item in schema.items():
            if key not in fields:
                raise CheckpointError(f"{where}: field {key!r} is missing; the checkpoint is damaged")
            _conform(fields[key], item, f"{where}: {key}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def model_from_dict(values: dict[str, Any], path: Path | str = MANIFEST) -> ModelConfig:
    """ModelConfig from the manifest."""
    scaling = values.get("rope_scaling")
    try:
        return ModelConfig(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})
    except (TypeError, UserError) as error:
        raise CheckpointError(f"{path}: its model does not fit this version: {error}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, checked so far that no reader leaves the folder or meets a missing field or another type."""
    path = folder / MANIFEST
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointError(f"{path} is not a regular file")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {_short(manifest.get('format'))}, this version reads {FORMAT_VERSION}; "
            "merge it with the version that wrote it"
        )
    if manifest.get("digest") != _digest(manifest):
        raise CheckpointError(f"{path}: its digest differs from what it holds; the file was changed or damaged")
    _conform(manifest, _MANIFEST, str(path))
    _conform(manifest.setdefault("overrides", []), [dict], f"{path}: overrides")
    if re.fullmatch(r"step-\d{8}", folder.name) and _step_of(folder) != manifest["step"]:
        raise CheckpointError(
            f"{folder} holds step {manifest['step']}: name it step-{manifest['step']:08d}, or another way than step-NNNNNNNN"
        )
    for name in manifest["files"]:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
            raise CheckpointError(f"{path}: {_short(name)} is not a plain file name")
    if manifest["export_dtype"] not in map(_dtype_name, DTYPES):
        raise CheckpointError(f"{path}: export_dtype {_short(manifest['export_dtype'])} is not a floating type")
    if manifest["pieces"].keys() != manifest["tensors"].keys():
        name = next(iter(manifest["pieces"].keys() ^ manifest["tensors"].keys()))
        raise CheckpointError(f"{path}: {_short(name)} is among the tensors or the pieces, but not both")
    model = model_from_dict(manifest["model"], path)
    if model.num_hidden_layers > len(manifest["tensors"]):
        raise CheckpointError(f"{path}: {model.num_hidden_layers} layers in {len(manifest['tensors'])} tensors")
    for name, tensor in manifest["tensors"].items():
        if tensor["dtype"] not in ("float32", "float64"):
            raise CheckpointError(f"{path}: {name} has dtype {tensor['dtype']!r}; weights and moments are float32")
        pieces = manifest["pieces"][name]
        if len({piece["file"] for piece in pieces}) != len(pieces):
            raise CheckpointError(f"{path}: two pieces of {name} are in the same file")
        for piece in pieces:
            if piece["file"] not in manifest["files"]:  # the verified ones, so never a path out of the folder
                raise CheckpointError(f"{path}: {name} is in {piece['file']!r}, which is not among its files")
            if not len(piece["offset"]) == len(piece["size"]) == len(tensor["shape"]):
                raise CheckpointError(
                    f"{path}: a piece of {name} has {len(piece['offset'])} offsets and {len(piece['size'])} sizes, "
                    f"the tensor has {len(tensor['shape'])} dims"
                )
    return manifest


def verify(folder: Path, weights_only: bool = False, hashed: bool = True) -> dict[str, Any]:
    """The manifest, when every file is there with its size and sha256 and every tensor is covered exactly once.

    weights_only: files that hold nothing but moments are not looked at; they may be missing.  hashed=False: the caller
    compares the sha256 of files with weights itself (`check_digest`).
    """
    manifest = read_manifest(folder)
    tensors = {n: t for n, t in manifest["tensors"].items() if not (weights_only and n.startswith(OPTIM_PREFIXES))}
    wanted = {piece["file"] for name in tensors for piece in manifest["pieces"][name]}
    unwanted = {p["file"] for n in manifest["tensors"].keys() - tensors for p in manifest["pieces"][n]} - wanted

    def check(name: str) -> None:
        path, expected = folder / name, manifest["files"][name]
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {expected['size']}")
        if hashed or not name.startswith(("model-", "optim-")):  # a tokenizer is small
            check_digest(path, expected["sha256"])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        list(pool.map(check, [name for name in manifest["files"] if name not in unwanted]))
    for name, tensor in tensors.items():
        _check_coverage(folder, name, tensor["shape"], manifest["pieces"][name])
    return manifest


def check_digest(path: Path, sha256: str) -> None:
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if digest != sha256:
        raise CheckpointError(f"{path}: sha256 differs from the manifest; the file was changed or damaged")


def _check_coverage(folder: Path, name: str, shape: list[int], pieces: list[dict[str, Any]]) -> None:
    covered = 0
    before: list[dict[str, Any]] = []  # of the pieces so far, those that reach into the rows of the next one
    for piece in sorted(pieces, key=lambda p: p["offset"]):
        box = (piece["offset"], piece["size"])
        covered += math.prod(piece["size"])
        if any(o < 0 or o + s > full for o, s, full in zip(*box, shape, strict=True)):
            raise CheckpointError(f"{folder}: a piece of {name} in {piece['file']} lies outside its shape {shape}")
        before = [b for b in before if not shape or b["offset"][0] + b["size"][0] > piece["offset"][0]]
        for other in before:
            if _overlap(box, (other["offset"], other["size"])) is not None:
                raise CheckpointError(f"{folder}: {name} is stored twice, in {piece['file']} and {other['file']}")
        before.append(piece)
    if covered != math.prod(shape):
        raise CheckpointError(f"{folder}: {name} has {covered} of {math.prod(shape)} elements")


def newest(root: Path, log: Callable[[str], None], damaged: set[str] | None = None) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is named and skipped, never deleted. None: there is none.

    If there are checkpoints and all are damaged, that is an error: a run never starts over silently. The names of the
    damaged ones are added to `damaged`.
    """
    reasons = []
    for folder in checkpoints(root):
        try:
            verify(folder)
        except UserError as error:
            reasons.append(str(error))
            log(f"WARNING: skipping a damaged checkpoint: {error}")
            if damaged is not None:
                damaged.add(folder.name)
            continue
        return folder
    if reasons:
        raise AllDamagedError(
            f"every checkpoint of {root} is damaged: "
            + "; ".join(reasons)
            + ". Restore one of them, or start again in another output_dir; nothing was changed here"
        )
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

    def __init__(self, folder: Path, manifest: dict[str, Any] | None = None):
        self.folder = folder
        self.manifest = manifest or read_manifest(folder)
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

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """(Hugging Face name, where rows of it stand), in the order of our parameters."""
        model = model_from_dict(self.manifest["model"], self.folder / MANIFEST)
        for parameter in parameter_shapes(model):
            row = 0  # of the parameter
            for name, start, count in hf_rows(parameter, model):
                for piece in self.manifest["pieces"][parameter]:
                    (offset, *columns), size = piece["offset"], tuple(piece["size"])
                    low, high = max(row, offset), min(row + count, offset + size[0])
                    if low < high:
                        at = (start + low - row, low - offset, columns[0] if columns else 0)
                        digest = self.manifest["files"][piece["file"]]["sha256"]
                        yield name, Stored(self.folder / piece["file"], parameter, size, high - low, *at, digest)
                row += count

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
            path = self.folder / file
            try:
                if file not in self._open:
                    self._open[file] = safe_open(path, framework="pt")
                stored = self._open[file].get_slice(name)
                have = (stored.get_dtype(), stored.get_shape())
                if have != (DTYPES[dtype], piece["size"]):  # a smaller one would be broadcast
                    raise CheckpointError(
                        f"{path}: {name} is {have[0]} {have[1]}, the manifest says {DTYPES[dtype]} {piece['size']}"
                    )
                out[tuple(target)] = stored[tuple(source)]
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: {name}: {error}") from None
            filled += torch.Size(common[1]).numel()
        if filled != out.numel():
            raise CheckpointError(f"{self.folder}: {name} has {filled} of the {out.numel()} elements asked for")
        return out
