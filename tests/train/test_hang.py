"""A rank that stops, hangs, dies or never comes ends the others soon, with its number in their last line.

Every test starts two ranks with parallel.timeout_s=5 (3 where a rank is missing) and lets them end by
themselves.
"""

import re
import signal
from pathlib import Path

import pytest
from crash import Answer, Worker, config_for

PLACE = r"'[^']+' of step \d+"


def run(worker: Worker, folder: Path, **request: object) -> Answer:
    timeout_s = request.pop("timeout_s", 5)
    config = config_for(
        folder, "run", steps=1000, checkpoint={"every": 1000}, parallel={"timeout_s": timeout_s}
    )
    return worker.train(config, 2, end_others=False, limit_s=60, **request)


@pytest.mark.fault(14)
@pytest.mark.dist
@pytest.mark.parametrize("stopped", [1, 0])  # rank 0 also serves the ranks' store
def test_a_stopped_rank_is_named(tmp_path: Path, worker: Worker, stopped: int) -> None:
    other = 1 - stopped
    signals = [
        {"signal": signal.SIGSTOP, "ranks": [stopped], "at_step": 3},
        {"signal": signal.SIGKILL, "ranks": [stopped], "when_ended": other},
    ]
    answer = run(worker, tmp_path, signals=signals)
    assert (answer.codes[stopped], answer.codes[other]) == (-9, 5)
    assert answer.seconds[other] < answer.seconds[stopped] and len(answer.phases) == 2, "it ended by itself"
    line = rf"\[rank {other}\] rank {stopped} did not reach {PLACE} \((.*)\); ending this rank\n"
    found = re.search(line, answer.stderr[other])
    assert found, answer.stderr[other]
    if stopped == 1:
        assert re.search(
            rf"last seen at {PLACE}.*, \d+ s ago, on \S+; its process is stopped or gone", found[1]
        )
    else:
        assert re.search(r"it holds the ranks' store and has been silent for \d+ s", found[1])
    assert "Traceback" not in answer.stderr[other]


@pytest.mark.dist
def test_a_rank_that_hangs_is_named_and_says_where_it_stands(tmp_path: Path, worker: Worker) -> None:
    """Its process lives and reports; the other waits for it in the collective of the same phase."""
    answer = run(worker, tmp_path, fail="step.micro_batch@4.0:sleep=300", fail_ranks=[1])
    assert answer.codes == [5, 5]
    line = r"rank 1 keeps the others waiting in 'forward 1/1' of step 5 "
    line += rf"\(last seen at {PLACE} in errors.py:\d+ failpoint, "
    assert re.search(rf"\[rank 0\] {line}", answer.stderr[0])
    assert re.search(rf"\[rank 1\] rank 0 ended the job first: {line}", answer.stderr[1])
    assert re.search(r"errors.py\", line \d+ in failpoint\n.*in _before", answer.stderr[1]), (
        "the stack of the stuck rank"
    )


@pytest.mark.dist
def test_a_rank_that_hangs_earlier_than_the_others_wait_is_named(tmp_path: Path, worker: Worker) -> None:
    answer = run(worker, tmp_path, fail="step.backward@4:sleep=300", fail_ranks=[0])
    assert answer.codes == [5, 5]
    line = r"rank 0 did not reach 'totals' of step 5 "
    line += r"\(last seen at 'grad norm' of step 5 in errors.py:\d+ failpoint, "
    assert re.search(rf"\[rank 1\] {line}", answer.stderr[1])


@pytest.mark.dist
@pytest.mark.parametrize("killed", [1, 0])
def test_a_killed_rank_is_named(tmp_path: Path, worker: Worker, killed: int) -> None:
    answer = run(worker, tmp_path, signals=[{"signal": signal.SIGKILL, "ranks": [killed], "at_step": 3}])
    other = 1 - killed
    assert (answer.codes[killed], answer.codes[other]) == (-9, 5)
    assert re.search(
        rf"\[rank {other}\] lost a connection: rank {killed} did not reach {PLACE}", answer.stderr[other]
    )
    assert "Traceback" not in answer.stderr[other]


@pytest.mark.dist
@pytest.mark.parametrize("present", [0, 1])
def test_a_rank_that_never_comes_is_named(tmp_path: Path, worker: Worker, present: int) -> None:
    answer = run(worker, tmp_path, ranks=[present], timeout_s=3)
    assert answer.codes == [5]
    line = (
        r"rank 1 of 2 did not join at 127.0.0.1:\d+ within 3 s"
        if present == 0
        else "no connection to rank 0 at 127.0.0.1"
    )
    assert re.search(rf"\[rank {present}\] {line}", answer.stderr[0])


@pytest.mark.dist
def test_slow_is_not_stuck(tmp_path: Path, worker: Worker) -> None:
    """One rank is 1.5 s late in every phase of its micro-batches: longer than the timeout together, never at
    once."""
    config = config_for(
        tmp_path, "run", steps=1, global_batch_size=16, parallel={"timeout_s": 6}, data={"max_tokens": 200}
    )
    answer = worker.train(config, 2, end_others=False, fail="step.micro_batch@*:sleep=1.5", fail_ranks=[1])
    assert answer.codes == [0, 0] and answer.seconds[0] > 7
