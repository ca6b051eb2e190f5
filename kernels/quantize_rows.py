"""Rows as int8 with one scale each, or as bf16, with the norms that bound what the rounding can do to a dot
product.

Contract: one read of the rows and one write of the values. The squares are sums over the row of what was
stored, in fp32 and in any order: a caller that needs an upper bound adds the rounding of D additions
(mine/search/bounds.py).
"""

# N rows · D columns

from __future__ import annotations

import torch
import triton
import triton.language as tl


def quantize_rows_ref(x_ND, dtype):
    broken = ~x_ND.isfinite().all(1)
    x = torch.where(broken[:, None], 0, x_ND.float())
    if dtype == torch.int8:
        scale = x.abs().amax(1) / 127
        scale = torch.where(scale > 0, scale, 1)
        values = torch.floor(x / scale[:, None] + 0.5).to(torch.int8)
        error = x - values.float() * scale[:, None]
    else:
        scale, values = torch.ones_like(x[:, 0]), x_ND.to(dtype)
        error = torch.where(broken[:, None], 0, x - values.float())
    return values, torch.where(broken, torch.nan, scale), x.square().sum(1), error.square().sum(1)


# (elements of a program, num_warps): rows are whole in registers, 32 numbers a thread at D = 8192.
_CONFIG = (8192, 8)


@triton.jit
def _quantize_rows_kernel(
    x_ptr, values_ptr, scale_ptr, square_ptr, error_ptr, N,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INT8: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N whole rows."""
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    offs = offs_n[:, None] * D + offs_d[None, :]
    loaded = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    broken = tl.sum(tl.where(tl.abs(loaded) < float("inf"), 0, 1), 1) > 0  # NaN is not below infinity either
    x = tl.where(broken[:, None], 0.0, loaded)
    if INT8:
        scale = tl.max(tl.abs(x), 1) / 127
        scale = tl.where(scale > 0, scale, 1.0)
        rounded = tl.floor(x / scale[:, None] + 0.5)
        stored = rounded * scale[:, None]
    else:
        scale = tl.full((BLOCK_N,), 1.0, tl.float32)
        rounded = loaded.to(values_ptr.dtype.element_ty)
        stored = tl.where(broken[:, None], 0.0, rounded.to(tl.float32))
    tl.store(square_ptr + offs_n, tl.sum(x * x, 1), mask=offs_n < N)
    if STORED:
        error = x - stored
        tl.store(values_ptr + offs, rounded.to(values_ptr.dtype.element_ty), mask=mask)
        tl.store(scale_ptr + offs_n, tl.where(broken, float("nan"), scale), mask=offs_n < N)
        tl.store(error_ptr + offs_n, tl.sum(error * error, 1), mask=offs_n < N)


def _launch(x_ND: torch.Tensor, values, scale, square, error, is_stored: bool) -> None:
    num_rows, columns = x_ND.shape
    elements, num_warps = _CONFIG
    block_d = triton.next_power_of_2(columns)
    block_n = max(1, elements // block_d)
    if num_rows:
        _quantize_rows_kernel[(triton.cdiv(num_rows, block_n),)](
            x_ND.contiguous(), values, scale, square, error, num_rows, D=columns, BLOCK_N=block_n,
            BLOCK_D=block_d, INT8=values.dtype == torch.int8, STORED=is_stored, num_warps=num_warps,
        )  # fmt: skip


@torch.library.custom_op("nemo_embed_core::quantize_rows", mutates_args=())
def quantize_rows_kernel(
    x_ND: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    values, scale, square, error = _empty(x_ND, dtype)
    _launch(x_ND, values, scale, square, error, True)
    return values, scale, square, error


@quantize_rows_kernel.register_fake
def _empty(x_ND, dtype):
    vectors = (x_ND.new_empty(x_ND.shape[0], dtype=torch.float32) for _ in range(3))
    return x_ND.new_empty(x_ND.shape, dtype=dtype), *vectors


@torch.library.custom_op("nemo_embed_core::square_rows", mutates_args=())
def square_rows_kernel(x_ND: torch.Tensor) -> torch.Tensor:
    square = x_ND.new_empty(x_ND.shape[0], dtype=torch.float32)
    _launch(x_ND, square, square, square, square, False)
    return square


@square_rows_kernel.register_fake
def _(x_ND):
    return x_ND.new_empty(x_ND.shape[0], dtype=torch.float32)


def quantize_rows(
    x_ND: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale = x.abs().amax(1) / 127 (bf16: 1); values = (x / scale[:, None] + 0.5).floor().to(dtype);
    x.square().sum(1); (x - values * scale[:, None]).square().sum(1)

    x [N, D]: bf16, fp16, fp32, D <= 16384 on CUDA.  dtype: torch.int8 or torch.bfloat16.
    Returns values [N, D] of that dtype, scale [N], square [N] and error [N] in fp32. A row with NaN or
    infinity has squares 0 and the scale NaN (int8 cannot say so: its values are 0); a row of zeros has the
    scale 1.
    CUDA: Triton, tensors on the current device.
    """
    if x_ND.dim() != 2 or dtype not in (torch.int8, torch.bfloat16):
        raise ValueError(
            f"quantize_rows wants [N, D] and torch.int8 or torch.bfloat16, not {list(x_ND.shape)} and {dtype}"
        )
    if x_ND.is_cuda:
        if x_ND.shape[1] > 16384:
            raise ValueError(
                f"quantize_rows holds whole rows in registers: D={x_ND.shape[1]} is more than 16384"
            )
        return quantize_rows_kernel(x_ND, dtype)
    return quantize_rows_ref(x_ND, dtype)


def square_rows(x_ND: torch.Tensor) -> torch.Tensor:
    """quantize_rows(x, x.dtype)[2], the squares, where nothing else is wanted: one read of the rows, no write

    x [N, D]: bf16, fp16, fp32, D <= 16384 on CUDA.  Returns [N] fp32, 0 for a row with NaN or infinity.
    CUDA: Triton, tensors on the current device.
    """
    if x_ND.dim() != 2 or (x_ND.is_cuda and x_ND.shape[1] > 16384):
        raise ValueError(f"square_rows wants [N, D] with D <= 16384 on CUDA, not {list(x_ND.shape)}")
    return square_rows_kernel(x_ND) if x_ND.is_cuda else quantize_rows_ref(x_ND, torch.bfloat16)[2]
