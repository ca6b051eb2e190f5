"""One table of an experiment: means over seeds, and differences with intervals for other seeds and queries.

found = results(grid, plan, path_of)        # what results.json holds; docs/experiments.md is made of it
present(found, output, print)               # results.json, results.md, results.png, and printed

S seeds · n queries of a task
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.compare_plot import pyplot_or_refuse
from nemo_embed_core.evaluation.crossed import Error, error_of, shares
from nemo_embed_core.evaluation.results import Result, results_in
from nemo_embed_core.evaluation.statistics import LEVEL
from nemo_embed_core.experiments.cells import Plan, Row
from nemo_embed_core.experiments.grid import MEAN, Grid
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.options import short
from nemo_embed_core.steps.step import Step

Key = tuple[tuple[str, ...], str]  # values of the axes, model


def results(grid: Grid, plan: Plan, path_of: Callable[[str], Any]) -> dict[str, Any]:
    """path_of: the file of a step's product."""
    groups: dict[Key, list[Row]] = {}
    for row in plan.rows:
        groups.setdefault((tuple(row.values.values()), row.model), []).append(row)
    read = {
        task: {key: [_result(row.scores[task], path_of) for row in rows] for key, rows in groups.items()}
        for task in grid.evaluate
    }
    for task, by_key in read.items():
        _check_same(grid, task, [result for own in by_key.values() for result in own])
    entries = []
    for key, rows in groups.items():
        base = _baseline(grid, key, rows)
        own: dict[str, Any] = {task: _scores([r.score for r in read[task][key]]) for task in read}
        if base:
            found = {task: _difference(read[task][key], read[task][base]) for task in read}
            for task, (value, x_Sn) in found.items():
                own[task]["difference"] = _bounded(value, error_of([x_Sn]))
        if len(read) > 1:
            own[MEAN] = _scores(np.mean([own[task]["seeds"] for task in read], axis=0).tolist())
            if base:
                value = float(np.mean([value for value, _ in found.values()]))
                own[MEAN]["difference"] = _bounded(value, error_of([x_Sn for _, x_Sn in found.values()]))
        figures = {name: _scores([_figure(grid, name, row.figures[name], path_of) for row in rows])
                   for name in grid.figures if rows[0].figures}  # fmt: skip
        entries.append({"values": rows[0].values, "model": key[1], "tasks": own, "figures": figures})
    done = [read_object(Path(path_of(step.folder)) / "done.json") for step in plan.steps]
    _mark(entries)
    first = {task: next(iter(by_key.values()))[0] for task, by_key in read.items()}
    return {
        "grid": Path(grid.path).name,
        "question": grid.question,
        "axes": {axis: list(values) for axis, values in grid.axes.items()},
        "models": grid.models,
        "seeds": grid.seeds,
        "compare": grid.compare,
        "level": LEVEL,
        "tasks": {
            task: {name: r.facts[name] for name in ("type", "main_score", "statistic", "queries")}
            for task, r in first.items()
        },
        "rows": entries,
        "code": sorted({about["code"] for about in done}),
        "hours": round(sum(about["seconds"] for about in done) / 3600, 2),
        "machine": _machine(),
    }


def _result(step: Step, path_of: Callable[[str], Any]) -> Result:
    (result,) = results_in(Path(path_of(step.product)))
    return result


def _check_same(grid: Grid, task: str, found: Sequence[Result]) -> None:
    first = found[0]
    for result in found[1:]:
        same_gold = (first.gold is None) == (result.gold is None) and (
            first.gold is None or np.array_equal(first.gold, np.asarray(result.gold))
        )
        if result.ids != first.ids or result.facts["digest"] != first.facts["digest"] or not same_gold:
            raise grid.refuse(f"evaluate.{task}: {result.report} and {first.report} are of other queries")


def _baseline(grid: Grid, key: Key, rows: Sequence[Row]) -> Key | None:
    """The row that this one is compared with: the first value of grid.compare, all else the same."""
    if rows[0].seed is None:
        return None
    values, model = dict(rows[0].values), key[1]
    if grid.compare == "model":
        model = grid.models[0]
    else:
        values[grid.compare] = next(iter(grid.axes[grid.compare]))
    base = (tuple(values.values()), model)
    return None if base == key else base


def _scores(seeds: list[float]) -> dict[str, Any]:
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    return {"score": float(np.mean(seeds)), "spread": spread, "seeds": seeds}


def _difference(own: Sequence[Result], base: Sequence[Result]) -> tuple[float, np.ndarray]:
    """(the mean difference of the scores, [S, n] of the shares of its queries; [S, 1] without queries)."""
    by_seed = [b.score - a.score for a, b in zip(base, own, strict=True)]
    if own[0].statistic == "none":
        return float(np.mean(by_seed)), np.array(by_seed)[:, None]
    both = ([shares(r.statistic, r.values, r.gold) for r in side] for side in (own, base))
    mine, theirs = map(np.array, both)
    return float(np.mean(by_seed)), mine - theirs


def _bounded(value: float, error: Error) -> dict[str, Any]:
    """The bounds and errors are None where nothing tells them."""
    half = error.half()
    is_known = not math.isnan(half)
    low, high = (value - half, value + half) if is_known else (None, None)
    return {
        **{"value": value, "low": low, "high": high},
        # Of a seed, and of the queries alone: what more of which would narrow the interval.
        "error_of_seeds": None if math.isnan(error.seeds) else math.sqrt(error.seeds),
        "error_of_queries": math.sqrt(error.queries) if is_known else None,
        "degrees": error.degrees,
        "error": math.sqrt(error.variance) if is_known else None,
    }


def _mark(entries: Sequence[Mapping[str, Any]]) -> None:
    """holds: the difference keeps its sign at Bonferroni's level of all differences of the table."""
    all_of = _differences(entries)
    known = [found for found in all_of if found["error"] is not None]
    for found in all_of:
        found["holds"] = False
    for found in known:
        error = Error(found["error"] ** 2, found["degrees"], math.nan, math.nan)
        found["holds"] = bool(abs(found["value"]) > error.half(1 - (1 - LEVEL) / len(known)))


def _differences(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [s["difference"] for e in entries for s in e["tasks"].values() if "difference" in s]


def _figure(grid: Grid, name: str, step: Step, path_of: Callable[[str], Any]) -> float:
    file = Path(path_of(f"{step.folder}/{step.verb.report}"))
    if not file.exists():  # of several datasets, each under its name
        file = Path(path_of(f"{step.product}/report.json"))
    value: Any = read_object(file)
    for key in grid.figures[name].split(".")[1:]:
        if not isinstance(value, dict) or key not in value:
            raise grid.refuse(f"figures.{name}={grid.figures[name]}: {file} has no {key}")
        value = value[key]
    if not isinstance(value, int | float):
        raise grid.refuse(f"figures.{name}={grid.figures[name]}: {file} has {short(value)} there, no number")
    return float(value)


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"


# ------------------------------------------------------------------------------------------ to read


def present(found: Mapping[str, Any], output: Path, say: Callable[[str], None]) -> None:
    # shared: of several commands on one disk each that ends last writes them.
    text = f"{json.dumps(found, indent=1, ensure_ascii=False)}\n"
    write_atomically(output / "results.json", text.encode(), shared=True)
    write_atomically(output / "results.md", (markdown(found) + "\n").encode(), shared=True)
    plot(found, output / "results.png")
    head, rows = table(found, lambda text: text)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        say("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    say(note(found))
    say(f"{output}: results.json, results.md, results.png")


def markdown(found: Mapping[str, Any]) -> str:
    head, rows = table(found, lambda text: f"**{text}**")
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", note(found)])


def note(found: Mapping[str, Any]) -> str:
    seeds, several = found["seeds"], len(found["seeds"]) > 1
    known = [d["low"] is not None for d in _differences(found["rows"])]
    base = found["models"][0] if found["compare"] == "model" else found["axes"][found["compare"]][0]
    said = f"Means over seeds {', '.join(map(str, seeds))} ± their standard deviation. " if several else ""
    of = (
        "other seeds and other queries"
        if several
        else f"other queries (one seed, {seeds[0]}, says nothing of others)"
    )
    said += f"In brackets the difference from {found['compare']} {base}, all else the same, with its "
    said += f"{found['level']:.0%} interval for {of} of the same tasks; "
    said += f"bold: it keeps its sign at Bonferroni's level for all {sum(known)}. "
    if not all(known):
        said += "Without an interval: one seed, and no scores of several queries. "
    queries = ", ".join(f"{t['queries']:,} of {name}" for name, t in found["tasks"].items())
    said += f"Queries: {queries}. Steps of {found['hours']:g} h together, on {found['machine']}; "
    return f"{said}{'; '.join(found['code'])}."


def table(found: Mapping[str, Any], bold: Callable[[str], str]) -> tuple[list[str], list[list[str]]]:
    axes = [axis for axis, values in found["axes"].items() if len(values) > 1]
    has_models = len({entry["model"] for entry in found["rows"]}) > 1
    tasks = [*found["tasks"], *([MEAN] if len(found["tasks"]) > 1 else [])]
    names = {
        task: f"{task} {about['main_score'].replace('_at_', '@')}" for task, about in found["tasks"].items()
    }
    figures = list(dict.fromkeys(name for entry in found["rows"] for name in entry["figures"]))
    head = [*axes, *(["model"] if has_models else []), *(names.get(task, task) for task in tasks), *figures]

    def cells(entry: Mapping[str, Any]) -> Iterator[str]:
        yield from (entry["values"].get(axis, "") for axis in axes)
        if has_models:
            yield entry["model"]
        for task in tasks:
            yield _cell(entry["tasks"][task], bold)
        for name in figures:
            yield _number(entry["figures"][name]) if name in entry["figures"] else ""

    return head, [list(cells(entry)) for entry in found["rows"]]


def _number(scores: Mapping[str, Any]) -> str:
    digits = ",.0f" if abs(scores["score"]) >= 100 else ".4f"
    spread = "" if scores["spread"] is None else f" ±{format(scores['spread'], digits)}"
    return f"{format(scores['score'], digits)}{spread}"


def _cell(scores: Mapping[str, Any], bold: Callable[[str], str]) -> str:
    if (d := scores.get("difference")) is None:
        return _number(scores)
    value = bold(f"{d['value']:+.4f}") if d["holds"] else f"{d['value']:+.4f}"
    bounds = "" if d["low"] is None else f" [{d['low']:+.4f}, {d['high']:+.4f}]"
    return f"{_number(scores)} ({value}{bounds})"


def plot(found: Mapping[str, Any], file: Path) -> None:
    """A panel for each task: differences with their intervals."""
    pyplot = pyplot_or_refuse()
    rows = [entry for entry in found["rows"] if any("difference" in s for s in entry["tasks"].values())]
    tasks = list(found["rows"][0]["tasks"])
    size = (3 + 3 * len(tasks), 1.5 + 0.35 * max(1, len(rows)))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=size, squeeze=False, sharey=True)
    names = [
        " ".join([*entry["values"].values(), *([entry["model"]] if found["models"][1:] else [])])
        for entry in rows
    ]
    for axis, task in zip(axes[0], tasks, strict=True):
        for place, entry in enumerate(rows):
            d = entry["tasks"][task]["difference"]
            color = "C1" if d["holds"] else "C0"
            if d["low"] is not None:
                axis.plot([d["low"], d["high"]], [place, place], color=color, linewidth=2)
            axis.plot(d["value"], place, "o", color=color)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set(title=task, xlabel=f"difference, {found['level']:.0%} intervals")
    axes[0, 0].set_yticks(range(len(rows)), names)
    axes[0, 0].invert_yaxis()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def read_results(file: Path) -> dict[str, Any]:
    """As `results` gave it; UserError where it is another file."""
    found = read_object(file)
    if not {"grid", "rows", "tasks", "seeds"} <= found.keys():
        raise UserError(f"{file} holds no results of launch/experiment.py")
    return found
