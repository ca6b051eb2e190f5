"""Dot products of chosen pairs of rows, in fp64 and one order of summation that D alone fixes.

Contract: a product of two fp32 is exact in fp64, and the sum is a tree of halves, x[:h] + x[h:] with h =
2^(n-1), ..., 2, 1 for D <= 2^n; a zero is +0. So a score is a function of its two rows: the same bits on a
CPU, on a GPU and in numpy, in any batch. Documents are read once per pair, queries once per two pairs of the
same query; nothing is gathered.
"""

# M pairs · Q and N rows on the two sides · D columns

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Fp64 numbers of the reference at a time, twice: 8 MiB; fewer cost more in calls than a cache gains.
_CHUNK = 1 << 19


def pair_scores_ref(q_QD, rows_M, d_ND, ids_M) -> torch.Tensor:
    num_columns = q_QD.shape[1]
    scores = torch.full((len(rows_M),), torch.nan, device=q_QD.device)
    there = (ids_M >= 0).nonzero()[:, 0]
    most = min(len(there), max(1, _CHUNK // num_columns))
    # Gathered and converted into the same memory every time: fresh pages would cost more than the sums.
    q_part, d_part = q_QD.new_empty(most, num_columns), d_ND.new_empty(most, num_columns)
    q_64, d_64 = (q_QD.new_empty(most, num_columns, dtype=torch.float64) for _ in range(2))
    for part in there.split(max(1, most)):
        n = len(part)
        q_64[:n] = torch.index_select(q_QD, 0, rows_M[part], out=q_part[:n])
        d_64[:n] = torch.index_select(d_ND, 0, ids_M[part], out=d_part[:n])
        x = d_64[:n].mul_(q_64[:n])
        half = 1 << (num_columns - 1).bit_length()
        while half > 1:
            half //= 2
            x[:, : x.shape[1] - half] += x[:, half:]
            x = x[:, :half]
        scores[part] = x[:, 0].float() + 0.0  # -0.0 becomes 0.0
    return scores


# (columns of a chunk, chunks of a row in straight-line code): of seven the fastest on an H200 at D = 4096
# (docs/log.md).
_CONFIG = (64, 16)


@triton.jit
def _sums_of_chunks(
    q0_ptr, q1_ptr, d0_ptr, d1_ptr, offs_d,
    COUNT: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Products of COUNT chunks, STEP columns apart, summed as a tree of halves, depth first: few sums are
    alive."""
    HALF: tl.constexpr = COUNT // 2
    if COUNT > UNROLL:
        x0 = tl.full(offs_d.shape, -0.0, tl.float64)  # the number whose addition changes nothing
        x1 = x0
        for i in tl.range(2, num_stages=1):
            offs = offs_d + i * STEP
            y0, y1 = _sums_of_chunks(q0_ptr, q1_ptr, d0_ptr, d1_ptr, offs, HALF, 2 * STEP, D, SHARED, UNROLL)
            x0, x1 = x0 + y0, x1 + y1
    elif COUNT > 1:
        x0, x1 = _sums_of_chunks(q0_ptr, q1_ptr, d0_ptr, d1_ptr, offs_d, HALF, 2 * STEP, D, SHARED, UNROLL)
        y0, y1 = _sums_of_chunks(
            q0_ptr, q1_ptr, d0_ptr, d1_ptr, offs_d + STEP, HALF, 2 * STEP, D, SHARED, UNROLL
        )
        x0, x1 = x0 + y0, x1 + y1
    else:
        mask = None if D & (D - 1) == 0 else offs_d < D
        q0 = tl.load(q0_ptr + offs_d, mask=mask).to(tl.float64)
        d0 = tl.load(d0_ptr + offs_d, mask=mask, eviction_policy="evict_first").to(tl.float64)
        d1 = tl.load(d1_ptr + offs_d, mask=mask, eviction_policy="evict_first").to(tl.float64)
        q1 = q0 if SHARED else tl.load(q1_ptr + offs_d, mask=mask).to(tl.float64)
        x0, x1 = q0 * d0, q1 * d1
        if mask is not None:
            x0, x1 = tl.where(mask, x0, -0.0), tl.where(mask, x1, -0.0)
    return x0, x1


@triton.jit
def _store_score(scores_ptr, m, x, id, LEVELS: tl.constexpr):
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (2, 1 << (LEVELS - 1 - level))), 0)
    score = tl.sum(x, 0).to(tl.float32)
    score = tl.where(score == 0, 0.0, score)
    tl.store(scores_ptr + m, tl.where(id >= 0, score, float("nan")))


@triton.jit
def _pair_scores_kernel(
    q_ptr, rows_ptr, d_ptr, ids_ptr, scores_ptr, M,
    D: tl.constexpr, CHUNKS: tl.constexpr, LEVELS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One program: two pairs in one warp. A chunk lies across its lanes; chunks of a row are added first."""
    m0 = tl.program_id(0).to(tl.int64) * 2
    m1 = tl.minimum(m0 + 1, M - 1)
    row0, row1 = tl.load(rows_ptr + m0).to(tl.int64), tl.load(rows_ptr + m1).to(tl.int64)
    id0, id1 = tl.load(ids_ptr + m0).to(tl.int64), tl.load(ids_ptr + m1).to(tl.int64)
    q0_ptr, q1_ptr = q_ptr + row0 * D, q_ptr + row1 * D
    d0_ptr, d1_ptr = d_ptr + tl.maximum(id0, 0) * D, d_ptr + tl.maximum(id1, 0) * D
    C: tl.constexpr = 1 << LEVELS
    offs_d = tl.arange(0, C)
    # The rule where pairs are sorted; fewer conversions to fp64, which are slower than its products.
    if row0 == row1:
        x0, x1 = _sums_of_chunks(q0_ptr, q0_ptr, d0_ptr, d1_ptr, offs_d, CHUNKS, C, D, True, UNROLL)
    else:
        x0, x1 = _sums_of_chunks(q0_ptr, q1_ptr, d0_ptr, d1_ptr, offs_d, CHUNKS, C, D, False, UNROLL)
    _store_score(scores_ptr, m0, x0, id0, LEVELS)
    _store_score(scores_ptr, m1, x1, id1, LEVELS)


@torch.library.custom_op("nemo_embed_core::pair_scores", mutates_args=())
def pair_scores_kernel(
    q_QD: torch.Tensor, rows_M: torch.Tensor, d_ND: torch.Tensor, ids_M: torch.Tensor
) -> torch.Tensor:
    q_QD, d_ND = q_QD.contiguous(), d_ND.contiguous()
    num_columns = q_QD.shape[1]
    scores = torch.full((len(rows_M),), torch.nan, dtype=torch.float32, device=q_QD.device)
    chunk, unroll = _CONFIG
    block_d = triton.next_power_of_2(num_columns)
    chunk = min(chunk, block_d)
    if len(rows_M) and len(d_ND):
        _pair_scores_kernel[(triton.cdiv(len(rows_M), 2),)](
            q_QD, rows_M.contiguous(), d_ND, ids_M.contiguous(), scores, len(rows_M),
            D=num_columns, CHUNKS=block_d // chunk, LEVELS=chunk.bit_length() - 1, UNROLL=unroll, num_warps=1,
        )  # fmt: skip
    return scores


@pair_scores_kernel.register_fake
def _(q_QD, rows_M, d_ND, ids_M):
    return q_QD.new_empty(len(rows_M), dtype=torch.float32)


def pair_scores(
    q_QD: torch.Tensor, rows_M: torch.Tensor, d_ND: torch.Tensor, ids_M: torch.Tensor
) -> torch.Tensor:
    """(q.double()[rows] * d.double()[ids]).sum(1).float(), summed as a tree of halves; NaN where the id is
    negative

    q [Q, D], d [N, D]: fp32, bf16 or fp16 each.  rows, ids [M] int64.  Returns [M] fp32.
    CUDA: Triton, D <= 16384, tensors on the current device.
    """
    if q_QD.shape[1] != d_ND.shape[1] or rows_M.shape != ids_M.shape:
        raise ValueError(
            f"pair_scores wants as many columns in q and d and as many rows as ids, not {list(q_QD.shape)}, "
            f"{list(d_ND.shape)}, {list(rows_M.shape)} and {list(ids_M.shape)}"
        )
    if q_QD.is_cuda:
        if q_QD.shape[1] > 16384:
            raise ValueError(f"pair_scores was tested up to 16384 columns: D={q_QD.shape[1]} is more")
        return pair_scores_kernel(q_QD, rows_M, d_ND, ids_M)
    return pair_scores_ref(q_QD, rows_M, d_ND, ids_M)
