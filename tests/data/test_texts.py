"""Texts on disk behave as a list and a dict, and cost no memory by their length."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nemo_embed_core.data import texts as texts_module
from nemo_embed_core.data.texts import Texts, TextsById, texts_in
from nemo_embed_core.errors import UserError


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_texts_are_a_list(monkeypatch, tmp_path, block):
    """A block of one byte, of a few texts, and larger than everything: appended and read in any order."""
    monkeypatch.setattr(texts_module, "BLOCK", block)
    rng, truth, texts = random.Random(3), [], Texts(tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name: nothing is left behind by a killed process"
    for step in range(300):
        text = "".join(rng.choice("aé日\U0001f600\n\x00 ") for _ in range(rng.choice([0, 1, 3, 20])))
        truth.append(text)
        assert texts.append(text) == step == len(texts) - 1
        i = rng.randrange(-len(truth), len(truth))
        assert texts[i] == truth[i]
        if step % 20 == 0:
            a, b = rng.randrange(-step - 2, step + 3), rng.randrange(-step - 2, step + 3)
            for part in (slice(a, b), slice(None, None, -3), slice(a, None, 2)):
                assert texts[part] == truth[part], part
            assert list(texts) == truth
    for wrong in (300, -301):
        with pytest.raises(IndexError):
            texts[wrong]


def test_reads_and_writes_come_in_pieces(monkeypatch):
    """One call of the system may read or write less than it was asked to (2 GiB at most), and an iteration
    asks for little."""
    pread, pwrite, asked = os.pread, os.pwrite, []
    monkeypatch.setattr(
        os, "pread", lambda file, count, at: asked.append(count) or pread(file, min(count, 5), at)
    )
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:3], at))
    monkeypatch.setattr(texts_module, "BLOCK", 40)
    texts, truth = Texts(), [f"text number {i}" for i in range(50)]
    for text in truth:
        texts.append(text)
    assert texts[7] == truth[7] and texts[3:9] == truth[3:9]
    asked.clear()
    assert list(texts) == truth and max(asked) <= 40


def test_iteration_sees_what_is_appended_meanwhile_and_after_a_fork(tmp_path):
    texts = Texts(tmp_path)
    texts.append("a")
    seen = []
    for text in texts:
        seen.append(text)
        if len(seen) < 4:
            texts.append(text + "b")
    assert seen == ["a", "ab", "abb", "abbb"]
    if (child := os.fork()) == 0:
        os._exit(0 if list(texts) == seen else 1)
    assert os.waitpid(child, 0)[1] == 0 and list(texts) == seen


def test_texts_by_id_are_a_dict():
    texts = Texts()
    by_id = TextsById({}, texts)
    truth = {f"d{i}": f"text {i}" for i in range(20)}
    for key, text in truth.items():
        by_id.indices[key] = texts.append(text)
    assert by_id == truth and list(by_id) == list(truth) and len(by_id) == 20
    assert list(by_id.values()) == list(truth.values()) and list(by_id.items()) == list(truth.items())
    assert "d3" in by_id and "text 3" not in by_id and by_id.get("x") is None and by_id.keys() == truth.keys()
    with pytest.raises(KeyError):
        by_id["x"]


def test_texts_stand_where_the_verb_has_room(tmp_path, monkeypatch):
    """Also in folders that are not made yet, in a verb inside another, and without a folder for temporary
    files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    outer.mkdir(), inner.mkdir()
    with texts_in(outer / "not" / "there") as kept:
        first = Texts()
        first.append("aé")
        with texts_in(inner) as more:
            second = Texts()
            assert second.append("日") == 0
        first.append("b" * 10)
        third = Texts()
        third.append("")
        assert (kept.num_bytes, more.num_bytes) == (13, 3)
    where = [os.readlink(f"/proc/self/fd/{texts._file.fileno()}") for texts in (first, second, third)]
    assert [Path(name.split(" (deleted)")[0]).parent for name in where] == [outer, inner, outer]
    assert first[:] == ["aé", "b" * 10] and second[0] == "日" and not [*inner.iterdir()]
    with pytest.raises(UserError, match="absent: No such file or directory; set TMPDIR to a folder with"):
        Texts()
    with texts_in(None) as kept:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        Texts().append("c" * 2**20)
        kept.num_bytes *= 512
        assert kept.said() == f"0.5 GiB of texts stand in {tmp_path} (TMPDIR)"


def test_a_full_disk_is_said():
    texts = Texts()
    texts._file.close()
    texts._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    texts.append("x")
    with pytest.raises(
        UserError, match=r"texts cannot be kept in .*: No space left on device; set TMPDIR to a folder"
    ):
        texts[0]
    with pytest.raises(UserError, match=r"kept in /nowhere: No such file or directory; it has to have room"):
        Texts("/nowhere")


MEASURE = """
import json, resource, sys, threading, time
from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.readers import read_beir, read_rows

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

before = peak()
if sys.argv[1] == "beir":
    beir = read_beir(DatasetConfig(path=sys.argv[2], split="train"))
    count = sum(len(text) for text in beir.corpus.values())
else:
    count = sum(len(row.pos[0]) for row in read_rows(DatasetConfig(path=sys.argv[2])))
print(json.dumps([peak() - before, count]))
"""


@pytest.mark.parametrize("reader", ["beir", "rows"])
def test_a_corpus_is_never_in_memory(tmp_path, reader):
    """400 documents of 500 kB, each judged: 200 MB of text in less than 24 MiB."""
    folder, size = tmp_path / "beir", 500_000
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w") as corpus:
        for i in range(400):
            corpus.write(json.dumps({"_id": f"d{i}", "text": f"{i:06d} " * (size // 7)}) + "\n")
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": f"q {i}"}) + "\n" for i in range(400))
    )
    rows = "".join(f"q{i}\td{i}\t1\n" for i in range(400))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, reader, str(folder)], cwd=root, capture_output=True, text=True,
        check=True, env={**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    grown, characters = json.loads(run.stdout)
    assert characters == 400 * (size // 7 * 7)
    assert grown < 24, f"{grown:.0f} MiB"
