"""The steps of a grid by stand-ins for their processes: what is left, ended, waited for, deleted, redone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from grids import Verbs, config_of, toy

from launch import experiment as launch_experiment
from launch import merge
from nemo_embed_core.config import ExperimentConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.experiments import cells
from nemo_embed_core.experiments import run as running
from nemo_embed_core.files.durable import pid_namespace, start_time
from nemo_embed_core.files.lock import Lock
from nemo_embed_core.steps import runner


@pytest.fixture
def verbs(monkeypatch) -> Verbs:
    found = Verbs()
    monkeypatch.setattr(runner, "_start", found)
    monkeypatch.setattr(runner, "code_version", lambda: "this code")  # which asks git
    monkeypatch.setattr(runner.Runner, "GRACE_S", 0.2)
    monkeypatch.setattr(Lock, "POLL_S", 0.02)
    return found


def run(grid: Path, **options: Any) -> list[str]:
    said: list[str] = []
    running.run(ExperimentConfig(grid=str(grid), output=str(grid.parent / "out"), **options), said.append)
    return said


def one_step(folder: Path, **changes: Any) -> Path:
    """warm alone, of two seeds."""
    given = {"axes": {}, "figures": {}, "references": {}, "models": ["warm"], **changes}
    values = yaml.safe_load(toy(folder, **given).read_text())
    values["steps"] = {"warm": values["steps"]["warm"]}
    (folder / "grid.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "grid.yaml"


def test_what_is_done_is_left_and_what_failed_is_done_again(tmp_path, verbs):
    grid, out = toy(tmp_path), tmp_path / "out"
    verbs.acts["train"] = "fail"
    with pytest.raises(UserError, match=r"train ended with code 1; the end of \S+/train-\w+/log.txt:\n\$ "):
        run(grid)
    assert verbs.started == ["warm", "mine", "train"]
    verbs.acts.clear()
    verbs.started.clear()
    one = {"only": ["threshold=0.6", "seed=2"], "delete_models": True}
    assert run(grid, **one)[-1] == "1 of 5 rows have their scores: no table yet"
    assert verbs.started == ["warm", "mine", "train", "evaluate-toy"]  # of the other seed
    (train,) = {path.parent for path in out.glob("steps/train-*/done.json")}
    assert not (train / "run").exists() and (train / "metrics.jsonl").is_file()
    assert len(list(out.glob("steps/warm-*/run/step-*/manifest.json"))) == 2  # the other threshold needs it
    listed = run(grid, dry_run=True)
    assert listed[-1].startswith("9 of 15 steps to do")
    assert sum(line.startswith("done") for line in listed) == 6
    verbs.started.clear()
    said = run(grid, delete_models=True)
    assert sorted(verbs.started) == ["evaluate-toy"] * 4 + ["mine"] * 2 + ["train"] * 3
    assert any(line.startswith("[9/9] evaluate-toy-") for line in said)
    assert run(grid, dry_run=True)[-1].startswith("0 of 15 steps to do, about 0 minutes")
    assert not list(out.glob("steps/*/run")) and not list(out.glob("steps/*/.deleted"))
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["values"], row["model"]) for row in rows] == [
        ({"threshold": "none"}, "train"), ({"threshold": "0.6"}, "train"), ({}, "words"),
    ]  # fmt: skip
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_training_that_a_signal_stopped_before_its_last_step_is_not_done(tmp_path, verbs):
    grid = one_step(tmp_path)
    verbs.acts["warm"] = "stop"
    with pytest.raises(
        UserError, match=r"run was stopped by a signal at step 1 of 2: give the command again"
    ):
        run(grid)
    verbs.acts.clear()
    run(grid)
    assert verbs.started.count("warm") == 3


@pytest.mark.parametrize("act", ["hang", "deaf"])
def test_a_step_that_fails_ends_those_that_run_beside_it(tmp_path, verbs, act):
    """The first in the order would run on for hours; what waits for it keeps nothing from starting."""
    verbs.acts |= {"warm": act, "late": "fail"}
    values = yaml.safe_load(toy(tmp_path, axes={}, seeds=[1]).read_text())
    late = yaml.safe_load(yaml.safe_dump(values["steps"]["warm"]))
    late["options"]["optim"] = {"lr": 1e-4}
    values |= {"steps": {**values["steps"], "late": late}, "models": ["train", "late"]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError, match="late ended with code 1"):
        run(tmp_path / "grid.yaml", jobs=2)
    assert sorted(verbs.started) == ["late", "warm"] and ("warm", "terminate") in verbs.ended
    assert (("warm", "kill") in verbs.ended) or act == "hang"
    assert not list(tmp_path.glob("out/steps/*/.lock"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_step_that_runs(tmp_path, verbs, monkeypatch, capsys, number):
    verbs.acts["warm"] = "hang"
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's `command &`
    argv = ["experiment", "--grid", str(one_step(tmp_path)), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)

    def interrupt() -> None:
        assert verbs.hanging.wait(60)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(SystemExit, match="130"):
            launch_experiment.main()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert verbs.started == ["warm"] and ("warm", "terminate") in verbs.ended
    assert capsys.readouterr().err.endswith("stopped by an interrupt\n")


def test_a_step_that_another_command_runs_is_waited_for_and_not_run_again(tmp_path, verbs):
    grid = one_step(tmp_path, seeds=[1])
    run(grid)
    (done,) = tmp_path.glob("out/steps/warm-*/done.json")
    (evaluated,) = tmp_path.glob("out/steps/evaluate-*/done.json")
    evaluated.unlink()
    mark = done.read_bytes()
    done.unlink()
    verbs.started.clear()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Lock(done.parent, print)._owner | {"pid": other.pid, "start": start_time(other.pid), "run": "x"}
    assert owner["pid_namespace"] == pid_namespace()
    (done.parent / ".lock").write_text(json.dumps(owner))
    said: list[str] = []

    def finish(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            done.write_bytes(mark)
            other.kill()
            other.wait()

    config = ExperimentConfig(grid=str(grid), output=str(tmp_path / "out"))
    running.run(config, finish)
    assert verbs.started == ["evaluate-toy"]
    assert f"waiting, as {done.parent} is in use by process {other.pid}" in said[0]


def test_deleting_models_leaves_links_and_what_a_step_is_given_by_its_path(tmp_path, verbs, monkeypatch):
    # What stands in for a training makes no model that could be looked at.
    monkeypatch.setattr(cells, "_check_reference", lambda grid, name, model: None)
    grid = one_step(tmp_path)
    run(grid)
    first, second = sorted(path.parent for path in tmp_path.glob("out/steps/warm-*/done.json"))
    (first / "run").rename(tmp_path / "elsewhere")
    (first / "run").symlink_to(tmp_path / "elsewhere")
    one_step(tmp_path, seeds=[1, 2, 3], references={"old": str(second / "run" / "step-00000002")})
    run(grid, delete_models=True)
    kept = {path.parent for path in tmp_path.glob("out/steps/warm-*/run")}
    assert kept == {first, second} and (first / "run").is_symlink()
    assert list((tmp_path / "elsewhere").iterdir()) and (second / "run" / "step-00000002").is_dir()


def test_a_model_that_is_half_deleted_or_half_made_again_is_no_model(tmp_path, verbs, monkeypatch):
    grid = one_step(tmp_path, seeds=[1])
    removed = runner.shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(path.rglob("manifest.json")).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run(grid, delete_models=True)
    monkeypatch.setattr(runner.shutil, "rmtree", removed)
    # Another task asks for the model again: it is made again, and what is made of it by halves is not it.
    values = yaml.safe_load(grid.read_text())
    values["evaluate"]["more"] = {**values["evaluate"]["toy"], "max_queries": 9}
    grid.write_text(yaml.safe_dump(values, sort_keys=False))
    verbs.started.clear()
    verbs.acts["warm"] = "stop"
    for _ in range(2):
        with pytest.raises(UserError, match="stopped by a signal"):
            run(grid)
    verbs.acts.clear()
    run(grid, delete_models=True)
    assert verbs.started == ["warm", "warm", "warm", "evaluate-more"]
    assert not list(tmp_path.glob("out/steps/warm-*/run")) + list(tmp_path.glob("out/steps/warm-*/.deleted"))


def test_what_a_killed_step_left_of_a_product_is_cleared_but_for_trainings(tmp_path, verbs):
    """Mining takes new outputs only; the embeddings beside them stay."""
    grid = toy(tmp_path, axes={}, seeds=[1], references={}, figures={"copies": "mine.noise.copies"})
    verbs.acts["train"] = "fail"
    with pytest.raises(UserError):
        run(grid)
    (mine,) = tmp_path.glob("out/steps/mine-*")
    (mine / "done.json").unlink()
    (mine / "mined.jsonl").unlink()
    (mine / "mined.jsonl").mkdir()
    for name in ("mined.jsonl/queries.parquet", "mined.jsonl.work/shard.npy"):
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).touch()
    (warm,) = tmp_path.glob("out/steps/warm-*")
    (warm / "done.json").unlink()
    (warm / "run" / "step-00000001").mkdir()
    verbs.acts.clear()
    run(grid)
    assert (mine / "mined.jsonl").is_file() and (mine / "mined.jsonl.work" / "shard.npy").exists()
    assert (warm / "run" / "step-00000001").is_dir()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["rows"][0]["figures"]["copies"]["score"] == 3


def test_every_verb_gets_its_options_and_ranks_end_with_their_launcher(tmp_path, verbs):
    steps = yaml.safe_load(toy(tmp_path).read_text())["steps"]
    steps["judge"] = {"verb": "judge", "options": {"mined": "{mine}", "labels": "{data}/test"}}
    steps["merged"] = {"verb": "merge", "options": {
        "sources": ["{warm}", "{train}"], "weights": [0.25, 0.75], "document_task": "find it"}}  # fmt: skip
    changes = {"axes": {}, "seeds": [1], "steps": steps, "models": ["merged"]}
    grid = toy(tmp_path, **changes, figures={"share": "judge.share", "negatives": "mine.negatives"})
    run(grid, ranks=3)
    commands = dict(zip(verbs.started, verbs.commands, strict=True))
    begin = [sys.executable, "-m", "nemo_embed_core.steps.child", str(os.getpid())]
    assert all(command[:4] == begin for command in commands.values())
    (warm,), (train,) = (tmp_path.glob(f"out/steps/{name}-*/run") for name in ("warm", "train"))
    assert commands["merged"][4:6] == ["nemo_embed_core.cli", "merge"]
    given = vars(merge.options().parse_args(commands["merged"][6:]))
    assert given["sources"] == [str(warm), str(train)] and given["weights"] == [0.25, 0.75]
    assert given["document_task"] == "find it" and given["task"] is None
    for name in ("warm", "mine", "train"):
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m"]
        worker = ["nemo_embed_core.steps.child", "0", "nemo_embed_core.cli"]
        assert commands[name][4:13] == [*launcher, *worker, "mine" if name == "mine" else "train"]
    assert commands["judge"][4:6] == ["nemo_embed_core.experiments.judge", "--config"]
    assert config_of(train)["data"]["datasets"][0]["path"].endswith("mined.jsonl")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {name: f["score"] for name, f in rows[0]["figures"].items()} == {"share": 0.125, "negatives": 200}


@pytest.mark.parametrize("parent", ["its process", "0"])
def test_a_step_ends_with_the_process_that_started_it(tmp_path, parent):
    """And a rank with torchrun, whose process nobody knows beforehand."""
    module = (
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(600)"
    )
    (tmp_path / "asleep.py").write_text(module)
    starter = (
        "import os, subprocess, sys\n"
        "pid = sys.argv[1] if sys.argv[1] == '0' else str(os.getpid())\n"
        "step = [sys.executable, '-m', 'nemo_embed_core.steps.child', pid, 'asleep', sys.argv[2]]\n"
        "subprocess.run(step)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), *filter(None, sys.path)])
    arguments = [sys.executable, "-c", starter, parent, str(tmp_path / "pid")]
    launcher = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    assert start_time(child) is not None
    launcher.kill()
    launcher.wait()
    while start_time(child) is not None:
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)
