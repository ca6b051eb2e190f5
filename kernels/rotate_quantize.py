"""Rows times one random orthogonal matrix, as int8 with one scale each: a Hadamard transform and
quantize_rows in one pass.

Contract: one read of the rows and one write of the values. With H the matrix of +-1 that Sylvester's
construction gives, y = H (signs x) / (256 sqrt(D)) is what is quantised, and the squares are sums of y.
`rotation_error` bounds the distance of the computed y from the exact one, relative to its norm; the squares
round besides (kernels/quantize_rows.py).
"""

# N rows · D = R C columns, powers of two · C at a time by a tensor core, R by additions

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# An entry of a rotated row is at most |x| <= sqrt(D) max|x|: after this no finite row becomes infinite.
SHRINK = 256.0
UNDERFLOW = 2.0**-126  # times D: what flushed squares (and, far less, flushed numbers) can lack in `error`


def rotate_quantize_ref(x_ND, signs_D):
    broken = ~x_ND.isfinite().all(1)
    x = torch.where(broken[:, None], 0, x_ND.double()) * signs_D
    for level in range(x.shape[1].bit_length() - 1):
        first, second = x.view(len(x), -1, 2, 1 << level).unbind(2)
        x = torch.stack([first + second, first - second], 2)
    x = (x.view(x_ND.shape) / (SHRINK * math.sqrt(x_ND.shape[1]))).float()
    scale = x.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1)
    values = (x / scale[:, None]).round()
    error = x - values * scale[:, None]
    scale = torch.where(broken, torch.nan, scale)
    return values.to(torch.int8), scale, x.square().sum(1), error.square().sum(1)


def is_rotatable(hidden_size: int, dtype: torch.dtype) -> bool:
    largest = {torch.float32: 8192, torch.bfloat16: 16384, torch.float16: 16384}.get(dtype, 0)  # in registers
    return 256 <= hidden_size <= largest and hidden_size & (hidden_size - 1) == 0


# D: (C, num_warps) of 16-bit rows, whose accumulators are [C, R]. At 4096 the fastest of three on an H200;
# the others by registers.
_CONFIGS = {256: (16, 1), 512: (32, 1), **dict.fromkeys((1024, 2048, 4096), (64, 4))}
_CONFIGS |= dict.fromkeys((8192, 16384), (128, 8))
_ROWS = 16  # of a program, which sets up the matrix and the signs once


def rotation_error(hidden_size: int, dtype: torch.dtype) -> float:
    """|computed y - y| <= this times |y|, for every row that does not overflow, and but for what underflows
    (UNDERFLOW).

    A butterfly of the additions computes s = x0 + x1 and either x0 - x1 or s - 2 x1: two roundings are at
    most u (|s| + |x0 - x1|), a pair's error at most 2 u |(s, x0 - x1)|. H of any size lengthens all vectors
    alike, so that relative errors of levels add up: 2 log2(n) u. The factor 1 / (256 sqrt(D)) is rounded, and
    so is its product: 2 u.
    A dot of the tensor cores adds C exact products (16 bits times +-1): 2 gamma_C sum|x| for additions that
    truncate, at most 2 C u sqrt(C) |x|. C of them are at most sqrt(C) times as long, as is the exact result:
    2 C^1.5 u.
    1.01: products of these errors.
    """
    unit = 2.0**-24
    if dtype == torch.float32:
        return 1.01 * (2 * math.log2(hidden_size) + 2) * unit
    columns = _CONFIGS[hidden_size][0]
    return 1.01 * (2 * columns**1.5 + 2 * math.log2(hidden_size // columns) + 2) * unit


@triton.jit
def _hadamard(x, LEVELS: tl.constexpr, FIRST_FAR: tl.constexpr, END_FAR: tl.constexpr):
    """The 2^LEVELS columns of each row of x, transformed: (x0 + x1, x0 - x1) for every bit of the column.

    Bits FIRST_FAR to END_FAR lie across lanes (and warps): there the difference is had from the sum, one
    exchange for both.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    is_second = tl.arange(0, 2)[None, :, None] == 1
    for level in tl.static_range(LEVELS):
        x = tl.reshape(x, (ROWS * COLUMNS >> (level + 1), 2, 1 << level))
        total = tl.sum(x, 1, keep_dims=True)
        if level >= FIRST_FAR and level < END_FAR:
            x = total + tl.where(is_second, -2.0, 0.0) * x
        else:
            x = tl.where(is_second, tl.sum(tl.where(is_second, -x, x), 1, keep_dims=True), total)
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def _rotate_quantize_kernel(
    x_ptr, signs_ptr, values_ptr, scale_ptr, square_ptr, error_ptr, N, factor,
    R: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, FIRST_FAR: tl.constexpr, END_FAR: tl.constexpr,
    DOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows, one after the other, each as a tile [R, C] in the registers of all warps."""
    offs = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    signs = tl.load(signs_ptr + offs)
    if DOT:
        common = tl.arange(0, C)[:, None] & tl.arange(0, C)[None, :]
        common ^= common >> 4
        common ^= common >> 2
        common ^= common >> 1
        matrix = (1 - 2 * (common & 1)).to(signs.dtype)
    first_n = tl.program_id(0).to(tl.int64) * ROWS
    last_n = tl.minimum(first_n + ROWS, N) - 1
    following = tl.load(x_ptr + first_n * (R * C) + offs)
    for i in tl.range(0, ROWS, num_stages=1):
        n = tl.minimum(first_n + i, last_n)  # behind the end the last row again
        loaded = following  # a row ahead of the computation
        following = tl.load(x_ptr + tl.minimum(n + 1, last_n) * (R * C) + offs)
        zero = tl.sum(tl.reshape(loaded, (R * C,)).to(tl.float32) * 0.0, 0)
        broken = zero != zero  # NaN or infinity times zero
        if DOT:
            x = tl.dot(matrix, tl.trans(loaded * signs)) * factor  # [C, R]
            x = _hadamard(x, LEVELS, FIRST_FAR, END_FAR)
        else:
            x = _hadamard(loaded * (signs * factor), LEVELS, FIRST_FAR, END_FAR)
        x = tl.where(broken, 0.0, x)
        scale = tl.max(tl.reshape(tl.abs(x), (R * C,)), 0) / 127
        # Its inverse is finite; what is lost is counted as any other error.
        scale = tl.where(scale > 1e-30, scale, 1.0)
        shifted = x * (1 / scale) + 12582912.0  # 1.5 * 2^23: the rounded number is in the last bits
        error = x - (shifted - 12582912.0) * scale
        square, error = tl.sum(tl.reshape(x * x, (R * C,)), 0), tl.sum(tl.reshape(error * error, (R * C,)), 0)
        values = shifted.to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(values_ptr + n * (R * C) + offs, tl.trans(values) if DOT else values)
        tl.store(scale_ptr + n, tl.where(broken, float("nan"), scale))
        # Sums of a finite row that overflowed may be NaN: infinite, which a caller refuses.
        tl.store(square_ptr + n, tl.where(square == square, square, float("inf")))
        tl.store(error_ptr + n, tl.where(error == error, error, float("inf")))


@torch.library.custom_op("nemo_embed_core::rotate_quantize", mutates_args=())
def rotate_quantize_kernel(
    x_ND: torch.Tensor, signs_D: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, columns = x_ND.shape
    x_ND, signs_D = x_ND.contiguous(), signs_D.to(x_ND.dtype)
    values = torch.empty_like(x_ND, dtype=torch.int8)
    scale, square, error = (x_ND.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    # Where bits lie, which decides about speed only: accumulators have pairs of columns in registers and four
    # such pairs across lanes; a row as it is read has 16 numbers in registers, then come lanes, then warps.
    is_dot = x_ND.dtype != torch.float32
    if is_dot:
        (c, num_warps), first_far, end_far = _CONFIGS[columns], 1, 3
    else:
        c, num_warps, first_far = columns, max(1, columns // 512), 4
        end_far = 8 + num_warps.bit_length()
    r = columns // c
    if num_rows:
        _rotate_quantize_kernel[(triton.cdiv(num_rows, _ROWS),)](
            x_ND, signs_D, values, scale, square, error, num_rows, 1 / (SHRINK * math.sqrt(columns)),
            R=r, C=c, LEVELS=(r if is_dot else c).bit_length() - 1, FIRST_FAR=first_far, END_FAR=end_far,
            DOT=is_dot, ROWS=_ROWS, num_warps=num_warps,
        )  # fmt: skip
    return values, scale, square, error


@rotate_quantize_kernel.register_fake
def _(x_ND, signs_D):
    vectors = (x_ND.new_empty(x_ND.shape[0], dtype=torch.float32) for _ in range(3))
    return torch.empty_like(x_ND, dtype=torch.int8), *vectors


def rotate_quantize(
    x_ND: torch.Tensor, signs_D: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """quantize_rows(y, torch.int8) of y = scipy.linalg.hadamard(D) @ (signs * x) / (256 sqrt(D)) for every
    row x

    x [N, D]: bf16, fp16, fp32, D a power of two from 256 to 16384 (fp32: 8192).  signs [D]: 1 or -1.
    Returns values [N, D] int8, scale [N], square [N] and error [N] in fp32, as quantize_rows does, ties to
    even. A row with NaN or infinity has squares 0 and the scale NaN. CUDA: Triton, tensors on the current
    device.
    """
    if x_ND.dim() != 2 or not is_rotatable(x_ND.shape[1], x_ND.dtype) or signs_D.shape != x_ND.shape[1:]:
        raise ValueError(
            "rotate_quantize wants [N, D] with D a power of two from 256 to 16384 (fp32: 8192), and D signs, "
            f"not {list(x_ND.shape)} {x_ND.dtype} and {list(signs_D.shape)}"
        )
    return rotate_quantize_kernel(x_ND, signs_D) if x_ND.is_cuda else rotate_quantize_ref(x_ND, signs_D)
