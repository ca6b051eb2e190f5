"""docs/start.md: every command of the page runs, in its order, on a few documents and a toy base model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import Server
from recipes import CONFIGS, ROOT, commands, run_commands
from tiny import MODEL, WORDS, write_hf

SMALL = {
    # The toy's tokenizer makes more tokens of the instruction than 64.
    "train": [
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--global_batch_size",
        "8",
        "--data.query_max_length",
        "200",
    ],
    "mine": ["--device", "cpu", "--threshold", "1.2"],  # to random weights all texts are alike
    "evaluate": ["--device", "cpu"],
}


@pytest.mark.slow
def test_every_command_of_the_page_runs_on_a_folder_of_documents(server: Server, tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    for i in range(60):
        body = [f"The {WORDS[(i * 7 + j) % len(WORDS)]} of number {i} has {j} parts. " * 3 for j in range(4)]
        text = f"# Guide {i} of {WORDS[i % len(WORDS)]}\n\n" + "\n\n".join(body) + "\n"
        (tmp_path / "documents" / f"guide-{i}.md").write_text(text)
    write_hf(tmp_path / "models/smollm2-1", torch.float32, config=replace(MODEL, num_hidden_layers=1))
    (tmp_path / "configs").symlink_to(CONFIGS)
    given = []
    for verb, argv in commands(ROOT / "docs/start.md"):
        argv = ["documents" if word.endswith("site-packages/torch") else word for word in argv]
        given.append((verb, [*argv, *(SMALL.get(verb, []) if "--compare" not in argv else [])]))
    assert [verb for verb, _ in given[:5]] == ["synthesize", "train", "mine", "train", "merge"]
    server.preload("launch.evaluate", "nemo_embed_core.evaluation.retrieval:mteb_imported")

    outcome = server.call(run_commands, str(tmp_path), given)
    assert outcome.code == 0, outcome.output[-8000:]
    failed = [(given[i], said[-3000:]) for i, (code, said) in enumerate(outcome.result) if code]
    assert not failed, failed
    report = json.loads((tmp_path / "reports/start.json").read_text())
    assert list(report) == ["models/smollm2-1", "runs/start", "exports/start", "bm25"]
    assert (tmp_path / "exports/start-gguf/model.gguf").is_file()
