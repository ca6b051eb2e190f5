"""Paired statistics of scores: bootstrap intervals, sign-flip tests, Holm's correction.

    M models · n units (queries of a task, or tasks) · B draws

Everything is drawn from one seed and paired: in a draw, all models have the same queries. The intervals hold
their level on simulated data (`python -m benchmarks.intervals`, docs/evaluation.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
CELLS = 1 << 22  # counts of queries in draws that are in memory at a time, 32 MB
_NORMAL = NormalDist()

# Of counts [B, n], how often each unit is in a draw: the score of each model in it, [B, M].
Statistic = Callable[[np.ndarray], np.ndarray]


# ------------------------------------------------------------------------------------------ bootstrap


def counts(units: int, draws: int, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """Pieces of [B, n] int64, rows of np.bincount(n units drawn with replacement); the same for one seed."""
    generator = np.random.default_rng(seed)
    step = max(1, CELLS // units)
    for begin in range(0, draws, step):
        size = min(step, draws - begin)
        drawn = generator.integers(units, size=(size, units))
        drawn += units * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units)


def bootstrap(statistic: Statistic, units: int, draws: int, seed: Sequence[int]) -> np.ndarray:
    """[B, M]: the statistic of every draw."""
    return np.concatenate([statistic(part) for part in counts(units, draws, seed)])


def mean_of(scores_Mn: np.ndarray) -> Statistic:
    """counts @ scores.T / n: the means of the drawn units; scores in [-1, 1].

    In steps of 2^-32, of which 2^20 have an exact sum in any order: models that tie in a draw are equal.
    """
    steps_nM = np.round(scores_Mn * 2.0**32).T
    return lambda counts_Bn: counts_Bn @ steps_nM / (2.0**32 * scores_Mn.shape[1])


def interval(draws: np.ndarray, units: int, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) over the first axis: the expanded percentile interval of a bootstrap over `units`.

    The quantiles a and 1 - a of the draws, with a = Phi(-sqrt(n / (n - 1)) * t), t the quantile
    (1 + level) / 2 of Student's distribution with n - 1 degrees: of normal means it is the t interval. The
    plain percentiles and BCa are too narrow for few units (Hesterberg, arXiv:1411.5279, section 5.3).
    """
    assert units > 1, "one unit has no interval"
    tail = _NORMAL.cdf(-math.sqrt(units / (units - 1)) * student(0.5 + level / 2, units - 1))
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def student(probability: float, degrees: int) -> float:
    """Quantile of Student's distribution for probability > 0.5: exact for 1 and 2 degrees, else the
    Cornish-Fisher series (Abramowitz and Stegun 26.7.5), within 2 % of it at 3 and 0.3 % from 4 on."""
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = _NORMAL.inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


# ------------------------------------------------------------------------------------------ tests


def sign_flip(differences_n: np.ndarray, draws: int, seed: Sequence[int]) -> float:
    """Two-sided p of a mean difference of 0 between paired units: each sign is as likely as the other.

    The share of sign patterns whose |sum| is at least the observed one: of all 2^n where they are no more
    than `draws`, else of `draws` random ones and the observed one.
    """
    differences_n = differences_n[differences_n != 0]  # their sign changes nothing
    size = len(differences_n)
    if not size:
        return 1.0
    # Patterns that tie with the observed one count, whatever the rounding of their sums.
    least = abs(differences_n.sum()) - 1e-9 * np.abs(differences_n).sum()
    is_exact = 2.0**size <= draws
    generator = np.random.default_rng(seed)
    step = max(1, CELLS // size)
    total, found = (2**size, 0) if is_exact else (draws + 1, 1)
    for begin in range(0, 2**size if is_exact else draws, step):
        numbers = np.arange(begin, min(begin + step, 2**size if is_exact else draws))
        if is_exact:
            is_minus = (numbers[:, None] >> np.arange(size)) & 1
        else:
            is_minus = generator.integers(2, size=(len(numbers), size), dtype=np.int8)
        sums = differences_n.sum() - 2 * (is_minus @ differences_n)
        found += int((np.abs(sums) >= least).sum())
    return found / total


def bootstrap_p(draws_B: np.ndarray) -> float:
    """Two-sided p of a difference of 0: twice the smaller share of draws on one side of it, 0 on both."""
    sides = ((draws_B <= 0).sum() + 1, (draws_B >= 0).sum() + 1)
    return min(1.0, 2 * float(min(sides)) / (len(draws_B) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down: the k-th smallest of m times m - k + 1, never less than the ones before, at most 1.

    To reject those below 0.05 keeps the chance of any false rejection below 0.05, however they depend.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, which in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[which]))
        adjusted[which] = least
    return adjusted
