"""What a step reports: one JSON line in metrics.jsonl (the record of truth), one printed line, TensorBoard on request."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_embed_core.config import ModelConfig, UserError

# Dense bf16 datasheet peaks, FLOP/s. A device that is not listed reports no MFU rather than a guess.
PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def device_peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)


def training_flops(model: ModelConfig, num_tokens: int, sum_of_squared_lengths: int) -> float:
    """6 P T for the GEMMs + 12 L (H A) sum(n^2) for full (non-causal) attention; embedding lookup and norms not counted.

    P: matmul parameters. Forward 2 P T, backward twice that; recomputation by activation checkpointing is not counted.
    """
    width = model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    per_layer = model.hidden_size * (2 * width + 2 * kv + 3 * model.intermediate_size)
    return 6.0 * model.num_hidden_layers * per_layer * num_tokens + (
        12.0 * model.num_hidden_layers * width * sum_of_squared_lengths
    )


class LossWindow:
    """Tells a loss far above those of the last steps: z = (loss - mean) / max(std, 0.01 |mean|).

    Mean and (population) std are over the last 100 steps; below 20 of them there is no z. A spike enters the window as
    mean + limit x std: it does not hide the next one, and a level that stays becomes the new normal. `losses` is the
    whole state; checkpoints carry it, so that a resumed run decides as the uninterrupted one.
    """

    SIZE, FEWEST = 100, 20

    def __init__(self, limit: float, losses: Iterable[float] = ()):
        self.limit = limit
        self.losses = [float(loss) for loss in losses][-self.SIZE :]

    def judge(self, loss: float) -> float | None:
        """z of a finite loss, which then belongs to the window; a spike is z > limit."""
        z = None
        if len(self.losses) >= self.FEWEST:
            mean = math.fsum(self.losses) / len(self.losses)
            variance = math.fsum((x - mean) ** 2 for x in self.losses) / len(self.losses)
            std = max(math.sqrt(variance), 0.01 * abs(mean), 1e-12)
            z = (loss - mean) / std
            loss = min(loss, mean + self.limit * std)
        self.losses = [*self.losses, loss][-self.SIZE :]
        return z


class MetricsLog:
    """Rank 0's writer. A resumed run first drops the lines of steps that will run again."""

    def __init__(self, folder: Path, resume_step: int, tensorboard: bool):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    break  # the half line that a killed run left
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(kept))
        os.replace(rewritten, path)
        self._file = path.open("a")
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("tensorboard=true, but it is not installed: pip install tensorboard") from None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def console_line(m: Mapping[str, Any], steps: int) -> str:
    """`step 12/500  loss 0.8312  acc 0.61 ...`; fields that this device cannot know are left out."""
    accuracy = "-" if m["accuracy"] is None else f"{m['accuracy']:.3f}"
    if m["rows_without_candidates"]:
        accuracy += f" ({m['rows_without_candidates']} rows without a candidate)"
    line = (
        f"step {m['step']}/{steps}  loss {m['loss']:.4f}  acc {accuracy}  "
        f"pos {m['positive_similarity']:.3f}  neg {m['negative_similarity']:.3f}  "
        f"gnorm {m['grad_norm']:.3f}  lr {m['lr']:.2e}  {m['tokens_per_s']:,.0f} tok/s  fill {m['packing_density']:.1%}"
    )
    if m["mfu"] is not None:
        line += f"  MFU {m['mfu']:.1%}"
    return line + f"  mem {m['memory_gb']:.2f} GB" + ("  SKIPPED (loss spike)" if m["skipped"] else "")
