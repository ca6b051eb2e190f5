"""tp_size x dp_size against the processes that were started and the model. The only reader of RANK and
WORLD_SIZE.

No torch import: a wrong set-up is refused before anything heavy is loaded and before any process group
exists.
"""

from __future__ import annotations

import os

from nemo_embed_core.config import ModelConfig, ParallelConfig
from nemo_embed_core.errors import UserError


def check_layout(parallel: ParallelConfig, world_size: int, model: ModelConfig | None = None) -> int:
    """dp_size for this world; every wrong combination is refused here, before any process group exists."""
    tp = parallel.tp_size
    if world_size % tp:
        raise UserError(
            f"world size {world_size} is not a multiple of parallel.tp_size={tp}; "
            f"start {world_size // tp * tp or tp} processes or change tp_size"
        )
    dp = parallel.dp_size or world_size // tp
    if dp * tp != world_size:
        raise UserError(
            f"parallel.dp_size={dp} x parallel.tp_size={tp} = {dp * tp} processes, but {world_size} were "
            f"started; leave dp_size at 0 to use {world_size // tp}"
        )
    if dp % parallel.dp_replicate:
        raise UserError(
            f"parallel.dp_replicate={parallel.dp_replicate} does not divide the {dp} data-parallel ranks; "
            f"every copy of the state is sharded over equally many: use a divisor of {dp}"
        )
    if model is not None:
        # And so the query heads; what else a rank holds is padded (tp_chunk).
        size = model.num_key_value_heads
        if size % tp:
            sizes = ", ".join(str(n) for n in range(1, size + 1) if size % n == world_size % n == 0)
            raise UserError(
                f"parallel.tp_size={tp} does not divide num_key_value_heads={size}; "
                f"of {world_size} processes these sizes would do: {sizes}"
            )
    return dp


def tp_chunk(size: int, tp_size: int, unit: int = 1) -> int:
    """What each tp rank holds of `size` rows or columns, in whole units; the last ranks' may reach beyond it,
    into padding.

    Padding is zeros and stays zero: no id looks up its embedding, and a channel whose gate, up and down
    weights are zero has zero gradients. It is no part of a tensor's global shape: never saved, never
    exported.
    """
    assert size % unit == 0, f"{size=} {unit=}"
    return -(-size // unit // tp_size) * unit


def world_size_from_env() -> int:
    """WORLD_SIZE under torchrun, 1 without a launcher."""
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"RANK={os.environ['RANK']} is set but WORLD_SIZE is not; start with torchrun, or unset RANK"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but {name} is not; start with torchrun"
                )
    return int(os.environ.get("WORLD_SIZE", 1))


def rank_from_env() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank_from_env() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))
