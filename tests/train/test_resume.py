"""A run killed at random points and resumed ends bit for bit where the uninterrupted run ends, ledger included."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import train_config

from nemo_embed_core.checkpoint import sharded

IN_STEP = ["step.begin", "step.backward", "step.end"]
IN_SAVE = ["save.begin", "save.model_written", "save.optim_written", "save.before_manifest", "save.before_rename"]


class Worker:
    def __init__(self) -> None:
        script = Path(__file__).with_name("crash_worker.py")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.stderr = ""

    def run(self, config: Any, fail: str = "", world_size: int = 1, fail_rank: int = 0) -> list[int]:
        values = dataclasses.asdict(config)
        request = {"config": values, "fail": fail, "world_size": world_size, "fail_rank": fail_rank}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["codes"]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    w = Worker()
    yield w
    w.process.kill()
    w.process.communicate()


def final_state(run: Path) -> tuple[str, dict[str, str]]:
    """Ledger and sha256 of every file of the newest checkpoint, which must verify."""
    manifest = sharded.verify(sharded.checkpoints(run)[0])
    assert manifest["step"] == 10
    return manifest["ledger"], {name: f["sha256"] for name, f in manifest["files"].items()}


def config_for(folder: Path, name: str, **changes: Any) -> Any:
    changes = {"checkpoint": {"every": 3, "resume": "auto"}, "output_dir": str(folder / name), **changes}
    return train_config(folder, **changes)


@pytest.mark.dist
@pytest.mark.parametrize("world_size, parallel", [(1, {}), (2, {"tp_size": 2})])
def test_killed_five_times_ends_bit_identical(tmp_path: Path, worker: Worker, world_size: int, parallel: dict) -> None:
    calm = config_for(tmp_path, "calm", parallel=parallel)
    assert worker.run(calm, world_size=world_size) == [0] * world_size
    crashed = config_for(tmp_path, "crashed", parallel=parallel)
    rng = random.Random(world_size)
    # Each kill lies at or behind the last checkpoint, so that every one of them is really reached.
    kills = [f"{rng.choice(IN_STEP)}@{rng.choice([1, 2])}", f"{rng.choice(IN_SAVE)}@3"]
    kills += [
        f"save.after_rename@{rng.choice([3, 6])}",
        f"{rng.choice(IN_SAVE)}@9",
        f"{rng.choice(IN_STEP)}@{rng.choice([7, 8])}",
    ]
    for kill in kills:
        codes = worker.run(crashed, fail=kill, world_size=world_size, fail_rank=0)
        assert -9 in codes, f"the kill at {kill} never happened: {codes}"
    assert worker.run(crashed, world_size=world_size) == [0] * world_size
    assert final_state(tmp_path / "crashed") == final_state(tmp_path / "calm")
    assert not list((tmp_path / "crashed").glob(".tmp-*"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "crashed/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11)), "metrics.jsonl has each step once"


@pytest.mark.dist
def test_resume_under_other_layouts(tmp_path: Path, worker: Worker) -> None:
    """tp 1 -> tp 2 -> dp 2: the weights that are loaded are those that were saved, the samples are the same."""
    calm = config_for(tmp_path, "calm", checkpoint={"every": 10, "resume": "auto"})
    assert worker.run(calm) == [0]
    moved = config_for(tmp_path, "moved", checkpoint={"every": 3, "resume": "auto", "keep": 9})
    assert worker.run(moved, fail="step.begin@4") == [-9]
    two = dataclasses.replace(moved, parallel=dataclasses.replace(moved.parallel, tp_size=2))
    assert -9 in worker.run(two, fail="step.begin@7", world_size=2)
    assert worker.run(moved, world_size=2) == [0, 0]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("calm", "moved")
    ]
    for a, b in zip(*losses, strict=True):
        assert abs(a - b) <= 1e-5 * abs(a)
    ledgers = {sharded.read_manifest(sharded.checkpoints(tmp_path / n)[0])["ledger"] for n in ("calm", "moved")}
    assert len(ledgers) == 1


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "empty", "delete", "manifest"])
def test_a_damaged_newest_checkpoint_is_skipped_by_name(tmp_path: Path, worker: Worker, damage: str) -> None:
    calm = config_for(tmp_path, "calm")
    assert worker.run(calm) == [0]
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "calm", broken)
    newest = sharded.checkpoints(broken)[0]
    file = newest / "optim-00000-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip a bit":
        data[-5] ^= 16
        file.write_bytes(data)
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text("{")
    else:
        file.write_bytes(data[: len(data) // 2 if damage == "truncate" else 0])
    messages: list[str] = []
    found = sharded.newest(broken, messages.append)
    assert found is not None and found.name == "step-00000009"
    assert len(messages) == 1 and newest.name in messages[0]
    assert worker.run(config_for(tmp_path, "broken")) == [0]
    assert final_state(broken) == final_state(tmp_path / "calm")


def test_all_checkpoints_damaged_is_an_error_and_never_a_fresh_start(tmp_path: Path, worker: Worker) -> None:
    assert worker.run(config_for(tmp_path, "run")) == [0]
    for folder in sharded.checkpoints(tmp_path / "run"):
        (folder / "model-00000-of-00001.safetensors").write_bytes(b"")
    assert worker.run(config_for(tmp_path, "run")) == [2]
    with pytest.raises(sharded.CheckpointError, match=r"every checkpoint of .* is damaged"):
        sharded.newest(tmp_path / "run", lambda message: None)


def test_other_data_or_batch_cannot_continue_a_run(tmp_path: Path, worker: Worker) -> None:
    assert worker.run(config_for(tmp_path, "run")) == [0]
    for change in ({"seed": 1}, {"global_batch_size": 4}, {"data": {"num_hard_negatives": 1}}):
        assert worker.run(config_for(tmp_path, "run", **change)) == [2], change
    assert worker.run(config_for(tmp_path, "run", checkpoint={"resume": "none"})) == [2], "checkpoints are in the way"


def test_non_finite_weights_stop_before_the_optimizer(tmp_path: Path, worker: Worker) -> None:
    """A NaN in one embedding row: exit code 4, and nothing is saved after it."""
    assert worker.run(config_for(tmp_path, "run", steps=3)) == [0]
    newest = sharded.checkpoints(tmp_path / "run")[0]
    file = newest / "model-00000-of-00001.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][:] = float("nan")
    file.unlink()
    save_file(weights, file)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": sharded.sha256_file(file)}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert worker.run(config_for(tmp_path, "run", steps=6)) == [4]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
