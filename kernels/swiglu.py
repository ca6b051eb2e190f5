"""silu(gate) * up on the fused output of the gate_up projection.

Contract: the columns are num_blocks blocks of [gate block | up block] (ModelConfig.mlp_blocks, so that a
plain row shard of the weight holds whole blocks); the output columns are in block order. One read and one
write each way; math in fp32.
"""

# T packed tokens · F intermediate_size (of this rank) · E = 2 F gate_up columns

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


def swiglu_ref(gate_up_TE: torch.Tensor, num_blocks: int) -> torch.Tensor:
    num_tokens, columns = gate_up_TE.shape
    gate, up = gate_up_TE.view(num_tokens, num_blocks, 2, columns // (2 * num_blocks)).unbind(2)
    return (F.silu(gate) * up).reshape(num_tokens, columns // 2)


# (BLOCK_T, BLOCK_F, num_warps). 256 divides the blocks of the 1B (1024) and 8B (1792) models, so no lane
# idles there; other shapes differed by less than 1 % on an H200.
_CONFIG = (8, 256, 4)


@triton.jit
def _tile(NUM_BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """-> block, rows and columns in it of this program; columns first, so that what runs at one time covers
    whole rows"""
    tiles_per_block = tl.cdiv(WIDTH, BLOCK_F)
    tile = tl.program_id(0) % (NUM_BLOCKS * tiles_per_block)
    first_t = tl.program_id(0) // (NUM_BLOCKS * tiles_per_block) * BLOCK_T
    offs_t = (first_t + tl.arange(0, BLOCK_T)).to(tl.int64)
    return tile // tiles_per_block, offs_t, (tile % tiles_per_block) * BLOCK_F + tl.arange(0, BLOCK_F)


@triton.jit
def _swiglu_fwd_kernel(
    gate_up_ptr, out_ptr, T,
    NUM_BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows x BLOCK_F columns of one block of WIDTH columns."""
    block, offs_t, offs_f = _tile(NUM_BLOCKS, WIDTH, BLOCK_T, BLOCK_F)
    mask = (offs_t < T)[:, None] & (offs_f < WIDTH)[None, :]
    gate_ptrs = (
        gate_up_ptr + offs_t[:, None] * (2 * NUM_BLOCKS * WIDTH) + (2 * block * WIDTH + offs_f)[None, :]
    )
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    out_ptrs = out_ptr + offs_t[:, None] * (NUM_BLOCKS * WIDTH) + (block * WIDTH + offs_f)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dout_ptr, gate_up_ptr, dgate_up_ptr, T,
    NUM_BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    block, offs_t, offs_f = _tile(NUM_BLOCKS, WIDTH, BLOCK_T, BLOCK_F)
    mask = (offs_t < T)[:, None] & (offs_f < WIDTH)[None, :]
    gate_offs = offs_t[:, None] * (2 * NUM_BLOCKS * WIDTH) + (2 * block * WIDTH + offs_f)[None, :]
    out_offs = offs_t[:, None] * (NUM_BLOCKS * WIDTH) + (block * WIDTH + offs_f)[None, :]
    gate = tl.load(gate_up_ptr + gate_offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_offs + WIDTH, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + out_offs, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dout * gate * sigmoid
    tl.store(dgate_up_ptr + gate_offs, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_up_ptr + gate_offs + WIDTH, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, gate_up_TE: torch.Tensor, num_blocks: int, *tensors: torch.Tensor) -> None:
    num_tokens, columns = gate_up_TE.shape
    block_t, block_f, num_warps = _CONFIG
    width = columns // (2 * num_blocks)
    block_f = min(block_f, triton.next_power_of_2(width))  # narrow blocks: no lane beyond them idles
    if num_tokens:
        kernel[(triton.cdiv(num_tokens, block_t) * num_blocks * triton.cdiv(width, block_f),)](
            *tensors, num_tokens,
            NUM_BLOCKS=num_blocks, WIDTH=width, BLOCK_T=block_t, BLOCK_F=block_f, num_warps=num_warps,
        )  # fmt: skip


@torch.library.custom_op("nemo_embed_core::swiglu_forward", mutates_args=())
def swiglu_kernel(gate_up_TE: torch.Tensor, num_blocks: int) -> torch.Tensor:
    out_TF = gate_up_TE.new_empty(gate_up_TE.shape[0], gate_up_TE.shape[1] // 2)
    _launch(_swiglu_fwd_kernel, gate_up_TE, num_blocks, gate_up_TE.contiguous(), out_TF)
    return out_TF


@swiglu_kernel.register_fake
def _(gate_up_TE, num_blocks):
    return gate_up_TE.new_empty(gate_up_TE.shape[0], gate_up_TE.shape[1] // 2)


@torch.library.custom_op("nemo_embed_core::swiglu_backward", mutates_args=())
def _swiglu_bwd(dout_TF: torch.Tensor, gate_up_TE: torch.Tensor, num_blocks: int) -> torch.Tensor:
    dgate_up_TE = gate_up_TE.new_empty(gate_up_TE.shape)
    tensors = dout_TF.contiguous(), gate_up_TE.contiguous(), dgate_up_TE
    _launch(_swiglu_bwd_kernel, gate_up_TE, num_blocks, *tensors)
    return dgate_up_TE


@_swiglu_bwd.register_fake
def _(dout_TF, gate_up_TE, num_blocks):
    return gate_up_TE.new_empty(gate_up_TE.shape)


def _setup_context(ctx, inputs, output):
    gate_up_TE, ctx.num_blocks = inputs
    ctx.save_for_backward(gate_up_TE)


def _backward(ctx, dout_TF):
    return _swiglu_bwd(dout_TF, *ctx.saved_tensors, ctx.num_blocks), None


swiglu_kernel.register_autograd(_backward, setup_context=_setup_context)


def swiglu(gate_up_TE: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """gate, up = gate_up.view(T, num_blocks, 2, -1).unbind(2); (F.silu(gate) * up).reshape(T, -1)

    gate_up [T, 2 F]: bf16, fp16, fp32 (fp64: plain torch), columns in num_blocks blocks of [gate block | up
    block].
    Returns [T, F] in the same dtype.  CUDA: Triton, tensors on the current device.
    """
    if gate_up_TE.dim() != 2 or gate_up_TE.shape[1] % (2 * num_blocks):
        raise ValueError(
            f"swiglu wants [T, E] with E a multiple of 2 * num_blocks={2 * num_blocks}, not "
            f"{list(gate_up_TE.shape)}"
        )
    if gate_up_TE.is_cuda and gate_up_TE.dtype != torch.float64:
        return swiglu_kernel(gate_up_TE, num_blocks)
    return swiglu_ref(gate_up_TE, num_blocks)
