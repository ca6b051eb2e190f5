"""What the stages that are left will cost, where it can be known: seconds by FLOPs, requests by the budget.

cost(config, setting, stages, output)["tuned"].words      # "at most 1.2 M tokens, 40 to 300 s"
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_embed_core.config import ModelConfig, PipelineConfig
from nemo_embed_core.data.dataset import METADATA
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.pipeline.stages import Setting, Stages, document_max_length, precision_of
from nemo_embed_core.steps.state import DONE, is_done, is_there, place, real

# Of the rate of one matrix product: a step's share, most and least. Small models and short texts are far
# below it, as embeddings, norms and the optimizer are no products.
SHARES = {"cuda": (0.8, 0.2), "cpu": (0.7, 0.07)}


@dataclass(frozen=True)
class Cost:
    """seconds: (least, most), None where nothing is known."""

    words: str
    seconds: tuple[float, float] | None = None


def cost(config: PipelineConfig, setting: Setting, stages: Stages, output: Path) -> dict[str, Cost]:
    """Of each stage: what it took, or an estimate; lengths count as if every text had all tokens allowed."""
    counts = _counts(stages, output)
    found: dict[str, Cost] = {}
    rate = 0.0
    for name, step in stages.steps.items():
        if is_done(step, output):
            seconds = float(read_object(place(step, output) / DONE)["seconds"])
            found[name] = Cost(f"took {seconds:.0f} s", (seconds, seconds))
            continue
        if name == "written":
            found[name] = Cost(_paid(config))
            continue
        if (tokens := _tokens(config, setting, name, counts)) is None:
            found[name] = Cost("")
            continue
        rate = rate or flops_of_machine(setting.machine.device, precision_of(config, setting.machine))
        flops = tokens * _flops(setting.model, setting, is_training=name == "tuned")
        ranks = setting.machine.ranks if name in ("tuned", "mine") else 1
        most, least = SHARES[setting.machine.device]
        low, high = (flops / (rate * share * ranks) for share in (most, least))
        words = f"at most {tokens:,} tokens, {low:.0f} to {high:.0f} s at {rate / 1e12:.2g} TFLOP/s"
        found[name] = Cost(words, (low, high))
    return found


def _counts(stages: Stages, output: Path) -> Mapping[str, Mapping[str, int]]:
    """{"train": {"queries", "documents"}, "test": ...} of the pairs, once they are there."""
    pairs = stages.steps["pairs"]
    if not is_there(pairs, output):
        return {}
    folder = Path(real(pairs.product, output))
    return {split: read_object(folder / split / METADATA)["counts"] for split in ("train", "test")}


def _tokens(
    config: PipelineConfig, setting: Setting, name: str, counts: Mapping[str, Mapping[str, Any]]
) -> int | None:
    query, document = config.query_max_length, document_max_length(config, setting.machine)
    if name == "tuned":
        row = query + (1 + config.num_negatives) * document
        if config.steps:
            return config.steps * config.global_batch_size * row
        rows = counts["train"]["queries"] if counts else config.max_rows
        rows = min(rows, config.max_rows or rows)
        return config.epochs * rows * row if rows and not config.generate.models else None
    if not counts or (name == "mine" and config.generate.models):
        return None
    if name == "mine":
        return counts["train"]["queries"] * query + counts["train"]["documents"] * document
    if name == "scores":
        queries = min(counts["test"]["queries"], config.max_queries or counts["test"]["queries"])
        return 2 * (queries * query + counts["test"]["documents"] * document)
    return None


def _flops(model: ModelConfig, setting: Setting, is_training: bool) -> float:
    """Of a token; attention over these lengths is a few hundredths of it."""
    from nemo_embed_core.train.metrics import training_flops

    chosen = setting.chosen
    shape = replace(model, num_hidden_layers=chosen.layers) if chosen.layers else model
    whole = training_flops(shape, 1, 0, is_training and chosen.method == "lora")
    return whole if is_training else whole / 3


def _paid(config: PipelineConfig) -> str:
    generate = config.generate
    budget = "no budget" if generate.budget is None else f"at most {generate.budget:g} paid"
    return f"{generate.requests:,} requests, but for those that output/answers has; {budget}"


def flops_of_machine(device: str, precision: str) -> float:
    """FLOP/s of a large matrix product, the best of three."""
    import torch

    n = 8192 if device == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
