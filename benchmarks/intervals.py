"""Whether 95 % intervals of a difference hold 95 %: four bootstrap intervals on simulated queries and tasks.

    python -m benchmarks.intervals [--sets 1000 --draws 10000]

Queries: two models' nDCG@10 of one relevant document, whose ranks share the query's difficulty; many
differences are 0, some 1. Tasks: differences of their own, skewed, each measured on 200 queries. Of `sets`
simulated ones, the share whose interval holds the true mean; and the share of p < 0.05 without a difference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from nemo_embed_core.evaluation.crossed import error_of
from nemo_embed_core.evaluation.statistics import LEVEL, counts, interval, sign_flip, student

NORMAL = NormalDist()
TASK_QUERIES = 200  # of a simulated task

# (generator, sets, units) -> [sets, units] differences whose true mean is 0
Simulate = Callable[[np.random.Generator, int, int], np.ndarray]


def _ndcg(generator: np.random.Generator, sets: int, units: int) -> np.ndarray:
    difficulty = generator.normal(1.2, 1.5, size=(sets, units))
    ranks = np.exp(difficulty + generator.normal(size=(2, sets, units)) + [[[0.0]], [[0.3]]]).astype(int) + 1
    figures = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)
    return figures[0] - figures[1]


TRUE_MEAN = _ndcg(np.random.default_rng(0), 1, 4_000_000).mean()  # to 0.0002


def ndcg_differences(generator: np.random.Generator, sets: int, units: int) -> np.ndarray:
    """Of queries: the second model is worse by 0.06, which is taken off."""
    return _ndcg(generator, sets, units) - TRUE_MEAN


def task_differences(generator: np.random.Generator, sets: int, units: int) -> np.ndarray:
    """Of tasks: their own part is exponential, less its mean; the rest is of their queries."""
    own = 0.03 * (generator.exponential(size=(sets, units)) - 1)
    return own + generator.normal(0, 0.32 / np.sqrt(TASK_QUERIES), size=(sets, units))


def coverage(simulate: Simulate, units: int, sets: int, draws: int, seed: int = 0) -> dict[str, float]:
    """{method: share of intervals that hold the true mean}. All sets share the bootstrap's counts, which
    changes the share of none of them."""
    values_Rn = simulate(np.random.default_rng([seed, units]), sets, units)
    drawn_Bn = np.concatenate(list(counts(units, draws, [seed])))
    draws_BR = drawn_Bn @ values_Rn.T / units
    found = {
        "percentile": np.quantile(draws_BR, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0),
        "expanded percentile": interval(draws_BR, units),
        "BCa": _bca(values_Rn, draws_BR),
        "studentised": _studentised(values_Rn, drawn_Bn, draws_BR),
    }
    return {name: float(((low <= 0) & (high >= 0)).mean()) for name, (low, high) in found.items()}


def _bca(values_Rn: np.ndarray, draws_BR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Efron's bias-corrected and accelerated interval, of a mean."""
    mean_R = values_Rn.mean(1)
    centred = values_Rn - mean_R[:, None]
    below = ((draws_BR < mean_R).mean(0) + (draws_BR <= mean_R).mean(0)) / 2
    bias = np.array([NORMAL.inv_cdf(share) for share in below.clip(1e-6, 1 - 1e-6)])
    acceleration = (centred**3).sum(1) / (6 * (centred**2).sum(1).clip(1e-12) ** 1.5)
    ordered, ends = np.sort(draws_BR, axis=0), []
    for z in (NORMAL.inv_cdf((1 - LEVEL) / 2), NORMAL.inv_cdf((1 + LEVEL) / 2)):
        at = bias + (bias + z) / (1 - acceleration * (bias + z))
        place = np.array([NORMAL.cdf(x) for x in at]) * (len(ordered) - 1)
        ends.append(np.take_along_axis(ordered, place.round().astype(int)[None], axis=0)[0])
    return ends[0], ends[1]


def _studentised(
    values_Rn: np.ndarray, drawn_Bn: np.ndarray, draws_BR: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    mean_R, units = values_Rn.mean(1), values_Rn.shape[1]
    variance_BR = (drawn_Bn @ (values_Rn**2).T / units - draws_BR**2).clip(1e-12)
    low_R, high_R = np.quantile(
        (draws_BR - mean_R) / np.sqrt(variance_BR), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0
    )
    return mean_R - high_R * values_Rn.std(1), mean_R - low_R * values_Rn.std(1)


def false_alarms(units: int, sets: int, draws: int, seed: int = 0) -> float:
    """Share of p < 0.05 where both models are the same but for chance."""
    generator = np.random.default_rng([seed, units])
    values_Rn = _ndcg(generator, sets, units)
    values_Rn *= generator.choice([-1, 1], size=values_Rn.shape)
    return float(np.mean([sign_flip(row, draws, [seed]) < 0.05 for row in values_Rn]))


SPREADS = ((0.02, 0.1, 0.3), (0.0, 0.4, 0.3), (0.1, 0.1, 0.1), (0.0, 0.0, 0.3))  # of seeds, queries, both


def crossed(spreads: tuple[float, float, float], sets: int, seed: int = 7) -> dict[str, float]:
    """Of three seeds by 100 queries, the share of intervals that hold the true mean, 0: of seeds and queries
    (evaluation/crossed.py), of the queries of the seeds' means alone, of the seeds alone."""
    generator, held = np.random.default_rng(seed), np.zeros(3)
    for _ in range(sets):
        x_Sn = generator.normal(0, spreads[0], (3, 1)) + generator.normal(0, spreads[1], 100)
        x_Sn = x_Sn + generator.normal(0, spreads[2], (3, 100))
        error = error_of([x_Sn])
        halves = (error.half(), student(0.975, 99) * error.queries**0.5, student(0.975, 2) * error.seeds**0.5)
        held += abs(x_Sn.mean()) <= np.array(halves)
    return dict(zip(("seeds and queries", "queries", "seeds"), held / sets, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sets", type=int, default=1000, help="simulated sets of queries or tasks (default 1000)"
    )
    parser.add_argument("--draws", type=int, default=10_000, help="of the bootstrap (default 10,000)")
    options = parser.parse_args(arguments)
    for title, simulate, sizes in (
        ("queries", ndcg_differences, (20, 50, 100, 300, 1000)), ("tasks", task_differences, (6, 10, 20, 40)),
    ):  # fmt: skip
        for units in sizes:
            held = coverage(simulate, units, options.sets, options.draws)
            print(
                f"{units:5} {title}  " + "  ".join(f"{name} {share:.3f}" for name, share in held.items()),
                flush=True,
            )
    for spreads in SPREADS:
        shares = "  ".join(f"{name} {share:.3f}" for name, share in crossed(spreads, options.sets).items())
        print("spread of seeds {}, of queries {}, of both {}:  {}".format(*spreads, shares), flush=True)
    for units in (20, 100, 300):
        print(
            f"{units:5} queries  p < 0.05 without a difference {false_alarms(units, options.sets, 1000):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
