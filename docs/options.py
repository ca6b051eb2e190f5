"""docs/options.md, one table per launcher, from the same texts as --help: python -m docs.options"""

import argparse
import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

from docstring_parser import parse_from_object

from launch import merge
from nemo_embed_core.config import LAUNCHERS
from nemo_embed_core.options import Options, classes_in, is_section, types_of, words

TOP = """# Options

Every option of every command, with its type, its default and what it does. Written by
`python -m docs.options` from `nemo_embed_core/config/`, whose texts `--help` prints too.

Every option goes on the command line (`--optim.lr 1e-6`), into a YAML file (`--config run.yaml`; options
after it override it) or into Python (`TrainConfig.from_yaml("run.yaml", optim={"lr": 1e-6})`, a dict with
`TrainConfig.from_dict({...})`). `--print_config` prints the resolved file. Lists are `--models A B`; lists of
objects, whose keys stand here after `[]`, are written in YAML, or as JSON:
`--data.datasets '[{"path": "train.jsonl", "task": "..."}]'`. A wrong name, type or value ends with exit code
2 and one paragraph that names the option; in Python it is a `UserError`.
"""

Row = tuple[str, str, str, str]  # option, type, default, meaning


def rows(cls: type[Options], prefix: str = "") -> Iterator[Row]:
    """A row of each option, and of the keys of each object that an option takes."""
    documented = [entry for base in cls.__mro__[:-1] for entry in parse_from_object(base).params]
    texts = {entry.arg_name: entry.description or "" for entry in documented}
    kinds = types_of(cls)
    for field in dataclasses.fields(cls):
        name, kind = f"{prefix}{field.name}", kinds[field.name]
        if is_section(kind):
            yield from rows(kind, f"{name}.")
            continue
        yield name, words(kind), default(field), texts.get(field.name, "")
        for inner in classes_in(kind):
            yield from rows(inner, f"{name}[]." if typing.get_origin(kind) is list else f"{name}.")


def default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    return "required" if field.default is dataclasses.MISSING else f"`{json.dumps(field.default)}`"


def rows_of_argparse(parser: argparse.ArgumentParser) -> Iterator[Row]:
    for action in parser._actions:
        if action.dest != "help":
            kind = {"float": "a finite number"}.get(getattr(action.type, "__name__", ""), "a string")
            kind = f"one of {', '.join(map(repr, action.choices))}" if action.choices else kind
            kind = f"a list (each {kind})" if action.nargs in ("*", "+") else kind
            kind = "no value" if action.nargs == 0 else kind
            name = ", ".join(action.option_strings).removeprefix("--") or action.dest
            yield name, kind, f"`{json.dumps(action.default)}`", action.help or ""


def table(found: Iterator[Row]) -> Iterator[str]:
    yield "| option | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, *cells in found:
        name = name if name.startswith("-") else f"`{name}`"
        cells = [" ".join(cell.split()).replace("|", r"\|") for cell in cells]
        yield f"| {' | '.join([name, *cells])} |"


def page() -> str:
    lines = [TOP]
    for name, cls in LAUNCHERS.items():
        lines += [f"## launch/{name}.py", "", cls.__doc__ or "", "", *table(rows(cls)), ""]
    lines += ["## launch/merge.py", "", (merge.__doc__ or "").splitlines()[0], ""]
    lines += [*table(rows_of_argparse(merge.options())), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
