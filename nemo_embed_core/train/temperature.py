"""A temperature that is learned: one parameter, its logarithm, the same on every rank.

    t = exp(log), log <- log - lr m / (sqrt(v) + eps)        AdamW without decay, at loss.temperature_lr

Its gradient is the mean over dp ranks, as that of the weights, and is neither in the gradient norm nor
clipped. t stays within TEMPERATURE_RANGE. A checkpoint's manifest has log and the moments; exports have none.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from nemo_embed_core.config import LossConfig, OptimConfig
from nemo_embed_core.config.train import TEMPERATURE_RANGE
from nemo_embed_core.parallel.collectives import all_reduce_
from nemo_embed_core.train.optim import ensure_state, update


class Temperature:
    """dtype: fp32, or fp64 in a run of that."""

    def __init__(self, loss: LossConfig, optim: OptimConfig, dtype: torch.dtype, device: torch.device):
        start = torch.tensor(math.log(loss.temperature), dtype=dtype, device=device)
        self.log = torch.nn.Parameter(start)
        self._lr, self._peak = loss.temperature_lr, optim.lr
        options: dict[str, Any] = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        self._optimizer = torch.optim.AdamW([self.log], self._lr, weight_decay=0.0, fused=True, **options)
        ensure_state(self._optimizer)

    def reduce(self, dp_group: Any) -> None:
        assert self.log.grad is not None
        all_reduce_(self.log.grad, dp_group).div_(dp_group.size())

    @torch.no_grad()
    def update(self, lr: float, finite: torch.Tensor) -> None:
        """lr: of the weights, whose schedule this one follows. finite: a bool on the device; else nothing
        changes."""
        update(self._optimizer, self._lr * lr / self._peak, finite.to(self.log.dtype))
        self.log.clamp_(*map(math.log, TEMPERATURE_RANGE))

    def drop_gradient(self) -> None:
        self.log.grad = None

    def state(self) -> dict[str, float]:
        """For a manifest (checkpoint/manifest.py says its fields): floats that are these values exactly."""
        state = self._optimizer.state[self.log]
        return {"log": self.log.item(), **{name: value.item() for name, value in state.items()}}

    @torch.no_grad()
    def load(self, values: dict[str, float]) -> None:
        self.log.fill_(values["log"])
        for name, value in self._optimizer.state[self.log].items():
            value.fill_(values[name])
