"""Text embeddings: Llama, global average pooling over all tokens of a sequence, L2 normalisation.

    emb[n] = normalize(mean of hidden states of sequence n)      [N, D], fp32, unit rows

T packed tokens · N sequences · D hidden_size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_embed_core.config import ModelConfig
from nemo_embed_core.kernels.mean_pool import mean_pool, segment_sum
from nemo_embed_core.model.attention import Attention, Segments
from nemo_embed_core.model.llama import Llama
from nemo_embed_core.parallel.collectives import reduce_from_tp
from nemo_embed_core.parallel.mesh import TensorParallel


class Encoder(nn.Module):
    """The root module that FSDP2 wraps; everything goes through forward."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, attention: Attention):
        super().__init__()
        self.tp = tp
        self.model = Llama(config, tp, attention)

    def forward(
        self, input_ids_T: Tensor, position_ids_T: Tensor, segments: Segments, return_hidden: bool = False
    ) -> Tensor:
        """Unit rows [N, D] in fp32 (fp64 for fp64 weights); all tp ranks get the same rows.

        T must be a multiple of tp_size: packing appends one dummy sequence whose row is not used. `return_hidden`
        gives the hidden states instead ([T/tp, D] under sequence parallelism).
        """
        hidden_TD = self.model(input_ids_T, position_ids_T, segments)
        if return_hidden:
            return hidden_TD
        if not self.tp.sequence_parallel:
            return mean_pool(hidden_TD, segments.cu_seqlens, normalize=True)
        # Sums of this rank's tokens, then N x D floats over tp. An all-gather of T x D here would also double the
        # encoder's gradients while the loss curve stays perfect.
        sums_ND = segment_sum(hidden_TD, segments.cu_seqlens, token_offset=self.tp.rank * hidden_TD.shape[0])
        sums_ND = reduce_from_tp(sums_ND, self.tp.group)
        lengths_N = segments.cu_seqlens.diff()
        return F.normalize(sums_ND / lengths_N[:, None].to(sums_ND.dtype), dim=-1, eps=torch.finfo(sums_ND.dtype).tiny)
