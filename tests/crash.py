"""Trains toys in forked ranks, kills, stops or signals them, plants NaN and spikes, and compares what they
leave.

    signals = [{"signal": 15, "ranks": [0], "at_step": 3}]
    answer = worker.train(config_for(tmp_path, "run"), 2, signals=signals)
"""

import hashlib
import json
import os
import runpy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from forked import ROOT, Server
from tiny import DRAWN, train_config

from nemo_embed_core.checkpoint.manifest import verify_checkpoint
from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.data.sampler import Sampler
from nemo_embed_core.errors import run_rank, user_errors


class Answer(NamedTuple):
    codes: list[int]  # -9: killed
    stderr: list[str]
    seconds: list[float]  # from the start to the end of each rank
    phases: list[str]  # "start", "step" or "save", at each signal


class Worker:
    def __init__(self, server: Server) -> None:
        self.server = server

    def train(
        self, config: Any, world_size: int = 1, *, ranks: list[int] | None = None, signals: Any = (),
        end_others: bool = True, limit_s: float = 120, **request: Any,
    ) -> Answer:  # fmt: skip
        """Runs launch/train.py's own `train` on ranks that end as run_rank ends them.

        fail, fail_ranks: NEMO_EMBED_FAIL on these ranks
        ranks: only these are started
        plant, plant_step, plant_ranks, rows: see `plant`
        signals: [{"signal": 15, "ranks": [0], "at_step": 3 (lines in metrics.jsonl, written by this run)
                   or "when_saving": n (a .tmp-step folder is there for the n-th time) or "when_ended": rank,
                   "delay_s": 0.5 (since then, or since the signal before)}], sent in this order
        end_others: as torchrun does, a rank that fails ends the others; False: they must end by themselves
        limit_s: then every rank left is killed
        """
        options = {"only": ranks, "limit_s": limit_s, "grace_s": 0 if end_others else limit_s}
        watch = Signals(Path(config.output_dir), list(signals))
        outcomes, watch = self.server.watched(
            train_rank, world_size, (config, request), watch=watch, **options
        )
        codes, outputs, seconds = (
            [getattr(o, name) for o in outcomes] for name in ("code", "output", "seconds")
        )
        return Answer(codes, outputs, seconds, watch.phases)

    def run(self, config: Any, fail: str = "", world_size: int = 1, fail_rank: int = 0) -> list[int]:
        """The exit codes."""
        return self.train(config, world_size, fail=fail, fail_ranks=[fail_rank]).codes


@dataclass
class Signals:
    """Sends the signals of a request when they are due, and notes where the run was."""

    output: Path
    signals: list[dict[str, Any]]
    phases: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    saves: int = 0
    was_saving: bool = False
    due_since: float = 0.0

    def __post_init__(self) -> None:
        if self.signals and not {"at_step", "when_saving", "when_ended"} & self.signals[0].keys():
            self.due_since = time.monotonic()

    def __call__(self, pids: dict[int, int], ended: dict[int, Any]) -> None:
        if not self.signals:
            return
        saving = any(self.output.glob(".tmp-step-*"))
        self.saves, self.was_saving = self.saves + (saving and not self.was_saving), saving
        signal = self.signals[0]
        if not self.due_since:
            steps = self.metrics().count("\n")
            due = self.saves >= signal.get("when_saving", 0) and steps >= signal.get("at_step", 0)
            due = due and signal.get("when_ended") in (None, *ended)
            self.due_since = time.monotonic() if due else 0.0
        if self.due_since and time.monotonic() - self.due_since >= signal.get("delay_s", 0):
            self.phases.append("save" if saving else "step" if self.metrics() else "start")
            for rank in signal["ranks"]:
                if rank not in ended:
                    os.kill(pids[rank], signal["signal"])
            del self.signals[0]
            self.due_since = 0.0

    def metrics(self) -> str:
        """What this run has written of them."""
        path = self.output / "metrics.jsonl"
        return path.read_text() if path.exists() and path.stat().st_mtime > self.started else ""


def train_rank(config: Any, request: dict[str, Any]) -> None:
    rank = int(os.environ["RANK"])
    os.environ["NEMO_EMBED_FAIL"] = request.get("fail", "") if rank in request.get("fail_ranks", [0]) else ""
    train = runpy.run_path(str(ROOT / "launch/train.py"))["train"]
    plant(request, rank)

    def main() -> None:
        with user_errors():
            train(config)

    run_rank(main)


def plant(request: dict[str, Any], rank: int) -> None:
    """Faults that no environment variable makes: NaN, spikes. And a record of the rows that were really
    trained on."""
    from torch import nan, ones_like

    from nemo_embed_core.parallel.grad_norm import local_tensor
    from nemo_embed_core.train.engine import Engine
    from nemo_embed_core.train.spikes import NonFiniteError
    from nemo_embed_core.train.trainer import Trainer

    kind, at = request.get("plant", ""), request.get("plant_step")
    mine = rank in request.get("plant_ranks", [0])
    real_step, real_forward_backward = Trainer.train_step, Engine.forward_backward
    current = [0]

    def digest(self) -> str:
        return hashlib.sha256(
            b"".join(t.numpy().tobytes() for t in self.state.tensors().values())
        ).hexdigest()

    def train_step(self):
        current[0] = self.step
        before = digest(self) if kind.startswith("nan") else ""
        try:
            return real_step(self)
        except NonFiniteError:
            print("weights and moments as before:", before == digest(self), file=sys.stderr)
            raise

    def poison(module, args, embeddings_ND):
        factor = ones_like(embeddings_ND)
        factor[0] = nan
        return embeddings_ND * factor

    def forward_backward(engine, batches, before):
        model, mesh = engine.model, engine.mesh
        hit = mine and current[0] == at
        hook = model.register_forward_hook(poison) if hit and kind == "nan embedding" else None
        losses_B, stats = real_forward_backward(engine, batches, before)
        if hook is not None:
            hook.remove()
        if hit and kind == "nan loss":
            losses_B[0] = nan
        if hit and kind == "nan gradient":
            grads = (local_tensor(p.grad) for p in model.parameters() if p.grad is not None)
            next(g for g in grads if g.numel()).view(-1)[0] = nan
        if hit and kind == "spike":
            losses_B *= 100
        if request.get("rows"):
            rows = [int(row) for batch in batches for row in batch.rows]
            with open(f"{request['rows']}-{mesh.dp_rank}-{mesh.tp.rank}.jsonl", "a") as file:
                file.write(json.dumps([current[0], rows]) + "\n")
        return losses_B, stats

    Trainer.train_step, Engine.forward_backward = train_step, forward_backward


def final_state(run: Path, step: int = 10) -> tuple[str, dict[str, str]]:
    """Ledger and sha256 of every file of the newest checkpoint, which must verify."""
    manifest = verify_checkpoint(checkpoints(run)[0])
    assert manifest["step"] == step
    return manifest["ledger"], {name: f["sha256"] for name, f in manifest["files"].items()}


def config_for(folder: Path, name: str, **changes: Any) -> Any:
    """A run of 10 steps that saves after steps 3, 6, 9 and 10, in folder/name."""
    checkpoint = {"every": 3, "resume": "auto", **changes.pop("checkpoint", {})}
    return train_config(folder, output_dir=str(folder / name), checkpoint=checkpoint, **changes)


def ledger_of(
    steps: int,
    skipped: set[int] | frozenset[int] = frozenset(),
    batch: int = 8,
    rows: int | np.ndarray = DRAWN,
) -> str:
    """The hash chain that a manifest carries, from the sampler alone."""
    ledger, sampler = "0" * 64, Sampler(rows, batch, 0)
    for step in range(steps):
        of_step = np.ascontiguousarray(sampler.rows(step), dtype="<i8").tobytes()
        ledger = hashlib.sha256(
            ledger.encode() + of_step + (b"skipped" if step in skipped else b"")
        ).hexdigest()
    return ledger
