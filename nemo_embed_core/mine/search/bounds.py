"""How a GEMM sees a block of embeddings, and how far its result can be from the score.

    |q.d - q^.d^| <= |q - q^| |d| + |q^| |d - d^|       (Cauchy-Schwarz; residual norms known exactly per row)

fp32: the rows themselves, no residual; what is left is the rounding of the GEMM. bf16: the rows rounded,
products accumulated in fp32 on tensor cores. int8: rows rotated by a random orthogonal matrix, then one scale
per row. Without the rotation a few large channels set the scale and the bound is useless (docs/mining.md).
The int32 accumulation of int8 products is exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_embed_core.errors import UserError
from nemo_embed_core.kernels import rotate_quantize
from nemo_embed_core.kernels.quantize_rows import quantize_rows, square_rows
from nemo_embed_core.kernels.rotate_quantize import SHRINK

UNIT = 2.0**-24  # rounding unit of fp32
ROTATION_SEED = 20240817
# Numbers below it may count as 0 in a norm: their squares are below the smallest normal fp32.
UNDERFLOW = 1.2e-19


@dataclass(frozen=True)
class Rows:
    """n rows as values * scale[:, None]; norm >= |row|, residual >= |row - values * scale| (both finite)."""

    values: Tensor  # [n, D] fp32, bf16 or int8
    scale: Tensor | None  # [n] fp32; None: 1
    norm: Tensor  # [n] fp32
    residual: Tensor  # [n] fp32

    def __getitem__(self, rows: slice) -> Rows:
        scale = None if self.scale is None else self.scale[rows]
        return Rows(self.values[rows], scale, self.norm[rows], self.residual[rows])


class Rounding:
    """|computed - exact| <= relative |q^| |d^| + ABSOLUTE for GEMM, scaling and the rounding to fp32."""

    ABSOLUTE = 1e-30  # products below the smallest normal fp32, flushed to zero

    def __init__(self, method: str, hidden_size: int):
        # fp32: gamma_D for any order of summation, with or without FMA. bf16: tensor cores truncate where
        # fp32 units round, so twice that. int8: an exact sum, then a conversion and two products, and as much
        # for a bound that is a product and a sum (split_bound). All: adding the bound to the score, and the
        # fp32 rounding of the score itself.
        terms = {"fp32": hidden_size, "bf16": 2 * hidden_size, "int8": 8}[method]
        self.relative = 1.01 * (terms + 8) * UNIT


def fp32(hidden_size: int, device: torch.device) -> Callable[[Tensor], Rows]:
    def encode(x_nD: Tensor) -> Rows:
        x_nD = x_nD.float()
        return Rows(x_nD, None, norm_above(x_nD), torch.zeros(len(x_nD), device=x_nD.device))

    return encode


def bf16(hidden_size: int, device: torch.device) -> Callable[[Tensor], Rows]:
    def encode(x_nD: Tensor) -> Rows:
        # Squares that underflow count as UNDERFLOW each.
        lost = UNDERFLOW * math.sqrt(hidden_size)
        if x_nD.dtype == torch.bfloat16:  # nothing is rounded: the rows themselves, not a copy
            norm = root_above(square_rows(x_nD), hidden_size) + lost
            return Rows(x_nD, None, norm, torch.full_like(norm, lost))
        values, _, square, error = quantize_rows(x_nD, torch.bfloat16)
        norm, residual = (root_above(x, hidden_size) + lost for x in (square, error))
        return Rows(values, None, norm, residual)

    return encode


def int8(hidden_size: int, device: torch.device) -> Callable[[Tensor], Rows]:
    rotate, torch_error, signs = _rotation(hidden_size, device)

    def encode(x_nD: Tensor) -> Rows:
        # The same exact rotation in one pass, where there is a kernel for it.
        if x_nD.is_cuda and rotate_quantize.is_rotatable(hidden_size, x_nD.dtype):
            values, scale, square, error = rotate_quantize.rotate_quantize(x_nD, signs)
            rotation_error = rotate_quantize.rotation_error(hidden_size, x_nD.dtype)
            error = error + hidden_size * rotate_quantize.UNDERFLOW
        else:
            values, scale, square, error = quantize_rows(rotate(x_nD), torch.int8)
            rotation_error = torch_error
            lost = hidden_size * UNDERFLOW**2  # squares that underflow
            square, error = square + lost, error + lost
        norm = root_above(square, hidden_size) * (SHRINK * (1 + 2 * rotation_error))
        residual = root_above(error, hidden_size) * SHRINK + (rotation_error + 2 * UNIT) * norm
        # The scale of a row with NaN or infinity keeps it out.
        return Rows(values, scale * SHRINK, norm, residual)

    return encode


METHODS = {"fp32": fp32, "bf16": bf16, "int8": int8}


def pair_bound(q: Rows, block: Rows, rounding: Rounding) -> Tensor:
    """[q]: how far the scaled result of `matmul` can be from the score, for every document of the block."""
    norm, residual = block.norm.max(), block.residual.max()
    bound = q.residual * norm + (q.norm + q.residual) * residual
    return bound + rounding.relative * (q.norm + q.residual) * (norm + residual) + Rounding.ABSOLUTE


def split_bound(q: Rows, block: Rows, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """(fixed [q], slope [q]): fixed[q] + slope[q] * block.residual[n] is what pair_bound says, for one
    document rather than for the worst of the block, whose residual is far above that of most."""
    norm, residual = block.norm.max(), block.residual.max()
    slope = q.norm + q.residual
    return q.residual * norm + rounding.relative * slope * (norm + residual) + Rounding.ABSOLUTE, slope


def matmul(q: Rows, block: Rows, add: Tensor | None = None) -> Tensor:
    """q.values @ block.values.T (+ add[:, None]) before scales: [q, n] fp32; int32, no add, for int8."""
    a, b = q.values, block.values
    if a.dtype == torch.int8:
        return _int8_mm(a, b)
    if a.dtype == torch.bfloat16:
        if a.is_cuda:
            assert add is None
            return torch.mm(a, b.T, out_dtype=torch.float32)  # torch 2.8+, CUDA only
        a, b = a.float(), b.float()
    product = a @ b.T if a.is_cuda else linear(a, b)
    return product if add is None else product.add_(add[:, None])


def linear(x: Tensor, weight: Tensor, limit: float = math.inf) -> Tensor:
    """(x @ weight.T).clamp(-limit, limit), fp32; on a CPU by oneDNN: MKL is half as fast on an AMD CPU."""
    if torch.backends.mkldnn.is_available():
        after = ("none", []) if math.isinf(limit) else ("hardtanh", [-limit, limit])
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, *after, "")
    return (x @ weight.T).clamp_(-limit, limit)


def _int8_mm(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_cuda and a.shape[1] > 1:  # of one column torch 2.13 makes garbage where the CPU has VNNI
        return torch._int_mm(a, b.T)
    # cuBLASLt takes more than 16 rows and multiples of 8 elsewhere; zeros change nothing.
    rows, columns = len(a), len(b)
    pad_d, pad_rows, pad_columns = -a.shape[1] % 8, max(0, 32 - rows), -columns % 8
    if pad_d or pad_rows:
        a = torch.nn.functional.pad(a, (0, pad_d, 0, pad_rows))
    if pad_d or pad_columns:
        b = torch.nn.functional.pad(b, (0, pad_d, 0, pad_columns))
    return torch._int_mm(a, b.T)[:rows, :columns]


def check_norms(document_norm: Tensor, query_norm: Tensor) -> None:
    if not bool(torch.isfinite(document_norm * query_norm * 1e6)):
        norms = f"{float(document_norm):.1e} and {float(query_norm):.1e}"
        why = "their products overflow float32; normalise the rows"
        raise UserError(f"embeddings have norms up to {norms}: {why}")


def root_above(square_n: Tensor, hidden_size: int) -> Tensor:
    """An upper bound of a norm whose square was summed in fp32; infinite on overflow, which is refused."""
    return square_n.sqrt() * (1 + 2 * hidden_size * UNIT)


def norm_above(x_nD: Tensor) -> Tensor:
    """An upper bound of each row's norm; 0 for rows with NaN or infinity, which have no score."""
    hidden_size = x_nD.shape[1]
    norm = torch.linalg.vector_norm(x_nD, dim=1) * (1 + 2 * hidden_size * UNIT)
    norm = norm + UNDERFLOW * math.sqrt(hidden_size)
    finite = torch.isfinite(norm)
    if not x_nD.is_cuda and bool(finite.all()):  # the second pass over the rows is rarely needed
        return norm
    # A finite row whose squares overflow keeps its infinite norm: the search refuses it by the number.
    return torch.where(finite, norm, torch.where(torch.isfinite(x_nD).all(1), torch.inf, 0.0))


@functools.cache
def _rotation(hidden_size: int, device: torch.device) -> tuple[Callable[[Tensor], Tensor], float, Tensor]:
    """x -> (A (x) B) diag(signs) x / SHRINK, a bound on |computed - exactly orthogonal| / |x|, and the signs.

    A [a, a] and B [b, b] with a b = D: Hadamard matrices for powers of two (together the randomised Hadamard
    transform), random orthogonal ones otherwise. Two small GEMMs: D (a + b) products a row instead of D^2.
    """
    generator = torch.Generator().manual_seed(ROTATION_SEED)
    signs = (torch.randint(0, 2, (hidden_size,), generator=generator) * 2 - 1).to(device, torch.float32)
    left, right, error = rotation_factors(hidden_size, generator)
    left, right, shrunk = left.to(device), right.to(device), signs / SHRINK

    def rotate(x_nD: Tensor) -> Tensor:
        x = (x_nD * shrunk).view(-1, len(left), len(right))
        return torch.matmul(left, torch.matmul(x, right.T)).reshape(len(x_nD), hidden_size)

    return rotate, error, signs


def rotation_factors(
    hidden_size: int, generator: torch.Generator, roundings: int = 2
) -> tuple[Tensor, Tensor, float]:
    """A [a, a] and B [b, b], orthogonal, a b = hidden_size; |computed - exact (A (x) B) x| / |x| at most.

    roundings: on the way beside those of the sums.
    """
    a = max(i for i in range(1, math.isqrt(hidden_size) + 1) if hidden_size % i == 0)
    b = hidden_size // a
    left, left_error = _orthogonal(a, generator)
    right, right_error = _orthogonal(b, generator)
    # Both products round: relative to |x|, gamma_(a+b) |A||B| entrywise, at most sqrt(D) times in the norm.
    error = left_error + right_error + 1.01 * (a + b + roundings) * UNIT * math.sqrt(hidden_size)
    return left, right, error


def _orthogonal(n: int, generator: torch.Generator) -> tuple[Tensor, float]:
    if n & (n - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < n:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        h /= math.sqrt(n)
    else:
        h = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    rounded = h.float()
    # |R^T R - I| bounds how far the rounded matrix is from an isometry, for scores as for norms.
    error = float(torch.linalg.matrix_norm(rounded.double().T @ rounded.double() - torch.eye(n).double()))
    return rounded, error + 1e-12
