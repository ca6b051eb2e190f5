"""Scores of a task that are no means of its rows, in every draw of a bootstrap: of predictions [M, n] against
gold [n], with counts [B, n] of how often a row is in a draw, [B, M]."""

from __future__ import annotations

import numpy as np

from nemo_embed_core.evaluation.statistics import Statistic, mean_of


def statistic_of(name: str, values_Mn: np.ndarray, gold_n: np.ndarray | None) -> Statistic:
    """name: "mean" of the values ("none": of NaN), or "spearman" or "average_precision" of predictions."""
    if gold_n is None:
        assert name in ("mean", "none"), name
        return mean_of(values_Mn)
    one = {"spearman": spearman, "average_precision": average_precision}[name]
    return lambda counts_Bn: np.stack([one(counts_Bn, row_n, gold_n) for row_n in values_Mn], axis=1)


def midranks(counts_Bn: np.ndarray, values_n: np.ndarray) -> np.ndarray:
    """[B, n]: rank of each row among all that a draw has, ties and copies the mean of theirs, from 1."""
    order, groups_n, starts = _groups(values_n)
    size_BG = np.add.reduceat(counts_Bn[:, order], starts, axis=1)
    return (size_BG.cumsum(axis=1) - (size_BG - 1) / 2)[:, groups_n]


def spearman(counts_Bn: np.ndarray, predicted_n: np.ndarray, gold_n: np.ndarray) -> np.ndarray:
    """[B]: Pearson's correlation of the midranks; 0 in a draw where one side has one value."""
    if np.isnan(predicted_n).any():
        return np.full(len(counts_Bn), np.nan)
    sides = [midranks(counts_Bn, values_n) - (counts_Bn.sum(1, keepdims=True) + 1) / 2
             for values_n in (predicted_n, gold_n)]  # fmt: skip
    covariance, first, second = (
        (counts_Bn * a * b).sum(1) for a, b in ((sides[0], sides[1]), (sides[0],) * 2, (sides[1],) * 2)
    )
    spread = np.sqrt(first * second)
    return np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)


def average_precision(counts_Bn: np.ndarray, predicted_n: np.ndarray, gold_n: np.ndarray) -> np.ndarray:
    """[B]: sum over thresholds of (recall gained) * precision, as scikit-learn's; 0 without a positive."""
    if np.isnan(predicted_n).any():
        return np.full(len(counts_Bn), np.nan)
    order, _, starts = _groups(-predicted_n)
    counted_Bn = counts_Bn[:, order]
    all_BG, found_BG = (
        np.add.reduceat(part, starts, axis=1) for part in (counted_Bn, counted_Bn * gold_n[order])
    )
    seen_BG, total_B = all_BG.cumsum(axis=1), found_BG.sum(1)
    precision_BG = np.divide(found_BG.cumsum(axis=1), seen_BG, out=np.zeros(seen_BG.shape), where=seen_BG > 0)
    return (found_BG * precision_BG).sum(1) / np.maximum(total_B, 1)


def closeness(values_Mn: np.ndarray, gold_n: np.ndarray) -> np.ndarray:
    """[M, n]: 1 - |rank of the prediction - rank of the gold| / n, to see where models differ."""
    ones = np.ones((1, len(gold_n)), np.int64)
    wanted = midranks(ones, gold_n)[0]
    found = [row if np.isnan(row).any() else midranks(ones, row)[0] for row in values_Mn]
    return 1 - np.abs(np.stack(found) - wanted) / len(gold_n)


def _groups(values_n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order, group of each value, where in the order each group begins); a group is of equal values."""
    _, groups_n = np.unique(values_n, return_inverse=True)
    order = np.argsort(groups_n, kind="stable")
    starts = np.flatnonzero(np.diff(groups_n[order], prepend=-1))
    return order, groups_n, starts
