"""A grid of runs, as its YAML file says it: docs/experiments.md.

grid = read_grid("configs/experiments/thresholds.yaml", {"base": "exports/model"})
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import check_yaml, short
from nemo_embed_core.steps.verbs import VERBS

STEPS = ("train", "mine", "merge", "judge")  # of VERBS, those of a grid's steps
KEPT = ("text", "folder")  # placeholders of prompts and commands, which are not the grid's
MEAN = "mean"  # of the tasks, where there are several
Wrong = Callable[[str], UserError]
# What each key of the file holds.
KINDS = {
    "question": str, "constants": dict, "seeds": list, "axes": dict, "steps": dict, "models": list,
    "references": dict, "evaluate": dict, "compare": str, "figures": dict,
}  # fmt: skip
WORDS = {str: "a text", list: "a list", dict: "a mapping of names"}


@dataclass(frozen=True)
class Grid:
    """axes: axis -> value -> patches {dotted path: value}, or None where the value is a placeholder's.
    models: steps, "train@144" with vectors cut to 144 columns (launch/evaluate.py).
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


def step_of(model: str) -> tuple[str, str]:
    """(step, columns that its vectors are cut to as "@144", or "")."""
    found = re.fullmatch(r"([\w-]+)(@[1-9][0-9]*)?", model)
    return (found[1], found[2] or "") if found else (model, "")


def read_grid(path: str, constants: Mapping[str, str] | None = None) -> Grid:
    """UserError names the key that is wrong, of the file or of what is given in place of its constants."""
    check_yaml(path)

    def wrong(message: str) -> UserError:
        return UserError(f"{path}: {message}")

    values = _plain(_yaml(Path(path).read_text(encoding="utf-8")), "", wrong)
    if unknown := [key for key in values if key not in KINDS]:
        raise wrong(f"{unknown[0]} is no key of an experiment; there are {', '.join(KINDS)}")
    for key, kind in KINDS.items():
        if values.setdefault(key, None) is None:
            values[key] = kind()
        if not isinstance(values[key], kind):
            raise wrong(f"{key}={short(values[key])} must be {WORDS[kind]}")
    for key, example in (
        ("steps", "{train: {verb: train, options: {...}}}"),
        ("evaluate", "{wiki: {data: ...}}"),
    ):
        if not values[key]:
            raise wrong(f"{key} is missing: {key}: {example}")
    _check_names(values, wrong)
    seeds = values["seeds"] or [1]
    if not all(type(s) is int for s in seeds):
        raise wrong(f"seeds={seeds!r} must be a list of integers")
    if len(set(seeds)) < len(seeds):
        raise wrong(f"seeds={seeds} has one twice")
    if strange := set(constants or {}) - set(values["constants"]):
        have = ", ".join(values["constants"]) or "none"
        raise wrong(f"constants.{sorted(strange)[0]} is not a constant of it; there are: {have}")
    given = {
        name: _typed(name, values["constants"][name], text, wrong) for name, text in (constants or {}).items()
    }
    axes = {axis: _axis(axis, found, wrong) for axis, found in values["axes"].items()}
    for name, step in values["steps"].items():
        _check_step(name, step, wrong)
    models = values["models"] or [list(values["steps"])[-1]]
    is_model = {name: VERBS[step["verb"]].is_model for name, step in values["steps"].items()}
    if bad := [m for m in models if not isinstance(m, str) or not is_model.get(step_of(m)[0])]:
        raise wrong(f"models: {bad[0]!r} is no step that makes a model, nor STEP@COLUMNS of one")
    for name, reference in values["references"].items():
        if not isinstance(reference, str):
            raise wrong(f"references.{name}={short(reference)} must be a model: a path, or bm25")
    if bad := [t for t, options in values["evaluate"].items() if not isinstance(options, dict)]:
        raise wrong(f"evaluate.{bad[0]} must be options of launch/evaluate.py")
    compare = values["compare"] or ("model" if len(models) > 1 else next(reversed(axes), "model"))
    if compare != "model" and compare not in axes:
        raise wrong(f"compare={compare!r} must be an axis ({', '.join(axes) or 'none'}) or model")
    for figure, place in values["figures"].items():
        step = values["steps"].get(str(place).partition(".")[0])
        if not step or "." not in str(place) or not VERBS[step["verb"]].report:
            raise wrong(f"figures.{figure}={short(place)} must be STEP.KEY of a step that mines or judges")
    return Grid(
        path, values["question"], {**values["constants"], **given}, seeds, axes,
        values["steps"], models, values["references"], values["evaluate"], compare, values["figures"],
    )  # fmt: skip


def _yaml(text: str) -> Any:
    from jsonargparse import get_loader

    return get_loader("yaml")(text)


def _plain(value: Any, place: str, wrong: Wrong) -> Any:
    """With the keys of mappings as strings, as 0.95 is one; nothing but what JSON has."""
    if isinstance(value, dict):
        found = {str(key): _plain(item, f"{place}.{key}".strip("."), wrong) for key, item in value.items()}
        if len(found) < len(value):
            raise wrong(f"{place} has a value twice")
        return found
    if isinstance(value, list):
        return [_plain(item, f"{place}.{i}", wrong) for i, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise wrong(f"{place}={short(value)} must be a text, a number, true, false or null")


def _typed(name: str, own: Any, given: str, wrong: Wrong) -> Any:
    """A text where the grid's own value is one, else as YAML reads it: 40 is a number."""
    import yaml

    if isinstance(own, str):
        return given
    try:
        return _plain(_yaml(given), f"constants.{name}", wrong)
    except yaml.YAMLError:
        raise wrong(f"constants.{name}={given} is no value of YAML; its own is {short(own)}") from None


def _check_names(values: Mapping[str, Any], wrong: Wrong) -> None:
    """A name stands in braces, before the dot of STEP.OPTION and in the names of folders."""
    for key in ("constants", "axes", "steps", "evaluate"):
        for name in values[key]:
            if not re.fullmatch(r"[\w-]+", name):
                raise wrong(f"{key}.{name}: a name must be of letters, digits, - and _")
    owners = dict.fromkeys((*KEPT, "model", "seed"), "")
    for key in ("constants", "steps", "axes"):
        for name in values[key]:
            if owners.setdefault(name, key) != key:
                raise wrong(f"{key}.{name}: the name is taken")
    if "evaluate" in values["steps"]:
        raise wrong("steps.evaluate: the name is taken: evaluate.OPTION is of the tasks")
    if MEAN in values["evaluate"]:
        raise wrong(f"evaluate.{MEAN}: the name is taken, by the mean of all tasks")
    if twice := set(values["references"]) & set(values["steps"]):
        raise wrong(f"references.{sorted(twice)[0]}: the name is taken, by a step")


def _axis(axis: str, given: Any, wrong: Wrong) -> dict[str, Any]:
    if not given or not isinstance(given, list | dict):
        raise wrong(f"axes.{axis} must be values, or {{value: {{step.option: ...}}}}")
    if isinstance(given, list):
        found = {str(value): value for value in given}
        if len(found) < len(given):
            raise wrong(f"axes.{axis} has a value twice")
        return found
    if bad := [value for value, patches in given.items() if not isinstance(patches or {}, dict)]:
        raise wrong(f"axes.{axis}.{bad[0]} must be {{step.option: value}}")
    return {value: patches or {} for value, patches in given.items()}


def _check_step(name: str, step: Any, wrong: Wrong) -> None:
    if not isinstance(step, dict) or set(step) - {"verb", "config", "options"} or "verb" not in step:
        raise wrong(f"steps.{name} must be {{verb, config: [files], options}}")
    if step["verb"] not in STEPS:
        raise wrong(f"steps.{name}.verb={step['verb']!r} must be one of {', '.join(STEPS)}")
    files = step.get("config") or []
    if not all(isinstance(file, str) for file in (files if isinstance(files, list) else [files])):
        raise wrong(f"steps.{name}.config={short(files)} must be a file of options, or a list of them")
    if not isinstance(step.get("options") or {}, dict):
        raise wrong(f"steps.{name}.options={short(step['options'])} must be a mapping")
