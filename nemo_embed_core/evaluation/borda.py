"""Borda's count over tasks, as mteb's leaderboard ranks models by it.

ranks(borda_points(scores_TM).sum(0))
"""

from __future__ import annotations

import numpy as np


def borda_points(scores_M: np.ndarray) -> np.ndarray:
    """[..., M] of one task: M minus the rank, 1 the best, ties the mean of theirs; NaN, not run: 0 points.

    As mteb's leaderboard counts: those that did not run the task still count in M.
    """
    lower = scores_M[..., :, None] < scores_M[..., None, :]
    equal = scores_M[..., :, None] == scores_M[..., None, :]
    rank = 1 + lower.sum(-1) + (equal.sum(-1) - 1) / 2
    return np.where(np.isnan(scores_M), 0.0, scores_M.shape[-1] - rank)


def ranks(points_M: np.ndarray) -> np.ndarray:
    """[..., M] int: 1 + how many have more points."""
    return 1 + (points_M[..., :, None] < points_M[..., None, :]).sum(-1)
