"""The comparison of two trees sees what it is there to see."""

import json
from pathlib import Path

import pytest
from same_behaviour import differences

METRICS = {"step": 1, "loss": 0.5, "tokens_per_s": 9.0, "acc": [{"k": 1}, {"k": 2}]}


def write(folder: Path, metrics: dict, weights: bytes = b"weights", *more: str) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    for name in ("model.bin", *more):
        (folder / name).write_bytes(weights)
    return folder


@pytest.mark.parametrize(
    "b, found",
    [
        ((METRICS,), []),
        (({**METRICS, "tokens_per_s": 8.0},), []),  # a time
        (({**METRICS, "loss": 0.25},), ["differs: metrics.jsonl [0].loss"]),
        (({**METRICS, "acc": [{"k": 1}, {"k": 3}]},), ["differs: metrics.jsonl [0].acc[1].k"]),
        (({**METRICS, "new": None},), ["differs: metrics.jsonl [0].new"]),
        ((METRICS, b"weighty"), ["differs: model.bin"]),
        ((METRICS, b"weights", "card.md"), ["only in B: card.md"]),
        ((METRICS, b"weights", "sources.json"), []),  # when files were written
    ],
)
def test_a_difference_is_found(tmp_path: Path, b: tuple, found: list[str]) -> None:
    assert differences(write(tmp_path / "a", METRICS), write(tmp_path / "b", *b)) == found
