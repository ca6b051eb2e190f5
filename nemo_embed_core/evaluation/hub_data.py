"""Data sets of mteb's tasks on this machine: in a mirror, or in the cache of the hub.

own = fresh(task, "data/hub")        # a copy that reads the mirror where that has the data set
load(own)                            # UserError names the task, the data set and the reason
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.errors import UserError


def parts_of(task: Any) -> Iterator[Any]:
    """The task itself, or those that it is the mean of (CQADupstack)."""
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    if isinstance(task, AbsTaskAggregate):
        for part in task.metadata.tasks:
            yield from parts_of(part)
    else:
        yield task


def mirrored(path: str, mirror: str) -> Path | None:
    folder = Path(mirror) / path
    return folder if mirror and folder.is_dir() else None


def is_cached(path: str) -> bool:
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = (
        Path(HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}",
        Path(HF_DATASETS_CACHE) / path.replace("/", "___").lower(),
        Path(HF_DATASETS_CACHE) / path.replace("/", "___"),
    )
    return any(folder.is_dir() for folder in folders)


def fresh(task: Any, mirror: str) -> Any:
    """A copy with draws and data of its own, which reads the mirror where that has the data set."""
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    own = copy.deepcopy(task)
    if isinstance(task, AbsTaskAggregate):
        parts = [fresh(part, mirror) for part in task.metadata.tasks]
        own.metadata = task.metadata.model_copy(update={"tasks": parts})
        own.tasks, own.taskname_to_task = parts, {part.metadata.name: part for part in parts}
    elif folder := mirrored(task.metadata.dataset["path"], mirror):
        dataset = {**task.metadata.dataset, "path": str(folder)}
        own.metadata = task.metadata.model_copy(update={"dataset": dataset})
    return own


def load(task: Any) -> None:
    for part in parts_of(task):
        try:
            part.load_data()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            place = part.metadata.dataset["path"]
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{part.metadata.name}: its data set {place} cannot be read here: {reason[:300]}; a whole "
                "copy of it, in the folder of --mirror or in the hub's cache, has all its configurations and "
                "splits"
            ) from error
