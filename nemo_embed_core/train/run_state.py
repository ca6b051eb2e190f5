"""What a checkpoint of a run holds.

State is (weights, optimizer state, step): the data position is the step itself, so a resumed run sees exactly
the rows that an uninterrupted one would have seen, at any world size.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_embed_core.checkpoint.adapter import Adapter
from nemo_embed_core.checkpoint.manifest import PROJECTION, parameter_of, state_name
from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.checkpoint.source import Usage, usage_of_training
from nemo_embed_core.checkpoint.weights import non_finite_weights, write_values
from nemo_embed_core.checkpoint.write import Piece
from nemo_embed_core.config import ModelConfig, TrainConfig
from nemo_embed_core.data import mix
from nemo_embed_core.data.packing import draw_rows
from nemo_embed_core.data.population import Population, population
from nemo_embed_core.data.sampler import Sampler, sampler
from nemo_embed_core.data.store import Store
from nemo_embed_core.data.teacher_vectors import TeacherVectors
from nemo_embed_core.data.tokenizer import Tokenizer
from nemo_embed_core.options import to_dict
from nemo_embed_core.parallel.boxes import Box, unpadded
from nemo_embed_core.parallel.collectives import raise_first
from nemo_embed_core.parallel.grad_norm import is_tp_replicated, local_tensor
from nemo_embed_core.train.engine import Engine
from nemo_embed_core.train.optim import STATE, base_of, remainder_of, set_num_updates, state_of
from nemo_embed_core.train.same_run import began_with, changed_options, changed_samples, refuse_other_model
from nemo_embed_core.train.schedule import num_warmup_steps
from nemo_embed_core.train.spikes import LossWindow


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
    init_from          what the run began with, whatever a resumed one is given
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
        self.init_from = engine.config.init_from
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
            "config": {**options, "optim": to_dict(self.optim), "init_from": self.init_from},
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
        if self.optim.warmup_steps is None:  # left out: the run keeps the one that it began with
            self.optim = replace(self.optim, warmup_steps=manifest["config"]["optim"]["warmup_steps"])
        self.init_from, other = began_with(config, manifest)
        for text in [other] * bool(other) + changed_options(config, self.optim, manifest):
            log(f"WARNING: {text}")
