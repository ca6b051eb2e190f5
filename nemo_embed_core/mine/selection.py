"""Which documents may be negatives of a query, and which are taken: the Selection of config/mine.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from nemo_embed_core.config import Selection


def ceiling(positive_scores: Any, threshold: float) -> np.ndarray:
    """s - (1 - threshold) * |s|, in fp64: threshold * s for s >= 0, "percentage to positive" in the paper.

    Below 0 threshold * s would lie above s and let everything through.
    """
    s = np.asarray(positive_scores, np.float64)
    return np.where(s >= 0, threshold * s, (2 - threshold) * s)


def ceilings_of(selection: Selection, lowest: np.ndarray) -> np.ndarray:
    """[Q] fp64: a negative's score is below it; of each query's lowest-scoring positive."""
    limits = np.full(len(lowest), np.inf)
    if selection.threshold is not None:
        limits = np.minimum(limits, ceiling(lowest, selection.threshold))
    if selection.absolute_margin is not None:
        limits = np.minimum(limits, lowest.astype(np.float64) - selection.absolute_margin)
    if selection.max_score is not None:
        limits = np.minimum(limits, selection.max_score)
    return limits


def choose(
    selection: Selection, scores: np.ndarray, ids: np.ndarray, below: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """([Q, num_negatives] scores, ids) of the documents found, in their order; -inf and -1 in free places.

    below [Q, num_searched] bool: found, and below every ceiling.
    """
    keep = below.copy()
    keep[:, : selection.range_min] = False
    if selection.min_score is not None:
        keep &= scores >= selection.min_score
    k = selection.num_negatives
    out_scores = np.full((len(scores), k), -np.inf, np.float32)
    out_ids = np.full((len(scores), k), -1, np.int64)
    for i in range(len(scores)):
        left = np.flatnonzero(keep[i])
        if selection.sampling == "random" and len(left) > k:
            # Keyed by the row: a row's sample depends neither on the other rows nor on the number of ranks.
            generator = np.random.Generator(np.random.Philox(key=[selection.seed, i]))
            left = np.sort(generator.choice(left, k, replace=False))
        left = left[:k]
        out_scores[i, : len(left)], out_ids[i, : len(left)] = scores[i, left], ids[i, left]
    return out_scores, out_ids
