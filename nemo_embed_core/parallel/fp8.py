"""Linear layers of a tensor-parallel model in fp8: the forward and both gradients of F.linear(x, w).

    y = x8 @ w8.T      dx = dy8 @ w8      dw = dy8.T @ x8      x8, w8 in e4m3, dy8 in e5m2 (kernels/fp8.py)

What is multiplied has one scale, of the largest value of the whole matrix: where tp ranks hold parts of it,
the largest over them all. So tp = 2 quantises to the numbers of tp = 1; a scale of each rank's own part is
another model at every layout. Data-parallel ranks have micro-batches and so scales of their own.

Weights are quantised once while they cannot change: those of an encoder for ever (`freeze_weights`), those of
a training step from its first micro-batch to its last (`weights_kept`), which costs 2 bytes a parameter.
Where dp_shard ranks hold shards of them, each quantises its own and FSDP2 gathers bytes in e4m3
(`gather_in_fp8`): the values of a gather in bf16 at half of its bytes, as the scale is of the whole matrix.
Saved for backward is x as it came, in bf16; recomputation (layers.py: `remade`) need not know of any of this.

T packed tokens (T / tp under sequence parallelism) · K input features · O output features of this rank
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_embed_core.kernels.fp8 import E4M3, E5M2, MAX, Quantized, amax, quantize, scale_of, scaled_mm
from nemo_embed_core.parallel.collectives import (
    all_gather_rows,
    all_reduce_max,
    begin_all_gather_rows,
    begin_reduce_scatter_rows,
    copy_to_tp,
    reduce_scatter_rows,
    wait,
)
from nemo_embed_core.parallel.fsdp import gather_by
from nemo_embed_core.parallel.grad_norm import local_tensor
from nemo_embed_core.parallel.mesh import TensorParallel


class Fp8Weight:
    """The e4m3 values of a layer's weight, both ways round, made when they are asked for."""

    def __init__(self) -> None:
        self.is_kept = False
        self.made: Quantized | None = None
        self.shard_group: Any = None  # over which it is gathered in e4m3
        self.amax: Tensor | None = None  # then, within weights_kept: of the whole matrix
        self.scale: Tensor | None = None  # likewise

    def of(self, w: Tensor, tp: TensorParallel, columns: bool) -> Quantized:
        """columns: whether they are needed. A w that came in e4m3 is transposed no earlier; one in bf16 is
        read once for both layouts."""
        made = self.made
        if made is None or (columns and not made.columns.numel()):
            if w.dtype == E4M3:
                assert self.scale is not None
                made = Quantized(w, _transposed(w) if columns else w.new_empty(0), self.scale)
            else:
                made = quantize(w, _amax(w, tp, is_part=True), E4M3, columns=True)
            self.made = made if self.is_kept else None
        return made


def _layers(model: nn.Module) -> list[Any]:
    """That run in fp8 (layers.py: run_in_fp8)."""
    return [layer for layer in model.modules() if getattr(layer, "fp8", None) is not None]


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Within, weights do not change and are quantised once; not where whole ones outlive no block
    (parallel.reshard_after_forward), and none outlives this. Shards that are gathered in e4m3 are gathered
    within alone: all ranks enter together, with no weight gathered."""
    layers, keeps_whole = _layers(model), getattr(model, "keeps_whole", True)
    _find_amax([layer for layer in layers if layer.fp8.shard_group is not None])
    for layer in layers:
        layer.fp8.is_kept = keeps_whole
    try:
        yield
    finally:
        for layer in layers:
            weight = layer.fp8
            weight.is_kept, weight.made, weight.amax, weight.scale = False, None, None, None


def gather_in_fp8(model: nn.Module, shard_group: Any) -> None:
    """FSDP2 gathers the weights of the blocks over shard_group in e4m3; parameters, optimizer and checkpoints
    see what they saw. Once parameters have memory."""
    layers = _layers(model)
    gather_by(model, set(layers), _before_gather, _after_gather)
    for layer in layers:
        layer.fp8.shard_group = shard_group


def _before_gather(
    mesh: Any, outer_size: torch.Size, outer_stride: Any, layer: Any, policy: Any
) -> tuple[tuple[Tensor], None]:
    """A shard's bytes, padded to what the first rank has. FSDP2 asks by these arguments."""
    assert layer.fp8.amax is not None, "weights are gathered within weights_kept alone"
    w = local_tensor(layer.weight.detach()).bfloat16()  # fp32 masters: e4m3 of the bf16 that would be sent
    if missing := -(-outer_size[0] // mesh.size()) - len(w):
        w = F.pad(w, (0, 0, 0, missing))
    # As bytes: norms are gathered beside them in bf16, and gloo knows no fp8.
    return (quantize(w, layer.fp8.amax, E4M3).rows.view(torch.uint8),), None


def _after_gather(
    gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
) -> Any:
    """The whole weight, whose memory FSDP2 frees and fills again (out) as that of the bytes."""
    return None if out is not None else (gathered[0].view(E4M3), ())


@torch.no_grad()
def _find_amax(layers: list[Any]) -> None:
    """Of whole matrices, from the shards of them, in one exchange of a vector over each axis."""
    if not layers:
        return
    shards = [local_tensor(layer.weight) for layer in layers]
    assert all(shard.dtype != E4M3 for shard in shards), "weights of another step are still gathered"
    own = torch.stack([amax(w) if w.numel() else w.new_zeros((), dtype=torch.float32) for w in shards])
    # Rounding keeps the order, so that the largest bf16 is that of the largest fp32. Bits: as in _amax.
    bits = all_reduce_max(own.bfloat16().float().view(torch.int32), layers[0].fp8.shard_group)
    if layers[0].tp.size > 1:
        bits = all_reduce_max(bits, layers[0].tp.group)
    largest = bits.view(torch.float32)
    for layer, of_layer, scale in zip(layers, largest, scale_of(largest, E4M3), strict=True):
        layer.fp8.amax, layer.fp8.scale = of_layer, scale


def freeze_weights(model: nn.Module) -> None:
    """Of a model that only encodes: each weight becomes its e4m3 values, half of the memory of bf16."""
    for layer in _layers(model):
        w = layer.weight.detach()
        layer.fp8.made = quantize(w, _amax(w, layer.tp, is_part=True), E4M3)
        layer.weight = nn.Parameter(layer.fp8.made.rows, requires_grad=False)


def _amax(x: Tensor, tp: TensorParallel, is_part: bool, own: Tensor | None = None) -> Tensor:
    """The largest |value| of the matrix that x is, or of which tp ranks hold a part each. own: amax(x), where
    what made x has taken it along."""
    own = amax(x.detach()) if own is None else own
    if not is_part or tp.size == 1:
        return own
    # Bits: as floats NCCL's maximum would drop a NaN.
    return all_reduce_max(own.view(torch.int32), tp.group).view(torch.float32)


def _transposed(values: Tensor) -> Tensor:
    """Quantized.columns of fp8 values."""
    one = torch.full((), MAX[values.dtype], device=values.device)  # a factor of 1: they are not changed
    return quantize(values, one, values.dtype, rows=False, columns=True).columns


class _Fp8Linear(torch.autograd.Function):
    """The forward and backward above; under sequence parallelism a column-parallel x is all-gathered in fp8,
    once in each direction, and dx is reduce-scattered in bf16."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        weight: Fp8Weight,
        tp: TensorParallel,
        column: bool,
        own: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # nobody hands a largest value back: None
        ctx.weight, ctx.tp, ctx.column = weight, tp, column
        ctx.spec = w._spec if isinstance(w, DTensor) else None
        w = local_tensor(w)
        ctx.is_gathered = column and tp.size > 1 and tp.sequence_parallel
        largest = _amax(x, tp, ctx.is_gathered or not column, own)
        ctx.is_frozen = not ctx.needs_input_grad[1]
        ctx.save_for_backward(None if ctx.is_frozen else x, w, largest)
        x8 = quantize(x, largest, E4M3)
        rows = x8.rows
        if ctx.is_gathered:
            rows = all_gather_rows(rows.view(torch.uint8), tp.group).view(E4M3)
        w8 = weight.of(w, tp, columns=False)
        y = scaled_mm(rows, x8.scale, w8.rows, w8.scale, fast=True)
        return y, torch.empty((), device=x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy, own), (x, w, largest), tp = grads, ctx.saved_tensors, ctx.tp
        w8 = ctx.weight.of(w, tp, columns=True)
        if ctx.is_frozen:
            dy8 = quantize(dy, _amax(dy, tp, ctx.column, own), E5M2)
            dx = scaled_mm(dy8.rows, dy8.scale, w8.columns, w8.scale, fast=False)
            return reduce_scatter_rows(dx, tp.group) if ctx.is_gathered else dx, *[None] * 5
        x8 = quantize(x, largest, E4M3, rows=ctx.is_gathered, columns=not ctx.is_gathered)
        columns = x8.columns
        if ctx.is_gathered:
            flying = begin_all_gather_rows(x8.rows.view(torch.uint8), tp.group)  # during dX
        dy8 = quantize(dy, _amax(dy, tp, ctx.column, own), E5M2, columns=True)
        dx = scaled_mm(dy8.rows, dy8.scale, w8.columns, w8.scale, fast=False)
        if ctx.is_gathered:
            columns = _transposed(wait(flying).view(E4M3))
            dx = begin_reduce_scatter_rows(dx, tp.group)  # during dW
        dw = scaled_mm(dy8.columns, dy8.scale, columns, x8.scale, fast=False)
        if ctx.spec is not None:
            dw = DTensor(dw, ctx.spec, requires_grad=False)
        return wait(dx) if ctx.is_gathered else dx, dw, None, None, None, None


def fp8_linear(
    x: Tensor, w: Tensor, weight: Fp8Weight, tp: TensorParallel, *, column: bool, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """F.linear(x, w) in bf16, and its gradients, by fp8 products; and a scalar beside it. w: the layer's
    parameter, in bf16, or in e4m3 as it was gathered (gather_in_fp8); its gradient is in bf16.

    column: rows of w over tp, and x is whole or, under sequence parallelism, all-gathered here; its gradient
    is summed over tp. Else columns of w and of x over tp; y is this rank's share of a sum.
    own: amax(x), where it is known. The scalar holds nothing: its "gradient", if it gets one, must be
    amax(dy) of this rank's dy (kernels/swiglu.py), which is then not read for it.
    """
    if column and tp.size > 1 and not tp.sequence_parallel:
        x = copy_to_tp(x, tp.group)
    if w.dtype == E4M3 and w.requires_grad:
        w.grad_dtype = torch.bfloat16  # autograd would round the gradient to that of the weight
    return _Fp8Linear.apply(x, w, weight, tp, column, own)
