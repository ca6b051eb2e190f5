"""BM25 as Lucene computes it, on plain words: the baseline that an embedding model has to beat.

score(q, d) = sum over words w of q (as often as they occur in q) of  idf(w) * tf(w, d) / (tf(w, d) + k1 * (1 - b + b * |d| / mean |d|))
idf(w) = ln(1 + (N - df(w) + 0.5) / (df(w) + 0.5))

k1 = 1.2 and b = 0.75 are Lucene's and Elasticsearch's defaults, never tuned on the data at hand. Words are lower-cased runs
of letters, digits and underscores (Unicode); no stemming and no stop words, which in English are worth a few points more.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import sparse

WORD = re.compile(r"\w+")


class Bm25:
    """An index over `texts` in memory: one fp32 per (document, distinct word of it)."""

    def __init__(self, texts: Iterable[str], k1: float = 1.2, b: float = 0.75):
        self.vocabulary: dict[str, int] = {}
        words = array("q")
        lengths = []
        for text in texts:
            ids = [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words_of(text)]
            words.extend(ids)
            lengths.append(len(ids))
        self.num_documents = len(lengths)
        # N documents, V words. Summing duplicates turns occurrences into term frequencies.
        indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        counts_NV = sparse.csr_array(
            (np.ones(len(words), dtype=np.float32), np.frombuffer(words, dtype=np.int64), indptr),
            shape=(self.num_documents, len(self.vocabulary)),
        )
        counts_NV.sum_duplicates()
        frequency = np.bincount(counts_NV.indices, minlength=len(self.vocabulary))
        idf_V = np.log1p((self.num_documents - frequency + 0.5) / (frequency + 0.5))
        mean_length = len(words) / max(len(lengths), 1) or 1.0
        saturation_N = k1 * (1 - b + b * np.array(lengths, dtype=np.float64) / mean_length)
        tf, saturation = counts_NV.data, np.repeat(saturation_N, np.diff(counts_NV.indptr))
        counts_NV.data = (idf_V[counts_NV.indices] * tf / (tf + saturation)).astype(np.float32)
        self.weights_VN = sparse.csr_array(counts_NV.T)

    def top(self, queries: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(document numbers, scores) of each query, best first, ties by number; only documents that share a word with it."""
        results = []
        for query in queries:
            known = [self.vocabulary[word] for word in words_of(query) if word in self.vocabulary]
            columns, occurrences = np.unique(np.array(known, dtype=np.int64), return_counts=True)
            scores_N = occurrences.astype(np.float32) @ self.weights_VN[columns]
            found = np.flatnonzero(scores_N)
            if len(found) > k:
                # Ties at the k-th score stay in until the sort has put the lower number first.
                kth = np.partition(scores_N[found], len(found) - k)[len(found) - k]
                found = found[scores_N[found] >= kth]
            found = found[np.argsort(-scores_N[found], kind="stable")][:k]
            results.append((found, scores_N[found]))
        return results


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())
