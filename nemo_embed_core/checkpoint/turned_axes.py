"""A model whose hidden states are turned (TrainConfig.init_axes): other weights, vectors that only turn.

    x' = x Q,  Q [D, D] orthogonal          hidden states between blocks; RMS(x') = RMS(x)
    E' = E Q                                token embeddings [V, D]
    W' = W diag(g / c) Q,  g' = c 1         behind a norm of weights g: q, k, v, gate and up [., D]
    W' = Q^T W                              before the residual: o and down [D, .]

c = sqrt(mean g^2), so that the entries of W' are as large as those of W were and an optimizer's rate fits
them as it did (with c = 1 a rate that had trained W destroyed W'). The final norm's own weights have no
matrix behind them: a turn commutes with equal weights alone, so they become c, and vectors are those of the
model with that final norm, times Q.

The computational invariance of SliceGPT (arXiv:2401.15024), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_embed_core.checkpoint.weights import BoxReader
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.model.spec import HEAD_NORMS, parameter_shapes
from nemo_embed_core.parallel.boxes import Box

ROWS = 8192  # turned at once: memory beside a weight is that of so many rows in fp64

# Of a block: what reads the residual -> the norm before it; what adds to the residual.
_NORM_BEFORE = {
    "self_attn.qkv_proj.weight": "input_layernorm.weight",
    "mlp.gate_up_proj.weight": "post_attention_layernorm.weight",
}
_ADDS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


class TurnedAxes:
    """Boxes of the turned weights, fp64. axes_DD: Q; products are taken where it is."""

    def __init__(self, reader: BoxReader, model: ModelConfig, axes_DD: Tensor):
        self._reader, self._shapes, self._axes_DD = reader, parameter_shapes(model), axes_DD

    def read_box(self, name: str, box: Box) -> Tensor:
        if name.endswith(_ADDS):
            return self._adding(name, box)
        if name.endswith((*HEAD_NORMS, ".bias")):  # of heads, which are not turned
            return self._reader.read_box(name, box)
        if len(box[1]) == 1:
            return _size(self._whole(name)).cpu().expand(box[1])
        return self._reading(name, box)

    def _whole(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self._reader.read_box(name, ((0,) * len(shape), shape)).to(self._axes_DD)

    def _reading(self, name: str, box: Box) -> Tensor:
        """E Q, or W diag(g / c) Q: rows by rows, each of which is whole."""
        (first, column), (rows, columns) = box
        right_DD = self._axes_DD[:, column : column + columns]
        for part, norm in _NORM_BEFORE.items():
            if name.endswith(part):
                weights_D = self._whole(name.removesuffix(part) + norm)
                right_DD = (weights_D / _size(weights_D))[:, None] * right_DD
        out_RC = torch.empty(box[1], dtype=torch.float64)
        for start in range(0, rows, ROWS):
            count, width = min(ROWS, rows - start), self._shapes[name][1]
            part_RD = self._reader.read_box(name, ((first + start, 0), (count, width)))
            out_RC[start : start + count] = part_RD.to(self._axes_DD) @ right_DD
        return out_RC

    def _adding(self, name: str, box: Box) -> Tensor:
        """Q^T W: columns by columns, each of which is whole."""
        (first, column), (rows, columns) = box
        left_RD = self._axes_DD[:, first : first + rows].T
        out_RC = torch.empty(box[1], dtype=torch.float64)
        for start in range(0, columns, ROWS):
            count, height = min(ROWS, columns - start), self._shapes[name][0]
            part_DC = self._reader.read_box(name, ((0, column + start), (height, count)))
            out_RC[:, start : start + count] = left_RD @ part_DC.to(self._axes_DD)
        return out_RC


def _size(weights_D: Tensor) -> Tensor:
    return weights_D.square().mean().sqrt()
