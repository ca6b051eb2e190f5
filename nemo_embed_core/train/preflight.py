"""What is checked before the first step, most of it before any process group exists: a wrong set-up stops by
name."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_embed_core.checkpoint.kept_layers import kept_shape
from nemo_embed_core.checkpoint.manifest import CheckpointError, read_manifest, verify_checkpoint
from nemo_embed_core.checkpoint.runs import AllDamagedError, checkpoints, find_checkpoint, newest_whole
from nemo_embed_core.checkpoint.source import resolve
from nemo_embed_core.checkpoint.weights import open_weights, read_model_config
from nemo_embed_core.config import CheckpointConfig, ModelConfig, TrainConfig
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.packing import text_bins
from nemo_embed_core.data.store import Store
from nemo_embed_core.data.teacher_vectors import TeacherVectors, teacher_width
from nemo_embed_core.data.texts import texts_in
from nemo_embed_core.data.tokenizer import Tokenizer, load_tokenizer
from nemo_embed_core.data.tokenizer_files import check_servable
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.dev import DevSet, read_dev_sets
from nemo_embed_core.files import durable
from nemo_embed_core.files.lock import Lock
from nemo_embed_core.model.attention import backends, choose_attention
from nemo_embed_core.model.spec import adapter_shapes, check_fp8, trained_shapes
from nemo_embed_core.options import to_dict
from nemo_embed_core.parallel.collectives import broadcast_object, gather_objects, raise_first
from nemo_embed_core.parallel.layout import check_layout, rank_from_env, world_size_from_env
from nemo_embed_core.parallel.liveness import begun_before
from nemo_embed_core.parallel.mesh import pick_device
from nemo_embed_core.train.engine import run_dtype
from nemo_embed_core.train.first_weights import check_lora
from nemo_embed_core.train.optim import BYTES_PER_PARAMETER, check_master_weights
from nemo_embed_core.train.run_state import population_of, sampler_of, usage_of
from nemo_embed_core.train.same_run import changed_samples, refuse_other_model
from nemo_embed_core.train.trackers import check_trackers


@dataclass(frozen=True)
class Prepared:
    """What is read and checked before any process group exists; wrong set-ups stop here within seconds."""

    model: ModelConfig
    tokenizer: Tokenizer
    store: Path | None = None  # of the first rank: the folder that all open
    dev_sets: list[DevSet] | None = None  # of the first rank, which hands them on


def _check_scores(config: TrainConfig, store: Store) -> None:
    """UserError where the loss needs a teacher's scores and no row of the store has them."""
    if not config.loss.needs_scores or store.negative_scores is not None:
        return
    if "scored_rows" not in store.manifest:
        raise UserError(
            f"{store.folder} was built before stores kept a teacher's scores, which loss.kl_weight and "
            "loss.margin_mse_weight need: delete that folder and it is built again"
        )
    raise UserError(
        "loss.kl_weight and loss.margin_mse_weight need a teacher's scores of positives and negatives, and "
        "no row has them: mine with it (launch/mine.py writes pos_scores and neg_scores), or set both to 0"
    )


def _check_grades(config: TrainConfig, store: Store) -> None:
    """UserError where graded pairs have no term, or the term no pairs, or a batch could have both kinds."""
    graded = 0 if store.row_grades is None else int(np.isfinite(store.row_grades).sum())
    if graded and not config.loss.cosent_weight:
        raise UserError(
            f"{graded:,} rows are graded pairs (data.datasets.grades), and only loss.cosent_weight has a use "
            "for them: set it, or the dataset's min_grade in place of grades"
        )
    if config.loss.cosent_weight and not graded:
        raise UserError("loss.cosent_weight needs graded pairs: set grades of the datasets that have them")
    if graded and graded < len(store) and config.data.batches == "mixed":
        raise UserError(
            f"{graded:,} of {len(store):,} rows are graded pairs, which share no term with the others: set "
            "data.batches=one_source"
        )


def prepare(config: TrainConfig) -> Prepared:
    """Shapes, tokenizer, layout and batch sizes against each other; the first rank also builds the data
    store."""
    if not config.init_from and not config.tokenizer:
        raise UserError(
            "tokenizer is not set: without init_from there is no folder to take tokenizer.json from"
        )
    try:
        json.dumps(to_dict(config), allow_nan=False)
    except ValueError:
        raise UserError(
            "an option is infinite or not a number; checkpoints record all options as JSON, which has no such"
        ) from None
    device = pick_device(config.device)
    model = config.model
    if config.init_from:  # attention and pooling are the run's: the folder's do not matter to its weights
        found = kept_shape(read_model_config(config.init_from), config.init_layers, config.init_from)
        model = replace(found, pooling=model.pooling, is_causal=model.is_causal)
    dp_size = check_layout(config.parallel, world_size_from_env(), model)
    if config.precision == "fp8":
        check_fp8(model, config.parallel.tp_size)
    adapter_shapes(model, config.lora)  # a rank that is too large is refused here
    if (widest := max(config.loss.matryoshka_dims, default=0)) > model.hidden_size:
        raise UserError(
            f"loss.matryoshka_dims has {widest} and the model's hidden_size is {model.hidden_size}: a vector "
            "has no more columns"
        )
    if config.global_batch_size % dp_size:
        raise UserError(
            f"global_batch_size={config.global_batch_size} is not a multiple of the {dp_size} "
            "data-parallel ranks; every rank takes equally many queries: use "
            f"{max(1, config.global_batch_size // dp_size) * dp_size}"
        )
    tokenizer = load_tokenizer(config.tokenizer or resolve(config.init_from).folder)
    tokenizer.check_fits(model.vocab_size)
    for line in check_servable(tokenizer.files):  # what no export could hand on is not trained with
        if rank_from_env() == 0:
            print(f"WARNING: {line}", flush=True)
    if not config.data.datasets:
        raise UserError(
            "data.datasets is empty; give at least one {path: ...} of a JSONL file or a BEIR folder"
        )
    dtype = run_dtype(config, device)
    check_master_weights(config.optim, dtype)
    choose_attention(config.attention, device, dtype)
    check_trackers(config)
    if rank_from_env() == 0:
        _check_output(Path(config.output_dir), trained_shapes(model, config.lora))
        _warn_of_keep_every(config.checkpoint)
        checkpoint, is_newest = checkpoint_by_name(config)
        manifest = _readable_manifest(checkpoint) if checkpoint is not None else None
        if is_newest and manifest is None:  # a damaged one is skipped
            for checkpoint in checkpoints(Path(config.output_dir)):
                if manifest := _readable_manifest(checkpoint):
                    break
        if checkpoint is not None and manifest is not None:
            refuse_other_model(config, checkpoint, manifest, model)
        if config.init_from and checkpoint is None:
            check_lora(config, open_weights(config.init_from, hashed=False, base=True))
        teacher_width(config)  # what is wrong with the folders is said before hours of tokenising
        store = open_store(config.data, tokenizer)
        _check_scores(config, store)
        _check_grades(config, store)
        if config.loss.needs_vectors:
            TeacherVectors(store, config.data.datasets).check()
        drawn = population_of(config, store, manifest, print)
        if checkpoint is not None and manifest is not None:
            changed_samples(config, checkpoint, manifest, store, drawn.digest)
        sampler, counted = sampler_of(config, drawn)
        if config.epochs is not None:
            more = counted.num_steps * config.global_batch_size - config.epochs * sampler.num_rows
            print(
                f"epochs={config.epochs} of {sampler.num_rows:,} draws: {counted.num_steps:,} steps of "
                f"{config.global_batch_size} queries; {more:,} draws of the next epoch fill the last batches",
                flush=True,
            )
        if checkpoint is not None and manifest is not None:
            refuse_other_model(counted, checkpoint, manifest, model)
        return Prepared(model, tokenizer, store.folder, read_dev_sets_of(config, model, tokenizer, store))
    return Prepared(model, tokenizer)


def read_dev_sets_of(
    config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer, store: Store
) -> list[DevSet]:
    """What is wrong with them is said before the first step. A text of more than a micro-batch too."""
    with texts_in(config.data.cache_dir):
        dev_sets = read_dev_sets(config.eval, usage_of(config, model, store), tokenizer, print)
    for dev in dev_sets:
        for side in dev.sides:
            lengths = np.fromiter(map(len, side.tokens), np.int64, len(side.tokens))
            try:
                next(text_bins(lengths, config.data.max_tokens, config.parallel.tp_size))
            except UserError as error:
                raise UserError(f"eval.datasets: {dev.name}: {error}") from None
    return dev_sets


def same_dev_sets(config: TrainConfig, prepared: Prepared) -> list[DevSet]:
    """Of the first rank, on all; in memory 4 bytes a token of them while each takes its share."""
    return broadcast_object(prepared.dev_sets) if config.eval.datasets else []


def _check_output(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """An output that is used by another run, unwritable or too full fails now, not at the first checkpoint.

    A checkpoint needs room beside the one before it: 2.2 x its size in a new folder, 1.1 x where there is one
    already.
    """
    durable.probe(folder)
    Lock(folder, print).refuse_if_held(warn=False)  # the one that takes it warns
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    size = BYTES_PER_PARAMETER * parameters
    factor = 1.1 if checkpoints(folder) else 2.2
    durable.check_free_space(folder, int(factor * size), f"{factor} x a checkpoint of {size:,} bytes")


def _warn_of_keep_every(config: CheckpointConfig) -> None:
    both = math.lcm(config.every, config.keep_every)
    if config.keep_every and both != config.keep_every:
        print(
            f"WARNING: checkpoint.keep_every={config.keep_every} is no multiple of "
            f"checkpoint.every={config.every}: of the steps that are saved only every {both:,}th is kept "
            "for ever; make keep_every a multiple of every",
            flush=True,
        )


def checkpoint_by_name(config: TrainConfig) -> tuple[Path | None, bool]:
    """(what a run continues, before a byte of it is verified; whether it is the newest of output_dir,
    whichever that is)."""
    resume, output = config.checkpoint.resume, Path(config.output_dir)
    present = checkpoints(output)
    # What is in the way is this torchrun's own earlier attempt's.
    if resume == "auto" or (present and begun_before()):
        return (present[0] if present else None), True
    found = None if resume == "none" else find_checkpoint(Path(resume))
    if present and (found is None or found.resolve() != present[0].resolve()):
        raise CheckpointError(
            f"{output} already holds checkpoints (newest {present[0].name}), which "
            f"checkpoint.resume={resume} would leave behind; continue with --checkpoint.resume auto or "
            "choose another output_dir"
        )
    return found, False


def _readable_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """None for a damaged one: whether that ends the run is decided when checkpoints are verified."""
    try:
        return read_manifest(checkpoint)
    except UserError:
        return None


def agree_on_attention(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that all ranks have chosen, and on a GPU why not a faster one; every rank calls it."""
    name = choose_attention(config.attention, device, dtype)
    chosen = gather_objects((socket.gethostname(), name))
    for host, other in chosen:
        if other != chosen[0][1]:
            raise UserError(
                f"attention={config.attention} is {chosen[0][1]} on node {chosen[0][0]} and {other} on node "
                f"{host}: gradients would be rounded differently; install the same packages on both, or set "
                "attention to one that both have"
            )
    said = [name]
    for faster, lacks in backends(device, dtype).items():
        if faster == name or config.attention != "auto" or device.type != "cuda":
            break
        said.append(f"{faster} {lacks}")
    return "; ".join(said)


def open_same_store(config: TrainConfig, prepared: Prepared) -> Store:
    """The store that the first rank has built or found, by its folder: the sources are read on one rank
    alone."""
    folder = prepared.store
    if folder is None and rank_from_env() == 0:  # prepare() was not asked
        folder = open_store(config.data, prepared.tokenizer, log=lambda message: None).folder
    folder = gather_objects(folder)[0]
    assert folder is not None
    raise_first(
        None
        if folder.is_dir()
        else f"the token store {folder} is not on node {socket.gethostname()}: "
        f"data.cache_dir={config.data.cache_dir} has to be a folder that all nodes share"
    )
    return Store(folder)


def open_vectors(config: TrainConfig, store: Store) -> TeacherVectors | None:
    """Those that the loss asks for, if any, of texts that prepare() has looked up; every rank calls it."""
    found, failure = None, None
    if config.loss.needs_vectors:
        try:
            found = TeacherVectors(store, config.data.datasets)
        except UserError as error:
            failure = f"node {socket.gethostname()}: {error}"
    raise_first(failure)
    return found


@dataclass(frozen=True)
class Held:
    """The output folder, locked, and the checkpoint to continue from: verified, the same on every rank."""

    checkpoint: Path | None = None
    lock: Lock | None = None  # of rank 0
    damaged: set[str] = field(default_factory=set)  # checkpoints that were skipped

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()


def hold_output(config: TrainConfig, rank: int, log: Callable[[str], None]) -> Held:
    """Every rank calls it; rank 0 locks, chooses and verifies."""
    held, failure = Held(), None
    if rank == 0:
        found = lock = None
        output, damaged = Path(config.output_dir), set[str]()
        try:
            lock = Lock(output, log).acquire()
            found, is_newest = checkpoint_by_name(config)
            if is_newest:
                found = newest_whole(output, log, damaged)
            elif found is not None:
                verify_checkpoint(found)
        except UserError as caught:
            failure = (str(caught), isinstance(caught, AllDamagedError))
        held = Held(found, lock, damaged)
    checkpoint, failure = gather_objects((held.checkpoint, failure))[0]
    if failure is not None:
        held.release()
        raise (AllDamagedError if failure[1] else CheckpointError)(failure[0])
    return replace(held, checkpoint=checkpoint)
