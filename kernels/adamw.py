"""AdamW whose fp32 master is the bf16 weight and a 16-bit remainder: exact masters in four bytes.

    bits(master) = (bits(weight) << 16) + remainder        remainder int16, -2**15 <= remainder < 2**15
    weight = master rounded to bf16, half away from zero

so the pair is unambiguous. Rounded half to even it would not be: both neighbours of an even weight may round
to it, which makes 2**16 + 1 remainders.

Contract: one kernel reads weight, remainder, exp_avg, exp_avg_sq and the gradient, and writes the first four;
the weight is what the next forward reads, without a cast. Bytes a parameter: 2 + 2 + 4 + 4 read and as many
written, and the gradient, 2 in bf16 or 4 in fp32: 26 or 28. A factor on the device multiplies the gradient
(clipping without a pass of its own); at 0 nothing is written, so that a non-finite step is refused without
asking the host.
"""

# N elements of one parameter

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (weight bf16, remainder int16); every finite or infinite value comes back from join_master."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master, in memory of its own."""
    return (weight.view(torch.int16).int().bitwise_left_shift_(16).add_(remainder)).view(torch.float32)


def adamw_ref(
    weights: Sequence[Tensor],
    remainders: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factor: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """torch's own fused AdamW on the joined masters: the same bits as training with fp32 masters."""
    if float(factor) == 0:
        return
    for weight, remainder, grad, exp_avg, exp_avg_sq in zip(
        weights, remainders, grads, exp_avgs, exp_avg_sqs, strict=True
    ):
        master = join_master(weight, remainder)
        state_step = torch.tensor(float(step), device=master.device)
        torch._fused_adamw_(
            [master], [grad.float() * factor], [exp_avg], [exp_avg_sq], [], [state_step],
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False,
            maximize=False,
        )  # fmt: skip
        for half, value in zip((weight, remainder), split_master(master), strict=True):
            half.copy_(value)


_CONFIG = (1024, 4)  # BLOCK, num_warps: 8 elements a thread are 16 bytes of each half and 32 of each moment


@triton.jit
def _adamw_kernel(
    weight_ptr, remainder_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, factor_ptr, N,
    keep, beta1, beta1_rest, beta2, beta2_rest, step_size, bias_correction2_sqrt, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements. weight_ptr: the bits of the bf16 weights, as int16."""
    factor = tl.load(factor_ptr)
    if factor != 0.0:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < N
        high = tl.load(weight_ptr + offs, mask=mask, other=0).to(tl.int32)
        low = tl.load(remainder_ptr + offs, mask=mask, other=0).to(tl.int32)
        master = ((high << 16) + low).to(tl.float32, bitcast=True)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor
        exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0)
        # torch's order of operations, ATen/native/cuda/fused_adam_utils.cuh; keep is 1 - lr * weight_decay.
        master *= keep
        exp_avg = beta1 * exp_avg + beta1_rest * grad
        exp_avg_sq = beta2 * exp_avg_sq + beta2_rest * grad * grad
        denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), bias_correction2_sqrt) + eps
        master -= tl.div_rn(step_size * exp_avg, denominator)
        bits = master.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(weight_ptr + offs, high.to(tl.int16), mask=mask)
        tl.store(remainder_ptr + offs, (bits - (high << 16)).to(tl.int16), mask=mask)
        tl.store(exp_avg_ptr + offs, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=mask)


@torch.library.custom_op(
    "nemo_embed_core::adamw", mutates_args=("weights", "remainders", "exp_avgs", "exp_avg_sqs")
)
def adamw_kernel(
    weights: Sequence[Tensor], remainders: Sequence[Tensor], grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], factor: Tensor, step: int, lr: float,
    beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    scalars = (
        1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
        lr / (1 - beta1**step), math.sqrt(1 - beta2**step), eps,
    )  # fmt: skip
    block, num_warps = _CONFIG
    for weight, remainder, grad, exp_avg, exp_avg_sq in zip(
        weights, remainders, grads, exp_avgs, exp_avg_sqs, strict=True
    ):
        if size := weight.numel():
            _adamw_kernel[(triton.cdiv(size, block),)](
                weight.view(torch.int16), remainder, grad.contiguous(), exp_avg, exp_avg_sq, factor, size,
                *scalars, BLOCK=block, num_warps=num_warps,
            )  # fmt: skip


@adamw_kernel.register_fake
def _(*arguments, **options):
    return None


def adamw(
    weights: Sequence[Tensor],
    remainders: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    factor: Tensor,
    **options: float,
) -> None:
    """torch.optim.AdamW(fused=True).step() on join_master(weight, remainder) with factor * grad, in place.

    Of each parameter in one shape: weight bf16, remainder int16, grad bf16 or fp32, exp_avg and exp_avg_sq
    fp32, all contiguous but grad.  factor: fp32 scalar on their device; 0 leaves everything as it is.  step:
    1, 2, ..., of this update; lr, beta1, beta2, eps, weight_decay: as torch's.  CUDA: Triton.
    """
    for weight, remainder, grad, *moments in zip(
        weights, remainders, grads, exp_avgs, exp_avg_sqs, strict=True
    ):
        dtypes = (weight.dtype, remainder.dtype, *(m.dtype for m in moments))
        if dtypes != (torch.bfloat16, torch.int16, torch.float32, torch.float32):
            raise ValueError(
                "adamw wants weights, remainders, exp_avgs, exp_avg_sqs in bf16, int16, fp32, fp32, not "
                f"{dtypes}"
            )
        if any(x.shape != weight.shape for x in (remainder, grad, *moments)):
            raise ValueError(
                f"adamw wants one shape, not {[tuple(x.shape) for x in (weight, remainder, grad, *moments)]}"
            )
        if not all(x.is_contiguous() for x in (weight, remainder, *moments)):
            raise ValueError("adamw writes in place and wants contiguous weights, remainders and moments")
    function = adamw_kernel if factor.is_cuda else adamw_ref
    function(weights, remainders, grads, exp_avgs, exp_avg_sqs, factor, **options)  # type: ignore[arg-type]
