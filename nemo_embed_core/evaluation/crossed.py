"""Intervals of a difference between two ways of training, where seeds and queries both vary.

    S seeds · n queries of a task · T tasks

The difference x_sq of a query in a pair of runs of one seed is  mean + seed_s + query_q + rest_sq. Other
seeds and other queries of these tasks would give another mean, with the variance

    V = V_seeds + V_queries - V_rest,    V_seeds   = var over s of (mean over q) / S      has rest_sq / (S n)
                                         V_queries = var over q of (mean over s) / n      has it too
                                         V_rest    = residual mean square / (S n)

as in reader studies, where readers and cases are crossed (Gallas 2006; Hillis 2007, Stat. Med. 26:596).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nemo_embed_core.evaluation.rank_statistics import statistic_of
from nemo_embed_core.evaluation.statistics import CELLS, LEVEL, student


class Error(NamedTuple):
    """Variance of a mean difference and its degrees of freedom, with the parts of it.

    A part that the data do not show is NaN: seeds of one run.  variance: NaN where nothing tells it, with
    one seed and a task of one query or without scores of its queries.
    """

    variance: float
    degrees: int
    seeds: float
    queries: float

    def half(self, level: float = LEVEL) -> float:
        """Half of the interval for other seeds and other queries; NaN without a variance."""
        if math.isnan(self.variance):
            return math.nan
        return student(0.5 + level / 2, self.degrees) * math.sqrt(self.variance)


def shares(kind: str, values_n: np.ndarray, gold_n: np.ndarray | None) -> np.ndarray:
    """[n]: what each query has in a score, whose mean is the score: of a mean its own score, else the
    jackknife's  n * score - (n - 1) * score without it  (its mean is the score up to O(1 / n)).

    kind, values_n, gold_n: of rank_statistics.statistic_of; "mean" divides by all n, the others by what is
    drawn.
    """
    if kind == "mean":
        return values_n
    n, statistic = len(values_n), statistic_of(kind, values_n[None], gold_n)
    score = statistic(np.ones((1, n), np.int64))[0, 0]
    step, without = max(1, CELLS // n), []
    for begin in range(0, n, step):
        counts = np.ones((min(step, n - begin), n), np.int64)
        counts[np.arange(len(counts)), begin + np.arange(len(counts))] = 0
        without.append(statistic(counts)[:, 0])
    return n * score - (n - 1) * np.concatenate(without)


def error_of(tasks: Sequence[np.ndarray]) -> Error:
    """Of the mean over tasks of the mean over all of [S, n] differences; n is 1 of a task without queries.

    Degrees of freedom after Satterthwaite, at least S - 1. Queries of different tasks are independent, the
    seeds are the same.
    """
    S, T = len(tasks[0]), len(tasks)
    means_S = np.mean([task.mean(1) for task in tasks], axis=0)
    seeds = float(means_S.var(ddof=1)) / S if S > 1 else math.nan
    queries = rest = 0.0
    spread = 0.0  # of the estimated variance: sum of its parts squared over their degrees
    for x_Sn in tasks:
        n = x_Sn.shape[1]
        if n == 1:
            continue
        own = float(x_Sn.mean(0).var(ddof=1)) / n / T**2
        queries, spread = queries + own, spread + own**2 / (n - 1)
        if S > 1:
            residual = x_Sn - x_Sn.mean(1, keepdims=True) - x_Sn.mean(0) + x_Sn.mean()
            own = float((residual**2).sum()) / ((S - 1) * (n - 1)) / (S * n) / T**2
            rest, spread = rest + own, spread + own**2 / ((S - 1) * (n - 1))
    if S == 1:
        smallest = min(x_Sn.shape[1] for x_Sn in tasks)
        return Error(queries if smallest > 1 else math.nan, smallest - 1, seeds, queries)
    spread += seeds**2 / (S - 1)
    variance = max(seeds + queries - rest, seeds, queries)
    degrees = max(S - 1, math.floor(variance**2 / spread)) if spread > 0 else S - 1
    return Error(variance, degrees, seeds, queries)
