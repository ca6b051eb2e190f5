"""What a checkpoint of a run holds, and which run may go on from it.

State is (weights, optimizer state, step): the data position is the step itself, so a resumed run sees exactly
the rows that an uninterrupted one would have seen, at any world size.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_embed_core.checkpoint.adapter import Adapter, adapter_of
from nemo_embed_core.checkpoint.manifest import (
    MANIFEST,
    PROJECTION,
    model_from_dict,
    parameter_of,
    state_name,
)
from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.checkpoint.source import Usage, usage_of_training
from nemo_embed_core.checkpoint.weights import non_finite_weights, write_values
from nemo_embed_core.checkpoint.write import Piece
from nemo_embed_core.config import LoraConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from nemo_embed_core.data import mix
from nemo_embed_core.data.packing import draw_rows
from nemo_embed_core.data.population import Population, population
from nemo_embed_core.data.sampler import Sampler, sampler
from nemo_embed_core.data.store import Store
from nemo_embed_core.data.teacher_vectors import TeacherVectors, refuse_other_teacher
from nemo_embed_core.data.tokenizer import Tokenizer
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import to_dict
from nemo_embed_core.parallel.boxes import Box, unpadded
from nemo_embed_core.parallel.collectives import raise_first
from nemo_embed_core.parallel.grad_norm import is_tp_replicated, local_tensor
from nemo_embed_core.train.engine import Engine
from nemo_embed_core.train.optim import STATE, base_of, remainder_of, set_num_updates, state_of
from nemo_embed_core.train.schedule import num_warmup_steps
from nemo_embed_core.train.spikes import LossWindow


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


def draws_lone_rows(manifest: dict[str, Any] | None) -> bool:
    """Whether a run draws rows without a candidate: begun before they were left out, when no population was
    recorded."""
    return manifest is not None and ("population" not in manifest or manifest.get("draws_lone_rows", False))


def population_of(
    config: TrainConfig, store: Store, manifest: dict[str, Any] | None, log: Callable[[str], None]
) -> Population:
    """Of a new run, or of the one that continues from this manifest."""
    keep_lone = draws_lone_rows(manifest)
    return population(
        store, config.data, config.loss.takes_lone_rows, config.parallel.tp_size, log, keep_lone, config.seed
    )


def sampler_of(config: TrainConfig, drawn: Population) -> tuple[Sampler, TrainConfig]:
    """The sampler of a run, and its options with the number of steps that its epochs have."""
    found = sampler(drawn.parts, config.data.batches, config.global_batch_size, config.seed)
    if config.epochs is None:
        return found, config
    return found, replace(config, steps=found.steps(config.epochs), epochs=None)


def usage_of(config: TrainConfig, model: ModelConfig, store: Store) -> Usage:
    """How everything that uses the run's checkpoints encodes."""
    rows_per_dataset = [source["rows"] for source in store.manifest["sources"]]
    usage = usage_of_training(to_dict(config)["data"], model.pooling, rows_per_dataset)
    return replace(usage, dims=tuple(config.loss.matryoshka_dims))


class RunState:
    """The engine's tensors by name, and the few facts beside them.

    step, skipped      steps done, and those of them whose update was left out for a loss spike
    ledger             hash chain over the rows of every step so far, and whether it was skipped
    losses             what the next loss is judged by
    optim              options of the optimizer with the number of warm-up steps, once it is known
    drawn              of each dataset, by name, rows and tokens so far (data/mix.py)
    evaluated          record of the last evaluation and the best one (train/evaluate.py); {}: there was none
    overrides          what checkpoint.allow_changed has let pass, over all resumes
    export_dtype       of the weights that training began with: what merge writes
    teacher            of the vectors that the loss asks for; None: it asks for none
    adapter            of LoRA, what the manifest says of its base; None: whole models are saved
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        store: Store,
        drawn: Population,
        commit: str,
        run: str | None,
    ):
        self.engine, self.tokenizer, self.store = engine, tokenizer, store
        self.population, self.draws_lone_rows = drawn.digest, drawn.keeps_lone
        self.parts = drawn.parts
        self.drawn: mix.Counts = {part.name: [0, 0] for part in drawn.parts}
        self.commit, self.run = commit, run  # of rank 0, which writes the manifest
        self.step = self.skipped = 0
        self.ledger = "0" * 64
        self.losses = LossWindow(engine.config.spike_zscore)
        self.optim = engine.config.optim
        self.evaluated: dict[str, Any] = {}
        self.overrides: list[dict[str, Any]] = []
        self.export_dtype = engine.dtype
        self.adapter: Adapter | None = None
        self.teacher: TeacherVectors | None = None
        self.shapes = dict(engine.shapes)
        if engine.projection is not None:
            self.shapes[PROJECTION] = tuple(engine.projection.value.shape)

    def count(self, rows: np.ndarray, tokens: np.ndarray, skipped: bool) -> None:
        """A step of these rows, which have so many tokens each, is done."""
        mix.count(self.drawn, self.parts, self.store.dataset_ends, rows, tokens)
        self.step += 1
        self.skipped += skipped
        self.ledger = hashlib.sha256(
            self.ledger.encode()
            + np.ascontiguousarray(rows, dtype="<i8").tobytes()
            + (b"skipped" if skipped else b"")
        ).hexdigest()

    def settle_warm_up(self) -> None:
        """The number of warm-up steps, where neither an option nor the checkpoint has said it."""
        self.optim = replace(
            self.optim, warmup_steps=num_warmup_steps(self.engine.config.num_steps, self.optim)
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Our parameter name and STATE/NAME of what the optimizer keeps of it -> this rank's live shard,
        unpadded."""
        named = {}
        for name, p in self.engine.trained():
            named[name] = local_tensor(p.detach())
            for state, tensor in state_of(self.engine.optimizer, p).items():
                named[state_name(state, name)] = local_tensor(tensor)
        if self.engine.projection is not None:
            named |= self.engine.projection.tensors()
        return {name: unpadded(tensor, self._box(name)) for name, tensor in named.items()}

    def rests(self) -> dict[str, torch.Tensor]:
        """The same names -> what a tensor is read with (kernels/adamw.py: to_fp32), likewise: the lower half
        of a split master, the bases of a moment's blocks."""
        named, optimizer = {}, self.engine.optimizer
        for name, p in self.engine.trained():
            if (half := remainder_of(optimizer, p)) is not None:
                named[name] = unpadded(local_tensor(half), self._box(name))
            for state in STATE:
                if (base := base_of(optimizer, p, state)) is not None:
                    offset, (rows, columns) = self._box(name)
                    block = local_tensor(p).shape[-1] // base.shape[-1]
                    named[state_name(state, name)] = unpadded(base, (offset, (rows, columns // block)))
        return named

    def _box(self, name: str) -> Box:
        """Of this rank."""
        if (plain := parameter_of(name)) == PROJECTION:  # each has all
            return (0, 0), self.shapes[plain]
        return self.engine.box(plain)

    def pieces(self) -> dict[str, Piece]:
        """What this rank writes: its boxes, and those of replicated parameters on tp rank 0; of several
        copies the first. What is learned beside the model, rank 0."""
        pieces: dict[str, Piece] = {}
        if self.engine.mesh.replicate_rank:
            return pieces
        replicated = {name for name, p in self.engine.trained() if is_tp_replicated(p)}
        rests = self.rests()
        for name, tensor in self.tensors().items():
            plain = parameter_of(name)
            if plain == PROJECTION and self.engine.mesh.rank:
                continue
            if tensor.numel() and not (plain in replicated and self.engine.mesh.tp.rank):
                pieces[name] = Piece(self.shapes[plain], self._box(name), tensor, rests.get(name))
        return pieces

    def meta(self) -> dict[str, Any]:
        """Of the manifest, beside the tensors."""
        config, mesh = self.engine.config, self.engine.mesh
        model, options = to_dict(self.engine.model_config), to_dict(config)
        temperature, projection = self.engine.temperature, self.engine.projection
        teacher: dict[str, Any] = {}
        if projection is not None and self.teacher is not None:
            updates = int(projection.moments["step"].item())
            teacher = {"models": self.teacher.models, "columns": self.teacher.width, "updates": updates}
        return {
            "layout": {
                "tp_size": mesh.tp.size,
                "dp_size": mesh.dp_size,
                "dp_replicate": mesh.dp_size // mesh.shard_size,
            },
            "model": model,
            "export_dtype": str(self.export_dtype).removeprefix("torch."),
            **({"adapter": self.adapter.to_json()} if self.adapter is not None else {}),
            "config": {**options, "optim": to_dict(self.optim)},
            "commit": self.commit,
            "run": self.run,
            "overrides": self.overrides,
            "ledger": self.ledger,
            "skipped": self.skipped,
            **({"temperature": temperature.state()} if temperature is not None else {}),
            **({"teacher_vectors": teacher} if teacher else {}),
            "drawn": dict(self.drawn),  # as it is now: it may be written later
            "recent_losses": self.losses.losses,
            "usage": usage_of(config, self.engine.model_config, self.store).to_json(),
            **({"eval": copy.deepcopy(self.evaluated)} if self.evaluated else {}),
            "data_digest": self.store.digest,
            "population": self.population,
            **({"draws_lone_rows": True} if self.draws_lone_rows else {}),
            "num_rows": len(self.store),
            "tokenizer_digest": self.tokenizer.digest,
        }

    def load(self, folder: Path, sampler: Sampler, log: Callable[[str], None]) -> None:
        """Of a verified checkpoint, under this layout; UserError when it is of another run or not finite.
        sampler: counts what was drawn before the step, where the checkpoint is too old to say it."""
        reader = Reader(folder)
        self._check_same_run(folder, reader.manifest, log)
        tensors, projection = self.tensors(), self.engine.projection
        if projection is not None and "teacher_vectors" not in reader.manifest:
            begins = reader.manifest["step"] + 1
            log(f"loss.teacher_vectors_weight: the projection is learned from step {begins} on")
            tensors = {name: x for name, x in tensors.items() if parameter_of(name) != PROJECTION}
        reader.check({name: self.shapes[parameter_of(name)] for name in tensors})
        bad, rests = [], self.rests()
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor.numel():
                    values = reader.read_box(name, self._box(name))
                    write_values(values, tensor, rests.get(name))
                    if not all(x.isfinite() for kept in (values, tensor) for x in kept.aminmax()):
                        bad.append(name)
            raise_first(non_finite_weights(folder, bad) if bad else None)
            self.step, self.ledger = reader.manifest["step"], reader.manifest["ledger"]
            self.skipped, self.losses.losses = (
                reader.manifest["skipped"],
                list(reader.manifest["recent_losses"]),
            )
            self.export_dtype = getattr(torch, reader.manifest["export_dtype"])
            self.evaluated = reader.manifest["eval"]
            set_num_updates(self.engine.optimizer, self.step - self.skipped)
        if projection is not None and "teacher_vectors" in reader.manifest:
            projection.moments["step"].fill_(reader.manifest["teacher_vectors"]["updates"])
        if (temperature := self.engine.temperature) is not None:
            if "temperature" in reader.manifest:
                temperature.load(reader.manifest["temperature"])
            else:
                start = self.engine.config.loss.temperature
                log(f"loss.temperature_lr: learned from step {self.step + 1} on, from {start}")
        self._load_drawn(reader.manifest, sampler, log)
        log(f"resumed from {folder} at step {self.step}")

    def _load_drawn(self, manifest: dict[str, Any], sampler: Sampler, log: Callable[[str], None]) -> None:
        if "drawn" in manifest:
            # Of another mix (checkpoint.allow_changed) datasets that are no longer there keep their counts.
            self.drawn |= {name: list(counts) for name, counts in manifest["drawn"].items()}
        elif self.overrides:
            log(
                "WARNING: the checkpoint does not say what was drawn of each dataset, and samples changed on "
                f"the way: drawn_rows and drawn_tokens count from step {self.step + 1} on"
            )
        else:
            config = self.engine.config
            for step in range(self.step):
                rows, tokens, _ = draw_rows(self.store, sampler, step, config.data, config.seed)
                mix.count(self.drawn, self.parts, self.store.dataset_ends, rows, tokens)

    def _check_same_run(self, folder: Path, manifest: dict[str, Any], log: Callable[[str], None]) -> None:
        """What decides the sequence of samples must be the same; other changes are named in the log."""
        config = self.engine.config
        refuse_other_model(config, folder, manifest, self.engine.model_config)
        self.overrides = list(manifest["overrides"])
        for text in changed_samples(config, folder, manifest, self.store, self.population):
            self.overrides.append({"step": manifest["step"], "changed": text})
            log(
                f"WARNING: {text}, as checkpoint.allow_changed permits: from step {manifest['step'] + 1} "
                "on the samples of a step are others, and no promise holds any more that each is seen "
                "once an epoch; the manifest records it"
            )
        old = manifest["config"]
        if self.optim.warmup_steps is None:  # left out: the run keeps the one that it began with
            self.optim = replace(self.optim, warmup_steps=old["optim"]["warmup_steps"])
        new = json.loads(json.dumps({**to_dict(config), "optim": to_dict(self.optim)}))
        options = {"loss": LossConfig, "optim": OptimConfig}
        for key in ("steps", "loss", "optim", "precision"):
            was = old.get(key)
            if key in options:  # older: fewer options
                was = {**to_dict(options[key]()), **was}
            if was != new[key]:
                log(f"WARNING: {key} changed since the checkpoint: {was} -> {new[key]}")
