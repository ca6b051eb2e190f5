"""Checkpoints to Hugging Face weights, and the average of several: streamed in blocks, no GPU, no process group.

    merged = sum(w) / N in fp64, rounded once to the output dtype

Memory is one block per source, whatever the size of the model. Sources may be checkpoints of any tp x dp layout, runs
(their newest checkpoint) and Hugging Face folders, mixed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.checkpoint.files import DTYPES, SafetensorsWriter, write_bytes
from nemo_embed_core.checkpoint.weights import Weights, open_weights
from nemo_embed_core.config import ModelConfig, UserError, to_dict
from nemo_embed_core.model.hf import hf_rows, hf_shapes, parameter_shapes

BLOCK_ELEMENTS = 4 << 20  # per source: 16 MB in fp32
SHARD_BYTES = 5_000_000_000


def open_sources(paths: Sequence[str]) -> list[Weights]:
    """Verified sources of one shape."""
    sources = [open_weights(path) for path in paths]
    first = sources[0]
    for path, other in zip(paths, sources, strict=True):
        if other.model != first.model:
            ours, theirs = to_dict(first.model), to_dict(other.model)
            fields = [f"{k}: {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k]]
            raise UserError(f"{paths[0]} and {path} are models of different shapes: {'; '.join(fields)}")
    return sources


def write_weights(folder: Path, sources: Sequence[Weights], dtype: torch.dtype) -> None:
    """model.safetensors (or shards of at most 5 GB and their index) under Hugging Face names without "model."."""
    config = sources[0].model
    shapes = hf_shapes(config)
    shards = _assign(shapes, dtype)
    origin = _origin(config)
    weight_map, total = {}, 0
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        writer = SafetensorsWriter(folder / file, {n: (dtype, shapes[n]) for n in names}, {"format": "pt"})
        for name in names:
            for block in _blocks(sources, origin[name], shapes[name], dtype):
                if not bool(block.isfinite().all()):
                    raise UserError(
                        f"{name} has NaN or infinite values in {_blame(sources, origin[name], shapes[name])}"
                    )
                writer.write(block)
            weight_map[name] = file
        total += writer.close()["size"]
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_bytes(folder / "model.safetensors.index.json", json.dumps(index, indent=1).encode())


def _assign(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        n = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + n > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    return shards


def _origin(config: ModelConfig) -> dict[str, list[tuple[int, int, str, int]]]:
    """Hugging Face name -> its rows in order as (first row, number of rows, our parameter, first row there)."""
    origin: dict[str, list[tuple[int, int, str, int]]] = {}
    for name in parameter_shapes(config):
        row = 0
        for hf_name, start, rows in hf_rows(name, config):
            origin.setdefault(hf_name, []).append((start, rows, name, row))
            row += rows
    return {hf_name: sorted(pieces) for hf_name, pieces in origin.items()}


def _blocks(
    sources: Sequence[Weights], pieces: Sequence[tuple[int, int, str, int]], shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Tensor]:
    """The rows of one Hugging Face tensor in order, averaged over the sources."""
    columns = shape[1:]
    step = max(1, BLOCK_ELEMENTS // max(1, torch.Size(columns).numel()))
    for _, rows, name, first in pieces:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            box = ((first + start, *(0 for _ in columns)), (count, *columns))
            yield _mean([s.reader.read_box(name, box) for s in sources], dtype)


def _mean(blocks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One source is cast; several are summed in fp64 and rounded once."""
    if len(blocks) == 1:
        return blocks[0].to(dtype)
    total = blocks[0].double()
    for block in blocks[1:]:
        total += block
    return round_once(total / len(blocks), dtype)


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 -> dtype, correctly rounded (to nearest, ties to even).

    Casting fp64 to bf16 or fp16 goes through fp32 and rounds twice. Rounding to odd on the way to fp32 keeps the second
    rounding right: fp32 has more than two bits beyond either (Boldo and Melquiond 2008).
    """
    if dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    y = x.to(torch.float32)
    bits = y.view(torch.int32)
    exact = y.double() == x
    # Step one ulp towards zero where the nearest fp32 lies beyond x, then set the last bit.
    truncated = torch.where(y.double().abs() > x.abs(), bits - 1, bits)
    odd = torch.where(exact, bits, truncated | 1)
    return odd.view(torch.float32).to(dtype)


def _blame(sources: Sequence[Weights], pieces: Sequence[tuple[int, int, str, int]], shape: tuple[int, ...]) -> str:
    bad = [
        str(source.folder)
        for source in sources
        if any(not bool(b.isfinite().all()) for b in _blocks([source], pieces, shape, torch.float64))
    ]
    return ", ".join(bad) or "the average (it overflows the output dtype)"


@dataclass(frozen=True)
class TrainingFacts:
    """What the manifests of our checkpoints know about the training, for the model card and the query prompt."""

    tasks: list[str]  # distinct query instructions
    max_length: int  # tokens
    init_from: str
    datasets: list[dict[str, Any]]
    recipe: dict[str, Any]


def training_facts(sources: Sequence[Weights]) -> TrainingFacts:
    configs = [m["config"] for m in (getattr(s.reader, "manifest", {}) for s in sources) if "config" in m]
    data = [dataset for config in configs for dataset in config["data"]["datasets"]]
    lengths = [config["data"][key] for config in configs for key in ("query_max_length", "document_max_length")]
    rows = {
        (Path(dataset["path"]).name, dataset["task"]): {"name": Path(dataset["path"]).name, "task": dataset["task"]}
        for dataset in data
    }
    return TrainingFacts(
        tasks=sorted({dataset["task"] for dataset in data}),
        max_length=max(lengths, default=512),
        # A name, not a path of this machine: "runs/stage1", "meta-llama/Llama-3.1-8B".
        init_from="/".join(Path(configs[0]["init_from"]).parts[-2:]) if configs else "",
        datasets=list(rows.values()),
        recipe={k: configs[0][k] for k in ("steps", "global_batch_size", "loss", "optim", "precision")}
        if configs
        else {},
    )


def source_name(source: Weights) -> str:
    """run/step-00000500 or the folder's own name: no path of this machine goes into a model card."""
    parts = source.folder.absolute().parts
    return "/".join(parts[-2:]) if "manifest" in vars(source.reader) else parts[-1]


def dtype_of(name: str, sources: Sequence[Weights]) -> torch.dtype:
    """ "auto" is the widest dtype among the sources."""
    if name == "auto":
        return next(d for d in DTYPES if any(s.dtype == d for s in sources))
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[name]
