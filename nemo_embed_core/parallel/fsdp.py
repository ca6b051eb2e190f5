"""FSDP2 over the data-parallel axes. At dp_size = 1 it carries the mixed-precision policy: weights stored in
fp32 run in bf16. Weights that run as they are stored go without it there, as it would copy them and their
gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nemo_embed_core.parallel.mesh import Mesh

WRAPPER_PREFIX = "_checkpoint_wrapped_module."  # put into parameter names by activation checkpointing


def shard(
    model: nn.Module,
    blocks: nn.ModuleList,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    runs_as_stored: bool = False,
    reshard_after_forward: bool,
    reduce_dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool,
) -> None:
    """Wrap in place: (activation checkpointing) -> each block -> root. `dtype` is what runs; weights are
    fp32, or with runs_as_stored `dtype` too. Where some are frozen, these are what runs as stored, and layers
    cast the others (model/lora.py).

    cast_forward_inputs is off: it would turn the fp32 RoPE table into bf16. Inputs are ids, so nothing needs
    a cast.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=reduce_dtype,
        cast_forward_inputs=False,
    )
    if dtype == torch.float64:  # tests: keep fp64 end to end
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    runs_as_stored |= bool(frozen)
    if runs_as_stored:
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if not (frozen and p.requires_grad):
                    stored = nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad)
                    module.register_parameter(name, stored)
    is_sharded = mesh.dp_size > 1 or not runs_as_stored
    for i, block in enumerate(blocks):
        if activation_checkpointing:
            blocks[i] = block = checkpoint_wrapper(block)  # non-reentrant
        if is_sharded:
            fully_shard(block, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    if is_sharded:
        fully_shard(model, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        model.keeps_whole = not reshard_after_forward  # type: ignore[assignment]


def keep_gradients_in_fp32(model: nn.Module) -> None:
    """Of bf16 parameters, once they have memory: FSDP2 would round reduced gradients to the shards' dtype.

    No public setting says otherwise (torch 2.11 to 2.13).
    """
    if not isinstance(model, FSDPModule):
        return  # begin_micro_batch does it
    model._get_fsdp_state()._lazy_init()  # before the first forward, which would set what is set here
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        if group is not None:
            group._orig_dtype = torch.float32
    for p in model.parameters():
        p.grad_dtype = torch.float32


def gather_by(
    model: nn.Module, layers: Collection[nn.Module], before: Callable[..., Any], after: Callable[..., Any]
) -> None:
    """FSDP2 sends what before(...) makes of a shard of a layer's weight, and after(...) makes the whole
    weight of what came: its fsdp_pre_all_gather and fsdp_post_all_gather. Once parameters have memory.

    It asks a shard for these two by their names alone, so shards need no class of their own (torch 2.13).
    """
    assert isinstance(model, FSDPModule)
    # It puts other tensors in place of shards that need padding, and these would not have the methods.
    model._get_fsdp_state()._lazy_init()
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for parameter in group.fsdp_params if group is not None else ():
            place = parameter._module_info
            if place.param_name == "weight" and place.module in layers:
                shard_: Any = parameter._sharded_local_tensor
                shard_.fsdp_pre_all_gather, shard_.fsdp_post_all_gather = before, after
                parameter._init_extensions()


def begin_micro_batch(model: nn.Module, is_last: bool) -> None:
    """Before a forward and the backward that follows it: what of weights and gradients outlives them.

    W bytes of weights as they run, G of gradients, n micro-batches of a step; the wire carries

        kept whole       W + G          one gather, one reduction; W + G stay between micro-batches
        reshard          n (2 W + G)    nothing stays
        without FSDP2    0              W + G stay

    With dp_replicate the sum over copies waits for the last micro-batch either way: shards of it are small.
    Without FSDP2 gradients in bf16 are what the only micro-batch computes; those of several are added in
    fp32, as are the norms' of the tp ranks.
    """
    if not isinstance(model, FSDPModule):
        for p in model.parameters():
            if p.grad is None and p.requires_grad:
                is_alone = is_last and p.ndim > 1
                p.grad_dtype = p.dtype if is_alone else torch.promote_types(p.dtype, torch.float32)
        return
    whole = model.keeps_whole
    model.set_requires_gradient_sync(is_last or not whole)
    model.set_requires_all_reduce(is_last)
    model.set_is_last_backward(is_last or not whole)
    model.set_reshard_after_backward(is_last or not whole)


def drop_step(model: nn.Module) -> None:
    """Forget a half-done step: gathered weights and gradients of all kinds; the shards keep their values.

    Between micro-batches without a reduce-scatter FSDP2 keeps whole gradients beside the parameters, where
    zero_grad does not reach and whence they would be added to the next step's: in the dtype of the gathered
    weights on those, else in fp32 as unsharded_accumulated_grad. No public call forgets them (torch 2.11 to
    2.13).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                group._partial_reduce_output = None  # reduced over dp_shard, not yet over dp_replicate
            for parameter in group.fsdp_params if group is not None else ():
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # not before the first gather
                    parameter._unsharded_param.grad = None
    for shard_ in model.parameters():
        shard_.grad = None


def plain_name(name: str) -> str:
    """The parameter's name without wrappers."""
    return name.replace(WRAPPER_PREFIX, "")
