"""F.linear(dropout(x), A) whose mask is a function of content: the same in every layout, micro-batch and
recomputation.

    dropout(x)[t, i] = x[t, i] / (1 - rate) where u[t, i] >= rate 2^32, else 0
    u[t, i] = hash(seed, step, sequence, position, layer, i)        32 bits

    hash: from key = 0, for each value key = mix(key ^ mix(value + 0x9E3779B9)); mix: hash32.py
    sequence = sum over its tokens of hash(position, token id), mod 2^32

i is the column of the whole x, of which a rank may hold the columns from first_column on. Two equal sequences
in a step have the same mask. x is saved for the backward, the dropped x is not: masks are made again.
"""

# T packed tokens · N sequences · I columns of x (of this rank) · R rank

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nemo_embed_core.kernels.hash32 import mix, mixed


def _hash(key: Any, value: Any) -> Any:
    """The next key. Integers, or int64 tensors of 32 bits."""
    return mixed(key ^ mixed((value + 0x9E3779B9) & 0xFFFFFFFF))


def run_key(seed: int, step: int) -> int:
    """hash(seed, step)."""
    return _hash(_hash(0, seed), step)


def token_keys(
    run: int, input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """[T] int64: hash(seed, step, sequence, position) of each token of a packed batch. run: of `run_key`."""
    position_ids_T, T = position_ids_T.long(), input_ids_T.shape[0]
    sums = F.pad(_hash(_hash(0, position_ids_T), input_ids_T.long()).cumsum(0), (1, 0))
    sequence_N = sums[cu_seqlens].diff() & 0xFFFFFFFF
    token_T = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    index_T = torch.searchsorted(cu_seqlens, token_T, right=True) - 1
    return _hash(_hash(run, sequence_N[index_T]), position_ids_T)


def dropout_ref(
    x_TI: torch.Tensor, token_keys_T: torch.Tensor, layer: int, first_column: int, rate: float
) -> torch.Tensor:
    column_I = torch.arange(first_column, first_column + x_TI.shape[1], device=x_TI.device)
    u_TI = _hash(_hash(token_keys_T, layer)[:, None], column_I)
    return torch.where(u_TI >= int(rate * 2**32), x_TI * (1 / (1 - rate)), 0.0)


def dropout_linear_ref(
    x_TI: torch.Tensor, A_RI: torch.Tensor, token_keys_T: torch.Tensor, layer: int, first_column: int,
    rate: float,
) -> torch.Tensor:  # fmt: skip
    return F.linear(dropout_ref(x_TI, token_keys_T, layer, first_column, rate), A_RI)


_CONFIG = (8, 256, 4)  # (BLOCK_T, BLOCK_I, num_warps): of swiglu, which moves as it does; not timed


@triton.jit(do_not_specialize=["layer"])
def _dropout_kernel(
    x_ptr, keys_ptr, out_ptr, T, I, layer, first_column, scale,
    THRESHOLD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows x BLOCK_I columns; columns first, so that what runs at one time covers whole
    rows. A hash of each row and each column, and one mix of each element."""
    tiles = tl.cdiv(I, BLOCK_I)
    offs_t = (tl.program_id(0) // tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_i = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    golden = tl.full((), 0x9E3779B9, tl.uint32)
    row_keys = tl.load(keys_ptr + offs_t, mask=offs_t < T, other=0).to(tl.uint32)
    row_keys = mix(row_keys ^ mix(layer.to(tl.uint32) + golden))
    column_keys = mix((first_column + offs_i).to(tl.uint32) + golden)
    is_kept = mix(row_keys[:, None] ^ column_keys[None, :]) >= THRESHOLD
    mask = (offs_t < T)[:, None] & (offs_i < I)[None, :]
    offs = offs_t[:, None] * I + offs_i[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, tl.where(is_kept, x * scale, 0.0).to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("nemo_embed_core::dropout", mutates_args=())
def dropout_kernel(
    x_TI: torch.Tensor, token_keys_T: torch.Tensor, layer: int, first_column: int, rate: float
) -> torch.Tensor:
    T, I = x_TI.shape
    out_TI = x_TI.new_empty(T, I)
    block_t, block_i, num_warps = _CONFIG
    block_i = min(block_i, triton.next_power_of_2(I))
    if T:
        _dropout_kernel[(triton.cdiv(T, block_t) * triton.cdiv(I, block_i),)](
            x_TI.contiguous(), token_keys_T.contiguous(), out_TI, T, I, layer, first_column, 1 / (1 - rate),
            THRESHOLD=int(rate * 2**32), BLOCK_T=block_t, BLOCK_I=block_i, num_warps=num_warps,
        )  # fmt: skip
    return out_TI


@dropout_kernel.register_fake
def _(x_TI, token_keys_T, layer, first_column, rate):
    return x_TI.new_empty(x_TI.shape)


class _DropoutLinear(torch.autograd.Function):
    """dropout: dropout_kernel or dropout_ref."""

    @staticmethod
    def forward(ctx, dropout, x_TI, A_RI, token_keys_T, *place):
        ctx.save_for_backward(x_TI, A_RI, token_keys_T)
        ctx.dropout, ctx.place = dropout, place
        return F.linear(dropout(x_TI, token_keys_T, *place), A_RI)

    @staticmethod
    def backward(ctx, dh_TR):
        x_TI, A_RI, token_keys_T = ctx.saved_tensors
        dA_RI = dh_TR.t() @ ctx.dropout(x_TI, token_keys_T, *ctx.place)
        dx_TI = ctx.dropout(dh_TR @ A_RI, token_keys_T, *ctx.place) if ctx.needs_input_grad[1] else None
        return None, dx_TI, dA_RI, None, None, None, None


def dropout_linear_kernel(
    x_TI: torch.Tensor, A_RI: torch.Tensor, token_keys_T: torch.Tensor, layer: int, first_column: int,
    rate: float,
) -> torch.Tensor:  # fmt: skip
    return _DropoutLinear.apply(dropout_kernel, x_TI, A_RI, token_keys_T, layer, first_column, rate)


def dropout_linear(
    x_TI: torch.Tensor, A_RI: torch.Tensor, token_keys_T: torch.Tensor, layer: int, first_column: int,
    rate: float,
) -> torch.Tensor:  # fmt: skip
    """F.linear(dropout(x), A) with the mask of this file's head.

    x [T, I], A [R, I]: bf16, fp16, fp32 (fp64: plain torch).  token_keys [T]: of `token_keys`.  layer: which
    of the model's linear layers.  first_column: the place of x's first column in the whole x.  rate: in
    [0, 1).  Returns [T, R] in the same dtype.  CUDA: Triton for the mask, on the current device.
    """
    if token_keys_T.shape != x_TI.shape[:1]:
        raise ValueError(
            f"dropout_linear wants a key for each of x's {x_TI.shape[0]} tokens, not "
            f"{list(token_keys_T.shape)}"
        )
    dropout = dropout_kernel if x_TI.is_cuda and x_TI.dtype != torch.float64 else dropout_ref
    return _DropoutLinear.apply(dropout, x_TI, A_RI, token_keys_T, layer, first_column, rate)
