"""Frozen dataclasses as options, made of a YAML file or a dict, with every value checked.

    config = TrainConfig.from_yaml("configs/train-debug.yaml", output_dir="runs/debug")
    config = TrainConfig.from_dict({"output_dir": "runs/debug", "steps": 100, "optim": {"lr": 1e-6}})

command_line.py makes them of arguments. The text of an option is the string below its field: --help and
docs/options.md are made of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
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
        """Wrong types are refused whoever makes the object: TrainConfig(data={...}), dataclasses.replace."""
        for name, kind in types_of(type(self)).items():
            if not _fits(value := getattr(self, name), kind):
                items = value if isinstance(value, list) else [value]
                is_section = any(isinstance(item, dict) for item in items) and any(classes_in(kind))
                way = "; from_dict takes a dict in its place" if is_section else ""
                raise UserError(f"{self._prefix}{name}={short(value)} must be {words(kind)}{way}")

    def given(self, names: Iterable[str]) -> list[str]:
        """Those of these options that have another value than their default."""
        has = _defaults(type(self))
        return [name for name in names if getattr(self, name) != has[name]]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The dict that `to_dict` gives, or a part of it: dicts become sub-configs, values are checked."""
        return _make(cls, values, "")

    @classmethod
    def from_yaml(cls, *paths: str | Path, **options: Any) -> Self:
        """The files that `--config` takes, each over those before it; `options` override them, a dict only
        the keys that it has."""
        from jsonargparse import get_loader

        values: dict[str, Any] = {}
        for path in paths:
            check_yaml(path)
            values = merged(cls, values, get_loader("yaml")(Path(path).read_text(encoding="utf-8")))
        try:
            return cls.from_dict(merged(cls, values, options))
        except UserError as error:
            raise UserError(f"{', '.join(map(str, paths))}: {error}") from None


C = TypeVar("C", bound=Options)


def _defaults(cls: type[Options]) -> dict[str, Any]:
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(cls)
    }


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def changed(config: Options) -> dict[str, Any]:
    """{"optim.lr": 1e-6} of every option that has another value than its default; of objects in lists what
    they have changed."""
    found, defaults = dict[str, Any](), _defaults(type(config))
    for name, kind in types_of(type(config)).items():
        value = getattr(config, name)
        if is_section(kind):
            found |= {f"{name}.{key}": inner for key, inner in changed(value).items()}
        elif value != defaults[name] and not _follows(config, name, defaults[name]):
            found[name] = _without_defaults(value)
    return found


def _follows(config: Options, name: str, default: Any) -> bool:
    """Whether the constructor makes this value of the default, as head_dim follows from the sizes."""
    try:
        return bool(getattr(dataclasses.replace(config, **{name: default}), name) == getattr(config, name))
    except (UserError, TypeError):
        return False


def _without_defaults(value: Any) -> Any:
    if isinstance(value, Options):
        return changed(value)
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def dump_yaml(config: Any, path: Path) -> None:
    """The resolved tree as YAML that `--config` and `from_yaml` read back."""
    import yaml

    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


# ------------------------------------------------------------------------------------------ types

_UNIONS = (typing.Union, types.UnionType)


_TYPES: dict[type[Options], dict[str, Any]] = {}  # to resolve them is most of the time to make a tree


def types_of(cls: type[Options]) -> Mapping[str, Any]:
    if cls not in _TYPES:
        hints = typing.get_type_hints(cls)
        _TYPES[cls] = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return _TYPES[cls]


def options_of(cls: type[Options]) -> Iterator[tuple[str, Any]]:
    """(optim.lr, float) of every option, and (data.datasets.path, str) of objects that an option takes."""
    for name, kind in types_of(cls).items():
        yield name, kind
        for inner in classes_in(kind):
            yield from ((f"{name}.{key}", k) for key, k in options_of(inner))


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Options)


def classes_in(kind: Any) -> list[type[Options]]:
    """DatasetConfig of list[DatasetConfig], RopeScaling of RopeScaling | None."""
    return [k for k in (kind, *typing.get_args(kind)) if is_section(k)]


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return any(_fits(value, k) for k in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:  # of strings
        return isinstance(value, dict) and all(
            isinstance(k, str) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def words(kind: Any) -> str:
    """int | None: an integer or null. As errors and docs/options.md say it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return " or ".join(map(words, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is list:
        return f"a list (each {words(arguments[0])})"
    if origin is dict:
        return f"a mapping (to each name {words(arguments[1])})"
    if is_section(kind):
        return f"a {kind.__name__}"
    names = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
    return names.get(kind, "null")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# ------------------------------------------------------------------------------------------ dicts and files


def _make(cls: type[C], values: Any, path: str) -> C:
    if not isinstance(values, Mapping):
        raise UserError(not_a_section(path or cls.__name__, values, cls))
    prefix, kinds = f"{path}." if path else "", types_of(cls)
    for key in values:
        if key not in kinds:
            raise UserError(no_option(cls, str(key), prefix))
    for f in dataclasses.fields(cls):
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{f.name} is missing")
    return cls(**{key: _convert(kinds[key], value, f"{prefix}{key}") for key, value in values.items()})


def _convert(kind: Any, value: Any, path: str) -> Any:
    """value with sub-configs in place of dicts, for the constructor to check; lists are copied."""
    if is_section(kind):
        return value if isinstance(value, kind) else _make(kind, value, path)
    if isinstance(value, list) and typing.get_origin(kind) is list:
        (item_kind,) = typing.get_args(kind)
        return [_convert(item_kind, item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping | list) and typing.get_origin(kind) in _UNIONS:
        for k in typing.get_args(kind):  # of X | None, the X that takes it
            if is_section(k) or typing.get_origin(k) is list:
                return _convert(k, value, path)
    return value


def not_a_section(name: str, value: Any, cls: type[Options]) -> str:
    return f"{name}={short(value)} must be a mapping of the options of {cls.__name__}"


def no_option(cls: type[Options], key: str, prefix: str = "") -> str:
    near = difflib.get_close_matches(key, dict(options_of(cls)), n=1, cutoff=0.75)
    return f"{prefix}{key} is not an option" + (f"; did you mean {prefix}{near[0]}?" if near else "")


def merged(cls: type[Options], values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Section by section; any other value, a list or mapping too, is replaced, as on the command line."""
    found, kinds = {**values, **changes}, types_of(cls)
    for key, change in changes.items():
        sections = classes_in(kinds[key]) if key in kinds else []
        if sections and isinstance(change, dict) and isinstance(values.get(key), dict):
            found[key] = merged(sections[0], values[key], change)
    return found


def check_yaml(path: str | Path) -> None:
    """YAML says that a repeated key is an error; PyYAML keeps the last one silently."""
    import yaml

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} holds no mapping of options")
    _refuse_repeated_keys(root, path)


def _refuse_repeated_keys(node: yaml.Node, path: str | Path) -> None:
    import yaml

    lines: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if key.value in lines:
            where = f"stands here and on line {lines[key.value]}"
            raise DataError(path, line, f"key {key.value!r} {where}; keep one")
        lines[key.value] = line
        _refuse_repeated_keys(value, path)
    for item in node.value if isinstance(node, yaml.SequenceNode) else ():
        _refuse_repeated_keys(item, path)
