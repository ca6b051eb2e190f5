"""launch/experiment.py on toys: real steps, killed and resumed, in one table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from grids import toy
from toy_steps import Forked

from nemo_embed_core.config import ExperimentConfig
from nemo_embed_core.experiments import run as running
from nemo_embed_core.steps import runner

ROOT = Path(__file__).resolve().parents[2]


def experiment(options: dict[str, Any]) -> None:
    """At the top level, so that a server of forks finds it."""
    from nemo_embed_core.errors import user_errors

    runner._start = Forked  # type: ignore[assignment]
    with user_errors():
        running.run(ExperimentConfig(**options))


@pytest.mark.dist
def test_a_grid_killed_and_resumed_ends_in_a_table_of_its_reports(tmp_path, server):
    """Verbs for real, but for merge; the rest of an experiment is in test_run.py, by stand-ins."""
    server.preload("nemo_embed_core.evaluation.run", "nemo_embed_core.mine.run", "mteb", "matplotlib.pyplot")
    server.preload("nemo_embed_core.experiments.run")
    steps = yaml.safe_load(toy(tmp_path).read_text())["steps"]
    mined = {"data": "{data}/test", "split": "test", "threshold": None, "output_format": "dataset"}
    steps["mine"]["options"] |= mined
    steps["judge"] = {"verb": "judge", "options": {"mined": "{mine}", "labels": "{data}/test"}}
    figures = {"negatives": "mine.negatives", "relevant": "judge.share"}
    changes = {"steps": steps, "figures": figures, "axes": {}, "seeds": [3], "references": {}}
    grid = toy(tmp_path, **changes, models=["warm", "train"])
    options = {"grid": str(grid), "output": str(tmp_path / "out"), "delete_models": True}
    # A launcher in its first step; then the experiment, behind the mined folder and before its mark.
    outcome = server.call(experiment, options, env={"NEMO_EMBED_FAIL": "step.begin@1"})
    assert outcome.code == 2 and "warm ended with code -9; the end of" in outcome.output, outcome.output
    outcome = server.call(experiment, options, env={"NEMO_EMBED_FAIL": "step-done@mine"})
    assert outcome.code == -signal.SIGKILL and "[1/" in outcome.output, outcome.output
    (mined,) = tmp_path.glob("out/steps/mine-*/mined.jsonl/dataset_metadata.json")
    mined.write_text("{}")  # a part of it
    outcome = server.call(experiment, options)
    assert outcome.code == 0, outcome.output
    assert [line.split()[1].rpartition("-")[0] for line in outcome.output.splitlines() if line[0] == "["] == [
        "mine", "train", "judge", "evaluate-toy", "evaluate-toy",
    ]  # fmt: skip
    assert not list(tmp_path.glob("out/steps/*/run"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = {}
    for config in tmp_path.glob("out/steps/evaluate-*/config.yaml"):
        rows = (config.parent / "report.queries-0.jsonl").read_text().splitlines()
        step = Path(yaml.safe_load(config.read_text())["models"][0]).parent.name
        scores[step.partition("-")[0]] = np.array([json.loads(row)["ndcg_at_10"] for row in rows])
    first, second = found["rows"]
    assert first["tasks"]["toy"]["score"] == pytest.approx(scores["warm"].mean(), abs=1e-5)
    difference = second["tasks"]["toy"]["difference"]
    x_n = scores["train"] - scores["warm"]
    assert difference["value"] == pytest.approx(x_n.mean(), abs=1e-5) and x_n.any()
    assert difference["error"] == pytest.approx(np.sqrt(x_n.var(ddof=1) / 24), abs=1e-5)
    figures = {name: f["score"] for name, f in first["figures"].items()}
    assert figures == {"negatives": 48, "relevant": 0}
    table = (tmp_path / "out" / "results.md").read_text()
    assert f"({difference['value']:+.4f} [{difference['low']:+.4f}, " in table
    assert "interval for other queries (one seed, 3, says nothing of others)" in table


@pytest.mark.slow
def test_a_launcher_ends_with_its_experiment_and_a_new_one_goes_on(tmp_path):
    """Real processes: the experiment is killed in the middle of a run, whose process must not train on."""
    grid = toy(tmp_path, seeds=[1], axes={}, figures={}, references={}, models=["warm"])
    values = yaml.safe_load(grid.read_text())
    warm = values["steps"]["warm"]
    warm["options"] |= {"steps": 100000, "checkpoint": {"every": 5}}
    grid.write_text(yaml.safe_dump({**values, "steps": {"warm": warm}}))
    command = [sys.executable, "launch/experiment.py", "--grid", str(grid), "--output", str(tmp_path / "out")]

    def until(found: Any) -> Any:
        deadline = time.monotonic() + 600  # a busy machine takes minutes to import torch
        while not (value := found()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert value, "nothing came of it"
        return value

    def last_step() -> int:
        names = [path.name for path in tmp_path.glob("out/steps/warm-*/run/step-*")]
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    def killed_behind(step: int) -> int:
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            until(lambda: last_step() > step)
            (lock,) = tmp_path.glob("out/steps/warm-*/run/.lock")
            child = json.loads(lock.read_text())["pid"]
        finally:
            process.kill()
            process.wait()
        until(lambda: not Path(f"/proc/{child}").exists())
        return last_step()

    killed_behind(killed_behind(0))  # the second goes on where the first was, and takes the folder
    (log,) = tmp_path.glob("out/steps/warm-*/log.txt")
    assert log.read_text().count("$ ") == 2 and "resum" in log.read_text()
