"""Hidden states of packed sequences to unit rows: the one place that computes it, under every layout.

    mean    emb[n] = normalize(mean of the hidden states of sequence n)

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
    return unit(sums_ND / segments.cu_seqlens.diff()[:, None].to(sums_ND.dtype))


def whole(shares_ND: Tensor, tp: TensorParallel) -> Tensor:
    """The sum of what each tp rank has of every row: N x D floats over tp.

    An all-gather of T x D instead would also double the encoder's gradients while the loss curve stays
    perfect.
    """
    return reduce_from_tp(shares_ND, tp.group)


def unit(rows_ND: Tensor) -> Tensor:
    return F.normalize(rows_ND, dim=-1, eps=torch.finfo(rows_ND.dtype).tiny)


POOLINGS: Mapping[Pooling, Callable[[Tensor, Segments, TensorParallel], Tensor]] = {"mean": mean}


def pool(pooling: Pooling, hidden_TD: Tensor, segments: Segments, tp: TensorParallel) -> Tensor:
    """Unit rows [N, D] in fp32 (fp64 for fp64), the same on all tp ranks.

    hidden: [T, D], or [T / tp_size, D] from token tp.rank * T / tp_size on under sequence parallelism.
    """
    return POOLINGS[pooling](hidden_TD, segments, tp)
