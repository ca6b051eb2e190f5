"""How the ranks of a training share its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Options, section="parallel"):
    """How ranks share the model and the batch."""

    tp_size: int = 1
    """Tensor-parallel ranks; must divide the KV heads."""
    sequence_parallel: bool = True
    """Whether norms and residuals hold T / tp_size tokens when tp_size > 1."""
    dp_size: int = 0
    """Data-parallel ranks; 0: world size / tp_size."""
    dp_replicate: int = 1
    """Copies of weights, gradients and optimizer state among the dp_size ranks (HSDP): dp_size / dp_replicate
    neighbours shard one, so that weights are gathered within a node and only gradients cross nodes; 1: one,
    over all."""
    reshard_after_forward: bool = False
    """Whether nothing whole outlives a block (ZeRO-3): in every micro-batch weights are gathered twice and
    gradients reduced, which saves 2 bytes a parameter, and 6 when there are several. Else each happens once
    a step."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over data-parallel ranks, and over micro-batches where they wait for
    that; bf16 halves both bytes and has 8 bits."""
    timeout_s: int = 600
    """Seconds without progress after which the ranks end the job and name the one that is behind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tp_size < 1 or self.dp_size < 0:
            raise UserError(f"parallel.tp_size={self.tp_size} must be >= 1 and dp_size={self.dp_size} >= 0")
        if self.dp_replicate < 1:
            raise UserError(
                f"parallel.dp_replicate={self.dp_replicate} must be at least 1: one copy, sharded over all"
            )
        if self.timeout_s < 1:
            raise UserError(f"parallel.timeout_s={self.timeout_s} must be at least 1 second")
