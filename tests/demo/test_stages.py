"""The demo's commands: options that their launchers take, files that an earlier one made, the last table."""

import json
import subprocess
from pathlib import Path

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import LAUNCHERS
from nemo_embed_core.demo import stages

ROOT = Path(__file__).parents[2]


def test_every_stage_is_a_command_that_its_launcher_accepts(tmp_path, monkeypatch, capsys):
    commands: list[list[str]] = []

    def record(command, cwd, env):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(stages, "prepare_data", lambda folder: None)
    monkeypatch.chdir(ROOT)
    stages.Demo(ROOT, tmp_path).run()
    verbs = [next(Path(part).stem for part in command if part.startswith("launch/")) for command in commands]
    assert verbs == ["train", "train", "mine", "train", "train", "merge", "evaluate"]
    written = {"tokenizer", "stage1.jsonl", "stage2.jsonl", "test", "cache"}  # by prepare_data, and the cache
    for verb, command in zip(verbs, commands, strict=True):
        argv = command[command.index(f"launch/{verb}.py") + 1 :]
        if verb != "merge":
            load_config(LAUNCHERS[verb], argv)
        at = next(i for i, option in enumerate(argv) if option in ("--output_dir", "--output", "-o")) + 1
        read = [Path(word).name for word in [*argv[:at], *argv[at + 1 :]] if word.startswith(str(tmp_path))]
        assert written.issuperset(read), (verb, read)
        written.add(Path(argv[at]).name)
    assert capsys.readouterr().out.count("$ python ") == 7


def test_report_is_the_table_of_the_evaluation_by_model_name(tmp_path):
    scores = {"ndcg_at_10": 0.25, "recall_at_10": 0.5, "mrr_at_10": 0.125}
    (tmp_path / "evaluation.json").write_text(json.dumps({f"{tmp_path}/merged": scores, "bm25": scores}))
    lines = stages.report(tmp_path).splitlines()
    assert lines[1].split() == ["merged", "0.2500", "0.5000", "0.1250"] and lines[2].split()[0] == "bm25"
    assert json.loads((tmp_path / "report.json").read_text()) == {"merged": scores, "bm25": scores}
