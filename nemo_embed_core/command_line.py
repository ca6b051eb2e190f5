"""The command line of a launcher: --config x.yaml --optim.lr 1e-6 --loss.temperature=0.05 --models A B.

    config = load_config(TrainConfig)

jsonargparse reads the arguments; its messages are put into the words of options.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import (
    C,
    Options,
    changed,
    check_yaml,
    is_section,
    no_option,
    not_a_section,
    options_of,
    types_of,
    words,
)


def load_config(cls: type[C], argv: Sequence[str] | None = None) -> C:
    """The dataclass from `--config file.yaml` and `--a.b value` after it; lists are `--models A B C`.

    Unknown keys, wrong types and impossible values raise a UserError of one paragraph that names the option.
    """
    from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

    # A value that looks like the path of a class would be imported before it is refused.
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[__package__])
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE] ..."
    parser = ArgumentParser(description=cls.__doc__, usage=usage, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; options after it override it")
    parser.add_class_arguments(cls, as_group=False)
    parser.set_defaults(dict(_underived(cls)))
    argv = sys.argv[1:] if argv is None else list(argv)
    _check_files(cls, argv)
    try:
        values = parser.parse_args(_join_lists(cls, argv))
    except (ArgumentError, ImportError) as error:  # ImportError: of a section with the key class_path
        raise UserError(_explain(cls, str(error))) from None
    values.pop("config", None)
    for name, section in _sections(cls):
        if not isinstance(value := values.get(name), Namespace):
            raise UserError(not_a_section(name, value, section))
    return cls(**vars(parser.instantiate(values)))


def arguments(config: Options) -> list[str]:
    """The shortest command line of which load_config makes this: options that are not at their default."""
    argv = []
    for name, value in changed(config).items():
        argv += [f"--{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
    return argv


def _sections(cls: type[Options]) -> list[tuple[str, type[Options]]]:
    return [(name, kind) for name, kind in options_of(cls) if is_section(kind)]


def _underived(cls: type[Options]) -> Iterator[tuple[str, Any]]:
    """Defaults of sections that their constructor replaces: head_dim follows from the sizes.

    The parser takes a section's default instance, where the value would stick when the sizes are overridden.
    """
    for name, section in _sections(cls):
        instance = section()
        for f in dataclasses.fields(section):
            if f.default is not dataclasses.MISSING and f.default != getattr(instance, f.name):
                yield f"{name}.{f.name}", f.default


def _check_files(cls: type[Options], argv: Sequence[str]) -> None:
    names = {"--config", *(f"--{name}" for name, _ in _sections(cls))}
    for option, value in zip(argv, [*argv[1:], ""], strict=False):  # nothing, of no arguments
        name, is_joined, joined = option.partition("=")
        path = joined if is_joined else value
        if name in names and path and Path(path).is_file():
            check_yaml(path)


def _join_lists(cls: type[Options], argv: list[str]) -> list[str]:
    """`--models A B` -> `--models ["A", "B"]`, as of a list[str]; `--sweep 1 2` -> `--sweep [1,2]`."""
    lists = dict(_lists(cls))
    joined: list[str] = []
    while argv:
        joined.append(argv.pop(0))
        if joined[-1] in lists and argv and not argv[0].startswith("["):
            items = []
            while argv and not argv[0].startswith("--"):
                items.append(argv.pop(0))
            joined.append(json.dumps(items) if lists[joined[-1]] is str else f"[{','.join(items)}]")
    return joined


def _lists(cls: type[Options]) -> Iterator[tuple[str, type]]:
    """(--models, str) of models: list[str], or of list[str] | str."""
    for prefix, section in (("", cls), *((f"{name}.", kind) for name, kind in _sections(cls))):
        for name, kind in types_of(section).items():
            for k in (kind, *typing.get_args(kind)):
                if typing.get_origin(k) is list and typing.get_args(k)[0] in (str, float, int):
                    yield f"--{prefix}{name}", typing.get_args(k)[0]


_KEY = re.compile(r"""Parser key "([\w.]+)"|Group '([\w.]+)' does not accept""")
_UNKNOWN = re.compile(r"(?:unrecognized arguments: --?|[Oo]ption ')([\w.]+)")
_MISSING = re.compile(r"arguments are required: ([\w., ]+)")
_NO_FILE = re.compile(r"(?:Unable to load config|File does not exist:|Importing) [\"']([^\"']*)")
_NESTED = re.compile(r"NestedArg\(key='([^']*)'")  # the parser's word for the x of --optim.lr.x
_VALUE = re.compile(r"(?:Got|Given) value: (.+?)(?= Subclass types| - Expected| Given value type|$)")


def _explain(cls: type[Options], message: str) -> str:
    """The parser's message on one line: the path of the key, and what it takes or which one is nearest."""
    message = " ".join(message.split())
    path = [a or b for a, b in _KEY.findall(message)]
    key, kinds = ".".join(path), dict(options_of(cls))
    if found := _UNKNOWN.search(message):
        return no_option(cls, ".".join([*path, found[1]]))
    if found := _MISSING.search(message):
        return f"{'.'.join([*path, found[1]])} is missing"
    if found := _NO_FILE.search(message):
        key = path[0] if path else "class_path"
        is_file = key not in kinds or is_section(kinds[key])
        takes = "is not a readable file of options" if is_file else f"must be {words(kinds[key])}"
        return f"{key}={found[1]} {takes}"
    if found := _NESTED.search(message):
        return no_option(cls, f"{key}.{found[1]}")
    if key in kinds and (values := _VALUE.findall(message)):
        value = values[0 if len(path) > 1 else -1]  # of a key in an object, of which the whole is told last
        return f"{key}={value[:60]} must be {words(kinds[key])}"
    return message
