"""What of the base is trained on this machine: the first of all weights, adapters, some layers that fits.

    chosen = choose(config, machine, model, options)      # options(chosen): of launch/train.py

What a run needs is what nemo-embed plan computes: a step of the engine on tensors that hold nothing, at the
longest texts that are allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nemo_embed_core.config import ModelConfig, PipelineConfig, TrainConfig
from nemo_embed_core.config.train import Recompute
from nemo_embed_core.errors import UserError

# Micro-batches, from the fastest to the one that needs least.
WAYS: tuple[tuple[Recompute, int], ...] = (
    ("none", 8192), ("selective", 8192), ("full", 8192), ("full", 4096), ("full", 2048),
)  # fmt: skip
SHARE = 0.9  # of a machine's memory
FP32 = 2  # activations and gradients of a CPU in fp32, against the plan's in bf16


@dataclass(frozen=True)
class Machine:
    """memory: bytes of a rank."""

    device: Literal["cuda", "cpu"]
    memory: int
    ranks: int
    words: str

    @classmethod
    def of(cls, config: PipelineConfig) -> Machine:
        import torch

        from nemo_embed_core.parallel.mesh import pick_device

        device: Literal["cuda", "cpu"] = "cuda" if pick_device(config.device).type == "cuda" else "cpu"
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        ranks = config.ranks or max(1, gpus)
        if device == "cuda":
            if ranks > gpus:
                raise UserError(f"ranks={ranks} need a GPU each, and there are {gpus}")
            memory, words = torch.cuda.mem_get_info()[1], f"{ranks} x {torch.cuda.get_device_name()}"
        else:
            memory = int(SHARE * memory_of_machine()) // ranks
            words = f"a machine without a GPU, {ranks} {'ranks' if ranks > 1 else 'process'}"
        return cls(device, int(config.memory_gb * 1e9) or memory, ranks, words)

    @property
    def precision(self) -> str:
        return "bf16" if self.device == "cuda" else "fp32"


def memory_of_machine() -> int:
    """Bytes, of a container those that it may have."""
    found = [int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")]
    found += [int(line) for line in _lines("/sys/fs/cgroup/memory.max") if line.isdecimal()]
    if not found:
        raise UserError("this machine's memory is not known: give memory_gb")
    return min(found)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@dataclass(frozen=True)
class Chosen:
    """layers: of the base's first ones, 0: all.  needed: bytes of a rank."""

    method: Literal["full", "lora", "layers"]
    recompute: Recompute
    max_tokens: int
    layers: int = 0
    needed: int = 0


OptionsOf = Callable[[Chosen], dict[str, Any]]


def choose(config: PipelineConfig, machine: Machine, model: ModelConfig, options_of: OptionsOf) -> Chosen:
    """UserError where what was asked for does not fit, or nothing does: with the bytes of each."""
    from nemo_embed_core.plan.plan import needed, num_parameters, peak_of

    def fits(method: Any, way: int, layers: int = 0) -> Chosen | int:
        recompute, max_tokens = WAYS[way]
        chosen = Chosen(method, recompute, max_tokens, layers)
        train = TrainConfig.from_dict({**options_of(chosen), "output_dir": "run"})
        shape = replace(model, num_hidden_layers=layers) if layers else model
        shape = replace(shape, pooling=train.model.pooling, is_causal=train.model.is_causal)
        factor = FP32 if train.precision in ("auto", "fp32") and machine.device == "cpu" else 1
        least = needed(factor * peak_of(train, shape, machine.ranks))
        return replace(chosen, needed=round(least)) if least <= machine.memory else round(least)

    def best(method: Any, layers: int = 0) -> Chosen | int:
        """The fastest way that fits; the bytes of the one that needs least where none does."""
        first = fits(method, 0, layers)
        last = first if isinstance(first, Chosen) else fits(method, len(WAYS) - 1, layers)
        if isinstance(first, Chosen) or isinstance(last, int):
            return first if isinstance(first, Chosen) else last
        between = (fits(method, way, layers) for way in range(1, len(WAYS) - 1))
        return next((found for found in between if isinstance(found, Chosen)), last)

    tried = []
    for method in ("full", "lora") if config.method == "auto" else (config.method,):
        if method == "layers":
            break
        if isinstance(found := best(method), Chosen):
            return found
        tried.append(f"{method} {found / 1e9:.1f} GB")
    if config.method in ("auto", "layers"):
        found = best("layers", config.layers or 1)
        if isinstance(found, Chosen):
            return found if config.layers else _most_layers(found, model, best)
        tried.append(f"layers ({config.layers or 1}) {found / 1e9:.1f} GB")
    smaller = "lora, layers" if config.method == "full" else "layers" if config.method == "lora" else ""
    parameters = num_parameters(model)
    raise UserError(
        f"training {parameters / 1e9:.2f} B parameters does not fit {machine.memory / 1e9:.1f} GB on "
        f"{machine.words}: {', '.join(tried)} are needed at least; take "
        + (f"method={smaller.split(', ')[0]} or method=auto, " if smaller else "")
        + "a smaller base, a smaller document_max_length, or say memory_gb if there is more"
    )


def _most_layers(found: Chosen, model: ModelConfig, best: Callable[[Any, int], Chosen | int]) -> Chosen:
    """By halves between what fits and what does not."""
    low, high = 1, model.num_hidden_layers + 1
    while high - low > 1:
        middle = (low + high) // 2
        if isinstance(more := best("layers", middle), Chosen):
            low, found = middle, more
        else:
            high = middle
    return found
