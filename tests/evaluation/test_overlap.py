"""Texts of a task that are in training data: what is planted is found with its kind and place, and nothing
else, as brute force has it."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tiny import train_config

from nemo_embed_core.data.contained import COMMON, contained, run_hashes
from nemo_embed_core.data.near import CHARACTERS
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation import overlap as module
from nemo_embed_core.evaluation.overlap import Seen, lines, overlap, refuse, training_data, words

VOCABULARY = [a + b for a in ("ka", "lo", "mi", "tu", "re", "so", "ni", "pa") for b in
              ("ter", "bin", "gos", "lam", "wex", "dri", "fon", "zul")]  # fmt: skip


def text(generator: random.Random, count: int) -> str:
    return " ".join(f"{generator.choice(VOCABULARY)}{generator.randrange(9)}" for _ in range(count))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Forty documents of 60 words and forty queries of 12; of ten of each the training rows have a copy."""
    generator = random.Random(5)
    queries = {f"q{i}": text(generator, 12) for i in range(40)}
    documents = {f"d{i}": text(generator, 60) for i in range(40)}
    rows = [{"query": text(generator, 12), "pos": [text(generator, 60)], "neg": [text(generator, 40)]}
            for _ in range(50)]  # fmt: skip

    def edited(name: str, count: int) -> str:
        own = documents[name].split()
        for at in generator.sample(range(0, len(own), 10), count):
            own[at] = "edited"
        return " ".join(own)

    rows[3]["query"] = queries["q7"].upper() + " ?"
    rows[4]["pos"] = [documents["d1"].replace(" ", "  ").title() + "."]
    rows[5]["neg"] = [edited("d2", 3)]  # J 0.8 to 0.9
    rows[6]["pos"] = [" ".join(documents["d3"].split()[10:45])]
    rows[7]["pos"] = [text(generator, 80) + " " + documents["d4"] + " " + text(generator, 80)]
    rows[8]["query"] = documents["d5"]  # of the other side
    rows[9]["neg"] = [" ".join(documents["d6"].split()[:14])]  # 7 runs are no evidence
    rows[10]["pos"] = [" ".join(documents["d7"].split()[:30] + text(generator, 30).split())]  # a half
    rows[11] = rows[3] | {"pos": rows[4]["pos"]}
    path = write_rows(tmp_path_factory.mktemp("planted") / "train.jsonl", rows)
    return path, {"queries": queries, "documents": documents}


def test_what_is_planted_is_found_and_nothing_else(planted):
    path, texts = planted
    found = overlap(texts, [str(path)], lambda line: None)
    assert found["texts"] == 150 and found["distinct"] == 147
    own = {side: {one["id"]: (one["kind"], one["where"].rsplit(":")[-1]) for one in found[side]["first"]}
           for side in texts}  # fmt: skip
    assert own == {
        "queries": {"q7": ("exact", "4")},
        "documents": {"d1": ("exact", "5"), "d5": ("exact", "9"), "d2": ("near", "6"), "d3": ("cut", "7"),
                      "d4": ("cut", "8")},
    }  # fmt: skip
    counts = ("of", "exact", "near", "cut", "looked_at")
    assert [found["documents"][name] for name in counts] == [40, 2, 1, 2, 40]
    assert found["documents"]["share"] == pytest.approx(5 / 40) and found["queries"]["share"] == 1 / 40
    assert words(found) == "queries 2.50%, documents 12.50%" and words(None) == "not looked for"
    assert "documents: 2 of 40 exact, 1 near and 2 cut, together 12.50%" in "\n".join(lines(found))


@pytest.mark.parametrize("characters", [1 << 23, 2000])
def test_a_text_at_the_end_of_a_long_page_is_cut(tmp_path: Path, monkeypatch, characters: int):
    """Behind more characters than a near-duplicate is told by, on either side; pieces of several texts or of
    one."""
    generator = random.Random(3)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", characters)
    page, other = (text(generator, 1500) for _ in range(2))
    assert len(page) > CHARACTERS
    passage, short = text(generator, 40), text(generator, 120)
    task = {"documents": {"d0": passage, "d1": f"{other} {short}", "d2": text(generator, 40)}}
    rows = [{"query": "a question", "pos": [f"{page} {passage}"], "neg": [short]}]
    found = overlap(task, [str(write_rows(tmp_path / "train.jsonl", rows))], lambda line: None)["documents"]
    assert {one["id"]: one["kind"] for one in found["first"]} == {"d0": "cut", "d1": "cut"}


def test_a_sample_is_looked_at_for_what_is_no_exact_copy(planted, monkeypatch):
    path, texts = planted
    monkeypatch.setattr(module, "SAMPLED", 20)
    found = overlap(texts, [str(path)], lambda line: None)["documents"]
    assert (found["exact"], found["looked_at"]) == (2, 20), "exact copies are looked for among all"
    assert found["share"] == pytest.approx(2 / 40 + (found["near"] + found["cut"]) / 20)
    assert 0 <= found["near"] + found["cut"] <= 3


def test_strict_names_the_queries(planted):
    path, texts = planted
    found = overlap(texts, [str(path)], lambda line: None)
    refuse(found, 0.025, "wiki")
    with pytest.raises(UserError, match=r"2\.50% of the queries of wiki .* strict=2\.40%: q7 .*jsonl:4"):
        refuse(found, 0.024, "wiki")


def of_brute_force(a: str, b: str) -> float:
    ours, theirs = ({tuple(w[i : i + 8]) for i in range(len(w) - 7)} for w in (a.split(), b.split()))
    return len(ours & theirs) / min(len(ours), len(theirs)) if min(len(ours), len(theirs)) >= 8 else 0.0


def test_containment_is_that_of_runs_of_eight_words():
    generator = random.Random(1)
    for _ in range(60):
        whole = text(generator, generator.randrange(8, 90)).split()
        part = whole[generator.randrange(20) :][: generator.randrange(1, 70)]
        if part and generator.random() < 0.5:
            part[generator.randrange(len(part))] = "edited"
        a, b = " ".join(whole), " ".join(part) or "one"
        assert contained(a, b) == contained(b, a) == pytest.approx(of_brute_force(a, b))
    hashes, owner = run_hashes([["a"] * 9, ["b"] * 7, ["a"] * 8, []])
    assert owner.tolist() == [0, 0, 2] and len(set(hashes.tolist())) == 1, "no run goes over a text's end"


def test_boilerplate_of_many_texts_is_no_evidence_and_that_of_few_is():
    generator = random.Random(2)
    shared = text(generator, 30)
    for count, expected in ((COMMON + 1, 0), (COMMON - 1, COMMON - 1)):
        texts = {str(i): f"{shared} {text(generator, 2)}" for i in range(count)}
        index = module.ContainedIndex(range(count), lambda i, own=texts: own[str(i)])
        shown = f"{text(generator, 60)} {shared} {text(generator, 60)}"
        index.show([0], [shown.split()])
        assert len(index.found) == expected, count


def test_keys_are_new_once(monkeypatch):
    generator, seen, known = np.random.default_rng(0), Seen(), set()
    for size in (1, 7, 300, 2, 2, 40, 5, 1000, 1):
        keys = generator.integers(0, 800, size).astype(np.uint64)
        keys[-1] = np.uint64(2**64 - 1)
        is_new = seen.new(keys)
        expected = []
        for key in keys.tolist():
            expected.append(key not in known)
            known.add(key)
        assert is_new.tolist() == expected and len(seen) == len(known)
    sizes = [len(part) for part in seen._parts]
    assert all(a > 2 * b for a, b in itertools.pairwise(sizes))


# ------------------------------------------------------------------------------------------ training data


def test_training_data_of_a_run_a_store_a_folder_and_none(tmp_path: Path):
    from nemo_embed_core.data.build import open_store
    from nemo_embed_core.data.tokenizer import load_tokenizer

    config = train_config(tmp_path)
    store = open_store(config.data, load_tokenizer(config.tokenizer), lambda line: None)
    assert [d.path for d in training_data(str(store.folder)).datasets] == [str(tmp_path / "train.jsonl")]
    (tmp_path / "rows").mkdir()
    (tmp_path / "train.jsonl").rename(tmp_path / "rows/dev.jsonl")
    (tmp_path / "rows/train.jsonl").write_bytes((tmp_path / "rows/dev.jsonl").read_bytes())
    for name, split in ((f"{tmp_path}/rows:dev", "dev"), (f"{tmp_path}/rows", "train")):
        (dataset,) = training_data(name).datasets
        assert (dataset.path, dataset.split) == (f"{tmp_path}/rows", split)
    with pytest.raises(UserError, match=r"training=.*rows:test: "):
        training_data(f"{tmp_path}/rows:test")
    (tmp_path / "rows/dev.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say what it was trained on: give its run"):
        training_data(str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"training=.*nothing: "):
        training_data(str(tmp_path / "nothing"))
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"training=.*train\.jsonl"):
        training_data(str(store.folder))
