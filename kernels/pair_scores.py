"""Dot products of chosen pairs of rows, in fp64 and one order of summation that D alone fixes.

Contract: a product of two fp32 is exact in fp64, and the sum is a tree of halves, x[:h] + x[h:] with h = 2^(n-1), ..., 2, 1 for
D <= 2^n. So a score is a function of its two rows: the same bits on a CPU, on a GPU and in numpy, in any batch. Every row is
read once per pair, nothing is gathered.
"""

# M pairs · Q and N rows on the two sides · D columns

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK = 1 << 19  # fp64 numbers of the reference at a time, twice: 8 MiB; fewer cost more in calls than a cache gains


def pair_scores_ref(q_QD: torch.Tensor, rows_M: torch.Tensor, d_ND: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
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
        scores[part] = x[:, 0].float()
    return scores


# num_warps by columns: an fp64 row in at most 64 registers a thread up to D = 8192. Not timed on a GPU yet.
def _num_warps(block_d: int) -> int:
    return min(16, max(1, block_d // 1024))


@triton.jit
def _pair_scores_kernel(
    q_ptr, rows_ptr, d_ptr, ids_ptr, scores_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One program: one pair."""
    m = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + m).to(tl.int64)
    id = tl.load(ids_ptr + m).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_d < tl.where(id >= 0, D, 0)
    q = tl.load(q_ptr + row * D + offs_d, mask=mask, other=0.0).to(tl.float64)
    d = tl.load(d_ptr + id * D + offs_d, mask=mask, other=0.0).to(tl.float64)
    x = q * d
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (2, BLOCK_D >> (level + 1))), 0)
    score = tl.sum(x, 0).to(tl.float32)
    tl.store(scores_ptr + m, tl.where(id >= 0, score, float("nan")))


@torch.library.custom_op("nemo_embed_core::pair_scores", mutates_args=())
def _pair_scores(q_QD: torch.Tensor, rows_M: torch.Tensor, d_ND: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
    q_QD, d_ND = q_QD.contiguous(), d_ND.contiguous()
    num_columns = q_QD.shape[1]
    scores = torch.empty(len(rows_M), dtype=torch.float32, device=q_QD.device)
    block_d = triton.next_power_of_2(num_columns)
    if len(rows_M):
        _pair_scores_kernel[(len(rows_M),)](
            q_QD, rows_M.contiguous(), d_ND, ids_M.contiguous(), scores,
            D=num_columns, BLOCK_D=block_d, LEVELS=block_d.bit_length() - 1, num_warps=_num_warps(block_d),
        )  # fmt: skip
    return scores


@_pair_scores.register_fake
def _(q_QD, rows_M, d_ND, ids_M):
    return q_QD.new_empty(len(rows_M), dtype=torch.float32)


def pair_scores_kernel(
    q_QD: torch.Tensor, rows_M: torch.Tensor, d_ND: torch.Tensor, ids_M: torch.Tensor
) -> torch.Tensor:
    return _pair_scores(q_QD, rows_M, d_ND, ids_M)


def pair_scores(q_QD: torch.Tensor, rows_M: torch.Tensor, d_ND: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
    """(q.double()[rows] * d.double()[ids]).sum(1).float(), summed as a tree of halves; NaN where the id is negative

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
            raise ValueError(f"pair_scores holds whole rows in registers: D={q_QD.shape[1]} is more than 16384")
        return pair_scores_kernel(q_QD, rows_M, d_ND, ids_M)
    return pair_scores_ref(q_QD, rows_M, d_ND, ids_M)
