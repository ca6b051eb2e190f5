"""What a training step is made of: GPU time of its kernels, by part."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from nemo_embed_core.kernels import info_nce_columns, info_nce_own, mean_pool, rms_norm, rope, swiglu

# kernels/*.py by the names of their Triton kernels
OWN_PARTS = {
    kernel.__name__: part
    for part, modules in {
        "norms, RoPE, SwiGLU": (rms_norm, rope, swiglu),
        "pooling and loss": (mean_pool, info_nce_own, info_nce_columns),
    }.items()
    for module in modules
    for kernel in vars(module).values()
    if isinstance(kernel, triton.runtime.KernelInterface)
}
# Others by a part of the name, the first line that has it: attention kernels are built with cutlass, as GEMMs
# are; FSDP's copies and the gradient norm are multi_tensor_apply kernels, as Adam is.
OTHER_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("optimizer", ("FusedAdam", "_adamw_kernel")),
    ("GEMM", ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitKreduce")),
    (
        "copies (FSDP, casts, host)",
        ("chunk_cat", "split_with_sizes", "nccl", "copy", "Copy", "Memcpy", "CatArray"),
    ),
    ("clipping", ("multi_tensor_apply", "lpnorm", "LpNorm")),
    (
        "embedding",
        ("embedding", "index", "gather", "cub::", "compute_grad_weight", "segment", "sum_and_scatter"),
    ),
)
PARTS = [*dict.fromkeys(OWN_PARTS.values()), *(part for part, _ in OTHER_PARTS), "other"]


def part_of(kernel: str) -> str:
    if kernel in OWN_PARTS:
        return OWN_PARTS[kernel]
    return next((part for part, names in OTHER_PARTS if any(name in kernel for name in names)), "other")


@dataclass(frozen=True)
class Composition:
    seconds: dict[str, float]  # of kernels, by part
    busy: float  # some kernel or copy runs: at most the sum, FSDP copies run beside
    other: list[tuple[str, float]]  # the largest kernels in "other"


def composition(trace: dict[str, Any]) -> Composition:
    """Of a Chrome trace of torch.profiler; annotations span kernels and are left out."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in kinds]
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    other: dict[str, float] = {}
    busy, end = 0.0, -math.inf
    for event in sorted(events, key=lambda e: e["ts"]):
        part, duration = part_of(event["name"]), event["dur"] / 1e6
        seconds[part] += duration
        if part == "other":
            other[event["name"]] = other.get(event["name"], 0.0) + duration
        busy += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"])) / 1e6
        end = max(end, event["ts"] + event["dur"])
    return Composition(seconds, busy, sorted(other.items(), key=lambda item: -item[1])[:3])


def profiled(run: Callable[[], object]) -> Composition:
    """Of one call on the GPU. Only the GPU is traced: tracing the host would slow the launches down."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return composition(json.loads(path.read_text()))
