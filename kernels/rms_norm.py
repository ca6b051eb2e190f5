"""RMSNorm of the residual stream, with the residual addition in the same pass.

Contract: hidden = x + residual, rounded to x.dtype (the value that later layers see); y = norm(hidden) *
weight. Half types are normalised in fp32, cast back, then multiplied by the weight: LlamaRMSNorm's order, so
y equals Hugging Face's. One read of x and residual, one write of y and hidden; backward reads dy, dhidden and
hidden once and writes dx once. The largest |y|, which fp8 products ask for, is taken along as y is written.
"""

# T packed tokens · D hidden_size · P programs of the backward, each with its own partial sum of dweight

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nemo_embed_core.kernels.fp8 import amax_ref, note_amax, size_bits, zero_bits

Normed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # y, hidden, amax where it is asked for


def rms_norm_ref(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float,
    residual_TD: torch.Tensor | None = None, amax: bool = False,
) -> Normed:  # fmt: skip
    hidden_TD = x_TD if residual_TD is None else x_TD + residual_TD
    wide_TD = hidden_TD.float() if hidden_TD.dtype in (torch.bfloat16, torch.float16) else hidden_TD
    normed_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    y_TD = (weight_D * normed_TD.to(hidden_TD.dtype)).to(hidden_TD.dtype)
    return y_TD, hidden_TD, amax_ref(y_TD.detach()) if amax else None


# (largest BLOCK_D, num_warps): by registers per thread (no spills; at 16384 the backward would spill), and at
# D = 4096 by time on an H200, where 4, 8 and 16 warps differ by 1 % (docs/log.md).
_CONFIGS = [(512, 1), (1024, 2), (2048, 4), (4096, 8), (8192, 16)]

# Programs of the backward: two per SM of an H100/H200 with rows in flight; more programs were slower. A
# constant, not the device's SM count: the order in which dweight is summed, and so its bits, must not depend
# on the GPU.
_BACKWARD_PROGRAMS = 264
_SUM_ROWS = (128, 16, 8)  # rows and columns at a time, num_warps: 256 programs at D = 4096


def _config(hidden_size: int) -> tuple[int, int]:
    """BLOCK_D, num_warps"""
    block_d = max(16, triton.next_power_of_2(hidden_size))
    for largest, num_warps in _CONFIGS:
        if block_d <= largest:
            return block_d, num_warps
    raise ValueError(
        f"rms_norm holds a row in registers: hidden_size={hidden_size} is above {_CONFIGS[-1][0]}"
    )


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, hidden_ptr, rstd_ptr, amax_ptr, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One program: one row. amax_ptr None: the kernel without it."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    hidden = tl.load(x_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        hidden += tl.load(residual_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        rounded = hidden.to(x_ptr.dtype.element_ty)
        tl.store(hidden_ptr + row * D + offs_d, rounded, mask=mask_d)
        hidden = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(hidden * hidden, 0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    normed = (hidden * rstd).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    y = (weight * normed).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * D + offs_d, y, mask=mask_d)
    if amax_ptr is not None:
        note_amax(amax_ptr, size_bits(y))


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, dhidden_ptr, hidden_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DHIDDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: rows pid, pid + P, pid + 2 P, ...; their share of dweight stays in registers until the
    end."""
    pid = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    for row in tl.range(
        pid, T, tl.num_programs(0), num_stages=STAGES
    ):  # the next rows' loads fly during this row's sums
        offs = row * D + offs_d  # row is int64 like pid
        normed = tl.load(hidden_ptr + offs, mask=mask_d, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=mask_d, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed *= rstd
        dweight += dy * normed
        dnormed = dy * weight
        dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed, 0) / D))
        if HAS_DHIDDEN:
            dx += tl.load(dhidden_ptr + offs, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask_d)
    tl.store(dweight_ptr + pid * D + offs_d, dweight, mask=mask_d)


@triton.jit
def _sum_rows_kernel(a_ptr, out_ptr, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D columns of a.sum(0), in out's dtype."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < P)[:, None] & (offs_d < D)[None, :]
        offs = offs_p[:, None] * D + offs_d[None, :]
        total += tl.load(a_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs_d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=offs_d < D)


def _sum_rows(a_PD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a.sum(0).to(dtype): fp32 rows, a fixed order, one launch instead of two."""
    num_rows, hidden_size = a_PD.shape
    out_D = a_PD.new_empty(hidden_size, dtype=dtype)
    block_p, block_d, num_warps = _SUM_ROWS
    _sum_rows_kernel[(triton.cdiv(hidden_size, block_d),)](
        a_PD, out_D, num_rows, hidden_size, BLOCK_P=block_p, BLOCK_D=block_d, num_warps=num_warps
    )  # fmt: skip
    return out_D


@torch.library.custom_op("nemo_embed_core::rms_norm_forward", mutates_args=())
def _rms_norm_fwd(
    x_TD: torch.Tensor, weight_D: torch.Tensor, residual_TD: torch.Tensor | None, eps: float, amax: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y [T, D], hidden [T, D] (empty without a residual: no op may return its input), rstd [T] fp32, bits
    of amax"""
    num_tokens, hidden_size = x_TD.shape
    block_d, num_warps = _config(hidden_size)
    x_TD, weight_D = x_TD.contiguous(), weight_D.contiguous()
    y_TD, rstd_T = torch.empty_like(x_TD), x_TD.new_empty(num_tokens, dtype=torch.float32)
    bits = zero_bits(x_TD, amax)
    if residual_TD is None:
        hidden_TD = x_TD.new_empty(0)
    else:
        residual_TD, hidden_TD = residual_TD.contiguous(), torch.empty_like(x_TD)
    if num_tokens:
        _rms_norm_fwd_kernel[(num_tokens,)](
            x_TD, residual_TD if residual_TD is not None else x_TD, weight_D, y_TD, hidden_TD, rstd_T,
            bits if amax else None, eps,
            D=hidden_size, BLOCK_D=block_d, HAS_RESIDUAL=residual_TD is not None, num_warps=num_warps,
        )  # fmt: skip
    return y_TD, hidden_TD, rstd_T, bits


@_rms_norm_fwd.register_fake
def _(x_TD, weight_D, residual_TD, eps, amax):
    hidden_TD = x_TD.new_empty(0) if residual_TD is None else x_TD.new_empty(x_TD.shape)
    rstd_T = x_TD.new_empty(x_TD.shape[0], dtype=torch.float32)
    return x_TD.new_empty(x_TD.shape), hidden_TD, rstd_T, zero_bits(x_TD, amax)


@torch.library.custom_op("nemo_embed_core::rms_norm_backward", mutates_args=())
def _rms_norm_bwd(
    dy_TD: torch.Tensor,
    dhidden_TD: torch.Tensor | None,
    hidden_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> dx [T, D], which is dresidual too, and dweight [D]"""
    num_tokens, hidden_size = hidden_TD.shape
    block_d, num_warps = _config(hidden_size)
    dy_TD, hidden_TD, weight_D = dy_TD.contiguous(), hidden_TD.contiguous(), weight_D.contiguous()
    dhidden_TD = None if dhidden_TD is None else dhidden_TD.contiguous()
    num_programs = min(num_tokens, _BACKWARD_PROGRAMS)
    dx_TD = torch.empty_like(hidden_TD)
    dweight_PD = hidden_TD.new_empty(num_programs, hidden_size, dtype=torch.float32)
    if num_tokens:
        _rms_norm_bwd_kernel[(num_programs,)](
            dy_TD, dhidden_TD if dhidden_TD is not None else dy_TD, hidden_TD, weight_D, rstd_T, dx_TD,
            dweight_PD, num_tokens, D=hidden_size, BLOCK_D=block_d, HAS_DHIDDEN=dhidden_TD is not None,
            # Rows in flight that fit in shared memory in fp32 too.
            STAGES=4 if block_d <= 2048 else 3, num_warps=num_warps,
        )  # fmt: skip
    return dx_TD, _sum_rows(dweight_PD, weight_D.dtype)


@_rms_norm_bwd.register_fake
def _(dy_TD, dhidden_TD, hidden_TD, weight_D, rstd_T):
    return hidden_TD.new_empty(hidden_TD.shape), weight_D.new_empty(weight_D.shape)


def _setup_context(ctx, inputs, output):
    x_TD, weight_D, residual_TD, _, _ = inputs
    _, hidden_TD, rstd_T, _ = output
    ctx.has_residual = residual_TD is not None
    # No zeros for an output that nobody used: the last layer drops hidden.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_TD if ctx.has_residual else x_TD, weight_D, rstd_T)


def _backward(ctx, dy_TD, dhidden_TD, _rstd, _amax):
    hidden_TD, weight_D, rstd_T = ctx.saved_tensors
    if dy_TD is None:
        return dhidden_TD, None, dhidden_TD if ctx.has_residual else None, None, None
    if not ctx.has_residual:
        dhidden_TD = None  # the empty placeholder's gradient, if anybody made one
    dx_TD, dweight_D = _rms_norm_bwd(dy_TD, dhidden_TD, hidden_TD, weight_D, rstd_T)
    return dx_TD, dweight_D, dx_TD if ctx.has_residual else None, None, None


_rms_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def rms_norm_kernel(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float,
    residual_TD: torch.Tensor | None = None, amax: bool = False,
) -> Normed:  # fmt: skip
    y_TD, hidden_TD, _, bits = _rms_norm_fwd(x_TD, weight_D, residual_TD, eps, amax)
    return y_TD, x_TD if residual_TD is None else hidden_TD, bits.view(torch.float32) if amax else None


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float,
    residual_TD: torch.Tensor | None = None, amax: bool = False,
) -> Normed:  # fmt: skip
    """hidden = x + residual; y = F.rms_norm(hidden.float(), (D,), eps=eps).to(hidden.dtype) * weight.

    x, residual [T, D]: bf16, fp16, fp32 (fp64: plain torch).  weight [D].  eps: added to the mean square.
    amax: whether the largest |y| is wanted.
    Returns (y [T, D], hidden [T, D]), both in x's dtype, and fp8.amax(y) or None; without a residual hidden
    is x itself.
    CUDA: Triton, tensors on the current device, D up to 8192; dweight is summed in a fixed order, without
    atomics.
    """
    if x_TD.dim() != 2 or weight_D.shape != x_TD.shape[1:]:
        raise ValueError(
            f"rms_norm wants x [T, D] and weight [D], not {list(x_TD.shape)} and {list(weight_D.shape)}"
        )
    if residual_TD is not None and (residual_TD.shape != x_TD.shape or residual_TD.dtype != x_TD.dtype):
        raise ValueError(
            f"rms_norm: residual {list(residual_TD.shape)} {residual_TD.dtype} is not like x "
            f"{list(x_TD.shape)} {x_TD.dtype}"
        )
    if x_TD.is_cuda and x_TD.dtype != torch.float64:
        return rms_norm_kernel(x_TD, weight_D, eps, residual_TD, amax)
    return rms_norm_ref(x_TD, weight_D, eps, residual_TD, amax)
