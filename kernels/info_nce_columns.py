"""InfoNCE of every query against all P columns: GEMM-bound. The contract and what is public stand in
info_nce.py.

Forward: tiles of scores with an online logsumexp (arXiv:1805.02867) over splits of the columns, 2 B P D FLOP.
Backward: one kernel recomputes the scores and writes d(scores) for as many columns at a time as fit a fixed
workspace; two plain GEMMs turn them into dq and ddocs: 6 B P D FLOP. Two kernels that each recompute their
own tiles would need 8 B P D and, at D = 4096, could not hold their sums on chip.
"""

# B queries · P columns: documents of the global batch · J documents that are right for a query too · D
# hidden_size S splits of the columns

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nemo_embed_core.kernels.info_nce_own import learned_or, without_empty_rows
from nemo_embed_core.kernels.tiles import grouped, halves, score_tile

# element size -> [(largest B, BLOCK_B, BLOCK_P, BLOCK_D, num_warps, num_stages)]. Timed on an H200: the bf16
# tile of many rows; the others by registers and shared memory (no spills, wgmma).
_COLUMNS = {
    2: [(16, 16, 64, 64, 4, 4), (64, 64, 64, 64, 4, 4), (2**62, 128, 256, 64, 8, 4)],
    4: [(16, 16, 64, 32, 4, 3), (64, 64, 64, 32, 4, 3), (2**62, 128, 128, 32, 8, 3)],
}
# Columns of a tile that are masked and exponentiated at a time; in the forward with document ids 128 would
# spill. With known ids, whose loop carries the mask beside the products, 64 would in both directions, and
# tiles of 256 columns whatever it is.
_PART, _PART_WITH_IDS, _PART_WITH_KNOWN = 128, 64, 32
_LARGEST_BLOCK_P_WITH_KNOWN = 128
_GROUP = 8  # row blocks side by side: 8 x 16 tiles on 132 SMs share their q and docs blocks through L2
_PROGRAMS = 528  # columns are split until the forward has about this many programs (four per SM)
_WORKSPACE = 512 * 2**20  # bytes of d(scores) at a time in the backward
_FP32_PRECISION = "tf32x3"  # fp32 on tensor cores, about 21 bits of mantissa; "ieee": all 24, on CUDA cores


@triton.jit
def _keep_scores(
    scores, rule, b, p, B, P,
    HAS_GROUPS: tl.constexpr, HAS_KNOWN: tl.constexpr, HAS_LIMITS: tl.constexpr,
):  # fmt: skip
    """Scores that count; the others at -1e30, whose exp is 0 and which may be multiplied by it, unlike -inf.

    rule: the rows' labels and groups, the columns' groups, the groups that a row knows, how many, and the
    largest score that counts.
    """
    label, row_group, groups_ptr, known_ptr, num_known, limit = rule
    keep = (b < B)[:, None] & (p < P)[None, :]
    if HAS_LIMITS:
        keep = keep & ((scores <= limit[:, None]) | (label[:, None] == p[None, :]))
    if HAS_GROUPS:
        group = tl.load(groups_ptr + p, mask=p < P, other=-1)
        other_document = group[None, :] != row_group[:, None]
        if HAS_KNOWN:
            for j in range(0, num_known):
                known = tl.load(known_ptr + b * num_known + j, mask=b < B, other=-2)
                other_document = other_document & (group[None, :] != known[:, None])
        other_document = other_document | (label[:, None] == p[None, :])
        keep = keep & (group >= 0)[None, :] & other_document
    return tl.where(keep, scores, -1e30)


@triton.jit
def _accumulate(
    products, sums, inverse_temperature, rule, b, first_column, B, P,
    HAS_LABELS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_KNOWN: tl.constexpr, HAS_LIMITS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """The online logsumexp, mean and positive score of rows b after the columns of this tile, PART of them at
    a time: the masks and exponentials of a whole tile do not fit beside its products."""
    WIDTH: tl.constexpr = products.shape[1]
    if WIDTH > PART:
        left, right = halves(products)
        sums = _accumulate(
            left, sums, inverse_temperature, rule, b, first_column, B, P,
            HAS_LABELS, HAS_GROUPS, HAS_KNOWN, HAS_LIMITS, PART,
        )  # fmt: skip
        sums = _accumulate(
            right, sums, inverse_temperature, rule, b, first_column + WIDTH // 2, B, P,
            HAS_LABELS, HAS_GROUPS, HAS_KNOWN, HAS_LIMITS, PART,
        )  # fmt: skip
    else:
        running_max, total, weighted, positive = sums
        p = first_column + tl.arange(0, WIDTH)
        scores = products * inverse_temperature
        if HAS_LABELS:
            positive += tl.sum(tl.where(rule[0][:, None] == p[None, :], scores, 0.0), 1)
        scores = _keep_scores(scores, rule, b, p, B, P, HAS_GROUPS, HAS_KNOWN, HAS_LIMITS)
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        shift = tl.where(new_max > -1e29, new_max, 0.0)  # nothing kept yet: exp(-1e30 - 0) is 0
        weights = tl.exp(scores - shift[:, None])
        rescale = tl.exp(running_max - shift)
        total = total * rescale + tl.sum(weights, 1)
        weighted = weighted * rescale + tl.sum(weights * scores, 1)
        sums = new_max, total, weighted, positive
    return sums


@triton.jit
def _columns_fwd_kernel(
    q, docs, labels_ptr, row_groups_ptr, groups_ptr, known_ptr, limits_ptr, temperature,
    lse_ptr, mean_ptr, positive_ptr, B, P, num_known, num_splits, tiles_per_split,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_KNOWN: tl.constexpr, HAS_LIMITS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, LEARNED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B rows x one split of the columns; partial lse, mean and positive score, [S, B]."""
    first_row, split = grouped(B, num_splits, BLOCK_B, GROUP)
    b = first_row + tl.arange(0, BLOCK_B)
    inverse_temperature = 1.0 / (tl.load(temperature) if LEARNED else temperature)
    label = tl.load(labels_ptr + b, mask=b < B, other=-1).to(tl.int32) if HAS_LABELS else b * 0 - 1
    row_group = tl.load(row_groups_ptr + b, mask=b < B, other=-1) if HAS_GROUPS else label
    limit = tl.load(limits_ptr + b, mask=b < B, other=0.0) * inverse_temperature if HAS_LIMITS else label
    rule = (label, row_group, groups_ptr, known_ptr, num_known, limit)
    zeros = tl.zeros((BLOCK_B,), tl.float32)
    sums = (zeros - 1e30, zeros, zeros, zeros)  # running maximum, total, weighted, positive
    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(P, BLOCK_P))
    for tile in range(split * tiles_per_split, last_tile):
        products = score_tile(
            q, docs, first_row, tile * BLOCK_P, B, P, D, BLOCK_B, BLOCK_P, BLOCK_D, TMA, PRECISION
        )
        sums = _accumulate(
            products, sums, inverse_temperature, rule, b, tile * BLOCK_P, B, P,
            HAS_LABELS, HAS_GROUPS, HAS_KNOWN, HAS_LIMITS, PART,
        )  # fmt: skip
    running_max, total, weighted, positive = sums
    out = split.to(tl.int64) * B + b
    tl.store(lse_ptr + out, tl.where(total > 0, running_max + tl.log(total), -float("inf")), mask=b < B)
    tl.store(mean_ptr + out, tl.where(total > 0, weighted / total, 0.0), mask=b < B)
    tl.store(positive_ptr + out, positive, mask=b < B)


@triton.jit
def _combine_kernel(
    split_lse_ptr, split_mean_ptr, split_positive_ptr, lse_ptr, mean_ptr, positive_ptr, B, num_splits,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B rows; their splits in order."""
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    mask = b < B
    running_max = tl.full((BLOCK_B,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    weighted = tl.zeros((BLOCK_B,), tl.float32)
    positive = tl.zeros((BLOCK_B,), tl.float32)
    for split in range(0, num_splits):
        offs = b + split * B
        lse = tl.load(split_lse_ptr + offs, mask=mask, other=-float("inf"))
        new_max = tl.maximum(running_max, lse)
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weight = tl.exp(lse - shift)
        rescale = tl.exp(running_max - shift)
        total = total * rescale + weight
        weighted = weighted * rescale + weight * tl.load(split_mean_ptr + offs, mask=mask, other=0.0)
        positive += tl.load(split_positive_ptr + offs, mask=mask, other=0.0)
        running_max = new_max
    tl.store(lse_ptr + b, tl.where(total > 0, running_max + tl.log(total), -float("inf")), mask=mask)
    tl.store(mean_ptr + b, tl.where(total > 0, weighted / total, 0.0), mask=mask)
    tl.store(positive_ptr + b, positive, mask=mask)


@triton.jit
def _store_dscores(
    products, dscores_ptr, dlse, dpositive, lse, inverse_temperature, rule,
    b, first_column, column, B, P, width, row_stride,
    HAS_LABELS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_KNOWN: tl.constexpr, HAS_LIMITS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """column: the tile's first one in dscores; PART columns at a time, as in _accumulate."""
    WIDTH: tl.constexpr = products.shape[1]
    if WIDTH > PART:
        left, right = halves(products)
        _store_dscores(
            left, dscores_ptr, dlse, dpositive, lse, inverse_temperature, rule,
            b, first_column, column, B, P, width, row_stride,
            HAS_LABELS, HAS_GROUPS, HAS_KNOWN, HAS_LIMITS, PART,
        )  # fmt: skip
        _store_dscores(
            right, dscores_ptr, dlse, dpositive, lse, inverse_temperature, rule,
            b, first_column + WIDTH // 2, column + WIDTH // 2, B, P, width, row_stride,
            HAS_LABELS, HAS_GROUPS, HAS_KNOWN, HAS_LIMITS, PART,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, WIDTH)
        p = first_column + tl.arange(0, WIDTH)
        scores = products * inverse_temperature
        scores = _keep_scores(scores, rule, b, p, B, P, HAS_GROUPS, HAS_KNOWN, HAS_LIMITS)
        dscores = tl.exp(scores - lse[:, None]) * (dlse * inverse_temperature)[:, None]
        if HAS_LABELS:
            dscores += tl.where(
                rule[0][:, None] == p[None, :], (dpositive * inverse_temperature)[:, None], 0.0
            )
        mask = (b < B)[:, None] & (columns < width)[None, :]
        dscores_ptrs = dscores_ptr + b.to(tl.int64)[:, None] * row_stride + columns[None, :]
        tl.store(dscores_ptrs, dscores.to(dscores_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _columns_dscores_kernel(
    dlse_ptr, dpositive_ptr, q, docs, labels_ptr, row_groups_ptr, groups_ptr, known_ptr, limits_ptr,
    temperature, lse_ptr, dscores_ptr, B, P, num_known, first_column, width, row_stride,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_KNOWN: tl.constexpr, HAS_LIMITS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, LEARNED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the gradient of the unscaled scores, in columns first_column .. first_column +
    width."""
    first_row, tile = grouped(B, tl.cdiv(width, BLOCK_P), BLOCK_B, GROUP)
    b = first_row + tl.arange(0, BLOCK_B)
    column = tile * BLOCK_P
    inverse_temperature = 1.0 / (tl.load(temperature) if LEARNED else temperature)
    products = score_tile(
        q, docs, first_row, first_column + column, B, P, D, BLOCK_B, BLOCK_P, BLOCK_D, TMA, PRECISION
    )  # fmt: skip
    label = tl.load(labels_ptr + b, mask=b < B, other=-1).to(tl.int32) if HAS_LABELS else b * 0 - 1
    row_group = tl.load(row_groups_ptr + b, mask=b < B, other=-1) if HAS_GROUPS else label
    limit = tl.load(limits_ptr + b, mask=b < B, other=0.0) * inverse_temperature if HAS_LIMITS else label
    rule = (label, row_group, groups_ptr, known_ptr, num_known, limit)
    lse = tl.load(lse_ptr + b, mask=b < B, other=0.0)
    # A row that no column counts for has lse -inf: with 0 its -1e30 scores give p = 0, not NaN; its gradient
    # may be NaN.
    dlse = tl.where(lse > -1e29, tl.load(dlse_ptr + b, mask=b < B, other=0.0), 0.0)
    lse = tl.where(lse > -1e29, lse, 0.0)
    dpositive = tl.load(dpositive_ptr + b, mask=b < B, other=0.0) if HAS_LABELS else dlse
    _store_dscores(
        products, dscores_ptr, dlse, dpositive, lse, inverse_temperature, rule, b,
        first_column + column, column, B, P, width, row_stride,
        HAS_LABELS, HAS_GROUPS, HAS_KNOWN, HAS_LIMITS, PART,
    )  # fmt: skip


def _columns_config(num_rows: int, element_size: int, has_known: bool) -> tuple[int, int, int, int, int]:
    for largest, block_b, block_p, block_d, num_warps, num_stages in _COLUMNS[element_size]:
        if num_rows <= largest:
            block_p = min(block_p, _LARGEST_BLOCK_P_WITH_KNOWN) if has_known else block_p
            return block_b, block_p, block_d, num_warps, num_stages
    raise AssertionError(f"{num_rows=}")


def _matmul_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b summed and kept in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _arguments(q_BD, docs_PD, temperature, constant: float, stand_in, *optional) -> tuple[tuple, int, dict]:
    """-> operands of the kernels of both directions, J, and what they are compiled for

    q and docs are descriptors for the bulk copy engine (TMA) where rows are multiples of 16 bytes. An absent
    tensor is never read; the kernels want a pointer all the same: stand_in.
    """
    labels_B, _, groups_P, known_groups_BJ, limits_B = optional
    has_known = known_groups_BJ is not None
    config = _columns_config(q_BD.shape[0], q_BD.element_size(), has_known)
    block_b, block_p, block_d, num_warps, num_stages = config
    tma = not any(x.shape[1] * x.element_size() % 16 or x.data_ptr() % 16 for x in (q_BD, docs_PD))
    q = TensorDescriptor.from_tensor(q_BD, [block_b, block_d]) if tma else q_BD
    docs = TensorDescriptor.from_tensor(docs_PD, [block_p, block_d]) if tma else docs_PD
    pointers = (stand_in if x is None else x.contiguous() for x in optional)
    constants = {
        "D": q_BD.shape[1], "BLOCK_B": block_b, "BLOCK_P": block_p, "BLOCK_D": block_d, "GROUP": _GROUP,
        "HAS_LABELS": labels_B is not None, "HAS_GROUPS": groups_P is not None, "HAS_KNOWN": has_known,
        "HAS_LIMITS": limits_B is not None,
        "TMA": tma, "PRECISION": _FP32_PRECISION, "LEARNED": temperature is not None,
        "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip
    num_known = known_groups_BJ.shape[1] if has_known else 0
    return (q, docs, *pointers, learned_or(temperature, constant)), num_known, constants


@torch.library.custom_op("nemo_embed_core::info_nce_columns_forward", mutates_args=())
def columns_fwd(
    q_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    temperature: torch.Tensor | None,
    constant: float,
    labels_B: torch.Tensor | None,
    row_groups_B: torch.Tensor | None,
    groups_P: torch.Tensor | None,
    known_groups_BJ: torch.Tensor | None,
    limits_B: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> lse [B] over the columns that count, score of the label's column [B] (0 without), mean [B]; fp32"""
    num_rows, num_columns = q_BD.shape[0], docs_PD.shape[0]
    lse_B, mean_B, positive_B = (q_BD.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    optional = labels_B, row_groups_B, groups_P, known_groups_BJ, limits_B
    operands, num_known, constants = _arguments(
        q_BD.contiguous(), docs_PD.contiguous(), temperature, constant, lse_B, *optional
    )
    row_blocks = triton.cdiv(num_rows, constants["BLOCK_B"])
    tiles = triton.cdiv(num_columns, constants["BLOCK_P"])
    # Few rows: more splits, to fill the GPU. Many rows: at least 11, so that a group of row blocks shares
    # columns.
    tiles_per_split = max(1, tiles // max(11, triton.cdiv(_PROGRAMS, max(1, row_blocks))))
    num_splits = triton.cdiv(tiles, tiles_per_split)
    part = _PART if groups_P is None else _PART_WITH_IDS
    splits = [q_BD.new_empty(num_splits, num_rows, dtype=torch.float32) for _ in range(3)]
    if num_rows:
        if num_columns:
            _columns_fwd_kernel[(row_blocks * num_splits,)](
                *operands, *splits, num_rows, num_columns, num_known, num_splits, tiles_per_split,
                **constants, PART=_PART_WITH_KNOWN if constants["HAS_KNOWN"] else part,
            )  # fmt: skip
        _combine_kernel[(triton.cdiv(num_rows, 128),)](
            *splits, lse_B, mean_B, positive_B, num_rows, num_splits, BLOCK_B=128, num_warps=4
        )
    return lse_B, positive_B, mean_B


@columns_fwd.register_fake
def _(q_BD, *_):
    return tuple(q_BD.new_empty(q_BD.shape[0], dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("nemo_embed_core::info_nce_columns_backward", mutates_args=())
def _columns_bwd(
    dlse_B: torch.Tensor,
    dpositive_B: torch.Tensor,
    q_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    temperature: torch.Tensor | None,
    constant: float,
    lse_B: torch.Tensor,
    labels_B: torch.Tensor | None,
    row_groups_B: torch.Tensor | None,
    groups_P: torch.Tensor | None,
    known_groups_BJ: torch.Tensor | None,
    limits_B: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> dq [B, D], ddocs [P, D]; d(scores) is rounded to the inputs' dtype, as in plain torch."""
    num_rows, num_columns = q_BD.shape[0], docs_PD.shape[0]
    if not num_rows or not num_columns:
        return torch.zeros_like(q_BD), torch.zeros_like(docs_PD)
    q_BD, docs_PD = q_BD.contiguous(), docs_PD.contiguous()
    optional = labels_B, row_groups_B, groups_P, known_groups_BJ, limits_B
    operands, num_known, constants = _arguments(q_BD, docs_PD, temperature, constant, lse_B, *optional)
    block_b, block_p = constants["BLOCK_B"], constants["BLOCK_P"]
    chunk = max(block_p, _WORKSPACE // (num_rows * q_BD.element_size()) // block_p * block_p)
    ddocs_PD, dq_BD = torch.empty_like(docs_PD), None
    # Rows start at multiples of 64 elements, whatever P is: GEMMs are slow on unaligned ones.
    row_stride = triton.cdiv(min(chunk, num_columns), 64) * 64
    workspace = q_BD.new_empty(num_rows, row_stride)
    for first in range(0, num_columns, chunk):
        width = min(chunk, num_columns - first)
        dscores = workspace[:, :width]
        _columns_dscores_kernel[(triton.cdiv(num_rows, block_b) * triton.cdiv(width, block_p),)](
            dlse_B.contiguous(), dpositive_B.contiguous(), *operands, lse_B, dscores,
            num_rows, num_columns, num_known, first, width, row_stride, **constants,
            PART=_PART_WITH_KNOWN if constants["HAS_KNOWN"] else _PART,
        )  # fmt: skip
        torch.mm(dscores.t(), q_BD, out=ddocs_PD[first : first + width])
        if width == num_columns:
            return torch.mm(dscores, docs_PD), ddocs_PD
        part_BD = _matmul_wide(dscores, docs_PD[first : first + width])
        dq_BD = part_BD if dq_BD is None else dq_BD.add_(part_BD)
    assert dq_BD is not None
    return dq_BD.to(q_BD.dtype), ddocs_PD


@_columns_bwd.register_fake
def _(dlse_B, dpositive_B, q_BD, docs_PD, *_):
    return q_BD.new_empty(q_BD.shape), docs_PD.new_empty(docs_PD.shape)


def _columns_setup_context(ctx, inputs, output):
    q_BD, docs_PD, temperature, ctx.constant, *optional = inputs
    ctx.save_for_backward(q_BD, docs_PD, temperature, *output, *optional)


def _columns_backward(ctx, dlse_B, dpositive_B, _):
    q_BD, docs_PD, temperature, lse_B, positive_B, mean_B, *optional = ctx.saved_tensors
    dq_BD, ddocs_PD = _columns_bwd(
        dlse_B, dpositive_B, q_BD, docs_PD, temperature, ctx.constant, lse_B, *optional
    )
    dtemperature = None
    if ctx.needs_input_grad[2]:
        dlse_B = without_empty_rows(dlse_B, lse_B)
        dtemperature = -(dlse_B * mean_B + dpositive_B * positive_B).sum() / temperature
    return dq_BD, ddocs_PD, dtemperature, *[None] * 6


columns_fwd.register_autograd(_columns_backward, setup_context=_columns_setup_context)
