"""The model card repeats what the sources' own files say, and leaves out what they do not."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import MODEL, train_config

from nemo_embed_core import version
from nemo_embed_core.checkpoint.manifest import FORMAT_VERSION, seal
from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.checkpoint.weights import Weights
from nemo_embed_core.config import OptimConfig
from nemo_embed_core.export.card import describe, model_card, shown_command
from nemo_embed_core.options import to_dict
from nemo_embed_core.version import code_version

DIGEST = "d" * 64
USAGE = Usage(
    prompts={"a": Prompts("Instruct: x\nQuery: ", "|d: ")}, query_max_length=48, document_max_length=512
)


def run(folder: Path, *, init_from: str = "", step: int = 7, **changes) -> Weights:
    """A run's newest checkpoint as far as a card needs it: its manifest alone."""
    config = train_config(folder.parent, output_dir=str(folder), init_from=init_from, **changes)
    checkpoint = folder / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    facts = {
        "num_rows": 61,
        "data_digest": DIGEST,
        "ledger": "1" * 64,
        "step": step,
        "export_dtype": "float32",
    }
    manifest = {"format": FORMAT_VERSION, **facts, "model": to_dict(MODEL), "config": to_dict(config)}
    manifest |= {
        "files": {"a": {"size": 1, "sha256": "0" * 64}},
        "tensors": {f"layers.{i}": {"dtype": "float32", "shape": [1]} for i in range(9)},
        "pieces": {f"layers.{i}": [{"file": "a", "offset": [0], "size": [1]}] for i in range(9)},
    }
    (checkpoint / "manifest.json").write_bytes(seal(json.loads(json.dumps(manifest))))
    return Weights(MODEL, Reader(checkpoint), checkpoint, torch.float32, "")


def card_of(*sources: Weights, **more) -> str:
    return model_card(MODEL, "float32", USAGE, {**describe(sources), "title": "model", **more})


def base_model(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in {"config.json": "{}", **files}.items():
        (folder / name).write_text(text)
    return folder


def test_facts_come_from_the_manifests_of_the_whole_line_of_runs(tmp_path):
    base = base_model(tmp_path / "disk" / "Some-Base-1B")
    run(tmp_path / "stage1", init_from=str(base))
    text = card_of(run(tmp_path / "stage2", init_from=str(tmp_path / "stage1")))
    for words in (
        "- Base model: Some-Base-1B",
        "- Earlier stages: stage1",
        "- Weights of: stage2/step-00000007",
        f"| stage2/step-00000007 | 7 of 10 | 61 | {DIGEST} | {'1' * 64} |",
        "| train.jsonl | find it |",
        "| optim.lr | ",
        "| data.num_hard_negatives | 2 |",
        f"- exported with: `{code_version()}`",
    ):
        assert words in text, words
    assert str(tmp_path) not in text and "disk" not in text
    # Not known: the base's place on the hub, a licence, results, and the rows of each data set (the store is
    # gone).
    front = yaml.safe_load(text.split("---")[1])
    assert not {"base_model", "license"} & front.keys()
    assert (
        "Llama.**" not in text
        and "Results" not in text
        and "sha256" not in text
        and "trained with" not in text
    )


def test_a_run_from_random_weights_has_no_base_model_and_a_lost_ancestor_is_not_made_up(tmp_path):
    assert "Base model" not in card_of(run(tmp_path / "scratch"))
    damaged = run(tmp_path / "stage1", init_from="x").folder / "manifest.json"
    damaged.write_text(damaged.read_text().replace('"step": 7', '"step": 8'))
    text = card_of(run(tmp_path / "stage2", init_from=str(tmp_path / "stage1")))
    assert "Base model" not in text and "stages" not in text


def test_rows_and_digests_of_each_data_set_come_from_the_compiled_store(tmp_path):
    source = run(tmp_path / "a")
    store = tmp_path / "cache" / DIGEST[:32]
    store.mkdir(parents=True)
    compiled = {"digest": DIGEST, "sources": [{"rows": 61, "files": {"/x/train.jsonl": "5" * 64}}]}
    (store / "manifest.json").write_text(json.dumps(compiled))
    assert f"| train.jsonl | find it | 61 | {'5' * 64} |" in card_of(source)
    (store / "manifest.json").write_text(json.dumps({**compiled, "digest": "e" * 64}))
    assert "5" * 64 not in card_of(source)  # the store of other data
    (store / "manifest.json").write_text('{"digest"')
    assert "| train.jsonl | find it |" in card_of(source)  # a damaged store is no reason not to export


def test_an_average_shows_what_its_runs_differ_in(tmp_path):
    sources = [
        run(tmp_path / name, seed=i, optim={"lr": lr})
        for i, (name, lr) in enumerate([("a", 1e-5), ("b", 2e-5)])
    ]
    report = {"method": "weighted", "weights": [0.25, 0.75]}
    text = model_card(MODEL, "float32", USAGE, {**describe(sources, report), "title": "x"})
    assert "- Weighted average (0.25, 0.75) of: a/step-00000007, b/step-00000007" in text
    assert "| optim.lr | 1e-05 / 2e-05 |" in text
    assert "| seed | 0 / 1 |" in text
    assert f"| optim.weight_decay | {OptimConfig().weight_decay} |" in text
    # Two bases: neither is "the" base model.
    other = run(tmp_path / "c", init_from=str(base_model(tmp_path / "Llama-x")))
    assert "Base model" not in model_card(
        MODEL, "float32", USAGE, describe([sources[0], other], {"method": "mean"})
    )


LICENCE = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n"


@pytest.mark.parametrize(
    ("name", "files", "reason", "copies"),
    [
        ("base", {"README.md": "---\nlicense: llama3.1\n---\n"}, "licence `llama3.1`", "missing"),
        (
            "base",
            {"LICENSE.txt": LICENCE, "USE_POLICY.md": "x"},
            r"\(LICENSE.txt\)",
            "LICENSE.txt, USE_POLICY.md",
        ),
        ("Llama-3.1-8B", {"README.md": "---\nlicense: other\n---\n"}, "says Llama in its name", "missing"),
        (
            "base",
            {"LICENSE": "Apache License, for llama.cpp", "README.md": "---\nlicense: apache-2.0\n---\n"},
            None,
            "",
        ),
        ("base", {"README.md": "---\n: [\n---\n"}, None, ""),
    ],
)
def test_duties_of_a_llama_derivative_are_stated_with_the_fact_that_says_so(
    tmp_path, name, files, reason, copies
):
    source = run(tmp_path / "run", init_from=str(base_model(tmp_path / name, **files)))
    facts = describe([source])
    text = card_of(source, title="my-model")
    licence = {file: content.encode() for file, content in files.items() if file != "README.md"}
    assert facts.get("license_files", {}) == licence  # write_folder copies them
    front = yaml.safe_load(text.split("---")[1])
    assert front.get("license") == (
        "llama3.1" if "llama3.1" in str(files) else None
    )  # never "apache-2.0" by inheritance
    if reason is None:
        assert "Built with Llama" not in text
        return
    assert len(re.findall(reason, text)) == 1
    assert "**Built with Llama.**" in text.split("## ")[0]
    assert f"- Copy of the licence: {copies}" in text
    assert '- Name of this model: my-model (does not begin with "Llama")' in text
    assert "(does not begin" not in card_of(source, title="Llama-mine")


def test_a_hub_id_is_written_only_where_the_hub_cache_says_it(tmp_path):
    snapshot = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "0e9e39f"
    text = card_of(run(tmp_path / "run", init_from=str(base_model(snapshot))))
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "meta-llama/Llama-3.1-8B"
    # runs/stage1 looks like one and is none: it is somebody's folder.
    text = card_of(run(tmp_path / "other", init_from=str(tmp_path / "runs" / "stage1")))
    assert "- Base model: stage1" in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_a_card_of_ours_hands_base_model_and_licence_on(tmp_path):
    first = card_of(run(tmp_path / "run", init_from=str(base_model(
        tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "0",
        **{"README.md": "---\nlicense: llama3.1\n---\n"}
    ))))  # fmt: skip
    export = base_model(tmp_path / "export", **{"README.md": first})
    front = yaml.safe_load(card_of(run(tmp_path / "next", init_from=str(export))).split("---")[1])
    assert (front["base_model"], front["license"]) == ("meta-llama/Llama-3.1-8B", "llama3.1")


def test_a_folder_that_is_only_converted_is_a_parent_and_keeps_its_duties(tmp_path):
    folder = base_model(tmp_path / "Llama-3.1-8B", LICENSE=LICENCE)
    source = Weights(MODEL, SimpleNamespace(manifest=None), folder, torch.float32, "")
    text = card_of(source)
    assert "- Weights of: Llama-3.1-8B" in text and "Base model:" not in text
    assert "came with a Llama community licence (LICENSE)" in text
    assert "Trained with nemo_embed_core" not in text and "Training" not in text


def test_how_texts_are_encoded_stands_in_the_card():
    usage = replace(USAGE, prompts={**USAGE.prompts, "b": Prompts("", "e")}, similarity="dot")
    text = model_card(MODEL, "float32", usage, {"choices": ["default prompts: as --task 'x' says"]})
    for line in (
        '- Prompt before queries: `"Instruct: x\\nQuery: "`; before documents: `"|d: "`',
        '- Prompt of b before queries: none; before documents: `"e"`',
        "- Longest query: 48 tokens; longest document: 512 tokens; longer ones are cut",
        "- sentence-transformers has one limit for both and cuts at 512 tokens",
        "- Pooling: mean; similarity: dot",
        "- Default prompts: as --task 'x' says",
    ):
        assert f"\n{line}\n" in text, line
    one = model_card(MODEL, "float32", replace(USAGE, query_max_length=512), {})
    assert "one limit" not in one and "Prompt of" not in one


def test_commands_are_shown_without_this_machines_folders():
    argv = ["launch/merge.py", "/home/me/runs/a b", "-o", "exports/x", "--evaluate", "score {folder}"]
    assert shown_command(argv) == "launch/merge.py 'runs/a b' -o exports/x --evaluate 'score {folder}'"


def test_the_version_names_the_commit_of_this_checkout():
    root = Path(__file__).resolve().parents[2]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if commit.returncode:
        pytest.skip("not a git checkout")
    assert f"commit {commit.stdout.strip()}" in code_version()


def test_model_card_says_what_it_was_given_and_nothing_else():
    card = {
        "base_model": "/some/disk/base-1b",
        "parents": ["/some/disk/run-a", "run-b"],
        "datasets": [{"name": "a|b", "rows": 3}, {"name": "c", "digest": "12ab"}],
        "recipe": {"optim": {"lr": 1e-5}, "steps": 7},
        "metrics": {"held-out": {"ndcg_at_10": 0.25}},
        "commit": "abc123",
    }
    text = model_card(MODEL, "float32", USAGE, card)
    tables = (
        "| optim.lr | 1e-05 |",
        "| steps | 7 |",
        "| a\\|b | 3 |  |",
        "| c |  | 12ab |",
        "| held-out | ndcg_at_10 | 0.25 |",
    )
    for words in (*tables, "`abc123`", "Average of: run-a, run-b"):
        assert words in text, words
    assert "/some/disk" not in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "sentence-transformers"
    assert "base_model" not in front and "license" not in front  # a folder name is no id of the hub
    compile(text.split("```python")[2].split("```")[0], "usage", "exec")

    empty = model_card(MODEL, "float32", USAGE, {})
    for heading in ("Training data", "Recipe", "Results", "Provenance", "Licence"):
        assert f"## {heading}" in text or heading == "Licence"
        assert f"## {heading}" not in empty


@pytest.mark.parametrize(
    ("base", "says_llama"),
    [
        ("meta-llama/Llama-3.1-8B", True),
        ("/models/Meta-Llama-3-8B", True),
        ("/llama-runs/other", False),
        ("", False),
    ],
)
def test_llama_licence_note_only_when_the_base_says_llama(base, says_llama):
    text = model_card(MODEL, "float32", USAGE, {"base_model": base})
    assert ("Built with Llama" in text) == says_llama
    front = yaml.safe_load(text.split("---")[1])
    assert front.get("base_model") == (base if base == "meta-llama/Llama-3.1-8B" else None)


def test_a_commit_is_changed_by_code_and_not_by_what_measurements_wrote(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert version.commit(tmp_path) == ("", False)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "step.py").write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    sha, is_changed = version.commit(tmp_path)
    assert len(sha) == 40 and not is_changed
    (tmp_path / "benchmarks" / "results" / "step.jsonl").write_text("{}\n")
    assert version.commit(tmp_path) == (sha, False)
    (tmp_path / "benchmarks" / "new.py").write_text("2\n")
    assert version.commit(tmp_path) == (sha, True)
