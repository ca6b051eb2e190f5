"""The steps of a grid's cells, each known by a digest of its inputs.

    plan = steps_of(read_grid(path))       # every option of every step checked, nothing run

A step (one train, mine, merge, judge or evaluate) is the same step in all cells where its options and what it
reads are the same, and runs once: stage 1 of a grid over thresholds is trained once a seed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nemo_embed_core.checkpoint.weights import read_model_config
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.models import Subject
from nemo_embed_core.experiments.grid import KEPT, Grid, step_of
from nemo_embed_core.steps.inputs import inputs_of
from nemo_embed_core.steps.step import Step, closure, digest_of, made
from nemo_embed_core.steps.verbs import HERE, VERBS, Verb


class Row(NamedTuple):
    """Of the table, for one seed: a cell and one of its models; scores: task -> step that evaluates it."""

    values: dict[str, str]
    model: str
    seed: int | None  # None of a reference
    scores: dict[str, Step]
    figures: dict[str, Step]

    @property
    def ends(self) -> list[Step]:
        return [*self.scores.values(), *self.figures.values()]


@dataclass(frozen=True)
class Plan:
    """rows: of every cell, model and seed.  steps: each once, none before one that it needs."""

    rows: list[Row]
    steps: list[Step] = field(default_factory=list)


def cells(grid: Grid) -> Iterator[tuple[dict[str, str], int]]:
    """(axis -> value, seed), the seeds of a cell one after another."""
    for values in itertools.product(*grid.axes.values()):
        for seed in grid.seeds:
            yield dict(zip(grid.axes, values, strict=True)), seed


def steps_of(grid: Grid) -> Plan:
    """Every cell's steps with their options checked; UserError names the cell, the step and the option."""
    plan, known, digests = Plan([]), dict[str, Step](), dict[str, str]()
    for values, seed in cells(grid):
        cell = _Cell(grid, values, seed, known, digests)
        made = {name: cell.step(name) for name in grid.steps}
        figures = {figure: made[place.partition(".")[0]] for figure, place in grid.figures.items()}
        for model in grid.models:
            step, cut = step_of(model)
            if cut and int(cut[1:]) > (columns := _columns(made[step])):
                raise grid.refuse(f"models: {model}: the vectors of {step} have {columns} columns")
            scores = {task: cell.evaluation(task, made[step].product + cut) for task in grid.evaluate}
            plan.rows.append(Row(values, model, seed, scores, figures))
    for name in grid.references:
        cell = _Cell(grid, {}, None, known, digests)
        scores = {task: cell.evaluation(task, grid.references[name]) for task in grid.evaluate}
        _check_reference(grid, name, str(cell.put(grid.references[name])))
        plan.rows.append(Row({}, name, None, scores, {}))
    _check_differ(grid, plan.rows)
    used = closure([step for row in plan.rows for step in row.ends])
    if idle := [name for name in grid.steps if name not in {step.name for step in used.values()}]:
        raise grid.refuse(f"steps.{idle[0]}: no model, no figure and no other step needs it: leave it out")
    plan.steps.extend(step for step in known.values() if step.digest in used)
    return plan


def _columns(step: Step) -> int:
    """Of the vectors of the model that a step makes: those of what it begins with."""
    first = step.options["init_from"] if step.verb.name == "train" else step.options["sources"][0]
    if not first:
        return int(step.options["model"]["hidden_size"])
    maker = next((need for need in step.needs if first.startswith(need.folder)), None)
    return _columns(maker) if maker else read_model_config(first).hidden_size


def _check_reference(grid: Grid, name: str, model: str) -> None:
    """That it is a model with so many columns, as launch/evaluate.py asks when it begins."""
    if model == "bm25" or model.startswith(HERE):
        return
    try:
        Subject.of(model).check_columns()
    except UserError as error:
        raise grid.refuse(f"references.{name}: {error}") from None


@dataclass(frozen=True)
class _Cell:
    """known: all steps by their digests.  digests: of files, so that each is read once."""

    grid: Grid
    values: dict[str, str]
    seed: int | None
    known: dict[str, Step]
    digests: dict[str, str]
    open: list[str] = field(default_factory=list)

    def step(self, name: str) -> Step:
        given = self.grid.steps[name]
        with self._inside(name):
            return self._made(
                name, VERBS[given["verb"]], given.get("config") or [], given.get("options") or {}, {}, name
            )

    def evaluation(self, task: str, model: str) -> Step:
        own = {"models": [model], "name": task}
        options = self.grid.evaluate[task]
        return self._made(f"evaluate-{task}", VERBS["evaluate"], [], options, own, f"evaluate.{task}")

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        if name in self.open:
            raise UserError(
                f"names stand in a circle: {' -> '.join([*self.open[self.open.index(name) :], name])}"
            )
        self.open.append(name)
        yield
        self.open.pop()

    def _made(
        self, name: str, verb: Verb, files: Any, options: Any, own: Mapping[str, Any], place: str
    ) -> Step:
        """own: options that the grid may not give."""
        try:
            options = self._patched(options, place)
            if given := sorted(own.keys() & options.keys()):
                raise UserError(f"{given[0]} is the experiment's own: leave it out")
            whole = verb.check(self.put(files), {**options, **self.put(own)})
            needs = tuple(self._needed(whole))
            read = {path: self._digest(path) for path in inputs_of(verb, whole)}
        except UserError as error:
            said = " ".join(
                [*(f"{axis}={value}" for axis, value in self.values.items()), f"seed={self.seed}"]
            )
            raise self.grid.refuse(f"{place}, cell {said}: {error}") from None
        step = made(name, verb, whole, needs, read)
        return self.known.setdefault(step.digest, step)

    def _patched(self, options: Any, place: str) -> Any:
        """A deep copy with the patches of this cell's values and their placeholders filled in."""
        options = json.loads(json.dumps(options))
        patches = [
            p for axis, v in self.values.items() if (p := self.grid.axes[axis][v]) and isinstance(p, dict)
        ]
        for path, value in ((path, value) for patch in patches for path, value in patch.items()):
            first, *keys = path.split(".")
            if first not in {*self.grid.steps, "evaluate"} or not keys:
                raise UserError(
                    f"{path}: {first} is no step: STEP.OPTION, evaluate.OPTION or evaluate.TASK.OPTION"
                )
            if first == "evaluate" and keys[0] in self.grid.evaluate and len(keys) > 1:
                first, keys = f"evaluate.{keys[0]}", keys[1:]
            if first in (place, place.partition(".")[0]):
                _set(options, keys, value, path)
        return self.put(options)

    def put(self, value: Any) -> Any:
        """Placeholders filled in; "{name}" alone becomes the value itself, a step the path of its product."""
        if isinstance(value, dict):
            return {key: self.put(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.put(item) for item in value]
        if not isinstance(value, str):
            return value
        if whole := re.fullmatch(r"\{([\w-]+)\}", value):
            return value if whole[1] in KEPT else self._named(whole[1])
        return re.sub(r"\{([\w-]+)\}", lambda m: m[0] if m[1] in KEPT else str(self._named(m[1])), value)

    def _named(self, name: str) -> Any:
        if name in self.grid.constants:
            with self._inside(name):
                return self.put(self.grid.constants[name])
        if name == "seed" and self.seed is not None:
            return self.seed
        if name in self.values:
            given = self.grid.axes[name][self.values[name]]
            with self._inside(name):
                return self.values[name] if isinstance(given, dict) else self.put(given)
        if name in self.grid.steps:
            return self.step(name).product
        there = ", ".join([*self.grid.constants, "seed", *self.values, *self.grid.steps])
        raise UserError(f"{{{name}}} stands for nothing; there are: {there}")

    def _needed(self, options: Any) -> Iterator[Step]:
        """The steps whose paths are in the options, which are known already."""
        text = json.dumps(options, ensure_ascii=False)
        for step in list(self.known.values()):
            if step.folder in text:
                yield step

    def _digest(self, path: str) -> str:
        if path not in self.digests:
            self.digests[path] = digest_of(path)
        return self.digests[path]


def _set(options: Any, keys: list[str], value: Any, path: str) -> None:
    """options[a][b] = value for a.b; a number is the place in a list, a mapping that is missing is made."""
    for i, key in enumerate(keys):
        is_last = i == len(keys) - 1
        if isinstance(options, list):
            if not key.isdigit() or int(key) >= len(options):
                raise UserError(f"{path}: {key} is no place in a list of {len(options)}")
            if is_last:
                options[int(key)] = value
            else:
                options = options[int(key)]
        elif not isinstance(options, dict):
            raise UserError(f"{path}: {'.'.join(keys[:i])} holds {options!r}, which has no {key}")
        elif is_last:
            options[key] = value
        else:
            options = options.setdefault(key, {})


def _check_differ(grid: Grid, rows: list[Row]) -> None:
    """Rows that are the same runs are a forgotten {seed} or an option that changes nothing."""
    seen: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(step.digest for step in (*row.scores.values(), *row.figures.values()))
        if (other := seen.setdefault(key, row)) is not row:
            if row.values == other.values and row.model == other.model:
                raise grid.refuse(
                    f'{row.model} is the same run with seed {other.seed} and {row.seed}: put "{{seed}}" into '
                    "its options (steps.train.options.seed), or give one seed"
                )
            ways = [f"{' '.join(map('='.join, r.values.items()))} {r.model}".strip() for r in (other, row)]
            raise grid.refuse(f"{ways[0]} and {ways[1]} are the same run: their options differ in nothing")
