"""The checkpoint of a run that its evaluations found best: a field of every manifest, RUN/best for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.checkpoint.manifest import MANIFEST, CheckpointError, folder_name, read_manifest, seal
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import write_atomically

BEST = "best"  # RUN/best stands for a checkpoint of the run, where it is no folder of its own


def best_of(manifest: Mapping[str, Any]) -> str:
    """Name of the run's best checkpoint up to the one with this manifest; "" of a run that was not
    evaluated."""
    best = manifest.get("eval", {}).get("best")
    return folder_name(best["step"]) if best else ""


def record_evaluation(run: Path, step: int, evaluated: Mapping[str, Any]) -> None:
    """Into the manifest of a checkpoint that was published before its evaluation was made, if it was."""
    checkpoint = run / folder_name(step)
    if checkpoint.is_dir():
        manifest = {**read_manifest(checkpoint), "eval": dict(evaluated)}
        write_atomically(checkpoint / MANIFEST, seal(manifest))


def find_best(run: Path, newest_first: Sequence[Path]) -> Path:
    """As the newest checkpoint with a readable manifest has it."""
    for folder in newest_first:
        try:
            name = best_of(read_manifest(folder))
        except CheckpointError:
            continue
        if name and not (run / name).is_dir():
            raise UserError(f"{run} has lost {name}, its best checkpoint by {folder.name}; give another one")
        if name:
            return run / name
        break
    raise UserError(
        f"{run} has no best checkpoint: it was trained without eval.datasets, or not evaluated after a step"
    )
