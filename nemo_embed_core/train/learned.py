"""Parameters that are learned beside the encoder's: the same on every rank, and nothing of what is exported.

    temperature    t = exp(log)                         log <- log - lr m / (sqrt(v) + eps)
    projection     W [a teacher's columns, D]           W likewise, the identity at the start

AdamW without decay, each at a rate of its own: loss.temperature_lr, loss.teacher_vectors_lr. Their gradients
are the mean over dp ranks, as those of the weights, are in no gradient norm and are not clipped. t stays
within TEMPERATURE_RANGE. A checkpoint has values and moments; exports have none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.checkpoint.manifest import PROJECTION, state_name
from nemo_embed_core.config import LossConfig, OptimConfig
from nemo_embed_core.config.train import TEMPERATURE_RANGE
from nemo_embed_core.parallel.collectives import all_reduce_
from nemo_embed_core.train.optim import STATE, ensure_state, update


class Learned:
    """start: fp32, or fp64 in a run of that."""

    def __init__(self, start: Tensor, lr: float, optim: OptimConfig):
        self.value = torch.nn.Parameter(start)
        self._lr, self._peak = lr, optim.lr
        options: dict[str, Any] = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        self._optimizer = torch.optim.AdamW([self.value], lr, weight_decay=0.0, fused=True, **options)
        ensure_state(self._optimizer)
        self.moments = self._optimizer.state[self.value]  # and "step", of updates so far

    def reduce(self, dp_group: Any) -> None:
        assert self.value.grad is not None
        all_reduce_(self.value.grad, dp_group).div_(dp_group.size())

    @torch.no_grad()
    def update(self, lr: float, finite: Tensor) -> None:
        """lr: of the weights, whose schedule this one follows. finite: a bool on the device; else nothing
        changes."""
        update(self._optimizer, self._lr * lr / self._peak, finite.to(self.value.dtype))

    def drop_gradient(self) -> None:
        self.value.grad = None


class Temperature(Learned):
    def __init__(self, loss: LossConfig, optim: OptimConfig, dtype: torch.dtype, device: torch.device):
        start = torch.tensor(math.log(loss.temperature), dtype=dtype, device=device)
        super().__init__(start, loss.temperature_lr, optim)

    @torch.no_grad()
    def update(self, lr: float, finite: Tensor) -> None:
        super().update(lr, finite)
        self.value.clamp_(*map(math.log, TEMPERATURE_RANGE))

    def state(self) -> dict[str, float]:
        """For a manifest (checkpoint/manifest.py says its fields): floats that are these values exactly."""
        return {"log": self.value.item(), **{name: value.item() for name, value in self.moments.items()}}

    @torch.no_grad()
    def load(self, values: dict[str, float]) -> None:
        self.value.fill_(values["log"])
        for name, value in self.moments.items():
            value.fill_(values[name])


class Projection(Learned):
    """columns: of the teacher, then of the model. Layers of a teacher make a student whose vectors begin near
    the teacher's own: so the identity, cut or with zeros where widths differ."""

    def __init__(
        self, columns: tuple[int, int], loss: LossConfig, optim: OptimConfig, dtype: torch.dtype,
        device: torch.device,
    ):  # fmt: skip
        super().__init__(torch.eye(*columns, dtype=dtype, device=device), loss.teacher_vectors_lr, optim)

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a checkpoint, live."""
        found = {"value": self.value.detach(), **{name: self.moments[name] for name in STATE}}
        return {state_name(name, PROJECTION): tensor for name, tensor in found.items()}
