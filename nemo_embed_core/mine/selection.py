"""Which passages may be negatives of a query, and which of those are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nemo_embed_core.errors import UserError


def ceiling(positive_scores: Any, threshold: float) -> np.ndarray:
    """s - (1 - threshold) * |s|, which is threshold * s for s >= 0; in fp64."""
    s = np.asarray(positive_scores, np.float64)
    return np.where(s >= 0, threshold * s, (2 - threshold) * s)


def check_threshold(threshold: float, name: str = "threshold") -> None:
    if not 0 < threshold < 2:
        raise UserError(
            f"{name}={threshold} must be in (0, 2): the ceiling is threshold x the positive's score (the paper uses 0.95; "
            "sentence-transformers' relative_margin is 1 - threshold); above 1 passages that beat the positive pass too"
        )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which of the passages become negatives; the vocabulary of sentence-transformers' mine_hard_negatives.

    threshold is the paper's and 1 - relative_margin there. Every given limit must hold; "below" is strict.
    With several models: see mine/lists.py `combine`.
    """

    num_negatives: int = 4  # per query
    # Score < threshold x positive's (as `ceiling` has it); None: no such limit.
    threshold: float | None = 0.95
    absolute_margin: float | None = None  # score < positive's - absolute_margin
    max_score: float | None = None  # score < max_score
    min_score: float | None = None  # score >= min_score (of the first model): leaves out what is trivial
    range_min: int = 0  # leave out the best range_min passages, whatever they score
    range_max: int | None = None  # and everything after the best range_max
    sampling: Literal["top", "random"] = "top"  # of those left: the best, or a seeded sample
    seed: int = 0
    combine: Literal["intersection", "mean_rank"] = "intersection"  # of several models' lists
    combine_depth: int = 100  # with several models: how many of each one's best passages are combined

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise UserError(f"num_negatives={self.num_negatives} must be at least 1")
        if self.threshold is not None:
            check_threshold(self.threshold)
        if self.range_min < 0 or (self.range_max is not None and self.range_max <= self.range_min):
            raise UserError(
                f"range_min={self.range_min} must be at least 0 and below range_max={self.range_max}"
            )
        if self.min_score is not None and self.max_score is not None and self.min_score >= self.max_score:
            raise UserError(f"min_score={self.min_score} must be below max_score={self.max_score}")
        if self.combine not in ("intersection", "mean_rank"):
            raise UserError(f"combine={self.combine} must be intersection or mean_rank")
        if self.combine_depth < 1:
            raise UserError(f"combine_depth={self.combine_depth} must be at least 1 passage per query")

    @property
    def by_rank(self) -> bool:
        """Ranks count what is above the ceiling too, so the search runs without it and the limits come after."""
        return self.range_min > 0 or self.range_max is not None

    @property
    def num_searched(self) -> int:
        """How many passages per query the search has to return."""
        if self.range_max is not None:
            return self.range_max
        # As many times as sentence-transformers looks at.
        spare = 3 if self.sampling == "random" or self.by_rank else 1
        return self.range_min + spare * self.num_negatives

    def ceilings(self, lowest: np.ndarray) -> np.ndarray:
        """[Q] fp64: what a negative's score must be below, from each query's lowest-scoring positive."""
        limits = np.full(len(lowest), np.inf)
        if self.threshold is not None:
            limits = np.minimum(limits, ceiling(lowest, self.threshold))
        if self.absolute_margin is not None:
            limits = np.minimum(limits, lowest.astype(np.float64) - self.absolute_margin)
        if self.max_score is not None:
            limits = np.minimum(limits, self.max_score)
        return limits

    def choose(self, scores: np.ndarray, ids: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([Q, num_negatives] scores, ids) of what was found, in its order; -inf and -1 where there are too
        few.

        below [Q, num_searched] bool: found, and below every ceiling.
        """
        keep = below.copy()
        keep[:, : self.range_min] = False
        if self.min_score is not None:
            keep &= scores >= self.min_score
        out_scores = np.full((len(scores), self.num_negatives), -np.inf, np.float32)
        out_ids = np.full((len(scores), self.num_negatives), -1, np.int64)
        for i in range(len(scores)):
            left = np.flatnonzero(keep[i])
            if self.sampling == "random" and len(left) > self.num_negatives:
                # Keyed by the row: the sample of a row does not depend on the other rows or on the number of
                # ranks.
                generator = np.random.Generator(np.random.Philox(key=[self.seed, i]))
                left = np.sort(generator.choice(left, self.num_negatives, replace=False))
            left = left[: self.num_negatives]
            out_scores[i, : len(left)], out_ids[i, : len(left)] = scores[i, left], ids[i, left]
        return out_scores, out_ids
