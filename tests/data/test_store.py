"""The store gives back what the reader and the tokenizer gave; its name is a digest of all inputs; damage is
found."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data import build as build_module
from nemo_embed_core.data import store as store_module
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.store import Store
from nemo_embed_core.errors import DataError, UserError

ROOT = Path(__file__).resolve().parents[2]

ROWS = [
    {"query": "first", "pos": ["shared text", "other"], "neg": ["n one", "n two", "n one"]},
    {"query": "second, a longer query " * 9, "pos": ["shared text"], "neg": []},
    {"query": "third <s> </s>", "pos": ["long text " * 40], "neg": ["n two"]},
]


def write_rows(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path) -> DataConfig:
    data = write_rows(tmp_path / "a.jsonl")
    return DataConfig(
        datasets=[DatasetConfig(path=str(data), task="Find the passage")],
        cache_dir=str(tmp_path / "cache"), query_max_length=48, document_max_length=24,
    )  # fmt: skip


def build(config, tokenizer, log=lambda message: None) -> Store:
    return open_store(config, tokenizer, log=log)


def test_round_trip_of_two_datasets(config, tokenizer, tmp_path):
    other = write_rows(tmp_path / "b.jsonl", [{"query": "sts", "pos": ["shared text"], "neg": ["n two"]}])
    both = replace(
        config, datasets=[*config.datasets, DatasetConfig(path=str(other), task="T", document_task="T")]
    )
    lines: list[str] = []
    store = build(both, tokenizer, lines.append)

    prompts = [query_prompt("Find the passage")] * 3 + [query_prompt("T")]
    document_prompts = [""] * 3 + [query_prompt("T")]
    rows = [*ROWS, {"query": "sts", "pos": ["shared text"], "neg": ["n two"]}]
    texts: dict[int, str] = {}
    for i, (row, prompt, document_prompt) in enumerate(zip(rows, prompts, document_prompts, strict=True)):
        expected = tokenizer.encode([prompt + row["query"]], 48)[0]
        assert store.query_tokens(i).tolist() == expected.tolist()
        assert store.query_lengths[i] == len(expected)
        for ids, field in ((store.positives(i), "pos"), (store.negatives(i), "neg")):
            # A repeated text counts once.
            wanted = [document_prompt + text for text in dict.fromkeys(row[field])]
            assert ids.dtype == np.int64 and len(ids) == len(wanted)
            for doc_id, text in zip(ids.tolist(), wanted, strict=True):
                tokens = tokenizer.encode([text], 24)[0]
                assert store.document_tokens(doc_id).tolist() == tokens.tolist()
                assert store.document_lengths[doc_id] == len(tokens)
                assert texts.setdefault(doc_id, text) == text
    assert len(set(texts.values())) == len(texts) == store.num_documents == 7, "same text and prompt, same id"
    assert store.positives(0)[0] == store.positives(1)[0] != store.positives(3)[0]
    assert len(store) == 4
    assert store.max_token_id == max(
        max(store.query_tokens(i).max() for i in range(4)),
        max(store.document_tokens(i).max() for i in range(7)),
    )
    m = store.manifest
    assert (m["rows"], m["documents"], m["rows_without_negatives"], m["merged_repeats"]) == (4, 7, 1, 1)
    assert (m["truncated_queries"], m["truncated_documents"]) == (1, 1)
    assert [source["rows"] for source in m["sources"]] == [3, 1]
    assert "4 rows, 7 documents" in lines[0] and "1 query (25.00%) at 48 tokens" in lines[0]


def test_special_strings_in_the_data_do_not_become_special_ids(config, tokenizer):
    store = build(config, tokenizer)
    assert store.query_tokens(2).tolist().count(1) == 1 and 2 not in store.query_tokens(2)


def test_second_opening_reads_the_built_files(config, tokenizer, monkeypatch):
    first = build(config, tokenizer)
    monkeypatch.setattr(build_module, "compile_store", lambda *args: pytest.fail("built twice"))
    second = build(config, tokenizer)
    assert second.folder == first.folder and second.digest == first.digest
    second.verify()
    with pytest.raises(ValueError, match="read-only"):
        second.document_tokens(0)[0] = 5


def test_digest_names_everything_that_went_in(config, tokenizer, tmp_path):
    base = build(config, tokenizer).digest
    dataset = config.datasets[0]
    moved = write_rows(tmp_path / "moved.jsonl")
    assert build(replace(config, datasets=[replace(dataset, path=str(moved))]), tokenizer).digest == base
    assert build(replace(config, num_hard_negatives=1, max_tokens=99), tokenizer).digest == base

    changed = [
        replace(config, query_max_length=33),
        replace(config, document_max_length=25),
        replace(config, datasets=[replace(dataset, task="Other")]),
        replace(config, datasets=[replace(dataset, document_task="Other")]),
        replace(config, datasets=[dataset, dataset]),
        replace(config, datasets=[replace(dataset, path=str(write_rows(tmp_path / "c.jsonl", ROWS[::-1])))]),
    ]
    digests = [build(c, tokenizer).digest for c in changed]
    tokenizer.digest = "0" * 64  # another tokenizer
    digests.append(build(config, tokenizer).digest)
    assert len({base, *digests}) == len(digests) + 1


def test_bad_row_leaves_nothing_behind(config, tokenizer, tmp_path):
    with open(config.datasets[0].path, "a") as file:
        file.write('{"query": "q", "pos": [], "neg": []}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:4: field 'pos' is empty"):
        build(config, tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_text_of_no_tokens_is_named_by_its_line(config, tokenizer, monkeypatch):
    encode = type(tokenizer).encode_cut

    def no_tokens_for_other(self, texts, max_length):
        if "other" in texts:
            raise UserError(f"text {texts.index('other')} gives 0 tokens")
        return encode(self, texts, max_length)

    monkeypatch.setattr(type(tokenizer), "encode_cut", no_tokens_for_other)
    with pytest.raises(DataError, match=r"a\.jsonl:1: text 0 gives 0 tokens"):
        build(config, tokenizer)


def test_lengths_without_room_for_the_instruction(config, tokenizer):
    with pytest.raises(
        UserError, match=r"data\.query_max_length=8 tokens leaves no room for text: the instruction"
    ):
        build(replace(config, query_max_length=8), tokenizer)


def test_no_datasets(config, tokenizer):
    with pytest.raises(UserError, match=r"data\.datasets is empty"):
        build(replace(config, datasets=[]), tokenizer)


def test_file_that_changes_while_it_is_read(config, tokenizer, monkeypatch):
    original = build_module.compile_store

    def build_while_somebody_writes(*args):
        original(*args)
        with open(config.datasets[0].path, "a") as file:
            file.write(json.dumps(ROWS[0]) + "\n")

    monkeypatch.setattr(build_module, "compile_store", build_while_somebody_writes)
    with pytest.raises(UserError, match="changed while it was being tokenised"):
        build(config, tokenizer)


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", [*store_module.TOKEN_FILES, *store_module.ARRAY_FILES])
@pytest.mark.parametrize("damage", ["truncated", "longer", "removed"])
def test_damaged_sizes_are_found_on_opening(config, tokenizer, name, damage):
    file = build(config, tokenizer).folder / name
    if damage == "removed":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-4] if damage == "truncated" else content + b"\0\0\0\0")
    with pytest.raises(UserError, match=rf"damaged: {name} has .* delete that folder and it is built again"):
        build(config, tokenizer)


@pytest.mark.parametrize("name", [*store_module.TOKEN_FILES, *store_module.ARRAY_FILES])
def test_a_flipped_bit_is_found_by_verify(config, tokenizer, name):
    store = build(config, tokenizer)
    store.verify()
    content = bytearray((store.folder / name).read_bytes())
    content[-3] ^= 16
    (store.folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"damaged: .*{name}"):
        Store(store.folder).verify()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": 2}', "null"])
def test_broken_manifest(config, tokenizer, content):
    (build(config, tokenizer).folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"damaged: manifest\.json"):
        build(config, tokenizer)


def test_manifest_of_another_store_or_version(config, tokenizer):
    folder = build(config, tokenizer).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": "1" * 64}))
    with pytest.raises(UserError, match="its manifest has digest 111111111111 instead of"):
        build(config, tokenizer)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="store format 99, this code reads 2"):
        build(config, tokenizer)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "rows": 4}))
    with pytest.raises(UserError, match=r"damaged: manifest\.json: .*rows of the sources"):
        build(config, tokenizer)


def test_unwritable_cache(config, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cannot be written to .*cache.*data\.cache_dir"):
        build(config, tokenizer)


# ------------------------------------------------------------------------------------------ races


def test_loser_of_a_race_uses_the_winners_store(config, tokenizer, monkeypatch, tmp_path):
    publish = build_module.publish
    raced = []

    def publish_second(temporary, folder):
        if not raced:
            raced.append(True)
            raced.append(build(config, tokenizer).folder)  # another builder is faster
            inode = folder.stat().st_ino
            publish(temporary, folder)
            assert folder.stat().st_ino == inode, "the winner's folder stays"
        else:
            publish(temporary, folder)

    monkeypatch.setattr(build_module, "publish", publish_second)
    store = build(config, tokenizer)
    store.verify()
    assert raced[1] == store.folder
    assert os.listdir(tmp_path / "cache") == [store.folder.name], "no building folder is left"


def test_prepare_in_three_processes_at_once(config, tokenizer_folder, tmp_path):
    """launch/prepare.py, raced: all succeed, one store remains; then a bad row ends it with code 2 and one
    line."""
    command = [
        sys.executable, str(ROOT / "launch" / "prepare.py"), "--tokenizer", str(tokenizer_folder),
        "--data.datasets", json.dumps([{"path": config.datasets[0].path}]), "--data.cache_dir",
        config.cache_dir,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": tmp_path,
        "env": environment,
    }
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert all("3 rows, 5 documents" in out for out, _ in outputs)
    # sources.json is there where the file was two seconds old when it was hashed.
    assert len(set(os.listdir(config.cache_dir)) - {"sources.json"}) == 1

    Path(config.datasets[0].path).write_text('{"query": "q", "pos": ["p"], "neg": 3}\n')
    bad = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert bad.returncode == 2
    assert (
        bad.stderr
        == f"error: {config.datasets[0].path}:1: field 'neg' must be a list of strings, got a number (int)\n"
    )
