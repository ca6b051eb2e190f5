"""The verbs of a step: how its options are checked before anything runs, and what it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_embed_core.config import EvaluateConfig, JudgeConfig, MineConfig, SynthesizeConfig, TrainConfig
from nemo_embed_core.config.evaluate import WITH_BM25
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.formats import LIBRARIES, Format
from nemo_embed_core.merge.recipes import Method, check_recipe, check_weights
from nemo_embed_core.options import Options, short, to_dict

HERE = "@/"  # before the path of a step or its product in options: below the folder of the plan


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """Those of launch/merge.py, but for its check of a folder."""

    sources: list[str]
    output: str
    weights: list[float] | None = None
    method: Method = "average"
    t: float | None = None
    evaluate: str | None = None
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    format: Format = "native"
    task: str | None = None
    document_task: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_recipe(self.method, self.weights, self.t, self.evaluate)
        if not self.sources:
            raise UserError("sources is empty: give the runs to average")
        if self.weights is not None:
            check_weights(self.weights, len(self.sources))
        if self.method == "slerp" and len(self.sources) != 2:
            raise UserError(f"method=slerp goes between two models, and sources has {len(self.sources)}")


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """Of launch/merge.py --check."""

    folder: str
    output: str
    consumers: list[str] = field(default_factory=lambda: list(LIBRARIES))


def _is_one_report(options: Mapping[str, Any]) -> None:
    """UserError for what would be several reports, several models in one, or no score."""
    several = [name for name in ("tasks", "local", "pool", "base") if options.get(name)]
    several += ["split"] if "," in str(options.get("split")) else []
    for name in several:
        raise UserError(
            f"{name}={short(options[name])}: a step is one report of one model; give each split and task an "
            "entry of evaluate of its own"
        )
    kind = options.get("task_type", "retrieval")
    if "bm25" in options["models"] and kind not in WITH_BM25:
        raise UserError(f"bm25 ranks documents for queries: task_type={kind} has none")


def _makes_rows(options: Mapping[str, Any]) -> None:
    if options.get("write_texts"):
        raise UserError(f"write_texts={options['write_texts']} mines nothing: leave it out")


def _merge_argv(options: Mapping[str, Any], product: str) -> list[str]:
    argv = [*options["sources"], "-o", product]
    for name, value in options.items():
        if name != "sources" and value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    return argv


@dataclass(frozen=True, kw_only=True)
class Verb:
    """name: in grids and for people.  launcher: verb of nemo-embed, that is run.

    output: the option that names its product.  paths: options that name what it reads.  data: those of
    them that are datasets, whose files its readers choose by what stands beside the path.  report: of its
    folder the file with its figures.  own: options that every step has.  refuse: UserError for options that
    a step cannot have.  is_ranked: whether it runs under torchrun.  argv: of a launcher that takes arguments,
    from its options and product.  module: is run in place of a launcher.
    """

    name: str
    launcher: str
    options: type[Options]
    output: str
    product: str
    paths: tuple[str, ...]
    data: tuple[str, ...] = ()
    report: str = ""
    is_model: bool = False
    own: tuple[tuple[str, str, str], ...] = ()
    refuse: Callable[[Mapping[str, Any]], None] = lambda options: None
    is_ranked: bool = False
    argv: Callable[[Mapping[str, Any], str], list[str]] | None = None
    module: str = ""

    def check(self, files: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The whole tree of options, defaults too; UserError for what the launcher would refuse."""
        if self.output in options:
            raise UserError(f"{self.output} is the step's own: leave it out")
        files, options = [files] if isinstance(files, str) else files, {**options, self.output: "run"}
        self.refuse(options)  # in its words, before the launcher's own
        make = self.options
        whole = to_dict(make.from_yaml(*files, **options) if files else make.from_dict(options))
        self.refuse(whole)
        del whole[self.output]
        for section, name, value in self.own:
            whole[section][name] = value
        return whole


_ALL = (
    Verb(
        name="train", launcher="train", options=TrainConfig, output="output_dir", product="run",
        paths=("init_from", "tokenizer", "data.datasets.path", "data.datasets.source", "data.store",
               "data.datasets.teacher_vectors", "eval.datasets.path", "eval.datasets.source"),
        data=("data.datasets.path", "eval.datasets.path"),
        is_model=True, is_ranked=True,
        own=(("data", "cache_dir", f"{HERE}data-cache"), ("checkpoint", "resume", "auto")),
    ),
    Verb(
        name="mine", launcher="mine", options=MineConfig, output="output", product="mined.jsonl",
        paths=("model", "data", "source", "datasets.path", "datasets.source", "corpus", "exclude"),
        data=("data", "datasets.path"),
        report="mined.jsonl.report.json", refuse=_makes_rows, is_ranked=True,
    ),
    Verb(
        name="merge", launcher="merge", options=MergeOptions, output="output", product="model",
        paths=("sources",), is_model=True, argv=_merge_argv,
    ),
    Verb(
        name="judge", launcher="", options=JudgeConfig, output="output", product="judged.json",
        paths=("mined", "labels", "cross_encoder"), data=("labels",), report="judged.json",
        module="nemo_embed_core.experiments.judge",
    ),
    Verb(
        name="evaluate", launcher="evaluate", options=EvaluateConfig, output="output", product="report.json",
        paths=("models", "data", "source", "training", "mirror"), data=("data",), refuse=_is_one_report,
    ),
    # Of a pipeline alone. Documents are known by a digest of their own: the pipeline gives it.
    Verb(
        name="synthesize", launcher="synthesize", options=SynthesizeConfig, output="output", product="data",
        paths=(), own=(("generate", "journal", f"{HERE}answers/journal.jsonl"),),
    ),
    Verb(
        name="compare", launcher="evaluate", options=EvaluateConfig, output="output",
        product="compared.json", paths=("compare",),
    ),
    Verb(
        name="check", launcher="merge", options=CheckOptions, output="output", product="log.txt",
        paths=("folder",),
        argv=lambda options, _: ["--check", options["folder"], "--with", *options["consumers"]],
    ),
)  # fmt: skip
VERBS = {verb.name: verb for verb in _ALL}
