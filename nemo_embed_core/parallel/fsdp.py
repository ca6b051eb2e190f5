"""FSDP2 over the data-parallel axes, always, also at dp_size = 1: it carries the mixed-precision policy."""

from __future__ import annotations

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
    reshard_after_forward: bool,
    reduce_dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool,
) -> None:
    """Wrap in place: (activation checkpointing) -> each block -> root. Weights stay fp32; `dtype` is what
    runs.

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
    for i, block in enumerate(blocks):
        if activation_checkpointing:
            blocks[i] = block = checkpoint_wrapper(block)  # non-reentrant
        fully_shard(block, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    model.keeps_whole = not reshard_after_forward  # type: ignore[assignment]


def begin_micro_batch(model: nn.Module, is_last: bool) -> None:
    """Before a forward and the backward that follows it: what of weights and gradients outlives them.

    W bytes of weights as they run, G of gradients, n micro-batches of a step; the wire carries

        kept whole       W + G          one gather, one reduction; W + G stay between micro-batches
        reshard          n (2 W + G)    nothing stays

    With dp_replicate the sum over copies waits for the last micro-batch either way: shards of it are small.
    """
    assert isinstance(model, FSDPModule)
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
