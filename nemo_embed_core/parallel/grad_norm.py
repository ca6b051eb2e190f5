"""Gradient synchronisation over tp and the global norm, right when some parameters are sharded and others
replicated."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from nemo_embed_core.parallel.collectives import all_reduce_
from nemo_embed_core.parallel.mesh import Mesh


def local_tensor(t: Tensor) -> Tensor:
    return t._local_tensor if isinstance(t, DTensor) else t


def is_tp_replicated(p: Tensor) -> bool:
    """The last mesh axis of a parameter is tp (fully_shard puts dp in front)."""
    return isinstance(p, DTensor) and p.placements[-1] == Replicate()


@torch.no_grad()
def sync_replicated_grads(model: nn.Module, mesh: Mesh) -> None:
    """A replicated parameter's gradient that covers a share alone is summed over tp, once per step.

    Norms of the heads of q and k are of this rank's heads; under sequence parallelism the gradients of all
    norms, and of LoRA's whole factors, are of this rank's tokens. Else they are whole on every rank already.

    ONE flat all-reduce after FSDP's reduce-scatter (both are linear, so the order is free) and before
    clipping. Post-accumulate hooks would sum again what was summed when gradients accumulate.
    """
    grads = [
        local_tensor(p.grad)
        for module in model.modules() if mesh.tp.sequence_parallel or getattr(module, "of_heads", False)
        for p in module.parameters(recurse=False) if p.grad is not None and is_tp_replicated(p)
    ]  # fmt: skip
    if not grads or mesh.tp.size == 1:  # no norms of heads, or every norm is frozen
        return
    flat = torch.cat([g.reshape(-1) for g in grads])
    all_reduce_(flat, mesh.tp.group)
    for grad, piece in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(piece.view_as(grad))


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """torch.nn.utils.get_total_norm of all gradients over all shards, fp32 (fp64 of fp64 gradients).

    sum over dp_shard and tp of |sharded|^2 + |replicated|^2 / tp_size: every tp rank holds the replicated
    ones, and every dp_replicate rank all of them.
    """
    sharded: list[Tensor] = []
    replicated: list[Tensor] = []
    for p in parameters:
        if p.grad is not None and local_tensor(p.grad).numel():
            (replicated if is_tp_replicated(p) else sharded).append(local_tensor(p.grad))
    total = _sum_of_squares(sharded, mesh.device) + _sum_of_squares(replicated, mesh.device) / mesh.tp.size
    if mesh.tp.size > 1:
        all_reduce_(total, mesh.tp.group)
    all_reduce_(total, mesh.shard_group)
    return total.sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_'s factor of the gradients, 1 for max_norm 0.

    0 for a norm that is not finite: the optimizer refuses it, and no answer of the device is waited for.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
    return torch.where(norm.isfinite(), factor, 0.0)


def _sum_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), device=device)
    dtype = torch.promote_types(grads[0].dtype, torch.float32)  # bf16 sums would lose most of them
    return torch.stack(torch._foreach_norm(grads, 2, dtype=dtype)).pow(2).sum()
