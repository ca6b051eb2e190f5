"""Mean of every packed sequence, and the L2 normalisation after it where it is asked for.

Contract: x [T, D] holds the tokens of N sequences one after the other, cu_seqlens [N + 1] (int32 or int64)
their bounds, from 0. Sequences may be empty (mean 0) or of any length; tokens behind the last one are ignored
and get zero gradient. Sums are in fp32 and in a fixed order: same input, same bits, no atomics. One read of x
forward; backward writes dx once.

Two stages, because sequences of 1 and of 32k tokens meet in one launch. First every chunk of CHUNK tokens is
summed by one program, one partial sum per sequence that it touches; walking through the tokens, each (chunk
c, sequence n) pair comes after a step in c or in n, so c + n numbers the partial sums without a gap or a
clash, and no prefix sum has to be computed or read back by the host. Then one program per sequence (several
for sequences of thousands of tokens) adds that sequence's partial sums.
"""

# T packed tokens (of this rank) · N sequences · D hidden_size · C chunks of tokens

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def segment_sum_ref(x_TD: torch.Tensor, cu_seqlens: torch.Tensor, token_offset: int = 0) -> torch.Tensor:
    num_segments = cu_seqlens.numel() - 1
    position_T = token_offset + torch.arange(x_TD.shape[0], device=x_TD.device, dtype=cu_seqlens.dtype)
    # Tokens behind the last sequence fall into a row of their own, which is dropped.
    segment_T = torch.searchsorted(cu_seqlens[1:].contiguous(), position_T, right=True)
    x_TD = _wide(x_TD)
    return x_TD.new_zeros(num_segments + 1, x_TD.shape[1]).index_add(0, segment_T, x_TD)[:num_segments]


def mean_pool_ref(x_TD: torch.Tensor, cu_seqlens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
    mean_ND = segment_sum_ref(x_TD, cu_seqlens) / cu_seqlens.diff().clamp(min=1)[:, None]
    return F.normalize(mean_ND, dim=-1, eps=_MIN_NORM) if normalize else mean_ND


_MIN_NORM = 1e-12  # F.normalize's

# A warp takes 256 columns of all rows of a block, 8 neighbours a thread, so that sums over rows stay within
# threads: every other division was slower by half to four times (docs/log.md). BLOCK_T, BLOCK_D, num_warps,
# num_stages
_COLUMNS_FORWARD = (4, 1024, 4, 3)
_COLUMNS_BACKWARD = (4, 1024, 4, 1)
# Tokens of one program of the first stage: enough programs for every SM to have two, and few partial sums, of
# which there are T / chunk + N rows of fp32.
_CHUNK, _CHUNK_OF_MANY, _MANY_TOKENS = 64, 128, 32768
_SCATTER_CHUNK = 16  # tokens of one program of the backward
_ENDS = 1024  # ends of sequences compared at a time
_LONG = 2048  # mean length above which the partial sums of one sequence are added by many programs
_COMBINE_LONG = (64, 64, 4)  # BLOCK_C, BLOCK_D, num_warps of those


def _chunk(num_tokens: int) -> int:
    return _CHUNK if num_tokens < _MANY_TOKENS else _CHUNK_OF_MANY


def _row_block(hidden_size: int) -> int:
    """BLOCK_D of a program that needs a whole row, for its norm"""
    block_d = max(16, triton.next_power_of_2(hidden_size))
    if block_d > 16384:
        raise ValueError(
            f"mean_pool holds rows in registers for their norm: hidden_size={hidden_size} is above 16384"
        )
    return block_d


@triton.jit
def _segment_of(cu_ptr, position, N, ENDS: tl.constexpr):
    """The first segment that ends behind `position`, N if there is none: as many as end at it or before.

    All ends are compared: a search by halves is a chain of loads that wait for each other.
    """
    count = tl.zeros((ENDS,), tl.int64)
    for start in range(0, N, ENDS):
        offs = start + tl.arange(0, ENDS)
        ends = tl.load(cu_ptr + 1 + offs, mask=offs < N, other=0)
        count += ((ends <= position) & (offs < N)).to(tl.int64)
    return tl.sum(count, 0)


@triton.jit
def _chunk_sum_kernel(
    x_ptr, cu_ptr, partial_ptr, T, N, token_offset,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    ENDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: the partial sums of one chunk of rows, for one block of columns.

    One loop over the rows, whatever sequences they belong to: their loads stay in flight across the ends of
    sequences.
    """
    chunk = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    row = chunk * CHUNK
    chunk_end = tl.minimum(tl.minimum(row + CHUNK, T), tl.load(cu_ptr + N).to(tl.int64) - token_offset)
    segment = _segment_of(cu_ptr, row + token_offset, N, ENDS)
    segment_end = tl.load(cu_ptr + segment + 1, mask=segment < N, other=0).to(tl.int64) - token_offset
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(row, chunk_end, BLOCK_T, num_stages=STAGES):
        offs_t = start + tl.arange(0, BLOCK_T)
        end = tl.minimum(start + BLOCK_T, chunk_end)
        mask = (offs_t < end)[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + offs_t[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(tl.where((offs_t < segment_end)[:, None], x, 0.0), 0)
        # A branch around the loop, or triton would take ours for an outer one and not pipeline it.
        if segment_end <= end:
            while (segment < N) & (segment_end <= end):
                tl.store(partial_ptr + (chunk + segment) * D + offs_d, acc, mask=mask_d)
                begin = segment_end
                segment += 1
                segment_end = tl.load(cu_ptr + segment + 1, mask=segment < N, other=0).to(tl.int64)
                segment_end -= token_offset
                inside = (offs_t >= begin) & (offs_t < segment_end)
                acc = tl.sum(tl.where(inside[:, None], x, 0.0), 0)
    if (row < chunk_end) & (segment < N):
        tl.store(partial_ptr + (chunk + segment) * D + offs_d, acc, mask=mask_d)


@triton.jit
def _combine_kernel(
    partial_ptr, cu_ptr, sum_ptr, out_ptr, inverse_ptr, T, token_offset,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    SUM: tl.constexpr, MEAN: tl.constexpr, NORMALIZE: tl.constexpr, MIN_NORM: tl.constexpr,
):  # fmt: skip
    """One program: one sequence and one block of columns (all if NORMALIZE); its partial sums in the order of
    the tokens."""
    segment = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = tl.load(cu_ptr + segment).to(tl.int64)
    end = tl.load(cu_ptr + segment + 1).to(tl.int64)
    first_row = tl.maximum(start - token_offset, 0)
    end_row = tl.minimum(end - token_offset, T)
    acc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    # No chunk where this rank has no token of the sequence: the division of -1 rounds towards zero.
    end_chunk = tl.where(first_row < end_row, (end_row - 1) // CHUNK + 1, 0)
    for chunk in range(first_row // CHUNK, end_chunk, BLOCK_C):
        offs_c = chunk + tl.arange(0, BLOCK_C)
        mask = (offs_c < end_chunk)[:, None] & mask_d[None, :]
        acc += tl.load(partial_ptr + (offs_c + segment)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    if SUM:
        tl.store(sum_ptr + segment * D + offs_d, total, mask=mask_d)
    if MEAN:
        mean = total / tl.maximum(end - start, 1).to(tl.float32)
        if NORMALIZE:
            inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(mean * mean, 0)), MIN_NORM)
            tl.store(inverse_ptr + segment, inverse)
            mean *= inverse
        tl.store(out_ptr + segment * D + offs_d, mean, mask=mask_d)


@triton.jit
def _mean_bwd_kernel(
    dout_ptr, out_ptr, inverse_ptr, cu_ptr, dsum_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """One program: one sequence; dsum = d(sum over its tokens)."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    dsum = tl.load(dout_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if NORMALIZE:
        out = tl.load(out_ptr + row * D + offs_d, mask=mask_d, other=0.0)
        dsum = (dsum - out * tl.sum(out * dsum, 0)) * tl.load(inverse_ptr + row)
    length = tl.load(cu_ptr + row + 1) - tl.load(cu_ptr + row)
    dsum /= tl.maximum(length, 1).to(tl.float32)
    tl.store(dsum_ptr + row * D + offs_d, dsum, mask=mask_d)


@triton.jit
def _normalize_kernel(mean_ptr, inverse_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, MIN_NORM: tl.constexpr):
    """One program: one sequence, whose mean is scaled to unit length where it lies."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mean = tl.load(mean_ptr + row * D + offs_d, mask=offs_d < D, other=0.0)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(mean * mean, 0)), MIN_NORM)
    tl.store(inverse_ptr + row, inverse)
    tl.store(mean_ptr + row * D + offs_d, mean * inverse, mask=offs_d < D)


@triton.jit
def _scatter_kernel(
    dsum_ptr, cu_ptr, dx_ptr, T, N, token_offset,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    ENDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK rows x BLOCK_D columns, sequence by sequence; 0 behind the last one."""
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    row = tl.program_id(0).to(tl.int64) * CHUNK
    chunk_end = tl.minimum(row + CHUNK, T)
    segment = _segment_of(cu_ptr, row + token_offset, N, ENDS)
    while row < chunk_end:
        inside = segment < N
        segment_end = tl.load(cu_ptr + segment + 1, mask=inside, other=0).to(tl.int64) - token_offset
        end = tl.minimum(tl.where(inside, segment_end, chunk_end), chunk_end)
        width = tl.where(inside, D, 0)
        dsum = tl.load(dsum_ptr + segment * D + offs_d, mask=offs_d < width, other=0.0)
        for start in tl.range(row, end, BLOCK_T, num_stages=STAGES):
            offs_t = start + tl.arange(0, BLOCK_T)
            offs = offs_t[:, None] * D + offs_d[None, :]
            mask = (offs_t < end)[:, None] & mask_d[None, :]
            dx = tl.zeros((BLOCK_T, BLOCK_D), tl.float32) + dsum[None, :]
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        row = end
        segment += 1


def _reduce(x_TD, cu_seqlens, token_offset, want_sum: bool, want_mean: bool, normalize: bool):
    """-> sum [N, D], mean [N, D] (of unit length with normalize), 1 / norm [N]; empty if not wanted"""
    num_tokens, hidden_size = x_TD.shape
    num_segments = cu_seqlens.numel() - 1
    block_t, block_d, num_warps, num_stages = _COLUMNS_FORWARD
    chunk, long = _chunk(num_tokens), num_tokens > _LONG * num_segments
    num_chunks = triton.cdiv(num_tokens, chunk)
    partial_CD = x_TD.new_empty(num_chunks + num_segments, hidden_size, dtype=torch.float32)
    sum_ND = x_TD.new_empty(num_segments if want_sum else 0, hidden_size, dtype=torch.float32)
    mean_ND = x_TD.new_empty(num_segments if want_mean else 0, hidden_size, dtype=torch.float32)
    inverse_N = x_TD.new_empty(num_segments if normalize else 0, dtype=torch.float32)
    if num_tokens:
        _chunk_sum_kernel[(num_chunks, triton.cdiv(hidden_size, block_d))](
            x_TD, cu_seqlens, partial_CD, num_tokens, num_segments, token_offset,
            D=hidden_size, CHUNK=chunk, BLOCK_T=block_t, BLOCK_D=block_d,
            ENDS=_ENDS, STAGES=num_stages, num_warps=num_warps,
        )  # fmt: skip
    if num_segments:
        if long:
            block_c, block_d, num_warps = _COMBINE_LONG
        else:
            block_d = _row_block(hidden_size) if normalize else min(512, triton.next_power_of_2(hidden_size))
            block_c, num_warps = min(4, 16384 // block_d), max(4, min(16, block_d // 512))
        _combine_kernel[(num_segments, triton.cdiv(hidden_size, block_d))](
            partial_CD, cu_seqlens, sum_ND, mean_ND, inverse_N,
            num_tokens, token_offset, D=hidden_size, CHUNK=chunk, BLOCK_C=block_c, BLOCK_D=block_d,
            SUM=want_sum, MEAN=want_mean, NORMALIZE=normalize and not long, MIN_NORM=_MIN_NORM,
            num_warps=num_warps,
        )  # fmt: skip
        if normalize and long:
            _normalize_kernel[(num_segments,)](
                mean_ND, inverse_N,
                D=hidden_size, BLOCK_D=_row_block(hidden_size), MIN_NORM=_MIN_NORM, num_warps=8,
            )  # fmt: skip
    return sum_ND, mean_ND, inverse_N


def _scatter(dsum_ND, cu_seqlens, token_offset, num_tokens, dtype) -> torch.Tensor:
    """-> dx [T, D] from d(sum) [N, D]"""
    num_segments, hidden_size = dsum_ND.shape
    block_t, block_d, num_warps, num_stages = _COLUMNS_BACKWARD
    dx_TD = dsum_ND.new_empty(num_tokens, hidden_size, dtype=dtype)
    if num_tokens:
        _scatter_kernel[(triton.cdiv(num_tokens, _SCATTER_CHUNK), triton.cdiv(hidden_size, block_d))](
            dsum_ND, cu_seqlens, dx_TD, num_tokens, num_segments, token_offset,
            D=hidden_size, CHUNK=_SCATTER_CHUNK, BLOCK_T=block_t, BLOCK_D=block_d,
            ENDS=_ENDS, STAGES=num_stages, num_warps=num_warps,
        )  # fmt: skip
    return dx_TD


@torch.library.custom_op("nemo_embed_core::segment_sum_forward", mutates_args=())
def segment_sum_kernel(x_TD: torch.Tensor, cu_seqlens: torch.Tensor, token_offset: int = 0) -> torch.Tensor:
    return _reduce(x_TD.contiguous(), cu_seqlens.contiguous(), token_offset, True, False, False)[0]


@segment_sum_kernel.register_fake
def _(x_TD, cu_seqlens, token_offset=0):
    return x_TD.new_empty(cu_seqlens.shape[0] - 1, x_TD.shape[1], dtype=torch.float32)


@torch.library.custom_op("nemo_embed_core::segment_sum_backward", mutates_args=())
def _segment_sum_bwd(
    dsum_ND: torch.Tensor, cu_seqlens: torch.Tensor, token_offset: int, num_tokens: int, dtype: torch.dtype
) -> torch.Tensor:
    return _scatter(dsum_ND.contiguous(), cu_seqlens.contiguous(), token_offset, num_tokens, dtype)


@_segment_sum_bwd.register_fake
def _(dsum_ND, cu_seqlens, token_offset, num_tokens, dtype):
    return dsum_ND.new_empty(num_tokens, dsum_ND.shape[1], dtype=dtype)


def _segment_sum_setup_context(ctx, inputs, output):
    x_TD, cu_seqlens, ctx.token_offset = inputs
    ctx.num_tokens, ctx.dtype = x_TD.shape[0], x_TD.dtype
    ctx.save_for_backward(cu_seqlens)  # not x: its gradient is a copy of the sum's


def _segment_sum_backward(ctx, dsum_ND):
    dx_TD = _segment_sum_bwd(dsum_ND, *ctx.saved_tensors, ctx.token_offset, ctx.num_tokens, ctx.dtype)
    return dx_TD, None, None


segment_sum_kernel.register_autograd(_segment_sum_backward, setup_context=_segment_sum_setup_context)


@torch.library.custom_op("nemo_embed_core::mean_pool_forward", mutates_args=())
def _mean_pool_fwd(
    x_TD: torch.Tensor, cu_seqlens: torch.Tensor, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [N, D], 1 / norm [N] (with normalize)"""
    return _reduce(x_TD.contiguous(), cu_seqlens.contiguous(), 0, False, True, normalize)[1:]


@_mean_pool_fwd.register_fake
def _(x_TD, cu_seqlens, normalize):
    num_segments = cu_seqlens.shape[0] - 1
    out_ND = x_TD.new_empty(num_segments, x_TD.shape[1], dtype=torch.float32)
    return out_ND, x_TD.new_empty(num_segments if normalize else 0, dtype=torch.float32)


@torch.library.custom_op("nemo_embed_core::mean_pool_backward", mutates_args=())
def _mean_pool_bwd(
    dout_ND: torch.Tensor,
    out_ND: torch.Tensor,
    inverse_N: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_tokens: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """-> dx [T, D]"""
    num_segments, hidden_size = dout_ND.shape
    cu_seqlens, dsum_ND = cu_seqlens.contiguous(), dout_ND.new_empty(dout_ND.shape, dtype=torch.float32)
    if num_segments:
        block_d = _row_block(hidden_size)
        _mean_bwd_kernel[(num_segments,)](
            dout_ND.contiguous(), out_ND, inverse_N, cu_seqlens, dsum_ND, D=hidden_size, BLOCK_D=block_d,
            NORMALIZE=inverse_N.numel() > 0, num_warps=max(1, min(16, block_d // 512)),
        )  # fmt: skip
    return _scatter(dsum_ND, cu_seqlens, 0, num_tokens, dtype)


@_mean_pool_bwd.register_fake
def _(dout_ND, out_ND, inverse_N, cu_seqlens, num_tokens, dtype):
    return dout_ND.new_empty(num_tokens, dout_ND.shape[1], dtype=dtype)


def _mean_pool_setup_context(ctx, inputs, output):
    x_TD, cu_seqlens, _ = inputs
    ctx.num_tokens, ctx.dtype = x_TD.shape[0], x_TD.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, cu_seqlens)  # not x: its gradient is a copy of the mean's


def _mean_pool_backward(ctx, dout_ND, *_):
    if dout_ND is None:
        return None, None, None
    return _mean_pool_bwd(dout_ND, *ctx.saved_tensors, ctx.num_tokens, ctx.dtype), None, None


_mean_pool_fwd.register_autograd(_mean_pool_backward, setup_context=_mean_pool_setup_context)


def mean_pool_kernel(x_TD: torch.Tensor, cu_seqlens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
    return _mean_pool_fwd(x_TD, cu_seqlens, normalize)[0]


def _check(x_TD: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    if x_TD.dim() != 2 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"pooling wants x [T, D] and integer cu_seqlens [N + 1], not {list(x_TD.shape)} and "
            f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )


def segment_sum(x_TD: torch.Tensor, cu_seqlens: torch.Tensor, token_offset: int = 0) -> torch.Tensor:
    """torch.stack([x[a:b].float().sum(0) for a, b in bounds]): the local share of every sequence's sum.

    x [T_local, D]: tokens token_offset .. token_offset + T_local of the packed batch, bf16, fp16, fp32 (fp64:
    plain torch). cu_seqlens [N + 1]: bounds in the whole batch.  Returns [N, D] fp32 (fp64 for fp64), zero
    where this rank has no token. Under sequence parallelism one all-reduce of this completes the sums; divide
    by cu_seqlens.diff() for the mean.
    """
    _check(x_TD, cu_seqlens)
    if x_TD.is_cuda and x_TD.dtype != torch.float64:
        return segment_sum_kernel(x_TD, cu_seqlens, token_offset)
    return segment_sum_ref(x_TD, cu_seqlens, token_offset)


def mean_pool(x_TD: torch.Tensor, cu_seqlens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
    """mean = torch.stack([x[a:b].float().mean(0) for a, b in bounds]); F.normalize(mean) if normalize, else
    mean

    x [T, D]: bf16, fp16, fp32 (fp64: plain torch).  cu_seqlens [N + 1]. Returns [N, D] fp32 (fp64 for fp64);
    an empty sequence gives 0.  CUDA: Triton, tensors on the current device, D up to 16384.
    """
    _check(x_TD, cu_seqlens)
    if x_TD.is_cuda and x_TD.dtype != torch.float64:
        return mean_pool_kernel(x_TD, cu_seqlens, normalize)
    return mean_pool_ref(x_TD, cu_seqlens, normalize)
