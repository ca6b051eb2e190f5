"""Losses that no step is taken with: not finite, or far above those before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from nemo_embed_core.data.packing import MicroBatch
from nemo_embed_core.parallel.collectives import gather_objects

NON_FINITE_EXIT_CODE = 4


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite: the step was refused on all ranks and the weights are as before
    it."""


def refuse_non_finite(
    step: int,
    updates: int,
    totals: Mapping[str, float],
    losses_B: Tensor,
    rows: np.ndarray,
    batches: Sequence[MicroBatch],
) -> None:
    """Before the optimizer touches a weight; the sums are the same on all ranks, so all ranks refuse
    together.

    step: those done, `updates` of which were made.
    """
    if np.isfinite(totals["loss"]) and np.isfinite(totals["grad_norm"]):
        return
    mine = np.concatenate([b.rows for b in batches])
    bad = sorted(
        {row for part in gather_objects(mine[~losses_B.isfinite().cpu().numpy()].tolist()) for row in part}
    )
    where = f"rows with a non-finite loss: {shown(bad)}" if bad else "every loss is finite, a gradient is not"
    advice = "Lower optim.lr, or look at these rows."
    if not updates:  # of every step so far the update was left out, or there was none
        advice = (
            "No update was made yet, so optim.lr is not the cause: the weights that were read are finite, "
            "but too large for their activations, or these rows are special; precision=fp32 tells a range "
            "of numbers from a wrong model."
        )
    raise NonFiniteError(
        f"step {step + 1}: loss {totals['loss'] / totals['rows']}, gradient norm {totals['grad_norm']}; "
        f"the step was refused and the weights are those of step {step}. {where} (rows of the step: "
        f"{shown(rows)}). {advice}"
    )


def shown(rows: Sequence[int] | np.ndarray) -> str:
    numbers = [int(row) for row in rows]
    return f"{numbers[:32]}" + (f" and {len(numbers) - 32} more" if len(numbers) > 32 else "")


class LossWindow:
    """Tells a loss far above those of the last steps: z = (loss - mean) / max(std, 0.01 |mean|).

    Mean and (population) std are over the last 100 steps; below 20 of them there is no z. A spike enters the
    window as mean + limit x std: it does not hide the next one, and a level that stays becomes the new
    normal. `losses` is the whole state; checkpoints carry it, so that a resumed run decides as the
    uninterrupted one.
    """

    SIZE, FEWEST = 100, 20

    def __init__(self, limit: float, losses: Iterable[float] = ()):
        self.limit = limit
        self.losses = [float(loss) for loss in losses][-self.SIZE :]

    def judge(self, loss: float) -> float | None:
        """z of a finite loss, which then belongs to the window; a spike is z > limit."""
        z = None
        if len(self.losses) >= self.FEWEST:
            mean = math.fsum(self.losses) / len(self.losses)
            variance = math.fsum((x - mean) ** 2 for x in self.losses) / len(self.losses)
            std = max(math.sqrt(variance), 0.01 * abs(mean), 1e-12)
            z = (loss - mean) / std
            loss = min(loss, mean + self.limit * std)
        self.losses = [*self.losses, loss][-self.SIZE :]
        return z
