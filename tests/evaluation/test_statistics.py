"""Intervals hold their level, tests are those of brute force, ranks are mteb's own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.intervals import coverage, ndcg_differences
from nemo_embed_core.evaluation import statistics
from nemo_embed_core.evaluation.borda import borda_points, ranks
from nemo_embed_core.evaluation.retrieval import mteb_imported


@pytest.mark.parametrize("units", [20, 120])
def test_intervals_hold_their_level(units):
    """1,000 simulated sets of queries; plain percentiles have 0.92 at 20."""
    held = coverage(ndcg_differences, units, sets=1000, draws=2000, seed=3)
    assert abs(held["expanded percentile"] - 0.95) <= 0.02, held


def test_an_interval_of_normal_means_is_students():
    generator = np.random.default_rng(0)
    values_n = generator.normal(2, 3, size=12)
    draws_BM = statistics.bootstrap(statistics.mean_of(values_n[None]), 12, 40_000, [1])
    low, high = statistics.interval(draws_BM[:, 0], 12)
    half = 2.20099 * values_n.std(ddof=1) / np.sqrt(12)  # the 97.5 % quantile of 11 degrees
    assert [low, high] == pytest.approx([values_n.mean() - half, values_n.mean() + half], abs=0.06 * half)
    narrow = statistics.interval(draws_BM[:, 0], 12, level=0.5)
    assert low < narrow[0] < narrow[1] < high


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 2000])
def test_quantiles_of_student(degrees):
    from scipy.stats import t

    assert statistics.student(0.975, degrees) == pytest.approx(t.ppf(0.975, degrees), rel=2e-3)


def test_draws_are_those_of_their_seed_in_pieces_of_any_size(monkeypatch):
    """Each draws n units with replacement, and equal models are equal in each."""
    scores_Mn = np.random.default_rng(0).random((3, 41))
    scores_Mn[2] = scores_Mn[0]
    swapped_Mn = scores_Mn[:, ::-1]  # sums in another order
    whole = statistics.bootstrap(statistics.mean_of(scores_Mn), 41, 1003, [5, 6])
    assert whole.shape == (1003, 3) and (whole[:, 0] == whole[:, 2]).all()
    drawn = np.concatenate(list(statistics.counts(41, 1003, [5, 6])))
    assert (drawn.sum(1) == 41).all() and drawn.max() > 3 and abs(drawn.mean(0) - 1).max() < 0.15
    np.testing.assert_allclose(whole[7], [np.average(row, weights=drawn[7]) for row in scores_Mn])
    again = statistics.mean_of(swapped_Mn)(drawn[:, ::-1])
    np.testing.assert_array_equal(again, whole)
    monkeypatch.setattr(statistics, "CELLS", 410)
    np.testing.assert_array_equal(
        statistics.bootstrap(statistics.mean_of(scores_Mn), 41, 1003, [5, 6]), whole
    )
    assert (statistics.bootstrap(statistics.mean_of(scores_Mn), 41, 1003, [5, 7]) != whole).any()


def brute_p(differences: np.ndarray) -> float:
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))]
    return float(np.mean([total >= abs(differences.sum()) - 1e-9 for total in sums]))


def test_sign_flips_are_those_of_brute_force(monkeypatch):
    """Exact where all patterns are tried, near it where they are drawn; in pieces too; zeros do nothing."""
    differences_n = np.random.default_rng(1).normal(0.4, 1, size=11).round(1)  # with ties
    exact = brute_p(differences_n)
    assert statistics.sign_flip(differences_n, 2048, [0]) == pytest.approx(exact, abs=1e-12)
    drawn = statistics.sign_flip(differences_n, 2000, [0])
    assert drawn == pytest.approx(exact, abs=0.03) and drawn != exact
    padded = np.concatenate([np.zeros(5), differences_n])
    assert statistics.sign_flip(padded, 2048, [0]) == pytest.approx(exact, abs=1e-12)
    monkeypatch.setattr(statistics, "CELLS", 100)
    assert statistics.sign_flip(differences_n, 2048, [0]) == pytest.approx(exact, abs=1e-12)
    assert statistics.sign_flip(np.zeros(9), 2000, [0]) == 1.0
    assert statistics.sign_flip(np.ones(300), 2000, [0]) == 1 / 2001, "never 0"


def test_a_p_of_no_difference_is_uniform():
    """Of 2,000 sets without a difference, 5 % have p < 0.05."""
    generator = np.random.default_rng(2)
    values = [statistics.sign_flip(generator.exponential(size=10) - generator.exponential(size=10), 1024, [0])
              for _ in range(1000)]  # fmt: skip
    assert 0.03 < np.mean(np.array(values) < 0.05) < 0.07 and 0.45 < np.mean(values) < 0.55


def test_holm_steps_down():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0] and statistics.holm([]) == []


def test_borda_ranks_are_mtebs_with_ties_and_missing_tasks():
    """Five models by both of mteb's functions: the leaderboard's, and that of Benchmark.get_score."""
    with mteb_imported():
        import polars
        from mteb.benchmarks._create_table import _borda_rank_from_long, _get_borda_rank

    generator = np.random.default_rng(3)
    models, seen = list("abcde"), set()
    for _ in range(40):
        scores_TM = generator.integers(0, 4, size=(6, 5)) / 4  # many ties
        scores_TM[generator.random((6, 5)) < 0.2] = np.nan
        scores_TM[0] = np.arange(5)  # a model without any task is not on the board
        own = ranks(borda_points(scores_TM).sum(0)).tolist()
        wide = {f"t{i}": [None if np.isnan(x) else x for x in row] for i, row in enumerate(scores_TM)}
        theirs = polars.DataFrame(wide).select(_get_borda_rank(list(wide))).to_series().to_list()
        long = [
            {"model_name": model, "task_name": task, "score": score}
            for task, row in wide.items()
            for model, score in zip(models, row, strict=True)
            if score is not None
        ]
        board = dict(_borda_rank_from_long(polars.DataFrame(long)).iter_rows())
        assert own == theirs == [board[model] for model in models], scores_TM
        seen.add(len(set(own)))
    assert len(seen) > 1, "ranks with ties and without"
