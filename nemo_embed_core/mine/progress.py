"""How far, how fast, how long still: a bar on a terminal, a line per step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


class Progress:
    """`encoded 32,768 of 120,000 documents, 1,234 documents/s, 00:01:11 left`, or tqdm's bar."""

    def __init__(self, verb: str, unit: str, total: int, log: Callable[[str], None], *, shown: bool = True):
        self.verb, self.unit, self.total, self.log, self.shown = verb, unit, total, log, shown
        # Worked: without what was already there, which says nothing about the speed.
        self.done = self.worked = 0
        self.began = time.monotonic()
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=f"{verb} {unit}", unit=f" {unit}", unit_scale=True)

    def skip(self, count: int) -> None:
        """These were done in an earlier run."""
        self.done += count
        if self.bar is not None:
            self.bar.initial += count
            self.bar.update(count)

    def step(self, count: int) -> None:
        self.done += count
        self.worked += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown:
            rate = self.worked / max(time.monotonic() - self.began, 1e-9)
            left = int((self.total - self.done) / rate)
            clock = f"{left // 3600:02}:{left // 60 % 60:02}:{left % 60:02}"
            done = f"{self.verb} {self.done:,} of {self.total:,} {self.unit}"
            self.log(f"{done}, {rate:,.0f} {self.unit}/s, {clock} left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
