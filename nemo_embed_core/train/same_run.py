"""Which run may go on from a checkpoint, and what is said of options that are others now."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_embed_core.checkpoint.adapter import adapter_of
from nemo_embed_core.checkpoint.manifest import MANIFEST, model_from_dict
from nemo_embed_core.checkpoint.runs import is_best
from nemo_embed_core.config import LoraConfig, ModelConfig, OptimConfig, TrainConfig
from nemo_embed_core.data.store import Store
from nemo_embed_core.data.teacher_vectors import refuse_other_teacher
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import to_dict


def refuse_other_model(
    config: TrainConfig, folder: Path, manifest: dict[str, Any], model: ModelConfig
) -> None:
    """A checkpoint is continued by the model that wrote it, and forward."""
    if config.steps is not None and manifest["step"] > config.steps:
        raise UserError(
            f"{folder} has done {manifest['step']} steps already and steps={config.steps} is the last one "
            f"asked for; set steps above {manifest['step']} to train on, or use it as it is "
            "(launch/merge.py, launch/evaluate.py)"
        )
    adapter = adapter_of(manifest)
    lora = adapter.lora if adapter is not None else LoraConfig()
    # Dropout may change, as the learning rate may: what is held is the same.
    if (lora.rank or config.lora.rank) and lora != replace(config.lora, dropout=0.0):
        held = f"LoRA adapters ({_lora_words(lora)})" if lora.rank else "a whole model"
        now = f"lora is {_lora_words(config.lora)}" if config.lora.rank else "has no lora"
        raise UserError(
            f"{folder} holds {held} and this run {now}: continue as it was begun, or start a new run with "
            "--init_from and this checkpoint"
        )
    for name, default in (("init_layers", []), ("init_axes", "own")):
        began, now = manifest["config"].get(name, default), getattr(config, name)
        if began != now:
            raise UserError(
                f"{folder} began with {name}={began} and this run has {name}={now}: continue as it was "
                "begun, or start a new run with --init_from and this checkpoint"
            )
    was = model_from_dict(manifest["model"], folder / MANIFEST)
    for name in ("pooling", "is_causal"):
        old, new = getattr(was, name), getattr(model, name)
        if old != new:
            raise UserError(
                f"{folder} was trained with model.{name}={old} and this run has model.{name}={new}, whose "
                f"vectors are others; continue with {old}, or start a new run with --init_from and this "
                "checkpoint"
            )
    if was != model:
        raise UserError(f"{folder} holds a model of another shape: {to_dict(was)}, not {to_dict(model)}")
    if "temperature" in manifest and not config.loss.temperature_lr:
        learned = math.exp(manifest["temperature"]["log"])
        raise UserError(
            f"{folder} has learned a temperature, {learned:.4g} by now, and this run has "
            f"loss.temperature_lr=0, which would go back to loss.temperature={config.loss.temperature}; "
            "continue with a rate, or start a new run with --init_from and this checkpoint"
        )
    if "teacher_vectors" in manifest:
        refuse_other_teacher(config, folder, manifest["teacher_vectors"])


def _lora_words(lora: LoraConfig) -> str:
    return f"rank={lora.rank}, alpha={lora.alpha:g}, targets={' '.join(lora.targets)}"


def changed_samples(
    config: TrainConfig, folder: Path, manifest: dict[str, Any], store: Store, population: str
) -> list[str]:
    """What differs of the options that decide the sequence of samples; UserError where it must not."""
    old, new = manifest["config"], json.loads(json.dumps(to_dict(config)))
    hard = "num_hard_negatives"
    # Begun before stores left out negatives, or before they knew the groups of rows: the same samples where
    # none was left out for it.
    earlier = [store.manifest.get(name) for name in ("digest_v1", "digest_ungrouped")]
    digest = manifest["data_digest"] if manifest["data_digest"] in earlier else store.digest
    changed = [
        (option, f"{name} was {was!r}, now {now!r}")
        for option, name, was, now in (
            ("seed", "seed", old["seed"], new["seed"]),
            ("global_batch_size", "global_batch_size", old["global_batch_size"], new["global_batch_size"]),
            ("data", "data (digest)", manifest["data_digest"], digest),
            ("data", f"data.{hard}", old["data"][hard], new["data"][hard]),
            # Rows left out or shortened: other loss.in_batch, on_long_row or max_tokens, or begun before any
            # were.
            ("data", "rows drawn from (digest, empty for all)", manifest.get("population", ""), population),
            *(
                ("data", f"data.{key}", old["data"].get(key, default), new["data"][key])
                for key, default in {"negatives": "sample", "batches": "mixed"}.items()
            ),
            *(
                ("data", f"{key} of data.datasets", _of_datasets(old, key), _of_datasets(new, key))
                for key in MIX
            ),
        )
        if was != now
    ]
    refused = {option: text for option, text in changed if option not in config.checkpoint.allow_changed}
    if refused:
        raise UserError(
            f"{folder} cannot be continued: {'; '.join(refused.values())}. With these changed the samples "
            "of a step are others; restore them, start a new run with --init_from and this checkpoint, or "
            "accept that samples are seen twice or left out: --checkpoint.allow_changed "
            f"{' '.join(refused)}"
        )
    return [text for _, text in changed]


# Options of a dataset that decide how often its rows are drawn, and what they were before they could be set.
MIX = {"cap": None, "weight": 1.0}


def _of_datasets(config: dict[str, Any], name: str) -> list[Any]:
    return [dataset.get(name, MIX[name]) for dataset in config["data"]["datasets"]]


def began_with(config: TrainConfig, manifest: dict[str, Any]) -> tuple[str, str]:
    """(init_from, as the checkpoints and cards of a resumed run go on to say it; what is to be said of it).

    Its own weights go on, so what it began with stays true, whatever is given now. The base of LoRA is read
    and known by its sha256: it may have moved, as may one that is no longer where it was.
    """
    old, new = str(manifest["config"]["init_from"]), config.init_from
    if config.lora.rank or old == new or (old and new and Path(old).resolve() == Path(new).resolve()):
        return new, ""
    is_gone = bool(old and new) and not Path(old).exists() and not is_best(Path(old))
    stays = new if is_gone else old
    return stays, (
        f"init_from was {old!r}{', which is gone' if is_gone else ''}, now {new!r}: the run goes on with its "
        f"own weights, and its checkpoints say that it began with {stays!r}"
    )


def changed_options(config: TrainConfig, optim: OptimConfig, manifest: dict[str, Any]) -> list[str]:
    """What differs of the options that training depends on and a resumed run may change. optim: with the
    number of warm-up steps that holds."""
    old = manifest["config"]
    pairs = [(name, old.get(name), getattr(config, name)) for name in ("steps", "precision")]
    for section, now in (("loss", config.loss), ("optim", optim), ("lora", config.lora)):
        was = {**to_dict(type(now)()), **old.get(section, {})}  # older: fewer options
        pairs += [(f"{section}.{name}", was[name], value) for name, value in to_dict(now).items()]
    return [f"{name} changed since the checkpoint: {was} -> {now}" for name, was, now in pairs if was != now]
