"""LoRA (arXiv:2106.09685): low-rank factors beside the frozen weights of a block's linear layers.

    y = W x + s B A dropout(x)    s = alpha / rank    A [r, I], B [O, r], fp32 masters; W is as it was stored

q, k and v, and gate and up, are one fused weight and share one A; rows of B are ordered as rows of W. The
factors of a layer are cut over tp as its W is, and the other one of each is whole on every rank, where its
gradient is of this rank's tokens under sequence parallelism, as the norms' are (grad_norm.py):

    column-parallel    h = gather(x A^T)       B by rows       only [T, r] is gathered
    row-parallel       h = reduce(x A^T)       A by columns    only [T, r] is reduced

A begins as in peft, uniform(-1, 1) / sqrt(I), B with zeros, so that the first forward is the base model's.

Dropout, in training alone, is on the input of A as in peft: one mask for each A. It is a function of (seed,
step, token, layer, column of x), so that every layout has the same, and a token is named by its content: the
ids of its sequence and its position there (kernels/dropout_linear.py).
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_embed_core.config import LoraConfig
from nemo_embed_core.kernels.dropout_linear import dropout_linear
from nemo_embed_core.parallel.collectives import (
    copy_to_tp,
    gather_tokens,
    reduce_from_tp,
    reduce_scatter_tokens,
)
from nemo_embed_core.parallel.layers import ColumnParallelLinear, RowParallelLinear, local, tp_parameter


class Lora(nn.Module):
    """y -> y + s B A dropout(x) of one layer, the `number`-th linear one of the model."""

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear, config: LoraConfig, number: int):
        super().__init__()
        self.tp, self.scale, self.dropout, self.number = layer.tp, config.scale, config.dropout, number
        self.is_column = isinstance(layer, ColumnParallelLinear)
        cut_A, cut_B = (None, 0) if self.is_column else (1, None)
        self.A = tp_parameter(layer.tp, (config.rank, layer.in_features), cut_A, layer.unit)
        self.B = tp_parameter(layer.tp, (layer.out_features, config.rank), cut_B, layer.unit)

    def forward(self, x: Tensor, y: Tensor, token_keys_T: Tensor | None) -> Tensor:
        """x: as the layer gets it, y: as it gives it without a bias; under sequence parallelism [T/tp, I] and
        [T, O/tp] of a column-parallel layer, [T, I/tp] and [T/tp, O] of a row-parallel one. token_keys: of
        all T; None: nothing is dropped."""
        A = local(self.A).to(x.dtype)
        if token_keys_T is None:
            h_TR = F.linear(x, A)
        else:
            tokens, columns = x.shape
            first_token = self.tp.rank * tokens if self.is_column and self.tp.sequence_parallel else 0
            first_column = 0 if self.is_column else self.tp.rank * columns
            keys = token_keys_T[first_token : first_token + tokens]
            h_TR = dropout_linear(x, A, keys, self.number, first_column, self.dropout)
        if self.tp.size > 1:
            if self.tp.sequence_parallel:
                h_TR = (gather_tokens if self.is_column else reduce_scatter_tokens)(h_TR, self.tp.group)
            else:
                h_TR = (copy_to_tp if self.is_column else reduce_from_tp)(h_TR, self.tp.group)
        return torch.addmm(y, h_TR, local(self.B).to(x.dtype).t(), alpha=self.scale)


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """In place, before any sharding: all parameters so far are frozen, and the targets get factors."""
    model.requires_grad_(False)
    linear = [
        (n, m) for n, m in model.named_modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)
    ]
    for number, (name, layer) in enumerate(linear):
        if name.rpartition(".")[2] in config.targets:
            layer.lora = Lora(layer, config, number)


def initial_factor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The whole fp32 factor as training begins: a function of (seed, name) only, so every layout starts from
    the same."""
    if name.endswith(".B"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5
