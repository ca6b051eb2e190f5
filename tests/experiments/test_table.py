"""The table of an experiment against numbers by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from grids import Verbs, config_of, toy

from nemo_embed_core.config import ExperimentConfig
from nemo_embed_core.experiments import run as running
from nemo_embed_core.steps import runner

# (learning rate, task) -> the scores of each query by seed, of the task `one` four and of `two` two queries.
SCORES = {
    (1e-3, "one"): [[0.1, 0.2, 0.3, 0.4], [0.3, 0.2, 0.3, 0.4], [0.2, 0.2, 0.3, 0.4]],
    (1e-2, "one"): [[0.2, 0.4, 0.3, 0.5], [0.4, 0.4, 0.5, 0.5], [0.2, 0.3, 0.3, 0.7]],
    (1e-3, "two"): [[0.5, 0.7], [0.5, 0.6], [0.4, 0.8]],
    (1e-2, "two"): [[0.6, 0.6], [0.8, 0.5], [0.6, 0.8]],
}
ONE = np.array([[0.1, 0.2, 0, 0.1], [0.1, 0.2, 0.2, 0.1], [0, 0.1, 0, 0.3]])  # differences [seeds, queries]
TWO = np.array([[0.1, -0.1], [0.3, -0.1], [0.2, 0.0]])


def table(folder: Path, monkeypatch: Any, seeds: list[int], scores: dict[Any, Any]) -> tuple[Any, str]:
    """results.json and results.md of a grid over two rates whose evaluations gave these scores."""

    def score(options: dict[str, Any]) -> list[float]:
        model = options["models"][0]
        if model == "bm25":
            return scores[1e-3, options["name"]][0]
        train = config_of(model)
        return scores[train["optim"]["lr"], options["name"]][train["seed"] - 1]

    monkeypatch.setattr(runner, "_start", Verbs(score))
    monkeypatch.setattr(runner, "code_version", lambda: "this code")  # which asks git
    grid = toy(
        folder, seeds=seeds, figures={}, models=["warm"],
        axes={"rate": {"small": {"warm.optim.lr": 1e-3}, "large": {"warm.optim.lr": 1e-2}}},
        evaluate={name: {"data": "{data}/test"} for name in dict(k[::-1] for k in scores)},
    )  # fmt: skip
    values = yaml.safe_load(grid.read_text())
    values["steps"] = {"warm": values["steps"]["warm"]}
    grid.write_text(yaml.safe_dump(values, sort_keys=False))
    said: list[str] = []
    running.run(ExperimentConfig(grid=str(grid), output=str(folder / "out")), said.append)
    return json.loads((folder / "out/results.json").read_text()), (folder / "out/results.md").read_text()


def test_two_tasks_and_three_seeds_are_as_by_hand(tmp_path, monkeypatch):
    found, page = table(tmp_path, monkeypatch, [1, 2, 3], SCORES)
    small, large, words = found["rows"]
    assert small["tasks"]["one"]["seeds"] == pytest.approx([0.25, 0.3, 0.275])
    assert small["tasks"]["one"]["score"] == pytest.approx(0.275)
    assert small["tasks"]["one"]["spread"] == pytest.approx(0.025)
    assert small["tasks"]["mean"]["seeds"] == pytest.approx([0.425, 0.425, 0.4375])
    assert not [row for row in (small, words) for s in row["tasks"].values() if "difference" in s]

    # V_seeds: means 0.1, 0.15, 0.1 of `one` with variance 1/1200; 0, 0.1, 0.1 of `two` with 1/300.
    # V_queries: means 1/15, 1/6, 1/15, 1/6 with variance 1/300; 0.2 and -1/15 with 8/225.
    # V_rest: residuals' squares sum to 13/300 over 6 degrees; of two queries to 1/75 over 2.
    one, two, mean = (large["tasks"][task]["difference"] for task in ("one", "two", "mean"))
    assert one["value"] == pytest.approx(7 / 60) and two["value"] == pytest.approx(1 / 15)
    assert mean["value"] == pytest.approx((7 / 60 + 1 / 15) / 2)
    rest_one, rest_two = _residual(ONE), _residual(TWO)
    seeds, queries, rest = 1 / 1200 / 3, 1 / 300 / 4, rest_one / 6 / 12
    assert one["error_of_seeds"] ** 2 == pytest.approx(seeds)
    assert one["error_of_queries"] ** 2 == pytest.approx(queries)
    assert one["error"] ** 2 == pytest.approx(max(seeds + queries - rest, queries))
    assert two["error_of_seeds"] ** 2 == pytest.approx(1 / 300 / 3)
    assert two["error_of_queries"] ** 2 == pytest.approx(8 / 225 / 2)
    assert two["error"] ** 2 == pytest.approx(1 / 900 + 8 / 450 - rest_two / 2 / 6)
    # Of the mean over tasks: the seeds' means are 0.05, 0.125, 0.1; queries of two tasks are independent.
    seeds, queries, rest = np.var([0.05, 0.125, 0.1], ddof=1) / 3, (queries + 8 / 450) / 4, 0.0
    rest = (rest_one / 6 / 12 + rest_two / 2 / 6) / 4
    assert mean["error_of_seeds"] ** 2 == pytest.approx(seeds)
    assert mean["error_of_queries"] ** 2 == pytest.approx(queries)
    assert mean["error"] ** 2 == pytest.approx(seeds + queries - rest)
    # At least two degrees of three seeds, where Student's quantile is 4.3027.
    for d in (one, two, mean):
        assert d["degrees"] >= 2 and d["high"] - d["value"] == pytest.approx(d["value"] - d["low"])
    assert two["degrees"] == 2 and two["high"] - two["value"] == pytest.approx(4.302653 * two["error"])
    assert "for all 3. Queries: 4 of one, 2 of two." in page
    assert f"0.6500 ±0.0500 (+0.0667 [{two['low']:+.4f}, {two['high']:+.4f}])" in page


def _residual(x_Sn: np.ndarray) -> float:
    """Sum of squares of what neither seed nor query explains."""
    left = [[x - row.mean() - column + x_Sn.mean() for x, column in zip(row, x_Sn.mean(0), strict=True)]
            for row in x_Sn]  # fmt: skip
    return sum(x**2 for row in left for x in row)


def test_two_tasks_and_one_seed_are_as_by_hand(tmp_path, monkeypatch):
    found, page = table(tmp_path, monkeypatch, [1], SCORES)
    one, two, mean = (found["rows"][1]["tasks"][task]["difference"] for task in ("one", "two", "mean"))
    assert [d["value"] for d in (one, two, mean)] == pytest.approx([0.1, 0.0, 0.05])
    # Variances of 0.1, 0.2, 0, 0.1 and of 0.1, -0.1: 1/150 and 1/50; Student's quantiles of 3 and 1 degrees.
    assert one["error"] == pytest.approx(math.sqrt(1 / 600)) and one["degrees"] == 3
    assert one["high"] == pytest.approx(0.1 + 3.18 * one["error"], rel=0.03)
    assert two["error"] == pytest.approx(0.1) and two["high"] == pytest.approx(1.27062, rel=1e-4)
    assert mean["error"] == pytest.approx(math.sqrt(1 / 600 + 0.01) / 2) and mean["degrees"] == 1
    assert all(d["error_of_seeds"] is None and not d["holds"] for d in (one, two, mean))
    assert found["rows"][0]["tasks"]["one"]["spread"] is None
    assert "other queries (one seed, 1, says nothing of others)" in page and "for all 3. " in page


def test_one_seed_and_a_task_without_scores_of_queries_have_a_difference_and_no_interval(
    tmp_path, monkeypatch
):
    """Clustering, say: of its one score nothing tells the error, and so of a mean with it."""
    scores = {key: [row[: 4 if key[1] == "one" else 1] for row in rows] for key, rows in SCORES.items()}
    found, page = table(tmp_path, monkeypatch, [1], scores)
    one, two, mean = (found["rows"][1]["tasks"][task]["difference"] for task in ("one", "two", "mean"))
    assert two["value"] == pytest.approx(0.1) and mean["value"] == pytest.approx(0.1)
    for d in (two, mean):
        unknown = ("low", "high", "error", "error_of_seeds", "error_of_queries")
        assert [d[name] for name in unknown] == [None] * 5 and not d["holds"]
    assert one["low"] < 0.1 < one["high"]
    assert "| 0.6000 (+0.1000) |" in page and "for all 1. Without an interval: one seed, and no" in page
    # Three seeds tell what other seeds would give.
    found, page = table(tmp_path, monkeypatch, [1, 2, 3], scores)
    two = found["rows"][1]["tasks"]["two"]["difference"]
    assert two["error"] == pytest.approx(math.sqrt(np.var([0.1, 0.3, 0.2], ddof=1) / 3))
    assert two["degrees"] == 2 and "Without an interval" not in page
