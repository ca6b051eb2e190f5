"""What AdamW's moments lose in bf16 and 8 bits, beside fp32 ones: a random walk of gradients, on a CPU.

    python -m benchmarks.moments [--steps 4000 --rows 16]

Every element has gradients of its own size, e^(spread * N(0, 1)), with a mean of 0.3 of that; half-way they
become half as large. Of each way of keeping moments: exp_avg_sq over that of fp32, in the mean, and the sum
of the last eighth of the updates over that of fp32, at 1 %, 50 % and 99 % of the elements.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor

from nemo_embed_core.kernels.adamw import from_fp32_, random_bits, to_fp32
from nemo_embed_core.train.optim import BLOCK, DTYPES

COLUMNS = 2 * BLOCK
KINDS = ("fp32", "bf16 nearest", "bf16", "dynamic map nearest", "8bit nearest", "8bit")


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """Of bitsandbytes and torchao: seven decades, each with twice as many values as the one below."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def mapped(x: Tensor, values: Tensor) -> Tensor:
    """To the nearest of `values` times the largest of a block."""
    blocks = x.view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    shares = blocks / scales
    at = torch.searchsorted(values, shares).clamp(1, len(values) - 1)
    low, high = values[at - 1], values[at]
    return (torch.where(shares - low < high - shares, low, high) * scales).view_as(x)


def kept(kind: str, moments: list[Tensor], step: int) -> list[Tensor]:
    """What is read again."""
    if kind == "fp32":
        return moments
    if kind.startswith("dynamic"):
        return [mapped(x, dynamic_map(i == 0)) for i, x in enumerate(moments)]
    name, _, nearest = kind.partition(" ")
    shape, found = moments[0].shape, []
    random = random_bits(step * 7919, 0, COLUMNS, shape, torch.device("cpu"))
    for x, bits, dtype in zip(moments, random, DTYPES[name], strict=True):
        out = torch.empty(shape, dtype=dtype)
        base = torch.empty(shape[0], COLUMNS // BLOCK, dtype=torch.int16) if name == "8bit" else None
        from_fp32_(x, out, base, None if nearest else bits)
        found.append(to_fp32(out, base))
    return found


def measure(spread: float, steps: int, rows: int) -> dict[str, tuple[float, list[float], float]]:
    """kind -> mean of exp_avg_sq over fp32's; updates over fp32's at 1, 50 and 99 %; share of zeros."""
    generator = torch.Generator().manual_seed(0)
    sizes = 1e-3 * torch.exp(spread * torch.randn(rows, COLUMNS, generator=generator))
    states = {kind: [torch.zeros_like(sizes) for _ in range(2)] for kind in KINDS}
    sums = {kind: torch.zeros_like(sizes) for kind in KINDS}
    for step in range(1, steps + 1):
        drift = 1.0 if step <= steps // 2 else 0.5
        grad = sizes * drift * (torch.randn(rows, COLUMNS, generator=generator) + 0.3)
        for kind, (m, v) in states.items():
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad * grad
            if step > steps - steps // 8:
                sums[kind] += m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            states[kind] = kept(kind, [m, v], step)
    shares = torch.tensor([0.01, 0.5, 0.99])
    return {
        kind: (
            (v / states["fp32"][1]).mean().item(),
            (sums[kind] / sums["fp32"]).flatten().quantile(shares).tolist(),
            (v == 0).float().mean().item(),
        )
        for kind, (_, v) in states.items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="updates (default 4000)")
    parser.add_argument("--rows", type=int, default=16, help=f"of {COLUMNS} elements (default 16)")
    options = parser.parse_args(arguments)
    for spread in (1.0, 2.5):
        for kind, (mean, updates, zeros) in measure(spread, options.steps, options.rows).items():
            said = " / ".join(f"{x:.2f}" for x in updates)
            print(
                f"spread {spread}  {kind:20s} exp_avg_sq {mean:8.3f}, {zeros:4.0%} are 0; updates {said}",
                flush=True,
            )


if __name__ == "__main__":
    main()
