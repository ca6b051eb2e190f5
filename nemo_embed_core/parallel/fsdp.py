"""FSDP2 over the data-parallel axis, always, also at dp_size = 1: it carries the mixed-precision policy."""

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
    activation_checkpointing: bool,
) -> None:
    """Wrap in place: (activation checkpointing) -> each block -> root. Weights stay fp32; `dtype` is what
    runs.

    cast_forward_inputs is off: it would turn the fp32 RoPE table into bf16. Inputs are ids, so nothing needs
    a cast.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    if dtype == torch.float64:  # tests: keep fp64 end to end
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for i, block in enumerate(blocks):
        if activation_checkpointing:
            blocks[i] = block = checkpoint_wrapper(block)  # non-reentrant
        fully_shard(block, mesh=mesh.dp, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh.dp, mp_policy=policy, reshard_after_forward=reshard_after_forward)


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
            for parameter in group.fsdp_params if group is not None else ():
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # not before the first gather
                    parameter._unsharded_param.grad = None
    for shard_ in model.parameters():
        shard_.grad = None


def plain_name(name: str) -> str:
    """The parameter's name without wrappers."""
    return name.replace(WRAPPER_PREFIX, "")
