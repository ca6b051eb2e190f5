"""Frozen dataclasses as options: read from the command line, a YAML file or a dict by one parser, with one set of errors.

    config = load_config(TrainConfig)                      # --config x.yaml --optim.lr 1e-6 --loss.temperature=0.05
    config = TrainConfig.from_yaml("configs/train-debug.yaml", output_dir="runs/debug")
    config = TrainConfig.from_dict({"output_dir": "runs/debug", "steps": 100, "optim": {"lr": 1e-6}})

The text of an option is the string below its field; --help and docs/options.md are made of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from nemo_embed_core.errors import DataError, UserError

if TYPE_CHECKING:
    import yaml


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every configuration. `section`: where its options stand on the command line, as in --optim.lr.

    A dataclass itself: of a class with another base, the parser would accept any subclass that a file names.
    """

    _prefix = ""

    def __init_subclass__(cls, section: str = "") -> None:
        cls._prefix = f"{section}." if section else ""

    def __post_init__(self) -> None:
        """Wrong types are refused however the object is made: TrainConfig(data={...}), dataclasses.replace."""
        for name, kind in _kinds(type(self)).items():
            if not _fits(value := getattr(self, name), kind):
                has_dict = any(isinstance(item, dict) for item in (value if isinstance(value, list) else [value]))
                takes_options = any(map(_is_options, (kind, *typing.get_args(kind))))
                hint = "; from_dict takes a dict in its place" if has_dict and takes_options else ""
                raise UserError(f"{self._prefix}{name}={_short(value)} must be {words(kind)}{hint}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The dict that `to_dict` gives, or a part of it: dicts become sub-configs, everything else is checked."""
        return _made(cls, values, "")

    @classmethod
    def from_yaml(cls, path: str | Path, **options: Any) -> Self:
        """The file that `--config` takes; `options` override it, a dict only the keys that it has."""
        from jsonargparse import get_loader

        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        _check_yaml(text, path)
        try:
            return cls.from_dict(_merged(get_loader("yaml")(text), options))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def dump_yaml(config: Any, path: Path) -> None:
    """The resolved tree as YAML that `--config` and `from_yaml` read back."""
    import yaml

    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


C = TypeVar("C", bound=Options)
UNIONS = (typing.Union, types.UnionType)

# ------------------------------------------------------------------------------------------ types


def _kinds(cls: type[Options]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return any(_fits(value, k) for k in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def words(kind: Any) -> str:
    """int | None: an integer or null. As errors and docs/options.md say it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return " or ".join(map(words, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is list:
        return f"a list (each {words(arguments[0])})"
    if dataclasses.is_dataclass(kind):
        return f"a {kind.__name__}"  # type: ignore[union-attr]
    names = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
    return names.get(kind, "null")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _made(cls: type[C], values: Any, path: str) -> C:
    if not isinstance(values, Mapping):
        raise UserError(f"{path or cls.__name__}={_short(values)} must be a mapping of the options of {cls.__name__}")
    prefix, kinds = f"{path}." if path else "", _kinds(cls)
    for key in values:
        if key not in kinds:
            raise UserError(_unknown(cls, f"{key}", prefix))
    for f in dataclasses.fields(cls):
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{f.name} is missing")
    return cls(**{key: _converted(kinds[key], value, f"{prefix}{key}") for key, value in values.items()})


def _converted(kind: Any, value: Any, path: str) -> Any:
    """value with sub-configs in place of dicts, for the constructor to check; containers are copied."""
    if _is_options(kind):
        return value if isinstance(value, kind) else _made(kind, value, path)
    if isinstance(value, list) and typing.get_origin(kind) is list:
        return [_converted(typing.get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping | list) and typing.get_origin(kind) in UNIONS:
        for k in typing.get_args(kind):  # of X | None, the X that takes it
            if _is_options(k) or typing.get_origin(k) is list:
                return _converted(k, value, path)
    return value


def _is_options(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Options)


def _unknown(cls: type[Options], key: str, prefix: str = "") -> str:
    near = difflib.get_close_matches(key, dict(_keys(cls)), n=1, cutoff=0.75)
    return f"{prefix}{key} is not an option{f'; did you mean {prefix}{near[0]}?' if near else ''}"


def _keys(cls: type[Options]) -> Iterator[tuple[str, Any]]:
    """(optim.lr, float) of every option, and (data.datasets.path, str) of the objects that an option takes."""
    for name, kind in _kinds(cls).items():
        yield name, kind
        for inner in filter(_is_options, (kind, *typing.get_args(kind))):
            yield from ((f"{name}.{key}", k) for key, k in _keys(inner))


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        k: _merged(values[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(values.get(k), dict)
    }
    return {**values, **changes, **both}


# ------------------------------------------------------------------------------------------ the parser


def load_config(cls: type[C], argv: Sequence[str] | None = None) -> C:
    """The dataclass from `--config file.yaml` and `--a.b value` overrides; fields that are lists take `--models A B C`.

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
    # Of a sub-config the parser takes the default instance, where a value may be derived from others (head_dim from the
    # sizes): it would stick when those are overridden.
    parser.set_defaults(dict(_underived(cls)))
    argv = sys.argv[1:] if argv is None else list(argv)
    _check_files(cls, argv)
    try:
        values = parser.parse_args(_join_lists(cls, argv))
    except (ArgumentError, ImportError) as error:  # ImportError: of a section with the key class_path
        raise UserError(_explain(cls, str(error))) from None
    values.pop("config", None)
    for section, kind in _sections(cls):
        if not isinstance(value := values.get(section), Namespace):
            raise UserError(f"{section}={_short(value)} must be a mapping of the options of {kind.__name__}")
    return cls(**vars(parser.instantiate(values)))


def _sections(cls: type[Options]) -> Iterator[tuple[str, type[Options]]]:
    for name, kind in _kinds(cls).items():
        if _is_options(kind):
            yield name, kind
            yield from ((f"{name}.{inner}", k) for inner, k in _sections(kind))


def _underived(cls: type[Options]) -> Iterator[tuple[str, Any]]:
    for section, kind in _sections(cls):
        instance = kind()
        for f in dataclasses.fields(kind):
            if f.default is not dataclasses.MISSING and f.default != getattr(instance, f.name):
                yield f"{section}.{f.name}", f.default


def _check_files(cls: type[Options], argv: Sequence[str]) -> None:
    files = {"--config", *(f"--{section}" for section, _ in _sections(cls))}
    for option, value in zip(argv, [*argv[1:], ""], strict=True):
        name, is_joined, joined = option.partition("=")
        path = joined if is_joined else value
        if name in files and path and Path(path).is_file():
            try:
                _check_yaml(Path(path).read_text(encoding="utf-8"), path)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not valid YAML: {error}") from None


def _check_yaml(text: str, path: str | Path) -> None:
    """YAML says that a repeated key is an error; PyYAML keeps the last one silently."""
    import yaml

    def check(node: yaml.Node | None) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in seen:
                    raise DataError(
                        path, line, f"key {key.value!r} stands here and on line {seen[key.value]}; keep one"
                    )
                seen[key.value] = line
                check(value)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                check(item)

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} holds no mapping of options")
        check(root)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _join_lists(cls: type[Options], argv: list[str]) -> list[str]:
    """`--models A B` -> `--models ["A", "B"]` for the fields of type list[str], `--sweep 1 2` -> `--sweep [1,2]`."""
    lists = dict(_list_fields(cls))
    joined: list[str] = []
    while argv:
        joined.append(argv.pop(0))
        if joined[-1] in lists and argv and not argv[0].startswith("["):
            items = []
            while argv and not argv[0].startswith("--"):
                items.append(argv.pop(0))
            joined.append(json.dumps(items) if lists[joined[-1]] is str else f"[{','.join(items)}]")
    return joined


def _list_fields(cls: type[Options]) -> Iterator[tuple[str, type]]:
    for section, part in (("", cls), *((f"{name}.", kind) for name, kind in _sections(cls))):
        for name, kind in _kinds(part).items():
            for k in (kind, *typing.get_args(kind)):
                if typing.get_origin(k) is list and typing.get_args(k)[0] in (str, float):
                    yield f"--{section}{name}", typing.get_args(k)[0]


def _explain(cls: type[Options], message: str) -> str:
    """The parser's message on one line: the path of the key, and what it takes or which one is nearest."""
    message = " ".join(message.split())
    kinds = dict(_keys(cls))
    path = [*re.findall(r'Parser key "([\w.]+)"', message), *re.findall(r"Group '([\w.]+)' does not", message)]
    if unknown := re.search(r"(?:unrecognized arguments: --?|[Oo]ption ')([\w.]+)", message):
        return _unknown(cls, ".".join([*path, unknown[1]]))
    if missing := re.search(r"arguments are required: ([\w., ]+)", message):
        return f"{'.'.join([*path, missing[1]])} is missing"
    if unread := re.search(r"(?:Unable to load config|File does not exist:|Importing) [\"']([^\"']*)", message):
        key = path[0] if path else "class_path"
        is_file = key not in kinds or _is_options(kinds[key])
        return f"{key}={unread[1]} {'is not a readable file of options' if is_file else f'must be {words(kinds[key])}'}"
    values = re.findall(r"(?:Got|Given) value: (.+?)(?= Subclass types| - Expected| Given value type|$)", message)
    if values and (key := ".".join(path)) in kinds:
        return f"{key}={values[0 if len(path) > 1 else -1][:60]} must be {words(kinds[key])}"
    return message
