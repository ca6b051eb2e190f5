from __future__ import annotations

import json

import numpy as np
import pytest
from toy_mining import FakeEmbedder, KnownVectors, Row, lines_of, make_rows, mine, on_ranks, pool_of

from nemo_embed_core.config import DatasetConfig, Selection
from nemo_embed_core.data.normal_form import normal_form
from nemo_embed_core.data.readers import Row as ReadRow
from nemo_embed_core.data.readers import read_rows
from nemo_embed_core.data.statistics import script
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.corpus import Corpus, encode_corpus
from nemo_embed_core.mine.formats import _prompted
from nemo_embed_core.mine.lists import TeacherSearch
from nemo_embed_core.mine.pool import Exclusions
from nemo_embed_core.mine.report import plot_report
from nemo_embed_core.mine.search.exclude import Exclude
from nemo_embed_core.mine.selection import ceiling, choose


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """fsync guards against power cuts, which no test here has; the files of a thousand small runs would wait
    for it."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.mark.parametrize("threshold", [0.5, 0.95, 1.0])
def test_negatives_are_those_of_brute_force_and_nothing_forbidden_is_returned(tmp_path, threshold):
    rows, k = make_rows(45), 4
    output = tmp_path / "mined.jsonl"
    report = mine(
        rows, output, threshold=threshold, num_negatives=k, prompt="Instruct: x\nQuery: ", dtype="float32"
    )
    embedder = FakeEmbedder()
    passages = list(dict.fromkeys(t for r in rows for t in (*r.pos, *r.neg)))
    first_of = {}
    for text in passages:
        first_of.setdefault(normal_form(text), text)
    mined = lines_of(output)
    assert [m["query"] for m in mined] == [r.query for r in rows] and [m["pos"] for m in mined] == [
        r.pos for r in rows
    ]
    vectors = {t: embedder.vector(t).astype(np.float32).astype(np.float64) for t in passages}
    for row, line in zip(rows, mined, strict=True):
        q = embedder.vector("Instruct: x\nQuery: " + row.query).astype(np.float32).astype(np.float64)
        s_pos = [float(q @ vectors[t]) for t in row.pos]
        np.testing.assert_allclose(line["pos_scores"], s_pos, atol=1e-6)
        known = {normal_form(row.query)} | {
            normal_form(p) for r in rows if r.query == row.query for p in r.pos
        }
        limit = min(s - (1 - threshold) * abs(s) for s in s_pos)
        allowed = [t for t in first_of.values() if normal_form(t) not in known and q @ vectors[t] < limit]
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
    total = len(pool_of(t for r in rows for t in (*r.pos, *r.neg)).texts) + len(rows)
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
    import nemo_embed_core.mine.lists as search

    rows, output = make_rows(50), tmp_path / "out.jsonl"
    mine(rows, tmp_path / "whole.jsonl")
    searched, real = [], search.topk_below

    def dies_at_third(*args, **options):
        if len(searched) == 3:
            raise KeyboardInterrupt
        searched.append(1)
        return real(*args, **options)

    monkeypatch.setattr(search, "topk_below", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        mine(rows, output)
    monkeypatch.setattr(search, "topk_below", lambda *a, **o: searched.append(1) or real(*a, **o))
    mine(rows, output)
    assert len(searched) == 6 + 1  # 51 rows in blocks of 10; the suspects
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
    rows = make_rows(50)
    mine(rows, tmp_path / "one.jsonl")
    embedders = [FakeEmbedder() for _ in range(size)]
    on_ranks(size, lambda ranks: mine(rows, tmp_path / "many.jsonl", embedders[ranks.rank], ranks=ranks))
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    encoded = [text for e in embedders for text in e.encoded]
    assert len(encoded) == len(pool_of(t for r in rows for t in (*r.pos, *r.neg)).texts) + len(rows)
    assert all(e.encoded for e in embedders)


def test_suspects_are_all_above_the_ceiling_and_not_known_and_every_row_that_has_some_is_counted(tmp_path):
    rows = make_rows(40)
    mine(rows, tmp_path / "all.jsonl", threshold=None, num_negatives=500, dtype="float32")
    report = mine(rows, tmp_path / "out.jsonl", threshold=0.5, dtype="float32", sweep=[0.4, 0.6])
    has_some = [
        line["query"]
        for line in lines_of(tmp_path / "all.jsonl")
        if line["neg_scores"][0] >= 0.5 * min(line["pos_scores"])
    ]
    assert report["kept_out"] == {"sampled_queries": 41, "with_a_passage_above_the_ceiling": len(has_some)}
    assert [row["query"] for row in report["suspects"]] == has_some and 0 < len(has_some) < 50
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


def test_a_score_of_exactly_min_score_is_kept():
    scores, ids = np.float32([[0.75, 0.5, 0.25]]), np.array([[7, 8, 9]])
    _, chosen = choose(Selection(num_negatives=3, min_score=0.5), scores, ids, np.ones_like(ids, dtype=bool))
    assert chosen.tolist() == [[7, 8, -1]]


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


# ---------------------------------------------------------------------------------------- against brute force


def drawn_rows(kind: str, seed: int) -> tuple[list[Row], dict[str, np.ndarray], int]:
    """(rows, {text: unit vector}, num_negatives) with what breaks a search: see `kind`."""
    rng = np.random.default_rng(seed)
    num_documents, num_queries, k, width = 60, 14, 5, 8

    def units(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    documents = units(rng.standard_normal((num_documents, width)))
    queries = units(rng.standard_normal((num_queries, width)))
    if kind == "negative scores":
        documents, queries = -np.abs(documents), np.abs(queries)
    elif kind == "zero positives":  # axes: many scores are exactly 0
        documents = np.eye(width)[rng.integers(0, width, num_documents)] * rng.choice(
            [1.0, -1.0], (num_documents, 1)
        )
        queries = np.eye(width)[rng.integers(0, width, num_queries)]
    elif kind == "ties":
        documents = documents[rng.integers(0, 7, num_documents)]
    elif kind == "clustered":
        documents = units(documents[rng.integers(0, 4, num_documents)] + 0.01 * documents)
        queries = units(documents[rng.integers(0, num_documents, num_queries)] + 0.05 * queries)
    elif kind == "N < k":
        num_documents, k = 4, 9
        documents = documents[:4]
    vectors = {f"document {i}": documents[i] for i in range(num_documents)}
    vectors |= {f"query {i}": queries[i] for i in range(num_queries)}
    rows = []
    for i in range(num_queries):
        pos = rng.choice(num_documents, rng.integers(1, 4), replace=False)
        rows.append(Row(f"query {i}", [f"document {j}" for j in pos], []))
    rows.append(Row("query 0", ["document 0"], []))  # the same query with another positive
    others = {f"document {j}" for j in range(num_documents)} | {"query 3"}  # a query that is also a passage
    for text in ("DOCUMENT  1", "Query 0"):  # spelled differently, with a vector of its own
        vectors[text] = queries[int(rng.integers(num_queries))]
        others.add(text)
    rows[-1].neg.extend(sorted(others - set(rows[-1].pos)))
    return rows, {text: vector.astype(np.float32) for text, vector in vectors.items()}, k


def brute_force(rows, vectors, k, threshold):
    """[(texts, scores)] per row: fp64 products of fp32 rows, rounded to fp32; ties by first appearance."""
    first_of = {}
    for text in (t for row in rows for t in (*row.pos, *row.neg)):
        first_of.setdefault(" ".join(text.split()).casefold(), text)
    answers = []
    for row in rows:
        q = vectors[row.query].astype(np.longdouble)
        score = {
            t: np.float32((q * vectors[t].astype(np.longdouble)).sum())
            for t in {*first_of.values(), *row.pos}
        }
        known = {row.query.casefold()} | {p.casefold() for r in rows if r.query == row.query for p in r.pos}
        limit = min(float(score[p]) - (1 - threshold) * abs(float(score[p])) for p in row.pos)
        allowed = [t for key, t in first_of.items() if key not in known and float(score[t]) < limit]
        best = sorted(allowed, key=lambda t: -score[t])[:k]  # stable: first appearance decides ties
        answers.append((best, [score[t] for t in best], limit, known))
    return answers


KINDS = ("random", "negative scores", "zero positives", "ties", "clustered", "N < k")


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0, 1.05])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_corpus_and_number_of_ranks_gives_the_negatives_of_brute_force(
    tmp_path, kind, threshold
):
    rows, vectors, k = drawn_rows(kind, seed=KINDS.index(kind))
    want = brute_force(rows, vectors, k, threshold)
    assert any(texts for texts, *_ in want) or threshold == 0.5
    options = {
        "threshold": threshold,
        "num_negatives": k,
        "dtype": "float32",
        "block_queries": 6,
        "shard_size": 19,
    }
    for size in (1, 2, 3):
        output = tmp_path / f"{size}.jsonl"
        on_ranks(size, lambda ranks: mine(rows, output, KnownVectors(vectors), ranks=ranks, **options))  # noqa: B023
        for line, (texts, scores, limit, known) in zip(lines_of(output), want, strict=True):
            assert line["neg"] == texts
            assert np.array_equal(np.float32(line["neg_scores"]), np.array(scores, np.float32))
            assert all(np.isfinite(s) and s < limit for s in line["neg_scores"])
            assert not known & {normal_form(text) for text in line["neg"]}


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_broken_embedding_of_a_document_is_refused_by_number_and_text(tmp_path, broken):
    rows, vectors, _ = drawn_rows("random", 0)
    vectors["document 7"] = np.full(8, broken, np.float32)
    with pytest.raises(
        UserError, match=r"1 of \d+ embeddings are not unit vectors.* text \d+ \('document 7'"
    ):
        mine(rows, tmp_path / "out.jsonl", KnownVectors(vectors))
    assert not (tmp_path / "out.jsonl").exists()


# ------------------------------------------------------------------------------------------ sweep and report


@pytest.mark.parametrize(
    "options",
    [{}, {"sampling": "random", "seed": 3}, {"range_min": 2, "range_max": 9}, {"absolute_margin": 0.05}],
)
def test_sweep_reports_what_a_run_at_each_threshold_reports_and_leaves_the_output_alone(tmp_path, options):
    rows, sweep = make_rows(30, seed=9), [0.8, 0.05, 0.95, 1.05]
    options = {"dtype": "float32", "num_negatives": 60, **options}
    report = mine(rows, tmp_path / "swept.jsonl", threshold=0.9, sweep=sweep, **options)
    mine(rows, tmp_path / "plain.jsonl", threshold=0.9, **options)
    assert (tmp_path / "swept.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert [entry["threshold"] for entry in report["sweep"]] == sorted(sweep)
    keys = ("with_no_negatives", "with_fewer_than_k", "with_k_negatives", "negatives")
    seen = set()
    for entry in report["sweep"]:
        alone = mine(rows, tmp_path / "alone.jsonl", threshold=entry["threshold"], **options)
        assert {key: entry[key] for key in keys} == {key: alone[key] for key in keys}
        lines = [line for line in lines_of(tmp_path / "alone.jsonl") if line["neg"]]
        margins = [min(line["pos_scores"]) - line["neg_scores"][0] for line in lines]
        scores = [s for line in lines for s in line["neg_scores"]]
        for key, values in (("mean_margin", margins), ("mean_negative_score", scores)):
            assert entry[key] == (pytest.approx(np.mean(values), abs=1e-7) if values else None)
        seen.add(entry["negatives"])
    assert len(seen) > 1


def test_the_reported_statistics_are_of_the_first_search_though_all_queries_are_searched_again(tmp_path):
    rows = np.eye(4, dtype=np.float32)
    nothing = Exclusions(Exclude.from_lists([[]] * 4), Exclude.from_lists([]))
    search = TeacherSearch(
        queries=Corpus([rows]), documents=Corpus([rows]), num_searched=4, exclude=nothing,
        work=tmp_path, log=lambda line: None,
    )  # fmt: skip
    search.top(np.full(4, 2.0), 1)
    first = search.stats
    assert first.num_queries == 4
    search.top(np.full(4, 0.5), 1, np.arange(4))
    assert search.stats is first


def test_sweep_searches_again_only_where_the_first_list_does_not_reach_down(tmp_path):
    """One query, 700 passages in a row below its positive: at 0.5 its list of 260 (4 + 256) from 0.999 ends
    too early."""
    angles = np.concatenate([[0.0, 0.1], np.linspace(0.2, 1.5, 700)])
    names = ["q", "p", *(f"n{i}" for i in range(700))]
    vectors = {n: np.array([np.cos(a), np.sin(a)]) for n, a in zip(names, angles, strict=True)}
    rows = [Row("q", ["p"], names[2:])]
    report = mine(rows, tmp_path / "a.jsonl", KnownVectors(vectors), sweep=[0.5, 0.98], threshold=0.999)
    assert report["search"]["again_for_sweep"] == 1
    alone = mine(rows, tmp_path / "b.jsonl", KnownVectors(vectors), threshold=0.5)
    assert report["sweep"][0]["with_k_negatives"] == alone["with_k_negatives"] == 1
    assert report["sweep"][0]["mean_negative_score"] == pytest.approx(
        np.mean(lines_of(tmp_path / "b.jsonl")[0]["neg_scores"])
    )


def test_shares_by_script_add_up_and_scripts_are_told_by_their_letters(tmp_path):
    for text, want in [
        ("how do plants eat?", "Latin"), ("как едят растения", "Cyrillic"),
        ("植物はどうやって食べますか", "Kana"),
        ("植物如何进食", "Han"), ("나무는", "Hangul"), ("ｆｕｌｌ", "Latin"), ("123 + 4?", "no letters"),
        ("été ñ", "Latin"), ("من أنت", "Arabic"), ("GPU の", "Latin"),
    ]:  # fmt: skip
        assert script(text) == want, text
    rows = [
        *make_rows(20),
        *(Row(f"вопрос {i}", [f"w{i} w{i + 1}"], []) for i in range(5)),
        Row("?", ["w1"], []),
    ]
    said = []
    report = mine(rows, tmp_path / "out.jsonl", log=said.append)
    assert {name: group["queries"] for name, group in report["by_script"].items()} == {
        "Latin": 21, "Cyrillic": 5, "no letters": 1,
    }  # fmt: skip
    for key in ("with_no_negatives", "with_fewer_than_k", "with_k_negatives"):
        assert sum(group[key] for group in report["by_script"].values()) == report[key]
    assert any("Cyrillic" in line for line in said)


def test_shares_by_language_are_as_the_rows_say_and_the_output_keeps_it(tmp_path):
    langs = ("de", "fr", "")
    rows = [ReadRow(row.query, row.pos, row.neg, "f", i, langs[i % 3]) for i, row in enumerate(make_rows(20))]
    said = []
    report = mine(rows, tmp_path / "out.jsonl", log=said.append)
    assert {name: group["queries"] for name, group in report["by_language"].items()} == dict.fromkeys(
        langs, 7
    )
    for key in ("with_no_negatives", "with_fewer_than_k", "with_k_negatives"):
        assert sum(group[key] for group in report["by_language"].values()) == report[key]
    assert any("language of the query" in line for line in said)
    again = list(read_rows(DatasetConfig(path=str(tmp_path / "out.jsonl"))))
    assert [row.lang for row in again] == [row.lang for row in rows]
    assert mine(make_rows(20), tmp_path / "other.jsonl")["by_language"] == {}


def test_a_row_is_mined_with_its_own_instruction_and_keeps_it(tmp_path):
    own = [None, "", "Find"]
    rows = [
        ReadRow(f"{row.query} {i}", row.pos, row.neg, "f", i, prompt=own[i % 3])
        for i, row in enumerate(make_rows(24))
    ]
    mine(rows, tmp_path / "out.jsonl", prompt="Model: ", num_negatives=1, threshold=None, dtype="float32")
    vector, mined = FakeEmbedder().vector, lines_of(tmp_path / "out.jsonl")
    for row, line in zip(rows, mined, strict=True):
        prefix = {None: "Model: ", "": "", "Find": "Instruct: Find\nQuery: "}[row.prompt]
        scores = [float(vector(prefix + row.query) @ vector(text)) for text in row.pos]
        np.testing.assert_allclose(line["pos_scores"], scores, atol=1e-6)
    again = list(read_rows(DatasetConfig(path=str(tmp_path / "out.jsonl"))))
    assert [row.prompt for row in again] == [row.prompt for row in rows]
    converted = [_prompted(line, "Model: ", "") for line in mined[:3]]
    assert [line["query"].removesuffix(rows[i].query) for i, line in enumerate(converted)] == [
        "Model: ", "", "Instruct: Find\nQuery: ",
    ]  # fmt: skip


def test_trivial_negatives_are_those_that_score_like_random_pairs(tmp_path):
    rows = make_rows(40)
    report = mine(rows, tmp_path / "out.jsonl", num_negatives=40, threshold=None)
    median = report["random_pair_score_quantiles"]["0.5"]
    scores = [s for line in lines_of(tmp_path / "out.jsonl") for s in line["neg_scores"]]
    assert 0 < report["trivial_negatives"] == sum(s <= median for s in scores) < len(scores)


@pytest.mark.parametrize("threshold", [0.0, 2.0, -1.0])
def test_threshold_outside_of_zero_to_two_is_refused(tmp_path, threshold):
    with pytest.raises(UserError, match=r"must be in \(0, 2\)"):
        Selection(threshold=threshold)
    with pytest.raises(UserError, match=r"sweep=.*must be in \(0, 2\)"):
        mine(make_rows(3), tmp_path / "out.jsonl", sweep=[threshold])


@pytest.mark.parametrize(
    "damage",
    ['{"half', "[1, 2]", "{}", "null", '{"format": 1}'],
    ids=["half", "list", "empty", "null", "other"],
)
def test_damaged_sidecar_costs_its_shard_or_is_refused_but_is_never_believed(tmp_path, damage):
    texts = [f"text {i}" for i in range(40)]
    options = {"shard_size": 16, "log": lambda _: None}
    whole = encode_corpus(texts, FakeEmbedder(), tmp_path / "d", **options)[:].copy()
    (tmp_path / "d" / "00001.json").write_text(damage)
    embedder = FakeEmbedder()
    if damage.startswith("{") and damage.endswith("}"):  # an object that says something else: by name
        with pytest.raises(UserError, match=r"00001\.npy"):
            encode_corpus(texts, embedder, tmp_path / "d", **options)
        return
    np.testing.assert_array_equal(encode_corpus(texts, embedder, tmp_path / "d", **options)[:], whole)
    assert embedder.encoded == texts[16:32]


@pytest.mark.parametrize("damage", ["npz", "json", "no npz"])
def test_damaged_search_block_is_searched_again(tmp_path, monkeypatch, damage):
    import nemo_embed_core.mine.lists as search

    rows, output = make_rows(50), tmp_path / "out.jsonl"
    mine(rows, output)
    whole = output.read_bytes()
    block = sorted((tmp_path / "out.jsonl.work" / "search").rglob("*.npz"))[2]
    if damage == "npz":
        data = bytearray(block.read_bytes())
        data[len(data) // 2] ^= 1
        block.write_bytes(bytes(data))
    elif damage == "json":
        block.with_suffix(".json").write_text("{")
    else:
        block.unlink()
    searched, real = [], search.topk_below
    monkeypatch.setattr(search, "topk_below", lambda *a, **o: searched.append(1) or real(*a, **o))
    output.unlink()
    mine(rows, output)
    assert len(searched) == 1 + 1 and output.read_bytes() == whole  # one is of the suspects
