"""CoSENT (Jianlin Su, 2022; sentence-transformers' CoSENTLoss) of pairs that have a grade, as STS rows do.

    loss = log(1 + sum over pairs i, j of the global batch with grade_i > grade_j of exp((s_j - s_i) / T))

s: cosine of a row's query and document 0 · T: loss.cosent_temperature. One number of a batch: each of its
rows has it, so that the mean over rows, micro-batches and ranks is it again. Rows without a grade (NaN) are
in no pair; a batch without two different grades has 0, gradient 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.loss.contrastive import Groups, own_scores
from nemo_embed_core.parallel.collectives import all_gather_rows, gather_tokens


def cosent(groups: Groups, temperature: float, dp_group: Any) -> Tensor:
    """A scalar. Every dp rank calls it with equally many rows; gathered as in contrastive.gather_columns."""
    assert groups.grade_B is not None
    own_B = own_scores(groups.q_BD, groups.docs_BMD[:, :1])[:, 0]
    s = gather_tokens(own_B, dp_group)
    grade = all_gather_rows(groups.grade_B, dp_group) if dp_group.size() > 1 else groups.grade_B
    differences = (s[None, :] - s[:, None]) / temperature  # row i, column j
    pairs = differences.masked_fill(~(grade[:, None] > grade[None, :]), -math.inf)
    return torch.cat([s.new_zeros(1), pairs.flatten()]).logsumexp(0)
