"""Pieces of kernels that walk over a product of two matrices tile by tile."""

# B rows · P columns · D of the sum

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def score_tile(
    q, docs, first_row, first_column, B, P,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q[rows] @ docs[columns].T in fp32, [BLOCK_B, BLOCK_P]; rows and columns past the end hold anything
    finite.

    q, docs: tensor descriptors for the bulk copy engine (TMA), or pointers where rows are not multiples of 16
    bytes.
    """
    acc = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    if TMA:
        for d_start in range(0, D, BLOCK_D):
            rows = q.load([first_row, d_start])
            acc = tl.dot(rows, docs.load([first_column, d_start]).T, acc, input_precision=PRECISION)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        b = tl.minimum(first_row + tl.arange(0, BLOCK_B), B - 1).to(tl.int64)
        p = tl.minimum(first_column + tl.arange(0, BLOCK_P), P - 1).to(tl.int64)
        q_ptrs = q + b[:, None] * D + offs_d[None, :]
        docs_ptrs = docs + p[None, :] * D + offs_d[:, None]
        for d_start in range(0, D, BLOCK_D):
            rows = tl.load(q_ptrs + d_start, mask=(offs_d < D - d_start)[None, :], other=0.0)
            columns = tl.load(docs_ptrs + d_start, mask=(offs_d < D - d_start)[:, None], other=0.0)
            acc = tl.dot(rows, columns, acc, input_precision=PRECISION)
    return acc


@triton.jit
def halves(x):
    """The left and the right half of the columns of a tile: registers of the same thread, nothing moves."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def grouped(num_rows, num_others, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """-> this program's first row, and which of num_others pieces of the columns is its.

    All pieces of GROUP row blocks before the next row blocks: what runs at one time shares its rows and
    columns in L2.
    """
    group = tl.program_id(0) // (GROUP * num_others)
    group_size = tl.minimum(tl.cdiv(num_rows, BLOCK) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * num_others)
    return (group * GROUP + within % group_size) * BLOCK, within // group_size
