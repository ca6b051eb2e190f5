"""The verbs of a step: how its options are checked before anything runs, what it reads and what it makes."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_embed_core.config import EvaluateConfig, JudgeConfig, MineConfig, TrainConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.merge.recipes import check_recipe, check_weights
from nemo_embed_core.options import Options, to_dict

HERE = "@/"  # before the path of a step or its product in options: below the experiment's folder


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """Those of launch/merge.py, but for its check of a folder."""

    sources: list[str]
    output: str
    weights: list[float] | None = None
    method: str = "average"
    t: float | None = None
    evaluate: str | None = None
    dtype: str = "auto"
    format: str = "native"
    task: str | None = None
    document_task: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_recipe(self.method, self.weights, self.t, self.evaluate)
        if not self.sources:
            raise UserError("sources is empty: give the runs to average")
        if self.weights is not None:
            check_weights(self.weights, len(self.sources))


@dataclass(frozen=True)
class Verb:
    """output: the option that names its product.  paths: options that name what it reads.  own: options that
    the experiment sets."""

    name: str
    options: type[Options]
    output: str
    product: str
    paths: tuple[str, ...]
    is_model: bool = False
    own: tuple[tuple[str, str, str], ...] = ()

    def check(self, files: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The whole tree of options, defaults too; UserError for what the launcher would refuse."""
        if not isinstance(options, dict):
            raise UserError("options must be a mapping")
        if self.output in options:
            raise UserError(f"{self.output} is the experiment's own: leave it out")
        files, options = [files] if isinstance(files, str) else files, {**options, self.output: "run"}
        make = self.options
        whole = to_dict(make.from_yaml(*files, **options) if files else make.from_dict(options))
        del whole[self.output]
        for section, name, value in self.own:
            whole[section][name] = value
        return whole


VERBS = {
    "train": Verb(
        *("train", TrainConfig, "output_dir", "run", ("init_from", "tokenizer", "data.datasets"), True),
        own=(("data", "cache_dir", f"{HERE}data-cache"), ("checkpoint", "resume", "auto")),
    ),
    "mine": Verb(
        "mine", MineConfig, "output", "mined.jsonl", ("model", "data", "corpus", "exclude", "datasets")
    ),
    "merge": Verb("merge", MergeOptions, "output", "model", ("sources",), True),
    "judge": Verb("judge", JudgeConfig, "output", "judged.json", ("mined", "labels", "cross_encoder")),
    "evaluate": Verb("evaluate", EvaluateConfig, "output", "report.json", ("models", "data")),
}


def inputs_of(verb: Verb, options: Mapping[str, Any]) -> Iterator[str]:
    """Files and folders that are there before the first step; UserError for one that is not."""
    for name in verb.paths:
        value: Any = options
        for key in name.split("."):
            value = value[key]
        for given in value if isinstance(value, list) else [value]:
            for path in [given["path"], given["source"]] if isinstance(given, dict) else [given]:
                yield from _found(path, name)


def _found(path: str, name: str) -> Iterator[str]:
    if not path or path.startswith((HERE, "hf:")) or (name == "models" and path == "bm25"):
        return
    place = path.partition(":")[0] if name == "exclude" else path
    if Path(place).exists():
        yield place
    elif glob.has_magic(place) and (matched := sorted(glob.glob(place, recursive=True))):
        yield from matched
    elif place.count(",") == 1 and all(Path(part.strip()).exists() for part in place.split(",")):
        yield from (part.strip() for part in place.split(","))
    else:
        raise UserError(f"{name}={path} is not there")
