"""Matrices in fp8 with one scale each, and their products.

    scale = amax(|x|) / MAX     values = (x / scale).to(fp8)     x is about values * scale
    y = (a.values @ b.values.T) * (a.scale * b.scale), summed in fp32, rounded to bf16 once

MAX is the largest number of the type: 448 of e4m3 (3 bits of mantissa: weights and activations), 57,344 of
e5m2 (2 bits, a wider range: gradients). The largest |x| becomes MAX, so nothing is ever clamped. A NaN or an
infinity makes the scale one, and with it every value of the product: a step that went wrong cannot look well.

Contract: amax reads x once; quantize reads it once and writes 1 byte an element for each layout. The tensor
cores of Hopper take both factors with the inner dim contiguous, so a weight gradient needs transposes; the
kernel writes them in the same pass, padded with zeros to a multiple of 16, which those products need too.
A kernel that writes what is quantised next takes its amax along (`note_amax`): rms_norm.py, swiglu.py.
"""

# R rows · C columns · M, N, K of a product

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MAX = {E4M3: 448.0, E5M2: 57344.0}
MULTIPLE = 16  # of the inner dim and of N: cuBLASLt's alignment for fp8
_LEAST = 1e-30  # of an amax: zeros stay zeros, and MAX / amax finite


class Quantized(NamedTuple):
    """rows [R, C] and columns [C, R rounded up to 16], the transpose with zeros behind it, are the same
    values; an empty tensor is one that nobody asked for. scale: fp32 scalar."""

    rows: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor


def amax_ref(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax().abs().float()  # abs again: a NaN's sign, which would order its bits below zero


def scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """That quantize gives."""
    return torch.where(amax < _LEAST, _LEAST, amax) / MAX[dtype]


def quantize_ref(
    x_RC: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype, rows: bool, columns: bool
) -> Quantized:
    amax = torch.where(amax < _LEAST, _LEAST, amax)
    values = (x_RC.float() * (MAX[dtype] / amax)).to(dtype)
    empty, padding = values.new_empty(0), -len(x_RC) % MULTIPLE
    transposed = torch.nn.functional.pad(values.view(torch.uint8).t(), (0, padding)).contiguous().view(dtype)
    return Quantized(values if rows else empty, transposed if columns else empty, scale_of(amax, dtype))


# Programs, elements at a time, num_warps: four programs an SM of an H100/H200. Not timed yet.
_AMAX = (528, 4096, 8)
# BLOCK_R, BLOCK_C, num_warps: whole cache lines are read (bf16) and written both ways. Not timed yet.
_TILE = (128, 64, 4)


@triton.jit
def size_bits(x):
    """The bits of |x| in fp32: ordered as the floats are, and a NaN's are the largest."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def note_amax(amax_ptr, bits):
    """amax_ptr, which starts at 0, gets the largest of `bits` if that is larger: size_bits of what a program
    writes, rounded as it is written. A lane that writes nothing has 0."""
    most = tl.max(bits)
    # What is read here may be old, and then too small: that is one atomic too many, never one too few. Nearly
    # no program has to do it, as the first ones have come near the largest value already.
    tl.atomic_max(amax_ptr, most, mask=most > tl.load(amax_ptr), sem="relaxed")


def zero_bits(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    """For note_amax on x's device; empty where nobody wants it, as an op returns equally many tensors."""
    return x.new_zeros((), dtype=torch.int32) if wanted else x.new_empty(0, dtype=torch.int32)


@triton.jit
def _amax_kernel(x_ptr, amax_ptr, n, BLOCK: tl.constexpr):
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, size_bits(tl.load(x_ptr + offs, mask=offs < n, other=0.0)))
    note_amax(amax_ptr, most)


@triton.jit
def _quantize_kernel(
    x_ptr, amax_ptr, rows_ptr, columns_ptr, scale_ptr, R, C, R_PADDED,
    MAX: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a tile, written as it is and transposed."""
    amax = tl.load(amax_ptr)
    amax = tl.where(amax < LEAST, LEAST, amax)  # not tl.maximum, which would swallow a NaN
    tiles = tl.cdiv(C, BLOCK_C)
    offs_r = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    x = tl.load(x_ptr + offs_r[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    # div_rn: the same bits as torch's division, and so as every other rank's whatever it runs on.
    values = (x * tl.div_rn(MAX, amax)).to(rows_ptr.dtype.element_ty)
    if ROWS:
        tl.store(rows_ptr + offs_r[:, None] * C + offs_c[None, :], values, mask=mask)
    if COLUMNS:
        mask_padded = (offs_c < C)[:, None] & (offs_r < R_PADDED)[None, :]
        offs = offs_c[:, None] * R_PADDED + offs_r[None, :]
        tl.store(columns_ptr + offs, tl.trans(values), mask=mask_padded)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, tl.div_rn(amax, MAX))


@torch.library.custom_op("nemo_embed_core::amax", mutates_args=())
def amax_kernel(x: torch.Tensor) -> torch.Tensor:
    x, bits = x.contiguous(), zero_bits(x, True)
    programs, block, num_warps = _AMAX
    grid = min(programs, triton.cdiv(x.numel(), block))
    _amax_kernel[(grid,)](x, bits, x.numel(), BLOCK=block, num_warps=num_warps)
    return bits.view(torch.float32)


@amax_kernel.register_fake
def _(x):
    return x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("nemo_embed_core::quantize", mutates_args=())
def _quantize(
    x_RC: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype, rows: bool, columns: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_RC = x_RC.contiguous()
    made = _empty(x_RC, amax, dtype, rows, columns)
    (num_rows, num_columns), (block_r, block_c, num_warps) = x_RC.shape, _TILE
    _quantize_kernel[(triton.cdiv(num_rows, block_r) * triton.cdiv(num_columns, block_c),)](
        x_RC, amax, *made, num_rows, num_columns, _padded(num_rows), MAX=MAX[dtype], LEAST=_LEAST, ROWS=rows,
        COLUMNS=columns, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=num_warps,
    )  # fmt: skip
    return made


@_quantize.register_fake
def _empty(x_RC, amax, dtype, rows, columns):
    (num_rows, num_columns), new = x_RC.shape, x_RC.new_empty
    return (
        new((num_rows, num_columns) if rows else (0,), dtype=dtype),
        new((num_columns, _padded(num_rows)) if columns else (0,), dtype=dtype),
        new((), dtype=torch.float32),
    )


def _padded(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE


def quantize_kernel(
    x_RC: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype, rows: bool, columns: bool
) -> Quantized:
    return Quantized(*_quantize(x_RC, amax, dtype, rows, columns))


def amax(x: torch.Tensor) -> torch.Tensor:
    """x.abs().max() as an fp32 scalar on x's device; NaN where x has one, so that it is seen.

    x: bf16, fp16 or fp32, not empty.  CUDA: Triton, the same bits in any order of programs.
    """
    return amax_kernel(x) if x.is_cuda else amax_ref(x)


def quantize(
    x_RC: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype, *, rows: bool = True, columns: bool = False
) -> Quantized:
    """(x * (MAX / amax)).to(dtype), as it is and transposed, and amax / MAX.

    x [R, C]: bf16, fp16, fp32, or fp8 whose amax is said to be MAX, which is then only transposed.
    amax: fp32 scalar, at least the largest |x|: over all ranks that hold a part of one matrix.
    dtype: E4M3 or E5M2.  rows, columns: which layouts are wanted.
    """
    if x_RC.dim() != 2 or dtype not in MAX or amax.shape != () or amax.dtype != torch.float32:
        raise ValueError(
            f"quantize wants [R, C], an fp32 scalar and e4m3fn or e5m2, not {list(x_RC.shape)}, "
            f"{list(amax.shape)} {amax.dtype} and {dtype}"
        )
    return (quantize_kernel if x_RC.is_cuda else quantize_ref)(x_RC, amax, dtype, rows, columns)


def scaled_mm(
    a_MK: torch.Tensor, scale_a: torch.Tensor, b_NK: torch.Tensor, scale_b: torch.Tensor, *, fast: bool
) -> torch.Tensor:
    """((a.float() @ b.float().T) * (scale_a * scale_b)).bfloat16()

    a [M, K], b [N, K]: fp8, at most one of them e5m2.  fast: sums may lose bits below 2^-13 of their largest
    term (Hopper adds so within the tensor cores; otherwise partial sums are promoted to fp32).
    CUDA: torch._scaled_mm, compute capability 8.9 and later; K and N multiples of 16.
    Elsewhere this formula: the same numbers but for the order of sums, and for what `fast` may lose.
    """
    if a_MK.is_cuda:
        return torch._scaled_mm(
            a_MK, b_NK.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
    return ((a_MK.float() @ b_NK.float().t()) * (scale_a * scale_b)).bfloat16()
