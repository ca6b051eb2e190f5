import math
import random
import socket

import numpy as np
import pytest
import torch

from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.data.readers import Beir
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.retrieval import (
    DEPTH,
    METRICS,
    Best,
    evaluate_bm25,
    evaluate_retrieval,
    similarity_of,
)

NUM_DOCUMENTS = 30


class TableEncoder:
    """Vectors out of a table {text: vector}; records what it was asked for."""

    def __init__(self, table: dict[str, list[float]], digest: str = "table"):
        self.table, self.digest = table, digest
        self.calls: list[tuple[int, str, int]] = []

    def encode(self, texts, prompt="", max_length=512, side=None):
        self.calls.append((len(texts), prompt, max_length))
        return np.array([self.table[text] for text in texts], dtype=np.float32)


def ranked(ranking: dict[str, list[str]]) -> tuple[TableEncoder, dict[str, str]]:
    """An encoder for which the documents d0, d1, ... score for each query in the given order; the rest come
    after.

    Query i asks for channel i, where document d has 1 / (1 + its rank); a last channel brings every row to
    unit length.
    """
    corpus = {f"d{i}": f"text of d{i}" for i in range(NUM_DOCUMENTS)}
    scores = np.zeros((NUM_DOCUMENTS, len(ranking)))
    for column, first in enumerate(ranking.values()):
        order = first + [document for document in corpus if document not in first]
        for rank, document in enumerate(order):
            scores[int(document[1:]), column] = (1 - rank / 100) / math.sqrt(len(ranking))
    rows = np.concatenate([scores, np.sqrt(1 - (scores**2).sum(1, keepdims=True))], axis=1)
    queries = dict(zip(ranking, np.eye(len(ranking), len(ranking) + 1), strict=True))
    return TableEncoder({**queries, **dict(zip(corpus.values(), rows, strict=True))}), corpus


def test_a_known_ranking_gives_the_figures_calculated_by_hand():
    encoder, corpus = ranked({"a": ["d1", "d2", "d3"], "b": ["d7", "d8"], "c": [f"d{i}" for i in range(11)]})
    qrels = {
        "qa": {"d3": 1},  # rank 3
        "qb": {"d8": 1, "d7": 0, "d29": 1},  # rank 2 and one far away; d7 is judged not relevant
        "qc": {"d10": 1},  # rank 11: outside
    }
    queries = {"qa": "a", "qb": "b", "qc": "c"}
    ndcg = [1 / math.log2(4), (1 / math.log2(3)) / (1 + 1 / math.log2(3)), 0.0]
    scores = evaluate_retrieval(encoder, Beir(corpus, queries, qrels))
    assert scores.keys() == {"ndcg_at_10", "recall_at_10", "mrr_at_10", "per_query", "truncated"}
    assert [row["ndcg_at_10"] for row in scores["per_query"]] == pytest.approx(ndcg)
    assert [row["found"][:2] for row in scores["per_query"]] == [["d1", "d2"], ["d7", "d8"], ["d0", "d1"]]
    assert scores["truncated"] == {"query": None, "document": None}  # this encoder cannot say
    # mteb rounds nDCG and recall to five digits
    assert scores["ndcg_at_10"] == pytest.approx(sum(ndcg) / 3, abs=1e-5)
    assert scores["recall_at_10"] == pytest.approx((1 + 1 / 2 + 0) / 3, abs=1e-5)
    assert scores["mrr_at_10"] == pytest.approx((1 / 3 + 1 / 2 + 0) / 3, abs=1e-5)


def test_graded_relevance_counts_in_ndcg():
    encoder, corpus = ranked({"a": ["d1", "d2"]})
    scores = evaluate_retrieval(encoder, Beir(corpus, {"q": "a"}, {"q": {"d1": 1, "d2": 3}}))
    expected = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert scores["ndcg_at_10"] == pytest.approx(expected, abs=1e-5)


def test_a_perfect_encoder_scores_one_and_gets_prompts_and_lengths():
    ranking = {f"query {i}": [f"d{i}"] for i in range(20)}
    encoder, corpus = ranked(ranking)
    queries = {f"q{i}": text for i, text in enumerate(ranking)}
    beir = Beir(corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(20)})
    prompts = {"one": Prompts("Q: ", "D: "), "two": Prompts("not ", "these ")}
    usage = Usage(prompts=prompts, query_max_length=33, document_max_length=44)
    scores = evaluate_retrieval(encoder, beir, usage)
    assert [scores[metric] for metric in METRICS] == [1.0, 1.0, 1.0]
    assert encoder.calls == [(20, "Q: ", 33), (NUM_DOCUMENTS, "D: ", 44)]
    encoder.calls.clear()
    evaluate_retrieval(encoder, beir)
    assert {(prompt, length) for _, prompt, length in encoder.calls} == {("", 512)}


@pytest.mark.parametrize("digests", [("one", "two"), ("same", "same")])
def test_two_models_never_share_scores(digests):
    """mteb's default cache goes by name and revision; here even equal digests give every model its own
    figures."""
    good, corpus = ranked({"a": ["d5"]})
    bad, _ = ranked({"a": [f"d{i}" for i in range(NUM_DOCUMENTS) if i != 5]})
    good.digest, bad.digest = digests
    beir = Beir(corpus, {"q": "a"}, {"q": {"d5": 1}})
    assert evaluate_retrieval(good, beir)["ndcg_at_10"] == 1.0
    assert evaluate_retrieval(bad, beir)["ndcg_at_10"] == 0.0
    assert evaluate_retrieval(good, beir)["ndcg_at_10"] == 1.0


def test_evaluation_touches_neither_network_nor_random_state(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    encoder, corpus = ranked({"a": ["d5"]})
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    evaluate_retrieval(encoder, Beir(corpus, {"q": "a"}, {"q": {"d5": 1}}))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_texts_are_encoded_and_scored_in_pieces_with_the_same_figures(monkeypatch):
    corpus = {f"d{i}": f"text {i}" for i in range(1500)}
    angle = {text: [math.cos(i / 1000), math.sin(i / 1000)] for i, text in enumerate(corpus.values())}
    encoder = TableEncoder({**angle, "a": [math.cos(1.4), math.sin(1.4)]})
    monkeypatch.setattr("nemo_embed_core.evaluation.retrieval.MAX_SCORES", 100)
    monkeypatch.setattr("nemo_embed_core.evaluation.retrieval.PIECE_CHARACTERS", 5000)
    scores = evaluate_retrieval(encoder, Beir(corpus, {"q": "a"}, {"q": {"d1400": 1, "d3": 1}}))
    counts = [count for count, _, _ in encoder.calls]
    assert counts[0] == 1 and sum(counts[1:]) == 1500 and len(counts) == 4
    assert (scores["mrr_at_10"], scores["recall_at_10"]) == (1.0, 0.5)


def test_the_best_documents_are_exact_with_ties_however_the_corpus_is_split():
    random = np.random.default_rng(0)
    ids = [f"d{i}" for i in random.permutation(300)]
    # About 75 documents share a score.
    scores_QN = torch.from_numpy(random.integers(0, 4, (7, 300)).astype(np.float32))
    scores_QN[3] = 1.0
    expected = {}
    for i, row in enumerate(scores_QN.tolist()):
        pairs = sorted(zip(row, ids, strict=True), reverse=True)[:DEPTH]  # the greater id first
        expected[f"q{i}"] = {document: score for score, document in pairs}
    for step in (300, 64, DEPTH - 1, 1):
        best = Best(7, ids)
        for part_QN in scores_QN.split(step, dim=1):
            best.add(part_QN)
        found = best.found(expected)
        assert {query: list(pairs.items()) for query, pairs in found.items()} == {
            query: list(pairs.items()) for query, pairs in expected.items()
        }


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities_are_those_of_sentence_transformers(name):
    from sentence_transformers.util import cos_sim, dot_score, euclidean_sim, manhattan_sim

    theirs = {"cosine": cos_sim, "dot": dot_score, "euclidean": euclidean_sim, "manhattan": manhattan_sim}[
        name
    ]
    queries, documents = 3 * torch.randn(5, 8), torch.randn(40, 8)
    torch.testing.assert_close(
        similarity_of(name)(queries, documents), theirs(queries, documents), atol=1e-5, rtol=1e-5
    )


def test_nan_embeddings_are_an_error_and_not_a_score():
    encoder, corpus = ranked({"a": ["d5"]})
    encoder.table[corpus["d9"]] = [math.nan, 0.0]
    with pytest.raises(UserError, match=r"1 of 30 document embeddings have NaN .*'text of d9'"):
        evaluate_retrieval(encoder, Beir(corpus, {"q": "a"}, {"q": {"d5": 1}}))


def test_bm25_goes_through_the_same_evaluator_and_a_query_without_a_match_counts_as_a_failure():
    corpus = {"d0": "red apple", "d1": "green pear", "d2": "red red pear"}
    queries = {"qa": "apple", "qb": "red", "qc": "zebra"}
    qrels = {"qa": {"d0": 1}, "qb": {"d0": 1}, "qc": {"d1": 1}}
    scores = evaluate_bm25(Beir(corpus, queries, qrels))
    # apple: rank 1.  red: d2 has it twice, d0 is second.  zebra: nothing.
    assert scores["ndcg_at_10"] == pytest.approx((1 + 1 / math.log2(3) + 0) / 3, abs=1e-5)
    assert scores["recall_at_10"] == pytest.approx(2 / 3, abs=1e-5)
    assert scores["mrr_at_10"] == pytest.approx((1 + 1 / 2 + 0) / 3, abs=1e-5)


def test_nothing_to_evaluate_is_an_error():
    encoder, corpus = ranked({"a": ["d5"]})
    with pytest.raises(UserError, match="0 queries over 30 documents"):
        evaluate_retrieval(encoder, Beir(corpus, {}, {}))
    with pytest.raises(UserError, match="1 of 2 queries have no relevance judgement, the first is q2"):
        evaluate_bm25(Beir(corpus, {"q1": "a", "q2": "b"}, {"q1": {"d5": 1}}))


def test_documents_are_given_to_a_model_without_white_space_around_them_and_queries_as_they_are():
    """As mteb does; a byte-level tokenizer sees the difference."""
    encoder, corpus = ranked({" a ": ["d5"]})  # the encoder knows exactly these texts
    spaced = {document: f"\n {text}  " for document, text in corpus.items()}
    assert evaluate_retrieval(encoder, Beir(spaced, {"q": " a "}, {"q": {"d5": 1}}))["ndcg_at_10"] == 1.0
