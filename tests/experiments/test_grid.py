"""Grids: what is refused before anything runs, which steps are the same, what fills placeholders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from grids import toy
from tiny import MODEL, write_hf

from nemo_embed_core.config import ExperimentConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.experiments import cells
from nemo_embed_core.experiments import run as running
from nemo_embed_core.experiments.cells import steps_of
from nemo_embed_core.experiments.grid import read_grid
from nemo_embed_core.options import options_of
from nemo_embed_core.steps.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------ refused


def _steps(**changes: Any) -> dict[str, Any]:
    """The toy's first stage with other options: it makes the model that is evaluated."""
    options = {"steps": 2, "tokenizer": "{data}/tokenizer", "seed": "{seed}", **changes}
    options.setdefault("data", {"datasets": [{"path": "{data}/train.jsonl"}]})
    return {"steps": {"warm": {"verb": "train", "options": options}}, "axes": {}, "figures": {}}


def _evaluate(**options: Any) -> dict[str, Any]:
    return {**_steps(), "evaluate": {"toy": {"data": "{data}/test", **options}}}


def _with(**step: Any) -> dict[str, Any]:
    """The toy's first stage with another step behind it, whose product is a figure."""
    figures = {"n": "more.share"} if step["verb"] in ("mine", "judge") else {}
    models = ["warm"] if figures else ["warm", "more"]
    return {"steps": {**_steps()["steps"], "more": step}, "axes": {}, "figures": figures, "models": models}


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
        ({"axes": {"size": [1, "1"]}}, r"axes.size has a value twice"),
        ({"compare": "size"}, r"compare='size' must be an axis \(threshold\) or model"),
        ({"compare": ["threshold"]}, r"compare=\['threshold'\] must be a text"),
        ({"models": ["mine"]}, r"models: 'mine' is no step that makes a model"),
        ({"models": ["mine@8"]}, r"models: 'mine@8' is no step that makes a model, nor STEP@COLUMNS of one"),
        ({"models": ["train@08"]}, r"models: 'train@08' is no step"),
        ({"models": [["train"]]}, r"models: \['train'\] is no step"),
        ({"models": "train"}, r"models='train' must be a list"),
        ({"question": 3}, r"question=3 must be a text"),
        ({"references": {"old": 3}}, r"references.old=3 must be a model: a path, or bm25"),
        ({"references": {"train": "bm25"}}, r"references.train: the name is taken, by a step"),
        ({"figures": {"n": "mined.negatives"}}, r"figures.n='mined.negatives' must be STEP.KEY"),
        ({"figures": {"n": "train.loss"}}, r"figures.n='train.loss' must be STEP.KEY of a step that mines"),
        ({"figures": {"n": 3}}, r"figures.n=3 must be STEP.KEY"),
        ({"constants": {"data": "x", "seed": 3}}, r"constants.seed: the name is taken"),
        ({"steps": {"warm": {"verb": "tune"}}}, r"steps.warm.verb='tune' must be one of train, mine, "),
        ({"steps": {"warm": {"verb": ["train"]}}}, r"steps.warm.verb=\['train'\] must be one of train, "),
        ({"steps": {"warm": {"verb": "train", "config": 3}}}, r"steps.warm.config=3 must be a file of"),
        ({"steps": {"warm": {"verb": "train", "options": [1]}}}, r"steps.warm.options=\[1\] must be a map"),
        ({"steps": {"a.b": {"verb": "train"}}}, r"steps.a.b: a name must be of letters, digits, - and _"),
        ({"evaluate": {"toy": 3}}, r"evaluate.toy must be options of launch/evaluate.py"),
        ({"evaluate": {"a b": {"data": "x"}}}, r"evaluate.a b: a name must be of letters, digits"),
        ({"evaluate": {"mean": {"data": "x"}}}, r"evaluate.mean: the name is taken, by the mean of all"),
        (_steps(optim={"lr": -1}), r"warm, cell seed=1: optim: lr=-1 must be positive"),
        (_steps(lr=1), r"warm, cell seed=1: lr is not an option"),
        (_steps(tokenizer="{dta}/tokenizer"), r"cell seed=1: \{dta\} stands for nothing; there are: data"),
        (_steps(init_from="gone"), r"warm, cell seed=1: init_from=gone is not there"),
        (_steps(init_from="{warm}"), r"names stand in a circle: warm -> warm"),
        ({**_steps(), "constants": {"data": "{a}", "a": "{b}/x", "b": "{a}"}},
         r"names stand in a circle: a -> b -> a"),
        ({**_steps(steps="{size}"), "axes": {"size": ["{size}"]}}, r"names stand in a circle: size -> size"),
        (_steps(output_dir="x"), r"output_dir is the step's own: leave it out"),
        (_steps(seed=3), r'warm is the same run with seed 1 and 2: put "\{seed\}" into its options'),
        (_steps(data={"datasets": [{"path": "{data}/test", "split": "dev"}]}), r"qrels/dev.tsv"),
        (_steps(eval={"datasets": [{"path": "{data}/train.jsonl"}]}), r"train.jsonl is not a folder: a BEIR"),
        (_steps(eval={"datasets": [{"path": "{data}/gone"}]}), r"eval.datasets.path=\S+/gone is not there"),
        ({"axes": {"threshold": {"a": {}, "b": {"mine.seed": 0}}}},
         r"threshold=a train and threshold=b train are the same run"),
        ({"axes": {"t": {"a": {}, "b": {"mein.seed": 0}}}}, r"mein.seed: mein is no step"),
        ({"axes": {"t": {"a": {}, "b": {"warm.data.datasets.1.task": ""}}}}, r"1 is no place in a list of 1"),
        ({"axes": {"t": {"a": {}, "b": {"warm.seed.x": 0}}}}, r"x: seed holds '\{seed\}', which has no x"),
        (_evaluate(splits=1), r"evaluate.toy, cell .*: splits is "),
        # One report of one model, which the table reads hours later.
        (_evaluate(split="test,dev"), r"evaluate.toy, .*: split='test,dev': a step is one report of one mod"),
        (_evaluate(pool=["lang=en"]), r"evaluate.toy, .*: pool=\['lang=en'\]: a step is one report"),
        (_evaluate(data="", tasks=["STS12"]), r"evaluate.toy, .*: tasks=\['STS12'\]: a step is one report"),
        (_evaluate(base="bm25"), r"evaluate.toy, .*: base='bm25': a step is one report of one model"),
        (_evaluate(models=["bm25"]), r"evaluate.toy, .*: models is the experiment's own"),
        (_evaluate(split="dev"), r"evaluate.toy, .*qrels/dev.tsv .* splits there: test"),
        (_evaluate(data="{data}/train.jsonl"), r"evaluate.toy, .*: \S+/train.jsonl is not a folder: a BEIR"),
        (_evaluate(training=["{data}/gone:dev"]), r"training=\S+/gone:dev is not there"),
        (_evaluate(data="{data}/train.jsonl", task_type="sts"), r"bm25 ranks documents for quer"),
        (_with(verb="mine", options={"data": "{data}/train.jsonl", "write_texts": "x"}), r"write_texts=x "),
        (_with(verb="judge", options={"mined": "{data}/train.jsonl", "labels": "{data}/test", "split": "no"}),
         r"qrels/no.tsv"),
        (_with(verb="merge", options={"sources": ["{warm}"], "dtype": "bf17"}), r"dtype='bf17' must be one"),
        (_with(verb="merge", options={"sources": ["{warm}"], "method": "slerp", "t": 0.5}), r"sources has 1"),
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
    (tmp_path / "grid.yaml").write_text("constants: {word: [!!binary aGk=]}\n")
    with pytest.raises(UserError, match=r"constants.word.0=b'hi' must be a text, a number, true, false or"):
        read_grid(path)


def test_a_constant_that_is_given_has_the_type_of_the_grids_own(tmp_path):
    changes = _steps(steps="{steps}", optim={"lr": "{lr}"}, data={"datasets": [
        {"path": "{data}/train.jsonl", "task": "{task} of {steps}"}]})  # fmt: skip
    constants = {"data": str(tmp_path), "steps": 2, "lr": 1e-3, "task": "find"}
    path = str(toy(tmp_path, **changes, constants=constants))
    plan = steps_of(read_grid(path, {"steps": "40", "lr": "5e-4", "task": "7"}))
    options = plan.steps[0].options
    assert options["steps"] == 40 and options["optim"]["lr"] == 5e-4
    assert options["data"]["datasets"][0]["task"] == "7 of 40"
    with pytest.raises(UserError, match=r"constants.steps=\[1 is no value of YAML; its own is 2"):
        read_grid(path, {"steps": "[1"})
    with pytest.raises(UserError, match=r"warm, cell seed=1: steps='many' must be an integer or null"):
        steps_of(read_grid(path, {"steps": "many"}))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/experiments/*.yaml")), ids=lambda path: path.stem)
def test_the_grids_of_the_repository_are_accepted(path, monkeypatch):
    """But for what they read, which is not in the repository."""
    monkeypatch.setattr(cells, "inputs_of", lambda verb, options: iter(()))
    monkeypatch.setattr(cells, "read_model_config", lambda path: replace(MODEL, hidden_size=576))
    monkeypatch.setattr(cells, "_check_reference", lambda grid, name, model: None)
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


def test_a_model_may_be_scored_with_its_vectors_cut(tmp_path):
    plan = steps_of(read_grid(str(toy(tmp_path, axes={}, seeds=[1], models=["train", "train@16", "warm@8"]))))
    products = {step.name: step.product for step in plan.steps}
    asked = [row.scores["toy"].options["models"] for row in plan.rows]
    assert asked == [[products["train"]], [f"{products['train']}@16"], [f"{products['warm']}@8"], ["bm25"]]
    needed = [[n.name for n in row.scores["toy"].needs] for row in plan.rows]
    assert needed == [["train"], ["train"], ["warm"], []]


@pytest.mark.parametrize("name", ["warm", "train", "both"])
def test_more_columns_than_the_model_has_are_refused_before_anything_runs(name, tmp_path):
    """Those of the shape that the first of a chain of trainings and merges is given."""
    given = yaml.safe_load(toy(tmp_path, axes={}, seeds=[1]).read_text())["steps"]
    steps = {**given, "both": {"verb": "merge", "options": {"sources": ["{warm}", "{train}"]}}}
    columns = MODEL.hidden_size
    models = ["train", "both", f"{name}@{columns}"]
    assert steps_of(read_grid(str(toy(tmp_path, axes={}, seeds=[1], steps=steps, models=models))))
    models[-1] = f"{name}@{columns + 1}"
    with pytest.raises(
        UserError, match=f"models: {models[-1]}: the vectors of {name} have {columns} columns"
    ):
        steps_of(read_grid(str(toy(tmp_path, axes={}, seeds=[1], steps=steps, models=models))))


@pytest.mark.parametrize(
    "model, said",
    [
        ("model@{more}", "model@{more}: the model's vectors have {columns} columns"),
        ("tokenizer", "tokenizer.* config.json"),
    ],
)
def test_a_reference_that_cannot_be_scored_is_refused_before_anything_runs(model, said, tmp_path):
    write_hf(tmp_path / "model", torch.bfloat16)
    columns = {"columns": MODEL.hidden_size, "more": MODEL.hidden_size + 1}
    right = {"whole": "{data}/model", "cut": f"{{data}}/model@{MODEL.hidden_size}"}
    assert steps_of(read_grid(str(toy(tmp_path, references=right))))
    wrong = {"old": "{data}/" + model.format(**columns)}
    with pytest.raises(UserError, match=f"references.old: .*{said.format(**columns)}"):
        steps_of(read_grid(str(toy(tmp_path, references=wrong))))


def test_the_columns_of_a_base_are_those_of_its_config(monkeypatch):
    monkeypatch.setattr(cells, "inputs_of", lambda verb, options: iter(()))
    monkeypatch.setattr(cells, "read_model_config", lambda path: replace(MODEL, hidden_size=96))
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="turned@144: the vectors of turned have 96 columns"):
        steps_of(read_grid("configs/experiments/matryoshka.yaml"))


# Texts that are no path, or of what the experiment sets: of any other option the bytes must count.
NOT_READ = {
    "train": {"checkpoint.allow_changed", "data.datasets.ignore", "data.datasets.columns", "report_to",
              "data.cache_dir", "checkpoint.resume", "eval.metric", "lora.targets"},
    "mine": {"ignore", "columns", "datasets.ignore", "datasets.columns", "formats", "write_texts"},
    "merge": {"evaluate"},
    "judge": set(),
    "evaluate": {"tasks", "pool", "local.pool", "local.source", "local.data", "local.prompt_name", "results",
                 "base", "compare", "allow", "plot", "other_task"},
    # Of a pipeline, which digests documents and local models itself, and gives two reports to compare.
    "synthesize": {"documents", "licence", *(f"generate.{name}" for name in (
        "embedder", "journal", "judge.base_url", "judge.key_env", "judge.licence", "models.base_url",
        "models.key_env", "models.licence"))},
    "compare": {"allow", "base", "data", "local.data", "local.pool", "local.source", "mirror", "models",
                "other_task", "plot", "pool", "results", "source", "tasks", "training"},
    "check": {"consumers"},
}  # fmt: skip
WORDS = ("name", "prompt_name", "task", "document_task", "split", "format")


@pytest.mark.parametrize("verb", VERBS.values(), ids=list(VERBS))
def test_every_option_that_may_name_a_path_is_read_or_known_to_be_a_word(verb):
    texts = {
        name
        for name, kind in options_of(verb.options)
        if kind in (str, str | None, list[str], list[str] | str) and name.rpartition(".")[2] not in WORDS
    }
    assert texts - {verb.output} - NOT_READ[verb.name] == set(verb.paths) & texts
    assert set(verb.data) <= set(verb.paths) <= texts


@pytest.mark.parametrize(
    "changed, changes",
    [
        ("dev/qrels/test.tsv", _steps(eval={"datasets": [{"path": "{data}/dev", "split": "test"}]})),
        ("dev/qrels/test.tsv", _evaluate(training=["{data}/dev:test"])),
        ("dev/qrels/test.tsv", _evaluate(training=["own", "{data}/link"])),
        ("train.jsonl", {**_steps(data={"datasets": [{"path": "{data}/tr*.jsonl"}]})}),
        ("model/tokenizer.json", {**_evaluate(), "references": {"cut": "{data}/model@8"}}),
    ],
)
def test_a_step_is_another_one_when_a_byte_changes_of_what_it_reads(tmp_path, changed, changes):
    """Through a name with a split or a number of columns, a glob, a link to a folder in a folder."""
    path = toy(tmp_path)
    write_hf(tmp_path / "model", torch.bfloat16)
    (tmp_path / "test").rename(tmp_path / "dev")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "inner").symlink_to(tmp_path / "dev")
    path = toy(tmp_path, **changes)
    before = digests(path)
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    after = digests(path)
    name = "evaluate-toy" if "evaluate" in changes else "warm"
    assert after[name] != before[name]


def test_placeholders_and_patches_reach_the_options_of_their_cell(tmp_path):
    axes = {
        "batch": [8, "{larger}"],
        "prompt": {"own": {}, "none": {"warm.data.datasets.0.task": "", "evaluate.task": ""}},
    }
    grid = toy(tmp_path, axes=axes, models=["warm"], figures={}, references={})
    values = yaml.safe_load(grid.read_text())
    values["constants"]["larger"] = 16
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
        {"batch": b, "prompt": p} for b in ("8", "{larger}") for p in ("own", "none")
    ]
    trained = [row.scores["toy"].needs[0].options for row in rows]
    assert [options["global_batch_size"] for options in trained] == [8, 8, 16, 16]
    assert [o["data"]["datasets"][0]["task"] for o in trained] == ["of 8: {text}", "", "of 16: {text}", ""]
    assert [row.scores["toy"].options["task"] for row in rows] == [None, "", None, ""]
    assert {options["seed"] for options in trained} == {2} and trained[0]["data"]["query_max_length"] == 40
