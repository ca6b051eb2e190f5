"""Facts of GPUs, each with its source. A rate is an interval: the lowest and the highest that is published or
measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GPU:
    """peak: dense bf16 FLOP/s · memory: bytes for torch · bandwidth, node_link: bytes/s, one direction.

    rates: share of `peak` at which the FLOPs of a step really run, recomputed ones included, communication
    not: of dense training of 7B and larger in bf16.
    fp8: FLOP/s of fp8 products of the 8B's shapes, least and most; 0: there are none.
    """

    peak: float
    memory: float
    bandwidth: float
    node_link: float
    rates: tuple[float, float]
    fp8: tuple[float, float] = (0.0, 0.0)
    source: str


GPUS: Mapping[str, GPU] = {
    "L4": GPU(
        peak=121e12, memory=22.1 * 2**30, bandwidth=0.28e12, node_link=25e9, rates=(0.40, 0.67),
        source="NVIDIA L4 datasheet: 24 GB, 300 GB/s, 242 TFLOP/s with sparsity, PCIe Gen4 x16; rates, the "
        "memory that torch finds and the link are assumed",
    ),
    "A100-80GB": GPU(
        peak=312e12, memory=79.15 * 2**30, bandwidth=2.0e12, node_link=240e9, rates=(0.48, 0.79),
        source="NVIDIA A100 datasheet: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways, of which 80 % are "
        "assumed. Rates: mosaicml/llm-foundry, scripts/train/benchmarking/README.md, HFU of 7B to 70B on "
        "A100: 47.8 % (70B, 64 GPUs of 40 GB) to 79.3 % (13B, 8 GPUs)",
    ),
    "H100": GPU(
        peak=989e12, memory=79.1 * 2**30, bandwidth=2.9e12, node_link=370e9, rates=(0.40, 0.67),
        fp8=(1300e12, 1500e12),
        source="NVIDIA H100 SXM datasheet: 989 TFLOP/s, 3,350 GB/s, NVLink 900 GB/s both ways, of which 370 "
        "GB/s one way are assumed. Rates: mosaicml/llm-foundry, HFU of 7B to 70B up to 8,192 tokens on H100: "
        "39.6 % to 59.0 %; 67 % as the highest is assumed: an H200, the same chip, was recorded at 79 %, "
        "and with the fp8 products that are assumed here",
    ),
    "H200": GPU(
        peak=989e12, memory=139 * 2**30, bandwidth=4.2e12, node_link=370e9, rates=(0.50, 0.79),
        fp8=(1300e12, 1500e12),
        source="NVIDIA H200 datasheet: 989 TFLOP/s, 4,800 GB/s, NVLink as H100. Rates: matrix products of a "
        "step at 782 TFLOP/s, a step of 8 layers at 56.6 % (benchmarks/results/step-20261127-140006.jsonl); "
        "KempnerForge, 7B over 4 GPUs: 53.8 %. fp8: benchmarks/results/ceilings-20261127-135646.jsonl",
    ),
}  # fmt: skip
