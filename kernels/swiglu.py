"""silu(gate) * up on the fused output of the gate_up projection.

Contract: the columns are num_blocks blocks of [gate block | up block] (ModelConfig.mlp_blocks, so that a
plain row shard of the weight holds whole blocks); the output columns are in block order. One read and one
write each way; math in fp32.

fp8 products around it ask for the largest value of what they quantise: of the output, and of the gradient of
gate_up. The one is returned; the other is handed back as the "gradient" of `beside`, an fp32 scalar that came
out of the product together with gate_up. So autograd itself carries it to where the gradient goes, and to no
other place. Who sums gradients of two uses of gate_up must not sum these.
"""

# T packed tokens · F intermediate_size (of this rank) · E = 2 F gate_up columns

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nemo_embed_core.kernels.fp8 import amax_ref, note_amax, size_bits, zero_bits


class _Beside(torch.autograd.Function):
    """x; the gradient of `beside` is the largest value of x's."""

    @staticmethod
    def forward(ctx, x, beside):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, amax_ref(dx)


def swiglu_ref(
    gate_up_TE: torch.Tensor, num_blocks: int, beside: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if beside is not None:
        gate_up_TE = _Beside.apply(gate_up_TE, beside)
    num_tokens, columns = gate_up_TE.shape
    gate, up = gate_up_TE.view(num_tokens, num_blocks, 2, columns // (2 * num_blocks)).unbind(2)
    out_TF = (F.silu(gate) * up).reshape(num_tokens, columns // 2)
    return out_TF, None if beside is None else amax_ref(out_TF.detach())


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
    gate_up_ptr, out_ptr, amax_ptr, T,
    NUM_BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows x BLOCK_F columns of one block of WIDTH columns. amax_ptr None: the kernel
    without it."""
    block, offs_t, offs_f = _tile(NUM_BLOCKS, WIDTH, BLOCK_T, BLOCK_F)
    mask = (offs_t < T)[:, None] & (offs_f < WIDTH)[None, :]
    gate_ptrs = (
        gate_up_ptr + offs_t[:, None] * (2 * NUM_BLOCKS * WIDTH) + (2 * block * WIDTH + offs_f)[None, :]
    )
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=mask, other=0.0).to(tl.float32)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + offs_t[:, None] * (NUM_BLOCKS * WIDTH) + (block * WIDTH + offs_f)[None, :]
    tl.store(out_ptrs, out, mask=mask)
    if amax_ptr is not None:
        note_amax(amax_ptr, size_bits(out))


@triton.jit
def _swiglu_bwd_kernel(
    dout_ptr, gate_up_ptr, dgate_up_ptr, amax_ptr, T,
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
    dtype: tl.constexpr = dgate_up_ptr.dtype.element_ty
    tl.store(dgate_up_ptr + gate_offs, dgate.to(dtype), mask=mask)
    tl.store(dgate_up_ptr + gate_offs + WIDTH, dup.to(dtype), mask=mask)
    if amax_ptr is not None:
        note_amax(amax_ptr, tl.maximum(size_bits(dgate.to(dtype)), size_bits(dup.to(dtype))))


def _launch(kernel, gate_up_TE: torch.Tensor, num_blocks: int, *tensors: torch.Tensor | None) -> None:
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
def _swiglu_fwd(
    gate_up_TE: torch.Tensor, num_blocks: int, beside: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [T, F], bits of its amax where there is `beside`"""
    out_TF = gate_up_TE.new_empty(gate_up_TE.shape[0], gate_up_TE.shape[1] // 2)
    bits = zero_bits(gate_up_TE, beside is not None)
    tensors = gate_up_TE.contiguous(), out_TF, None if beside is None else bits
    _launch(_swiglu_fwd_kernel, gate_up_TE, num_blocks, *tensors)
    return out_TF, bits


@_swiglu_fwd.register_fake
def _(gate_up_TE, num_blocks, beside):
    out_TF = gate_up_TE.new_empty(gate_up_TE.shape[0], gate_up_TE.shape[1] // 2)
    return out_TF, zero_bits(gate_up_TE, beside is not None)


@torch.library.custom_op("nemo_embed_core::swiglu_backward", mutates_args=())
def _swiglu_bwd(
    dout_TF: torch.Tensor, gate_up_TE: torch.Tensor, num_blocks: int, amax: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> dgate_up [T, E], bits of its amax where it is wanted"""
    dgate_up_TE, bits = gate_up_TE.new_empty(gate_up_TE.shape), zero_bits(gate_up_TE, amax)
    tensors = dout_TF.contiguous(), gate_up_TE.contiguous(), dgate_up_TE, bits if amax else None
    _launch(_swiglu_bwd_kernel, gate_up_TE, num_blocks, *tensors)
    return dgate_up_TE, bits


@_swiglu_bwd.register_fake
def _(dout_TF, gate_up_TE, num_blocks, amax):
    return gate_up_TE.new_empty(gate_up_TE.shape), zero_bits(gate_up_TE, amax)


def _setup_context(ctx, inputs, output):
    gate_up_TE, ctx.num_blocks, beside = inputs
    ctx.amax = beside is not None
    ctx.save_for_backward(gate_up_TE)


def _backward(ctx, dout_TF, _):
    dgate_up_TE, bits = _swiglu_bwd(dout_TF, *ctx.saved_tensors, ctx.num_blocks, ctx.amax)
    return dgate_up_TE, None, bits.view(torch.float32) if ctx.amax else None


_swiglu_fwd.register_autograd(_backward, setup_context=_setup_context)


def swiglu_kernel(
    gate_up_TE: torch.Tensor, num_blocks: int, beside: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out_TF, bits = _swiglu_fwd(gate_up_TE, num_blocks, beside)
    return out_TF, None if beside is None else bits.view(torch.float32)


def swiglu(
    gate_up_TE: torch.Tensor, num_blocks: int, beside: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """gate, up = gate_up.view(T, num_blocks, 2, -1).unbind(2); (F.silu(gate) * up).reshape(T, -1)

    gate_up [T, 2 F]: bf16, fp16, fp32 (fp64: plain torch), columns in num_blocks blocks of [gate block | up
    block].  beside: an fp32 scalar whose gradient becomes fp8.amax of gate_up's, or None.
    Returns out [T, F] in the same dtype, and fp8.amax(out), or None without `beside`.  CUDA: Triton, tensors
    on the current device.
    """
    if gate_up_TE.dim() != 2 or gate_up_TE.shape[1] % (2 * num_blocks):
        raise ValueError(
            f"swiglu wants [T, E] with E a multiple of 2 * num_blocks={2 * num_blocks}, not "
            f"{list(gate_up_TE.shape)}"
        )
    if gate_up_TE.is_cuda and gate_up_TE.dtype != torch.float64:
        return swiglu_kernel(gate_up_TE, num_blocks, beside)
    return swiglu_ref(gate_up_TE, num_blocks, beside)
