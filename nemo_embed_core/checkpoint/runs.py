"""The checkpoints of a run's folder: which there are, which is whole, which go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from nemo_embed_core.checkpoint.best import BEST, find_best
from nemo_embed_core.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    folder_name,
    step_of,
    verify_checkpoint,
)
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import fsync


class AllDamagedError(CheckpointError):
    """There are checkpoints and none of them verifies: names each and why."""

    exit_code = 3


def checkpoints(root: Path) -> list[Path]:
    """Newest first by the step in the name (clocks differ between nodes)."""
    found = [(step_of(p.name), p) for p in (root.iterdir() if root.is_dir() else ())]
    return [folder for step, folder in sorted(found, reverse=True) if step >= 0]


def unfinished(root: Path) -> list[Path]:
    """What a save or a deletion that was killed has left."""
    return [p for p in root.glob(".tmp-*") if step_of(p.name.removeprefix(".tmp-").removeprefix("old-")) >= 0]


def newest_whole(root: Path, log: Callable[[str], None], damaged: set[str] | None = None) -> Path | None:
    """The newest checkpoint that verifies, or None; a damaged one is named and skipped, never deleted.

    If there are checkpoints and all are damaged, that is an error: a run never starts over silently. The
    names of the damaged ones are added to `damaged`.
    """
    reasons = []
    for folder in checkpoints(root):
        try:
            verify_checkpoint(folder)
        except UserError as error:
            reasons.append(str(error))
            log(f"WARNING: skipping a damaged checkpoint: {error}")
            if damaged is not None:
                damaged.add(folder.name)
            continue
        return folder
    if reasons:
        raise AllDamagedError(
            f"every checkpoint of {root} is damaged: {'; '.join(reasons)}. Restore one of them, or start "
            "again in another output_dir; nothing was changed here"
        )
    return None


def is_best(path: Path) -> bool:
    """Whether it is RUN/best."""
    return path.name == BEST and not path.exists() and bool(checkpoints(path.parent))


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or of a run folder the newest one, of RUN/best the best."""
    if is_best(path):
        return find_best(path.parent, checkpoints(path.parent))
    if (path / MANIFEST).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(
            f"{path} is neither a checkpoint (no {MANIFEST}) nor a run folder with checkpoints "
            f"({folder_name(0)})"
        )
    return found[0]


def is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file() or bool(checkpoints(path)) or is_best(path)


def prune(
    root: Path,
    newest: Path,
    keep: int,
    keep_every: int,
    damaged: set[str],
    log: Callable[[str], None],
    best: str = "",
) -> None:
    """best: name of one that stays. A folder loses its name durably before its files go: no kill or power cut
    leaves half a checkpoint."""
    try:
        whole = [p for p in checkpoints(root) if p.name not in damaged]
        gone = []
        for old in whole[keep:]:
            if old == newest or old.name == best or (keep_every and step_of(old.name) % keep_every == 0):
                continue
            gone.append(root / f".tmp-old-{old.name}")
            os.rename(old, gone[-1])
        if gone:
            fsync(root)
        for folder in gone:
            shutil.rmtree(folder)
    except OSError as error:  # the new checkpoint is safe: the run need not end, the next save tries again
        log(f"WARNING: an old checkpoint of {root} could not be deleted: {error}")
