"""The process grid [dp, tp]: set up, checked before any collective, torn down. The only reader of RANK and WORLD_SIZE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_embed_core.config import ModelConfig, ParallelConfig, UserError


@dataclass(frozen=True)
class TensorParallel:
    """What a layer needs to know about its tensor-parallel axis; the default is a single process without torch.distributed."""

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
    """Ranks as [dp, tp] with tp fastest: the tp ranks of one replica are neighbours on NVLink."""

    device: torch.device
    dp: DeviceMesh
    tp: TensorParallel
    dp_size: int
    dp_rank: int

    @property
    def rank(self) -> int:
        return self.dp_rank * self.tp.size + self.tp.rank

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp.size

    @property
    def dp_group(self) -> Any:
        return self.dp.get_group()


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
            f"parallel.dp_size={dp} x parallel.tp_size={tp} = {dp * tp} processes, but {world_size} were started; "
            f"leave dp_size at 0 to use {world_size // tp}"
        )
    if model is not None:
        for name in ("num_key_value_heads", "num_attention_heads", "vocab_size"):
            size = getattr(model, name)
            if size % tp:
                hint = f"use a divisor of {size}" if name != "vocab_size" else "pad the vocabulary to a multiple of it"
                raise UserError(f"parallel.tp_size={tp} does not divide {name}={size}; {hint}")
    return dp


def world_size_from_env() -> int:
    """WORLD_SIZE under torchrun, 1 without a launcher."""
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(f"RANK={os.environ['RANK']} is set but WORLD_SIZE is not; start with torchrun, or unset RANK")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but {name} is not; start with torchrun")
    return int(os.environ.get("WORLD_SIZE", 1))


def rank_from_env() -> int:
    return int(os.environ.get("RANK", 0))


def pick_device(device: str) -> torch.device:
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise UserError(
                "device=cuda, but torch sees no CUDA device; install a CUDA build of torch or set device=cpu"
            )
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank}, but this node has {torch.cuda.device_count()} CUDA device(s); "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


@contextmanager
def distributed(parallel: ParallelConfig, device: str = "auto", model: ModelConfig | None = None) -> Iterator[Mesh]:
    """NCCL on GPUs, gloo on CPUs; one process without torchrun is a world of one.

    A group of size 1 is made as well: FSDP2 carries the mixed-precision policy, so there is one code path.
    """
    world_size = world_size_from_env()
    dp_size = check_layout(parallel, world_size, model)
    target = pick_device(device)
    timeout = timedelta(seconds=parallel.timeout_s)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    # gloo beside NCCL: checkpoints and the finite check exchange small CPU objects without touching a stream.
    backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield build_mesh(target, dp_size, parallel.tp_size, parallel.sequence_parallel)
    finally:
        dist.destroy_process_group()


def build_mesh(device: torch.device, dp_size: int, tp_size: int, sequence_parallel: bool) -> Mesh:
    """The grid over an initialised process group."""
    grid = init_device_mesh(device.type, (dp_size, tp_size), mesh_dim_names=("dp", "tp"))
    tp = TensorParallel(
        mesh=grid["tp"],
        size=tp_size,
        rank=grid["tp"].get_local_rank(),
        sequence_parallel=sequence_parallel and tp_size > 1,
    )
    return Mesh(device=device, dp=grid["dp"], tp=tp, dp_size=dp_size, dp_rank=grid["dp"].get_local_rank())
