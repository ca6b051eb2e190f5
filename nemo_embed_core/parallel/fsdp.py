"""FSDP2 over the data-parallel axis, always, also at dp_size = 1: it carries the mixed-precision policy."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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
    """Wrap in place: (activation checkpointing) -> each block -> root. Weights stay fp32; `dtype` is what runs.

    cast_forward_inputs is off: it would turn the fp32 RoPE table into bf16. Inputs are ids, so nothing needs a cast.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if dtype == torch.float64:  # tests: keep fp64 end to end
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for i, block in enumerate(blocks):
        if activation_checkpointing:
            blocks[i] = block = checkpoint_wrapper(block)  # non-reentrant
        fully_shard(block, mesh=mesh.dp, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh.dp, mp_policy=policy, reshard_after_forward=reshard_after_forward)


def plain_name(name: str) -> str:
    """The parameter's name without wrappers."""
    return name.replace(WRAPPER_PREFIX, "")
