"""The training loop: sampler -> packing -> forward and backward -> finite check -> clip -> AdamW -> metrics -> checkpoint.

State is (weights, moments, step): the data position is the step itself, so a resumed run sees exactly the rows that an
uninterrupted one would have seen, at any world size.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_embed_core.checkpoint import files
from nemo_embed_core.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    model_from_dict,
    parameter_of,
    read_manifest,
    state_name,
    verify_checkpoint,
)
from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.checkpoint.runs import AllDamagedError, checkpoints, find_checkpoint, newest_whole
from nemo_embed_core.checkpoint.saver import Saver
from nemo_embed_core.checkpoint.source import usage_of_training
from nemo_embed_core.checkpoint.weights import (
    RandomReader,
    Weights,
    fill,
    non_finite_weights,
    open_weights,
    read_model_config,
    tokenizer_folder,
)
from nemo_embed_core.checkpoint.write import Piece, save_checkpoint
from nemo_embed_core.config import (
    CheckpointConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    code_version,
    dump_yaml,
    failpoint,
    to_dict,
)
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.packing import MicroBatch, load_batch, shapes_cost_memory
from nemo_embed_core.data.population import Population, population
from nemo_embed_core.data.sampler import Sampler
from nemo_embed_core.data.store import Store
from nemo_embed_core.data.tokenizer import Tokenizer, load_tokenizer
from nemo_embed_core.data.tokenizer_files import check_servable
from nemo_embed_core.model.attention import pick_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.model.hf import Box, local_box, unpadded
from nemo_embed_core.model.spec import parameter_shapes, tp_dim, tp_unit
from nemo_embed_core.parallel import fsdp
from nemo_embed_core.parallel.collectives import Vote, all_reduce_world_, background_group, gather_objects
from nemo_embed_core.parallel.grad_norm import clip_grad_norm, is_tp_replicated, local_tensor, sync_replicated_grads
from nemo_embed_core.parallel.layout import check_layout, rank_from_env, world_size_from_env
from nemo_embed_core.parallel.liveness import begun_before, mark_begun, note
from nemo_embed_core.parallel.mesh import DTYPES, Mesh, pick_device, pick_precision
from nemo_embed_core.train.metrics import LossWindow, MetricsLog, console_line, device_peak_flops, training_flops
from nemo_embed_core.train.optim import (
    BYTES_PER_PARAMETER,
    build_optimizer,
    ensure_state,
    learning_rate,
    num_warmup_steps,
    set_num_updates,
    state_of,
    with_state,
)
from nemo_embed_core.train.step import forward_backward

NON_FINITE_EXIT_CODE = 4


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite: the step was refused on all ranks and the weights are as before it."""


class _Stopped(Exception):
    """All ranks leave the step here; the text is what they would have done next."""


@dataclass(frozen=True)
class Prepared:
    """What is read and checked before any process group exists; wrong set-ups stop here within seconds."""

    model: ModelConfig
    tokenizer: Tokenizer
    store: Path | None = None  # of the first rank: the folder that all open


def prepare(config: TrainConfig) -> Prepared:
    """Shapes, tokenizer, layout and batch sizes against each other; the first rank also builds the data store."""
    if not config.init_from and not config.tokenizer:
        raise UserError("tokenizer is not set: without init_from there is no folder to take tokenizer.json from")
    try:
        json.dumps(to_dict(config), allow_nan=False)
    except ValueError:
        raise UserError(
            "an option is infinite or not a number; checkpoints record all options as JSON, which has no such"
        ) from None
    device = pick_device(config.device)
    model = config.model
    if config.init_from:  # the pooling is the run's: how the folder pools does not matter to its weights
        model = replace(read_model_config(config.init_from), pooling=model.pooling)
    dp_size = check_layout(config.parallel, world_size_from_env(), model)
    if config.global_batch_size % dp_size:
        raise UserError(
            f"global_batch_size={config.global_batch_size} is not a multiple of the {dp_size} data-parallel ranks; every "
            f"rank takes equally many queries: use {max(1, config.global_batch_size // dp_size) * dp_size}"
        )
    tokenizer = load_tokenizer(config.tokenizer or tokenizer_folder(config.init_from))
    tokenizer.check_fits(model.vocab_size)
    for line in check_servable(tokenizer.files):  # what no export could hand on is not trained with
        if rank_from_env() == 0:
            print(f"WARNING: {line}", flush=True)
    if not config.data.datasets:
        raise UserError("data.datasets is empty; give at least one {path: ...} of a JSONL file or a BEIR folder")
    pick_attention(config.attention, device, run_dtype(config, device))
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard=true, but it is not installed: pip install tensorboard")
    if rank_from_env() == 0:
        _check_output(Path(config.output_dir), model)
        _warn_of_keep_every(config.checkpoint)
        checkpoint, is_newest = _checkpoint_by_name(config)
        manifest = _readable_manifest(checkpoint) if checkpoint is not None else None
        if is_newest and manifest is None:  # a damaged one is skipped
            for checkpoint in checkpoints(Path(config.output_dir)):
                if manifest := _readable_manifest(checkpoint):
                    break
        if checkpoint is not None and manifest is not None:
            _refuse_other_model(config, checkpoint, manifest, model)
        if config.init_from and checkpoint is None:
            open_weights(config.init_from, hashed=False, base=True)
        store = open_store(config.data, tokenizer)
        drawn = _population(config, store, manifest, print)
        if checkpoint is not None and manifest is not None:
            _changed_samples(config, checkpoint, manifest, store, drawn.digest)
        Sampler(drawn.rows, config.global_batch_size, config.seed)
        return Prepared(model, tokenizer, store.folder)
    return Prepared(model, tokenizer)


def _check_output(folder: Path, model: ModelConfig) -> None:
    """An output that is used by another run, unwritable or too full fails now, not at the first checkpoint.

    A checkpoint needs room beside the one before it: 2.2 x its size in a new folder, 1.1 x where there is one already.
    """
    files.probe(folder)
    files.Lock(folder, print).refuse_if_held(warn=False)  # the one that takes it warns
    parameters = sum(torch.Size(shape).numel() for shape in parameter_shapes(model).values())
    size = BYTES_PER_PARAMETER * parameters
    factor = 1.1 if checkpoints(folder) else 2.2
    files.check_free_space(folder, int(factor * size), f"{factor} x a checkpoint of {size:,} bytes")


def _warn_of_keep_every(config: CheckpointConfig) -> None:
    both = math.lcm(config.every, config.keep_every)
    if config.keep_every and both != config.keep_every:
        print(
            f"WARNING: checkpoint.keep_every={config.keep_every} is no multiple of checkpoint.every={config.every}: of the steps "
            f"that are saved only every {both:,}th is kept for ever; make keep_every a multiple of every",
            flush=True,
        )


def _draws_lone_rows(manifest: dict[str, Any] | None) -> bool:
    """Whether a run draws rows without a candidate: begun before they were left out, when no population was recorded."""
    return manifest is not None and ("population" not in manifest or manifest.get("draws_lone_rows", False))


def _population(
    config: TrainConfig, store: Store, manifest: dict[str, Any] | None, log: Callable[[str], None]
) -> Population:
    """Of a new run, or of the one that continues from this manifest."""
    keep_lone = _draws_lone_rows(manifest)
    return population(store, config.data, config.loss.in_batch, config.parallel.tp_size, log, keep_lone)


def _checkpoint_by_name(config: TrainConfig) -> tuple[Path | None, bool]:
    """(what a run continues, before a byte of it is verified; whether it is the newest of output_dir, whichever that is)."""
    resume, output = config.checkpoint.resume, Path(config.output_dir)
    present = checkpoints(output)
    if resume == "auto" or (present and begun_before()):  # what is in the way is this torchrun's own earlier attempt's
        return (present[0] if present else None), True
    found = None if resume == "none" else find_checkpoint(Path(resume))
    if present and (found is None or found.resolve() != present[0].resolve()):
        raise CheckpointError(
            f"{output} already holds checkpoints (newest {present[0].name}), which checkpoint.resume={resume} would leave "
            "behind; continue with --checkpoint.resume auto or choose another output_dir"
        )
    return found, False


def _readable_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """None for a damaged one: whether that ends the run is decided when checkpoints are verified."""
    try:
        return read_manifest(checkpoint)
    except UserError:
        return None


def _refuse_other_model(config: TrainConfig, folder: Path, manifest: dict[str, Any], model: ModelConfig) -> None:
    """A checkpoint is continued by the model that wrote it, and forward."""
    if manifest["step"] > config.steps:
        raise UserError(
            f"{folder} has done {manifest['step']} steps already and steps={config.steps} is the last one asked for; "
            f"set steps above {manifest['step']} to train on, or use it as it is (launch/merge.py, launch/evaluate.py)"
        )
    was = model_from_dict(manifest["model"], folder / MANIFEST)
    if was.pooling != model.pooling:
        raise UserError(
            f"{folder} was trained with model.pooling={was.pooling} and this run has model.pooling={model.pooling}, whose vectors "
            f"are others; continue with {was.pooling}, or start a new run with --init_from and this checkpoint"
        )
    if was != model:
        raise UserError(f"{folder} holds a model of another shape: {to_dict(was)}, not {to_dict(model)}")


def _changed_samples(
    config: TrainConfig, folder: Path, manifest: dict[str, Any], store: Store, population: str
) -> list[str]:
    """What differs of the options that decide the sequence of samples; UserError where that is not allowed."""
    old, new = manifest["config"], json.loads(json.dumps(to_dict(config)))
    hard = "num_hard_negatives"
    # Begun before stores left out negatives: the same samples where none was left out.
    digest = manifest["data_digest"] if manifest["data_digest"] == store.manifest.get("digest_v1") else store.digest
    changed = [
        (option, f"{name} was {was!r}, now {now!r}")
        for option, name, was, now in (
            ("seed", "seed", old["seed"], new["seed"]),
            ("global_batch_size", "global_batch_size", old["global_batch_size"], new["global_batch_size"]),
            ("data", "data (digest)", manifest["data_digest"], digest),
            ("data", f"data.{hard}", old["data"][hard], new["data"][hard]),
            # Rows left out or shortened: other loss.in_batch, on_long_row or max_tokens, or begun before any were.
            ("data", "rows drawn from (digest, empty for all)", manifest.get("population", ""), population),
        )
        if was != now
    ]
    refused = {option: text for option, text in changed if option not in config.checkpoint.allow_changed}
    if refused:
        raise UserError(
            f"{folder} cannot be continued: {'; '.join(refused.values())}. With these changed the samples of a step are "
            "others; restore them, start a new run with --init_from and this checkpoint, or accept that samples are "
            f"seen twice or left out: --checkpoint.allow_changed {' '.join(refused)}"
        )
    return [text for _, text in changed]


def run_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    return DTYPES[pick_precision(config.precision, device)]


def build_model(config: TrainConfig, model: ModelConfig, mesh: Mesh, weights: Weights | None) -> Encoder:
    """Encoder on the mesh with its weights: made without memory (meta), sharded, then filled box by box."""
    dtype = run_dtype(config, mesh.device)
    with torch.device("meta"):
        encoder = Encoder(model, mesh.tp, pick_attention(config.attention, mesh.device, dtype))
    fsdp.shard(
        encoder,
        encoder.model.layers,
        mesh,
        dtype=dtype,
        reshard_after_forward=config.parallel.reshard_after_forward,
        activation_checkpointing=config.activation_checkpointing,
    )
    encoder.to_empty(device=mesh.device)
    reader = weights.reader if weights is not None else RandomReader(model, config.seed)
    failure = None
    try:
        fill(encoder, reader, model, (mesh.tp.rank, mesh.tp.size), (mesh.dp_rank, mesh.dp_size))
    except UserError as error:
        failure = str(error)
    _raise_first(failure)
    return encoder


def _raise_first(failure: str | None) -> None:
    """UserError on all ranks when there is one on any, so that none waits for another; called by all."""
    if first := next(filter(None, gather_objects(failure)), None):
        raise UserError(first)


def _open_same_store(config: TrainConfig, prepared: Prepared) -> Store:
    """The store that the first rank has built or found, by its folder: the sources are read on one rank alone."""
    folder = prepared.store
    if folder is None and rank_from_env() == 0:  # prepare() was not asked
        folder = open_store(config.data, prepared.tokenizer, log=lambda message: None).folder
    folder = gather_objects(folder)[0]
    assert folder is not None
    _raise_first(
        None
        if folder.is_dir()
        else f"the token store {folder} is not on node {socket.gethostname()}: data.cache_dir={config.data.cache_dir} has to be "
        "a folder that all nodes share"
    )
    return Store(folder)


class Trainer:
    """`Trainer(config, mesh, prepare(config)).run()`; every rank makes one."""

    def __init__(self, config: TrainConfig, mesh: Mesh, prepared: Prepared, log: Callable[[str], None] = print):
        note("set-up")
        self.config, self.mesh = config, mesh
        self.model_config, self.tokenizer = prepared.model, prepared.tokenizer
        self.log = log if mesh.rank == 0 else lambda message: None
        self.output = Path(config.output_dir)
        self._commit = code_version() if mesh.rank == 0 else ""  # rank 0 writes the manifest
        self.dtype = run_dtype(config, mesh.device)
        self.optim = config.optim  # with the number of warm-up steps, once it is known
        self.store = _open_same_store(config, prepared)
        self.step = 0
        self.skipped = 0  # of these steps, those whose update was left out for a loss spike
        self.ledger = "0" * 64  # hash chain over the rows of every step so far, and whether it was skipped
        self.losses = LossWindow(config.spike_zscore)

        self.overrides: list[dict[str, Any]] = []  # what checkpoint.allow_changed has let pass, over all resumes

        checkpoint = self._checkpoint_to_resume()
        try:
            manifest = read_manifest(checkpoint) if checkpoint is not None else None
            self.draws_lone_rows = _draws_lone_rows(manifest)
            drawn = _population(config, self.store, manifest, log=lambda message: None)  # prepare() has said it
            self.population = drawn.digest
            self.sampler = Sampler(drawn.rows, config.global_batch_size, config.seed)
            weights = open_weights(config.init_from, base=True) if config.init_from and checkpoint is None else None
            # The weights' own dtype decides what merge writes: bf16 in, bf16 out.
            self.export_dtype = weights.dtype if weights is not None else self.dtype
            self.model = build_model(config, self.model_config, mesh, weights)
            self.optimizer = build_optimizer(self.model, config.optim)
            ensure_state(self.optimizer)
            if checkpoint is not None:
                self._load(checkpoint)
            self.optim = replace(self.optim, warmup_steps=num_warmup_steps(config.steps, self.optim))
            self.saver = self._saver()
        except BaseException:
            self._unlock()
            raise
        self._stop, self._vote = False, Vote()
        self._micro_batch = 0  # the one at work, for an error message
        self.peak_flops = device_peak_flops(mesh.device) if self.dtype == torch.bfloat16 else None

    # ---- the loop

    def run(self) -> None:
        """Train up to the last step or to a signal; what was reached is saved either way."""
        config, metrics, stop = self.config, None, False
        if self.mesh.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            dump_yaml(config, self.output / "config.yaml")
            metrics = MetricsLog(self.output, self.step, config.tensorboard)
            mark_begun()
        self._announce()
        saved = gather_objects(self.step if checkpoints(self.output) else -1)[0]  # a file system may lag
        try:
            if config.checkpoint.async_save and self.step < config.steps:
                self.saver.snapshot(self._pieces())  # its memory is taken now, or found missing now
            while self.step < config.steps and not stop:
                try:
                    values, stop = self.train_step()
                except _Stopped as place:
                    self.log(f"asked to stop: left step {self.step + 1} before {place}, it runs again after the resume")
                    fsdp.drop_step(self.model)  # weights and moments were not touched by it
                    stop = True
                else:
                    if metrics is not None:
                        metrics.write(values)
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        self.log(console_line(values, config.steps))
                if self.step != saved and (
                    self.step % config.checkpoint.every == 0 or self.step == config.steps or stop
                ):
                    note("save")
                    self.save(wait=stop or self.step == config.steps)
                    saved = self.step
            self._vote.answer()  # the last one, so that no rank leaves the group early
            note("save")
            if saved < 0:
                self.save()
            self.saver.wait()
            if stop and self.step < config.steps:
                self.log(f"stopped by a signal after step {self.step}; saved, resume with --checkpoint.resume auto")
        except NonFiniteError as error:
            if self.mesh.rank == 0:  # now: the others leave at once, and this rank has its save to finish first
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise
        finally:
            self.saver.close()
            self._unlock()
            if metrics is not None:
                metrics.close()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGUSR1 from now on: leave the step within one micro-batch, save, return from run().

        For the rest of the process: a second signal must not undo what the first one asked for.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop = True

    def _before(self, phase: str, i: int) -> None:
        """Before each forward and backward of a step: ask all ranks whether one is to stop, hear what they said last time.

        So the answer is never waited for, and the ranks leave before the same forward or backward, at most one
        micro-batch after the signal.
        """
        self._micro_batch = i
        phase = f"{phase} {i + 1}/{self._num_micro_batches}"
        note(phase, self.step + 1)
        failpoint("step.micro_batch", f"{self.step}.{i}")
        if self._vote(self._stop):
            raise _Stopped(phase)

    def train_step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step: (what metrics.jsonl records, whether some rank was asked to stop)."""
        config, mesh, start = self.config, self.mesh, time.perf_counter()
        note("data", self.step + 1)
        rows = self.sampler.rows(self.step)
        batches, num_tokens = load_batch(
            self.store, self.sampler, self.step, mesh.dp_rank, mesh.dp_size, config.data, mesh.tp.size, config.seed,
            few_shapes=shapes_cost_memory(mesh.device, self.dtype),
        )  # fmt: skip
        failpoint("step.begin", self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self._num_micro_batches = len(batches)
        try:
            losses_B, stats = forward_backward(self.model, batches, mesh, config.loss, self._before)
        except (MemoryError, RuntimeError) as error:
            if _is_out_of_memory(error):
                error.add_note(self._memory_note(batches))
            raise
        note("grad norm")
        sync_replicated_grads(self.model.parameters(), mesh)
        norm = clip_grad_norm(self.model.parameters(), config.optim.clip_norm, mesh)
        failpoint("step.backward", self.step)

        note("totals")
        totals = self._totals(losses_B, stats, norm, batches)
        assert totals["tokens"] == num_tokens, f"{totals['tokens']} tokens were run, the plan said {num_tokens}"
        if totals["save_failed"]:
            self.saver.wait()
            raise CheckpointError("the save in the background failed on another rank, which says why")
        self._refuse_non_finite(totals, losses_B, rows, batches)
        zscore, skip = self._judge_loss(totals["loss"] / totals["rows"], rows)
        lr = learning_rate(self.step, config.steps, self.optim)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        note("optimizer")
        failpoint("step.optimizer", self.step)
        if not skip:
            self.optimizer.step()
        self.step += 1
        self.skipped += skip
        self.ledger = hashlib.sha256(
            self.ledger.encode() + np.ascontiguousarray(rows, dtype="<i8").tobytes() + (b"skipped" if skip else b"")
        ).hexdigest()
        failpoint("step.end", self.step)
        values = self._metrics(totals, lr, len(batches), time.perf_counter() - start)
        return {**values, "loss_zscore": zscore, "skipped": skip}, totals["stop"] > 0

    def _judge_loss(self, loss: float, rows: np.ndarray) -> tuple[float | None, bool]:
        """(z of the loss, whether to leave out the update); the loss is the same number on all ranks."""
        mode = self.config.on_spike
        zscore = self.losses.judge(loss)
        if zscore is None or zscore <= self.losses.limit or mode == "ignore":
            return zscore, False
        self.log(
            f"WARNING: step {self.step + 1}: loss {loss:.4f} is {zscore:.1f} standard deviations above that of the last "
            f"steps{'; its update is skipped' if mode == 'skip' else ''}. Rows of the step: {_shown(rows)}"
        )
        return zscore, mode == "skip"

    def _memory_note(self, batches: Sequence[MicroBatch]) -> str:
        batch, device = batches[self._micro_batch], self.mesh.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_rss()
        return (
            f"rank {self.mesh.rank} was in micro-batch {self._micro_batch + 1} of {len(batches)}: {batch.num_tokens} tokens "
            f"in {batch.num_sequences} sequences, the longest of {batch.max_seqlen}; peak memory {peak / 1e9:.2f} GB. Lower "
            f"data.max_tokens={self.config.data.max_tokens}, set activation_checkpointing=true or use more ranks"
        )

    def _totals(
        self, losses_B: torch.Tensor, stats: torch.Tensor, norm: torch.Tensor, batches: Sequence[MicroBatch]
    ) -> dict[str, float]:
        """Sums over dp ranks, exchanged in one small all-reduce; tp ranks hold the same values."""
        real = [np.asarray(b.lengths[: b.num_sequences], dtype=np.int64) for b in batches]
        squares = sum(int(np.square(lengths).sum()) for lengths in real)
        host = [len(losses_B), sum(b.num_tokens for b in batches), squares, int(self._stop), int(self.saver.failed)]
        vector = torch.cat(
            [losses_B.sum().double()[None], stats, torch.tensor(host, dtype=torch.float64, device=losses_B.device)]
        )
        all_reduce_world_(vector)
        values = torch.cat([vector, norm.double()[None]]).tolist()  # the only host sync of a step
        names = (
            "loss",
            "hits",
            "positive",
            "negative",
            "negatives",
            "ranked_rows",
            "rows",
            "tokens",
            "squares",
            "stop",
            "save_failed",
        )
        totals = {name: value / self.mesh.tp.size for name, value in zip(names, values, strict=False)}
        return {**totals, "grad_norm": values[-1]}

    def _refuse_non_finite(
        self, totals: dict[str, float], losses_B: torch.Tensor, rows: np.ndarray, batches: Sequence[MicroBatch]
    ) -> None:
        """Before the optimizer touches a weight; the sums are the same on all ranks, so all ranks refuse together."""
        if np.isfinite(totals["loss"]) and np.isfinite(totals["grad_norm"]):
            return
        mine = np.concatenate([b.rows for b in batches])
        bad = sorted(
            {row for part in gather_objects(mine[~losses_B.isfinite().cpu().numpy()].tolist()) for row in part}
        )
        where = f"rows with a non-finite loss: {_shown(bad)}" if bad else "every loss is finite, a gradient is not"
        advice = "Lower optim.lr, or look at these rows."
        if self.step == self.skipped:  # of every step so far the update was left out, or there was none
            advice = (
                "No update was made yet, so optim.lr is not the cause: the weights that were read are finite, but too large for "
                "their activations, or these rows are special; precision=fp32 tells a range of numbers from a wrong model."
            )
        raise NonFiniteError(
            f"step {self.step + 1}: loss {totals['loss'] / totals['rows']}, gradient norm {totals['grad_norm']}; the step "
            f"was refused and the weights are those of step {self.step}. {where} (rows of the step: {_shown(rows)}). {advice}"
        )

    def _metrics(self, totals: dict[str, float], lr: float, num_micro_batches: int, seconds: float) -> dict[str, Any]:
        config, mesh = self.config, self.mesh
        capacity = config.data.max_tokens * num_micro_batches * mesh.dp_size
        flops = training_flops(self.model_config, int(totals["tokens"]), int(totals["squares"]))
        memory = torch.cuda.max_memory_allocated(mesh.device) if mesh.device.type == "cuda" else _peak_rss()
        return {
            "step": self.step,
            "epoch": self.step * config.global_batch_size / self.sampler.num_rows,
            "loss": totals["loss"] / totals["rows"],
            # Of rows that have a candidate; None where no row of the step has one.
            "accuracy": totals["hits"] / totals["ranked_rows"] if totals["ranked_rows"] else None,
            "rows_without_candidates": round(totals["rows"] - totals["ranked_rows"]),
            "positive_similarity": totals["positive"] / totals["rows"],
            "negative_similarity": totals["negative"] / max(1.0, totals["negatives"]),
            "grad_norm": totals["grad_norm"],
            "lr": lr,
            "tokens": int(totals["tokens"]),
            "tokens_per_s": totals["tokens"] / seconds,
            "packing_density": totals["tokens"] / capacity,
            "micro_batches": num_micro_batches,
            "mfu": flops / (seconds * mesh.world_size * self.peak_flops) if self.peak_flops else None,
            "memory_gb": memory / 1e9,
            "seconds": seconds,
            "checkpoint_stall_s": self.saver.take_stall(),  # by the save before this step
        }

    def _announce(self) -> None:
        if self.step >= self.config.steps > 0:
            self.log(f"step {self.step} of steps={self.config.steps} is done: nothing is left to train")
            return
        parameters = sum(torch.Size(s).numel() for s in parameter_shapes(self.model_config).values())
        self.log(
            f"{parameters / 1e6:,.1f} M parameters on {self.mesh.dp_size} dp x {self.mesh.tp.size} tp "
            f"{self.mesh.device.type} ranks ({'sequence parallel, ' if self.mesh.tp.sequence_parallel else ''}"
            f"{str(self.dtype).removeprefix('torch.')}); {self.sampler.num_rows:,} rows, "
            f"{self.config.global_batch_size} queries a step, steps {self.step + 1} to {self.config.steps}"
        )
        if self.config.optim.warmup_steps is None:
            self.log(
                f"optim.warmup_steps is not set: the rate rises for {self.optim.warmup_steps} of {self.config.steps} steps"
            )

    # ---- checkpoints

    def _named_state(self) -> dict[str, torch.Tensor]:
        """Our parameter name and STATE/NAME of what the optimizer keeps of it -> this rank's live shard, without its padding."""
        named = {}
        for full_name, p in self.model.named_parameters():
            name = fsdp.plain_name(full_name)
            named[name] = local_tensor(p.detach())
            for state, tensor in state_of(self.optimizer, p).items():
                named[state_name(state, name)] = local_tensor(tensor)
        return {name: unpadded(tensor, self._box(name)[1]) for name, tensor in named.items()}

    def _box(self, name: str) -> tuple[tuple[int, ...], Box]:
        plain = parameter_of(name)
        shape = parameter_shapes(self.model_config)[plain]
        mesh = self.mesh
        unit = tp_unit(plain, self.model_config)
        return shape, local_box(shape, tp_dim(plain), mesh.tp.rank, mesh.tp.size, mesh.dp_rank, mesh.dp_size, unit)

    def _saver(self) -> Saver:
        config, mesh = self.config.checkpoint, self.mesh
        # Ranks of a slow file system may finish a save long after one another; training's own timeout finds dead ranks.
        group = background_group(timedelta(seconds=max(1800, self.config.parallel.timeout_s)))
        write = partial(
            save_checkpoint,
            self.output,
            rank=mesh.rank,
            world_size=mesh.world_size,
            keep=config.keep,
            keep_every=config.keep_every,
            damaged=self._damaged,
            check=self.lock.check if self.lock is not None else lambda: None,
            gather=partial(gather_objects, group=group),
            log=self.log,
        )
        return Saver(write, self.log, config.async_save)

    def _pieces(self) -> dict[str, Piece]:
        """What this rank writes: its boxes, and those of replicated parameters on tp rank 0."""
        pieces = {}
        replicated = {fsdp.plain_name(n) for n, p in self.model.named_parameters() if is_tp_replicated(p)}
        for name, tensor in self._named_state().items():
            shape, box = self._box(name)
            if tensor.numel() and not (parameter_of(name) in replicated and self.mesh.tp.rank):
                pieces[name] = Piece(shape, box, tensor)
        return pieces

    def save(self, wait: bool = True) -> None:
        """Publish output_dir/step-XXXXXXXX; on return it is durable, or with wait=False its values are copied."""
        self.saver.save(self.step, self._pieces(), meta=self._meta(), extra_files=self.tokenizer.files)
        if wait:
            self.saver.wait()

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def _meta(self) -> dict[str, Any]:
        rows_per_dataset = [source["rows"] for source in self.store.manifest["sources"]]
        return {
            "layout": {"tp_size": self.mesh.tp.size, "dp_size": self.mesh.dp_size},
            "model": to_dict(self.model_config),
            "export_dtype": str(self.export_dtype).removeprefix("torch."),
            "config": {**to_dict(self.config), "optim": to_dict(self.optim)},
            "commit": self._commit,
            "run": self.lock.run if self.lock is not None else None,  # rank 0 writes the manifest
            "overrides": self.overrides,
            "ledger": self.ledger,
            "skipped": self.skipped,
            "recent_losses": self.losses.losses,
            "usage": usage_of_training(
                to_dict(self.config.data), self.model_config.pooling, rows_per_dataset
            ).to_json(),
            "data_digest": self.store.digest,
            "population": self.population,
            **({"draws_lone_rows": True} if self.draws_lone_rows else {}),
            "num_rows": len(self.store),
            "tokenizer_digest": self.tokenizer.digest,
        }

    def _checkpoint_to_resume(self) -> Path | None:
        """Locked, chosen and verified by rank 0, the same on every rank."""
        found: Path | None = None
        failure: tuple[str, bool] | None = None
        self.lock: files.Lock | None = None
        self._damaged: set[str] = set()
        if self.mesh.rank == 0:
            try:
                self.lock = files.Lock(self.output, self.log).acquire()
                found, is_newest = _checkpoint_by_name(self.config)
                if is_newest:
                    found = newest_whole(self.output, self.log, self._damaged)
                elif found is not None:
                    verify_checkpoint(found)
            except UserError as caught:
                failure = (str(caught), isinstance(caught, AllDamagedError))
        found, failure = gather_objects((found, failure))[0]
        if failure is not None:
            self._unlock()
            raise (AllDamagedError if failure[1] else CheckpointError)(failure[0])
        return found

    def _load(self, folder: Path) -> None:
        reader = Reader(folder)
        self._check_same_run(folder, reader.manifest)
        shapes = parameter_shapes(self.model_config)
        reader.check(with_state(shapes))
        bad = []
        with torch.no_grad():
            for name, tensor in self._named_state().items():
                if tensor.numel():
                    tensor.copy_(reader.read_box(name, self._box(name)[1]))
                    if not all(x.isfinite() for x in tensor.aminmax()):
                        bad.append(name)
            _raise_first(non_finite_weights(folder, bad) if bad else None)
            self.step, self.ledger = reader.manifest["step"], reader.manifest["ledger"]
            self.skipped, self.losses.losses = reader.manifest["skipped"], list(reader.manifest["recent_losses"])
            self.export_dtype = getattr(torch, reader.manifest["export_dtype"])
            set_num_updates(self.optimizer, self.step - self.skipped)
        self.log(f"resumed from {folder} at step {self.step}")

    def _check_same_run(self, folder: Path, manifest: dict[str, Any]) -> None:
        """What decides the sequence of samples must be the same; other changes are named in the log."""
        _refuse_other_model(self.config, folder, manifest, self.model_config)
        self.overrides = list(manifest["overrides"])
        for text in _changed_samples(self.config, folder, manifest, self.store, self.population):
            self.overrides.append({"step": manifest["step"], "changed": text})
            self.log(
                f"WARNING: {text}, as checkpoint.allow_changed permits: from step {manifest['step'] + 1} on the samples of a "
                "step are others, and no promise holds any more that each is seen once an epoch; the manifest records it"
            )
        old = manifest["config"]
        if self.optim.warmup_steps is None:  # left out: the run keeps the one that it began with
            self.optim = replace(self.optim, warmup_steps=old["optim"]["warmup_steps"])
        new = json.loads(json.dumps({**to_dict(self.config), "optim": to_dict(self.optim)}))
        for key in ("steps", "loss", "optim", "precision"):
            if old.get(key) != new[key]:
                self.log(f"WARNING: {key} changed since the checkpoint: {old.get(key)} -> {new[key]}")


def _shown(rows: Sequence[int] | np.ndarray) -> str:
    numbers = [int(row) for row in rows]
    return f"{numbers[:32]}" + (f" and {len(numbers) - 32} more" if len(numbers) > 32 else "")


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
