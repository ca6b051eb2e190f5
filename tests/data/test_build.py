"""A killed build goes on and ends with the same bytes; a source is hashed once; a store opens without its
sources; noise is counted."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data import build as build_module
from nemo_embed_core.data import building
from nemo_embed_core.data import compile as compile_module
from nemo_embed_core.data.build import open_store, with_store
from nemo_embed_core.data.packing import known_in_batch
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.lock import hold

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"query": f"query {i} {'word ' * (i % 40)}", "pos": [f"positive {i // 2}"],
         "neg": [f"negative {j} {i}" for j in range(i % 3)]}
        for i in range(start, start + count)
    ]  # fmt: skip


@pytest.fixture
def config(tmp_path) -> DataConfig:
    paths = [write(tmp_path / f"{name}.jsonl", rows(30, start)) for name, start in (("a", 0), ("b", 20))]
    return DataConfig(
        datasets=[DatasetConfig(path=paths[0], task="Find"), DatasetConfig(path=paths[1])],
        cache_dir=str(tmp_path / "cache"), query_max_length=48, document_max_length=24,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------ kills

SCRIPT = """
import json, sys
from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data import build, compile
from nemo_embed_core.data.tokenizer import load_tokenizer
options = json.loads(sys.argv[1])
options["datasets"] = [DatasetConfig(**dataset) for dataset in options["datasets"]]
compile.COMMIT_S = 0.0
build.open_store(DataConfig(**options), load_tokenizer(sys.argv[2]))
"""


def run(config: DataConfig, tokenizer_folder: Path, fail: str = "") -> subprocess.CompletedProcess:
    from dataclasses import asdict

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NEMO_EMBED_FAIL": fail}
    command = [sys.executable, "-c", SCRIPT, json.dumps(asdict(config)), str(tokenizer_folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_killed_builds_go_on_and_give_the_same_bytes(config, tokenizer_folder, tmp_path):
    shorter = replace(config.datasets[1], document_max_length=20)
    config = replace(config, datasets=[config.datasets[0], shorter])
    whole = run(replace(config, cache_dir=str(tmp_path / "whole")), tokenizer_folder)
    assert whole.returncode == 0, whole.stderr
    assert "tokenised 31 of 60 rows (51.7%)" in whole.stdout and "left" in whole.stdout
    for row in (7, 31, 59):
        killed = run(config, tokenizer_folder, f"store.row@{row}")
        assert killed.returncode == -9, killed.stderr
        (leftover,) = Path(config.cache_dir).glob(".building-*")
        assert json.loads((leftover / "state.json").read_text())["rows"] == row
        # What was written behind the last commit is worth nothing, and is there after some kills.
        with open(leftover / "document_tokens.bin", "ab") as file:
            file.write(b"half a token")
    last = run(config, tokenizer_folder)
    assert last.returncode == 0, last.stderr
    assert "59 of 60 rows were done" in last.stdout
    assert [path.name for path in Path(config.cache_dir).glob(".building-*")] == []
    (one,), (other,) = (
        [p for p in Path(folder).iterdir() if p.is_dir()] for folder in (config.cache_dir, tmp_path / "whole")
    )
    assert content(one) == content(other) and one.name == other.name


def test_texts_are_tokenised_in_their_order_while_further_ones_are_read(
    config, tokenizer, tmp_path, monkeypatch
):
    whole = open_store(replace(config, cache_dir=str(tmp_path / "whole")), tokenizer, log=lambda line: None)
    threads, encode = [], type(tokenizer).encode_cut

    def slow(self, texts, *rest):
        threads.append(threading.current_thread().name)
        time.sleep(0.002)  # so that the next texts are there before these are done
        return encode(self, texts, *rest)

    monkeypatch.setattr(type(tokenizer), "encode_cut", slow)
    monkeypatch.setattr(compile_module, "PENDING", 200)
    small = open_store(config, tokenizer, log=lambda line: None)
    assert content(small.folder) == content(whole.folder)
    assert len(threads) > 20 and set(threads) == {"tokenise_0"}


def test_a_damaged_state_begins_anew(config, tokenizer_folder, tokenizer, tmp_path):
    assert run(config, tokenizer_folder, "store.row@40").returncode == -9
    (leftover,) = Path(config.cache_dir).glob(".building-*")
    os.truncate(leftover / "query_tokens.bin", 4)
    lines: list[str] = []
    store = open_store(config, tokenizer, log=lines.append)
    store.verify()
    assert len(store) == 60 and not any("going on" in line for line in lines)


def test_leftovers_are_named_and_removed_when_their_owner_is_gone(
    config, tokenizer_folder, tokenizer, monkeypatch
):
    other = replace(config, query_max_length=40)
    assert run(other, tokenizer_folder, "store.row@12").returncode == -9
    (of_other,) = Path(config.cache_dir).glob(".building-*")
    (empty := of_other.with_name(".building-0123456789abcdef-1")).mkdir()
    (empty / "lock").touch()
    for name, time_s in (("old", 1e9), ("new", None)):
        (file := empty.with_name(f".sources.json.{name}.tmp")).touch()
        os.utime(file, time_s and (time_s, time_s))
    (empty / "state.json").symlink_to("gone")  # as a file that another process removes meanwhile
    (held := of_other.with_name(".building-0123456789abcdef-2")).mkdir()
    descriptor = hold(held)
    lines: list[str] = []
    open_store(config, tokenizer, log=lines.append)
    text = "\n".join(lines)
    assert f"removing {empty}, left by a process that is gone" in text and not empty.exists()
    assert [path.name for path in empty.parent.glob(".sources.json.*")] == [".sources.json.new.tmp"]
    assert held.exists() and str(held) not in text, "somebody builds there"
    assert (
        f"{of_other} is of a killed build of other data" in text and "12 rows" in text and of_other.exists()
    )
    os.close(descriptor)
    monkeypatch.setattr(building, "STALE_S", 0)
    open_store(replace(config, query_max_length=41), tokenizer, log=lines.append)
    assert not of_other.exists() and not held.exists()


# ------------------------------------------------------------------------------------------ sources


def test_a_source_is_hashed_once(config, tokenizer, monkeypatch):
    for dataset in config.datasets:  # written long ago: a fresh file could change without a trace
        os.utime(dataset.path, (1e9, 1e9))
    monkeypatch.setattr(
        build_module.time, "time_ns", lambda clock=build_module.time.time_ns: clock() + 10_000_000_000
    )
    first = open_store(config, tokenizer, log=lambda line: None)
    hashed = []
    sha256 = build_module.sha256_file
    monkeypatch.setattr(build_module, "sha256_file", lambda path: hashed.append(str(path)) or sha256(path))
    assert open_store(config, tokenizer, log=lambda line: None).digest == first.digest and hashed == []
    Path(config.datasets[0].path).write_text(json.dumps(rows(1)[0]) + "\n")
    os.utime(config.datasets[0].path, (1e9, 1e9))  # the change time tells it
    assert open_store(config, tokenizer, log=lambda line: None).digest != first.digest
    assert config.datasets[0].path in hashed and config.datasets[1].path not in hashed
    (Path(config.cache_dir) / "sources.json").write_text("[1")
    assert open_store(config, tokenizer, log=lambda line: None)


def test_a_store_opens_by_its_digest_without_its_sources(config, tokenizer, tmp_path):
    built = open_store(config, tokenizer, log=lambda line: None)
    for dataset in config.datasets:
        os.remove(dataset.path)
    with pytest.raises(UserError, match=rf"does not exist.*--data\.store {built.folder.name} opens that"):
        open_store(config, tokenizer)
    shutil.copytree(built.folder, tmp_path / "copied")
    for name in (built.digest, built.digest[:8], str(tmp_path / "copied")):
        store = open_store(replace(config, store=name), tokenizer, log=lambda line: None)
        assert store.digest == built.digest
    # The instructions come with the store where none are given, and are compared where they are.
    bare = with_store(replace(config, store=built.digest, datasets=[]))
    assert [dataset.task for dataset in bare.datasets] == ["Find", ""] and bare.query_max_length == 48
    open_store(bare, tokenizer, log=lambda line: None)
    for changes, what in (
        ({"query_max_length": 47}, "query_max_length was 48, now 47"),
        (
            {"datasets": [replace(config.datasets[0], task="Other"), config.datasets[1]]},
            r"tasks\) was \['Find', ''\], now",
        ),
        ({"store": "0000"}, "has: " + built.folder.name),
    ):
        with pytest.raises(UserError, match=what):
            open_store(replace(config, **{"store": built.digest, **changes}), tokenizer)


def test_all_bad_rows_of_all_sources_are_said_before_a_token_is_made(config, tokenizer, monkeypatch):
    for dataset in config.datasets:
        with open(dataset.path, "a") as file:
            file.write('{"query": 3, "pos": ["x"], "neg": []}\n' * 2)
    monkeypatch.setattr(type(tokenizer), "encode_cut", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(UserError) as caught:
        open_store(replace(config, datasets=[replace(d, task="") for d in config.datasets]), tokenizer)
    message = str(caught.value)
    assert (
        all(f"{name}.jsonl:{line}: " in message for name in "ab" for line in (31, 32))
        and "4 bad lines" in message
    )


# --------------------------------------------------------------------------------------- what teaches nothing

NOISE = [
    ("what is x", ["the answer is x"], ["The answer is x ", "other"]),  # 1: up to case and space
    ("coffee?", ["café au lait"], ["cafe\u0301 au lait"]),  # 2: up to composition, nothing left
    ("same", ["same"], ["other"]),  # 3: query is positive
    ("same2", ["other2"], ["SAME2", "third"]),  # 4: query is negative
    ("multi", ["a one"], ["a two", "x"]),  # 5, 6: siblings
    ("Multi?", ["a two"], ["A one.", "x"]),
    ("dup", ["d"], ["e"]),  # 7, 8: the same row
    ("dup", ["d"], ["e"]),
    ("long", ["pre " * 30 + "one"], ["pre " * 30 + "two", "y"]),  # 9: equal after truncation
    ("\u200b", ["p"], ["n"]),  # 10: no content
    ("plain", ["fine"], ["good"]),  # 11
    ("other task", ["q"], ["s"]),  # 12
]


# query, positives, negatives, group; what each row knows to be right besides its own positives.
CLASSES = [
    ("a1", ["cat one"], ["dog one", "CAT TWO", "x"], "cat"),
    ("a2", ["cat two"], ["dog one", "b1", "a1"], "cat"),
    ("b1", ["dog one", "dog two"], ["cat one", "cat three"], "dog"),
    ("a3", ["cat three"], ["dog two"], "cat"),
    ("a3!", ["fish"], ["cat one", "dog two"], None),  # the query of another row, and no group
    ("c", ["bird"], ["cat one"], "bird"),  # a class of one document
]


def test_documents_of_a_rows_group_are_none_of_its_negatives_in_batch_too(tmp_path, tokenizer):
    """Each file has classes of its own; a class by another file's name is another class."""
    grouped = [{"query": q, "pos": p, "neg": n, **({"group": g} if g else {})} for q, p, n, g in CLASSES]
    other = [{"query": f"{q} of b", "pos": ["cow"], "neg": ["cat one", "cat two"], "group": "cat"}
             for q in ("x", "y")]  # fmt: skip
    paths = [write(tmp_path / "a.jsonl", grouped), write(tmp_path / "b.jsonl", other)]
    config = DataConfig(
        datasets=[DatasetConfig(path=path) for path in paths], cache_dir=str(tmp_path / "cache"),
        query_max_length=48, document_max_length=24, num_hard_negatives=3,
    )  # fmt: skip
    store = open_store(config, tokenizer, log=lambda message: None)
    store.verify()
    texts = [*dict.fromkeys(text for _, p, n, _ in CLASSES for text in (*p, *n)), "cow"]
    cats, dogs = {"cat one", "cat two", "cat three", "a1"}, {"dog one", "dog two", "b1"}
    right = [cats, cats, dogs, cats | {"fish"}, {"cat three", "fish"}, {"bird"}, {"cow"}, {"cow"}]
    known = [{texts[i].lower() for i in store.known_positives(row)} for row in range(8)]
    assert known == right
    kept = [[texts[i] for i in store.negatives(row)] for row in range(8)]
    assert kept == [
        ["dog one", "x"], ["dog one", "b1"], ["cat one", "cat three"], ["dog two"], ["cat one", "dog two"],
        ["cat one"], ["cat one", "cat two"], ["cat one", "cat two"],
    ]  # fmt: skip
    rows = np.array([3, 6, 0, 4, 2])
    batch = "cat three, dog two; cow, cat one; cat one, x; fish, a1; dog one, bird"
    ids = np.array([[texts.index(text) for text in row.split(", ")] for row in batch.split("; ")])
    present = {texts[i] for i in ids.ravel()}
    found = [{texts[i] for i in line if i >= 0} for line in known_in_batch(store, rows, ids)]
    assert found == [
        right[row] & present - {texts[own]} for row, own in zip(rows.tolist(), ids[:, 0], strict=True)
    ]
    # What is made of rows without groups is what it was; a label is one document for its class.
    plain = write(tmp_path / "a.jsonl", [{k: v for k, v in row.items() if k != "group"} for row in grouped])
    labels = write(tmp_path / "l.jsonl", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(4)])
    for path in (plain, labels):
        alone = open_store(
            replace(config, datasets=[DatasetConfig(path=path)]), tokenizer, log=lambda m: None
        )
        assert alone.row_classes is None and "row_classes.npy" not in alone.manifest["files"]
        assert "groups" not in alone.manifest["sources"][0]["reading"]
    assert store.manifest["sources"][0]["reading"] == store.manifest["sources"][1]["reading"] == ["groups"]
    assert "digest_ungrouped" not in store.manifest, "negatives were left out for it"
    harmless = write(tmp_path / "b.jsonl", [{**row, "neg": []} for row in grouped])
    again = open_store(
        replace(config, datasets=[DatasetConfig(path=harmless)]), tokenizer, log=lambda m: None
    )
    assert again.row_classes is not None and again.manifest["digest_ungrouped"] != again.digest
    assert "digest_v1" not in again.manifest


def test_noise_is_counted_by_kind_and_right_documents_are_no_negatives(tmp_path, tokenizer):
    path = write(tmp_path / "n.jsonl", [{"query": q, "pos": p, "neg": n} for q, p, n in NOISE])
    other = write(tmp_path / "o.jsonl", [{"query": "other task", "pos": ["t"], "neg": ["q"]}])
    config = DataConfig(
        datasets=[DatasetConfig(path=path), DatasetConfig(path=other, task="T")],
        cache_dir=str(tmp_path / "cache"), query_max_length=48, document_max_length=24,
    )  # fmt: skip
    lines: list[str] = []
    store = open_store(config, tokenizer, log=lines.append)
    texts = [*dict.fromkeys(text for _, p, n in NOISE for text in (*p, *n)), "t"]
    kept = [[texts[i] for i in store.negatives(row).tolist()] for row in range(13)]
    assert kept == [
        ["other"], [], ["other"], ["third"], ["x"], ["x"], ["e"], ["e"], ["y"], ["n"], ["good"], ["s"], ["q"],
    ]  # fmt: skip
    noise = store.manifest["noise"].items()
    found = {kind: (n["count"], [int(w.rsplit(":", 1)[1]) for w in n["first"]]) for kind, n in noise}
    assert list(found.values()) == [
        (2, [1, 2]),  # negatives equal to a positive in normal form
        (1, [9]),  # after truncation
        (1, [4]),  # the query
        (2, [5, 6]),  # of a sibling
        (1, [2]),  # rows that lost all
        (1, [3]),  # query is its positive
        (1, [8]),  # repeated
        (1, [10]),  # queries without content
        (0, []),
        (0, []),
        (2, [9]),  # documents equal after truncation
    ], found
    report = "\n".join(lines)
    assert (
        "WARNING: negatives left out, equal to the query: 1 of 18 (5.56%)" in report and "n.jsonl:4" in report
    )
    assert [store.where(row) for row in (0, 11, 12)] == [f"{path}:1", f"{path}:12", f"{other}:1"]
    # What no other row may take as this row's negative either, in batch.
    known = [sorted({texts[i] for i in store.known_positives(row).tolist()}) for row in range(13)]
    assert known[4] == known[5] == ["a one", "a two"] and known[3] == ["SAME2", "other2"]
    assert known[0] == ["the answer is x"] and known[11] == ["q"] and known[12] == ["t"], (
        "other instruction, other query"
    )
    same = store.same_as
    assert (
        same[texts.index("The answer is x ")]
        == same[texts.index("the answer is x")]
        != same[texts.index("a one")]
    )
    assert (same <= np.arange(len(same))).all()
    assert "digest_v1" not in store.manifest


def test_a_run_from_before_goes_on_where_nothing_was_left_out(config, tokenizer):
    store = open_store(config, tokenizer, log=lambda line: None)
    # As the first format named its stores, by hand.
    import hashlib

    made_of = {
        "version": 1, "tokenizer": tokenizer.digest, "query_max_length": 48, "document_max_length": 24,
        "sources": [
            [hashlib.sha256(Path(d.path).read_bytes()).hexdigest(), d.task, ""] for d in config.datasets
        ],
    }  # fmt: skip
    assert (
        store.manifest["digest_v1"]
        == hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    )
