"""Attention over packed sequences: six backends behind one signature.

    softmax(q k^T / sqrt(A)) v within each sequence, every token sees every token; causal: those up to its own

T packed tokens · N sequences · H query heads · G KV heads · A head_dim
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def reference_attention(
    q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments, causal: bool = False
) -> Tensor:
    """Plain and obvious: one [H, n, n] score matrix per sequence, softmax in fp32 (fp64 for fp64)."""
    r = q_THA.shape[1] // k_TGA.shape[1]
    k_THA, v_THA = k_TGA.repeat_interleave(r, 1), v_TGA.repeat_interleave(r, 1)
    out = []
    for q, k, v in zip(*(x.split(list(segments.lengths)) for x in (q_THA, k_THA, v_THA)), strict=True):
        scores = torch.einsum("qha,kha->hqk", q, k) * q.shape[-1] ** -0.5
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        p = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(v.dtype)
        out.append(torch.einsum("hqk,kha->qha", p, v))
    return torch.cat(out)


def sdpa_attention(
    q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments, causal: bool = False
) -> Tensor:
    """One F.scaled_dot_product_attention call per run of equally long neighbours: no padding and no mask.

    Packing sorts a micro-batch by length, so there are at most as many calls as distinct lengths; any order
    is right. On a CPU bf16 is computed in fp32: its kernel keeps some 4 MB for every length for good, and
    below 256 tokens it is slower.
    """
    if q_THA.device.type == "cpu" and q_THA.dtype in (torch.bfloat16, torch.float16):
        wide = (q_THA.float(), k_TGA.float(), v_TGA.float())
        return sdpa_attention(*wide, segments, causal).to(q_THA.dtype)
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
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out.append(o.transpose(1, 2).reshape(count * n, *q_THA.shape[1:]))
    return torch.cat(out)


def varlen_attention(
    q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments, causal: bool = False
) -> Tensor:
    """torch.nn.attention.varlen (FlashAttention-2 inside torch >= 2.11, CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 has no such argument and hands the heads to FlashAttention, which divides them into groups.
    options: dict[str, Any] = {}
    if q_THA.shape[1] != k_TGA.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options = {"enable_gqa": True}
    if causal:
        options["window_size"] = (-1, 0)
    cu, n = segments.cu_seqlens, segments.max_seqlen
    out = varlen_attn(q_THA, k_TGA, v_TGA, cu, cu, n, n, **options)
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out


def varlen3_attention(
    q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments, causal: bool = False
) -> Tensor:
    """varlen_attention with FlashAttention-3 inside, which torch takes from flash_attn_interface: for the
    whole process, whose F.scaled_dot_product_attention it changes too."""
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

    if current_flash_attention_impl() != "FA3":
        activate_flash_attention_impl("FA3")
    return varlen_attention(q_THA, k_TGA, v_TGA, segments, causal)


def _flash_attn(
    module: str, q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments, causal: bool
) -> Tensor:
    cu, n = segments.cu_seqlens, segments.max_seqlen
    out = importlib.import_module(module).flash_attn_varlen_func(
        q_THA, k_TGA, v_TGA, cu, cu, n, n,
        causal=causal, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out  # FlashAttention-3 betas also return the log-sum-exp


def flash_attention(
    q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments, causal: bool = False
) -> Tensor:
    """FlashAttention-2: flash_attn_varlen_func(...) of the flash-attn package."""
    return _flash_attn("flash_attn", q_THA, k_TGA, v_TGA, segments, causal)


def flash3_attention(
    q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, segments: Segments, causal: bool = False
) -> Tensor:
    """FlashAttention-3: flash_attn_varlen_func(...) of the module flash_attn_interface."""
    return _flash_attn("flash_attn_interface", q_THA, k_TGA, v_TGA, segments, causal)


Attention = Callable[..., Tensor]  # of q, k, v, segments and causal=False
# In the order in which "auto" looks for one that runs.
_BACKENDS: dict[str, Attention] = {
    "flash3": flash3_attention,
    "flash": flash_attention,
    "varlen3": varlen3_attention,
    "varlen": varlen_attention,
    "sdpa": sdpa_attention,
    "reference": reference_attention,
}
_MODULES = {"flash3": "flash_attn_interface", "flash": "flash_attn", "varlen3": "flash_attn_interface"}


def why_not(name: str, device: torch.device, dtype: torch.dtype, backward: bool = True) -> str:
    """What this backend lacks to run on the device in the dtype, with gradients or without; empty where it
    runs."""
    if name in ("sdpa", "reference"):
        return ""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"needs a CUDA device and bf16, not {device.type} and {dtype}"
    if name in ("flash3", "varlen3") and (found := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"needs a GPU of compute capability 9.0 (Hopper), not {found[0]}.{found[1]}"
    if name.startswith("varlen") and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"needs torch >= 2.11, not {torch.__version__}"
    if name == "varlen3" and not _torch_has_flash3():
        return f"needs a torch with FlashAttention-3 forward and backward, not {torch.__version__}"
    if name in _MODULES:
        try:
            importlib.import_module(_MODULES[name])
        except (ImportError, OSError) as error:
            return f"needs the module {_MODULES[name]} ({error}); docs/training.md says where it comes from"
    if name in ("flash3", "varlen3") and backward and not _flash3_has_backward():
        return "needs a flash_attn_interface that was built with its backward (docs/training.md)"
    return ""


def _flash3_has_backward() -> bool:
    """By what its build wrote down; a build that wrote nothing is taken to have one."""
    if importlib.util.find_spec("flash_attn_config") is None:
        return True
    flags = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    return not flags.get("FLASHATTENTION_DISABLE_BACKWARD", False)


def _torch_has_flash3() -> bool:
    """Not by version: an earlier torch.nn.attention._fa3 had the forward alone, and its gradients would be
    those of FlashAttention-2."""
    if importlib.util.find_spec("torch.nn.attention._fa3") is None:
        return False
    from torch.nn import attention
    from torch.nn.attention import _fa3

    forward = hasattr(attention, "activate_flash_attention_impl")
    return forward and hasattr(_fa3, "_fa3_flash_attention_backward_impl")


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, backward: bool = True) -> str:
    """`name`, or for "auto" the first of flash3, flash, varlen, sdpa that runs here in this dtype."""
    if name == "auto":
        return next(known for known in _BACKENDS if not why_not(known, device, dtype, backward))
    if lacks := why_not(name, device, dtype, backward):
        raise UserError(f"attention={name} {lacks}; use attention=auto or sdpa")
    return name


def pick_attention(name: str, device: torch.device, dtype: torch.dtype, backward: bool = True) -> Attention:
    return _BACKENDS[choose_attention(name, device, dtype, backward)]


def backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Every backend that is meant for use, the first choice first, and what it lacks here."""
    return {name: why_not(name, device, dtype) for name in _BACKENDS if name != "reference"}
