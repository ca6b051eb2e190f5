import math
from collections import Counter

import numpy as np

from nemo_embed_core.evaluation.bm25 import Bm25, words_of


def test_scores_equal_a_calculation_by_hand():
    # 3 documents of 4, 2 and 3 words: mean 3. "cat" is in 2 of 3 documents, "sat" in 1.
    bm25 = Bm25(["the cat, the CAT", "a dog", "cat sat down"], k1=1.2, b=0.75)
    idf_cat = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))  # 0.4700
    idf_sat = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))  # 0.9808
    first = idf_cat * 2 / (2 + 1.2 * (0.25 + 0.75 * 4 / 3))  # tf 2 in 4 words
    third = (idf_cat + idf_sat) * 1 / (1 + 1.2 * (0.25 + 0.75 * 3 / 3))
    [(documents, scores)] = bm25.top(["Cat sat?"], k=10)
    assert documents.tolist() == [2, 0]  # the dog shares no word and is not returned
    np.testing.assert_allclose(scores, [third, first], rtol=1e-6)
    np.testing.assert_allclose(scores, [1.4508329 / 2.2, 0.9400073 / 3.5], rtol=1e-6)


def plain_scores(texts: list[str], query: str, k1: float, b: float) -> list[float]:
    """The formula of the module's docstring, one word at a time."""
    counts = [Counter(words_of(text)) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    mean_length = sum(lengths) / len(lengths)
    scores = []
    for count, length in zip(counts, lengths, strict=True):
        score = 0.0
        for word in words_of(query):
            frequency = sum(word in other for other in counts)
            idf = math.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
            score += idf * count[word] / (count[word] + k1 * (1 - b + b * length / mean_length))
        scores.append(score)
    return scores


def test_scores_equal_the_formula_on_random_texts():
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abcdefgh"), random.integers(0, 9))) for _ in range(60)]
    assert "" in texts  # a document without words is never found and divides nothing by zero
    for query in ("a b c", "a a a h", "z", "", "h z"):
        expected = np.array(plain_scores(texts, query, 0.9, 0.4))
        for queries in (None, ["d", query], [query]):  # of all words, or of those that queries ask for
            [(documents, scores)] = Bm25(iter(texts), k1=0.9, b=0.4, queries=queries).top([query], k=100)
            assert sorted(documents.tolist()) == np.flatnonzero(expected).tolist()
            np.testing.assert_allclose(scores, expected[documents], rtol=1e-5)
            assert (np.diff(scores) <= 0).all()


def test_ties_at_the_cut_go_to_the_lower_document_number_or_as_they_are_told_to():
    texts = ["x y"] * 5 + ["x"] + ["x y"] * 5
    [(documents, scores)] = Bm25(texts).top(["x"], k=4)
    assert documents.tolist() == [5, 0, 1, 2]
    assert scores[0] > scores[1] == scores[3]
    [(documents, _)] = Bm25(texts).top(["x"], k=4, first=-np.arange(len(texts)))
    assert documents.tolist() == [5, 10, 9, 8]


def test_words_are_unicode_and_lower_case():
    assert words_of("Ökonomie, naïve_1 Привет!") == ["ökonomie", "naïve_1", "привет"]
