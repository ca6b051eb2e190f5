"""Each alarm: a planted fault sets it off, and what is healthy, up to its limit, does not; figures by
formulas that share no code with them."""

import numpy as np
import pytest

from nemo_embed_core.evaluation.alarms import (
    Alarm,
    apart,
    collapse,
    confusion,
    degradation,
    differences,
    no_negatives,
    spread,
    strict_threshold,
    trivial_negatives,
)


def kind(alarm: Alarm | None) -> str:
    return "" if alarm is None else alarm.kind


def test_rows_without_a_negative():
    rows = [128] * 100
    assert kind(no_negatives([0] * 80 + [33] * 20, rows)) == "no_negatives", "5.2 % of 100 steps of 128"
    assert "5.2% of the rows of the last 100 steps" in no_negatives([0] * 80 + [33] * 20, rows).says
    assert no_negatives([0] * 80 + [32] * 20, rows) is None, "5 %"
    assert kind(no_negatives([0] * 80 + [32] * 20, [0] + [128] * 99)) == "no_negatives", "a step of grades"
    assert no_negatives([128] * 19, rows[:19]) is None, "19 steps say nothing"
    assert no_negatives([], []) is None and no_negatives([0] * 20, [0] * 20) is None


def test_negatives_that_teach_nothing():
    assert kind(trivial_negatives([0.0099] * 20)) == "trivial_negatives"
    assert trivial_negatives([0.0099] * 19) is None and trivial_negatives([0.01] * 100) is None
    assert trivial_negatives([0.005] * 99 + [0.6]) is None, "the mean, not the median"
    assert trivial_negatives([float("nan")] * 50) is None


@pytest.mark.parametrize(
    ("none", "few", "documents", "sounds"),
    [(30, 21, 1000, True), (30, 20, 1000, False), (60, 40, 40, False), (0, 60, 41, True)],
)
def test_a_threshold_too_strict(none: int, few: int, documents: int, sounds: bool):
    report = {
        **{"queries": 100, "documents": documents, "num_negatives": 4, "threshold": 0.95},
        **{"with_no_negatives": none, "with_fewer_than_k": few},
    }
    assert kind(strict_threshold(report)) == ("strict_threshold" if sounds else "")


def test_train_and_dev_apart():
    train = [2.0, 1.5, 1.0, 0.8]
    assert kind(apart([3.0, 2.0, 2.05, 2.11], train)) == "apart"
    assert "5.5% above its best of 2 evaluations ago" in apart([3.0, 2.0, 2.05, 2.11], train).says
    assert apart([3.0, 2.0, 2.05, 2.09], train) is None, "within 5 %"
    assert apart([3.0, 2.5, 2.0, 2.2], train) is None, "the best is one evaluation ago"
    assert apart([3.0, 2.0, 2.05, 2.2], [2.0, 0.8, 1.0, 1.5]) is None, "both rise: no overfitting"
    assert apart([], []) is None and apart([1.0, 1.0], [1.0, 1.0]) is None


# ------------------------------------------------------------------------------------------ spread


def of_svd(rows: np.ndarray) -> dict[str, float]:
    """By the singular values of the rows, not by their products."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values = np.linalg.svd(unit - unit.mean(0), compute_uv=False) ** 2
    shares = values[values > 1e-12] / values.sum()
    directions = np.linalg.svd(unit, full_matrices=len(unit) < unit.shape[1])[2]
    sums = np.exp(np.concatenate([unit @ directions.T, -unit @ directions.T], 1)).sum(0)
    pairs = unit @ unit.T
    cosine = (pairs.sum() - np.trace(pairs)) / (len(unit) * (len(unit) - 1))
    return {
        "mean_norm": np.sqrt(cosine + (1 - cosine) / len(unit)),
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
        "isotropy": sums.min() / sums.max(),
    }


@pytest.mark.parametrize(("n", "d", "shift"), [(80, 24, 0.0), (80, 24, 1.5), (30, 50, 0.3), (64, 1, 0.0)])
def test_spread_is_that_of_the_singular_values(n: int, d: int, shift: float):
    rows = np.random.default_rng(n).normal(size=(n, d)) * np.linspace(0.2, 3, d) + shift
    found = spread(rows)
    for name, value in of_svd(rows).items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert found["rows"] == n
    opposite = spread(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    assert opposite["isotropy"] == pytest.approx(1 / np.cosh(1)), "against a direction that no row has"


def test_collapse_to_a_point_to_a_plane_and_none():
    generator = np.random.default_rng(0)
    wide = generator.normal(size=(100, 64))
    assert collapse(spread(wide), "the vectors") is None
    assert spread(wide)["mean_norm"] < 0.3 and spread(wide)["effective_rank"] > 30
    point = wide + 30 * generator.normal(size=64)
    assert kind(collapse(spread(point), "the vectors")) == "collapse"
    plane = wide[:, :2] @ generator.normal(size=(2, 64))
    assert spread(plane)["mean_norm"] < 0.3, "only the rank tells it"
    assert kind(collapse(spread(plane), "the vectors")) == "collapse"
    assert collapse(spread(plane[:63]), "the vectors") is None, "63 rows say nothing"
    same = spread(np.ones((70, 8)))
    assert [same["effective_rank"], same["mean_norm"]] == pytest.approx([1, 1])
    assert kind(collapse(same, "the vectors")) == "collapse"


# ------------------------------------------------------------------------------------------ two scores


def test_a_language_that_got_worse_is_named_and_a_noisy_one_is_not():
    generator = np.random.default_rng(1)
    base = generator.uniform(size=300)
    model = np.clip(base + generator.normal(0, 0.05, 300), 0, 1)
    languages = ["th"] * 100 + ["el"] * 100 + ["en"] * 91 + ["da"] * 9
    model[:100] = np.clip(base[:100] - 0.1, 0, 1)
    found = differences(base, model, None, "mean", languages, 2000, [0])
    assert [one["group"] for one in found] == ["th", "el", "en"], "9 queries have no interval"
    th = found[0]
    assert th["difference"] == pytest.approx((model[:100] - base[:100]).mean(), abs=1e-9)
    assert th["low"] <= th["difference"] <= th["high"] < 0 and found[1]["low"] < 0 < found[1]["high"]
    alarm = degradation(found, "base")
    assert alarm.kind == "degradation" and "worse than base in 1 of 3: th" in alarm.says
    assert degradation(found[1:], "base") is None and degradation([], "base") is None


def test_intervals_of_many_languages_are_wider_and_sound_together_as_often_as_one():
    """Twenty languages without a difference: at 95 % each, four of ten sets have one that is worse."""
    sounded = {1: 0, 20: 0}
    for seed in range(80):
        generator = np.random.default_rng([seed, 7])
        base, model = generator.uniform(size=(2, 400))
        for groups in sounded:
            languages = [f"l{i % groups}" for i in range(400)]
            found = differences(base, model, None, "mean", languages, 500, [seed])
            sounded[groups] += degradation(found, "base") is not None
    # Of 80 at 0.025: 2, standard deviation 1.4; at 95 % for each of twenty languages 32.
    assert sounded[1] <= 8 and sounded[20] <= 8, sounded


def test_grades_are_compared_by_the_tasks_own_statistic():
    generator = np.random.default_rng(2)
    gold = np.repeat(np.arange(6.0), 20)
    good, bad = gold + generator.normal(size=120), gold + 6 * generator.normal(size=120)
    (found,) = differences(good, bad, gold, "spearman", [""] * 120, 1000, [0])
    ranks = [np.argsort(np.argsort(x)) for x in (good, bad)]
    middle = np.argsort(np.argsort(gold, kind="stable"), kind="stable") // 20
    assert found["base"] == pytest.approx(np.corrcoef(ranks[0], middle)[0, 1], abs=1e-9)
    assert found["high"] < 0 and "all queries" in degradation([found], "base").says


def test_an_instruction_that_is_not_read_or_is_another_tasks():
    generator = np.random.default_rng(3)
    own = generator.uniform(size=200)
    for other, said in (
        (own, "is the same in every query"),
        (own + 0.05 + generator.normal(0, 0.02, 200), "higher"),
        (own - 0.05, ""),
        (own + generator.normal(0, 0.1, 200), ""),
    ):
        (found,) = differences(own, other, None, "mean", [""] * 200, 1000, [0])
        alarm = confusion(found, "Classify the sentiment")
        assert (alarm is None) == (not said) and (alarm is None or said in alarm.says)
