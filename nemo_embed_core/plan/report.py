"""What a plan says, in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from nemo_embed_core.config.train import TrainConfig
from nemo_embed_core.parallel.wire import sent
from nemo_embed_core.plan.hardware import GPUS
from nemo_embed_core.plan.plan import SLACK_BYTES, SLACK_SHARE, Candidate, Found, needed
from nemo_embed_core.plan.time import HIDDEN, RECOMPUTED
from nemo_embed_core.train.optim import BYTES_PER_PARAMETER, update_bytes


def rates(found: Found, candidate: Candidate) -> dict[str, tuple[float, float]]:
    """(low, high) of what follows from the seconds of a step."""
    cluster = found.config.cluster
    low, high = candidate.seconds
    gpus, peak = cluster.world_size, GPUS[cluster.gpu].peak
    hours = (found.train.num_steps * low / 3600, found.train.num_steps * high / 3600)
    return {
        "seconds": (low, high),
        "tokens_per_s": (candidate.tokens / high, candidate.tokens / low),
        "tokens_per_s_and_gpu": (candidate.tokens / high / gpus, candidate.tokens / low / gpus),
        "mfu": (candidate.flops / high / gpus / peak, candidate.flops / low / gpus / peak),
        "hours": hours,
        "gpu_hours": (hours[0] * gpus, hours[1] * gpus),
    }


def report(found: Found) -> str:
    return "\n".join(_lines(found))


def _lines(found: Found) -> Iterator[str]:
    config, cluster, train = found.config, found.config.cluster, found.train
    gpu = GPUS[cluster.gpu]
    lora = f" and {found.num_trained / 1e6:.1f} M of LoRA, trained alone" if train.lora.rank else ""
    yield (
        f"{', '.join(config.files)} on {cluster.world_size} x {cluster.gpu} (nodes: "
        f"{cluster.nodes} of {cluster.per_node}): "
        f"{found.num_parameters / 1e9:.3f} B parameters ({found.model_words}){lora}, "
        f"{train.num_steps:,} steps of {train.global_batch_size:,} queries"
    )
    yield f"Texts: {found.texts.words}; the longest row that can be drawn has {found.texts.longest:,} tokens"
    if not found.best:
        yield "No layout fits."
    else:
        yield ""
        yield (
            f"{'':3}{'tp':>3}{'dp':>5}{'copies':>7}  {'recompute':<10}{'tokens':>7}{'micro':>6}{'fill':>6}"
            f"{'needs GB':>9}{'tokens/s/GPU':>16}{'MFU %':>9}{'hours':>14}{'GPU hours':>16}"
        )
        for i, candidate in enumerate(found.best[: config.top]):
            values, lay = rates(found, candidate), candidate.layout
            low, high = values["tokens_per_s_and_gpu"]
            mfu, hours, gpu_hours = values["mfu"], values["hours"], values["gpu_hours"]
            yield (
                f"{i + 1:2}.{lay.tp:3}{lay.dp:5}{lay.replicate:7}  "
                f"{candidate.recompute:<10}{candidate.max_tokens:7,}"
                f"{candidate.micro_batches:6}{candidate.fill:6.0%}{needed(candidate.peak) / 1e9:9.1f}"
                f"{f'{low:,.0f}-{high:,.0f}':>16}{f'{mfu[0]:.0%}-{mfu[1]:.0%}':>9}"
                f"{f'{hours[0]:,.1f}-{hours[1]:,.1f}':>14}{f'{gpu_hours[0]:,.0f}-{gpu_hours[1]:,.0f}':>16}"
            )
        yield from _in_full(found, found.best[0])
    yield from _what_does_not(found)
    yield ""
    yield "Assumptions, none of them measured on this cluster:"
    yield f"  {cluster.gpu}: {gpu.source}"
    yield (
        f"  The FLOPs of a step, recomputed ones included "
        f"({', '.join(f'{k} {v:.0%}' for k, v in RECOMPUTED.items())}), run at "
        f"{gpu.rates[0]:.0%} to {gpu.rates[1]:.0%} of the peak; "
        f"{HIDDEN[0]:.0%} to {HIDDEN[1]:.0%} of the compute hides "
        f"data-parallel traffic, nothing hides tensor-parallel traffic; "
        f"AdamW moves {update_bytes(train.optim):.3g} bytes a parameter"
    )
    node = cluster.node_link or gpu.node_link / 1e9
    yield f"  Links, GB/s of a GPU one way: {node:g} in a node, {cluster.network_link:g} between nodes"
    yield (
        f"  Needed memory is the engine's peak on fake tensors plus {SLACK_SHARE:.0%} and "
        f"{SLACK_BYTES / 1e9:g} GB (workspaces, "
        f"fragments, CUDA, NCCL); one GPU has {gpu.memory / 1e9:.1f} GB"
    )


def _in_full(found: Found, best: Candidate) -> Iterator[str]:
    train, cluster, seen = found.train, found.config.cluster, found.seen
    assert seen is not None and best.traffic is not None
    yield ""
    yield f"The first in full: {best.name}"
    yield f"  Peak of a rank, with the largest micro-batch: {seen.peak / 1e9:.2f} GB in the {seen.at}:"
    for part, size in seen.components.items():
        yield f"    {part:<24}{size / 1e9:8.2f} GB"
    checkpoint = BYTES_PER_PARAMETER * found.num_trained
    if train.checkpoint.async_save:
        rank = checkpoint / best.layout.tp / best.layout.shard
        yield (
            f"  Host memory for saves in the background: {rank / 1e9:.2f} GB a rank that writes, "
            f"{rank * cluster.per_node / 1e9:.1f} GB a node"
        )
    forever = train.num_steps // train.checkpoint.keep_every if train.checkpoint.keep_every else 0
    spared = int(bool(train.eval.datasets))
    also = "the best, " * spared
    yield (
        f"  Disk: {checkpoint / 1e9:.1f} GB a checkpoint, "
        f"{(train.checkpoint.keep + 1 + spared + forever) * checkpoint / 1e9:,.0f} GB for "
        f"keep={train.checkpoint.keep}, {also}one being written and {forever} kept for ever"
    )
    yield "  Wire of a step, of each rank:"
    lay = best.layout
    for (axis, operation), (calls, size) in best.traffic.items():
        whole, out = (_bytes(x) for x in (size, sent(operation, size, lay.ranks[axis])))
        yield f"    {axis:<13}{operation:<15}{calls:6,} calls{whole:>12} whole{out:>12} sent"
    parallel = f"--parallel.tp_size {lay.tp} --parallel.dp_replicate {lay.replicate}"
    yield (
        f"  To run it: {parallel} --activation_checkpointing {best.recompute} --data.max_tokens "
        f"{best.max_tokens}"
    )


def _bytes(size: float) -> str:
    return f"{size / 1e9:.3f} GB" if size >= 1e6 else f"{size:,.0f} bytes"


def _what_does_not(found: Found) -> Iterator[str]:
    memory = GPUS[found.config.cluster.gpu].memory
    if found.too_large:
        yield ""
        count = len(found.too_large)
        yield f"{count} layouts need more than the {memory / 1e9:.1f} GB of a GPU, from the smallest on:"
        for candidate in found.too_large[:3]:
            needs, remedy = needed(candidate.peak) / 1e9, _remedy(candidate, found.train)
            yield f"  {candidate.name}: {needs:.1f} GB; {remedy}"
    reasons: dict[str, int] = {}
    for candidate in found.impossible:
        reasons[candidate.why] = reasons.get(candidate.why, 0) + 1
    for why, count in reasons.items():
        yield f"{count} layouts are none: {why}"


def _remedy(candidate: Candidate, train: TrainConfig) -> str:
    """What to change so that it takes less, of what would."""
    if candidate.recompute != "full":
        return "recompute more (activation_checkpointing), or fewer data.max_tokens"
    if candidate.layout.replicate > 1:
        return "one copy (parallel.dp_replicate=1) or fewer data.max_tokens"
    ways = ["more GPUs"]
    if candidate.layout.dp > 1:
        ways.append("a larger parallel.tp_size")
        if not train.parallel.reshard_after_forward:
            ways.append("parallel.reshard_after_forward=true")
    if not train.lora.rank and train.optim.master_weights != "split" and train.precision != "fp32":
        ways.append("optim.master_weights=split")
    if train.optim.master_weights == "split" and train.optim.moments != "8bit":
        ways.append("optim.moments=" + ("bf16" if train.optim.moments == "fp32" else "8bit"))
    return ", ".join(ways) + " or fewer data.max_tokens"


def to_json(found: Found) -> dict[str, Any]:
    def of(candidate: Candidate) -> dict[str, Any]:
        values = {**asdict(candidate), "name": candidate.name}
        values["traffic"] = [
            {"axis": axis, "operation": operation, "calls": calls, "bytes": size}
            for (axis, operation), (calls, size) in (candidate.traffic or {}).items()
        ]
        return {**values, **(rates(found, candidate) if candidate.seconds[0] else {})}

    return {
        "config": asdict(found.config),
        "parameters": found.num_parameters,
        "gpu": asdict(GPUS[found.config.cluster.gpu]),
        "texts": {"words": found.texts.words, "longest": found.texts.longest},
        "best": [of(c) for c in found.best],
        "memory": {"peak": found.seen.peak, "at": found.seen.at, **found.seen.components}
        if found.seen
        else None,
        "too_large": [of(c) for c in found.too_large],
        "impossible": [of(c) for c in found.impossible],
    }
