"""The process grid [dp_replicate, dp_shard, tp]: set up on NCCL or gloo, and torn down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_embed_core.config import ModelConfig, ParallelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel import liveness
from nemo_embed_core.parallel.layout import (
    check_layout,
    local_rank_from_env,
    rank_from_env,
    world_size_from_env,
)

COLLECTIVE_MARGIN_S = 30


@dataclass(frozen=True)
class TensorParallel:
    """What a layer needs to know about its tensor-parallel axis; the default is a single process without
    torch.distributed."""

    mesh: DeviceMesh | None = None  # 1-D
    size: int = 1
    rank: int = 0
    sequence_parallel: bool = False

    @property
    def group(self) -> Any:
        assert self.mesh is not None
        return self.mesh.get_group()


@dataclass(frozen=True)
class Mesh:
    """Ranks as [dp_replicate, dp_shard, tp] with tp fastest: what talks most are neighbours on NVLink.

    The batch is split over all dp_size = replicate x shard ranks; a state is sharded over shard_size of them.
    """

    device: torch.device
    fsdp: DeviceMesh  # [dp_replicate, dp_shard], or [dp_shard] of one copy
    tp: TensorParallel
    dp_size: int
    dp_rank: int
    shard_size: int
    shard_rank: int
    dp_group: Any
    shard_group: Any

    @property
    def rank(self) -> int:
        return self.dp_rank * self.tp.size + self.tp.rank

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp.size

    @property
    def replicate_rank(self) -> int:
        return self.dp_rank // self.shard_size


def pick_device(device: str) -> torch.device:
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise UserError(
                "device=cuda, but torch sees no CUDA device; install a CUDA build of torch or set device=cpu"
            )
        local_rank = local_rank_from_env()
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank}, but this node has {torch.cuda.device_count()} CUDA device(s); "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


# By precision, of weights and activations; fp8 is bf16 but for the products of the blocks (fp8.py).
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
FP8_CAPABILITY = (8, 9)  # of a GPU: Ada and Hopper


def pick_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bf16 on a GPU and fp32 on a CPU. UserError for fp8 on a GPU that cannot multiply it."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            raise UserError(
                f"precision=fp8 needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or "
                f"later (Ada, Hopper), and {torch.cuda.get_device_name(device)} has {capability[0]}."
                f"{capability[1]}; use precision=bf16"
            )
    return precision


@contextmanager
def distributed(
    parallel: ParallelConfig, device: str = "auto", model: ModelConfig | None = None
) -> Iterator[Mesh]:
    """NCCL on GPUs, gloo on CPUs; one process without torchrun is a world of one.

    A group of size 1 is made as well: FSDP2 carries the mixed-precision policy, so there is one code path.
    Ranks that wait for a stuck, dead or failed one end with SystemExit(OTHER_RANK_EXIT_CODE) and its name
    (liveness.py).
    """
    world_size, rank = world_size_from_env(), rank_from_env()
    dp_size = check_layout(parallel, world_size, model)
    target = pick_device(device)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    # gloo beside NCCL: checkpoints and the finite check exchange small CPU objects without touching a stream.
    backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield build_mesh(target, dp_size, parallel.tp_size, parallel.sequence_parallel)
        finally:
            dist.destroy_process_group()
        return
    store = liveness.join(rank, world_size, parallel.timeout_s)
    with liveness.watched(rank, world_size, parallel.timeout_s):
        liveness.note("process group")
        # Later than ours, which says who is behind; it is what remains when all ranks are alive and equally
        # far.
        timeout = timedelta(seconds=parallel.timeout_s + COLLECTIVE_MARGIN_S)
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size, timeout=timeout
        )
        yield build_mesh(target, dp_size, parallel.tp_size, parallel.sequence_parallel, parallel.dp_replicate)
    # Not after an error: NCCL's destroy waits for the other ranks, and the process ends in any case.
    dist.destroy_process_group()


def build_mesh(
    device: torch.device, dp_size: int, tp_size: int, sequence_parallel: bool, dp_replicate: int = 1
) -> Mesh:
    """The grid over an initialised process group."""
    shape, names = (dp_replicate, dp_size // dp_replicate, tp_size), ("dp_replicate", "dp_shard", "tp")
    first = 1 if dp_replicate == 1 else 0  # FSDP2 all-reduces over a second axis whatever its size
    grid = init_device_mesh(device.type, shape[first:], mesh_dim_names=names[first:])
    fsdp = grid[names[first:2]] if first == 0 else grid["dp_shard"]
    tp = TensorParallel(
        mesh=grid["tp"],
        size=tp_size,
        rank=grid["tp"].get_local_rank(),
        sequence_parallel=sequence_parallel and tp_size > 1,
    )
    shard = grid["dp_shard"]
    # No communicator beside one of the same ranks.
    dp = shard if first else grid["dp_replicate"] if shard.size() == 1 else fsdp._flatten("dp")
    replicate_rank = 0 if first else grid["dp_replicate"].get_local_rank()
    return Mesh(
        device=device,
        fsdp=fsdp,
        tp=tp,
        dp_size=dp_size,
        dp_rank=replicate_rank * shard.size() + shard.get_local_rank(),
        shard_size=shard.size(),
        shard_rank=shard.get_local_rank(),
        dp_group=dp.get_group(),
        shard_group=shard.get_group(),
    )
