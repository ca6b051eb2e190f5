"""The stages of a pipeline before any of them runs: commands, what is refused, what changes with what."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines import config, options

from launch import merge
from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import PipelineConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.pipeline import run as running
from nemo_embed_core.pipeline.checks import checked
from nemo_embed_core.pipeline.method import Chosen
from nemo_embed_core.pipeline.stages import Stages, learning_rate, stages_of
from nemo_embed_core.plan import plan
from nemo_embed_core.steps import runner
from nemo_embed_core.steps.runner import file_of
from nemo_embed_core.steps.state import DONE, place

MODEL = {"name": "large", "base_url": "http://localhost:1/v1", "licence": "CC0-1.0"}


@pytest.fixture(autouse=True)
def fits(monkeypatch) -> None:
    """Everything: test_method.py asks what does."""
    monkeypatch.setattr(plan, "peak_of", lambda *_: 0)


@pytest.fixture
def nothing_runs(monkeypatch) -> list[Any]:
    started: list[Any] = []
    monkeypatch.setattr(runner, "_start", lambda *given: started.append(given))
    return started


def stages(given: PipelineConfig, chosen: Chosen | None = None) -> Stages:
    setting = checked(given)
    setting = replace(setting, chosen=chosen) if chosen else setting
    return stages_of(given, setting, Path(given.output), {})


def test_a_dry_run_prints_commands_that_mean_the_same_options(tmp_path, nothing_runs):
    (tmp_path / "more.yaml").write_text("loss: {temperature: 0.07}\noptim: {weight_decay: 0.0}\n")
    given = config(tmp_path, train=str(tmp_path / "more.yaml"), dry_run=True, max_rows=20)
    said: list[str] = []
    assert running.run(given, said.append) is None
    assert not nothing_runs and not (tmp_path / "out").exists()
    found = stages(given).steps
    assert [line.split()[:3] for line in said[1:-1:2]] == [["to", "do", name] for name in found]
    for step, line in zip(found.values(), said[2:-1:2], strict=True):
        dollar, program, verb, *argv = shlex.split(line)
        assert (dollar, program, verb) == ("$", "nemo-embed", step.verb.launcher)
        if (options := file_of(step, tmp_path / "out")) is not None:
            assert load_config(step.verb.options, argv) == step.verb.options.from_dict(options)
        else:
            merge.options().parse_args(argv)
    train = found["tuned"].options
    assert train["loss"]["temperature"] == 0.07 and train["loss"]["in_batch"] == "positives"
    assert train["optim"]["weight_decay"] == 0.0 and train["optim"]["lr"] == 1e-3
    assert train["data"]["datasets"][0]["cap"] == 20
    assert said[-1].startswith("7 of 7 stages to do: ")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"documents": "gone"}, "documents: gone is no folder"),
        ({"documents": "empty"}, r"documents: empty holds no document that can be read: files of .*\.md"),
        ({"base": ""}, r"base is missing: .*demo.pretrained --output \S+ --layers 1"),
        ({"base": "empty"}, "base=empty: .*empty"),
        ({"method": "layers", "layers": 3}, "layers=3: .* has 2"),
        ({"layers": 1}, "layers=1 is of method=layers, not of full"),
        ({"query_max_length": 8}, "query_max_length"),
        ({"global_batch_size": 7, "ranks": 2}, "global_batch_size=7 must be a multiple of ranks=2"),
        ({"formats": ["native", "tflite"]}, "formats has tflite; there are native, compat, onnx, gguf"),
        ({"formats": ["native", "native"]}, "must be at least one, and none twice"),
        ({"train": "own.yaml"}, "train=own.yaml: data.datasets is the pipeline's own"),
        ({"train": "wrong.yaml"}, "train=wrong.yaml: .*optim.lrate is not an option"),
        ({"self_pairs": {"held_out": 0.0}}, "held_out=0 leaves nothing to prove the model on"),
        ({"generate": {"models": [MODEL | {"key_env": "NO_SUCH_KEY"}]}}, "environment has no NO_SUCH_KEY"),
        ({"generate": {"models": [MODEL], "embedder": "gone"}}, r"written: \S+/gone is not there"),
        ({"generate": {"models": [MODEL], "tasks": {"topic": 1.0}}}, "topic, which is not about"),
        ({"generate": {"models": [MODEL], "journal": "x"}}, "journal is the pipeline's own"),
        ({"steps": 3, "epochs": 2}, "in place of epochs=2"),
        ({"memory_gb": -1.0}, "memory_gb=-1.0 must not be negative"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_the_first_stage(tmp_path, monkeypatch, nothing_runs, changes, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/data.csv").write_text("a,b\n")
    (tmp_path / "own.yaml").write_text("data: {datasets: [{path: x}]}\n")
    (tmp_path / "wrong.yaml").write_text("optim: {lrate: 1}\n")
    with pytest.raises(UserError, match=says):
        running.run(config(tmp_path, **changes), lambda _: None)
    assert not nothing_runs and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["embedder", "models", "judge"])
def test_rows_are_written_anew_when_a_byte_changes_of_a_local_model(tmp_path, kind):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/weights").write_text("1")
    one = {**MODEL, "name": str(tmp_path / "local"), "base_url": ""}
    given = {"embedder": str(tmp_path / "local"), "models": [MODEL, one], "judge": one}
    changes = {"generate": {"models": [MODEL], kind: given[kind]}}
    before = stages(config(tmp_path, **changes)).steps
    (tmp_path / "local/weights").write_text("2")
    after = stages(config(tmp_path, **changes)).steps
    assert after["written"].digest != before["written"].digest
    assert after["pairs"].digest == before["pairs"].digest


def test_under_torchrun_it_says_who_starts_whom(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="start it with python and --ranks 4"):
        running.run(config(tmp_path), lambda _: None)


@pytest.mark.parametrize(
    "changes, others",
    [
        ({}, []),
        ({"max_queries": 40}, ["scores", "compared"]),
        ({"formats": ["native", "compat"]}, ["export-compat", "check-compat"]),
        ({"lr": 2e-3}, ["tuned", "export", "scores", "compared", "check"]),
        ({"num_negatives": 2}, ["mine", "tuned", "export", "scores", "compared", "check"]),
        ({"seed": 4}, ["pairs", "mine", "tuned", "export", "scores", "compared", "check"]),
    ],
)
def test_what_changes_runs_again_and_what_follows_from_it(tmp_path, changes, others):
    before = stages(config(tmp_path)).steps
    after = stages(config(tmp_path, **changes)).steps
    known = {step.digest for step in before.values()}
    assert [name for name, step in after.items() if step.digest not in known] == others


def test_bytes_of_documents_and_base_count_and_other_files_do_not(tmp_path):
    def digests() -> dict[str, str]:
        return {name: step.digest for name, step in stages(config(tmp_path)).steps.items()}

    before = digests()
    (tmp_path / "docs/notes.csv").write_text("not a document\n")
    assert digests() == before
    vocabulary = tmp_path / "base/special_tokens_map.json"
    vocabulary.write_text("{}")
    assert [name for name, digest in digests().items() if digest != before[name]] == list(before)[1:]
    vocabulary.unlink()
    document = tmp_path / "docs/guide-3.md"
    document.write_text(document.read_text() + "\nOne sentence more stands here.\n")
    assert all(digest != before[name] for name, digest in digests().items())


def test_rows_of_models_stand_beside_the_pairs_and_a_task_without_rows_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY", "secret-key")
    generate = {"models": [MODEL | {"key_env": "KEY"}], "requests": 9, "budget": 2.0}
    given = config(tmp_path, generate=generate)
    found = stages(given).steps
    written, mine, tuned = found["written"], found["mine"], found["tuned"]
    names = ["pairs", "document-question", "document-keywords"]
    assert [d["name"] for d in tuned.options["data"]["datasets"]] == names
    assert [d["path"].rpartition("/")[2] for d in mine.options["datasets"]] == ["train", *names[1:]]
    assert [d["path"] for d in tuned.options["data"]["datasets"]] == found["scores"].options["training"]
    assert found["scores"].options["data"] == f"{found['pairs'].product}/test"
    for name in ("documents", "seed", "self_pairs", "max_documents"):  # the same documents are held out
        assert written.options[name] == found["pairs"].options[name]
    assert "secret-key" not in json.dumps([step.options for step in found.values()])
    # Another document asks anew, of the same journal.
    (tmp_path / "docs/more.md").write_text("# More\n\n" + "A sentence of the new document stands here. " * 4)
    again = stages(given).steps["written"]
    assert again.digest != written.digest
    for step in (written, again):
        assert file_of(step, tmp_path / "out")["generate"]["journal"] == str(
            tmp_path / "out/answers/journal.jsonl"
        )
    folder = place(again, tmp_path / "out")
    (folder / "data/datasets/document-question").mkdir(parents=True)
    (folder / DONE).write_text("{}")
    options = stages(given).steps["tuned"].options
    assert [d["name"] for d in options["data"]["datasets"]] == names[:2]


def test_adapters_and_layers_are_trained_where_they_are_chosen(tmp_path):
    lora = stages(config(tmp_path, method="lora", lora_rank=4, lr=None)).steps["tuned"].options
    assert lora["lora"]["rank"] == 4 and lora["optim"]["lr"] == learning_rate(64, True) == 1e-3
    assert learning_rate(4096, True) == pytest.approx(1e-4) == 10 * learning_rate(4096, False)
    found = stages(config(tmp_path, method="layers", layers=1)).steps
    start = found["start"]
    assert start.options["init_layers"] == [0] and start.options["steps"] == 0
    assert found["tuned"].options["init_from"] == start.product == found["mine"].options["model"][0]
    assert found["scores"].options["models"][0] == start.product
    full = stages(config(tmp_path, lr=None)).steps["tuned"].options
    assert full["lora"]["rank"] == 0 and not full["init_layers"]
    assert full["init_from"] == str(tmp_path / "base")


def test_options_of_a_file_are_those_of_python(tmp_path):
    given = options(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    assert load_config(PipelineConfig, ["--config", str(tmp_path / "run.yaml")]) == config(tmp_path)
