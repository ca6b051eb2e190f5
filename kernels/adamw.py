"""AdamW whose fp32 master is the bf16 weight and a 16-bit remainder: exact masters in four bytes.

    bits(master) = (bits(weight) << 16) + remainder        remainder int16, -2**15 <= remainder < 2**15
    weight = master rounded to bf16, half away from zero

so the pair is unambiguous. Rounded half to even it would not be: both neighbours of an even weight may round
to it, which makes 2**16 + 1 remainders.

Moments are fp32, or bf16, or codes of 8 bits with a 16-bit base for each block of a row's elements:

    |moment| = the float whose bits are (|code| + base) << 20, 0 where the code is 0
    base = the block's largest bits >> 20, less 127 (exp_avg, int8) or 255 (exp_avg_sq, uint8)

so that a factor of two has 8 levels, as in fp8 e4m3, and the smallest is 2**-15.75 or 2**-31.75 of the
largest; of exp_avg_sq only 0 becomes 0, as its root divides. The largest has the code 127 or 255: so the
values alone give the same codes and bases again.

By beta2 = 0.999 a step moves exp_avg_sq by less than half of what separates two bf16: rounded to nearest it
would stand still. So moments are rounded up as often as they are near the value above, right in the mean:

    stored = bits(moment) + random >> dropped     0 <= random < 2**dropped, dropped 16 of bf16, 20 of codes
    random of exp_avg = mix(index ^ key), of exp_avg_sq = mix(that + 0x9E3779B9), mix: hash32.py

index: of the element in the whole parameter, wherever that is cut. key: of (seed, step, parameter). So they
are the same in every layout and after a resume.

Contract: one kernel reads weight, remainder, exp_avg, exp_avg_sq and the gradient, and writes the first four;
the weight is what the next forward reads, without a cast. Bytes a parameter: 2 + 2 and the moments (4 + 4,
2 + 2, 1 + 1 and bases) read and as many written, and the gradient, 2 in bf16 or 4 in fp32: 26 or 28, 18 or
20, 14 or 16. A factor on the device multiplies the gradient (clipping without a pass of its own); at 0
nothing is written, so that a non-finite step is refused without asking the host.
"""

# N elements of one parameter

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_embed_core.kernels.hash32 import mix, mixed


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (weight bf16, remainder int16); every finite or infinite value comes back from join_master."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master, in memory of its own."""
    return (weight.view(torch.int16).int().bitwise_left_shift_(16).add_(remainder)).view(torch.float32)


# ------------------------------------------------------------------------------------------ moments

_BITS = {
    (torch.float32, torch.float32): 32, (torch.bfloat16, torch.bfloat16): 16, (torch.int8, torch.uint8): 8
}  # fmt: skip  # of exp_avg and exp_avg_sq
_TOP = {torch.int8: 127, torch.uint8: 255}  # the largest codes
_LEAST_BASE = tl.constexpr(296)  # of 2**-90: no subnormal number is met


def to_fp32(kept: Tensor, rest: Tensor | None = None) -> Tensor:
    """The values of a bf16 weight and its remainder, of codes [..., C] and their bases [..., C / block], of a
    bf16 moment; anything else is its own value."""
    if kept.dtype in _TOP:
        assert rest is not None
        codes = kept.unflatten(-1, (rest.shape[-1], -1)).int()
        sizes = (codes.abs() + rest[..., None] << 20).view(torch.float32)
        return (codes.sign() * sizes).flatten(-2)
    if rest is not None:
        return join_master(kept, rest)
    return kept.float() if kept.dtype == torch.bfloat16 else kept


def from_fp32_(
    values: Tensor, kept: Tensor, rest: Tensor | None = None, random: Tensor | None = None
) -> None:
    """Into what to_fp32 reads, in place. Masters are exact; moments are rounded to nearest, or by 32 random
    bits of each element (int64)."""
    if kept.dtype in _TOP:
        assert rest is not None
        sizes, top = values.abs(), _TOP[kept.dtype]
        bits = 1 << 31 if random is None else random  # to nearest: up from half way on
        high = (sizes.view(torch.int32) + (bits >> 12)) >> 20
        high = high.unflatten(-1, (rest.shape[-1], -1))
        rest.copy_((high.amax(-1) - top).clamp(min=_LEAST_BASE.value))
        codes = (high - rest[..., None]).flatten(-2)
        if top == 255:
            codes = torch.where(sizes > 0, codes.clamp(min=1), 0)
        else:
            least = (rest.int() + 1 << 20).view(torch.float32)[..., None].expand(high.shape).flatten(-2)
            is_up = (bits >> 8) * 2.0**-24 * least < sizes
            codes = torch.where(sizes < least, is_up, codes) * values.sign()
        kept.copy_(codes)
    elif rest is not None:
        for half, value in zip((kept, rest), split_master(values), strict=True):
            half.copy_(value)
    elif random is not None:
        kept.copy_(((values.view(torch.int32) + (random >> 16)) >> 16).to(torch.int16).view(torch.bfloat16))
    else:
        kept.copy_(values)


def random_bits(key: int, first: int, columns: int, shape: torch.Size, device: torch.device) -> list[Tensor]:
    """32 of each element for exp_avg and for exp_avg_sq, int64 in `shape`."""
    local = torch.arange(shape.numel(), device=device).view(shape)
    index = first + local + local // max(1, shape[-1]) * (columns - shape[-1])
    bits = mixed((index ^ key) & 0xFFFFFFFF)
    return [bits, mixed((bits + 0x9E3779B9) & 0xFFFFFFFF)]


def adamw_ref(
    weights: Sequence[Tensor], remainders: Sequence[Tensor], grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], factor: Tensor, bases: Sequence[Tensor],
    places: Sequence[int], step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """torch's own fused AdamW on the joined masters: the same bits as training with fp32 masters. Then what
    is not fp32 is rounded."""
    if float(factor) == 0:
        return
    for i, (weight, remainder, grad, *moments) in enumerate(
        zip(weights, remainders, grads, exp_avgs, exp_avg_sqs, strict=True)
    ):
        master = join_master(weight, remainder)
        rests = bases[2 * i : 2 * i + 2] or (None, None)
        values = [to_fp32(m, rest) for m, rest in zip(moments, rests, strict=True)]
        state_step = torch.tensor(float(step), device=master.device)
        torch._fused_adamw_(
            [master], [grad.float() * factor], [values[0]], [values[1]], [], [state_step],
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False,
            maximize=False,
        )  # fmt: skip
        from_fp32_(master, weight, remainder)
        if moments[0].dtype != torch.float32:
            key, first, columns = places[3 * i : 3 * i + 3]
            random = random_bits(key, first, columns, weight.shape, weight.device)
            for value, moment, rest, bits in zip(values, moments, rests, random, strict=True):
                from_fp32_(value, moment, rest, bits)


_CONFIG = (1024, 4)  # BLOCK, num_warps: 8 elements a thread are 16 bytes of each half and 32 of each moment


@triton.jit
def _load_moment(ptr, base_ptr, offs, mask, block, block_mask, BITS: tl.constexpr, TOP: tl.constexpr):
    """fp32. ptr: of BITS 16 the bits as int16."""
    if BITS == 32:
        return tl.load(ptr + offs, mask=mask, other=0.0)
    stored = tl.load(ptr + offs, mask=mask, other=0).to(tl.int32)
    if BITS == 16:
        return (stored << 16).to(tl.float32, bitcast=True)
    base = tl.load(base_ptr + block, mask=block_mask, other=0).to(tl.int32)
    size = ((tl.abs(stored) + base) << 20).to(tl.float32, bitcast=True)
    return tl.where(stored > 0, size, tl.where(stored < 0, -size, 0.0))


@triton.jit
def _store_moment(
    ptr, base_ptr, offs, mask, block, block_mask, values, random, BITS: tl.constexpr, TOP: tl.constexpr
):  # fmt: skip
    if BITS == 32:
        tl.store(ptr + offs, values, mask=mask)
    elif BITS == 16:
        bits = values.to(tl.int32, bitcast=True) + (random >> 16).to(tl.int32)
        tl.store(ptr + offs, (bits >> 16).to(tl.int16), mask=mask)
    else:
        sizes = tl.where(mask, tl.abs(values), 0.0)
        high = (sizes.to(tl.int32, bitcast=True) + (random >> 12).to(tl.int32)) >> 20
        base = tl.maximum(tl.max(high, axis=1, keep_dims=True) - TOP, _LEAST_BASE)
        codes = high - base
        if TOP == 255:
            codes = tl.where(sizes > 0, tl.maximum(codes, 1), 0)
        else:
            least = ((base + 1) << 20).to(tl.float32, bitcast=True)
            is_up = (random >> 8).to(tl.float32) * 2.0**-24 * least < sizes
            codes = tl.where(sizes < least, is_up.to(tl.int32), codes)
            codes = tl.where(values < 0, -codes, codes)
        tl.store(ptr + offs, codes.to(ptr.dtype.element_ty), mask=mask)
        tl.store(base_ptr + block, base.to(tl.int16), mask=block_mask)


@triton.jit(do_not_specialize=["key", "first"])
def _adamw_kernel(
    weight_ptr, remainder_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, avg_base_ptr, sq_base_ptr, factor_ptr,
    N, key, first, columns, gap,
    keep, beta1, beta1_rest, beta2, beta2_rest, step_size, bias_correction2_sqrt, eps,
    BITS: tl.constexpr, IS_CUT: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: BLOCKS times SIZE elements, each in WIDTH lanes; of BITS 8 those with one base.
    weight_ptr: the bits of the bf16 weights, as int16. IS_CUT: the whole's rows have `gap` more columns."""
    factor = tl.load(factor_ptr)
    if factor != 0.0:
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
        lane = tl.arange(0, WIDTH)[None, :]
        offs, block_mask = block * SIZE + lane, block * SIZE < N
        mask = offs < N
        if SIZE != WIDTH:
            mask = mask & (lane < SIZE)
        high = tl.load(weight_ptr + offs, mask=mask, other=0).to(tl.int32)
        low = tl.load(remainder_ptr + offs, mask=mask, other=0).to(tl.int32)
        master = ((high << 16) + low).to(tl.float32, bitcast=True)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor
        exp_avg = _load_moment(exp_avg_ptr, avg_base_ptr, offs, mask, block, block_mask, BITS, 127)
        exp_avg_sq = _load_moment(exp_avg_sq_ptr, sq_base_ptr, offs, mask, block, block_mask, BITS, 255)
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
        index = offs.to(tl.int32)
        if IS_CUT:
            index += index // columns * gap
        random = mix((index + first).to(tl.uint32) ^ key.to(tl.uint32))
        _store_moment(
            exp_avg_ptr, avg_base_ptr, offs, mask, block, block_mask, exp_avg, random, BITS, 127
        )  # fmt: skip
        random = mix(random + tl.full((), 0x9E3779B9, tl.uint32))
        _store_moment(
            exp_avg_sq_ptr, sq_base_ptr, offs, mask, block, block_mask, exp_avg_sq, random, BITS, 255
        )  # fmt: skip


@torch.library.custom_op(
    "nemo_embed_core::adamw", mutates_args=("weights", "remainders", "exp_avgs", "exp_avg_sqs", "bases")
)
def adamw_kernel(
    weights: Sequence[Tensor], remainders: Sequence[Tensor], grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], factor: Tensor, bases: Sequence[Tensor],
    places: Sequence[int], step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    scalars = (
        1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
        lr / (1 - beta1**step), math.sqrt(1 - beta2**step), eps,
    )  # fmt: skip
    block, num_warps = _CONFIG
    for i, (weight, remainder, grad, *moments) in enumerate(
        zip(weights, remainders, grads, exp_avgs, exp_avg_sqs, strict=True)
    ):
        if not (count := weight.numel()):
            continue
        bits = _BITS[moments[0].dtype, moments[1].dtype]
        key, first, columns = places[3 * i : 3 * i + 3] or (0, 0, weight.shape[-1])
        if bits == 16:
            moments = [m.view(torch.int16) for m in moments]
        rests = bases[2 * i : 2 * i + 2] or moments
        size = count // rests[0].numel() if bits == 8 else block
        width = triton.next_power_of_2(size)
        blocks = max(1, block // width)
        _adamw_kernel[(triton.cdiv(count, blocks * size),)](
            weight.view(torch.int16), remainder, grad.contiguous(), *moments, *rests, factor, count, key,
            first, weight.shape[-1], columns - weight.shape[-1], *scalars, BITS=bits,
            IS_CUT=columns != weight.shape[-1], BLOCKS=blocks, SIZE=size, WIDTH=width, num_warps=num_warps,
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
    bases: Sequence[Tensor] = (),
    places: Sequence[int] = (),
    **options: float,
) -> None:
    """torch.optim.AdamW(fused=True).step() on join_master(weight, remainder) with factor * grad, in place.

    Of each parameter in one shape: weight bf16, remainder int16, grad bf16 or fp32, exp_avg and exp_avg_sq
    fp32, bf16, or int8 and uint8, all contiguous but grad.  factor: fp32 scalar on their device; 0 leaves
    everything as it is.  step: 1, 2, ..., of this update; lr, beta1, beta2, eps, weight_decay: as torch's.
    CUDA: Triton.

    Where moments are not fp32, places: three numbers of each parameter. The key of its random bits in this
    step, 0 <= key < 2**31; the index, in the whole parameter, of its first element here; the columns of the
    whole.  Where they are codes, bases: of each exp_avg and exp_avg_sq in turn, int16 [..., C / block].
    """
    for weight, remainder, grad, *moments in zip(
        weights, remainders, grads, exp_avgs, exp_avg_sqs, strict=True
    ):
        dtypes = (weight.dtype, remainder.dtype, *(m.dtype for m in moments))
        if dtypes[:2] != (torch.bfloat16, torch.int16) or dtypes[2:] not in _BITS:
            raise ValueError(
                "adamw wants weights and remainders in bf16 and int16, exp_avgs and exp_avg_sqs in fp32, "
                f"bf16, or int8 and uint8, not {dtypes}"
            )
        if any(x.shape != weight.shape for x in (remainder, grad, *moments)):
            raise ValueError(
                f"adamw wants one shape, not {[tuple(x.shape) for x in (weight, remainder, grad, *moments)]}"
            )
        if not all(x.is_contiguous() for x in (weight, remainder, *moments)):
            raise ValueError("adamw writes in place and wants contiguous weights, remainders and moments")
    bits = {_BITS[m.dtype, v.dtype] for m, v in zip(exp_avgs, exp_avg_sqs, strict=True)}
    wanted = (3 * len(weights) if bits & {8, 16} else 0, 2 * len(weights) if 8 in bits else 0)
    if len(bits) > 1 or (len(places), len(bases)) != wanted:
        raise ValueError(
            "adamw wants moments of one kind, three places of each that is not fp32 and two bases of codes, "
            f"not {len(places)} places and {len(bases)} bases of {len(weights)} parameters in {bits} bits"
        )
    for weight, base in zip((w for w in weights for _ in range(2)), bases, strict=False):
        if base.shape[:-1] != weight.shape[:-1] or weight.shape[-1] % base.shape[-1]:
            raise ValueError(f"adamw wants whole blocks, not {base.shape} bases of {weight.shape}")
    function = adamw_kernel if factor.is_cuda else adamw_ref
    function(weights, remainders, grads, exp_avgs, exp_avg_sqs, factor, bases, places, **options)  # type: ignore[arg-type]
