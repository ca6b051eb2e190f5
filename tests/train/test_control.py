"""What a run does when it is told to stop, when a rank fails, when a number is not finite and when a loss
jumps."""

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash import Answer, Worker, config_for, final_state, ledger_of
from tiny import DRAWN

from nemo_embed_core.checkpoint.manifest import read_manifest, verify_checkpoint
from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.data.sampler import Sampler
from nemo_embed_core.train.spikes import LossWindow

STEPS = 7
SMALL: dict[str, Any] = {
    "steps": STEPS,
    "global_batch_size": 16,
    "data": {"max_tokens": 200},
}  # several micro-batches on each rank
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp 2": SMALL,
    "tp 2": {**SMALL, "parallel": {"tp_size": 2}},
    "in-batch negatives": {**SMALL, "loss": {"in_batch": "positives"}},  # GradCache
}


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, worker: Worker) -> Any:
    """layout -> the state that its uninterrupted run ends in."""
    folder, states = tmp_path_factory.mktemp("calm"), {}

    def state(layout: str) -> Any:
        if layout not in states:
            config = config_for(folder, layout.replace(" ", "-"), **LAYOUTS[layout])
            assert worker.train(config, 2).codes == [0, 0]
            states[layout] = final_state(Path(config.output_dir), STEPS)
        return states[layout]

    return state


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def left(answer: Answer) -> tuple[int, str, int, int]:
    """(step, phase, micro-batch, number of micro-batches) of the line about the step that was left."""
    found = re.search(r"left step (\d+) before (\w+) (\d+)/(\d+)", answer.stderr[0])
    assert found, answer.stderr[0]
    return int(found[1]), found[2], int(found[3]), int(found[4])


# ---- signals


@pytest.mark.fault(12)
@pytest.mark.dist
@pytest.mark.parametrize(
    "layout, rank, next_phase",
    [("dp 2", 1, "backward"), ("tp 2", 0, "backward"), ("in-batch negatives", 1, "embedding")],
)
def test_a_signal_stops_all_ranks_within_one_micro_batch(
    tmp_path: Path, worker: Worker, calm: Any, layout: str, rank: int, next_phase: str
) -> None:
    """SIGTERM at one rank as it begins micro-batch 2 of step 5: all have left before they would begin the
    next half."""
    config = config_for(tmp_path, "run", **LAYOUTS[layout])
    answer = worker.train(config, 2, fail="step.micro_batch@4.1:term", fail_ranks=[rank], end_others=False)
    assert answer.codes == [0, 0]
    step, phase, micro_batch, count = left(answer)
    assert (step, phase) == (5, next_phase) and count >= 3
    # The flag is asked for before forward 2 and heard before backward 2; GradCache's first forwards have no
    # backward.
    assert micro_batch == (3 if layout == "in-batch negatives" else 2)
    assert verify_checkpoint(checkpoints(tmp_path / "run")[0])["step"] == 4
    assert len(lines_of(tmp_path / "run")) == 4
    assert worker.train(config, 2).codes == [0, 0]
    assert final_state(tmp_path / "run", STEPS) == calm(layout)


@pytest.mark.fault(12)
@pytest.mark.dist
@pytest.mark.parametrize("ranks, seed", [([0, 1], 1), ([1], 2), ([0], 3)])
def test_a_signal_at_a_random_time(
    tmp_path: Path, worker: Worker, calm: Any, ranks: list[int], seed: int
) -> None:
    config = config_for(tmp_path, "run", **LAYOUTS["dp 2"])
    rng = random.Random(seed)
    number = rng.choice([10, 15])  # SIGUSR1, SIGTERM
    signals = [
        {"signal": number, "ranks": ranks, "at_step": rng.randint(1, 4), "delay_s": rng.uniform(0, 0.3)}
    ]
    slow = {"fail": "step.micro_batch@*:sleep=0.03", "fail_ranks": [0, 1]}
    answer = worker.train(config, 2, signals=signals, end_others=False, **slow)
    assert answer.codes == [0, 0] and len(answer.phases) == 1, "the signal came before the end"
    manifest = verify_checkpoint(checkpoints(tmp_path / "run")[0])
    assert manifest["step"] == len(lines_of(tmp_path / "run")) < STEPS
    assert worker.train(config, 2).codes == [0, 0]
    assert final_state(tmp_path / "run", STEPS) == calm("dp 2")


@pytest.mark.fault(13)
@pytest.mark.dist
@pytest.mark.parametrize("when", ["twice", "in a save"])
def test_a_second_signal_and_one_during_a_save_change_nothing(
    tmp_path: Path, worker: Worker, calm: Any, when: str
) -> None:
    config = config_for(tmp_path, "run", **LAYOUTS["dp 2"])
    both = {"signal": 15, "ranks": [0, 1]}
    if when == "twice":
        signals = [{**both, "at_step": 4}, {**both, "delay_s": 0.05}, {**both, "delay_s": 0.2}]
    else:
        signals = [{**both, "when_saving": 1, "delay_s": 0.1}, {**both, "when_saving": 2, "delay_s": 0.1}]
    slow = {"fail": "save.before_rename@*:sleep=0.4", "fail_ranks": [0]}
    answer = worker.train(config, 2, signals=signals, end_others=False, **slow)
    assert answer.codes == [0, 0]
    assert len(answer.phases) >= (2 if when == "twice" else 1) and "save" in answer.phases, answer.phases
    assert verify_checkpoint(checkpoints(tmp_path / "run")[0])["step"] < STEPS
    assert worker.train(config, 2).codes == [0, 0]
    assert final_state(tmp_path / "run", STEPS) == calm("dp 2")
    assert not list((tmp_path / "run").glob(".tmp-*"))


# ---- one rank fails


@pytest.mark.fault(15)
@pytest.mark.dist
@pytest.mark.parametrize("rank, action", [(0, "raise"), (1, "raise"), (1, "oom")])
def test_the_error_of_one_rank_ends_all_and_is_named_by_all(
    tmp_path: Path, worker: Worker, rank: int, action: str
) -> None:
    step = random.Random(rank).randint(1, 5)
    config = config_for(tmp_path, "run", **LAYOUTS["dp 2"])
    fail = f"step.micro_batch@{step}.1:{action}"
    answer = worker.train(config, 2, fail=fail, fail_ranks=[rank], end_others=False)
    codes, texts = answer.codes, answer.stderr
    assert (codes[rank], codes[1 - rank]) == (1, 5)
    error = "MemoryError" if action == "oom" else "RuntimeError"
    place = f"at 'forward 2/[0-9]+' of step {step + 1}: {error}: injected at step.micro_batch"
    own, other = texts[rank], texts[1 - rank]
    assert re.search(rf"\[rank {rank} of 2\] error {place}\nTraceback ", own), own
    assert re.search(rf"\[rank {1 - rank}\] rank {rank} ended the job first: {place}", other), other
    assert "Traceback" not in other and "Connection" not in other
    assert abs(answer.seconds[0] - answer.seconds[1]) < 10
    if action == "oom":
        assert re.search(
            r"rank 1 was in micro-batch 2 of \d+: \d+ tokens in \d+ sequences, the longest of \d+; peak", own
        )
        assert "Lower data.max_tokens=200" in own


# ---- not finite


@pytest.mark.fault(16)
@pytest.mark.dist
@pytest.mark.parametrize("kind", ["nan loss", "nan gradient", "nan embedding"])
def test_a_nan_of_one_rank_is_refused_by_all_before_the_optimizer(
    tmp_path: Path, worker: Worker, kind: str
) -> None:
    config = config_for(tmp_path, "run", checkpoint={"every": 2}, **LAYOUTS["dp 2"])
    rows = str(tmp_path / "rows")
    answer = worker.train(config, 2, plant=kind, plant_step=4, plant_ranks=[1], rows=rows, end_others=False)
    assert answer.codes == [4, 4]
    for text in answer.stderr:
        assert "weights and moments as before: True" in text
    assert "error: step 5: loss" in answer.stderr[0] and "weights are those of step 4" in answer.stderr[0]
    named = [int(row) for row in re.search(r"rows of the step: \[([^]]*)\]", answer.stderr[0])[1].split(", ")]
    assert named == Sampler(DRAWN, 16, 0).rows(4).tolist()
    bad = re.search(r"rows with a non-finite loss: \[([^]]*)\]", answer.stderr[0])
    if kind == "nan gradient":
        assert bad is None and "every loss is finite, a gradient is not" in answer.stderr[0]
    else:
        step, of_rank_1 = json.loads(Path(f"{rows}-1-0.jsonl").read_text().splitlines()[-1])
        assert step == 4 and {int(row) for row in bad[1].split(", ")} <= set(of_rank_1)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000002"]
    assert [m["step"] for m in lines_of(tmp_path / "run")] == [1, 2, 3, 4]
    if kind == "nan loss":
        assert worker.train(config, 2).codes == [0, 0], "without the fault the same step runs"


# ---- loss spikes


def test_the_window_tells_a_jump_from_noise_and_follows_a_new_level() -> None:
    window = LossWindow(limit=6.0)
    rng = random.Random(0)
    scores = [window.judge(1.0 + rng.gauss(0, 0.1)) for _ in range(300)]
    assert (
        scores[:19] == [None] * 19
        and scores[19] is None
        and all(z is not None and abs(z) < 6 for z in scores[20:])
    )
    mean, std = np.mean(window.losses), np.std(window.losses)
    z = LossWindow(6.0, window.losses).judge(3.0)
    assert z is not None and abs(z - (3.0 - mean) / std) < 1e-9 and z > 6
    again = LossWindow(6.0, json.loads(json.dumps(window.losses)))  # as a manifest carries it
    following = [window.judge(3.0 + rng.gauss(0, 0.1)) for _ in range(50)]
    assert sum(z > 6 for z in following) < 30 and following[-1] < 6, "a level that stays becomes normal"
    rng = random.Random(0)
    for _ in range(300):
        rng.gauss(0, 0.1)
    assert [again.judge(3.0 + rng.gauss(0, 0.1)) for _ in range(50)] == following, (
        "its losses are its whole state"
    )


@pytest.mark.fault(17)
@pytest.mark.dist
@pytest.mark.parametrize("master_weights, precision", [("fp32", "fp32"), ("split", "bf16")])
def test_a_spike_is_skipped_recorded_and_resumed_bit_exactly(
    tmp_path: Path, worker: Worker, master_weights: str, precision: str
) -> None:
    """A loss x 100 in step 23 of 28; the second run is killed in step 26 and resumes from step 24, behind the
    spike."""
    config = config_for(
        tmp_path, "calm", steps=28, on_spike="skip", global_batch_size=4, precision=precision,
        optim={"master_weights": master_weights}, checkpoint={"async_save": False},
    )  # fmt: skip  # step 24 is there before step 26, however slow the disk
    spike = {"plant": "spike", "plant_step": 22, "plant_ranks": [0]}
    answer = worker.train(config, **spike)
    assert answer.codes == [0]
    rows = Sampler(DRAWN, 4, 0).rows(22).tolist()
    found = re.search(
        r"WARNING: step 23: loss \S+ is (\S+) standard deviations above .* its update is skipped",
        answer.stderr[0],
    )
    assert found and float(found[1]) > 6 and f"Rows of the step: {rows}" in answer.stderr[0]
    lines = lines_of(tmp_path / "calm")
    assert [m["step"] for m in lines if m["skipped"]] == [23] and lines[22]["loss_zscore"] > 6
    assert lines[19]["loss_zscore"] is None and lines[20]["loss_zscore"] is not None
    ledger, files = final_state(tmp_path / "calm", step=28)
    assert ledger == ledger_of(28, {22}, batch=4) != ledger_of(28, batch=4)

    crashed = dataclasses.replace(config, output_dir=str(tmp_path / "crashed"))
    assert worker.train(crashed, fail="step.backward@25", **spike).codes == [-9]
    assert read_manifest(checkpoints(tmp_path / "crashed")[0])["step"] == 24
    assert worker.train(crashed).codes == [0]
    assert final_state(tmp_path / "crashed", step=28) == (ledger, files)
    assert [m["loss_zscore"] for m in lines_of(tmp_path / "crashed")] == [m["loss_zscore"] for m in lines]

    warned = dataclasses.replace(config, output_dir=str(tmp_path / "warned"), on_spike="warn")
    answer = worker.train(warned, **spike)
    assert "WARNING: step 23: loss" in answer.stderr[0] and "its update is skipped" not in answer.stderr[0]
    assert final_state(tmp_path / "warned", step=28)[0] == ledger_of(28, batch=4)
    assert final_state(tmp_path / "warned", step=28)[1] != files, (
        "the update of a spike that is only warned of is made"
    )
