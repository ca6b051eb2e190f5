"""A run killed at random points and resumed ends bit for bit where the uninterrupted run ends, ledger
included."""

import dataclasses
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from crash import Worker, config_for, final_state, ledger_of
from tiny import DRAWN

from nemo_embed_core.checkpoint.manifest import CheckpointError, read_manifest
from nemo_embed_core.checkpoint.runs import checkpoints, newest_whole
from nemo_embed_core.data.sampler import Sampler

IN_STEP = ["step.begin", "step.micro_batch", "step.backward", "step.optimizer", "step.end"]
IN_SAVE = ["save.begin", "save.model_written", "save.optim_written"]
IN_PUBLISH = ["save.before_manifest", "save.before_rename", "save.after_rename"]  # rank 0 alone


@pytest.mark.fault(1)
@pytest.mark.dist
def test_each_failpoint_killed_once_and_resumed_once(tmp_path: Path, worker: Worker) -> None:
    """Eleven points, on either rank where both pass them: weights, moments and ledger are those of the calm
    run."""
    changes: dict[str, Any] = {"steps": 3, "checkpoint": {"every": 1}}
    calm = config_for(tmp_path, "calm", **changes)
    assert worker.run(calm, world_size=2) == [0, 0]
    for i, point in enumerate([*IN_STEP, *IN_SAVE, *IN_PUBLISH]):
        crashed = config_for(tmp_path, point, **changes)
        at = {"step.micro_batch": "1.0"}.get(point, "1" if point in IN_STEP[:-1] else "2")
        rank = 0 if point in IN_PUBLISH else i % 2
        assert worker.run(crashed, fail=f"{point}@{at}", world_size=2, fail_rank=rank)[rank] == -9, point
        newest = [p.name for p in checkpoints(tmp_path / point)][:1]
        if point in IN_STEP:  # the save of step 1 may still be on its way
            assert newest in ([], ["step-00000001"]), point
        else:
            assert newest == ["step-00000002" if point == "save.after_rename" else "step-00000001"], point
        assert worker.run(crashed, world_size=2) == [0, 0], point
        assert final_state(tmp_path / point, 3) == final_state(tmp_path / "calm", 3), point
        assert not list((tmp_path / point).glob(".tmp-*")), point


@pytest.mark.fault(2)
@pytest.mark.fault(7)
@pytest.mark.dist
def test_killed_five_times_under_tensor_parallelism(tmp_path: Path, worker: Worker) -> None:
    calm = config_for(tmp_path, "calm", parallel={"tp_size": 2})
    assert worker.run(calm, world_size=2) == [0, 0]
    crashed = config_for(tmp_path, "crashed", parallel={"tp_size": 2})
    rng = random.Random(2)
    points = [p for p in IN_STEP if p != "step.micro_batch"]
    # Each kill lies at or behind the last checkpoint, so that every one of them is really reached.
    kills = [f"{rng.choice(points)}@{rng.choice([1, 2])}", f"{rng.choice(IN_SAVE)}@3"]
    kills += [f"save.after_rename@{rng.choice([3, 6])}", f"{rng.choice(IN_PUBLISH[:2])}@9"]
    kills += [f"{rng.choice(points)}@{rng.choice([7, 8])}"]
    for kill in kills:
        codes = worker.run(crashed, fail=kill, world_size=2)
        assert -9 in codes, f"the kill at {kill} never happened: {codes}"
    assert worker.run(crashed, world_size=2) == [0, 0]
    assert final_state(tmp_path / "crashed") == final_state(tmp_path / "calm")
    assert not list((tmp_path / "crashed").glob(".tmp-*"))
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "crashed/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 11)), "metrics.jsonl has each step once"


@pytest.mark.fault(2)
@pytest.mark.fault(7)
@pytest.mark.dist
@pytest.mark.slow
def test_killed_at_random_times_loses_and_repeats_no_row(tmp_path: Path, worker: Worker) -> None:
    """Twenty SIGKILLs of one rank or of both, one after the other, at random times on the same run of 8
    epochs of 45 rows.

    More than twenty until 3 came in a save and 5 in a step; a run that ends too early is followed by another
    one.
    """
    steps, rng = 45, random.Random(0)
    changes: dict[str, Any] = {"steps": steps, "log_every": 100, "checkpoint": {"every": 2}}
    calm = config_for(tmp_path, "calm", **changes)
    answer = worker.train(calm, 2)
    assert answer.codes == [0, 0]
    want, step_s = final_state(tmp_path / "calm", steps), max(answer.seconds) / steps
    phases: list[str] = []
    for run in range(20):
        config, rows = config_for(tmp_path, f"run-{run}", **changes), str(tmp_path / f"rows-{run}")
        enough, codes = False, [-9]
        while any(codes):
            enough = len(phases) >= 20 and phases.count("step") >= 5 and phases.count("save") >= 3
            kill = {
                "signal": 9,
                "ranks": rng.choice([[0, 1], [0], [1]]),
                "delay_s": 0.15 + rng.uniform(0, 12 * step_s),
            }
            answer = worker.train(config, 2, rows=rows, signals=[] if enough else [kill])
            codes = answer.codes
            if -9 in codes:
                phases += answer.phases
        assert final_state(tmp_path / f"run-{run}", steps) == want
        if enough:
            break
    assert enough, phases
    assert want[0] == ledger_of(steps)
    # What was really trained on, as the ranks wrote it down: of every step the last time it ran.
    last: dict[int, list[int]] = {}
    for rank in range(2):
        of_rank = dict(json.loads(line) for line in Path(f"{rows}-{rank}-0.jsonl").read_text().splitlines())
        assert set(of_rank) == set(range(steps))
        for step, taken in of_rank.items():
            last.setdefault(step, []).extend(taken)
    assert all(
        sorted(last[step]) == sorted(Sampler(DRAWN, 8, 0).rows(step).tolist()) for step in range(steps)
    )
    assert set(Counter(row for taken in last.values() for row in taken).values()) == {8}


@pytest.mark.dist
def test_resume_under_other_layouts(tmp_path: Path, worker: Worker) -> None:
    """tp 1 -> tp 2 -> dp 2: loaded weights are the saved ones, the samples are the same."""
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
    ledgers = {read_manifest(checkpoints(tmp_path / n)[0])["ledger"] for n in ("calm", "moved")}
    assert len(ledgers) == 1


@pytest.mark.fault(3)
@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "empty", "delete", "manifest"])
def test_a_damaged_newest_checkpoint_is_skipped_by_name(tmp_path: Path, worker: Worker, damage: str) -> None:
    calm = config_for(tmp_path, "calm")
    assert worker.run(calm) == [0]
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "calm", broken)
    newest = checkpoints(broken)[0]
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
    found = newest_whole(broken, messages.append)
    assert found is not None and found.name == "step-00000009"
    assert len(messages) == 1 and newest.name in messages[0]
    assert worker.run(config_for(tmp_path, "broken")) == [0]
    assert final_state(broken) == final_state(tmp_path / "calm")


def test_all_checkpoints_damaged_is_an_error_and_never_a_fresh_start(tmp_path: Path, worker: Worker) -> None:
    assert worker.run(config_for(tmp_path, "run")) == [0]
    for folder in checkpoints(tmp_path / "run"):
        (folder / "model-00000-of-00001.safetensors").write_bytes(b"")
    assert worker.run(config_for(tmp_path, "run")) == [3]
    with pytest.raises(CheckpointError, match=r"every checkpoint of .* is damaged"):
        newest_whole(tmp_path / "run", lambda message: None)


def test_other_data_or_batch_cannot_continue_a_run(tmp_path: Path, worker: Worker) -> None:
    assert worker.run(config_for(tmp_path, "run")) == [0]
    for change in ({"seed": 1}, {"global_batch_size": 4}, {"data": {"num_hard_negatives": 1}}):
        assert worker.run(config_for(tmp_path, "run", **change)) == [2], change
    assert worker.run(config_for(tmp_path, "run", checkpoint={"resume": "none"})) == [2], (
        "checkpoints are in the way"
    )
