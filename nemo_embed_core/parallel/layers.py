"""Column-, row- and vocabulary-parallel layers; each parameter knows its own sharding.

Every parameter is this rank's shard wrapped as a DTensor on the 1-D tp mesh before FSDP2 sees it, so that
global shape and placement are always known (checkpoints, norms, resharding). The forward takes the local
tensor. Without a mesh the parameters are plain tensors.

    T packed tokens · D hidden_size · O output features (global; a tp rank holds O / tp_size)

Ranks hold equally much: where tp_size does not divide a dim, the last ranks' parameters reach beyond it
(`tp_chunk`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from nemo_embed_core.kernels.rms_norm import rms_norm
from nemo_embed_core.parallel.collectives import (
    column_linear,
    copy_to_tp,
    reduce_from_tp,
    reduce_scatter_tokens,
)
from nemo_embed_core.parallel.fp8 import Fp8Weight, fp8_linear
from nemo_embed_core.parallel.layout import tp_chunk
from nemo_embed_core.parallel.mesh import TensorParallel


def tp_parameter(
    tp: TensorParallel, shape: tuple[int, ...], tp_dim: int | None, unit: int = 1
) -> nn.Parameter:
    """An uninitialised parameter of global `shape`: Shard(tp_dim) over tp in whole units, or replicated for
    None."""
    local = list(shape)
    if tp_dim is not None:
        local[tp_dim] = tp_chunk(shape[tp_dim], tp.size, unit)
    tensor = torch.empty(local)
    if tp.mesh is not None:
        placement = Replicate() if tp_dim is None else Shard(tp_dim)
        tensor = DTensor.from_local(tensor, tp.mesh, [placement], run_check=False)
    return nn.Parameter(tensor)


class _Local(torch.autograd.Function):
    """w.to_local() without DTensor's redistribution logic in backward: 60-100 us less host time per call."""

    @staticmethod
    def forward(ctx: Any, w: DTensor) -> Tensor:
        ctx.spec = w._spec
        return w._local_tensor.view_as(w._local_tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return DTensor(grads[0], ctx.spec, requires_grad=False)


def local(w: Tensor) -> Tensor:
    """This rank's shard of a weight, differentiable."""
    if not isinstance(w, DTensor):
        return w
    if torch.compiler.is_compiling() or not w.requires_grad:
        return w.to_local()
    return _Local.apply(w)


Again = Callable[[], Tensor] | None  # of `remade`


def remade(x: Tensor, again: Again) -> AbstractContextManager[Any]:
    """Within, autograd keeps `again` where it would save x, or a view of all of it, and calls it in backward.

    Selective recomputation: x frees its memory as soon as nothing else holds it. again() must give the bits
    of x and may hold only memory that is saved anyway. None: x is saved.
    """
    if again is None:
        return nullcontext()
    storage = x.untyped_storage()._cdata

    def pack(saved: Tensor) -> Any:
        return again if saved.untyped_storage()._cdata == storage else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept() if kept is again else kept)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x**2) + eps) * weight after adding a residual; under sequence parallelism on [T/tp,
    D]. of_heads: on this rank's heads instead, whatever the parallelism (grad_norm.py)."""

    def __init__(self, hidden_size: int, eps: float, tp: TensorParallel, of_heads: bool = False):
        super().__init__()
        self.eps, self.of_heads = eps, of_heads
        self.weight = tp_parameter(tp, (hidden_size,), None)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None = None, amax: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(normalised x + residual, x + residual, the largest size of a normalised value where it is asked
        for): the sum is what the next block adds to."""
        return rms_norm(x_TD, local(self.weight), self.eps, residual_TD, amax)


class ColumnParallelLinear(nn.Module):
    """y_local = f(x) @ W_local.T + b_local: rows of W and b over tp. Under sequence parallelism x is
    [T/tp, D] and is all-gathered. `again`: of `remade`; amax: of x, which fp8 then does not look for;
    token_keys: of every token of the batch, for LoRA's dropout."""

    fp8: Fp8Weight | None = None  # run_in_fp8

    def __init__(
        self, in_features: int, out_features: int, tp: TensorParallel, unit: int = 1, bias: bool = False
    ):
        super().__init__()
        self.tp, self.in_features, self.out_features, self.unit = tp, in_features, out_features, unit
        self.lora: nn.Module | None = None  # (x, y, token_keys) -> y with what adapters add (model/lora.py)
        self.weight = tp_parameter(tp, (out_features, in_features), 0, unit)
        self.bias = tp_parameter(tp, (out_features,), 0, unit) if bias else None

    def forward(
        self, x: Tensor, again: Again = None, amax: Tensor | None = None, token_keys_T: Tensor | None = None
    ) -> Tensor:
        y = self.with_beside(x, again, amax, token_keys_T)[0]
        return y if self.bias is None else y + local(self.bias)

    def with_beside(
        self, x: Tensor, again: Again = None, amax: Tensor | None = None, token_keys_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """y_local without the bias, and in fp8 the scalar that takes the largest value of its gradient
        (fp8_linear)."""
        with remade(x, again):
            beside = None
            if self.fp8 is not None:
                y, beside = fp8_linear(x, self.weight, self.fp8, self.tp, column=True, own=amax)
            elif self.tp.size > 1 and self.tp.sequence_parallel:
                y = column_linear(x, local(self.weight), self.tp.group)
            else:
                y = F.linear(copy_to_tp(x, self.tp.group) if self.tp.size > 1 else x, local(self.weight))
            return y if self.lora is None else self.lora(x, y, token_keys_T), beside


class RowParallelLinear(nn.Module):
    """y = g(x_local @ W_local.T): columns of W over tp; all-reduce, or reduce-scatter to [T/tp, D].
    The rest as above."""

    fp8: Fp8Weight | None = None  # run_in_fp8

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel, unit: int = 1):
        super().__init__()
        self.tp, self.in_features, self.out_features, self.unit = tp, in_features, out_features, unit
        self.lora: nn.Module | None = None  # as above
        self.weight = tp_parameter(tp, (out_features, in_features), 1, unit)

    def forward(
        self, x: Tensor, again: Again = None, amax: Tensor | None = None, token_keys_T: Tensor | None = None
    ) -> Tensor:
        with remade(x, again):
            if self.fp8 is None:
                y = F.linear(x, local(self.weight))
            else:
                y, _ = fp8_linear(x, self.weight, self.fp8, self.tp, column=False, own=amax)
            if self.tp.size > 1:
                together = reduce_scatter_tokens if self.tp.sequence_parallel else reduce_from_tp
                y = together(y, self.tp.group)
            return y if self.lora is None else self.lora(x, y, token_keys_T)


def run_in_fp8(model: nn.Module) -> None:
    """The products of every linear layer: those of the blocks, as there are no others."""
    for layer in model.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            layer.fp8 = Fp8Weight()


class VocabParallelEmbedding(nn.Module):
    """F.embedding with rows over tp: a rank looks up the ids that it owns, zeros elsewhere, then the ranks
    are summed."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.rows = tp_chunk(vocab_size, tp.size)
        self.weight = tp_parameter(tp, (vocab_size, hidden_size), 0)

    def forward(self, input_ids_T: Tensor) -> Tensor:
        weight = local(self.weight)
        if self.tp.size == 1:
            return F.embedding(input_ids_T, weight)
        ids = input_ids_T - self.tp.rank * self.rows
        mine = (ids >= 0) & (ids < self.rows)
        x = F.embedding(ids.clamp(0, self.rows - 1), weight) * mine[:, None].to(weight.dtype)
        if self.tp.sequence_parallel:
            return reduce_scatter_tokens(x, self.tp.group)
        return reduce_from_tp(x, self.tp.group)
