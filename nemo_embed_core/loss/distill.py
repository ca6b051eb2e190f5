"""Distillation from a teacher's scores of a query's own documents and from its vectors, which mining writes;
terms of single rows.

    kl[b]         = sum_m p_m (log p_m - log q_m),    p = softmax(y_b / T), q = softmax(s(q_b, d_bm) / t)
    margin_mse[b] = mean_k ((s(q_b, d_b0) - s(q_b, d_bk)) - (y_b0 - y_bk))^2
    teacher_vectors[b] = mean_x (1 - cos(W e_x, t_x))    x over the row's query and its documents

y: scores, NaN where the teacher gave none · m over the positive 0 and the negatives k that have one · t
loss.temperature · T loss.kl_temperature. kl is arXiv:1503.02531 without its factor T^2, and the distillation
of FlagEmbedding at T = 1; margin_mse is arXiv:2010.02666, of cosines. A row whose positive or all of whose
negatives have no score has 0, gradient 0, and counts in the mean over the batch like any other.

e: the text's vector · t: the teacher's, of any length · W [its columns, D]: learned (train/learned.py); of
vectors cut to d columns (matryoshka) its first d.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_embed_core.loss.contrastive import Groups, own_scores


def scored(groups: Groups) -> tuple[Tensor, Tensor]:
    """(bool [B, M]: positive and negatives with a score; bool [B]: whether the row has both)"""
    if groups.teacher_BM is None:
        none_BM = torch.zeros_like(groups.mask_BM)
        return none_BM, none_BM[:, 0]
    kept_BM = torch.cat([groups.mask_BM[:, :1], groups.negative_BK], 1) & groups.teacher_BM.isfinite()
    has_B = kept_BM[:, 0] & kept_BM[:, 1:].any(1)
    if groups.grade_B is not None:
        has_B &= groups.grade_B.isnan()
    return kept_BM & has_B[:, None], has_B


def _both(groups: Groups, kept_BM: Tensor) -> tuple[Tensor, Tensor]:
    """(cosines, the teacher's scores) [B, M] in fp32 or wider, 0 where none is kept."""
    scores_BM = own_scores(groups.q_BD, groups.docs_BMD.masked_fill(~kept_BM[..., None], 0.0))
    if groups.teacher_BM is None:
        return scores_BM, torch.zeros_like(scores_BM)
    return scores_BM, groups.teacher_BM.to(scores_BM.dtype).masked_fill(~kept_BM, 0.0)


def kl(groups: Groups, temperature: float | Tensor, teacher_temperature: float) -> Tensor:
    """[B]; F.kl_div(log q, p, reduction="none").sum(1) over what is scored."""
    kept_BM, has_B = scored(groups)
    scores_BM, teacher_BM = _both(groups, kept_BM)
    out_BM = ~kept_BM & has_B[:, None]  # rows without scores keep all, so that no softmax is of nothing
    log_q = (scores_BM / temperature).masked_fill(out_BM, -math.inf).log_softmax(1).masked_fill(out_BM, 0.0)
    log_p = (teacher_BM / teacher_temperature).masked_fill(out_BM, -math.inf).log_softmax(1)
    p_BM = log_p.exp()
    return (p_BM * (log_p.masked_fill(out_BM, 0.0) - log_q)).sum(1).masked_fill(~has_B, 0.0)


def margin_mse(groups: Groups) -> Tensor:
    """[B]"""
    kept_BM, has_B = scored(groups)
    scores_BM, teacher_BM = _both(groups, kept_BM)
    margins_BK = (scores_BM[:, :1] - scores_BM[:, 1:]) - (teacher_BM[:, :1] - teacher_BM[:, 1:])
    squares_BK = margins_BK.square().masked_fill(~kept_BM[:, 1:], 0.0)
    mean_B = squares_BK.sum(1) / kept_BM[:, 1:].sum(1).clamp(min=1)
    return mean_B.masked_fill(~has_B, 0.0)


def teacher_vectors(groups: Groups, projection: Tensor) -> Tensor:
    """[B]; (1 - F.cosine_similarity(e @ W[:, :d].T, t, -1)).mean(1), over the documents that exist."""
    assert groups.teacher_BND is not None
    rows_BND = torch.cat([groups.q_BD[:, None], groups.docs_BMD], 1).to(projection.dtype)
    projected = rows_BND @ projection[:, : rows_BND.shape[-1]].T
    exists_BN = F.pad(groups.mask_BM, (1, 0), value=True)
    far_BN = 1 - F.cosine_similarity(projected, groups.teacher_BND.to(projection.dtype), -1)
    return far_BN.masked_fill(~exists_BN, 0.0).sum(1) / exists_BN.sum(1)
