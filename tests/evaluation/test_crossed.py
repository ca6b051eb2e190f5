"""Intervals over seeds and queries: by hand, as a jackknife, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nemo_embed_core.evaluation.crossed import error_of, shares

X_Sn = np.array(
    [[1.0, 2, 3], [3, 4, 8]]
)  # two seeds, three queries: means of seeds 2 and 5, of queries 2, 3, 5.5


def test_the_error_of_two_seeds_and_three_queries_is_as_by_hand():
    """Residuals +-(0.5, 0.5, -1): their mean square is 3 / 2. Variances of the means: 4.5 and 3.25."""
    error = error_of([X_Sn])
    assert error.seeds == pytest.approx(4.5 / 2) and error.queries == pytest.approx(3.25 / 3)
    assert error.variance == pytest.approx(4.5 / 2 + 3.25 / 3 - 1.5 / 6)
    # 3.0833^2 / (2.25^2 + 1.0833^2 / 2 + 0.25^2 / 2) = 1.67, and Student's quantile of one degree.
    assert error.degrees == 1 and error.half() == pytest.approx(12.7062 * math.sqrt(3.083333), rel=1e-4)


def test_tasks_share_their_seeds_and_not_their_queries():
    """The second task's seeds have means 0 and 2, so that the mean over both has 1 and 3.5."""
    error = error_of([X_Sn, np.array([[0.0, 0], [2, 2]])])
    assert error.seeds == pytest.approx(3.125 / 2) and error.queries == pytest.approx(3.25 / 3 / 4)
    assert error.variance == pytest.approx(3.125 / 2 + 3.25 / 3 / 4 - 1.5 / 6 / 4)
    # A task whose queries have no scores tells of seeds alone.
    alone = error_of([np.array([[0.0], [2.0], [7.0]])])
    assert (
        alone.variance == alone.seeds == pytest.approx(13 / 3) and alone.queries == 0 and alone.degrees == 2
    )


def test_one_seed_has_an_interval_for_other_queries_alone():
    error = error_of([X_Sn[:1]])
    assert math.isnan(error.seeds) and error.variance == pytest.approx(1 / 3) and error.degrees == 2


@pytest.mark.parametrize("kind", ["mean", "spearman", "average_precision"])
def test_shares_are_the_scores_or_the_jackknifes(kind):
    """The oracle leaves out each row and asks SciPy or scikit-learn."""
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(0)
    values = generator.normal(size=40)
    gold = (
        np.round(values + generator.normal(size=40)) if kind == "spearman" else (values > 0.3).astype(float)
    )
    if kind == "mean":
        assert shares(kind, values, None) is values
        return
    values = np.round(values + generator.normal(size=40), 1)  # ties

    def score(keep: np.ndarray) -> float:
        if kind == "spearman":
            return spearmanr(values[keep], gold[keep]).statistic
        return average_precision_score(gold[keep], values[keep])

    every = np.ones(40, bool)
    own = [40 * score(every) - 39 * score(every & (np.arange(40) != i)) for i in range(40)]
    assert shares(kind, values, gold) == pytest.approx(own, abs=1e-9)


@pytest.mark.parametrize(
    "seeds, queries, rest", [(0.02, 0.1, 0.3), (0.0, 0.4, 0.3), (0.1, 0.1, 0.1), (0.0, 0.0, 0.3)]
)
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, queries, rest):
    """Three seeds and 100 queries, 2,000 times, with spreads of seeds, queries and both together."""
    generator = np.random.default_rng(7)
    held = 0
    for _ in range(2000):
        x_Sn = generator.normal(0, seeds, (3, 1)) + generator.normal(0, queries, 100)
        x_Sn = x_Sn + generator.normal(0, rest, (3, 100))
        held += abs(x_Sn.mean()) <= error_of([x_Sn]).half()
    # Never below 0.95 - 3 standard errors. Above where the parts are alike: degrees are rounded down.
    assert 0.935 <= held / 2000 <= 0.995, held / 2000
