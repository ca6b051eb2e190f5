"""What a query must never be given, and what of the data is counted: normal form, siblings, classes,
truncation, given negatives."""

from __future__ import annotations

import base64
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from toy_mining import FakeEmbedder, KnownVectors, lines_of, mine, on_ranks

import nemo_embed_core.mine.corpus as corpus_module
import nemo_embed_core.mine.lists as search_module
from nemo_embed_core.data.normal_form import normal_key
from nemo_embed_core.data.readers import Row
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.corpus import encode_corpus, read_truncation
from nemo_embed_core.mine.pool import Document, Pool
from nemo_embed_core.mine.teachers import Teacher


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


def row(query: str, pos: list[str], neg: list[str] | None = None, **more: Any) -> Row:
    return Row(query, pos, neg or [], "file", 1, **more)


class Words(FakeEmbedder):
    """A token is a word: texts are cut at max_length words, and counted."""

    def tokenize(self, texts, prompt="", max_length=512):
        words = [(prompt + text).split() for text in texts]
        ids = [np.array([hash(w) % 2**31 for w in one[:max_length]], np.int32) for one in words]
        return ids, sum(len(one) > max_length for one in words)

    def encode(self, texts, prompt="", max_length=512):
        return super().encode([" ".join((prompt + text).split()[:max_length]) for text in texts])


# ------------------------------------------------------------------------------------------ the same text

SAME = {
    "nfd": "Cafe\u0301 Zu\u0308rich opens at nine o'clock",
    "fullwidth": "\uff23\uff41\uff46\u00e9 Zürich opens at nine o'clock",
    "curly": "Café Zürich opens at nine o\u2019clock",
    "period": "Café Zürich opens at nine o'clock.",
    "zwsp": "Café\u200b Zürich opens at nine o'clock",
    "bom": "\ufeffCafé Zürich opens at nine o'clock",
    "softhyphen": "Café Zür\u00adich opens at nine o'clock",
    "nbsp": "Café\u00a0Zürich opens at nine o'clock",
    "case": "CAFÉ ZÜRICH OPENS AT NINE O'CLOCK",
}


def test_no_spelling_of_a_positive_is_a_negative_and_what_is_another_text_may_be(tmp_path):
    positive = "Café Zürich opens at nine o'clock"
    others = [f"{positive} and closes at five", "trains run at nine"]
    rows = [row("when does it open", [positive], [*SAME.values(), *others])]
    report = mine(rows, tmp_path / "o.jsonl", threshold=None, num_negatives=20)
    assert sorted(lines_of(tmp_path / "o.jsonl")[0]["neg"]) == sorted(others)
    assert report["duplicates_removed"] == len(SAME) and report["noise"]["negative_equals_positive"] == 1


def test_queries_that_are_equal_in_normal_form_share_what_is_relevant(tmp_path):
    rows = [
        row("capital of france", ["Paris is the capital of France"]),
        row("Capital of  France", ["The French capital is Paris"]),
        row("capital of france?", ["France has Paris as its capital"]),
        *(row(f"other {i}", [f"thing {i}"]) for i in range(4)),
    ]
    report = mine(rows, tmp_path / "o.jsonl", threshold=None, num_negatives=20)
    for line in lines_of(tmp_path / "o.jsonl")[:3]:
        assert sorted(line["neg"]) == [f"thing {i}" for i in range(4)]
    assert report["noise"]["same_query_rows"] == 2


def test_rows_that_teach_nothing_are_counted_and_a_large_share_of_them_is_a_warning(tmp_path):
    rows = [
        row("\u200b", ["p one"], ["n one"]),
        row("what is x", ["the answer"], ["The  answer.", "b"]),
        row("y", ["Y"], ["c"]),
        row("z", ["d"], ["Z?"]),
        *[row("q", ["e", "f"], ["g"]), row("Q", ["F", "e!"], ["g"])],
        row("r", ["\ufffd\ufffd"], ["h"]),
    ]
    said: list[str] = []
    report = mine(rows, tmp_path / "few.jsonl", log=said.append)
    assert report["noise"] == {
        "duplicate_rows": 1, "same_query_rows": 1, "query_without_content": 1, "document_without_content": 1,
        "query_equals_positive": 1, "query_equals_negative": 1, "negative_equals_positive": 1,
        "negative_equals_positive_when_cut": 0, "negatives_equal_to_a_positive_when_cut": 0,
    }  # fmt: skip
    assert report["documents_without_content"] == 1
    assert not any("\ufffd\ufffd" in line["neg"] for line in lines_of(tmp_path / "few.jsonl"))
    assert sum("  warning: 1 " in line for line in said) == 7
    many = [row(f"w{i}", [f"w{i} w{i + 1}"]) for i in range(200)]
    mine([*rows, *many], tmp_path / "many.jsonl", log=said.clear() or said.append)
    assert not any("warning: 1 " in line for line in said) and any(
        line.startswith("  1 rows stand") for line in said
    )


# ------------------------------------------------------------------------------------------ classes


def classes(count: int = 6) -> list[Row]:
    texts = {
        c: [f"{c} text number {i} about {c}" for i in range(count)] for c in ("sports", "politics", "food")
    }
    return [row(t[i], [t[(i + 1) % count]], group=c) for c, t in texts.items() for i in range(count)]


@pytest.mark.parametrize("most", [1, 7, 1 << 24])
def test_no_document_of_the_querys_own_class_is_its_negative(tmp_path, monkeypatch, most):
    monkeypatch.setattr(search_module, "MAX_EXCLUDED", most)  # ids that are spelled out at a time
    mine(classes(), tmp_path / "o.jsonl", threshold=None, num_negatives=12)
    for line in lines_of(tmp_path / "o.jsonl"):
        assert len(line["neg"]) == 12 and line["group"] not in " ".join(line["neg"])
    plain = [one._replace(group="") for one in classes()]
    mine(plain, tmp_path / "plain.jsonl", threshold=None, num_negatives=12)
    assert any(
        line["query"].split()[0] in " ".join(line["neg"]) for line in lines_of(tmp_path / "plain.jsonl")
    )
    assert not any("group" in line for line in lines_of(tmp_path / "plain.jsonl"))


# ------------------------------------------------------------------------------------------ truncation


def cut_rows() -> list[Row]:
    boiler = " ".join(f"b{i}" for i in range(8))
    rows = [row(f"reset part {i}", [f"{boiler} part {i}"], [f"{boiler} other {i}"]) for i in range(5)]
    return [*rows, row("reset", [f"short {boiler}"], ["x y", boiler])]


def test_what_is_the_same_once_it_is_cut_is_no_negative_and_is_counted_with_a_hint(tmp_path):
    said: list[str] = []
    options = {"threshold": None, "num_negatives": 30, "query_max_length": 2}
    report = mine(
        cut_rows(), tmp_path / "o.jsonl", Words(), document_max_length=8, log=said.append, **options
    )
    lines = lines_of(tmp_path / "o.jsonl")
    boiler = cut_rows()[-1].neg[1]
    for line in lines[:5]:
        assert sorted(line["neg"]) == sorted(
            [f"short {boiler}", "x y"]
        )  # and none of 10 that are 8 words of boilerplate
    # The positive of the last row is cut to other words. Among its negatives texts that are one to the model
    # are many.
    assert len(lines[5]["neg"]) == 12
    (model,) = report["models"]
    assert (model["documents_truncated"], model["queries_truncated"], model["documents_same_when_cut"]) == (
        11,
        5,
        11,
    )
    assert report["noise"]["negative_equals_positive_when_cut"] == 5
    assert report["noise"]["negatives_equal_to_a_positive_when_cut"] == 5
    assert any("warning: 84.6% of the documents are cut at 8 tokens" in line for line in said)
    assert any("raise --document_max_length" in line for line in said)
    report = mine(cut_rows(), tmp_path / "whole.jsonl", Words(), document_max_length=10, **options)
    assert (
        report["models"][0]["documents_truncated"]
        == 0
        == report["noise"]["negative_equals_positive_when_cut"]
    )
    assert {len(line["neg"]) for line in lines_of(tmp_path / "whole.jsonl")} == {12}
    unknown = mine(cut_rows(), tmp_path / "unknown.jsonl", FakeEmbedder(), **options)
    assert unknown["models"][0]["documents_truncated"] is None


def test_truncation_is_in_the_sidecars_so_that_a_resumed_run_says_the_same(tmp_path):
    options = {"threshold": None, "num_negatives": 30, "document_max_length": 8, "shard_size": 4}
    whole = mine(cut_rows(), tmp_path / "o.jsonl", Words(), **options)
    again = Words()
    again.tokenize = None  # what is there is not tokenised
    again.__class__ = type("Same", (Words,), {"tokenize": lambda *a: pytest.fail("tokenised again")})
    del again.__dict__["tokenize"]
    assert mine(cut_rows(), tmp_path / "o.jsonl", again, **options) == whole and again.encoded == []
    # Shards from before it was counted: tokenised, not encoded.
    for sidecar in (tmp_path / "o.jsonl.work").glob("*/0*.json"):
        have = json.loads(sidecar.read_text())
        for key in ("truncated", "full", "full_keys"):
            del have[key]
        sidecar.write_text(json.dumps(have))
    old = Words()
    assert mine(cut_rows(), tmp_path / "o.jsonl", old, **options) == whole and old.encoded == []


def test_tokens_that_fill_the_length_have_the_key_of_what_is_left(tmp_path):
    texts = ["a b c", "a b c d", "a b", "x a b c", "a b c e"]
    encode_corpus(texts, Words(), tmp_path, max_length=3, shard_size=2, log=lambda _: None)
    found = read_truncation(tmp_path, 3)
    assert found.num_truncated == 3 and found.numbers == [0, 1, 3, 4]
    a, b, x, e = found.keys
    assert a == b == e != x and len(a) == 16
    assert json.loads((tmp_path / "00001.json").read_text())["full"] == base64.b64encode(b"\1\0\0\0").decode()


# --------------------------------------------------------------------------------------- given negatives, ids


def test_given_negatives_are_kept_first_when_asked_and_counted_when_not(tmp_path):
    rows = [
        row(
            "w1 w2",
            ["w1 w2 w3"],
            ["w1 w2 w3 w4", "w30 w31", "W1 w2 w3!"],
            pos_ids=["p"],
            neg_ids=["a", "", "c"],
            id="r1",
        ),
        row("w5 w6", ["w5 w6 w7"], [f"w{i} w{i + 1}" for i in range(20, 26)]),
        row("w8 w9", ["w8 w9 w10"], []),
    ]
    options = {"num_negatives": 4, "threshold": 0.5, "dtype": "float32"}
    report = mine(rows, tmp_path / "o.jsonl", **options)
    plain = lines_of(tmp_path / "o.jsonl")
    kept = mine(rows, tmp_path / "o.jsonl", keep_negatives=True, **options)
    first, second, third = lines_of(tmp_path / "o.jsonl")
    # A spelling of the positive is not kept; what is above the ceiling is; mined ones follow, none twice.
    assert first["neg"][:2] == ["w1 w2 w3 w4", "w30 w31"] and len(first["neg"]) == len(set(first["neg"])) == 4
    assert first["neg"][2:] == [t for t in plain[0]["neg"] if t not in first["neg"][:2]][:2]
    assert first["neg_scores"][0] > 0.5 * first["pos_scores"][0]
    embedder = FakeEmbedder()
    want = [float(embedder.vector("w1 w2") @ embedder.vector(t)) for t in first["neg"]]
    np.testing.assert_allclose(first["neg_scores"], want, atol=1e-6)
    assert (first["id"], first["pos_ids"], first["neg_ids"][:2]) == ("r1", ["p"], ["a", None])
    assert second["neg"] == rows[1].neg and third["neg"] == plain[2]["neg"] and "id" not in third
    counts = {
        key: report["given_negatives"][key]
        for key in ("given", "at_or_above_the_ceiling", "known_to_be_relevant")
    }
    assert counts == {"given": 9, "at_or_above_the_ceiling": 1, "known_to_be_relevant": 1}
    assert kept["with_k_negatives"] == 3 and kept["given_negatives"]["kept"] is True


def test_documents_judged_irrelevant_are_no_suspects(tmp_path):
    rows = [row("w1 w2", ["w1 w2 w3"], ["w1 w2", "w1 w2 w4"]), row("w5", ["w5 w6"], ["w9"])]
    near = mine(rows, tmp_path / "o.jsonl", threshold=0.5)["suspects"]
    assert near[0]["above_ceiling"][0]["text"] == "w1 w2 w4"
    judged = mine(rows, tmp_path / "j.jsonl", threshold=0.5, negatives_are_judged=True)
    assert judged["suspects"] == [] and judged["kept_out"]["with_a_passage_above_the_ceiling"] == 0
    documents = [Document("w1 w2 w3 w1", "d7")]
    named = mine(rows, tmp_path / "n.jsonl", threshold=0.5, negatives_are_judged=True, documents=documents)
    assert [s["id"] for s in named["suspects"][0]["above_ceiling"]] == ["d7"]


# ------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("method", ["fp32", "bf16", "int8"])
def test_dot_products_of_rows_of_any_length_are_mined_as_brute_force_finds_them(tmp_path, method):
    rng = np.random.default_rng(7)
    rows = [row(f"q{i}", [f"d{i}"], [f"d{j}" for j in range(200)] if i == 0 else []) for i in range(20)]
    rows[0] = rows[0]._replace(neg=rows[0].neg[1:])
    texts = [*(f"d{i}" for i in range(200)), *(f"q{i}" for i in range(20))]
    # Norms over five orders of magnitude.
    x = rng.standard_normal((220, 24)) * np.exp(rng.uniform(-6, 6, (220, 1)))
    model = KnownVectors(dict(zip(texts, x.astype(np.float32), strict=True)))
    teacher = Teacher.of(model, similarity="dot")
    report = mine(rows, tmp_path / "o.jsonl", teacher, method=method, threshold=0.9, num_negatives=5)
    assert report["models"][0]["dtype"] == "float32" and report["models"][0]["similarity"] == "dot"
    found = 0
    for one, line in zip(rows, lines_of(tmp_path / "o.jsonl"), strict=True):
        q = model.vectors[one.query].astype(np.longdouble)
        scores = {f"d{i}": float(np.float32((q * model.vectors[f"d{i}"]).sum())) for i in range(200)}
        s = scores[one.pos[0]]
        limit = s - 0.1 * abs(s)
        want = sorted(
            (t for t in scores if scores[t] < limit and t not in one.pos), key=lambda t: -scores[t]
        )[:5]
        assert line["neg"] == want
        found += len(want)
    assert found > 50
    with pytest.raises(UserError, match="not unit vectors"):
        mine(rows, tmp_path / "cosine.jsonl", model)
    model.vectors["d5"] = model.vectors["d5"] * np.float32(1e7)
    with pytest.raises(UserError, match=r"which float16 cannot hold: --dtype float32"):
        mine(rows, tmp_path / "half.jsonl", Teacher.of(model, similarity="dot"), dtype="float16")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_written_negative_reaches_the_written_ceiling_and_those_that_rounding_could_move_are_counted(
    tmp_path, dtype
):
    angles = np.concatenate([np.linspace(0.3, 0.9, 4001), [0.2]])
    vectors = {f"d{i}": np.array([np.cos(a), np.sin(a)]) for i, a in enumerate(angles)}
    vectors["q"] = np.array([1.0, 0.0])
    rows = [row("q", [f"d{len(angles) - 1}"], [f"d{i}" for i in range(len(angles) - 1)])]
    options = {"threshold": 0.9, "num_negatives": 60, "dtype": dtype}
    report = mine(rows, tmp_path / "o.jsonl", KnownVectors(vectors), **options)
    (line,) = lines_of(tmp_path / "o.jsonl")
    scores = np.array([np.float32(s) for s in line["neg_scores"]], np.float64)
    limit = 0.9 * float(np.float32(line["pos_scores"][0]))
    assert (scores < limit).all() and len(scores) == 60
    error = {"float16": 2.0**-10 + 2.0**-24 * 2**0.5, "float32": 0.0}[dtype]
    assert report["storage"] == {
        "dtype": dtype, "score_error": error,
        "negatives_within_it": int((limit - scores <= 2.1 * error).sum()) if error else 0,
    }  # fmt: skip
    # The model's own scores, before rounding, of those that count as safe are below the ceiling of the
    # model's own score.
    true = np.array([vectors[t] @ vectors["q"] for t in line["neg"]])
    safe = limit - scores > 2.1 * error
    assert (true[safe] < 0.9 * np.cos(0.2)).all() and (dtype == "float32" or 0 < safe.sum() < 60)


# ----------------------------------------------------------------------- whatever the ranks, in little memory


@pytest.mark.parametrize("keep", [False, True])
def test_groups_cuts_and_given_negatives_are_the_same_bytes_on_any_number_of_ranks(tmp_path, keep):
    rows = [*classes(), *cut_rows()]
    options = {
        "document_max_length": 8,
        "num_negatives": 5,
        "threshold": 1.5,
        "keep_negatives": keep,
        "shard_size": 7,
    }
    outputs = set()
    for size in (1, 2, 3):
        output = tmp_path / f"{size}.jsonl"
        on_ranks(size, lambda ranks: mine(iter(rows), output, Words(), ranks=ranks, **options))  # noqa: B023
        outputs.add(output.read_bytes() + output.with_name(output.name + ".report.json").read_bytes())
    assert len(outputs) == 1


def test_long_texts_are_read_a_few_at_a_time_and_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 1 << 20)
    num, size = 600, 100_000  # 60 MB

    class Lengths(FakeEmbedder):
        most = 0

        def encode(self, texts, prompt="", max_length=512):
            self.most = max(self.most, sum(map(len, texts)))
            return np.stack([self.vector(text[:20]) for text in texts]).astype(np.float32)

    rows = (
        row(f"query {i}", [f"document {i} ".ljust(size, "x")], [f"negative {i} ".ljust(size, "y")])
        for i in range(num // 2)
    )
    embedder = Lengths()
    mine([row("a", ["b"])], tmp_path / "warm.jsonl", embedder)
    tracemalloc.start()
    try:
        mine(rows, tmp_path / "o.jsonl", embedder, shard_size=1000, num_negatives=1, threshold=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert embedder.most <= 1 << 20
    assert peak < 15e6, f"{peak / 1e6:.0f} MB"


def test_pool_numbers_what_is_searched_first_and_finds_the_text_that_stands_for_another():
    pool = Pool({b"-" * 16})
    places = [pool.add(t) for t in ("A b", "a b!", "c", "\u200b", "a  B", "a b!")]
    pool.close()
    assert pool.number(np.array(places)).tolist() == [0, 2, 1, 3, 4, 2] and pool.num_searched == 2
    assert list(pool.texts) == ["A b", "c", "a b!", "\u200b", "a  B"] == pool.texts[0:5]
    assert pool.searched(np.arange(5)).tolist() == [0, 1, 0, 0] and [
        *map(pool.searched_by_key, map(normal_key, ("A B.", "\u200b")))
    ] == [0, None]
