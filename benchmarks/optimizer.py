"""An AdamW update beside torch's fused AdamW and other libraries' optimizers, as shares of a copy.

    python -m benchmarks.optimizer [--layers 4 --repeats 20]

Parameters are layers of the 8B model. First the gate: some clipped steps of ours, from the masters and with
the gradients of torch.optim.AdamW(fused=True) on fp32 masters, end within a few ulps of its masters and
moments; and with moments in bf16 and in 8 bits a step is that of the plain-torch reference, random bits
included, but for the few moments that an ulp of theirs rounds to the other side. Nothing is timed otherwise.
GB/s count the bytes that each variant needs, read and written once:

    ours           weight, remainder, both moments, 2 + 2 + 4 + 4 or 2 + 2 or 1 + 1, twice, and the gradient
    torch          master, exp_avg, exp_avg_sq, 4 + 4 + 4, twice, and the gradient, 4
    torch, whole   the same; and the clipping pass (4, twice) and the cast that the next forward runs (4 + 2)
    apex           master, exp_avg, exp_avg_sq, twice, the bf16 weight, 2, and the gradient, 2
    te             as ours (store_param_remainders)
    torchao, bnb   8-bit moments of fp32 parameters: 4 + 1 + 1, twice, and the gradient, 4

All but ours and torch take part where they can be imported. Without a CUDA device only the gate runs, in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the next lines do

from torch import Tensor

from benchmarks.ceilings import ResultsFile, copy_bandwidth, interleaved_times
from nemo_embed_core.config import ModelConfig, OptimConfig
from nemo_embed_core.kernels.adamw import adamw_kernel, adamw_ref, join_master, split_master
from nemo_embed_core.model.spec import parameter_shapes
from nemo_embed_core.train.optim import DTYPES, block_of, update_bytes

OPTIONS = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
BETAS = {"betas": (OPTIONS["beta1"], OPTIONS["beta2"]), "lr": OPTIONS["lr"], "eps": OPTIONS["eps"]}


def shapes(layers: int) -> list[tuple[int, ...]]:
    """Of the matrices and norms of so many layers of the 8B model."""
    names = parameter_shapes(ModelConfig(num_hidden_layers=layers))
    return [shape for name, shape in names.items() if ".layers." in name]


class Ours:
    """moments: of optim.moments."""

    def __init__(
        self, masters: list[Tensor], moments: str = "fp32", update: Callable[..., None] = adamw_kernel
    ):
        halves = [split_master(master) for master in masters]
        self.weights, self.remainders = ([pair[i].contiguous() for pair in halves] for i in (0, 1))
        self.moments = [[torch.zeros_like(m, dtype=dtype) for m in masters] for dtype in DTYPES[moments]]
        sizes = [(*m.shape[:-1], m.shape[-1] // block_of(m.shape[-1])) for m in masters for _ in range(2)]
        self.bases = [torch.zeros(size, dtype=torch.int16, device=masters[0].device) for size in sizes]
        self.bases = self.bases if moments == "8bit" else []
        self.columns = [] if moments == "fp32" else [m.shape[-1] for m in masters]
        self.update, self.steps = update, 0

    def step(self, grads: list[Tensor], factor: Tensor) -> None:
        self.steps += 1
        places = [number for i, n in enumerate(self.columns) for number in (1000 * self.steps + i, 0, n)]
        self.update(
            self.weights, self.remainders, grads, *self.moments, factor, self.bases, places, step=self.steps,
            **OPTIONS,
        )  # fmt: skip

    def masters(self) -> list[Tensor]:
        return [join_master(w, r) for w, r in zip(self.weights, self.remainders, strict=True)]

    def kept(self) -> list[Tensor]:
        return [*self.weights, *self.remainders, *self.moments[0], *self.moments[1], *self.bases]


def torch_adamw(masters: list[Tensor]) -> torch.optim.AdamW:
    parameters = [torch.nn.Parameter(master.clone()) for master in masters]
    options: dict[str, Any] = BETAS | {"weight_decay": OPTIONS["weight_decay"], "fused": True}
    return torch.optim.AdamW(parameters, **options)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return optimizer.param_groups[0]["params"]


def gate(device: str, sizes: list[tuple[int, ...]], steps: int = 3) -> float:
    """The largest difference of a master or moment, in ulps of itself and of what steps add to it."""
    torch.manual_seed(0)
    masters = [0.02 * torch.randn(size, device=device) for size in sizes]
    ours, theirs, worst = Ours(masters), torch_adamw(masters), 0.0
    for _ in range(steps):
        grads = [torch.randn(size, device=device) for size in sizes]
        factor = torch.tensor(0.37, device=device)
        for p, grad in zip(parameters_of(theirs), grads, strict=True):
            p.grad = grad * factor
        theirs.step()
        ours.step(grads, factor)
    for i, (p, master) in enumerate(zip(parameters_of(theirs), ours.masters(), strict=True)):
        state = theirs.state[p]
        added = torch.tensor(OPTIONS["lr"], device=device)
        pairs = [(master, p.detach(), added)]
        for k, name in enumerate(("exp_avg", "exp_avg_sq")):
            pairs.append((ours.moments[k][i], state[name], state[name].abs().mean()))
        for mine, other, size in pairs:
            worst = max(worst, ((mine - other).abs() / (other.abs() + size)).max().item() * 2.0**23)
    return worst


def gate_rounded(device: str, sizes: list[tuple[int, ...]], moments: str) -> tuple[float, float]:
    """Beside the reference: the largest difference of a master, in ulps of itself and of a step, and the
    share of moments and bases that are others."""
    torch.manual_seed(0)
    masters = [0.02 * torch.randn(size, device=device) for size in sizes]
    ours, theirs = Ours(masters, moments), Ours(masters, moments, adamw_ref)
    factor = torch.tensor(0.37, device=device)
    for _ in range(3):
        grads = [torch.randn(size, device=device) for size in sizes]
        for mine, other in zip(ours.kept(), theirs.kept(), strict=True):
            mine.copy_(other)  # so that what once differed does not count again
        ours.step(grads, factor)
        theirs.step(grads, factor)
    worst = 0.0
    for mine, other in zip(ours.masters(), theirs.masters(), strict=True):
        worst = max(worst, ((mine - other).abs() / (other.abs() + OPTIONS["lr"])).max().item() * 2.0**23)
    pairs = list(zip(ours.kept(), theirs.kept(), strict=True))[2 * len(sizes) :]
    others = sum(int((mine != other).sum()) for mine, other in pairs)
    return worst, others / sum(mine.numel() for mine, _ in pairs)


def variants(masters: list[Tensor], missing: dict[str, str]) -> dict[str, tuple[Callable[[], object], float]]:
    """name -> (one update, bytes a parameter)."""
    factor = torch.tensor(0.37, device=masters[0].device)
    grads = {
        dtype: [torch.randn_like(m).to(dtype) for m in masters] for dtype in (torch.float32, torch.bfloat16)
    }
    theirs, whole = torch_adamw(masters), torch_adamw(masters)
    for optimizer in (theirs, whole):
        for p, grad in zip(parameters_of(optimizer), grads[torch.float32], strict=True):
            p.grad = grad
    copies = [m.bfloat16() for m in masters]

    def clip_step_cast() -> None:
        torch._foreach_mul_(grads[torch.float32], factor)
        whole.step()
        torch._foreach_copy_(copies, [p.detach() for p in parameters_of(whole)])

    found: dict[str, tuple[Callable[[], object], float]] = {}
    for kind in DTYPES:
        ours = Ours(masters, kind)
        config = OptimConfig(master_weights="split", moments=kind)  # type: ignore[arg-type]
        label = "ours" if kind == "fp32" else f"ours, {kind} moments"
        for dtype, said in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            call = partial(ours.step, grads[dtype], factor)
            found[f"{label}, {said} gradients"] = call, update_bytes(config, dtype.itemsize)
    found["torch"] = theirs.step, 28
    found["torch, whole"] = clip_step_cast, 42
    remainders = {"master_weights": True, "store_param_remainders": True}
    for name, module, peer_class, options, dtype, moved in (
        ("apex", "apex.optimizers", "FusedAdam", {"master_weights": True}, torch.bfloat16, 28),
        ("te", "transformer_engine.pytorch.optimizers", "FusedAdam", remainders, torch.bfloat16, 26),
        ("torchao, 8-bit moments", "torchao.optim", "AdamW8bit", {}, torch.float32, 16),
        ("bnb, 8-bit moments", "bitsandbytes.optim", "AdamW8bit", {}, torch.float32, 16),
    ):
        try:
            parameters = [torch.nn.Parameter(m.to(dtype, copy=True)) for m in masters]
            for p, grad in zip(parameters, grads[dtype], strict=True):
                p.grad = grad
            fused = getattr(importlib.import_module(module), peer_class)
            peer = fused(parameters, weight_decay=OPTIONS["weight_decay"], **BETAS, **options)
            peer.step()
            found[name] = peer.step, moved
        except Exception as error:  # apex on PyPI is another package; what fails is named and not timed
            missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of the 8B model, 0.9 B parameters (default 4)")
    parser.add_argument("--repeats", type=int, default=20, help="timings of each variant (default 20)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [(1025, 7), (123,), (4096, 1024)] if device == "cuda" else [(129, 7), (123,)]
    worst = gate(device, sizes)
    print(f"gate: at most {worst:.1f} ulps from torch's fused AdamW on fp32 masters", flush=True)
    bad = worst > 16
    for moments in ("bf16", "8bit"):
        ulps, others = gate_rounded(device, sizes, moments)
        print(f"gate: {moments} moments, {ulps:.1f} ulps from the reference, {others:.1e} of them others")
        bad = bad or ulps > 16 or others > 1e-3
    if bad:
        raise SystemExit("correctness gate failed, hence nothing is measured")
    if device == "cpu":
        print("no CUDA device on this machine: nothing is timed")
        return
    results, missing = ResultsFile("optimizer"), {}  # type: ignore[var-annotated]
    ceiling = copy_bandwidth()
    masters = [0.02 * torch.randn(shape, device=device) for shape in shapes(options.layers)]
    size = sum(m.numel() for m in masters)
    chosen = variants(masters, missing)
    times = interleaved_times({name: call for name, (call, _) in chosen.items()}, options.repeats)
    print(f"{size / 1e6:,.0f} M parameters; a copy at {ceiling:.0f} GB/s; to {results.path}")
    for name, (_, moved) in chosen.items():
        milliseconds = statistics.median(times[name])
        rate = moved * size / milliseconds / 1e6
        share = rate / ceiling
        line = f"{milliseconds:8.3f} ms  {moved:5.4g} B a parameter  {rate:6.0f} GB/s {share:6.1%}"
        print(f"  {name:32s} {line}")
        figures = {"bytes_a_parameter": moved, "ms": milliseconds, "gb_per_s": rate, "share": share}
        results.append(variant=name, parameters=size, **figures)
    for name, reason in missing.items():
        print(f"  {name:32s} not here: {reason}")
        results.append(variant=name, parameters=size, error=reason)


if __name__ == "__main__":
    main()
