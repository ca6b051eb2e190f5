"""The training loop: sampler -> packing -> forward and backward -> finite check -> clip -> AdamW -> metrics -> checkpoint.

State is (weights, moments, step): the data position is the step itself, so a resumed run sees exactly the rows that an
uninterrupted one would have seen, at any world size.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_embed_core.checkpoint import sharded
from nemo_embed_core.checkpoint.weights import (
    RandomReader,
    Weights,
    fill,
    open_weights,
    read_model_config,
    tokenizer_folder,
)
from nemo_embed_core.config import ModelConfig, TrainConfig, UserError, dump_yaml, to_dict
from nemo_embed_core.data.packing import MicroBatch, load_batch
from nemo_embed_core.data.sampler import Sampler
from nemo_embed_core.data.store import Store, open_store
from nemo_embed_core.data.tokenizer import Tokenizer, load_tokenizer
from nemo_embed_core.model.attention import pick_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.model.hf import local_box, parameter_shapes, tp_dim
from nemo_embed_core.parallel import fsdp
from nemo_embed_core.parallel.collectives import all_reduce_world_, gather_objects
from nemo_embed_core.parallel.grad_norm import clip_grad_norm, is_tp_replicated, local_tensor, sync_replicated_grads
from nemo_embed_core.parallel.layout import check_layout, rank_from_env, world_size_from_env
from nemo_embed_core.parallel.mesh import Mesh, pick_device
from nemo_embed_core.train.metrics import MetricsLog, console_line, device_peak_flops, training_flops
from nemo_embed_core.train.optim import build_optimizer, ensure_state, learning_rate
from nemo_embed_core.train.step import forward_backward

NON_FINITE_EXIT_CODE = 4


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite: the step was refused on all ranks and the weights are as before it."""


def failpoint(name: str, step: int) -> None:
    """Fault injection for the crash tests: NEMO_EMBED_FAIL=name@step kills this process there, as a power cut would."""
    if os.environ.get("NEMO_EMBED_FAIL") == f"{name}@{step}":
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Prepared:
    """What is read and checked before any process group exists; wrong set-ups stop here within seconds."""

    model: ModelConfig
    tokenizer: Tokenizer


def prepare(config: TrainConfig) -> Prepared:
    """Shapes, tokenizer, layout and batch sizes against each other; the first rank also builds the data store."""
    if not config.init_from and not config.tokenizer:
        raise UserError("tokenizer is not set: without init_from there is no folder to take tokenizer.json from")
    device = pick_device(config.device)
    model = read_model_config(config.init_from) if config.init_from else config.model
    dp_size = check_layout(config.parallel, world_size_from_env(), model)
    if config.global_batch_size % dp_size:
        raise UserError(
            f"global_batch_size={config.global_batch_size} is not a multiple of the {dp_size} data-parallel ranks; every "
            f"rank takes equally many queries: use {max(1, config.global_batch_size // dp_size) * dp_size}"
        )
    tokenizer = load_tokenizer(config.tokenizer or tokenizer_folder(config.init_from))
    tokenizer.check_fits(model.vocab_size)
    if not config.data.datasets:
        raise UserError("data.datasets is empty; give at least one {path: ...} of a JSONL file or a BEIR folder")
    pick_attention(config.attention, device, run_dtype(config, device))
    if rank_from_env() == 0:
        _probe_output(Path(config.output_dir))
        store = open_store(config.data, tokenizer)
        Sampler(len(store), config.global_batch_size, config.seed)
        if config.loss.in_batch == "none" and store.manifest["rows_without_negatives"] == len(store):
            raise UserError(
                f"no negatives: none of the {len(store)} rows has a hard negative and loss.in_batch=none, so every loss "
                "is 0; mine negatives first (launch/mine.py) or set loss.in_batch=positives"
            )
    return Prepared(model, tokenizer)


def _probe_output(folder: Path) -> None:
    """An unwritable output fails now, not at the first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir {folder} is not writable: {error}") from None


def run_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


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
    fill(encoder, reader, model, (mesh.tp.rank, mesh.tp.size), (mesh.dp_rank, mesh.dp_size))
    return encoder


class Trainer:
    """`Trainer(config, mesh, prepare(config)).run()`; every rank makes one."""

    def __init__(self, config: TrainConfig, mesh: Mesh, prepared: Prepared, log: Callable[[str], None] = print):
        self.config, self.mesh = config, mesh
        self.model_config, self.tokenizer = prepared.model, prepared.tokenizer
        self.log = log if mesh.rank == 0 else lambda message: None
        self.output = Path(config.output_dir)
        self.dtype = run_dtype(config, mesh.device)
        self.store: Store = open_store(config.data, prepared.tokenizer, log=lambda message: None)
        self.sampler = Sampler(len(self.store), config.global_batch_size, config.seed)
        self.step = 0
        self.ledger = "0" * 64  # hash chain over the rows of every step so far

        checkpoint = self._checkpoint_to_resume()
        weights = open_weights(config.init_from) if config.init_from and checkpoint is None else None
        # The weights' own dtype decides what merge writes: bf16 in, bf16 out.
        self.export_dtype = weights.dtype if weights is not None else self.dtype
        self.model = build_model(config, self.model_config, mesh, weights)
        self.optimizer = build_optimizer(self.model, config.optim)
        ensure_state(self.optimizer)
        if checkpoint is not None:
            self._load(checkpoint)
        self._stop = False
        self.peak_flops = device_peak_flops(mesh.device) if self.dtype == torch.bfloat16 else None

    # ---- the loop

    def run(self) -> None:
        config, metrics = self.config, None
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGUSR1)}
        if self.mesh.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            dump_yaml(config, self.output / "config.yaml")
            metrics = MetricsLog(self.output, self.step, config.tensorboard)
        self._announce()
        saved = self.step if sharded.checkpoints(self.output) else -1
        try:
            while self.step < config.steps:
                values, stop = self.train_step()
                if metrics is not None:
                    metrics.write(values)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    self.log(console_line(values, config.steps))
                if self.step % config.checkpoint.every == 0 or self.step == config.steps or stop:
                    self.save()
                    saved = self.step
                if stop:
                    self.log(f"stopped by a signal after step {self.step}; saved, resume with --checkpoint.resume auto")
                    break
            if saved < 0:
                self.save()
        finally:
            if metrics is not None:
                metrics.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def train_step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step: (what metrics.jsonl records, whether some rank was asked to stop)."""
        config, mesh, start = self.config, self.mesh, time.perf_counter()
        rows = self.sampler.rows(self.step)
        batches, num_tokens = load_batch(
            self.store, self.sampler, self.step, mesh.dp_rank, mesh.dp_size, config.data, mesh.tp.size, config.seed
        )
        failpoint("step.begin", self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses_B, stats = forward_backward(self.model, batches, mesh, config.loss)
        sync_replicated_grads(self.model.parameters(), mesh)
        norm = clip_grad_norm(self.model.parameters(), config.optim.clip_norm, mesh)
        failpoint("step.backward", self.step)

        totals = self._totals(losses_B, stats, norm, batches)
        assert totals["tokens"] == num_tokens, f"{totals['tokens']} tokens were run, the plan said {num_tokens}"
        self._refuse_non_finite(totals, losses_B, rows, batches)
        lr = learning_rate(self.step, config.steps, config.optim)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        self.optimizer.step()
        self.step += 1
        self.ledger = hashlib.sha256(
            self.ledger.encode() + np.ascontiguousarray(rows, dtype="<i8").tobytes()
        ).hexdigest()
        failpoint("step.end", self.step)
        return self._metrics(totals, lr, len(batches), time.perf_counter() - start), totals["stop"] > 0

    def _totals(
        self, losses_B: torch.Tensor, stats: torch.Tensor, norm: torch.Tensor, batches: Sequence[MicroBatch]
    ) -> dict[str, float]:
        """Sums over dp ranks, exchanged in one small all-reduce; tp ranks hold the same values."""
        squares = sum(int(np.square(np.asarray(b.lengths, dtype=np.int64)).sum()) for b in batches)
        host = [len(losses_B), sum(b.num_tokens for b in batches), squares, int(self._stop)]
        vector = torch.cat(
            [losses_B.sum().double()[None], stats, torch.tensor(host, dtype=torch.float64, device=losses_B.device)]
        )
        all_reduce_world_(vector)
        values = torch.cat([vector, norm.double()[None]]).tolist()  # the only host sync of a step
        names = ("loss", "hits", "positive", "negative", "negatives", "rows", "tokens", "squares", "stop")
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
        where = f"rows with a non-finite loss: {bad[:20]}" if bad else "every loss is finite, a gradient is not"
        raise NonFiniteError(
            f"step {self.step + 1}: loss {totals['loss'] / totals['rows']}, gradient norm {totals['grad_norm']}; the step "
            f"was refused and the weights are those of step {self.step}. {where} (rows of the step: "
            f"{np.asarray(rows)[:8].tolist()}...). Lower optim.lr, or look at these rows."
        )

    def _metrics(self, totals: dict[str, float], lr: float, num_micro_batches: int, seconds: float) -> dict[str, Any]:
        config, mesh = self.config, self.mesh
        capacity = config.data.max_tokens * num_micro_batches * mesh.dp_size
        flops = training_flops(self.model_config, int(totals["tokens"]), int(totals["squares"]))
        memory = torch.cuda.max_memory_allocated(mesh.device) if mesh.device.type == "cuda" else _peak_rss()
        return {
            "step": self.step,
            "epoch": self.step * config.global_batch_size / len(self.store),
            "loss": totals["loss"] / totals["rows"],
            "accuracy": totals["hits"] / totals["rows"],
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
        }

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop = True  # noticed by all ranks together at the end of the step

    def _announce(self) -> None:
        parameters = sum(torch.Size(s).numel() for s in parameter_shapes(self.model_config).values())
        self.log(
            f"{parameters / 1e6:,.1f} M parameters on {self.mesh.dp_size} dp x {self.mesh.tp.size} tp "
            f"{self.mesh.device.type} ranks ({'sequence parallel, ' if self.mesh.tp.sequence_parallel else ''}"
            f"{str(self.dtype).removeprefix('torch.')}); {len(self.store):,} rows, "
            f"{self.config.global_batch_size} queries a step, steps {self.step + 1} to {self.config.steps}"
        )

    # ---- checkpoints

    def _named_state(self) -> dict[str, torch.Tensor]:
        """Our parameter name, exp_avg/NAME, exp_avg_sq/NAME -> this rank's live shard."""
        named = {}
        for full_name, p in self.model.named_parameters():
            name = fsdp.plain_name(full_name)
            named[name] = local_tensor(p.detach())
            for moment in ("exp_avg", "exp_avg_sq"):
                named[f"{moment}/{name}"] = local_tensor(self.optimizer.state[p][moment])
        return named

    def _box(self, name: str) -> tuple[tuple[int, ...], sharded.Box]:
        plain = name.rsplit("/", 1)[-1]
        shape = parameter_shapes(self.model_config)[plain]
        mesh = self.mesh
        return shape, local_box(shape, tp_dim(plain), mesh.tp.rank, mesh.tp.size, mesh.dp_rank, mesh.dp_size)

    def save(self) -> Path:
        """Publish output_dir/step-XXXXXXXX; returns when it is durable."""
        start, pieces = time.perf_counter(), {}
        replicated = {fsdp.plain_name(n) for n, p in self.model.named_parameters() if is_tp_replicated(p)}
        for name, tensor in self._named_state().items():
            shape, box = self._box(name)
            if tensor.numel() and not (name.rsplit("/", 1)[-1] in replicated and self.mesh.tp.rank):
                pieces[name] = sharded.Piece(shape, box, tensor)
        path = sharded.save(
            self.output,
            self.step,
            pieces,
            rank=self.mesh.rank,
            world_size=self.mesh.world_size,
            meta=self._meta(),
            extra_files=self.tokenizer.files,
            keep=self.config.checkpoint.keep,
            failpoint=failpoint,
        )
        self.log(f"saved {path} in {time.perf_counter() - start:.2f} s")
        return path

    def _meta(self) -> dict[str, Any]:
        return {
            "layout": {"tp_size": self.mesh.tp.size, "dp_size": self.mesh.dp_size},
            "model": to_dict(self.model_config),
            "export_dtype": str(self.export_dtype).removeprefix("torch."),
            "config": to_dict(self.config),
            "ledger": self.ledger,
            "data_digest": self.store.digest,
            "num_rows": len(self.store),
            "tokenizer_digest": self.tokenizer.digest,
        }

    def _checkpoint_to_resume(self) -> Path | None:
        """Chosen and verified by rank 0, the same on every rank."""
        resume, found = self.config.checkpoint.resume, None
        error: str | None = None
        if self.mesh.rank == 0:
            try:
                if resume == "auto":
                    found = sharded.newest(self.output, self.log)
                elif resume == "none" and sharded.checkpoints(self.output):
                    raise UserError(
                        f"{self.output} already holds checkpoints (newest {sharded.checkpoints(self.output)[0].name}); "
                        "continue with --checkpoint.resume auto or choose another output_dir"
                    )
                elif resume != "none":
                    found = sharded.find(Path(resume))
                    sharded.verify(found)
            except UserError as caught:
                error = str(caught)
        found, error = gather_objects((found, error))[0]
        if error:
            raise sharded.CheckpointError(error)
        return found

    def _load(self, folder: Path) -> None:
        reader = sharded.Reader(folder)
        self._check_same_run(folder, reader.manifest)
        shapes = parameter_shapes(self.model_config)
        reader.check({**shapes, **{prefix + n: s for n, s in shapes.items() for prefix in sharded.OPTIM_PREFIXES}})
        with torch.no_grad():
            for name, tensor in self._named_state().items():
                if tensor.numel():
                    tensor.copy_(reader.read_box(name, self._box(name)[1]))
            self.step, self.ledger = reader.manifest["step"], reader.manifest["ledger"]
            self.export_dtype = getattr(torch, reader.manifest["export_dtype"])
            for state in self.optimizer.state.values():
                state["step"].fill_(float(self.step))
        self.log(f"resumed from {folder} at step {self.step}")

    def _check_same_run(self, folder: Path, manifest: dict[str, Any]) -> None:
        """What decides the sequence of samples must be the same; other changes are named in the log."""
        old, new = manifest["config"], json.loads(json.dumps(to_dict(self.config)))
        if manifest["model"] != json.loads(json.dumps(to_dict(self.model_config))):
            raise UserError(
                f"{folder} holds a model of another shape: {manifest['model']}, not {to_dict(self.model_config)}"
            )
        problems = [
            f"{key} was {was!r}, now {now!r}"
            for key, was, now in (
                ("seed", old["seed"], new["seed"]),
                ("global_batch_size", old["global_batch_size"], new["global_batch_size"]),
                ("data (digest)", manifest["data_digest"], self.store.digest),
                ("data.num_hard_negatives", old["data"]["num_hard_negatives"], new["data"]["num_hard_negatives"]),
            )
            if was != now
        ]
        if problems:
            raise UserError(
                f"{folder} cannot be continued: "
                + "; ".join(problems)
                + ". With these changed the samples of a step are "
                "others; restore them, or start a new run with --init_from and this checkpoint."
            )
        for key in ("steps", "loss", "optim", "precision"):
            if old[key] != new[key]:
                self.log(f"WARNING: {key} changed since the checkpoint: {old[key]} -> {new[key]}")


def _peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
