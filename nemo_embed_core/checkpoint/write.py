"""Write one checkpoint: every rank its own boxes, rank 0 joins the manifest and publishes the folder.

    step-00000500/
      model-00003-of-00016.safetensors     fp32 weights of one rank        (docs/checkpoint-format.md)
      optim-00003-of-00016.safetensors     the optimizer's state of them, as STATE/PARAMETER
      tokenizer.json, tokenizer_config.json
      manifest.json                        shapes, boxes, sha256 of every file, config, step, data digest

A box is one contiguous block of a tensor's global shape, so any tp x dp layout loads any other. No pickle:
safetensors and JSON only. Nodes share the file system.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.checkpoint.best import best_of
from nemo_embed_core.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    CheckpointError,
    folder_name,
    is_state,
    seal,
)
from nemo_embed_core.checkpoint.runs import prune, unfinished
from nemo_embed_core.errors import UserError, failpoint
from nemo_embed_core.files.durable import check_free_space, free_bytes, publish, write_bytes
from nemo_embed_core.files.safetensors import SafetensorsWriter, dtype_name
from nemo_embed_core.kernels.adamw import to_fp32
from nemo_embed_core.parallel.boxes import Box
from nemo_embed_core.parallel.collectives import gather_objects


@dataclass(frozen=True)
class Piece:
    """The part of one tensor that this rank writes; of boxes that tp replicas hold one rank writes. What is
    kept otherwise, with `rest` or in bf16 (kernels/adamw.py: to_fp32), is written in fp32."""

    shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    rest: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return torch.float64 if self.tensor.dtype == torch.float64 else torch.float32

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize

    def values(self) -> Tensor:
        """The tensor itself, or what it stands for in memory of its own."""
        return to_fp32(self.tensor.detach(), self.rest)


def save_checkpoint(
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
    """Write and publish root/folder_name(step); every rank calls it. On return it is durable.

    `pieces` are what this rank writes (an owner per box); an optimizer's state goes to the optim file. A
    failure on any rank is raised on all of them, and leaves nothing. Then the oldest beyond the `keep` newest
    are deleted, but none of a step that `keep_every` divides, not the best (of meta) and none that was found
    `damaged`; those do not count. A damaged one whose step is saved again gets another name. `check` runs on
    rank 0 before anything is written (the lock is still ours); `gather` exchanges small objects.
    """
    final, tmp = root / folder_name(step), root / f".tmp-{folder_name(step)}"
    failpoint("save.begin", step)
    needed = sum(gather(sum(p.nbytes for p in pieces.values())))

    made = False

    def prepare() -> None:
        nonlocal made
        check()
        for stale in unfinished(root):
            try:
                shutil.rmtree(stale)
            except OSError as error:  # prune has said so; only what is in the way must go
                if stale == tmp:
                    raise
                log(f"WARNING: {stale} could not be deleted: {error}")
        check_free_space(root, needed, f"the checkpoint of step {step}")
        tmp.mkdir()
        made = True

    def write() -> dict[str, Any]:
        files, boxes = {}, {}
        for part in ("model", "optim"):
            mine = {n: p for n, p in pieces.items() if is_state(n) == (part == "optim")}
            name = f"{part}-{rank:05d}-of-{world_size:05d}.safetensors"
            entries = {n: (p.dtype, p.box[1]) for n, p in mine.items()}
            with SafetensorsWriter(tmp / name, entries) as writer:
                for piece in mine.values():
                    writer.write(piece.values())
                files[name] = writer.close()
            failpoint(f"save.{part}_written", step)
            boxes.update({n: [{"file": name, "offset": p.box[0], "size": p.box[1]}] for n, p in mine.items()})
        shapes = {n: {"dtype": dtype_name(p.dtype), "shape": p.shape} for n, p in pieces.items()}
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
            kept = f"the damaged checkpoint of step {step} is kept as {aside}"
            log(f"WARNING: {kept}; delete it when you need it no more")
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
        prune(root, final, keep, keep_every, damaged or set(), log, best_of(meta))
    return final


def _on_all_ranks(
    work: Callable[[], Any] | None, what: str, path: Path, needed: int, gather: Callable[[Any], list[Any]]
) -> list[Any]:
    """Run `work` on the ranks that have it; an error anywhere is a CheckpointError everywhere: none hangs."""
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
            f"{what} {path} failed on rank {rank}: {message}. Nothing was published and what was saved "
            "before is as it was; when the cause is gone, continue with --checkpoint.resume auto"
        ) from caught
    return [result for result, _ in outcomes]
