"""Axes by which a model's vectors are turned before training, so that their first columns hold the most of
them (TrainConfig.init_axes, for loss.matryoshka_dims).

    Q = eigenvectors of  sum x x^T  by falling eigenvalue        x [D]: unit rows of the run's first texts

Among all turns, the first d columns of x Q are those that leave the least of |x|^2 out, for every d: the
principal axes without centring, since what is compared is the angle from 0. x is after a final norm of equal
weights, as the turned model has one (checkpoint/turned_axes.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_embed_core.data.packing import load_batch, shapes_cost_memory
from nemo_embed_core.data.sampler import Sampler
from nemo_embed_core.data.store import Store
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.spec import FINAL_NORM
from nemo_embed_core.parallel.collectives import all_reduce_, broadcast_object
from nemo_embed_core.parallel.grad_norm import local_tensor
from nemo_embed_core.parallel.liveness import note
from nemo_embed_core.train.engine import Engine
from nemo_embed_core.train.step import embed, group

TEXTS = 4  # for each column of a vector
# Of the mean eigenvalue: between axes in which no text has anything, the first column's comes first.
_TIE = 1e-6


def principal_axes(engine: Engine, store: Store, sampler: Sampler, log: Callable[[str], None]) -> Tensor:
    """Q [D, D] fp64 on the engine's device, the same on all ranks, of TEXTS D texts of the first steps,
    prompts included; a text counts as often as it stands there, in whichever layout. One pass over them
    without gradients; the final norm's weights are 1 afterwards. UserError where vectors are not finite."""
    mesh, config, D = engine.mesh, engine.config, engine.model_config.hidden_size
    device, pad, few_shapes = mesh.device, mesh.tp.size, shapes_cost_memory(mesh.device, engine.dtype)
    sum_DD = torch.zeros(D, D, dtype=torch.float64, device=device)
    count, step = torch.zeros((), dtype=torch.int64, device=device), 0
    with torch.no_grad():
        for name, parameter in engine.trained():
            if name == f"model.{FINAL_NORM}":
                local_tensor(parameter).fill_(1.0)
    with engine.encoding(), torch.no_grad():
        while count < TEXTS * D:
            note("principal axes", step)
            batches, _ = load_batch(
                store, sampler, step, mesh.dp_rank, mesh.dp_size, config.data, pad, config.seed, few_shapes
            )
            rows = torch.zeros_like(count)
            for batch in batches:
                batch = batch.to(device)
                texts = group(embed(engine.model, batch), batch)
                x_ND = torch.cat([texts.q_BD, texts.docs_BMD[texts.mask_BM]]).double()
                sum_DD += x_ND.T @ x_ND
                rows += len(x_ND)
            count += all_reduce_(rows, mesh.dp_group)
            step += 1
    all_reduce_(sum_DD, mesh.dp_group)
    if not bool(sum_DD.isfinite().all()):
        raise UserError(
            f"init_axes=principal: {engine.config.init_from} gives vectors with NaN or infinite values, "
            "which have no axes; use another base or precision"
        )
    held, axes_DD = sum_DD.trace(), broadcast_object(_axes(sum_DD) if mesh.rank == 0 else None).to(device)
    left = (axes_DD.T @ sum_DD @ axes_DD).diagonal().cumsum(0) / held
    shares = ", ".join(f"{d} columns {left[d - 1]:.1%}" for d in config.loss.matryoshka_dims or [D])
    log(f"init_axes=principal: of {count} texts of the first {step} steps, {shares} of |x|^2")
    return axes_DD


def _axes(sum_DD: Tensor) -> Tensor:
    """The largest entry of each is positive: ranks, devices and libraries are free to choose the sign."""
    ramp = torch.linspace(1, 0, len(sum_DD), dtype=torch.float64, device=sum_DD.device)
    _, rising = torch.linalg.eigh(sum_DD + torch.diag(ramp * (_TIE * sum_DD.trace() / len(sum_DD))))
    axes_DD = rising.flip(1)
    largest = axes_DD.gather(0, axes_DD.abs().argmax(0, keepdim=True))
    return (axes_DD * largest.sign()).cpu()
