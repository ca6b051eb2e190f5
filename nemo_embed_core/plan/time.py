"""How long a step takes: an interval from counted FLOPs and bytes. Nothing here is measured on the cluster.

    step = sum over micro-batches of compute + tp wire + dp wire not hidden by compute + optimizer + host

compute     hardware FLOPs / (tp x peak x rate), rate an interval (hardware.py), less for narrow ones under
            tp; at least the time in which a GPU reads its weights three times
fp8         products at the GPU's fp8 rate instead of the highest bf16 one, and the bytes of quantising:
            8 a value that is multiplied (5 forward, 3 backward), 6 a gradient, 6 a weight and step; 2 less
            a value where its kernel takes the largest one along (norms, SwiGLU and its gradient)
tp wire     bytes sent / link + calls x latency: nothing of it is hidden
dp wire     the same, of which 50 to 90 % of the compute hides as much
optimizer   the bytes that an update reads and writes (train/optim.py), at the memory's rate
host        18 ms a step (benchmarks/results: what a step of the 8B was idle)

A ring over several nodes goes at the rate of the network cards of those GPUs of a node that belong to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_embed_core.config.model import ModelConfig
from nemo_embed_core.config.plan import ClusterConfig
from nemo_embed_core.config.train import Recompute
from nemo_embed_core.parallel.wire import Key, Traffic, sent
from nemo_embed_core.plan.hardware import GPUS
from nemo_embed_core.train.metrics import training_flops

HIDDEN = (0.5, 0.9)  # share of the compute behind which data-parallel traffic can hide
NARROW = {1: 1.0, 2: 0.98, 4: 0.95, 8: 0.92}  # rate of products cut over tp ranks
LATENCY = {"node": 12e-6, "network": 40e-6}  # seconds a collective
HOST_S = 0.018
# Share of the model's FLOPs that backward runs again.
RECOMPUTED: Mapping[Recompute, float] = {"none": 0.0, "selective": 0.01, "full": 1 / 3}


def fp8_bytes(model: ModelConfig, again: float) -> float:
    """Of a token, to quantise inputs of all products of the blocks and gradients of their outputs; again:
    forwards."""
    D, F, A = model.hidden_size, model.intermediate_size, model.head_dim
    H, G = model.num_attention_heads, model.num_key_value_heads
    forward = 3 * (D + D + F) + 5 * H * A
    backward = 3 * (D + D + F + H * A) + 6 * ((H + 2 * G) * A + D + D) + 4 * 2 * F
    return model.num_hidden_layers * (again * forward + backward)


@dataclass(frozen=True)
class Layout:
    tp: int
    replicate: int
    world_size: int

    @property
    def dp(self) -> int:
        return self.world_size // self.tp

    @property
    def shard(self) -> int:
        return self.dp // self.replicate

    @property
    def ranks(self) -> dict[str, int]:
        """Of a ring over each axis."""
        return {"tp": self.tp, "dp_shard": self.shard, "dp": self.dp, "dp_replicate": self.replicate}


def link(cluster: ClusterConfig, layout: Layout, axis: str) -> tuple[float, float]:
    """(bytes/s, latency) of a ring over an axis; tp ranks are neighbours, then come dp_shard and
    dp_replicate."""
    node = (cluster.node_link * 1e9) or GPUS[cluster.gpu].node_link
    network = cluster.network_link * 1e9
    inner = {"tp": 1, "dp_shard": layout.tp, "dp": layout.tp, "dp_replicate": layout.tp * layout.shard}[axis]
    if inner * layout.ranks[axis] <= cluster.per_node:
        return node, LATENCY["node"]
    members = max(1, cluster.per_node // inner)  # of the ring in a node, each with its card
    return min(node, members * network), LATENCY["network"]


def wire_seconds(
    cluster: ClusterConfig, layout: Layout, traffic: Mapping[Key, Traffic], axes: Sequence[str]
) -> float:
    seconds = 0.0
    for (axis, operation), (calls, size) in traffic.items():
        if axis in axes:
            rate, latency = link(cluster, layout, axis)
            seconds += sent(operation, size, layout.ranks[axis]) / rate + calls * latency
    return seconds


def step_seconds(
    cluster: ClusterConfig,
    layout: Layout,
    model: ModelConfig,
    micro_batches: Sequence[tuple[int, int]],
    traffic: Mapping[Key, Traffic],
    recompute: Recompute,
    num_parameters: int,
    optimizer_bytes: float,
    fp8: bool = False,
    num_trained: int | None = None,
) -> tuple[float, float]:
    """(least, most) seconds of a step; micro_batches: (tokens, sum of squared lengths) of the fullest rank in
    each; optimizer_bytes: optim.update_bytes; fp8: of the blocks' products; num_trained: of LoRA's
    factors, beside frozen weights."""
    gpu = GPUS[cluster.gpu]
    is_frozen = num_trained is not None
    floor = (
        training_flops(model, 1, 0, is_frozen) / layout.tp / gpu.bandwidth
    )  # 2 bytes of each weight, each time
    tp = wire_seconds(cluster, layout, traffic, ("tp",))
    dp = wire_seconds(cluster, layout, traffic, ("dp_shard", "dp_replicate", "dp"))
    updated = num_parameters if num_trained is None else num_trained
    optimizer = optimizer_bytes * updated / layout.tp / layout.shard / gpu.bandwidth
    again = 2.0 if recompute == "full" else 1.0
    quantized = fp8_bytes(model, again)
    if fp8:
        # Once a step, of a weight: its largest value 2 bytes, both layouts 4. Of shards: the largest value 4,
        # the bf16 of an fp32 master 6, its fp8 3; and the transpose of all that was gathered 2.
        weight_bytes = 6 if layout.shard == 1 else 13 / layout.shard + 2
        optimizer += weight_bytes * num_parameters / layout.tp / gpu.bandwidth
    found = []
    for rate, hidden, fp8_rate in zip(reversed(gpu.rates), reversed(HIDDEN), reversed(gpu.fp8), strict=True):
        narrow = layout.tp * NARROW.get(layout.tp, min(NARROW.values()))
        compute = 0.0
        for tokens, squares in micro_batches:
            flops = training_flops(model, tokens, squares, is_frozen)
            flops += training_flops(model, tokens, squares) * RECOMPUTED[recompute]
            seconds = flops / (narrow * gpu.peak * rate)
            if fp8:
                products = training_flops(model, tokens, 0, is_frozen) * again / narrow
                seconds += products / fp8_rate - products / (gpu.peak * gpu.rates[1])
                seconds += quantized * tokens / layout.tp / gpu.bandwidth
            compute += max(seconds, floor)
        found.append(compute + tp + max(0.0, dp - hidden * compute) + optimizer + HOST_S)
    return found[0], found[1]
