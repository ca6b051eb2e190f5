"""An AdamW update beside torch's fused AdamW, apex's and Transformer Engine's FusedAdam, as shares of a copy.

    python -m benchmarks.optimizer [--layers 4 --repeats 20]

Parameters are layers of the 8B model. First the gate: some clipped steps of ours, from the masters and with
the gradients of torch.optim.AdamW(fused=True) on fp32 masters, end within a few ulps of its masters and
moments; nothing is timed otherwise. GB/s count the bytes that each variant needs, read and written once:

    ours           weight, remainder, exp_avg, exp_avg_sq, 2 + 2 + 4 + 4, twice, and the gradient, 2 or 4
    torch          master, exp_avg, exp_avg_sq, 4 + 4 + 4, twice, and the gradient, 4
    torch, whole   the same; and the clipping pass (4, twice) and the cast that the next forward runs (4 + 2)
    apex           master, exp_avg, exp_avg_sq, twice, the bf16 weight, 2, and the gradient, 2
    te             as ours (store_param_remainders)

apex and te take part where they can be imported. Without a CUDA device only the gate runs, in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the next lines do

from torch import Tensor

from benchmarks.ceilings import ResultsFile, copy_bandwidth, interleaved_times
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.kernels.adamw import adamw_kernel, join_master, split_master
from nemo_embed_core.model.spec import parameter_shapes

OPTIONS = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
BETAS = {"betas": (OPTIONS["beta1"], OPTIONS["beta2"]), "lr": OPTIONS["lr"], "eps": OPTIONS["eps"]}


def shapes(layers: int) -> list[tuple[int, ...]]:
    """Of the matrices and norms of so many layers of the 8B model."""
    names = parameter_shapes(ModelConfig(num_hidden_layers=layers))
    return [shape for name, shape in names.items() if ".layers." in name]


class Ours:
    def __init__(self, masters: list[Tensor]):
        halves = [split_master(master) for master in masters]
        self.weights, self.remainders = ([pair[i].contiguous() for pair in halves] for i in (0, 1))
        self.moments = [[torch.zeros_like(m) for m in masters] for _ in range(2)]
        self.steps = 0

    def step(self, grads: list[Tensor], factor: Tensor) -> None:
        self.steps += 1
        adamw_kernel(self.weights, self.remainders, grads, *self.moments, factor, step=self.steps, **OPTIONS)

    def masters(self) -> list[Tensor]:
        return [join_master(w, r) for w, r in zip(self.weights, self.remainders, strict=True)]


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


def variants(masters: list[Tensor], missing: dict[str, str]) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> (one update, bytes a parameter)."""
    factor = torch.tensor(0.37, device=masters[0].device)
    grads = {
        dtype: [torch.randn_like(m).to(dtype) for m in masters] for dtype in (torch.float32, torch.bfloat16)
    }
    ours, theirs, whole = Ours(masters), torch_adamw(masters), torch_adamw(masters)
    for optimizer in (theirs, whole):
        for p, grad in zip(parameters_of(optimizer), grads[torch.float32], strict=True):
            p.grad = grad
    copies = [m.bfloat16() for m in masters]

    def clip_step_cast() -> None:
        torch._foreach_mul_(grads[torch.float32], factor)
        whole.step()
        torch._foreach_copy_(copies, [p.detach() for p in parameters_of(whole)])

    found: dict[str, tuple[Callable[[], object], int]] = {
        "ours, bf16 gradients": (lambda: ours.step(grads[torch.bfloat16], factor), 26),
        "ours, fp32 gradients": (lambda: ours.step(grads[torch.float32], factor), 28),
        "torch": (theirs.step, 28),
        "torch, whole": (clip_step_cast, 42),
    }
    for name, module, options, moved in (
        ("apex", "apex.optimizers", {"master_weights": True}, 28),
        (
            "te",
            "transformer_engine.pytorch.optimizers",
            {"master_weights": True, "store_param_remainders": True},
            26,
        ),
    ):
        try:
            parameters = [torch.nn.Parameter(m.bfloat16()) for m in masters]
            for p, grad in zip(parameters, grads[torch.bfloat16], strict=True):
                p.grad = grad
            fused = importlib.import_module(module).FusedAdam
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
    worst = gate(device, [(1025, 7), (123,), (4096, 1024)] if device == "cuda" else [(129, 7), (123,)])
    print(f"gate: at most {worst:.1f} ulps from torch's fused AdamW on fp32 masters", flush=True)
    if worst > 16:
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
        line = f"{milliseconds:8.3f} ms  {moved} B a parameter  {rate:6.0f} GB/s {share:6.1%}"
        print(f"  {name:22s} {line}")
        figures = {"bytes_a_parameter": moved, "ms": milliseconds, "gb_per_s": rate, "share": share}
        results.append(variant=name, parameters=size, **figures)
    for name, reason in missing.items():
        print(f"  {name:22s} not here: {reason}")
        results.append(variant=name, parameters=size, error=reason)


if __name__ == "__main__":
    main()
