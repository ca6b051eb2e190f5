"""RoPE on the fused qkv output, taken apart into q, k and v in the same pass.

Contract: the qkv columns are one block per KV group g, [q heads of g | k_g | v_g], each head head_dim wide.
Attention wants q, k and v dense, so the blocks must be copied apart anyway: the rotation rides on that copy
for free (one read, one write), where an in-place RoPE would be a second read and write. Rotate-half
convention (Hugging Face Llama), math in fp32.
"""

# T packed tokens · E = (H + 2 G) A qkv columns · H query heads · G KV heads · A head_dim · R = A / 2

from __future__ import annotations

import torch
import triton
import triton.language as tl


def split_rope_ref(qkv_TE, cos_TR, sin_TR, num_heads, num_kv_heads, head_dim):
    num_tokens, per_group = qkv_TE.shape[0], num_heads // num_kv_heads
    blocks = qkv_TE.view(num_tokens, num_kv_heads, per_group + 2, head_dim)
    qk, v_TGA = blocks.split([per_group + 1, 1], dim=2)
    qk = qk.float() if qk.dtype in (torch.bfloat16, torch.float16) else qk
    first, second = qk.chunk(2, dim=-1)
    cos_TA = torch.cat([cos_TR, cos_TR], -1).to(qk.dtype)[:, None, None]
    sin_TA = torch.cat([-sin_TR, sin_TR], -1).to(qk.dtype)[:, None, None]
    qk = (qk * cos_TA + torch.cat([second, first], -1) * sin_TA).to(qkv_TE.dtype)
    q_THA, k_TGA = qk.split([per_group, 1], dim=2)
    return (
        q_THA.reshape(num_tokens, num_heads, head_dim),
        k_TGA.squeeze(2).contiguous(),  # reshape would give a view of the blocks
        v_TGA.squeeze(2).contiguous(),
    )


# Of a program; with a warp for every 16 pairs of a head, the fastest on an H200 for heads of 64 and 128.
_TOKENS = 8


@triton.jit
def _move_head(src_ptrs, dst_ptrs, cos, sin, mask, R: tl.constexpr, ROTATE: tl.constexpr):
    """One head, 2 R elements of every token, from src to dst; the pointers are of the first halves, [BLOCK_T,
    BLOCK_R]."""
    first = tl.load(src_ptrs, mask=mask, other=0.0)
    second = tl.load(src_ptrs + R, mask=mask, other=0.0)
    if ROTATE:
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        first = (wide_first * cos - wide_second * sin).to(dst_ptrs.dtype.element_ty)
        second = (wide_second * cos + wide_first * sin).to(dst_ptrs.dtype.element_ty)
    tl.store(dst_ptrs, first, mask=mask)
    tl.store(dst_ptrs + R, second, mask=mask)


@triton.jit
def _split_rope_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, T,
    G: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of one KV group (HEADS query heads, one k, one v), whose tables it reads
    once.

    BACKWARD moves the other way, q/k/v gradients into the qkv gradient, rotating by the opposite angle.
    """
    # Groups first: programs that run at one time cover whole rows, which DRAM gives faster than strips of
    # them.
    group = tl.program_id(0) % G
    t = (tl.program_id(0) // G * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    mask = (t < T) & (offs_r < R)
    cos = tl.load(cos_ptr + t * R + offs_r, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * R + offs_r, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        sin = -sin
    qkv_ptrs = qkv_ptr + (t * G + group) * ((HEADS + 2) * 2 * R) + offs_r
    q_ptrs = q_ptr + (t * G + group) * (HEADS * 2 * R) + offs_r
    k_offs = (t * G + group) * (2 * R) + offs_r
    for head in tl.static_range(HEADS):
        at = head * 2 * R
        if BACKWARD:
            _move_head(q_ptrs + at, qkv_ptrs + at, cos, sin, mask, R, True)
        else:
            _move_head(qkv_ptrs + at, q_ptrs + at, cos, sin, mask, R, True)
    qkv_ptrs += HEADS * 2 * R
    if BACKWARD:
        _move_head(k_ptr + k_offs, qkv_ptrs, cos, sin, mask, R, True)
        _move_head(v_ptr + k_offs, qkv_ptrs + 2 * R, cos, sin, mask, R, False)
    else:
        _move_head(qkv_ptrs, k_ptr + k_offs, cos, sin, mask, R, True)
        _move_head(qkv_ptrs + 2 * R, v_ptr + k_offs, cos, sin, mask, R, False)


def _launch(qkv_TE, q_THA, k_TGA, v_TGA, cos_TR, sin_TR, backward: bool) -> None:
    num_tokens, num_heads, head_dim = q_THA.shape
    num_kv_heads = k_TGA.shape[1]
    if num_tokens:
        _split_rope_kernel[(triton.cdiv(num_tokens, _TOKENS) * num_kv_heads,)](
            qkv_TE, q_THA, k_TGA, v_TGA, cos_TR.contiguous(), sin_TR.contiguous(), num_tokens,
            G=num_kv_heads, HEADS=num_heads // num_kv_heads, R=head_dim // 2,
            BLOCK_T=_TOKENS, BLOCK_R=triton.next_power_of_2(head_dim // 2), BACKWARD=backward,
            num_warps=max(1, triton.next_power_of_2(head_dim // 2) // 16),
        )  # fmt: skip


@torch.library.custom_op("nemo_embed_core::split_rope_forward", mutates_args=())
def split_rope_kernel(
    qkv_TE: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q_THA, k_TGA, v_TGA = _empty(qkv_TE, cos_TR, sin_TR, num_heads, num_kv_heads, head_dim)
    _launch(qkv_TE.contiguous(), q_THA, k_TGA, v_TGA, cos_TR, sin_TR, backward=False)
    return q_THA, k_TGA, v_TGA


@split_rope_kernel.register_fake
def _empty(qkv_TE, cos_TR, sin_TR, num_heads, num_kv_heads, head_dim):
    q_THA = qkv_TE.new_empty(qkv_TE.shape[0], num_heads, head_dim)
    k_TGA = qkv_TE.new_empty(qkv_TE.shape[0], num_kv_heads, head_dim)
    return q_THA, k_TGA, torch.empty_like(k_TGA)


@torch.library.custom_op("nemo_embed_core::split_rope_backward", mutates_args=())
def _split_rope_bwd(
    dq_THA: torch.Tensor,
    dk_TGA: torch.Tensor,
    dv_TGA: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
) -> torch.Tensor:
    dqkv_TE = _empty_qkv(dq_THA, dk_TGA, dv_TGA, cos_TR, sin_TR)
    dq_THA, dk_TGA, dv_TGA = dq_THA.contiguous(), dk_TGA.contiguous(), dv_TGA.contiguous()
    _launch(dqkv_TE, dq_THA, dk_TGA, dv_TGA, cos_TR, sin_TR, backward=True)
    return dqkv_TE


@_split_rope_bwd.register_fake
def _empty_qkv(dq_THA, dk_TGA, dv_TGA, cos_TR, sin_TR):
    num_tokens, num_heads, head_dim = dq_THA.shape
    return dq_THA.new_empty(num_tokens, (num_heads + 2 * dk_TGA.shape[1]) * head_dim)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward(ctx, dq_THA, dk_TGA, dv_TGA):
    return _split_rope_bwd(dq_THA, dk_TGA, dv_TGA, *ctx.saved_tensors), *[None] * 5


split_rope_kernel.register_autograd(_backward, setup_context=_setup_context)


def split_rope(
    qkv_TE: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v = qkv.view(T, G, H // G + 2, A).split([H // G, 1, 1], 2), then x * cos + rotate_half(x) * sin
    on q and k.

    qkv [T, (H + 2 G) A]: bf16, fp16, fp32 (fp64: plain torch).  cos, sin [T, A / 2] fp32, constants (no
    gradient).
    Returns q [T, H, A], k [T, G, A], v [T, G, A]: dense, in qkv's dtype; query head h belongs to KV head h //
    (H / G).
    Source of the convention: transformers' apply_rotary_pos_emb.  CUDA: Triton, tensors on the current
    device.
    """
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    if num_heads % num_kv_heads or head_dim % 2:
        raise ValueError(
            f"split_rope: num_kv_heads={num_kv_heads} must divide num_heads={num_heads} and "
            f"head_dim={head_dim} be even"
        )
    if qkv_TE.dim() != 2 or qkv_TE.shape[1] != columns:
        raise ValueError(
            f"split_rope wants qkv [T, {columns}] for these head counts, not {list(qkv_TE.shape)}"
        )
    if cos_TR.shape != (qkv_TE.shape[0], head_dim // 2) or sin_TR.shape != cos_TR.shape:
        raise ValueError(
            f"split_rope wants cos and sin [{qkv_TE.shape[0]}, {head_dim // 2}], one row per token, "
            f"not {list(cos_TR.shape)} and {list(sin_TR.shape)}"
        )
    if qkv_TE.is_cuda and qkv_TE.dtype != torch.float64:
        return split_rope_kernel(qkv_TE, cos_TR, sin_TR, num_heads, num_kv_heads, head_dim)
    return split_rope_ref(qkv_TE, cos_TR, sin_TR, num_heads, num_kv_heads, head_dim)
