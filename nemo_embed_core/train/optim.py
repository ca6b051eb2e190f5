"""AdamW over fp32 master weights, weight decay on matrices only.

    master_weights    a parameter (FSDP2's shard)        what runs
    "fp32"            the master                         a bf16 copy that FSDP2 makes; in fp32 the master
    "split"           the master's upper half, bf16      the parameter; the optimizer keeps the lower half

The masters are the same, bit for bit, and a checkpoint holds them in fp32 either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nemo_embed_core.config import OptimConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.kernels.adamw import adamw
from nemo_embed_core.parallel.grad_norm import local_tensor

STATE = ("exp_avg", "exp_avg_sq")  # kept of each parameter, in its shape; checkpoints have these names too
REMAINDER = "remainder"  # lower half of a split master; no name of a checkpoint, which has the master
BYTES_PER_PARAMETER = 4 * (1 + len(STATE))  # of a checkpoint: the master and its state, fp32


class SplitAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW(fused=True) on masters whose upper halves are the parameters (kernels/adamw.py).

    `factor`: fp32 scalar on the device, of the gradients in the next step; 0 refuses it.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.factor: Tensor | None = None
        self.num_updates = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # gradients are there
        assert self.factor is not None
        self.num_updates += 1
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            kept = [[local_tensor(self.state[p][name]) for p in weights] for name in (REMAINDER, *STATE)]
            grads = [local_tensor(p.grad) for p in weights]
            beta1, beta2 = group["betas"]
            adamw(
                [local_tensor(p) for p in weights], kept[0], grads, kept[1], kept[2], self.factor,
                step=self.num_updates, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                weight_decay=group["weight_decay"],
            )  # fmt: skip


def check_master_weights(config: OptimConfig, dtype: torch.dtype) -> None:
    """UserError where the weights that run are no halves of fp32 masters. dtype: of forward and backward."""
    if config.master_weights == "split" and dtype != torch.bfloat16:
        raise UserError(
            f"optim.master_weights=split keeps weights in bf16, and this run computes in "
            f"{str(dtype).removeprefix('torch.')}: set precision=bf16, or optim.master_weights=fp32"
        )


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Masters are fp32 because at lr 2e-6 a bf16 update would vanish."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.master_weights == "split":
        return SplitAdamW(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def update(optimizer: torch.optim.Optimizer, lr: float, factor: Tensor) -> None:
    """optimizer.step() with factor * gradients; nothing changes where the factor, on the device, is 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if isinstance(optimizer, SplitAdamW):
        optimizer.factor = factor
    else:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if grads := [local_tensor(p.grad) for p in params if local_tensor(p.grad).numel()]:
            torch._foreach_mul_(grads, factor)
        optimizer.found_inf = (factor == 0).float()  # type: ignore[attr-defined]  # 1 refuses
    optimizer.step()


def ensure_state(optimizer: torch.optim.Optimizer) -> None:
    """Moments exist before the first step, so that saving and loading never depend on it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                if isinstance(optimizer, SplitAdamW):
                    state.update({name: torch.zeros_like(p, dtype=torch.float32) for name in STATE})
                    state[REMAINDER] = torch.zeros_like(p, dtype=torch.int16)
                else:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state.update({name: torch.zeros_like(p) for name in STATE})


def state_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """STATE -> the live tensor."""
    return {name: optimizer.state[p][name] for name in STATE}


def remainder_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> Tensor | None:
    """The live lower half of a split master."""
    return optimizer.state[p].get(REMAINDER)


def set_num_updates(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Made so far, which AdamW's bias correction goes by."""
    if isinstance(optimizer, SplitAdamW):
        optimizer.num_updates = count
        return
    for state in optimizer.state.values():
        state["step"].fill_(float(count))
