"""json.loads, but no key stands twice, no number is NaN or Infinity, and an error names the file.

parse(text)          any value; ValueError: for a line, or a reader with its own words for damage
read(path)           any value; UserError
read_object(path)    {...}; UserError
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_embed_core.errors import UserError

LFS_POINTER = b"version https://git-lfs"  # begins the small file in place of a large one


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = ascii(next(key for key in keys if keys.count(key) > 1))
        raise ValueError(f"duplicate key {twice if len(twice) <= 60 else twice[:57] + '...'}: keep one")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def parse(text: str | bytes) -> Any:
    """The value of a JSON text, in UTF-8 where it is bytes; RecursionError where it is nested too deep."""
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    if text.startswith("\ufeff"):  # as json.loads, which the decoder alone does not
        raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
    return _DECODER.decode(text)


def raw_decode(text: str, at: int) -> tuple[Any, int]:
    """(the value that begins at this character, where it ends), for a reader of longer texts."""
    return _DECODER.raw_decode(text, at)


def lfs_pointer(path: Path) -> UserError:
    return UserError(f"{path} is a git-lfs pointer, not the file itself; run git lfs pull in {path.parent}")


def read(path: Path) -> Any:
    """The value in the file."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        if path.read_bytes().startswith(LFS_POINTER):
            raise lfs_pointer(path) from None
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    value = read(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
