"""Trackers beside metrics.jsonl, which stays the record: each behind a bounded queue and a thread of its own
on the first rank, so that one that hangs, raises or is slow neither stops a rank nor slows a step nor holds
up another one.

    trackers = Trackers([("wandb", make)], log)      # make() -> a Tracker, called on its thread
    trackers.write({"step": 1, "loss": 0.5})         # returns at once
    trackers.close()                                 # waits CLOSE_S for them all, then says what is lost
"""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from nemo_embed_core.config import TrainConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.train.tracker_libraries import TRACKERS, Tracker

SIZE = 1000  # lines that may wait
CLOSE_S = 30.0  # at the end, for all trackers together


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
