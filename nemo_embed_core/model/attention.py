"""Non-causal attention over packed sequences: four backends behind one signature.

    softmax(q k^T / sqrt(A)) v within each sequence, every token sees every token

T packed tokens · N sequences · H query heads · G KV heads · A head_dim
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_embed_core.errors import UserError


@dataclass(frozen=True)
class Segments:
    """Where sequences begin and end. `lengths` is the host's copy: reading cu_seqlens would synchronise."""

    cu_seqlens: Tensor  # [N+1] int32, on the tokens' device
    lengths: Sequence[int]  # [N]
    max_seqlen: int


def reference_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments) -> Tensor:
    """Plain and obvious: one [H, n, n] score matrix per sequence, softmax in fp32 (fp64 for fp64)."""
    r = q_THA.shape[1] // k_TGA.shape[1]
    k_THA, v_THA = k_TGA.repeat_interleave(r, 1), v_TGA.repeat_interleave(r, 1)
    out = []
    for q, k, v in zip(*(x.split(list(segments.lengths)) for x in (q_THA, k_THA, v_THA)), strict=True):
        scores = torch.einsum("qha,kha->hqk", q, k) * q.shape[-1] ** -0.5
        p = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(v.dtype)
        out.append(torch.einsum("hqk,kha->qha", p, v))
    return torch.cat(out)


def sdpa_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments) -> Tensor:
    """One F.scaled_dot_product_attention call per run of equally long neighbours: no padding and no mask.

    Packing sorts a micro-batch by length, so there are at most as many calls as distinct lengths; any order
    is right. On a CPU bf16 is computed in fp32: its kernel keeps some 4 MB for every length for good, and
    below 256 tokens it is slower.
    """
    if q_THA.device.type == "cpu" and q_THA.dtype in (torch.bfloat16, torch.float16):
        return sdpa_attention(q_THA.float(), k_TGA.float(), v_TGA.float(), segments).to(q_THA.dtype)
    r = q_THA.shape[1] // k_TGA.shape[1]
    if r > 1:  # enable_gqa takes the slow path on CPU
        k_TGA, v_TGA = k_TGA.repeat_interleave(r, 1), v_TGA.repeat_interleave(r, 1)
    runs = [(n, len(list(run))) for n, run in groupby(segments.lengths)]
    # split, not slices: its backward is one cat, while every slice's backward fills a zeroed copy of the
    # whole tensor.
    parts = zip(*(x.split([n * count for n, count in runs]) for x in (q_THA, k_TGA, v_TGA)), strict=True)
    out = []
    for (n, count), qkv in zip(runs, parts, strict=True):
        q, k, v = (x.view(count, n, *x.shape[1:]).transpose(1, 2) for x in qkv)
        out.append(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count * n, *q_THA.shape[1:])
        )
    return torch.cat(out)


def varlen_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments) -> Tensor:
    """torch.nn.attention.varlen (FlashAttention-2 inside torch >= 2.11, CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 has no such argument and hands the heads to FlashAttention, which divides them into groups.
    gqa: dict[str, Any] = {}
    if q_THA.shape[1] != k_TGA.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        gqa = {"enable_gqa": True}
    cu, n = segments.cu_seqlens, segments.max_seqlen
    out = varlen_attn(q_THA, k_TGA, v_TGA, cu, cu, n, n, **gqa)
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out


@cache
def _flash_attn_varlen_func() -> Callable[..., Tensor]:
    """FlashAttention-3 (flash_attn_interface), else FlashAttention-2 (flash_attn)."""
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    return flash_attn_varlen_func


def flash_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments) -> Tensor:
    """flash_attn_varlen_func(..., causal=False) of the flash-attn package."""
    cu, n = segments.cu_seqlens, segments.max_seqlen
    out = _flash_attn_varlen_func()(q_THA, k_TGA, v_TGA, cu, cu, n, n, causal=False)
    return out[0] if isinstance(out, tuple) else out  # FlashAttention-3 betas also return the log-sum-exp


Attention = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
_BACKENDS: dict[str, Attention] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "varlen": varlen_attention,
    "flash": flash_attention,
}


def pick_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The backend called `name`; "auto" is the first of flash, varlen, sdpa that runs here in this dtype."""
    fused = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    flash = any(importlib.util.find_spec(m) for m in ("flash_attn_interface", "flash_attn"))
    varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if name == "auto":
        name = "flash" if fused and flash else "varlen" if fused and varlen else "sdpa"
    if name in ("flash", "varlen") and not fused:
        raise UserError(
            f"attention={name} needs a CUDA device and bf16, not {device.type} and {dtype}; use "
            "attention=auto or sdpa"
        )
    if name == "flash" and not flash:
        raise UserError(
            "attention=flash, but the flash-attn package is not installed; install it or use attention=varlen"
        )
    if name == "varlen" and not varlen:
        raise UserError(f"attention=varlen needs torch >= 2.11, not {torch.__version__}; use attention=sdpa")
    return _BACKENDS[name]
