"""What a step reads that no step makes: files and folders that are there before the first one runs."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.steps.verbs import HERE, Verb


def inputs_of(verb: Verb, options: Mapping[str, Any]) -> Iterator[str]:
    """Files and folders that are there before the first step; UserError for one that is not, and for a
    dataset that its readers would refuse before they read it."""
    for name in verb.paths:
        for path in _at(options, name.split(".")):
            yield from _found(path, name)
    for name in verb.data:
        *section, key = name.split(".")
        for entry in _at(options, section):
            if (path := entry[key]) and not path.startswith((HERE, "hf:")):
                is_ranked = name != "data.datasets.path" and entry.get("task_type") == "retrieval"
                _check_files(path, entry, has_corpus=is_ranked or name == "labels")


def _at(value: Any, keys: list[str]) -> Iterator[Any]:
    """The values at a.b.c, of lists those of each item."""
    if isinstance(value, list):
        for item in value:
            yield from _at(item, keys)
    elif keys:
        yield from _at(value[keys[0]], keys[1:])
    else:
        yield value


def _found(path: str, name: str) -> Iterator[str]:
    words = {"models": "bm25", "training": "own"}
    if not path or path.startswith((HERE, "hf:")) or path == words.get(name):
        return
    place = path
    if not Path(path).exists():  # a path with a split, or with a number of columns
        mark = {"exclude": ":", "training": ":", "models": "@"}.get(name)
        place = path.rpartition(mark)[0] or path if mark else path
    if Path(place).exists():
        yield place
    elif glob.has_magic(place) and (matched := sorted(glob.glob(place, recursive=True))):
        yield from matched
    elif place.count(",") == 1 and all(Path(part.strip()).exists() for part in place.split(",")):
        yield from (part.strip() for part in place.split(","))
    else:
        raise UserError(f"{name}={path} is not there")


def _check_files(path: str, entry: Mapping[str, Any], has_corpus: bool) -> None:
    """UserError for a split that the folder lacks, files of several formats, rows in place of a corpus."""
    from nemo_embed_core.data.formats import beir
    from nemo_embed_core.data.readers import corpus_format, source_files

    names = ("split", "source", "min_grade", "on_missing", "format", "ignore", "columns")
    config = DatasetConfig(path=path, **{name: entry[name] for name in names if name in entry})
    if has_corpus and corpus_format(config) is None:
        beir.files(config)  # says what the folder holds instead
    source_files(config)
