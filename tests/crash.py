"""Runs of tests/train/crash_worker.py: train toys in forked ranks, kill, stop or signal them, and compare
what they leave.

answer = worker.train(config_for(tmp_path, "run"), 2, signals=[{"signal": 15, "ranks": [0], "at_step": 3}])
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tiny import DRAWN, train_config

from nemo_embed_core.checkpoint.manifest import verify_checkpoint
from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.data.sampler import Sampler


class Answer(NamedTuple):
    codes: list[int]  # -9: killed
    stderr: list[str]
    seconds: list[float]  # from the start to the end of each rank
    phases: list[str]  # "start", "step" or "save", at each signal


class Worker:
    """The server of crash_worker.py; `request` is described in its `run`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("train") / "crash_worker.py"
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=pipe, stdout=pipe, text=True, env=env
        )

    def train(self, config: Any, world_size: int = 1, **request: Any) -> Answer:
        values = {"config": dataclasses.asdict(config), "world_size": world_size, **request}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()
        answer = Answer(**json.loads(self.process.stdout.readline()))
        for rank, (code, text) in enumerate(zip(answer.codes, answer.stderr, strict=True)):
            print(f"--- rank {rank}, exit code {code}\n{text[-4000:]}")  # shown when the test fails
        return answer

    def run(self, config: Any, fail: str = "", world_size: int = 1, fail_rank: int = 0) -> list[int]:
        """The exit codes."""
        return self.train(config, world_size, fail=fail, fail_ranks=[fail_rank]).codes


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
