"""The training loop: sampler -> packing -> forward and backward -> clip -> AdamW -> finite check -> metrics
-> checkpoint. AdamW is launched before the host knows whether the step is finite; the device refuses one that
is not. The next step's batch is packed while the device works."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_embed_core.checkpoint.best import record_evaluation
from nemo_embed_core.checkpoint.manifest import CheckpointError, read_manifest
from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.checkpoint.saver import Saver
from nemo_embed_core.checkpoint.write import save_checkpoint
from nemo_embed_core.config import ModelConfig, TrainConfig
from nemo_embed_core.data import mix
from nemo_embed_core.data.packing import draw_batch, pack_batch, shapes_cost_memory
from nemo_embed_core.data.sampler import Sampler
from nemo_embed_core.data.shapes import Most, most_of
from nemo_embed_core.errors import failpoint
from nemo_embed_core.options import dump_yaml
from nemo_embed_core.parallel.collectives import Vote, background_group, gather_objects
from nemo_embed_core.parallel.liveness import mark_begun, note
from nemo_embed_core.parallel.mesh import Mesh
from nemo_embed_core.train.engine import Engine, run_dtype
from nemo_embed_core.train.evaluate import Evaluation
from nemo_embed_core.train.first_weights import adapter_to_save, fill_first, open_base
from nemo_embed_core.train.metrics import (
    MetricsLog,
    console_line,
    device_peak_flops,
    opening_line,
    peak_memory,
    step_totals,
    step_values,
)
from nemo_embed_core.train.optim import set_num_updates
from nemo_embed_core.train.prefetch import Batch, Prefetch
from nemo_embed_core.train.preflight import (
    Prepared,
    agree_on_attention,
    hold_output,
    open_same_store,
    open_vectors,
    same_dev_sets,
)
from nemo_embed_core.train.run_state import RunState, population_of, sampler_of
from nemo_embed_core.train.schedule import learning_rate
from nemo_embed_core.train.spikes import NonFiniteError, refuse_non_finite, shown
from nemo_embed_core.train.step import Stopped
from nemo_embed_core.train.watch import Watch
from nemo_embed_core.version import code_version


class Trainer:
    """`Trainer(config, mesh, prepare(config)).run()`; every rank makes one. dtype: as Engine's."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        prepared: Prepared,
        log: Callable[[str], None] = print,
        dtype: torch.dtype | None = None,
    ):
        note("set-up")
        self.given = self.config = config  # and with the steps of its epochs, once they are counted
        self.mesh = mesh
        self.model_config, self.tokenizer = prepared.model, prepared.tokenizer
        self.log = log if mesh.rank == 0 else lambda message: None
        self.output = Path(config.output_dir)
        self.store = open_same_store(config, prepared)
        self.teacher = open_vectors(config, self.store)
        self._attention = agree_on_attention(config, mesh.device, dtype or run_dtype(config, mesh.device))
        self._held = hold_output(config, mesh.rank, self.log)
        try:
            self.engine, self.state, self.sampler = self._begin(prepared.model, self._held.checkpoint, dtype)
            self.saver = self._saver()
            self.evaluation = Evaluation(
                self.config, self.engine, self.state, same_dev_sets(config, prepared),
                self._before_evaluation, self.log,
            )  # fmt: skip
        except BaseException:
            self.close()
            raise
        self.prefetch = Prefetch(self._load, mesh.device)
        self.watch = Watch(config.global_batch_size, config.loss, self.log) if mesh.rank == 0 else None
        self._stop, self._vote = False, Vote()
        self.peak_flops = device_peak_flops(mesh.device) if self.engine.dtype == torch.bfloat16 else None

    def _begin(
        self, model: ModelConfig, checkpoint: Path | None, dtype: torch.dtype | None
    ) -> tuple[Engine, RunState, Sampler]:
        config, mesh = self.config, self.mesh
        manifest = read_manifest(checkpoint) if checkpoint is not None else None
        drawn = population_of(config, self.store, manifest, log=lambda message: None)  # prepare() has said it
        sampler, config = sampler_of(config, drawn)
        self.config = config
        weights = open_base(config, checkpoint, manifest)
        engine = Engine(config, model, mesh, dtype, teacher_width=self.teacher.width if self.teacher else 0)
        fill_first(engine, weights, self.store, sampler, self.log)
        commit, lock = code_version() if mesh.rank == 0 else "", self._held.lock
        state = RunState(
            engine, self.tokenizer, self.store, drawn, commit, lock.run if lock is not None else None
        )
        state.teacher = self.teacher
        state.adapter = adapter_to_save(config, weights)
        if weights is not None:  # their own dtype decides what merge writes: bf16 in, bf16 out
            state.export_dtype = weights.dtype
        if checkpoint is not None:
            state.load(checkpoint, sampler, self.log)
        state.settle_warm_up()
        return engine, state, sampler

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def close(self) -> None:
        """Let another run have the output folder."""
        self._held.release()

    # ---- the loop

    def run(self) -> None:
        """Train up to the last step or to a signal; what was reached is saved either way."""
        config, metrics, stop = self.config, None, False
        epoch = self.step * config.global_batch_size // self.sampler.num_rows
        if self.mesh.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            dump_yaml(self.given, self.output / "config.yaml")
            metrics = MetricsLog(config, self.step, self.log, self.watch, self.state.evaluated.get("step"))
            mark_begun()
        self._announce()
        if self.mesh.device.type == "cuda" and self.step < config.num_steps:
            self.rehearse()
        saved = gather_objects(self.step if checkpoints(self.output) else -1)[0]  # a file system may lag
        try:
            if config.checkpoint.async_save and self.step < config.num_steps:
                self.saver.snapshot(self.state.pieces())  # its memory is taken now, or found missing now
            if config.num_steps and (figures := self.evaluation.after(self.step)) and metrics:
                metrics.write({"step": self.step, **figures})  # before the first step, or left at a signal
                record_evaluation(self.output, self.step, self.state.evaluated)
            self.evaluation.begin()
            while self.step < config.num_steps and not stop:
                try:
                    values, stop = self.train_step()
                except Stopped as place:
                    self.log(
                        f"asked to stop: left step {self.step + 1} before {place}, it runs again after the "
                        "resume"
                    )
                    self.engine.drop_step()
                    stop = True
                else:
                    values |= {} if stop else self.evaluation.after(self.step)
                    if metrics is not None:
                        metrics.write(values)
                    if self.step % config.log_every == 0 or self.step == config.num_steps:
                        self.log(console_line(values, config.num_steps))
                        if int(values["epoch"]) > epoch or self.step == config.num_steps:
                            epoch = int(values["epoch"])
                            self._say_drawn()
                if self.step != saved and (
                    self.step % config.checkpoint.every == 0 or self.step == config.num_steps or stop
                    or self.evaluation.is_best(self.step)
                ):  # fmt: skip
                    note("save")
                    self.save(wait=stop or self.step == config.num_steps)
                    saved = self.step
            self._vote.answer()  # the last one, so that no rank leaves the group early
            note("save")
            if saved < 0:
                self.save()
            self.saver.wait()
            if stop and self.step < config.num_steps:
                self.log(
                    f"stopped by a signal after step {self.step}; saved, resume with --checkpoint.resume auto"
                )
        except NonFiniteError as error:
            # Now: the others leave at once, and this rank has its save to finish first.
            if self.mesh.rank == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise
        finally:
            self.prefetch.close()
            self.saver.close()
            self.close()
            if metrics is not None:
                metrics.close()

    def rehearse(self) -> None:
        """The largest micro-batch of all steps to come, run before the first of them: where memory does not
        suffice that shows now. No weight, moment or draw is changed.

        Ranks share the steps, look at the lengths of the texts that each draws, and run the same shape.
        """
        config, mesh, start = self.config, self.mesh, time.perf_counter()
        note("largest micro-batch")
        n, size = config.num_steps - self.step, mesh.world_size
        steps = range(self.step + n * mesh.rank // size, self.step + n * (mesh.rank + 1) // size)
        mine = most_of(
            self.store, self.sampler, steps, mesh.dp_size, config.data, mesh.tp.size, config.seed,
            few_shapes=shapes_cost_memory(mesh.device, self.engine.dtype),
        )  # fmt: skip
        most = Most.of(gather_objects(mine))
        shapes = most.step(
            1 + config.data.num_hard_negatives,
            config.loss.couples_rows,
            config.global_batch_size // mesh.dp_size,
        )
        of = f"micro-batch of steps {self.step + 1} to {config.num_steps}"
        try:
            self.engine.rehearse(
                [shape.tensors(config.loss, self.engine.teacher_width) for shape in shapes],
                lambda phase, i: note(f"largest micro-batch, {phase}"),
            )
        except BaseException as error:
            error.add_note(f"No step was begun: this was as large as any {of}, which is run first")
            raise
        self.log(
            f"as large as any {of}: {most.tokens:,} tokens in {most.sequences:,} sequences, the longest of "
            f"{most.longest:,}; run first, memory {peak_memory(mesh.device) / 1e9:.2f} GB "
            f"({time.perf_counter() - start:.1f} s)"
        )

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGUSR1 from now on: leave the step within one micro-batch, save, return from run().

        For the rest of the process: a second signal must not undo what the first one asked for.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop = True

    def _before(self, phase: str, i: int) -> None:
        """Before each forward and backward of a step: ask all ranks whether one is to stop, hear what they
        said last time.

        So the answer is never waited for, and the ranks leave before the same forward or backward, at most
        one micro-batch after the signal.
        """
        phase = f"{phase} {i + 1}/{self._num_micro_batches}"
        note(phase, self.step + 1)
        failpoint("step.micro_batch", f"{self.step}.{i}")
        if self._vote(self._stop):
            raise Stopped(phase)

    def train_step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step: (what metrics.jsonl records, whether some rank was asked to stop)."""
        config, mesh, start = self.config, self.mesh, time.perf_counter()
        note("data", self.step + 1)
        drawn, batches, num_tokens = self.prefetch.take(self.step)
        rows = drawn.rows_B
        failpoint("step.begin", self.step)
        self._num_micro_batches = len(batches)
        self.engine.seen = self.watch.seen if self.watch is not None else None
        self.engine.step = self.step
        losses_B, stats = self.engine.forward_backward(batches, self._before)
        note("grad norm")
        norm = self.engine.clip()
        failpoint("step.backward", self.step)

        note("totals")
        finite, read = step_totals(
            losses_B, stats, norm, config.loss, batches, mesh, self._stop, self.saver.failed
        )
        lr = learning_rate(self.step, config.num_steps, self.state.optim)
        waits = config.on_spike == "skip"  # for the loss, which decides whether there is an update
        if not waits:
            self._update(lr, finite)
        # While the device works off what it was given: before that, the threads would share the interpreter
        # just when the device waits for launches.
        if self.step + 1 < config.num_steps:
            self.prefetch.begin(self.step + 1)
        totals = read()
        assert totals["tokens"] == num_tokens, (
            f"{totals['tokens']} tokens were run, the plan said {num_tokens}"
        )
        if totals["save_failed"]:
            self.saver.wait()
            raise CheckpointError("the save in the background failed on another rank, which says why")
        updates = self.step - self.state.skipped
        try:
            refuse_non_finite(self.step, updates, totals, losses_B, rows, batches)
        except NonFiniteError:
            set_num_updates(self.engine.optimizer, updates)  # as the device, which made none
            raise
        zscore, skip = self._judge_loss(totals["loss"] / totals["rows"], rows)
        if waits and not skip:
            self._update(lr, finite)
        self.state.count(rows, drawn.tokens_B, skip)
        failpoint("step.end", self.step)
        values = step_values(
            config, self.model_config, mesh, totals, step=self.step, lr=lr, num_rows=self.sampler.num_rows,
            num_micro_batches=len(batches), seconds=time.perf_counter() - start, peak_flops=self.peak_flops,
            drawn=self.state.drawn,
        )  # fmt: skip
        values["checkpoint_stall_s"] = self.saver.take_stall()  # by the save before this step
        return {**values, "loss_zscore": zscore, "skipped": skip}, totals["stop"] > 0

    def _load(self, step: int) -> Batch:
        """On the thread of the prefetch, which alone asks the sampler from the first step on."""
        config, mesh = self.config, self.mesh
        drawn = draw_batch(
            self.store, self.sampler, step, mesh.dp_size, config.data, mesh.tp.size, config.seed
        )
        few_shapes = shapes_cost_memory(mesh.device, self.engine.dtype)
        return drawn, *pack_batch(
            self.store, drawn, mesh.dp_rank, config.data, mesh.tp.size, few_shapes, self.teacher
        )

    def _update(self, lr: float, finite: torch.Tensor) -> None:
        note("optimizer")
        failpoint("step.optimizer", self.step)
        self.engine.update(lr, finite)

    def _judge_loss(self, loss: float, rows: np.ndarray) -> tuple[float | None, bool]:
        """(z of the loss, whether to leave out the update); the loss is the same number on all ranks."""
        mode = self.config.on_spike
        zscore = self.state.losses.judge(loss)
        if zscore is None or zscore <= self.state.losses.limit or mode == "ignore":
            return zscore, False
        self.log(
            f"WARNING: step {self.step + 1}: loss {loss:.4f} is {zscore:.1f} standard deviations above "
            f"that of the last steps{'; its update is skipped' if mode == 'skip' else ''}. Rows of the "
            f"step: {shown(rows)}"
        )
        return zscore, mode == "skip"

    def _before_evaluation(self, phase: str, i: int) -> None:
        note(phase, self.step)
        failpoint("eval.batch", f"{self.step}.{i}")
        stops = self._vote(self._stop)
        if stops:
            raise Stopped(phase)

    def _announce(self) -> None:
        if self.step >= self.config.num_steps > 0:
            self.log(f"step {self.step} of steps={self.config.num_steps} is done: nothing is left to train")
            return
        self.log(
            opening_line(
                self.config, self.model_config, self.mesh, self.engine.dtype, self.sampler.num_rows, self.step
            )
        )
        if len(self.sampler.parts) > 1:
            self.log(mix.planned(self.sampler.parts))
        if self.step:
            self._say_drawn()
        self.log(f"attention: {self._attention}")
        if self.config.optim.warmup_steps is None:
            self.log(
                f"optim.warmup_steps is not set: the rate rises for {self.state.optim.warmup_steps} of "
                f"{self.config.num_steps} steps"
            )

    def _say_drawn(self) -> None:
        if len(self.state.drawn) > 1:
            self.log(mix.drawn(self.state.drawn, self.step))

    def _saver(self) -> Saver:
        config, mesh, lock = self.config.checkpoint, self.mesh, self._held.lock
        # Ranks of a slow file system may finish a save long after one another; training's own timeout finds
        # dead ranks.
        group = background_group(timedelta(seconds=max(1800, self.config.parallel.timeout_s)))
        write = partial(
            save_checkpoint,
            self.output,
            rank=mesh.rank,
            world_size=mesh.world_size,
            keep=config.keep,
            keep_every=config.keep_every,
            damaged=self._held.damaged,
            check=lock.check if lock is not None else lambda: None,
            gather=partial(gather_objects, group=group),
            log=self.log,
        )
        return Saver(write, self.log, config.async_save)

    def save(self, wait: bool = True) -> None:
        """Publish output_dir/step-XXXXXXXX; on return it is durable, or with wait=False its values are
        copied."""
        self.saver.save(
            self.step, self.state.pieces(), meta=self.state.meta(), extra_files=self.tokenizer.files
        )
        if wait:
            self.saver.wait()
