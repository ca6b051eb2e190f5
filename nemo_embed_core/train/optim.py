"""AdamW over fp32 masters (the FSDP2 shards), weight decay on matrices only, linear warm-up and decay."""

from __future__ import annotations

import torch
from torch import nn

from nemo_embed_core.config import OptimConfig

STATE = ("exp_avg", "exp_avg_sq")  # kept of each parameter, in its shape; checkpoints have these names too
BYTES_PER_PARAMETER = 4 * (1 + len(STATE))  # the master and its state, fp32


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Parameters are fp32 shards and run as bf16 copies that FSDP2 makes: at lr 2e-6 a bf16 update would
    vanish."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def num_warmup_steps(steps: int, config: OptimConfig) -> int:
    """warmup_steps, or min(100, steps // 10) where it is left out."""
    return min(100, steps // 10) if config.warmup_steps is None else config.warmup_steps


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Of step 0, 1, ..., steps - 1: linear from lr / warmup_steps up to lr, then linear down to min_lr after
    the last."""
    warmup_steps = num_warmup_steps(steps, config)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    remaining = (steps - step) / max(1, steps - warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * remaining


def ensure_state(optimizer: torch.optim.AdamW) -> None:
    """Moments exist before the first step, so that saving and loading never depend on it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                device = p.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state.update({name: torch.zeros_like(p) for name in STATE})


def state_of(optimizer: torch.optim.AdamW, p: nn.Parameter) -> dict[str, torch.Tensor]:
    """STATE -> the live tensor."""
    return {name: optimizer.state[p][name] for name in STATE}


def set_num_updates(optimizer: torch.optim.AdamW, count: int) -> None:
    """Made so far, which AdamW's bias correction goes by."""
    for state in optimizer.state.values():
        state["step"].fill_(float(count))
