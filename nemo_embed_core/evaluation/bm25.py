"""BM25 as Lucene computes it, on plain words: the baseline that an embedding model has to beat.

score(q, d) = sum over words w of q, as often as they occur, of
              idf(w) * tf(w, d) / (tf(w, d) + k1 * (1 - b + b * |d| / mean |d|))
idf(w) = ln(1 + (N - df(w) + 0.5) / (df(w) + 0.5))

K1 and B are Lucene's and Elasticsearch's defaults, never tuned on the data at hand. Words are
lower-cased runs of letters, digits and underscores (Unicode); no stemming and no stop words, which in English
are worth a few points more.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

WORD = re.compile(r"\w+")
K1, B = 1.2, 0.75
REVISION = f"k1={K1}-b={B}"  # of the model, in mteb's words


class Bm25:
    """An index over `texts`, read once: 8 bytes of memory for each (document, distinct word of it).

    queries: where they are known, only their words are kept.
    """

    def __init__(
        self, texts: Iterable[str], k1: float = K1, b: float = B, queries: Iterable[str] | None = None
    ):
        # Of each word the documents that have it, in order, and how often.
        self.postings: defaultdict[str, tuple[array[int], array[int]]] = defaultdict(
            lambda: (array("i"), array("i"))
        )
        asked = None if queries is None else {word for query in queries for word in words_of(query)}
        lengths = array("q")
        for document, text in enumerate(texts):
            words = words_of(text)
            lengths.append(len(words))
            for word, count in Counter(words if asked is None else filter(asked.__contains__, words)).items():
                documents, counts = self.postings[word]
                documents.append(document)
                counts.append(count)
        self.num_documents = len(lengths)
        mean_length = sum(lengths) / max(len(lengths), 1) or 1.0
        self.saturation_N = k1 * (1 - b + b * np.frombuffer(lengths, np.int64) / mean_length)

    def scores(self, query: str) -> np.ndarray:
        """[N] fp32, 0 for a document that shares no word with the query."""
        scores_N = np.zeros(self.num_documents)
        for word, occurrences in Counter(words_of(query)).items():
            if word in self.postings:
                documents, counts = (np.frombuffer(part, np.int32) for part in self.postings[word])
                idf = np.log1p((self.num_documents - len(documents) + 0.5) / (len(documents) + 0.5))
                scores_N[documents] += occurrences * idf * counts / (counts + self.saturation_N[documents])
        return scores_N.astype(np.float32)

    def top(
        self, queries: Iterable[str], k: int, first: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(document numbers, scores) of each query, best first; only documents that share a word with it.

        Of equal scores the document with the lower first[number] comes first, without `first` the lower
        number.
        """
        for query in queries:
            scores_N = self.scores(query)
            found = np.flatnonzero(scores_N)
            if len(found) > k:
                # Ties at the k-th score stay in until the sort has put them in order.
                kth = np.partition(scores_N[found], len(found) - k)[len(found) - k]
                found = found[scores_N[found] >= kth]
            found = found[np.lexsort((found if first is None else first[found], -scores_N[found]))][:k]
            yield found, scores_N[found]


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())
