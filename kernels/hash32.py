"""The finaliser of MurmurHash3 (Appleby, public domain): a bijection of 32-bit words whose every output bit
depends on every input bit. Random bits by counters."""

from __future__ import annotations

from typing import TypeVar

import triton
import triton.language as tl
from torch import Tensor

Word = TypeVar("Word", int, Tensor)


def mixed(x: Word) -> Word:
    """Of an integer of 32 bits, or of an int64 tensor of such: their products wrap and keep the low bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit
def mix(x):
    """`mixed` of uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)
