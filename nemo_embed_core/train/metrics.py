"""What a step reports: one JSON line in metrics.jsonl (the record of truth), one printed line, and on request
trackers (trackers.py)."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.config import LossConfig, ModelConfig, TrainConfig
from nemo_embed_core.data.packing import MicroBatch
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.loss.objective import figures, sum_names
from nemo_embed_core.model.spec import parameter_shapes, trained_shapes
from nemo_embed_core.parallel.collectives import all_reduce_world_
from nemo_embed_core.parallel.mesh import Mesh
from nemo_embed_core.train.trackers import Trackers
from nemo_embed_core.train.watch import Watch

# Dense bf16 datasheet peaks, FLOP/s. A device that is not listed reports no MFU rather than a guess.
PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def device_peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)


def training_flops(
    model: ModelConfig, num_tokens: int, sum_of_squared_lengths: int, is_frozen: bool = False
) -> float:
    """6 P T for the GEMMs + 12 L (H A) sum(n^2) for full attention, half of it for causal; embedding
    lookup and norms not counted.

    P: matmul parameters. Forward 2 P T, backward twice that, of frozen weights as much (4 P T in all: LoRA,
    whose own products are not counted); recomputation by activation checkpointing is not counted.
    """
    width = model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    per_layer = model.hidden_size * (2 * width + 2 * kv + 3 * model.intermediate_size)
    return (4.0 if is_frozen else 6.0) * model.num_hidden_layers * per_layer * num_tokens + (
        (6.0 if model.is_causal else 12.0) * model.num_hidden_layers * width * sum_of_squared_lengths
    )


class MetricsLog:
    """Rank 0's writer. A resumed run first drops the lines of steps that will run again, and an evaluation
    after its checkpoint, unless that has it: evaluated, the step of its last one. watch recalls the others,
    and adds its alarms to each line."""

    def __init__(
        self,
        config: TrainConfig,
        resume_step: int,
        log: Callable[[str], None] = print,
        watch: Watch | None = None,
        evaluated: int | None = None,
    ):
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    values = json.loads(line)
                    # An evaluation in a line of its own came after the checkpoint, and comes again unless it
                    # was written into that.
                    is_done = "loss" in values or evaluated == resume_step
                    if values["step"] < resume_step or (values["step"] == resume_step and is_done):
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    break  # the half line that a killed run left
        write_atomically(path, "".join(kept).encode())
        if watch is not None:
            watch.recall(map(json.loads, kept))
        self._file, self._watch = path.open("a"), watch
        self._trackers = Trackers.of(config, resume_step, log)

    def write(self, values: Mapping[str, Any]) -> None:
        if self._watch is not None:
            values = {**values, **self._watch.after(values)}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self._trackers.write(values)

    def close(self) -> None:
        self._file.close()
        self._trackers.close()


def opening_line(
    config: TrainConfig, model: ModelConfig, mesh: Mesh, dtype: torch.dtype, num_rows: int, step: int
) -> str:
    """What is trained, on what, from which step on."""
    parameters, trained = (
        sum(torch.Size(shape).numel() for shape in shapes.values())
        for shapes in (parameter_shapes(model), trained_shapes(model, config.lora))
    )
    lora = f" and {trained / 1e6:,.1f} M of LoRA, trained alone," if config.lora.rank else ""
    copies, tp = mesh.dp_size // mesh.shard_size, mesh.tp
    kind = f"{'sequence parallel, ' if tp.sequence_parallel else ''}{str(dtype).removeprefix('torch.')}"
    return (
        f"{parameters / 1e6:,.1f} M parameters{lora} on {mesh.dp_size} dp "
        f"{f'({copies} copies) ' if copies > 1 else ''}x {tp.size} tp {mesh.device.type} ranks ({kind}); "
        f"{num_rows:,} rows, {config.global_batch_size} queries a step, "
        f"steps {step + 1} to {config.num_steps}"
    )


def console_line(m: Mapping[str, Any], steps: int) -> str:
    """`step 12/500  loss 0.8312  acc 0.61 ...`; fields that this device cannot know are left out."""
    accuracy = "-" if m["accuracy"] is None else f"{m['accuracy']:.3f}"
    if m["rows_without_candidates"]:
        accuracy += f" ({m['rows_without_candidates']} rows without a candidate)"
    line = (
        f"step {m['step']}/{steps}  loss {m['loss']:.4f}  acc {accuracy}  pos "
        f"{m['positive_similarity']:.3f}  neg {m['negative_similarity']:.3f}  gnorm {m['grad_norm']:.3f}  "
        f"lr {m['lr']:.2e}  {m['tokens_per_s']:,.0f} tok/s  fill {m['packing_density']:.1%}"
    )
    if m["mfu"] is not None:
        line += f"  MFU {m['mfu']:.1%}"
    return line + f"  mem {m['memory_gb']:.2f} GB" + ("  SKIPPED (loss spike)" if m["skipped"] else "")


class ToHost:
    """values.tolist(), which waits for these values and not for what the device is given after them."""

    def __init__(self, values: Tensor):
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._done = torch.cuda.current_stream().record_event() if values.is_cuda else None

    def tolist(self) -> list[float]:
        if self._done is not None:
            self._done.synchronize()
        return self._host.tolist()


def step_totals(
    losses_B: Tensor,
    stats: Tensor,
    norm: Tensor,
    loss: LossConfig,
    batches: Sequence[MicroBatch],
    mesh: Mesh,
    stop: bool,
    save_failed: bool,
) -> tuple[Tensor, Callable[[], dict[str, float]]]:
    """(whether loss and gradient norm are finite, a bool on the device; what waits for the totals).

    Totals are sums over dp ranks, exchanged in one small all-reduce; tp ranks hold the same values.
    """
    real = [np.asarray(b.lengths[: b.num_sequences], dtype=np.int64) for b in batches]
    squares = sum(int(np.square(lengths).sum()) for lengths in real)
    counts = [len(losses_B), sum(b.num_tokens for b in batches), squares, int(stop), int(save_failed)]
    # Pinned: a copy from other memory waits for all that the device was given.
    host = torch.tensor(counts, dtype=torch.float64, pin_memory=losses_B.is_cuda)
    vector = torch.cat([losses_B.sum().double()[None], stats, host.to(losses_B.device, non_blocking=True)])
    all_reduce_world_(vector)
    copy = ToHost(torch.cat([vector, norm.double()[None]]))

    names = ("loss", *sum_names(loss), "rows", "tokens", "squares", "stop", "save_failed")

    def totals() -> dict[str, float]:
        *sums, grad_norm = copy.tolist()  # the only host sync of a step
        totals = {name: value / mesh.tp.size for name, value in zip(names, sums, strict=True)}
        return {**totals, "grad_norm": grad_norm}

    return vector[0].isfinite() & norm.isfinite(), totals


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_values(
    config: TrainConfig,
    model: ModelConfig,
    mesh: Mesh,
    totals: Mapping[str, float],
    *,
    step: int,
    lr: float,
    num_rows: int,
    num_micro_batches: int,
    seconds: float,
    peak_flops: float | None,
    drawn: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """What metrics.jsonl says of a step, from its totals. num_rows: of an epoch; drawn: of each dataset rows
    and tokens so far."""
    capacity = config.data.max_tokens * num_micro_batches * mesh.dp_size
    tokens, squares = int(totals["tokens"]), int(totals["squares"])
    flops = training_flops(model, tokens, squares, config.lora.rank > 0)
    return {
        "step": step,
        "epoch": step * config.global_batch_size / num_rows,
        **figures(totals, config.loss),
        "grad_norm": totals["grad_norm"],
        "lr": lr,
        "tokens": tokens,
        "tokens_per_s": totals["tokens"] / seconds,
        "packing_density": totals["tokens"] / capacity,
        "micro_batches": num_micro_batches,
        "mfu": flops / (seconds * mesh.world_size * peak_flops) if peak_flops else None,
        "memory_gb": peak_memory(mesh.device) / 1e9,
        "seconds": seconds,
        "drawn_rows": {name: rows for name, (rows, _) in drawn.items()},
        "drawn_tokens": {name: tokens for name, (_, tokens) in drawn.items()},
    }
