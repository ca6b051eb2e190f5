"""A grid of runs: what its YAML file says, and the steps that follow, each known by a digest of its inputs.

    grid = read_grid("configs/experiments/thresholds.yaml", {"base": "exports/model"})
    plan = steps_of(grid)                  # every option of every step checked, nothing run

A step (one train, mine, merge, judge or evaluate) is the same step in all cells where its options and what it
reads are the same, and runs once: stage 1 of a grid over thresholds is trained once a seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nemo_embed_core import __version__
from nemo_embed_core.errors import UserError
from nemo_embed_core.experiments.verbs import HERE, VERBS, Verb, inputs_of
from nemo_embed_core.files.durable import sha256_file, sha256_folder
from nemo_embed_core.options import check_yaml

KEPT = ("text", "folder")  # placeholders of prompts and commands, which are not the grid's
KEYS = ("question", "constants", "seeds", "axes", "steps", "models", "references", "evaluate", "compare",
        "figures")  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """axes: axis -> value -> patches {dotted path: value}, or None where the value is a placeholder's.
    references: models that are no step, scored once, by their names in the table."""

    path: str
    question: str
    constants: dict[str, Any]
    seeds: list[int]
    axes: dict[str, dict[str, Any]]
    steps: dict[str, dict[str, Any]]
    models: list[str]
    references: dict[str, str]
    evaluate: dict[str, dict[str, Any]]
    compare: str
    figures: dict[str, str]

    def refuse(self, message: str) -> UserError:
        return UserError(f"{self.path}: {message}")


@dataclass(frozen=True)
class Step:
    """name: of the grid's step; options: checked and whole, paths of other steps with HERE before them."""

    name: str
    verb: Verb
    options: dict[str, Any]
    needs: tuple[Step, ...]
    digest: str

    @property
    def folder(self) -> str:
        return f"{HERE}steps/{self.name}-{self.digest[:12]}"

    @property
    def product(self) -> str:
        return f"{self.folder}/{self.verb.product}"


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


# ------------------------------------------------------------------------------------------ the file


def read_grid(path: str, constants: Mapping[str, str] | None = None) -> Grid:
    """UserError names the key that is wrong, of the file or of what is given in place of its constants."""
    from jsonargparse import get_loader

    check_yaml(path)
    values = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))

    def wrong(message: str) -> UserError:
        return UserError(f"{path}: {message}")

    if unknown := [key for key in values if key not in KEYS]:
        raise wrong(f"{unknown[0]} is no key of an experiment; there are {', '.join(KEYS)}")
    for key, example in (
        ("steps", "{train: {verb: train, options: {...}}}"),
        ("evaluate", "{wiki: {data: ...}}"),
    ):
        if not values.get(key):
            raise wrong(f"{key} is missing: {key}: {example}")
    for key in ("constants", "axes", "steps", "references", "evaluate", "figures"):
        if not isinstance(values.setdefault(key, {}), dict):
            raise wrong(f"{key} must be a mapping of names")
    for name in (*values["steps"], *values["evaluate"]):
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise wrong(f"{name!r}, a name of a folder, must be of letters, digits, dots, - and _")
    seeds = values.get("seeds", [1])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise wrong(f"seeds={seeds!r} must be a list of integers")
    if len(set(seeds)) < len(seeds):
        raise wrong(f"seeds={seeds} has one twice")
    if strange := set(constants or {}) - set(values["constants"]):
        have = ", ".join(values["constants"]) or "none"
        raise wrong(f"constants.{sorted(strange)[0]} is not a constant of it; there are: {have}")
    names = {**dict.fromkeys(values["constants"], "constants"), "seed": "seeds"}
    axes = {}
    for axis, given in values["axes"].items():
        if axis in names or axis in values["steps"] or axis in (*KEPT, "model"):
            raise wrong(f"axes.{axis}: the name is taken")
        is_list = isinstance(given, list)
        if not given or not (is_list or isinstance(given, dict)):
            raise wrong(f"axes.{axis} must be values, or {{value: {{step.option: ...}}}}")
        found = {str(v): None for v in given} if is_list else {str(v): p or {} for v, p in given.items()}
        if bad := [v for v, p in found.items() if p is not None and not isinstance(p, dict)]:
            raise wrong(f"axes.{axis}.{bad[0]} must be {{step.option: value}}")
        if len(found) < len(given):
            raise wrong(f"axes.{axis} has a value twice")
        axes[str(axis)] = {v: given[i] if is_list else p for i, (v, p) in enumerate(found.items())}
    models = values.get("models") or [list(values["steps"])[-1]]
    for name, step in values["steps"].items():
        if not isinstance(step, dict) or set(step) - {"verb", "config", "options"} or "verb" not in step:
            raise wrong(f"steps.{name} must be {{verb, config: [files], options}}")
        if step["verb"] not in VERBS or step["verb"] == "evaluate":
            raise wrong(f"steps.{name}.verb={step['verb']!r} must be one of train, mine, merge, judge")
    if bad := [
        m for m in models if m not in values["steps"] or not VERBS[values["steps"][m]["verb"]].is_model
    ]:
        raise wrong(f"models: {bad[0]!r} is no step that makes a model")
    if bad := [t for t, options in values["evaluate"].items() if not isinstance(options, dict)]:
        raise wrong(f"evaluate.{bad[0]} must be options of launch/evaluate.py")
    compare = values.get("compare") or ("model" if len(models) > 1 else next(reversed(axes), "model"))
    if compare != "model" and compare not in axes:
        raise wrong(f"compare={compare!r} must be an axis ({', '.join(axes) or 'none'}) or model")
    for figure, place in values["figures"].items():
        if str(place).partition(".")[0] not in values["steps"] or "." not in str(place):
            raise wrong(f"figures.{figure}={place!r} must be STEP.KEY of a step that mines or judges")
    return Grid(
        path, values.get("question", ""), {**values["constants"], **(constants or {})}, seeds, axes,
        values["steps"], models, values["references"], values["evaluate"], compare, values["figures"],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ its steps


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
            scores = {task: cell.evaluation(task, made[model]) for task in grid.evaluate}
            plan.rows.append(Row(values, model, seed, scores, figures))
    for name in grid.references:
        cell = _Cell(grid, {}, None, known, digests)
        scores = {task: cell.evaluation(task, str(cell.put(grid.references[name]))) for task in grid.evaluate}
        plan.rows.append(Row({}, name, None, scores, {}))
    _check_differ(grid, plan.rows)
    used = closure([step for row in plan.rows for step in row.ends])
    if idle := [name for name in grid.steps if name not in {step.name for step in used.values()}]:
        raise grid.refuse(f"steps.{idle[0]}: no model, no figure and no other step needs it: leave it out")
    plan.steps.extend(step for step in known.values() if step.digest in used)
    return plan


def closure(steps: Iterable[Step]) -> dict[str, Step]:
    """These and all that they need, by digest."""
    found, queue = dict[str, Step](), list(steps)
    while queue:
        step = queue.pop()
        if found.setdefault(step.digest, step) is step:
            queue += step.needs
    return found


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
        if name in self.open:
            raise UserError(f"steps stand in a circle: {' -> '.join([*self.open, name])}")
        given = self.grid.steps[name]
        self.open.append(name)
        made = self._made(name, VERBS[given["verb"]], given.get("config", []), given.get("options", {}), name)
        self.open.pop()
        return made

    def evaluation(self, task: str, model: Step | str) -> Step:
        of = model.product if isinstance(model, Step) else model
        options = {**self.grid.evaluate[task], "models": [of], "name": task}
        return self._made(f"evaluate-{task}", VERBS["evaluate"], [], options, f"evaluate.{task}")

    def _made(self, name: str, verb: Verb, files: Any, options: Any, place: str) -> Step:
        try:
            whole = verb.check(self.put(files), self._patched(options, place))
            needs = tuple(self._needed(whole))
            read = {path: self._digest(path) for path in inputs_of(verb, whole)}
        except UserError as error:
            said = " ".join(
                [*(f"{axis}={value}" for axis, value in self.values.items()), f"seed={self.seed}"]
            )
            raise self.grid.refuse(f"{place}, cell {said}: {error}") from None
        content = json.dumps([name, whole, [n.digest for n in needs], read, __version__], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()
        return self.known.setdefault(digest, Step(name, verb, whole, needs, digest))

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
            return self.put(self.grid.constants[name])
        if name == "seed" and self.seed is not None:
            return self.seed
        if name in self.values:
            given = self.grid.axes[name][self.values[name]]
            return self.values[name] if isinstance(given, dict) else given
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
            place = Path(path)
            self.digests[path] = sha256_folder(place) if place.is_dir() else sha256_file(place)
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
