"""An experiment: its grid read, its steps run, its table made of their reports."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.config import ExperimentConfig
from nemo_embed_core.evaluation.compare_plot import pyplot_or_refuse
from nemo_embed_core.experiments.cells import Row, steps_of
from nemo_embed_core.experiments.grid import Grid, read_grid
from nemo_embed_core.experiments.table import present, results
from nemo_embed_core.steps.runner import Runner
from nemo_embed_core.steps.state import is_done, listed, real
from nemo_embed_core.steps.step import Step

Say = Callable[[str], None]


def run(config: ExperimentConfig, say: Say = print) -> dict[str, Any] | None:
    """The results, written and printed; None of a dry run, and where cells are left to another call."""
    grid = read_grid(config.grid, config.constants)
    plan = steps_of(grid)
    rows = _chosen(grid, plan.rows, config.only)
    output = Path(config.output).resolve()
    if config.dry_run:
        for line in listed(plan.steps, _ends(rows), output):
            say(line)
        return None
    pyplot_or_refuse()  # not after hours
    how = (config.ranks, config.jobs, config.delete_models)
    Runner(output, plan.steps, _ends(rows), _ends(plan.rows), say, *how).run()
    if left := [row for row in plan.rows if not all(is_done(s, output) for s in row.ends)]:
        say(f"{len(plan.rows) - len(left)} of {len(plan.rows)} rows have their scores: no table yet")
        return None
    found = results(grid, plan, functools.partial(real, output=output))
    present(found, output, say)
    return found


def _ends(rows: Sequence[Row]) -> list[Step]:
    return [step for row in rows for step in row.ends]


def _chosen(grid: Grid, rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    wanted: dict[str, set[str]] = {}
    for item in only:
        axis, _, value = item.partition("=")
        there = {
            "seed": list(map(str, grid.seeds)),
            **{name: list(values) for name, values in grid.axes.items()},
        }
        if value not in there.get(axis, ()):
            ways = "; ".join(f"{name}: {', '.join(values)}" for name, values in there.items())
            raise grid.refuse(f"only={item} is no cell; there are {ways}")
        wanted.setdefault(axis, set()).add(value)
    return [
        row for row in rows
        if all({**row.values, "seed": str(row.seed)}.get(axis) in values for axis, values in wanted.items())
    ]  # fmt: skip
