from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from typing import NamedTuple

import numpy as np
import pytest

from nemo_embed_core.config import DatasetConfig, UserError
from nemo_embed_core.data.readers import read_rows
from nemo_embed_core.mine.corpus import Corpus, Ranks, encode_corpus
from nemo_embed_core.mine.negatives import Pool, Selection, ceiling, mine_negatives, normalize
from nemo_embed_core.mine.report import plot_report


class Row(NamedTuple):
    query: str
    pos: list[str]
    neg: list[str]


class FakeEmbedder:
    """A unit vector per text, from its words' hashes: texts that share words are near each other."""

    def __init__(self, hidden_size: int = 32, digest: str = "fake", broken: str = ""):
        self.hidden_size, self.digest, self.broken = hidden_size, digest, broken
        self.encoded: list[str] = []
        self.calls_left = 10**9

    def encode(self, texts, prompt="", max_length=512):
        if self.calls_left == 0:
            raise KeyboardInterrupt
        self.calls_left -= 1
        self.encoded += texts
        rows = np.stack([self.vector(prompt + text) for text in texts]).astype(np.float32)
        for i, text in enumerate(texts):
            if text == self.broken:
                rows[i] = np.nan
        return rows

    def vector(self, text):
        total = np.zeros(self.hidden_size)
        for word in text.split() or [""]:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            total += np.random.default_rng(seed).standard_normal(self.hidden_size)
        return total / np.linalg.norm(total)


WORDS = [f"w{i}" for i in range(40)]


def make_rows(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)

    def text(n):
        return " ".join(rng.choice(WORDS, n))

    rows = []
    for i in range(count):
        query = text(4)
        pos = [f"{query} {text(3)}" for _ in range(rng.integers(1, 4))]
        neg = [text(6) for _ in range(rng.integers(0, 3))]
        if i % 7 == 0:  # the positive again, spelled differently, as another row's passage
            neg.append("  " + pos[0].upper().replace(" ", "\t "))
        if i % 5 == 0:
            neg.append(query.capitalize())  # the query itself as a passage
        rows.append(Row(query, pos, neg))
    rows.append(Row(rows[0].query, ["another positive of the first query"], []))
    return rows


def lines_of(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def mine(rows, output, embedder=None, **options):
    fields = {f.name for f in dataclasses.fields(Selection)}
    selection = Selection(**{name: options.pop(name) for name in fields & options.keys()})
    options = {"log": lambda _: None, "shard_size": 16, "block_queries": 10, "selection": selection, **options}
    return mine_negatives(rows, embedder or FakeEmbedder(), output, **options)


@pytest.mark.parametrize("threshold", [0.5, 0.95, 1.0])
def test_negatives_are_those_of_brute_force_and_nothing_forbidden_is_returned(tmp_path, threshold):
    rows, k = make_rows(45), 4
    output = tmp_path / "mined.jsonl"
    report = mine(rows, output, threshold=threshold, num_negatives=k, prompt="Instruct: x\nQuery: ", dtype="float32")
    embedder = FakeEmbedder()
    passages = list(dict.fromkeys(t for r in rows for t in (*r.pos, *r.neg)))
    first_of = {}
    for text in passages:
        first_of.setdefault(normalize(text), text)
    mined = lines_of(output)
    assert [m["query"] for m in mined] == [r.query for r in rows] and [m["pos"] for m in mined] == [r.pos for r in rows]
    vectors = {t: embedder.vector(t).astype(np.float32).astype(np.float64) for t in passages}
    for row, line in zip(rows, mined, strict=True):
        q = embedder.vector("Instruct: x\nQuery: " + row.query).astype(np.float32).astype(np.float64)
        s_pos = [float(q @ vectors[t]) for t in row.pos]
        np.testing.assert_allclose(line["pos_scores"], s_pos, atol=1e-6)
        known = {normalize(row.query)} | {normalize(p) for r in rows if r.query == row.query for p in r.pos}
        limit = min(s - (1 - threshold) * abs(s) for s in s_pos)
        allowed = [t for t in first_of.values() if normalize(t) not in known and q @ vectors[t] < limit]
        want = sorted(allowed, key=lambda t: -(q @ vectors[t]))[:k]
        assert line["neg"] == want
        np.testing.assert_allclose(line["neg_scores"], [q @ vectors[t] for t in want], atol=1e-6)
        assert all(s < limit + 1e-6 for s in line["neg_scores"])
    counts = np.array([len(m["neg"]) for m in mined])
    assert report["with_no_negatives"] == (counts == 0).sum()
    assert report["with_fewer_than_k"] == ((counts > 0) & (counts < k)).sum()
    assert report["with_k_negatives"] == (counts == k).sum()
    assert sum(report["histogram"]["negatives"]) == counts.sum() == report["negatives"]
    assert sum(report["histogram"]["positives"]) == sum(len(r.pos) for r in rows)
    assert report == json.loads((tmp_path / "mined.jsonl.report.json").read_text())


def test_the_trainer_reads_what_mining_wrote_and_scores_survive_the_round_trip(tmp_path):
    rows = [*make_rows(12), Row('quotes " and \u2028 \\ newline\n', ["täxt\tmit\nZeilen"], [])]
    mine(rows, tmp_path / "mined.jsonl", num_negatives=3)
    back = list(read_rows(DatasetConfig(path=str(tmp_path / "mined.jsonl"))))
    assert [(r.query, list(r.pos)) for r in back] == [(r.query, r.pos) for r in rows]
    for line in lines_of(tmp_path / "mined.jsonl"):
        for score in line["pos_scores"] + line["neg_scores"]:
            assert float(np.float32(score)) == pytest.approx(score, rel=1e-7) and len(str(score)) < 16


def test_ceiling_is_below_a_negative_positive_and_equals_percentage_to_positive_otherwise():
    scores = np.array([-0.2, 0.0, 0.6, -1.0])
    limits = ceiling(scores, 0.95)
    assert limits == pytest.approx([-0.21, 0.0, 0.57, -1.05])
    assert (limits <= scores).all() and limits[2] == 0.95 * 0.6


def test_row_whose_positive_scores_below_zero_gets_no_passage_that_beats_it(tmp_path):
    class Signed(FakeEmbedder):
        def vector(self, text):
            angle = {"q": 0.0, "p": 1.7, "near": 1.695, "close": 1.703, "far": 2.5, "opposite": 3.1}[text]
            return np.array([np.cos(angle), np.sin(angle)])

    rows = [Row("q", ["p"], ["near", "close", "far", "opposite"])]
    mine(rows, tmp_path / "mined.jsonl", Signed(2), num_negatives=4, threshold=0.95)
    assert lines_of(tmp_path / "mined.jsonl")[0]["neg"] == ["far", "opposite"]
    # cos(1.695) passes 0.95 * cos(1.7) although it beats the positive; cos(1.703) is within the margin


def test_query_without_candidates_is_kept_with_no_negatives(tmp_path):
    rows = [Row("a b", ["a b c"], []), Row("x y", ["x y z"], ["x y"])]
    report = mine(rows, tmp_path / "out.jsonl", threshold=0.01)
    assert [len(line["neg"]) for line in lines_of(tmp_path / "out.jsonl")] == [
        len(line["neg_scores"]) for line in lines_of(tmp_path / "out.jsonl")
    ]
    assert report["with_no_negatives"] + report["with_fewer_than_k"] == 2


def test_killed_while_encoding_or_searching_and_resumed_gives_the_same_bytes_without_repeating_work(tmp_path):
    rows = make_rows(50)
    mine(rows, tmp_path / "whole.jsonl")
    total = len(Pool.build(t for r in rows for t in (*r.pos, *r.neg)).texts) + len(rows)
    output = tmp_path / "killed.jsonl"
    encoded = 0
    for calls in (1, 3, 0, 2):
        embedder = FakeEmbedder()
        embedder.calls_left = calls
        with pytest.raises(KeyboardInterrupt):
            mine(rows, output, embedder)
        encoded += len(embedder.encoded)
        assert not output.exists()
    last = FakeEmbedder()
    mine(rows, output, last)
    assert encoded + len(last.encoded) == total
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = FakeEmbedder()
    mine(rows, output, again)
    assert again.encoded == []


def test_search_blocks_that_are_there_are_not_searched_again(tmp_path, monkeypatch):
    import nemo_embed_core.mine.negatives as negatives

    rows, output = make_rows(50), tmp_path / "out.jsonl"
    mine(rows, tmp_path / "whole.jsonl")
    searched, real = [], negatives.topk_below

    def dies_at_third(*args, **options):
        if len(searched) == 3:
            raise KeyboardInterrupt
        searched.append(1)
        return real(*args, **options)

    monkeypatch.setattr(negatives, "topk_below", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        mine(rows, output)
    monkeypatch.setattr(negatives, "topk_below", lambda *a, **o: searched.append(1) or real(*a, **o))
    mine(rows, output)
    assert len(searched) == 7  # 51 rows in blocks of 10, and the suspects
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_shard_of_another_model_or_other_texts_is_refused_by_name(tmp_path):
    texts = [f"text {i}" for i in range(40)]
    options = {"shard_size": 16, "log": lambda _: None}
    encode_corpus(texts, FakeEmbedder(), tmp_path / "d", **options)
    for other, changed, word in [
        (FakeEmbedder(digest="other"), {}, "'other'"),
        (FakeEmbedder(), {"max_length": 7}, "max_length"),
        (FakeEmbedder(), {"prompt": "x"}, "prompt"),
        (FakeEmbedder(), {"dtype": "float32"}, "dtype"),
    ]:
        with pytest.raises(UserError, match=r"00000\.npy") as error:
            encode_corpus(texts, other, tmp_path / "d", **options, **changed)
        assert word in str(error.value)
    with pytest.raises(UserError, match=r"00001\.npy.*other texts"):
        encode_corpus([*texts[:20], "changed", *texts[21:]], FakeEmbedder(), tmp_path / "d", **options)


def test_damaged_shard_is_encoded_again_and_only_it(tmp_path):
    texts = [f"text {i}" for i in range(40)]
    whole = encode_corpus(texts, FakeEmbedder(), tmp_path / "d", shard_size=16, log=lambda _: None)[:].copy()
    path = tmp_path / "d" / "00001.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    embedder, said = FakeEmbedder(), []
    corpus = encode_corpus(texts, embedder, tmp_path / "d", shard_size=16, log=said.append)
    assert embedder.encoded == texts[16:32] and any("00001.npy is damaged" in line for line in said)
    np.testing.assert_array_equal(corpus[:], whole)


def test_embedding_that_is_not_a_unit_vector_stops_with_the_text(tmp_path):
    with pytest.raises(UserError, match=r"text 5 .'text 5'.* norm nan"):
        encode_corpus(
            [f"text {i}" for i in range(9)], FakeEmbedder(broken="text 5"), tmp_path / "d", log=lambda _: None
        )
    assert not list((tmp_path / "d").glob("*.json"))


def test_corpus_reads_like_one_array():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((n, 3)).astype(np.float16) for n in (5, 1, 7)]
    whole, corpus = np.concatenate(arrays), Corpus(arrays)
    for a, b in [(0, 13), (0, 5), (4, 7), (5, 6), (12, 13), (3, 3), (0, 0)]:
        np.testing.assert_array_equal(corpus[a:b], whole[a:b])
        part = corpus.part(a, b)
        assert part.shape == (b - a, 3)
        np.testing.assert_array_equal(part[: b - a], whole[a:b])
        if b > a:
            ids = rng.integers(0, b - a, 20)
            np.testing.assert_array_equal(part[ids], whole[a:b][ids])


def test_row_without_positive_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"row 1 .*no positive"):
        mine([Row("a", ["b"], []), Row("c", [], ["d"])], tmp_path / "out.jsonl")


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes_and_encodes_each_text_once(tmp_path, size):
    """Ranks are threads here: encoding, searching and merging only meet in `gather`."""
    rows = make_rows(50)
    mine(rows, tmp_path / "one.jsonl")
    barrier, values, embedders, errors = (
        threading.Barrier(size, timeout=60),
        {},
        [FakeEmbedder() for _ in range(size)],
        [],
    )

    def work(rank):
        def gather(value):
            values[rank] = value
            barrier.wait()
            everyone = [values[r] for r in range(size)]
            barrier.wait()
            return everyone

        try:
            mine(rows, tmp_path / "many.jsonl", embedders[rank], ranks=Ranks(rank, size, gather))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    encoded = [text for e in embedders for text in e.encoded]
    assert len(encoded) == len(Pool.build(t for r in rows for t in (*r.pos, *r.neg)).texts) + len(rows)
    assert all(e.encoded for e in embedders)


def test_suspects_are_above_the_ceiling_and_not_known(tmp_path):
    rows = make_rows(40)
    report = mine(rows, tmp_path / "out.jsonl", threshold=0.5, dtype="float32")
    assert report["suspects"]
    for row in report["suspects"]:
        assert all(
            s["score"] >= 0.5 * row["lowest_positive_score"] and s["text"] not in row["pos"]
            for s in row["above_ceiling"]
        )
    plot_report(report, str(tmp_path / "out.png"))
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_other_limits_are_those_of_their_definitions(tmp_path):
    rows = make_rows(30, seed=4)
    mine(
        rows, tmp_path / "all.jsonl", threshold=None, num_negatives=500, dtype="float32"
    )  # every allowed passage, ranked
    every = lines_of(tmp_path / "all.jsonl")
    for number, (options, allowed) in enumerate([
        ({"absolute_margin": 0.3}, lambda r, s, low: s < low - 0.3 and s < 0.95 * low),
        ({"threshold": None, "max_score": 0.4, "min_score": 0.2}, lambda r, s, low: 0.2 <= s < 0.4),
        ({"range_min": 5}, lambda r, s, low: 5 <= r < 17 and s < 0.95 * low),
        ({"range_min": 2, "range_max": 9, "threshold": 0.8}, lambda r, s, low: 2 <= r < 9 and s < 0.8 * low),
    ]):  # fmt: skip
        mine(rows, tmp_path / f"{number}.jsonl", dtype="float32", **options)
        for whole, line in zip(every, lines_of(tmp_path / f"{number}.jsonl"), strict=True):
            low = min(whole["pos_scores"])
            if low <= 0:
                continue
            ranked = enumerate(zip(whole["neg"], whole["neg_scores"], strict=True))
            assert line["neg"] == [text for r, (text, s) in ranked if allowed(r, s, low)][:4], options


def test_random_sampling_takes_from_the_best_and_repeats_itself(tmp_path):
    rows = make_rows(30, seed=5)
    mine(rows, tmp_path / "top.jsonl", num_negatives=12)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        mine(rows, tmp_path / f"{name}.jsonl", sampling="random", seed=seed)
    a, b, c = ((tmp_path / f"{n}.jsonl").read_bytes() for n in "abc")
    assert a == b and a != c
    for best, line in zip(lines_of(tmp_path / "top.jsonl"), lines_of(tmp_path / "a.jsonl"), strict=True):
        assert set(line["neg"]) <= set(best["neg"]) and len(line["neg"]) == min(4, len(best["neg"]))
        assert line["neg_scores"] == sorted(line["neg_scores"], reverse=True)


def test_duplicates_by_case_and_whitespace_are_neither_returned_nor_searched_twice(tmp_path):
    rows = [
        Row(
            "red fox",
            ["The red fox runs."],
            ["the RED fox\n runs.", "Red  FOX", "a blue whale", "A Blue\twhale", "grass"],
        ),
        Row("RED fox", ["a blue fox"], []),
    ]
    report = mine(rows, tmp_path / "out.jsonl", threshold=None, num_negatives=9)
    first, second = lines_of(tmp_path / "out.jsonl")
    assert sorted(first["neg"]) == sorted(second["neg"]) == ["a blue whale", "grass"]
    assert (report["documents"], report["duplicates_removed"]) == (5, 2)
