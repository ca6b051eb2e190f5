"""fp64 values to another dtype, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

_BELOW_FP32 = (1 << 29) - 1  # the bits of an fp64 significand that fp32 does not have


def round_once(x: Tensor, dtype: torch.dtype, bits: Tensor | None = None, is_normal: bool = False) -> Tensor:
    """fp64 -> dtype, correctly rounded (to nearest, ties to even).

    Casting fp64 to bf16 or fp16 goes through fp32 and rounds twice. Rounding to odd on the way to fp32 keeps
    the second rounding right: fp32 has more than two bits beyond either (Boldo and Melquiond 2008). Odd
    means: cut what fp32 does not have, and set the last bit where anything was cut.  bits: int64 memory of
    x's size to work in.  is_normal: no value but 0 is below fp32's smallest normal number.
    """
    if dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    shape, x = x.shape, x.contiguous().view(-1)
    given = x.view(torch.int64)
    odd = torch.bitwise_and(given, _BELOW_FP32, out=torch.empty_like(given) if bits is None else bits)
    odd.add_(_BELOW_FP32).bitwise_or_(given).bitwise_and_(~_BELOW_FP32)
    y = odd.view(torch.float64).float()  # exact from fp32's smallest normal number upwards
    if is_normal:
        return y.to(dtype).view(shape)
    magnitude = torch.abs(y, out=odd.view(torch.float32)[: y.numel()])
    if y.numel() and float(magnitude.amin()) < torch.finfo(torch.float32).tiny:
        small = (magnitude < torch.finfo(torch.float32).tiny).nonzero()[:, 0]
        y[small] = _subnormal_to_odd(x[small])
    return y.to(dtype).view(shape)


def _subnormal_to_odd(x: Tensor) -> Tensor:
    """Where fp32 is subnormal, its cast rounds: a step back where it went beyond x, then the last bit."""
    rounded = x.float()
    bits = rounded.view(torch.int32)
    truncated = torch.where(rounded.double().abs() > x.abs(), bits - 1, bits)
    return torch.where(rounded.double() == x, bits, truncated | 1).view(torch.float32)
