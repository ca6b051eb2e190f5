"""The libraries that can be told of a run, each as `write(scalars, step)` and `close()`, imported when it is
made. Who calls them, on which thread, and what happens when they fail: trackers.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from nemo_embed_core.config import TrainConfig
from nemo_embed_core.options import to_dict

PROJECT = "nemo_embed_core"


class Tracker(Protocol):
    def write(self, scalars: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Its folder follows one that was left at resume_step."""

    def __init__(self, config: TrainConfig, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(f"{config.output_dir}/tensorboard", purge_step=resume_step + 1)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """WANDB_MODE=offline, WANDB_PROJECT and the like are the library's own. No code, no output is sent."""

    def __init__(self, config: TrainConfig, resume_step: int):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=Path(config.output_dir).name,
            dir=config.output_dir,
            id=run_id(config, "wandb", resume_step),
            resume="allow",
            config=to_dict(config),
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
        )

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are the library's own."""

    def __init__(self, config: TrainConfig, resume_step: int):
        import mlflow

        self._mlflow = mlflow
        file = Path(config.output_dir) / ".mlflow-run"
        known = file.read_text().strip() if resume_step and file.is_file() else None
        self.run_id = mlflow.start_run(run_id=known, run_name=Path(config.output_dir).name).info.run_id
        file.write_text(self.run_id)
        if known is None:
            flat = {name: str(value)[:500] for name, value in _options(to_dict(config))}
            mlflow.log_params(flat, run_id=self.run_id)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step, run_id=self.run_id)

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """TRACKIO_PROJECT names the project; its data stays on this machine unless its own settings say
    otherwise."""

    def __init__(self, config: TrainConfig, resume_step: int):
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run_id(config, "trackio", resume_step),
            config=to_dict(config),
            resume="allow" if resume_step else "never",
            embed=False,
        )

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def _options(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        is_leaf = not isinstance(value, Mapping)
        flat += [(prefix + name, value)] if is_leaf else _options(value, f"{prefix}{name}.")
    return flat


def run_id(config: TrainConfig, tracker: str, resume_step: int) -> str:
    """Name of the run with the tracker: of a run that begins a new one, which a resumed run then keeps."""
    file = Path(config.output_dir) / f".{tracker}-run"
    if resume_step and file.is_file():
        return file.read_text().strip()
    name = f"{Path(config.output_dir).name}-{time.time_ns():x}"
    file.write_text(name)
    return name


# Name in report_to, which is what is imported -> (what makes it, what pip installs).
TRACKERS: Mapping[str, tuple[Callable[[TrainConfig, int], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"),
}
