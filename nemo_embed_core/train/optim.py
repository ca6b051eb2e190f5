"""AdamW over fp32 master weights, weight decay on matrices only.

    master_weights    a parameter (FSDP2's shard)        what runs
    "fp32"            the master                         a bf16 copy that FSDP2 makes; in fp32 the master
    "split"           the master's upper half, bf16      the parameter; the optimizer keeps the lower half

The masters are the same, bit for bit, and a checkpoint holds them in fp32 either way, as it holds moments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nemo_embed_core.config import ModelConfig, OptimConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.kernels.adamw import adamw
from nemo_embed_core.model.spec import tp_dim, tp_unit
from nemo_embed_core.parallel.boxes import Box
from nemo_embed_core.parallel.grad_norm import local_tensor

STATE = ("exp_avg", "exp_avg_sq")  # kept of each parameter, in its shape; checkpoints have these names too
REMAINDER = "remainder"  # lower half of a split master; no name of a checkpoint, which has the master
BASE = "_base"  # of the blocks of a moment in 8 bits, behind its name; no name of a checkpoint either
BYTES_PER_PARAMETER = 4 * (1 + len(STATE))  # of a checkpoint: the master and its state, fp32
BLOCK = 256  # elements with one base, at most
DTYPES = {
    "fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16),
    "8bit": (torch.int8, torch.uint8),
}  # fmt: skip  # optim.moments of a matrix -> of STATE


def update_bytes(config: OptimConfig, gradient: int = 4) -> float:
    """That an update reads and writes of a parameter, whose gradient has so many: 28 with fp32 moments, 20 in
    bf16, 16 in 8 bits. A master has four, however it is kept."""
    moments = sum(dtype.itemsize for dtype in DTYPES[config.moments])
    bases = len(STATE) * torch.int16.itemsize / BLOCK if config.moments == "8bit" else 0
    return 2 * (4 + moments + bases) + gradient


class Place(NamedTuple):
    """Of a rank's shard in a matrix."""

    name: str  # of the whole
    first: int  # index in the whole of the shard's first element
    columns: int  # of the whole
    block: int  # elements of a row with one base


def place_of(name: str, shape: tuple[int, ...], box: Box, config: ModelConfig) -> Place | None:
    """None for vectors, whose moments are fp32.

    A block is the largest divisor, up to BLOCK, of the columns that no layout cuts: of a whole row, or where
    tp cuts rows (o_proj, down_proj) of a unit of it. So a block is on one rank, and the same in every layout.
    """
    if len(shape) < 2:
        return None
    unit = tp_unit(name, config) if tp_dim(name) == 1 else shape[1]
    return Place(name, box[0][0] * shape[1] + box[0][1], shape[1], block_of(unit))


def block_of(columns: int) -> int:
    return next(n for n in range(min(BLOCK, columns), 0, -1) if columns % n == 0)


class SplitAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW(fused=True) on masters whose upper halves are the parameters (kernels/adamw.py).

    `factor`: fp32 scalar on the device, of the gradients in the next step; 0 refuses it.  seed, places: what
    the rounding of moments that are not fp32 depends on.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, *,
        moments: str, seed: int, places: Mapping[nn.Parameter, Place],
    ):  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.factor: Tensor | None = None
        self.num_updates = 0
        self.moments, self.seed, self.places = moments, seed, places

    def key(self, name: str) -> int:
        """Of the random bits of this update."""
        text = f"{self.seed} {self.num_updates} {name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # gradients are there
        assert self.factor is not None
        self.num_updates += 1
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            kept = [[local_tensor(self.state[p][name]) for p in weights] for name in (REMAINDER, *STATE)]
            grads = [local_tensor(p.grad) for p in weights]
            bases = [b for p in weights for name in STATE if (b := base_of(self, p, name)) is not None]
            found = [self.places[p] for p in weights if p in self.places]
            places = [number for at in found for number in (self.key(at.name), at.first, at.columns)]
            beta1, beta2 = group["betas"]
            adamw(
                [local_tensor(p) for p in weights], kept[0], grads, kept[1], kept[2], self.factor, bases,
                places, step=self.num_updates, lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                weight_decay=group["weight_decay"],
            )  # fmt: skip


def check_master_weights(config: OptimConfig, dtype: torch.dtype) -> None:
    """UserError where the weights that run are no halves of fp32 masters. dtype: of forward and backward."""
    if config.master_weights == "split" and dtype != torch.bfloat16:
        raise UserError(
            f"optim.master_weights=split keeps weights in bf16, and this run computes in "
            f"{str(dtype).removeprefix('torch.')}: set precision=bf16, or optim.master_weights=fp32"
        )


def build_optimizer(
    model: nn.Module, config: OptimConfig, seed: int = 0, places: Mapping[nn.Parameter, Place] | None = None
) -> torch.optim.Optimizer:
    """Masters are fp32 because at lr 2e-6 a bf16 update would vanish. seed, places: of the matrices, where
    config.moments is not fp32."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, norms = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.master_weights == "split":
        rounded = {} if config.moments == "fp32" else places or {}
        return SplitAdamW(groups, **options, moments=config.moments, seed=seed, places=rounded)
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
                    state[REMAINDER] = torch.zeros_like(p, dtype=torch.int16)
                    place = optimizer.places.get(p)
                    kind = optimizer.moments if place is not None else "fp32"
                    for name, dtype in zip(STATE, DTYPES[kind], strict=True):
                        state[name] = torch.zeros_like(p, dtype=dtype)
                        if place is not None and kind == "8bit":
                            whole = local_tensor(p)
                            size = (*whole.shape[:-1], whole.shape[-1] // place.block)
                            state[name + BASE] = torch.zeros(size, dtype=torch.int16, device=whole.device)
                else:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state.update({name: torch.zeros_like(p) for name in STATE})


def state_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """STATE -> the live tensor."""
    return {name: optimizer.state[p][name] for name in STATE}


def remainder_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> Tensor | None:
    """The live lower half of a split master."""
    return optimizer.state[p].get(REMAINDER) if p.requires_grad else None


def base_of(optimizer: torch.optim.Optimizer, p: nn.Parameter, name: str) -> Tensor | None:
    """The live bases of a moment's blocks, where it is kept in 8 bits."""
    return optimizer.state[p].get(name + BASE)


def set_num_updates(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Made so far, which AdamW's bias correction goes by."""
    if isinstance(optimizer, SplitAdamW):
        optimizer.num_updates = count
        return
    for state in optimizer.state.values():
        state["step"].fill_(float(count))
