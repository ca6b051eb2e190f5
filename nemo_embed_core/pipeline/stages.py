"""The stages of a pipeline: each a step (steps/step.py) with its options, in the order in which they run.

    stages = stages_of(config, setting, output)       # every option checked, nothing run

pairs      synthesize   documents -> data/train and data/test, split by document
written    synthesize   rows that models write for the documents that are not held out, where there are models
start      train        the base's first layers, of method=layers
mine       mine         hard negatives of the rows, by the base
tuned      train
export     merge        a Hugging Face folder; export-FORMAT: further formats
scores     evaluate     base, export and BM25 on data/test
compared   evaluate     their differences, with intervals
check      merge        the export in whatever serves it and is installed; check-FORMAT
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_embed_core.config import ModelConfig, PipelineConfig, TrainConfig
from nemo_embed_core.config.data import dataset_names
from nemo_embed_core.config.pipeline import OF_DOCUMENTS
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.formats import CONSUMERS, FORMATS, LIBRARIES
from nemo_embed_core.options import check_yaml, merged, to_dict
from nemo_embed_core.pipeline.method import Chosen, Machine
from nemo_embed_core.steps.inputs import inputs_of
from nemo_embed_core.steps.state import is_there, real
from nemo_embed_core.steps.step import Step, digest_of, made
from nemo_embed_core.steps.verbs import VERBS, Verb

TASK = "held-out"  # its name in reports
MINE = replace(VERBS["mine"], product="mined", report="mined.report.json")
SELF_PAIRS = "pairs"  # dataset, beside those of models by their tasks' names
# Of train's options those that the file `train` may not have, as the pipeline has its own for them.
OWN = ("output_dir", "init_from", "init_layers", "steps", "epochs", "global_batch_size", "lora", "seed",
       "device", "precision")  # fmt: skip
OWN_DATA = ("datasets", "store", "cache_dir", "query_max_length", "document_max_length", "num_hard_negatives")


@dataclass(frozen=True)
class Setting:
    """What the stages depend on besides the options: found once.  documents: digest of those that are read;
    train: options of the file of that name."""

    machine: Machine
    model: ModelConfig
    documents: str
    chosen: Chosen
    train: Mapping[str, Any] = field(default_factory=dict)


class Stages:
    """Steps by name, in their order."""

    def __init__(self, read: dict[str, str]) -> None:
        self.steps: dict[str, Step] = {}
        self._digests = dict(read)

    def add(self, name: str, verb: Verb, options: Mapping[str, Any], read: Sequence[str] = ()) -> Step:
        """read: inputs that the verb's options do not tell. UserError names the stage."""
        try:
            whole = verb.check([], options)
            text = json.dumps(whole, ensure_ascii=False)
            needs = [step for step in self.steps.values() if step.folder in text]
            inputs = {path: self._digest(path) for path in (*inputs_of(verb, whole), *read)}
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        self.steps[name] = made(name, verb, whole, needs, inputs)
        return self.steps[name]

    def _digest(self, path: str) -> str:
        if path not in self._digests:
            if not Path(path).exists():
                raise UserError(f"{path} is not there")
            self._digests[path] = digest_of(path)
        return self._digests[path]

    @property
    def all(self) -> list[Step]:
        return list(self.steps.values())


def stages_of(config: PipelineConfig, setting: Setting, output: Path, digests: dict[str, str]) -> Stages:
    """digests: by path, of what was read already; gets those that are read here."""
    documents, base = (os.path.abspath(path) for path in (config.documents, config.base))
    digests[documents] = setting.documents
    stages = Stages(digests)
    device, precision = setting.machine.device, precision_of(config, setting.machine)
    lengths = {"query_max_length": config.query_max_length,
               "document_max_length": document_max_length(config, setting.machine)}  # fmt: skip
    encoding = {**lengths, "device": device, "precision": precision}

    about = {"documents": documents, "licence": config.licence, "seed": config.seed,
             "max_documents": config.max_documents, "self_pairs": to_dict(config.self_pairs)}  # fmt: skip
    pairs = stages.add("pairs", VERBS["synthesize"], {**about, "task": config.task}, [documents])
    train, test = f"{pairs.product}/train", f"{pairs.product}/test"
    rows = {SELF_PAIRS: train}
    if config.generate.models:
        tasks = dict(config.generate.tasks) or dict.fromkeys(OF_DOCUMENTS, 1.0)
        generate = {**to_dict(config.generate), "tasks": tasks}
        del generate["journal"]
        models = (*config.generate.models, config.generate.judge)
        local = [config.generate.embedder, *(m.name for m in models if m is not None and not m.base_url)]
        read = [documents, *(os.path.abspath(path) for path in local if path)]
        written = stages.add("written", VERBS["synthesize"], {**about, "generate": generate}, read)
        folder = Path(real(f"{written.product}/datasets", output))
        for task in tasks:  # of which, once it is done, one may have got no row
            if not is_there(written, output) or (folder / task).is_dir():
                rows[task] = f"{written.product}/datasets/{task}"

    chosen = setting.chosen
    whole = {**train_options(config, setting.machine, setting.model, chosen, setting.train)}
    if chosen.method == "layers":
        begin = {name: whole[name] for name in ("data", "device", "precision", "seed", "global_batch_size")}
        begin |= {"init_from": base, "init_layers": list(range(chosen.layers)), "steps": 0}
        begin["loss"] = whole["loss"]
        base = stages.add("start", VERBS["train"], _on(begin, {SELF_PAIRS: train}, 0)).product
    datasets = [{"path": path} for path in rows.values()]
    mined = stages.add(
        "mine", MINE,
        {"model": [base], "num_negatives": config.num_negatives, "threshold": config.threshold,
         "output_format": "dataset", **encoding}
        | ({"datasets": datasets} if len(rows) > 1 else {"data": train}),
    )  # fmt: skip
    names = dataset_names(rows.values())
    places = [f"{mined.product}/{name}" for name in names] if len(rows) > 1 else [mined.product]
    found = dict(zip(rows, places, strict=True))
    tuned = stages.add("tuned", VERBS["train"], _on({**whole, "init_from": base}, found, config.max_rows))

    exports: dict[str, Step] = {}
    for name in config.formats:
        called = f"export-{name}" if exports else "export"
        options = {"sources": [tuned.product], "format": name}
        exports[name] = stages.add(called, VERBS["merge"], options)
    first = config.formats[0]
    scores = stages.add(
        "scores", VERBS["evaluate"],
        {"models": [base, exports[first].product, "bm25"], "data": test, "name": TASK, "seed": config.seed,
         "max_queries": config.max_queries, "training": places, **encoding},
    )  # fmt: skip
    # A base that is a published embedder may cut texts elsewhere.
    stages.add("compared", VERBS["compare"], {"compare": [scores.product], "allow": ["prompts", "lengths"]})
    for name, export in exports.items():
        consumer = FORMATS[name].consumer  # type: ignore[index]
        consumers = [*LIBRARIES, *([consumer] if consumer and is_installed(consumer) else [])]
        called = "check" if name == first else f"check-{name}"
        stages.add(called, VERBS["check"], {"folder": export.product, "consumers": consumers})
    return stages


def is_installed(consumer: str) -> bool:
    return importlib.util.find_spec(CONSUMERS[consumer].module) is not None


def precision_of(config: PipelineConfig, machine: Machine) -> str:
    return machine.precision if config.precision == "auto" else config.precision


def document_max_length(config: PipelineConfig, machine: Machine) -> int:
    return config.document_max_length or (512 if machine.device == "cuda" else 128)


def learning_rate(hidden_size: int, is_lora: bool) -> float:
    """min(1e-3, 1e-5 (4096 / hidden_size)^2), ten times that of adapters before the bound: a rule of thumb
    between the recipe's 1e-5 at 4,096 and the demo's rates at 576."""
    return min(1e-3, (10 if is_lora else 1) * 1e-5 * (4096 / hidden_size) ** 2)


def train_options(
    config: PipelineConfig, machine: Machine, model: ModelConfig, chosen: Chosen, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Without data: of launch/train.py, those of the file over what is chosen here."""
    is_lora, precision = chosen.method == "lora", precision_of(config, machine)
    is_split = not is_lora and precision == "bf16" and machine.device == "cuda"
    values: dict[str, Any] = {
        "data": {"max_tokens": chosen.max_tokens},
        "loss": {"temperature": 0.03, "in_batch": "positives"},
        "optim": {"lr": config.lr or learning_rate(model.hidden_size, is_lora),
                  "master_weights": "split" if is_split else "fp32"},
        "checkpoint": {"every": 100, "keep": 1},
        "activation_checkpointing": chosen.recompute,
        "log_every": 10,
    }  # fmt: skip
    own: dict[str, Any] = {
        "data": {"query_max_length": config.query_max_length, "num_hard_negatives": config.num_negatives,
                 "document_max_length": document_max_length(config, machine)},
        "init_from": os.path.abspath(config.base), "global_batch_size": config.global_batch_size,
        "seed": config.seed, "device": machine.device, "precision": precision,
        **({"steps": config.steps} if config.steps else {"epochs": config.epochs}),
        **({"lora": {"rank": config.lora_rank}} if is_lora else {}),
    }  # fmt: skip
    return merged(TrainConfig, merged(TrainConfig, values, given), own)


def _on(train: Mapping[str, Any], datasets: Mapping[str, str], most: int) -> dict[str, Any]:
    entries = [{"path": path, "name": name, "cap": most or None} for name, path in datasets.items()]
    return {**train, "data": {**train["data"], "datasets": entries}}


def read_train_file(path: str) -> dict[str, Any]:
    """UserError for options that the pipeline has itself."""
    import yaml

    if not path:
        return {}
    check_yaml(path)
    values: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    data = values.get("data") if isinstance(values.get("data"), dict) else {}
    own = [name for name in OWN if name in values] + [f"data.{n}" for n in OWN_DATA if n in (data or {})]
    if own:
        raise UserError(f"train={path}: {own[0]} is the pipeline's own: leave it out there")
    return values
