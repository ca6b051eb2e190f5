"""torchrun restarts a run that lost a worker, nobody outlives torchrun, and a fresh process computes the same
bits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash import Worker, final_state
from tiny import train_config

from nemo_embed_core.checkpoint.manifest import verify_checkpoint
from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.options import dump_yaml

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.dist


def command(
    folder: Path, name: str, *options: str, steps: int = 10, restarts: int = 0, ranks: int = 2
) -> list[str]:
    config = train_config(folder, output_dir=str(folder / name), steps=steps, checkpoint={"every": 3})
    dump_yaml(config, folder / f"{name}.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    torchrun += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    return [*torchrun, str(ROOT / "launch/train.py"), "--config", str(folder / f"{name}.yaml"), *options]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def num_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition: Callable[[], Any], process: subprocess.Popen, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, f"torchrun ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def workers_of(agent: int) -> list[int]:
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(pid) for pid in children if b"launch/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.fault(23)
def test_restarted_twice_by_itself_and_ends_bit_identical(tmp_path: Path, worker: Worker) -> None:
    """checkpoint.resume is left at none: a restart continues its own run. A new torchrun on it is refused,
    restarts too."""
    calm = train_config(tmp_path, output_dir=str(tmp_path / "calm"), checkpoint={"every": 3})
    assert worker.train(calm, 2).codes == [0, 0]
    slow = environment(NEMO_EMBED_FAIL="step.begin@*:sleep=0.3")  # time to hit it
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command(tmp_path, "run", restarts=3), env=slow, stdout=file, stderr=file)
        killed: set[int] = set()
        try:
            for rank, step in ((1, 4), (0, 8)):
                wait_for(lambda step=step: num_steps(tmp_path / "run") >= step, process)
                pids = sorted(set(workers_of(process.pid)) - killed)
                os.kill(pids[rank], signal.SIGKILL)
                killed |= {*pids}
            assert process.wait(timeout=240) == 0
        finally:
            process.kill()
            print(log.read_text()[-8000:])
    text = log.read_text()
    assert text.count("resumed from ") == 2, "both kills were answered by a restart"
    assert final_state(tmp_path / "run") == final_state(tmp_path / "calm")
    assert [
        json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ] == [*range(1, 11)]
    again = command(tmp_path, "run", restarts=1, ranks=1)
    refused = subprocess.run(again, env=environment(), capture_output=True, text=True, timeout=240)
    assert refused.returncode != 0 and refused.stderr.count("already holds checkpoints") == 2, refused.stderr


@pytest.mark.fault(24)
def test_no_worker_outlives_a_killed_torchrun(tmp_path: Path) -> None:
    slow = environment(NEMO_EMBED_FAIL="step.micro_batch@*:sleep=0.05")
    with (tmp_path / "log").open("w") as file:
        process = subprocess.Popen(command(tmp_path, "run", steps=10000), env=slow, stdout=file, stderr=file)
        try:
            wait_for(lambda: num_steps(tmp_path / "run") >= 4, process)
            pids = workers_of(process.pid)
            assert len(pids) == 2 and all(map(alive, pids))
        finally:
            process.kill()
            process.wait()
    deadline = time.monotonic() + 15
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    text = (tmp_path / "log").read_text()
    assert not any(map(alive, pids)), text
    manifest = verify_checkpoint(checkpoints(tmp_path / "run")[0])
    assert manifest["step"] == num_steps(tmp_path / "run"), "it saved what it had before it ended"
    assert "stopped by a signal after step" in text, text  # within a step or at its end


@pytest.mark.fault(25)
def test_two_fresh_processes_compute_the_same_bits(tmp_path: Path) -> None:
    """Other hash seeds, so no order of a set or dict of strings decides anything."""
    runs = []
    for seed in ("1", "2"):
        single = command(tmp_path, f"run-{seed}", ranks=1)
        plain = [sys.executable, *single[single.index(str(ROOT / "launch/train.py")) :]]
        runs.append(
            subprocess.Popen(plain, env=environment(PYTHONHASHSEED=seed), stderr=subprocess.PIPE, text=True)
        )
    for run in runs:
        _, errors = run.communicate(timeout=240)
        assert run.returncode == 0, errors
    assert final_state(tmp_path / "run-1") == final_state(tmp_path / "run-2")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / f"run-{s}/metrics.jsonl").open()] for s in "12"
    ]
    assert losses[0] == losses[1]
