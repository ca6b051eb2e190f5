"""launch/experiment.py on toys: grids that are refused, steps that are shared, runs killed and resumed, and
the table against its definition."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import MODEL, WORDS, write_rows, write_tokenizer
from toy_evaluation import write_beir

from nemo_embed_core.config import ExperimentConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.experiments import run as running
from nemo_embed_core.experiments.grid import read_grid, steps_of

ROOT = Path(__file__).resolve().parents[2]


def toy(folder: Path, **changes: Any) -> Path:
    """grid.yaml: two thresholds, two seeds, a first stage that both share; and its data."""
    if not (folder / "test").exists():
        write_tokenizer(folder / "tokenizer")
        write_rows(folder / "train.jsonl", 41)
        rng = np.random.default_rng(1)
        texts = [" ".join(rng.choice(WORDS, 5)) + f" {i}" for i in range(24)]
        queries = [
            {"_id": f"q{i}", "text": "find " + " ".join(text.split()[:2])} for i, text in enumerate(texts)
        ]
        corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
        write_beir(folder / "test", corpus, queries, [(f"q{i}", f"d{i}", 1) for i in range(24)])
    lengths = {"query_max_length": 48, "document_max_length": 48, "max_tokens": 320}
    common = {"global_batch_size": 8, "device": "cpu", "precision": "fp32", "seed": "{seed}"}
    data = {"num_hard_negatives": 2, **lengths}
    first = {**data, "datasets": [{"path": "{data}/train.jsonl", "task": "find it"}]}
    second = {**data, "datasets": [{"path": "{mine}", "task": "find it"}]}
    mine = {"model": "{warm}", "data": "{data}/train.jsonl", "num_negatives": 2, "device": "cpu"}
    tokenizer = {"tokenizer": "{data}/tokenizer", "model": asdict(MODEL)}
    grid = {
        "question": "Does a threshold matter?",
        "constants": {"data": str(folder)},
        "seeds": [1, 2],
        "axes": {"threshold": {"none": {"mine.threshold": None}, "0.6": {"mine.threshold": 0.6}}},
        "steps": {
            "warm": {"verb": "train", "options": {"steps": 2, **common, **tokenizer, "data": first}},
            "mine": {"verb": "mine", "options": mine},
            "train": {"verb": "train", "options": {"init_from": "{warm}", "steps": 2, **common,
                                                   "optim": {"lr": 1e-3}, "data": second}},
        },
        "figures": {"negatives": "mine.negatives"},
        "references": {"words": "bm25"},
        "evaluate": {"toy": {"data": "{data}/test", "device": "cpu"}},
        **changes,
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return folder / "grid.yaml"


# ------------------------------------------------------------------------------------------ refused


def _steps(**changes: Any) -> dict[str, Any]:
    """The toy's first stage with other options: it makes the model that is evaluated."""
    options = {"steps": 2, "tokenizer": "{data}/tokenizer", "seed": "{seed}", **changes}
    options.setdefault("data", {"datasets": [{"path": "{data}/train.jsonl"}]})
    return {"steps": {"warm": {"verb": "train", "options": options}}, "axes": {}, "figures": {}}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"epoch": 3}, r"epoch is no key of an experiment; there are question, "),
        ({"steps": {}}, r"steps is missing"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] has one twice"),
        ({"seeds": ["a"]}, r"seeds=\['a'\] must be a list of integers"),
        ({"axes": {"mine": [1]}}, r"axes.mine: the name is taken"),
        ({"axes": {"size": 3}}, r"axes.size must be values, or \{value: \{step.option: ...\}\}"),
        ({"axes": {"size": {"big": 3}}}, r"axes.size.big must be \{step.option: value\}"),
        ({"compare": "size"}, r"compare='size' must be an axis \(threshold\) or model"),
        ({"models": ["mine"]}, r"models: 'mine' is no step that makes a model"),
        ({"figures": {"n": "mined.negatives"}}, r"figures.n='mined.negatives' must be STEP.KEY"),
        ({"steps": {"warm": {"verb": "tune"}}}, r"steps.warm.verb='tune' must be one of train, mine, "),
        ({"evaluate": {"toy": 3}}, r"evaluate.toy must be options of launch/evaluate.py"),
        ({"evaluate": {"a b": {"data": "x"}}}, r"'a b', a name of a folder, must be of letters"),
        (_steps(optim={"lr": -1}), r"warm, cell seed=1: optim: lr=-1 must be positive"),
        (_steps(lr=1), r"warm, cell seed=1: lr is not an option"),
        (_steps(tokenizer="{dta}/tokenizer"), r"cell seed=1: \{dta\} stands for nothing; there are: data"),
        (_steps(init_from="gone"), r"warm, cell seed=1: init_from=gone is not there"),
        (_steps(init_from="{warm}"), r"steps stand in a circle: warm -> warm"),
        (_steps(output_dir="x"), r"output_dir is the experiment's own: leave it out"),
        (_steps(seed=3), r'warm is the same run with seed 1 and 2: put "\{seed\}" into its options'),
        ({"axes": {"threshold": {"a": {}, "b": {"mine.seed": 0}}}},
         r"threshold=a train and threshold=b train are the same run"),
        ({"axes": {"t": {"a": {}, "b": {"mein.seed": 0}}}}, r"mein.seed: mein is no step"),
        ({"axes": {"t": {"a": {}, "b": {"warm.data.datasets.1.task": ""}}}}, r"1 is no place in a list of 1"),
        ({"axes": {"t": {"a": {}, "b": {"warm.seed.x": 0}}}}, r"x: seed holds '\{seed\}', which has no x"),
        ({"evaluate": {"toy": {"data": "{data}/test", "splits": 1}}}, r"evaluate.toy, cell .*: splits is "),
        ({"figures": {}, "models": ["warm"]}, r"are the same run|steps.mine: no model, no figure"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_refused_by_name_before_anything_runs(tmp_path, changes, said):
    path = toy(tmp_path, **changes)
    with pytest.raises(UserError, match=f"{path}: .*{said}"):
        steps_of(read_grid(str(path)))


def test_constants_and_cells_that_are_given_must_be_the_grids(tmp_path):
    path = str(toy(tmp_path))
    with pytest.raises(UserError, match=r"constants.dta is not a constant of it; there are: data"):
        read_grid(path, {"dta": "x"})
    for only in ("threshold=0.7", "size=3"):
        with pytest.raises(UserError, match=rf"only={only} is no cell; there are seed: 1, 2; threshold: "):
            running.run(ExperimentConfig(grid=path, output=str(tmp_path / "out"), only=[only], dry_run=True))
    with pytest.raises(UserError, match=r"only=seed must be AXIS=VALUE"):
        ExperimentConfig(grid=path, output="out", only=["seed"])
    (tmp_path / "grid.yaml").write_text((tmp_path / "grid.yaml").read_text() + "seeds: [1]\n")
    with pytest.raises(UserError, match=r"grid.yaml:\d+: key 'seeds' stands here and on line"):
        read_grid(path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/experiments/*.yaml")), ids=lambda path: path.stem)
def test_the_grids_of_the_repository_are_accepted(path, monkeypatch):
    """But for what they read, which is not in the repository."""
    from nemo_embed_core.experiments import grid, verbs

    monkeypatch.setattr(verbs, "_found", lambda path, name: iter([path] * bool(path)))
    monkeypatch.setattr(grid._Cell, "_digest", lambda self, path: path)
    monkeypatch.chdir(ROOT)
    plan = steps_of(read_grid(str(path)))
    assert len({row.seed for row in plan.rows if row.seed}) == 3 and plan.rows[0].scores


# ------------------------------------------------------------------------------------------ steps


def digests(path: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for step in steps_of(read_grid(str(path))).steps:
        found.setdefault(step.name, set()).add(step.digest)
    return found


def test_a_step_is_shared_by_cells_and_changes_with_all_that_it_reads(tmp_path):
    first = digests(toy(tmp_path))
    # Two seeds of stage 1, of which both thresholds mine and train; BM25 beside the four models.
    assert {name: len(found) for name, found in first.items()} == {
        "warm": 2, "mine": 4, "train": 4, "evaluate-toy": 5,
    }  # fmt: skip
    third = digests(toy(tmp_path, seeds=[1, 2, 3]))
    assert all(first[name] < third[name] for name in first)
    axes = {"threshold": {"none": {"mine.threshold": None}, "0.7": {"mine.threshold": 0.7}}}
    other = digests(toy(tmp_path, axes=axes))
    assert other["warm"] == first["warm"] and len(other["train"] & first["train"]) == 2
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write('{"query": "find a new one", "pos": ["new one"], "neg": []}\n')
    changed = digests(toy(tmp_path))
    assert not changed["warm"] & first["warm"]
    assert len(changed["evaluate-toy"] & first["evaluate-toy"]) == 1  # BM25's, whose data is the same


def test_placeholders_and_patches_reach_the_options_of_their_cell(tmp_path):
    axes = {
        "batch": [8, 16],
        "prompt": {"own": {}, "none": {"warm.data.datasets.0.task": "", "evaluate.task": ""}},
    }
    grid = toy(tmp_path, axes=axes, models=["warm"], figures={}, references={})
    values = yaml.safe_load(grid.read_text())
    values["steps"] = {"warm": values["steps"]["warm"]}
    values["steps"]["warm"]["options"] |= {
        "global_batch_size": "{batch}",
        "data": {
            "query_max_length": 40,
            "datasets": [{"path": "{data}/train.jsonl", "task": "of {batch}: {text}"}],
        },
    }
    grid.write_text(yaml.safe_dump(values, sort_keys=False))
    plan = steps_of(read_grid(str(grid), {"data": str(tmp_path)}))
    rows = [row for row in plan.rows if row.seed == 2]
    assert [row.values for row in rows] == [
        {"batch": b, "prompt": p} for b in ("8", "16") for p in ("own", "none")
    ]
    trained = [row.scores["toy"].needs[0].options for row in rows]
    assert [options["global_batch_size"] for options in trained] == [8, 8, 16, 16]
    assert [o["data"]["datasets"][0]["task"] for o in trained] == ["of 8: {text}", "", "of 16: {text}", ""]
    assert [row.scores["toy"].options["task"] for row in rows] == [None, "", None, ""]
    assert {options["seed"] for options in trained} == {2} and trained[0]["data"]["query_max_length"] == 40


# ------------------------------------------------------------------------------------------ runs


class Forked:
    """A step's process as a fork, which has its imports: the test pays no seconds for them."""

    def __init__(self, command: list[str], log: Any, env: dict[str, str]):
        assert command[:3] == [sys.executable, "-m", "nemo_embed_core.experiments.step"]
        if pid := os.fork():
            self.pid = pid
            return
        code = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            os.environ.update(env)
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            sys.argv = command[2:]
            from nemo_embed_core.experiments.step import main

            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def experiment(**options: Any) -> list[str]:
    """The lines of a run; at the top level, so that a server of forks finds it."""
    running._start = Forked  # type: ignore[assignment]
    said: list[str] = []
    running.run(ExperimentConfig(**options), lambda line: (said.append(line), print(line))[0])
    return said


def experiment_of(options: dict[str, Any]) -> list[str]:
    from nemo_embed_core.errors import user_errors

    with user_errors():
        return experiment(**options)


@pytest.fixture(scope="module")
def forks(server):
    server.preload("nemo_embed_core.evaluation.run", "nemo_embed_core.mine.run", "mteb", "matplotlib.pyplot")
    server.preload("nemo_embed_core.experiments.run", "sklearn.linear_model", "mteb.tasks")
    return server


def scores_of(output: Path, threshold: float | None) -> np.ndarray:
    """[seeds, queries] of a threshold, read from the folders by what their configs say."""
    found = {}
    for config in output.glob("steps/evaluate-*/config.yaml"):
        model = Path(yaml.safe_load(config.read_text())["models"][0])
        if not model.is_absolute():
            continue
        train = yaml.safe_load((model.parent / "config.yaml").read_text())
        mined = Path(train["data"]["datasets"][0]["path"])
        if yaml.safe_load((mined.parent / "config.yaml").read_text())["threshold"] == threshold:
            rows = (config.parent / "report.queries-0.jsonl").read_text().splitlines()
            found[train["seed"]] = [json.loads(row)["ndcg_at_10"] for row in rows]
    return np.array([found[seed] for seed in sorted(found)])


@pytest.mark.dist
def test_a_grid_killed_and_resumed_ends_in_the_same_table(tmp_path, forks):
    grid = toy(tmp_path)
    options = {"grid": str(grid), "output": str(tmp_path / "killed")}
    # In the first step of all; then behind the second stage, before its mark.
    outcome = forks.call(experiment_of, options, env={"NEMO_EMBED_FAIL": "step.begin@1"})
    assert outcome.code == 2 and "warm ended with code -9; the end of" in outcome.output, outcome.output
    outcome = forks.call(experiment_of, options, env={"NEMO_EMBED_FAIL": "experiment-done@train"})
    assert outcome.code == -signal.SIGKILL and "[2/" in outcome.output, outcome.output
    made = {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("killed/steps/*/done.json")}
    assert sorted(name.rpartition("-")[0] for name in made) == ["mine", "warm"]
    one = {**options, "only": ["threshold=0.6", "seed=2"], "delete_models": True}
    outcome = forks.call(experiment_of, one)
    assert outcome.code == 0 and "1 of 5 rows have their scores: no table" in outcome.output, outcome.output
    (train,) = {p.parent for p in tmp_path.glob("killed/steps/train-*/done.json")}
    assert not (train / "run").exists() and (train / "metrics.jsonl").is_file()
    assert list(tmp_path.glob("killed/steps/warm-*/run/step-*/manifest.json"))  # the other threshold needs it
    listed = experiment(**options, dry_run=True)
    assert (
        listed[-1].startswith("9 of 15 steps to do") and sum(line.startswith("done") for line in listed) == 6
    )
    outcome = forks.call(experiment_of, options)
    assert outcome.code == 0, outcome.output
    now = {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("killed/steps/*/done.json")}
    assert len(now) == 15 and made.items() <= now.items()
    assert experiment(**options, dry_run=True)[-1].startswith("0 of 15 steps to do")

    # Without the kills, the cell that had them.
    whole = {"grid": str(grid), "output": str(tmp_path / "whole"), "only": ["threshold=none", "seed=1"]}
    assert forks.call(experiment_of, {**whole, "jobs": 2}).code == 0
    files = [p for p in tmp_path.glob("whole/steps/*/*.jsonl") if p.name != "metrics.jsonl"]
    files += tmp_path.glob("whole/steps/*/run/step-*/*.safetensors")
    assert {p.parent.name.rpartition("-")[0] for p in files} >= {"mine", "evaluate-toy", "step"}
    for file in files:
        other = tmp_path / "killed" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == other.read_bytes(), other
    first = json.loads((tmp_path / "killed" / "results.json").read_text())

    rows = first["rows"]
    assert [(row["values"], row["model"]) for row in rows] == [
        ({"threshold": "none"}, "train"), ({"threshold": "0.6"}, "train"), ({}, "words"),
    ]  # fmt: skip
    none, strict = scores_of(tmp_path / "killed", None), scores_of(tmp_path / "killed", 0.6)
    assert none.shape == strict.shape == (2, 24) and not np.array_equal(none[0], none[1])
    for row, values in zip(rows, (none, strict), strict=False):
        assert row["tasks"]["toy"]["seeds"] == pytest.approx(values.mean(1), abs=1e-5)
    assert rows[0]["figures"]["negatives"]["score"] > rows[1]["figures"]["negatives"]["score"]
    difference = rows[1]["tasks"]["toy"]["difference"]
    assert difference["value"] == pytest.approx((strict - none).mean(), abs=1e-5)
    assert difference["low"] < difference["value"] < difference["high"]
    assert "difference" not in rows[0]["tasks"]["toy"] and "difference" not in rows[2]["tasks"]["toy"]
    table = (tmp_path / "killed" / "results.md").read_text()
    assert f"({difference['value']:+.4f} [{difference['low']:+.4f}, " in table
    assert "interval for other seeds and other queries of the same tasks" in table
    assert (tmp_path / "killed" / "results.png").read_bytes().startswith(b"\x89PNG")


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
