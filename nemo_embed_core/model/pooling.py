"""Hidden states of packed sequences to unit rows: the one place that computes it, under every layout.

    mean           emb[n] = normalize(mean of the hidden states of sequence n)
    last, cls      emb[n] = normalize(hidden state of its last, of its first token)
    weightedmean   emb[n] = normalize(sum over its tokens i = 1, 2, ... of i x hidden state)

A sequence without a token gives 0.

Names, and what other programs call them: ModelConfig.pooling, model/spec.py.

T packed tokens · N sequences · D hidden_size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_embed_core.config import Pooling
from nemo_embed_core.kernels.mean_pool import mean_pool, segment_sum
from nemo_embed_core.model.attention import Segments
from nemo_embed_core.parallel.collectives import reduce_from_tp
from nemo_embed_core.parallel.mesh import TensorParallel


def mean(hidden_TD: Tensor, segments: Segments, tp: TensorParallel) -> Tensor:
    if not tp.sequence_parallel:
        return mean_pool(hidden_TD, segments.cu_seqlens, normalize=True)
    sums_ND = segment_sum(hidden_TD, segments.cu_seqlens, token_offset=tp.rank * hidden_TD.shape[0])
    sums_ND = whole(sums_ND, tp)
    return unit(sums_ND / segments.cu_seqlens.diff().clamp(min=1)[:, None].to(sums_ND.dtype))


def last(hidden_TD: Tensor, segments: Segments, tp: TensorParallel) -> Tensor:
    return _tokens(hidden_TD, segments.cu_seqlens[1:] - 1, segments, tp)


def cls(hidden_TD: Tensor, segments: Segments, tp: TensorParallel) -> Tensor:
    return _tokens(hidden_TD, segments.cu_seqlens[:-1], segments, tp)


def _tokens(hidden_TD: Tensor, index_N: Tensor, segments: Segments, tp: TensorParallel) -> Tensor:
    """The states of these tokens of the packed batch, one of each sequence: on the tp rank that has it."""
    num_tokens = hidden_TD.shape[0]
    if tp.sequence_parallel:
        index_N = index_N - tp.rank * num_tokens
    mine = (index_N >= 0) & (index_N < num_tokens) & (segments.cu_seqlens.diff() > 0)
    rows_ND = hidden_TD.index_select(0, index_N.clamp(0, num_tokens - 1)) * mine[:, None]
    rows_ND = rows_ND.to(torch.promote_types(rows_ND.dtype, torch.float32))
    return unit(whole(rows_ND, tp) if tp.sequence_parallel else rows_ND)


def weightedmean(hidden_TD: Tensor, segments: Segments, tp: TensorParallel) -> Tensor:
    """Of the sum: the sum of the weights goes out when the row is made a unit."""
    cu_seqlens, num_tokens = segments.cu_seqlens, hidden_TD.shape[0]
    offset = tp.rank * num_tokens if tp.sequence_parallel else 0
    token_T = torch.arange(offset, offset + num_tokens, device=hidden_TD.device, dtype=cu_seqlens.dtype)
    sequence_T = torch.searchsorted(cu_seqlens, token_T, right=True) - 1
    weight_T = token_T - cu_seqlens[sequence_T] + 1
    wide_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32)) * weight_T[:, None]
    sums_ND = segment_sum(wide_TD, cu_seqlens, token_offset=offset)
    return unit(whole(sums_ND, tp) if tp.sequence_parallel else sums_ND)


def whole(shares_ND: Tensor, tp: TensorParallel) -> Tensor:
    """The sum of what each tp rank has of every row: N x D floats over tp.

    An all-gather of T x D instead would also double the encoder's gradients while the loss curve stays
    perfect.
    """
    return reduce_from_tp(shares_ND, tp.group)


def unit(rows_ND: Tensor) -> Tensor:
    return F.normalize(rows_ND, dim=-1, eps=torch.finfo(rows_ND.dtype).tiny)


def cut_rows(rows: Tensor, dim: int) -> Tensor:
    """F.normalize(rows[..., :dim], dim=-1) in fp32 or wider, then in the dtype of the rows; whole unit rows
    as they are: vectors of loss.matryoshka_dims, wherever they are cut."""
    if dim == rows.shape[-1]:
        return rows
    wide = torch.promote_types(rows.dtype, torch.float32)
    return unit(rows[..., :dim].to(wide)).to(rows.dtype)


POOLINGS: Mapping[Pooling, Callable[[Tensor, Segments, TensorParallel], Tensor]] = {
    "mean": mean,
    "last": last,
    "cls": cls,
    "weightedmean": weightedmean,
}


def pool(pooling: Pooling, hidden_TD: Tensor, segments: Segments, tp: TensorParallel) -> Tensor:
    """Unit rows [N, D] in fp32 (fp64 for fp64), the same on all tp ranks.

    hidden: [T, D], or [T / tp_size, D] from token tp.rank * T / tp_size on under sequence parallelism.
    """
    return POOLINGS[pooling](hidden_TD, segments, tp)
