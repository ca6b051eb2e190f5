"""LoRA (arXiv:2106.09685): low-rank factors beside the frozen weights of a block's linear layers.

    y = W x + s B A x      s = alpha / rank      A [r, I], B [O, r], fp32 masters; W is as it was stored

q, k and v, and gate and up, are one fused weight and share one A; rows of B are ordered as rows of W. The
factors of a layer are cut over tp as its W is, and the other one of each is whole on every rank, where its
gradient is of this rank's tokens under sequence parallelism, as the norms' are (grad_norm.py):

    column-parallel    h = gather(x A^T)       B by rows       only [T, r] is gathered
    row-parallel       h = reduce(x A^T)       A by columns    only [T, r] is reduced

A begins as in peft, uniform(-1, 1) / sqrt(I), B with zeros, so that the first forward is the base model's.
There is no dropout: its mask would have to be a function of (seed, step, layer, token of the global batch)
to be the same in every layout.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_embed_core.config import LoraConfig
from nemo_embed_core.parallel.collectives import (
    copy_to_tp,
    gather_tokens,
    reduce_from_tp,
    reduce_scatter_tokens,
)
from nemo_embed_core.parallel.layers import ColumnParallelLinear, RowParallelLinear, local, tp_parameter


class Lora(nn.Module):
    """y -> y + s B A x of one layer."""

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear, rank: int, scale: float):
        super().__init__()
        self.tp, self.scale = layer.tp, scale
        self.is_column = isinstance(layer, ColumnParallelLinear)
        cut_A, cut_B = (None, 0) if self.is_column else (1, None)
        self.A = tp_parameter(layer.tp, (rank, layer.in_features), cut_A, layer.unit)
        self.B = tp_parameter(layer.tp, (layer.out_features, rank), cut_B, layer.unit)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: as the layer gets it, y: as it gives it without a bias; under sequence parallelism [T/tp, I] and
        [T, O/tp] of a column-parallel layer, [T, I/tp] and [T/tp, O] of a row-parallel one."""
        h_TR = F.linear(x, local(self.A).to(x.dtype))
        if self.tp.size > 1:
            if self.tp.sequence_parallel:
                h_TR = (gather_tokens if self.is_column else reduce_scatter_tokens)(h_TR, self.tp.group)
            else:
                h_TR = (copy_to_tp if self.is_column else reduce_from_tp)(h_TR, self.tp.group)
        return torch.addmm(y, h_TR, local(self.B).to(x.dtype).t(), alpha=self.scale)


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """In place, before any sharding: all parameters so far are frozen, and the targets get factors."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] in config.targets:
            layer.lora = Lora(layer, config.rank, config.scale)


def initial_factor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The whole fp32 factor as training begins: a function of (seed, name) only, so every layout starts from
    the same."""
    if name.endswith(".B"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5
