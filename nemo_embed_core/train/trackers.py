"""Trackers beside metrics.jsonl, which stays the record: each behind a bounded queue and a thread of its own
on the first rank, so that one that hangs, raises or is slow neither stops a rank nor slows a step nor holds
up another one.

    trackers = Trackers([("wandb", make)], log)      # make() -> a Tracker, called on its thread
    trackers.write({"step": 1, "loss": 0.5})         # returns at once
    trackers.close()                                 # waits CLOSE_S for them all, then says what is lost
"""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from nemo_embed_core.config import TrainConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import to_dict

SIZE = 1000  # lines that may wait
CLOSE_S = 30.0  # at the end, for all trackers together
PROJECT = "nemo_embed_core"


class Tracker(Protocol):
    def write(self, scalars: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """What metrics.jsonl says of a step as name -> number: "eval": {"mean": 0.5} is eval/mean; null is left
    out, and so is the step."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": number for key, number in scalars(value).items()}
        elif isinstance(value, int | float) and name != "step":
            flat[name] = float(value)
    return flat


class TensorBoard:
    """Its folder follows one that was left at resume_step."""

    def __init__(self, config: TrainConfig, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(config.output_dir) / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

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
        is_section = isinstance(value, Mapping) and value
        flat += _options(value, f"{prefix}{name}.") if is_section else [(f"{prefix}{name}", value)]
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


def check_trackers(config: TrainConfig) -> None:
    """UserError for one that is asked for and not installed."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            package = TRACKERS[name][1]
            raise UserError(f"report_to has {name}, but it is not installed: pip install {package}")


class Behind:
    """One tracker on its thread. A line that finds the queue full, or that the tracker refuses, is counted
    and lost; so is each of one that cannot be made."""

    def __init__(self, name: str, make: Callable[[], Tracker], log: Callable[[str], None], size: int = SIZE):
        self.name, self._make, self._log = name, make, log
        self._lines: queue.Queue[Mapping[str, Any] | None] = queue.Queue(size)
        self.accepted = self.taken = self.dropped = self.failed = 0
        self._ends = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def write(self, values: Mapping[str, Any]) -> None:
        try:
            self._lines.put_nowait(values)
            self.accepted += 1
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self._log(
                    f"WARNING: tracker {self.name} is behind by {self._lines.maxsize:,} lines: more are lost"
                )

    def end(self) -> None:
        """What is in the queue is still written; returns at once."""
        self._ends.set()
        with suppress(queue.Full):
            self._lines.put_nowait(None)  # wakes a thread that waits

    def _run(self) -> None:
        tracker = self._try(self._make)
        while not (self._ends.is_set() and self._lines.empty()):
            values = self._lines.get()
            if values is None:
                continue
            self.taken += 1
            if tracker is None:
                self.failed += 1
                continue
            self._try(partial(tracker.write, scalars(values), int(values["step"])))
        if tracker is not None:
            self._try(tracker.close)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except BaseException as error:  # also SystemExit of a library: it is a tracker's, not the run's
            self.failed += 1
            if self.failed == 1:
                said = " ".join(str(error).split())[:300]
                self._log(f"WARNING: tracker {self.name} failed: {type(error).__name__}: {said}")
            return None

    def said(self) -> str:
        """What is lost, "" of nothing."""
        parts = [f"{self.accepted - self.taken:,} lines were not yet taken" * self.thread.is_alive(),
                 f"{self.dropped:,} lines found it behind" * bool(self.dropped),
                 f"{self.failed:,} calls failed" * bool(self.failed)]  # fmt: skip
        return ", ".join(filter(None, parts))


class Trackers:
    """All of a run, on its first rank."""

    def __init__(
        self,
        makers: Sequence[tuple[str, Callable[[], Tracker]]],
        log: Callable[[str], None],
        size: int = SIZE,
    ):
        self._log, self.behind = log, [Behind(name, make, log, size) for name, make in makers]

    @classmethod
    def of(cls, config: TrainConfig, resume_step: int, log: Callable[[str], None]) -> Trackers:
        made = [(name, partial(TRACKERS[name][0], config, resume_step)) for name in config.report_to]
        return cls(made, log)

    def write(self, values: Mapping[str, Any]) -> None:
        for behind in self.behind:
            behind.write(values)

    def close(self, wait_s: float = CLOSE_S) -> None:
        end = time.monotonic() + wait_s
        for behind in self.behind:
            behind.end()
        for behind in self.behind:
            behind.thread.join(max(0.0, end - time.monotonic()))
            if said := behind.said():
                self._log(f"WARNING: tracker {behind.name}: {said}; metrics.jsonl has every line")
