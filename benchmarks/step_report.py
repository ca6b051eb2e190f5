"""How the step benchmark measures, and what it says: variants, their times, tables, goals, the time
that is left.

report = Report(results, budget_s=270, quick="8 layers")
if report.enough("ours", 35): ...; report.table(...)
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ceilings import ResultsFile, cpu_name

# What ours should reach: factors over the best peers of the run and, of the whole 8B in bf16 on one H200,
# rates (15,500 useful tokens/s are 66 % of the nominal FLOP/s).
GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("train", "8b"): {
        "over_padded": 3.0,
        "over_flattened": 1.5,
        "tokens_per_s": 15_500,
        "mfu": 0.66,
        "fp8_tokens_per_s": 23_500,
    },
    ("train", "1b"): {"over_padded": 3.0, "over_flattened": 1.5},
    ("train", "tiny"): {"over_padded": 2.5},
    ("encode", "8b"): {"over_padded": 4.0, "tokens_per_s": 46_000, "fp8_tokens_per_s": 65_000},
    ("encode", "1b"): {"over_padded": 4.0},
}


@dataclass
class Variant:
    """Something timed: `run(i)` does the i-th batch of work."""

    name: str
    run: Callable[[int], object]
    useful: float  # share of the positions that are tokens
    kind: str  # ours, ours fp8, padded or flattened
    details: dict[str, Any]
    peak_bytes: int | None = None
    error: str = ""
    last: Any = None  # what the last run of the warm-up gave


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def warm_up(
    variant: Variant,
    device: torch.device,
    runs: int,
    resident: int,
    on_error: Callable[[], None] | None = None,
) -> None:
    """Compiles, fills caches and finds the peak memory above `resident`; what does not run says why in
    `error`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for i in range(runs):
            variant.last = variant.run(i)
        synchronize(device)
        if device.type == "cuda":
            variant.peak_bytes = torch.cuda.max_memory_allocated(device) - resident
    except torch.OutOfMemoryError:
        variant.error = "out of memory"
    except Exception as error:  # compilers and libraries fail in many ways; the reason is part of the result
        if variant.kind.startswith("ours"):
            raise
        variant.error = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if variant.error:  # outside the handlers: their traceback holds the activations
        if on_error is not None:
            on_error()
        release(device)


def interleave(
    variants: Sequence[Variant], device: torch.device, seconds: float, rounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Seconds per run of each variant, taken in turn; a variant stops at its share of `seconds` after
    rounds[0] runs."""
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    share = seconds / max(1, len(variants))
    for i in range(rounds[1]):
        for variant in variants:
            taken = times[variant.name]
            if len(taken) == i and (i < rounds[0] or sum(taken) < share):
                synchronize(device)
                began = time.perf_counter()
                variant.run(i)
                synchronize(device)
                taken.append(time.perf_counter() - began)
    return times


class CpuResults(ResultsFile):
    """Where there is no GPU: the same lines, into the file that was asked for, if any."""

    def __init__(self, path: Path | None):
        self.run = {
            "benchmark": "step",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "gpu": None,
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
        }
        self.path = path or Path(os.devnull)


@dataclass
class Report:
    """Lines on the screen and rows of the results file; `quick`: each says that the model is not whole."""

    results: ResultsFile
    quick: str = ""
    budget_s: float = float("inf")
    ceilings: dict[str, float] = field(
        default_factory=dict
    )  # FLOP/s of the datasheet and of a GEMM, if known
    began: float = field(default_factory=time.monotonic)
    best: dict[tuple[str, str, str], dict[str, Any]] = field(
        default_factory=dict
    )  # (what, shape, kind) -> row

    def say(self, text: str) -> None:
        for line in text.split("\n"):
            print(f"[quick, {self.quick}] {line}" if self.quick else line, flush=True)

    def append(self, **row: Any) -> None:
        self.results.append(**row, **({"quick": self.quick} if self.quick else {}))

    def enough(self, piece: str, seconds: float) -> bool:
        """Whether the budget has so many seconds left; what is left out is said and written."""
        left = self.budget_s - (time.monotonic() - self.began)
        if left < seconds:
            reason = f"left out: takes about {seconds:.0f} s, {max(0.0, left):.0f} s are left (--minutes)"
            self.not_timed(piece, reason)
            return False
        if seconds:
            self.say(f"\n{piece}: about {seconds:.0f} s of {left:.0f} s that are left")
        return True

    def not_timed(self, piece: str, reason: str, **row: Any) -> None:
        self.say(f"{piece}: {reason}")
        self.append(what="not timed", variant=piece, error=reason, **row)

    def table(
        self,
        title: str,
        common: dict[str, Any],
        variants: Sequence[Variant],
        times: dict[str, list[float]],
        tokens: Callable[[int], float],
        flops: Callable[[int], float],
    ) -> None:
        """Medians over the runs of each variant."""
        columns = {"mfu": "MFU", "of_gemm": "of GEMM"}
        shown = [name for name in columns if name in self.ceilings]
        heads = "".join(f"{columns[name]:>9}" for name in shown)
        self.say(f"\n{title}")
        self.say(
            f"{'':66}{'seconds':>9}{'tok/s':>9}{'TF/s':>8}{heads}"
            f"{'useful':>8}{'peak GB':>9}{'ours is':>9}{'runs':>6}"
        )
        for variant in variants:
            row: dict[str, Any] = {"variant": variant.name, "kind": variant.kind, **common, **variant.details}
            row["useful"] = round(variant.useful, 4)
            if variant.error:
                row["error"] = variant.error
                self.say(f"{variant.name:66}  {variant.error}")
            else:
                self._time(row, variant, times[variant.name], tokens, flops)
                self.say(self._line(row, shown))
            self.append(**row)

    def _time(
        self,
        row: dict[str, Any],
        variant: Variant,
        seconds: list[float],
        tokens: Callable[[int], float],
        flops: Callable[[int], float],
    ) -> None:
        runs = np.array([(s, tokens(i) / s, flops(i) / s) for i, s in enumerate(seconds)])
        row["seconds"], row["tokens_per_s"], row["flops_per_s"] = np.median(runs, axis=0).tolist()
        row["all_seconds"] = seconds
        row |= {name: row["flops_per_s"] / ceiling for name, ceiling in self.ceilings.items()}
        row["peak_gb"] = None if variant.peak_bytes is None else variant.peak_bytes / 1e9
        key = row["what"], row["shape"], variant.kind
        if key not in self.best or self.best[key]["tokens_per_s"] < row["tokens_per_s"]:
            self.best[key] = row

    def _line(self, row: dict[str, Any], shown: Sequence[str]) -> str:
        ours = self.best.get((row["what"], row["shape"], "ours"), row)
        line = f"{row['variant']:66}{row['seconds']:9.3f}{row['tokens_per_s']:9,.0f}"
        line += f"{row['flops_per_s'] / 1e12:8.3g}" + "".join(f"{row[column]:9.1%}" for column in shown)
        line += f"{row['useful']:8.3f}" + (
            "        -" if row["peak_gb"] is None else f"{row['peak_gb']:9.1f}"
        )
        return f"{line}{ours['tokens_per_s'] / row['tokens_per_s']:8.2f}x{len(row['all_seconds']):6}"

    def judge(self, what: str, shape: str, whole: bool) -> None:
        """The goals against the best variant of each kind; rates only of the whole model."""
        best = {kind: row for (w, s, kind), row in self.best.items() if (w, s) == (what, shape)}
        if "ours" not in best:
            return
        ours = best["ours"]
        values = {"tokens_per_s": ours["tokens_per_s"], "mfu": ours.get("mfu")} if whole else {}
        if whole and "ours fp8" in best:
            values["fp8_tokens_per_s"] = best["ours fp8"]["tokens_per_s"]
        for kind in ("padded", "flattened"):
            if kind in best:
                values[f"over_{kind}"] = ours["tokens_per_s"] / best[kind]["tokens_per_s"]
        for name, goal in GOALS.get((what, shape), {}).items():
            value = values.get(name)
            verdict = "not measured" if value is None else "met" if value >= goal else "MISSED"
            shown = "" if value is None else f" {value:,.4g},"
            self.say(f"goal: {what} {shape}, {name} at least {goal:,g}:{shown} {verdict}")
            self.append(what="goal", of=what, shape=shape, name=name, goal=goal, value=value)
