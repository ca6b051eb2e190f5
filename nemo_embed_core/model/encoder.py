"""Text embeddings: Llama, one vector for each sequence (model/pooling.py), L2 normalisation.

    emb[n] = normalize(pool(hidden states of sequence n))      [N, D], fp32, unit rows

T packed tokens · N sequences · D hidden_size
"""

from __future__ import annotations

from torch import Tensor, nn

from nemo_embed_core.config import ModelConfig
from nemo_embed_core.model.attention import Attention, Segments
from nemo_embed_core.model.llama import Llama
from nemo_embed_core.model.pooling import pool
from nemo_embed_core.parallel.mesh import TensorParallel


class Encoder(nn.Module):
    """The root module that FSDP2 wraps; everything goes through forward."""

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, attention: Attention, selective: bool = False
    ):
        super().__init__()
        self.tp, self.pooling = tp, config.pooling
        self.model = Llama(config, tp, attention, selective)

    def forward(
        self, input_ids_T: Tensor, position_ids_T: Tensor, segments: Segments, return_hidden: bool = False
    ) -> Tensor:
        """Unit rows [N, D] in fp32 (fp64 for fp64 weights); all tp ranks get the same rows.

        T must be a multiple of tp_size: packing appends one dummy sequence whose row is not used.
        `return_hidden` gives the hidden states instead ([T/tp, D] under sequence parallelism).
        """
        hidden_TD = self.model(input_ids_T, position_ids_T, segments)
        if return_hidden:
            return hidden_TD
        return pool(self.pooling, hidden_TD, segments, self.tp)
