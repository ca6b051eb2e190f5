"""Every collective of the project; the differentiable ones come in conjugate pairs.

Named by what happens to the activation: forward / backward. A value replicated over a group carries the same
full gradient on every rank, never a partial one.

    copy_to_tp            identity        / all-reduce        f of Megatron-LM (arXiv:1909.08053)
    reduce_from_tp        all-reduce      / identity          g of Megatron-LM
    gather_tokens         all-gather      / reduce-scatter    the consumer is sharded (arXiv:2205.05198)
    reduce_scatter_tokens reduce-scatter  / all-gather        its conjugate

They go through torch.ops._c10d_functional: with torch 2.11, torch.compile differentiates an autograd.Function
whose forward fills an output buffer (dist.all_gather_into_tensor) as if the collective were not there, and
the gradient is silently zero (docs/log.md).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel.liveness import note_exchange

_ops = torch.ops._c10d_functional


wait = _ops.wait_tensor  # of a tensor in flight: what begin_... returns must not be read before


def begin_all_gather_rows(x: Tensor, group: Any) -> Tensor:
    return _ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)


def begin_reduce_scatter_rows(x: Tensor, group: Any) -> Tensor:
    assert x.shape[0] % group.size() == 0, f"{x.shape=} does not split into {group.size()} equal chunks"
    return _ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)


def all_gather_rows(x: Tensor, group: Any) -> Tensor:
    """torch.cat of every rank's x along dim 0: [n, ...] -> [n * size, ...]."""
    return wait(begin_all_gather_rows(x, group))


def reduce_scatter_rows(x: Tensor, group: Any) -> Tensor:
    """This rank's chunk along dim 0 of the sum over ranks: [n, ...] -> [n / size, ...]."""
    return wait(begin_reduce_scatter_rows(x, group))


def all_reduce_sum(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks, out of place."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group.group_name))


def all_reduce_max(x: Tensor, group: Any) -> Tensor:
    """The largest over ranks, out of place; no gradient."""
    return _ops.wait_tensor(_ops.all_reduce(x, "max", group.group_name))


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce_sum(grads[0], ctx.group), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.dtype = group, x.dtype
        return all_gather_rows(x.to(dtype), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return reduce_scatter_rows(grads[0].to(ctx.dtype), ctx.group), None, None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return reduce_scatter_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_gather_rows(grads[0], ctx.group), None


def copy_to_tp(x: Tensor, group: Any) -> Tensor:
    return x if group.size() == 1 else _CopyToTP.apply(x, group)


def reduce_from_tp(x: Tensor, group: Any) -> Tensor:
    return x if group.size() == 1 else _ReduceFromTP.apply(x, group)


def gather_tokens(x: Tensor, group: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Over dp with the embeddings of each rank: backward SUMS every rank's gradient; with FSDP's mean over dp
    that is exactly the gradient of the global mean, no factor of world_size anywhere.

    dtype: rows are rounded to it and sent in it; gradients are summed in the dtype of x, because a sum over
    hundreds of ranks in bf16 would be rounded at every hop.
    """
    dtype = dtype or x.dtype
    return x.to(dtype) if group.size() == 1 else _GatherTokens.apply(x, group, dtype)


def reduce_scatter_tokens(x: Tensor, group: Any) -> Tensor:
    return x if group.size() == 1 else _ReduceScatterTokens.apply(x, group)


class _ColumnLinear(torch.autograd.Function):
    """F.linear(all_gather(x), w) that saves the shard [T/tp, D], not the gathered [T, D].

    Backward gathers x again behind the dX product and reduce-scatters dX behind the dW product; of a frozen w
    there is no dW, and x is neither saved nor gathered.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        return torch.nn.functional.linear(all_gather_rows(x, group), w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, w = ctx.saved_tensors
        if x is None:
            return reduce_scatter_rows(dy @ w, ctx.group), None, None
        gathered = begin_all_gather_rows(x, ctx.group)  # in flight during dX
        dx_full = dy @ w
        gathered = wait(gathered)
        dx = begin_reduce_scatter_rows(dx_full, ctx.group)  # in flight during dW
        dw = dy.t() @ gathered
        return wait(dx), dw, None


def column_linear(x: Tensor, w: Tensor, group: Any) -> Tensor:
    """F.linear over tokens sharded along the group, every rank with its own rows of the weight."""
    return torch.nn.functional.linear(x, w) if group.size() == 1 else _ColumnLinear.apply(x, w, group)


# ---- not differentiable: control and bookkeeping


def all_reduce_(x: Tensor, group: Any, op: str = "sum") -> Tensor:
    """In place; outside autograd."""
    if group.size() > 1:
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group)
    return x


def all_reduce_world_(x: Tensor) -> Tensor:
    """Sum over every rank, in place; outside autograd."""
    if dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


class Vote:
    """Whether one rank says so, without waiting: a call starts the exchange of this rank's flag and returns
    the answer of the call before.

    All ranks get the same answer at the same call. The exchange runs on threads of a gloo group of its own,
    behind the work between two calls; no device stream is touched.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._value = torch.zeros((), dtype=torch.int32)
        self._work: Any = None

    def __call__(self, flag: bool) -> bool:
        if self._group is None:
            return flag
        answer = self.answer()
        if not answer:
            self._value.fill_(int(flag))
            self._work = dist.all_reduce(self._value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer

    def answer(self) -> bool:
        """Of the last call; waits for it."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return bool(self._value.item())


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Every rank's small Python value, on every rank. Values come from our own processes only."""
    if dist.get_world_size() == 1:
        return [value]
    if group is None:  # not of another thread
        note_exchange()
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Any) -> Any:
    """The first rank's Python value, of any size, on every rank."""
    if dist.get_world_size() == 1:
        return value
    note_exchange()
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def raise_first(failure: str | None) -> None:
    """UserError on all ranks when there is one on any, so that none waits for another; called by all."""
    if first := next(filter(None, gather_objects(failure)), None):
        raise UserError(first)


def background_group(timeout: timedelta) -> Any:
    """A gloo group of all ranks for another thread, whose collectives must not interleave with training's.
    All ranks call it."""
    return None if dist.get_world_size() == 1 else dist.new_group(backend="gloo", timeout=timeout)
