"""InfoNCE without a matrix of logits: against a query's own documents, or against all passages of the global batch.

Contract: scores are dot products over D in fp32 (fp64 for fp64 inputs) divided by the temperature; losses are fp32, one per
query. At temperature 0.02 bf16 scores would leave 75 distinct logits of 1,280, so bf16 inputs are multiplied exactly and
summed in fp32. Rows are used as they come: pass unit rows for cosines. A query without a positive has loss 0 and gradient 0.
Documents masked out of a query's own list may hold anything, NaN too; passages with valid False must be finite.
No atomics: same input, same bits.

`own` kernels: a query against its own M documents, memory-bound: forward reads q and docs once, backward reads them once more
and writes their gradients once.

`columns` kernels: every query against all P columns, GEMM-bound. Forward: tiles of scores with an online logsumexp
(arXiv:1805.02867) over splits of the columns, 2 B P D FLOP. Backward: one kernel recomputes the scores and writes d(scores)
for as many columns at a time as fit a fixed workspace; two plain GEMMs turn them into dq and ddocs: 6 B P D FLOP.
Two kernels that each recompute their own tiles would need 8 B P D and, at D = 4096, could not hold their sums on chip.
"""

# B queries · M documents of one query (positive first) · P columns: passages of the global batch · K extra documents of one
# query · J documents that are right for a query too · D hidden_size · S splits of the columns

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _own_scores_ref(q_BD: torch.Tensor, docs_BMD: torch.Tensor, mask_BM: torch.Tensor, normalize: bool) -> torch.Tensor:
    q_BD, docs_BMD = _wide(q_BD), _wide(docs_BMD).masked_fill(~mask_BM[..., None], 0.0)
    if normalize:
        q_BD, docs_BMD = F.normalize(q_BD, dim=-1), F.normalize(docs_BMD, dim=-1)
    return torch.bmm(docs_BMD, q_BD[..., None]).squeeze(-1)


def _masked_logsumexp_ref(scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """logsumexp over the kept columns, -inf where none is kept; plain logsumexp has a NaN gradient there."""
    any_kept = keep.any(1)
    return scores.masked_fill(~keep & any_kept[:, None], -math.inf).logsumexp(1).masked_fill(~any_kept, -math.inf)


def _column_scores_ref(q_BD, docs_PD, temperature, labels_B, row_ids_B, doc_ids_P, valid_P, known_ids_BJ=None):
    """-> scores [B, P], and which of them count"""
    keep_BP = torch.ones(q_BD.shape[0], docs_PD.shape[0], dtype=torch.bool, device=q_BD.device)
    if row_ids_B is not None:
        keep_BP &= row_ids_B[:, None] != doc_ids_P
        for known_ids_B in () if known_ids_BJ is None else known_ids_BJ.unbind(1):
            keep_BP &= known_ids_B[:, None] != doc_ids_P
        if labels_B is not None:
            keep_BP |= labels_B[:, None] == torch.arange(docs_PD.shape[0], device=q_BD.device)
    if valid_P is not None:
        keep_BP &= valid_P
    return _wide(q_BD) @ _wide(docs_PD).T / temperature, keep_BP


def info_nce_hard_ref(
    q_BD: torch.Tensor,
    docs_BMD: torch.Tensor,
    mask_BM: torch.Tensor,
    temperature: float | torch.Tensor,
    normalize: bool = False,
) -> torch.Tensor:
    scores_BM = _own_scores_ref(q_BD, docs_BMD, mask_BM, normalize)
    # Relative to the positive before the logsumexp: a loss of 1e-6 is then not the difference of two numbers near 50.
    scores_BM = (scores_BM - scores_BM[:, :1]) / temperature
    return scores_BM.masked_fill(~mask_BM & mask_BM[:, :1], -math.inf).logsumexp(1).masked_fill(~mask_BM[:, 0], 0.0)


def in_batch_logsumexp_ref(
    rows_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    temperature: float | torch.Tensor,
    row_ids_B: torch.Tensor | None = None,
    doc_ids_P: torch.Tensor | None = None,
    valid_P: torch.Tensor | None = None,
) -> torch.Tensor:
    scores_and_keep = _column_scores_ref(rows_BD, docs_PD, temperature, None, row_ids_B, doc_ids_P, valid_P)
    return _masked_logsumexp_ref(*scores_and_keep)


def info_nce_in_batch_ref(
    q_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    labels_B: torch.Tensor,
    temperature: float | torch.Tensor,
    doc_ids_P: torch.Tensor | None = None,
    valid_P: torch.Tensor | None = None,
    own_docs_BKD: torch.Tensor | None = None,
    own_mask_BK: torch.Tensor | None = None,
    extra_lse_B: torch.Tensor | None = None,
    known_ids_BJ: torch.Tensor | None = None,
) -> torch.Tensor:
    label_B, row_ids_B, has_positive_B = _positives(labels_B, doc_ids_P, valid_P)
    scores_BP, keep_BP = _column_scores_ref(
        q_BD, docs_PD, temperature, labels_B, row_ids_B, doc_ids_P, valid_P, known_ids_BJ
    )
    lse_B, positive_B = _masked_logsumexp_ref(scores_BP, keep_BP), scores_BP.gather(1, label_B[:, None]).squeeze(1)
    own_lse_B = None
    if own_docs_BKD is not None:
        own_mask_BK = _own_mask(own_docs_BKD, own_mask_BK)
        own_lse_B = _masked_logsumexp_ref(
            _own_scores_ref(q_BD, own_docs_BKD, own_mask_BK, normalize=False) / temperature, own_mask_BK
        )
    return _join(lse_B, positive_B, has_positive_B, own_lse_B, extra_lse_B)


def _positives(labels_B, doc_ids_P, valid_P):
    """-> labels that are safe as indices, the document id of each row's positive, which rows have a positive"""
    label_B = labels_B.clamp(min=0)
    has_positive_B = labels_B >= 0 if valid_P is None else (labels_B >= 0) & valid_P[label_B]
    return label_B, None if doc_ids_P is None else doc_ids_P[label_B], has_positive_B


def _own_mask(own_docs_BKD: torch.Tensor, own_mask_BK: torch.Tensor | None) -> torch.Tensor:
    return own_docs_BKD.new_ones(own_docs_BKD.shape[:2], dtype=torch.bool) if own_mask_BK is None else own_mask_BK


def _join(lse_B, positive_B, has_positive_B, own_lse_B, extra_lse_B) -> torch.Tensor:
    """logsumexp over all terms of a row minus its positive score; 0 for a row without a positive."""
    # Such rows first, not only last: logaddexp(-inf, -inf) has a NaN gradient, and 0 * NaN would reach the inputs.
    lse_B = lse_B.masked_fill(~has_positive_B, 0.0)
    for more_B in (own_lse_B, extra_lse_B):
        if more_B is not None:
            lse_B = torch.logaddexp(lse_B, more_B.masked_fill(~has_positive_B, 0.0))
    return (lse_B - positive_B).masked_fill(~has_positive_B, 0.0)


# A warp holds all BLOCK_M documents of its 256 columns, so that the sums over documents stay within threads: any other
# division took twice the time.
_OWN_FORWARD = (8, 2048, 8)  # largest BLOCK_M, largest BLOCK_D, num_warps
_OWN_BACKWARD = (8, 4096, 16)  # all columns at once: fewer loads that wait for those before
# element size -> [(largest B, BLOCK_B, BLOCK_P, BLOCK_D, num_warps, num_stages)]. Timed on an H200: the bf16 tile of many rows;
# the others by registers and shared memory (no spills, wgmma).
_COLUMNS = {
    2: [(16, 16, 64, 64, 4, 4), (64, 64, 64, 64, 4, 4), (2**62, 128, 256, 64, 8, 4)],
    4: [(16, 16, 64, 32, 4, 3), (64, 64, 64, 32, 4, 3), (2**62, 128, 128, 32, 8, 3)],
}
# Columns of a tile that are masked and exponentiated at a time; in the forward with document ids 128 would spill. With known
# ids, whose loop carries the mask beside the products, 64 would in both directions, and tiles of 256 columns whatever it is.
_PART, _PART_WITH_IDS, _PART_WITH_KNOWN = 128, 64, 32
_LARGEST_BLOCK_P_WITH_KNOWN = 128
_GROUP = 8  # row blocks that run side by side: 8 x 16 tiles on 132 SMs share their q and docs blocks through L2
_PROGRAMS = 528  # splits of the columns are added until the forward has about this many programs (four per SM)
_WORKSPACE = 512 * 2**20  # bytes of d(scores) at a time in the backward
_FP32_PRECISION = "tf32x3"  # fp32 on tensor cores, about 21 bits of mantissa; "ieee": all 24, on CUDA cores


@triton.jit
def _own_fwd_kernel(
    q_ptr, docs_ptr, mask_ptr, temperature,
    lse_ptr, mean_ptr, scores_ptr, q_inverse_ptr, docs_inverse_ptr,
    M: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    RELATIVE: tl.constexpr, NORMALIZE: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """One program: one query. RELATIVE: scores relative to document 0, the positive; without it the row is 0.

    lse = logsumexp(s), mean = sum(softmax(s) s), of which d(lse)/d(temperature) = -mean / temperature.
    """
    b = tl.program_id(0).to(tl.int64)
    inverse_temperature = 1.0 / (tl.load(temperature) if LEARNED else temperature)
    offs_m = tl.arange(0, BLOCK_M)
    running_max = -float("inf")
    total = 0.0
    weighted = 0.0
    positive = 0.0
    has_positive = tl.load(mask_ptr + b * M) != 0
    q_inverse = 1.0
    for m_start in range(0, M, BLOCK_M):
        m = m_start + offs_m
        mask_m = tl.load(mask_ptr + b * M + m, mask=m < M, other=0) != 0
        # Products are summed over the threads once, behind the loads of all columns.
        products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        q_squares = tl.zeros((BLOCK_D,), tl.float32)
        doc_squares = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for d_start in tl.static_range(0, D, BLOCK_D):
            offs_d = d_start + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            q = tl.load(q_ptr + b * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            docs = tl.load(
                docs_ptr + (b * M + m)[:, None] * D + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0
            ).to(tl.float32)
            products += docs * q[None, :]
            if NORMALIZE:
                q_squares += q * q
                doc_squares += docs * docs
        dots = tl.sum(products, 1)
        if NORMALIZE:
            q_inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(q_squares, 0)), 1e-12)
            doc_inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(doc_squares, 1)), 1e-12)
            tl.store(docs_inverse_ptr + b * M + m, doc_inverse, mask=m < M)
            dots *= q_inverse * doc_inverse
        tl.store(scores_ptr + b * M + m, dots, mask=m < M)
        if RELATIVE:
            if m_start == 0:
                positive = tl.sum(tl.where(offs_m == 0, dots, 0.0), 0)
            dots -= positive
        scores = dots * inverse_temperature
        block_max = tl.max(tl.where(mask_m, scores, -float("inf")), 0)
        new_max = tl.maximum(running_max, block_max)
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.where(mask_m, tl.exp(scores - shift), 0.0)
        rescale = tl.exp(running_max - shift)
        total = total * rescale + tl.sum(p, 0)
        weighted = weighted * rescale + tl.sum(p * scores, 0)
        running_max = new_max
    lse = tl.where(total > 0, running_max + tl.log(total), -float("inf"))
    mean = tl.where(total > 0, weighted / total, 0.0)
    if RELATIVE:
        lse = tl.where(has_positive, lse, 0.0)
        mean = tl.where(has_positive, mean, 0.0)
    if NORMALIZE:
        tl.store(q_inverse_ptr + b, q_inverse)
    tl.store(lse_ptr + b, lse)
    tl.store(mean_ptr + b, mean)


@triton.jit
def _own_coefficients(
    dlse_ptr, mask_ptr, scores_ptr, lse_ptr, docs_inverse_ptr, inverse_temperature, q_inverse, b, m, M: tl.constexpr,
    RELATIVE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """-> of documents m of row b, 0 for those that do not exist: is it there, the factor between its row and q's gradient
    and the other way round, the share of its own direction that its gradient loses, and that of q's"""
    mask_m = tl.load(mask_ptr + b * M + m, mask=m < M, other=0) != 0
    there = mask_m
    dots = tl.load(scores_ptr + b * M + m, mask=m < M, other=0.0)
    relative = dots
    if RELATIVE:
        there = there & (tl.load(mask_ptr + b * M) != 0)
        relative -= tl.load(scores_ptr + b * M)
    p = tl.exp(relative * inverse_temperature - tl.load(lse_ptr + b))
    if RELATIVE:
        p -= tl.where(m == 0, 1.0, 0.0)
    c = tl.where(there, tl.load(dlse_ptr + b) * p * inverse_temperature, 0.0)
    radial = c * dots
    radial_doc = radial
    if NORMALIZE:
        doc_inverse = tl.load(docs_inverse_ptr + b * M + m, mask=m < M, other=0.0)
        radial_doc = radial * doc_inverse * doc_inverse
        c *= q_inverse * doc_inverse
    return mask_m, c, radial_doc, radial


@triton.jit
def _own_bwd_kernel(
    dlse_ptr, q_ptr, docs_ptr, mask_ptr, temperature, lse_ptr, scores_ptr, q_inverse_ptr, docs_inverse_ptr,
    dq_ptr, ddocs_ptr,
    M: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    RELATIVE: tl.constexpr, NORMALIZE: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """One program: one query. With c the gradients of its scores s (cosines if NORMALIZE, a and d_m the inverse norms):

    dq = sum_m c_m doc_m,                                  ddoc_m = c_m q                                    or
    dq = sum_m (c_m a d_m) doc_m - (a^2 sum_m c_m s_m) q,  ddoc_m = (c_m a d_m) q - (c_m s_m d_m^2) doc_m.
    """
    b = tl.program_id(0).to(tl.int64)
    inverse_temperature = 1.0 / (tl.load(temperature) if LEARNED else temperature)
    offs_m = tl.arange(0, BLOCK_M)
    q_inverse = tl.load(q_inverse_ptr + b) if NORMALIZE else 1.0
    # Once where one block holds all documents, so that no load of a row waits for them; else again for every block.
    mask_m, c, radial_doc, radial = _own_coefficients(
        dlse_ptr, mask_ptr, scores_ptr, lse_ptr, docs_inverse_ptr, inverse_temperature, q_inverse,
        b, offs_m, M, RELATIVE, NORMALIZE,
    )  # fmt: skip
    radial_q = 0.0
    if NORMALIZE:
        radial_q = tl.sum(radial, 0)
        for m_start in range(BLOCK_M, M, BLOCK_M):
            _, _, _, radial = _own_coefficients(
                dlse_ptr, mask_ptr, scores_ptr, lse_ptr, docs_inverse_ptr, inverse_temperature, q_inverse,
                b, m_start + offs_m, M, RELATIVE, NORMALIZE,
            )  # fmt: skip
            radial_q += tl.sum(radial, 0)
        radial_q *= q_inverse * q_inverse
    for d_start in tl.static_range(0, D, BLOCK_D):
        offs_d = d_start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        q = tl.load(q_ptr + b * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        dq = -radial_q * q
        for m_start in range(0, M, BLOCK_M):
            m = m_start + offs_m
            if M > BLOCK_M:
                mask_m, c, radial_doc, _ = _own_coefficients(
                    dlse_ptr, mask_ptr, scores_ptr, lse_ptr, docs_inverse_ptr, inverse_temperature, q_inverse,
                    b, m, M, RELATIVE, NORMALIZE,
                )  # fmt: skip
            offs = (b * M + m)[:, None] * D + offs_d[None, :]
            docs = tl.load(docs_ptr + offs, mask=mask_m[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
            ddocs = c[:, None] * q[None, :]
            if NORMALIZE:
                ddocs -= radial_doc[:, None] * docs
            dq += tl.sum(c[:, None] * docs, 0)
            tl.store(ddocs_ptr + offs, ddocs.to(ddocs_ptr.dtype.element_ty), mask=(m < M)[:, None] & mask_d[None, :])
        tl.store(dq_ptr + b * D + offs_d, dq.to(dq_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _score_tile(
    q, docs, first_row, first_column, B, P,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q[rows] @ docs[columns].T in fp32, [BLOCK_B, BLOCK_P]; rows and columns past the end hold anything finite.

    q, docs: tensor descriptors for the bulk copy engine (TMA), or pointers where rows are not multiples of 16 bytes.
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
def _keep_scores(
    scores, label, row_group, groups_ptr, known_ptr, num_known, b, p, B, P, HAS_GROUPS: tl.constexpr,
    HAS_KNOWN: tl.constexpr,
):  # fmt: skip
    """Scores that count; the others at -1e30, whose exp is 0 and which, unlike -inf, may be multiplied by it."""
    keep = (b < B)[:, None] & (p < P)[None, :]
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
    products, running_max, total, weighted, positive, inverse_temperature, label, row_group, groups_ptr, known_ptr,
    num_known, b, first_column, B, P, HAS_LABELS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_KNOWN: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """The online logsumexp, mean and positive score of rows b after the columns of this tile, PART of them at a time: the
    masks and exponentials of a whole tile do not fit beside its products."""
    WIDTH: tl.constexpr = products.shape[1]
    if WIDTH > PART:
        left, right = halves(products)
        running_max, total, weighted, positive = _accumulate(
            left, running_max, total, weighted, positive, inverse_temperature, label, row_group, groups_ptr, known_ptr,
            num_known, b, first_column, B, P, HAS_LABELS, HAS_GROUPS, HAS_KNOWN, PART,
        )  # fmt: skip
        running_max, total, weighted, positive = _accumulate(
            right, running_max, total, weighted, positive, inverse_temperature, label, row_group, groups_ptr, known_ptr,
            num_known, b, first_column + WIDTH // 2, B, P, HAS_LABELS, HAS_GROUPS, HAS_KNOWN, PART,
        )  # fmt: skip
    else:
        p = first_column + tl.arange(0, WIDTH)
        scores = products * inverse_temperature
        if HAS_LABELS:
            positive += tl.sum(tl.where(label[:, None] == p[None, :], scores, 0.0), 1)
        scores = _keep_scores(
            scores, label, row_group, groups_ptr, known_ptr, num_known, b, p, B, P, HAS_GROUPS, HAS_KNOWN
        )
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        shift = tl.where(new_max > -1e29, new_max, 0.0)  # nothing kept yet: exp(-1e30 - 0) is 0
        weights = tl.exp(scores - shift[:, None])
        rescale = tl.exp(running_max - shift)
        total = total * rescale + tl.sum(weights, 1)
        weighted = weighted * rescale + tl.sum(weights * scores, 1)
        running_max = new_max
    return running_max, total, weighted, positive


@triton.jit
def _columns_fwd_kernel(
    q, docs, labels_ptr, row_groups_ptr, groups_ptr, known_ptr, temperature,
    lse_ptr, mean_ptr, positive_ptr, B, P, num_known, num_splits, tiles_per_split,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_KNOWN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    LEARNED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B rows x one split of the columns; partial lse, mean and positive score, [S, B]."""
    # All splits of GROUP row blocks before the next row blocks: what runs at one time shares its rows and columns in L2.
    group = tl.program_id(0) // (GROUP * num_splits)
    group_size = tl.minimum(tl.cdiv(B, BLOCK_B) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * num_splits)
    split = within // group_size
    first_row = (group * GROUP + within % group_size) * BLOCK_B
    b = first_row + tl.arange(0, BLOCK_B)
    inverse_temperature = 1.0 / (tl.load(temperature) if LEARNED else temperature)
    label = tl.load(labels_ptr + b, mask=b < B, other=-1).to(tl.int32) if HAS_LABELS else b * 0 - 1
    row_group = tl.load(row_groups_ptr + b, mask=b < B, other=-1) if HAS_GROUPS else label
    running_max = tl.full((BLOCK_B,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    weighted = tl.zeros((BLOCK_B,), tl.float32)
    positive = tl.zeros((BLOCK_B,), tl.float32)
    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(P, BLOCK_P))
    for tile in range(split * tiles_per_split, last_tile):
        products = _score_tile(q, docs, first_row, tile * BLOCK_P, B, P, D, BLOCK_B, BLOCK_P, BLOCK_D, TMA, PRECISION)
        running_max, total, weighted, positive = _accumulate(
            products, running_max, total, weighted, positive, inverse_temperature, label, row_group, groups_ptr, known_ptr,
            num_known, b, tile * BLOCK_P, B, P, HAS_LABELS, HAS_GROUPS, HAS_KNOWN, PART,
        )  # fmt: skip
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
    products, dscores_ptr, dlse, dpositive, lse, inverse_temperature, label, row_group, groups_ptr, known_ptr, num_known, b,
    first_column, column, B, P, width, row_stride, HAS_LABELS: tl.constexpr, HAS_GROUPS: tl.constexpr,
    HAS_KNOWN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """column: the tile's first one in dscores; PART columns at a time, as in _accumulate."""
    WIDTH: tl.constexpr = products.shape[1]
    if WIDTH > PART:
        left, right = halves(products)
        _store_dscores(
            left, dscores_ptr, dlse, dpositive, lse, inverse_temperature, label, row_group, groups_ptr, known_ptr, num_known,
            b, first_column, column, B, P, width, row_stride, HAS_LABELS, HAS_GROUPS, HAS_KNOWN, PART,
        )  # fmt: skip
        _store_dscores(
            right, dscores_ptr, dlse, dpositive, lse, inverse_temperature, label, row_group, groups_ptr, known_ptr, num_known,
            b, first_column + WIDTH // 2, column + WIDTH // 2, B, P, width, row_stride, HAS_LABELS, HAS_GROUPS, HAS_KNOWN,
            PART,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, WIDTH)
        p = first_column + tl.arange(0, WIDTH)
        scores = products * inverse_temperature
        scores = _keep_scores(
            scores, label, row_group, groups_ptr, known_ptr, num_known, b, p, B, P, HAS_GROUPS, HAS_KNOWN
        )
        dscores = tl.exp(scores - lse[:, None]) * (dlse * inverse_temperature)[:, None]
        if HAS_LABELS:
            dscores += tl.where(label[:, None] == p[None, :], (dpositive * inverse_temperature)[:, None], 0.0)
        mask = (b < B)[:, None] & (columns < width)[None, :]
        dscores_ptrs = dscores_ptr + b.to(tl.int64)[:, None] * row_stride + columns[None, :]
        tl.store(dscores_ptrs, dscores.to(dscores_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _columns_dscores_kernel(
    dlse_ptr, dpositive_ptr, q, docs, labels_ptr, row_groups_ptr, groups_ptr, known_ptr, temperature, lse_ptr,
    dscores_ptr, B, P, num_known, first_column, width, row_stride,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_KNOWN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    LEARNED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the gradient of the unscaled scores, in columns first_column .. first_column + width."""
    num_tiles = tl.cdiv(width, BLOCK_P)
    group = tl.program_id(0) // (GROUP * num_tiles)
    group_size = tl.minimum(tl.cdiv(B, BLOCK_B) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * num_tiles)
    first_row = (group * GROUP + within % group_size) * BLOCK_B
    b = first_row + tl.arange(0, BLOCK_B)
    column = (within // group_size) * BLOCK_P
    inverse_temperature = 1.0 / (tl.load(temperature) if LEARNED else temperature)
    products = _score_tile(
        q, docs, first_row, first_column + column, B, P, D, BLOCK_B, BLOCK_P, BLOCK_D, TMA, PRECISION
    )  # fmt: skip
    label = tl.load(labels_ptr + b, mask=b < B, other=-1).to(tl.int32) if HAS_LABELS else b * 0 - 1
    row_group = tl.load(row_groups_ptr + b, mask=b < B, other=-1) if HAS_GROUPS else label
    lse = tl.load(lse_ptr + b, mask=b < B, other=0.0)
    # A row that no column counts for has lse -inf: with 0 its -1e30 scores give p = 0, not NaN; its gradient may be NaN.
    dlse = tl.where(lse > -1e29, tl.load(dlse_ptr + b, mask=b < B, other=0.0), 0.0)
    lse = tl.where(lse > -1e29, lse, 0.0)
    dpositive = tl.load(dpositive_ptr + b, mask=b < B, other=0.0) if HAS_LABELS else dlse
    _store_dscores(
        products, dscores_ptr, dlse, dpositive, lse, inverse_temperature, label, row_group, groups_ptr, known_ptr, num_known, b,
        first_column + column, column, B, P, width, row_stride, HAS_LABELS, HAS_GROUPS, HAS_KNOWN, PART,
    )  # fmt: skip


def _own_config(config: tuple[int, int, int], num_documents: int, hidden_size: int) -> tuple[int, int, int]:
    block_m, block_d, num_warps = config
    return (
        min(block_m, triton.next_power_of_2(num_documents)),
        min(block_d, max(16, triton.next_power_of_2(hidden_size))),
        num_warps,
    )


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


@torch.library.custom_op("nemo_embed_core::info_nce_own_forward", mutates_args=())
def _own_fwd(
    q_BD: torch.Tensor,
    docs_BMD: torch.Tensor,
    mask_BM: torch.Tensor,
    temperature: torch.Tensor | None,
    constant: float,
    relative: bool,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> lse [B], mean [B], scores [B, M], inverse norms of q [B] and docs [B, M] (with normalize); all fp32

    temperature: a learned one, or None for `constant`, which saves the launch that would put a number into a tensor.
    """
    num_rows, num_documents, hidden_size = docs_BMD.shape
    block_m, block_d, num_warps = _own_config(_OWN_FORWARD, num_documents, hidden_size)
    lse_B, mean_B = (q_BD.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    scores_BM = q_BD.new_empty(num_rows, num_documents, dtype=torch.float32)
    q_inverse_B = q_BD.new_empty(num_rows if normalize else 0, dtype=torch.float32)
    docs_inverse_BM = q_BD.new_empty(num_rows if normalize else 0, num_documents, dtype=torch.float32)
    if num_rows:
        _own_fwd_kernel[(num_rows,)](
            q_BD.contiguous(), docs_BMD.contiguous(), mask_BM.contiguous().view(torch.uint8), _learned_or(temperature, constant),
            lse_B, mean_B, scores_BM, q_inverse_B, docs_inverse_BM,
            M=num_documents, D=hidden_size, BLOCK_M=block_m, BLOCK_D=block_d,
            RELATIVE=relative, NORMALIZE=normalize, LEARNED=temperature is not None, num_warps=num_warps,
        )  # fmt: skip
    return lse_B, mean_B, scores_BM, q_inverse_B, docs_inverse_BM


@_own_fwd.register_fake
def _(q_BD, docs_BMD, mask_BM, temperature, constant, relative, normalize):
    num_rows, num_documents, _ = docs_BMD.shape
    wide = [(num_rows,), (num_rows,), (num_rows, num_documents)]
    wide += [(num_rows if normalize else 0,), (num_rows if normalize else 0, num_documents)]
    return tuple(q_BD.new_empty(shape, dtype=torch.float32) for shape in wide)


@torch.library.custom_op("nemo_embed_core::info_nce_own_backward", mutates_args=())
def _own_bwd(
    dlse_B: torch.Tensor,
    q_BD: torch.Tensor,
    docs_BMD: torch.Tensor,
    mask_BM: torch.Tensor,
    temperature: torch.Tensor | None,
    constant: float,
    lse_B: torch.Tensor,
    scores_BM: torch.Tensor,
    q_inverse_B: torch.Tensor,
    docs_inverse_BM: torch.Tensor,
    relative: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> dq [B, D], ddocs [B, M, D]"""
    num_rows, num_documents, hidden_size = docs_BMD.shape
    block_m, block_d, num_warps = _own_config(_OWN_BACKWARD, num_documents, hidden_size)
    q_BD, docs_BMD = q_BD.contiguous(), docs_BMD.contiguous()
    dq_BD, ddocs_BMD = torch.empty_like(q_BD), torch.empty_like(docs_BMD)
    if num_rows:
        _own_bwd_kernel[(num_rows,)](
            dlse_B.contiguous(), q_BD, docs_BMD, mask_BM.contiguous().view(torch.uint8), _learned_or(temperature, constant), lse_B, scores_BM,
            q_inverse_B, docs_inverse_BM, dq_BD, ddocs_BMD,
            M=num_documents, D=hidden_size, BLOCK_M=block_m, BLOCK_D=block_d,
            RELATIVE=relative, NORMALIZE=q_inverse_B.numel() > 0, LEARNED=temperature is not None, num_warps=num_warps,
        )  # fmt: skip
    return dq_BD, ddocs_BMD


@_own_bwd.register_fake
def _(dlse_B, q_BD, docs_BMD, mask_BM, temperature, constant, lse_B, scores_BM, q_inverse_B, docs_inverse_BM, relative):
    return q_BD.new_empty(q_BD.shape), docs_BMD.new_empty(docs_BMD.shape)


def _own_setup_context(ctx, inputs, output):
    *tensors, temperature, ctx.constant, ctx.relative, _ = inputs
    lse_B, mean_B, *rest = output
    ctx.set_materialize_grads(False)  # zeros for outputs that nobody differentiates would be launches
    ctx.save_for_backward(*tensors, temperature, lse_B, mean_B, *rest)


def _without_empty_rows(dlse_B: torch.Tensor, lse_B: torch.Tensor) -> torch.Tensor:
    """0 where no column is left: torch.logaddexp(-inf, -inf) hands back NaN. The backward kernels do the same in passing,
    since this costs four launches, nearly the time of the hard loss of 128 queries."""
    return dlse_B.masked_fill(lse_B == -math.inf, 0.0)


def _own_backward(ctx, dlse_B, *_):
    if dlse_B is None:
        return (None,) * 7
    q_BD, docs_BMD, mask_BM, temperature, lse_B, mean_B, *rest = ctx.saved_tensors
    dq_BD, ddocs_BMD = _own_bwd(dlse_B, q_BD, docs_BMD, mask_BM, temperature, ctx.constant, lse_B, *rest, ctx.relative)
    dtemperature = None
    if ctx.needs_input_grad[3]:
        dtemperature = -(_without_empty_rows(dlse_B, lse_B) * mean_B).sum() / temperature
    return dq_BD, ddocs_BMD, None, dtemperature, None, None, None


_own_fwd.register_autograd(_own_backward, setup_context=_own_setup_context)


@torch.library.custom_op("nemo_embed_core::info_nce_columns_forward", mutates_args=())
def _columns_fwd(
    q_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    temperature: torch.Tensor | None,
    constant: float,
    labels_B: torch.Tensor | None,
    row_groups_B: torch.Tensor | None,
    groups_P: torch.Tensor | None,
    known_groups_BJ: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> lse [B] over the columns that count, score of the label's column [B] (0 without), mean [B]; all fp32"""
    num_rows, hidden_size = q_BD.shape
    num_columns = docs_PD.shape[0]
    has_known = known_groups_BJ is not None
    block_b, block_p, block_d, num_warps, num_stages = _columns_config(num_rows, q_BD.element_size(), has_known)
    row_blocks, tiles = triton.cdiv(num_rows, block_b), triton.cdiv(num_columns, block_p)
    # Few rows: more splits, to fill the GPU. Many rows: at least 11, so that a group of row blocks shares columns.
    tiles_per_split = max(1, tiles // max(11, triton.cdiv(_PROGRAMS, max(1, row_blocks))))
    num_splits = triton.cdiv(tiles, tiles_per_split)
    lse_SB, mean_SB, positive_SB = (q_BD.new_empty(num_splits, num_rows, dtype=torch.float32) for _ in range(3))
    lse_B, mean_B, positive_B = (q_BD.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    if num_rows:
        if num_columns:
            q, docs, tma = _operands(q_BD.contiguous(), docs_PD.contiguous(), block_b, block_p, block_d)
            _columns_fwd_kernel[(row_blocks * num_splits,)](
                q, docs, *_or_unread(lse_B, labels_B, row_groups_B, groups_P, known_groups_BJ), _learned_or(temperature, constant),
                lse_SB, mean_SB, positive_SB, num_rows, num_columns, _num_known(known_groups_BJ), num_splits, tiles_per_split,
                D=hidden_size, BLOCK_B=block_b, BLOCK_P=block_p, BLOCK_D=block_d, GROUP=_GROUP,
                HAS_LABELS=labels_B is not None, HAS_GROUPS=groups_P is not None,
                HAS_KNOWN=has_known, TMA=tma, PRECISION=_FP32_PRECISION, LEARNED=temperature is not None, PART=_PART_WITH_KNOWN if has_known else _PART if groups_P is None else _PART_WITH_IDS,
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        _combine_kernel[(triton.cdiv(num_rows, 128),)](
            lse_SB, mean_SB, positive_SB, lse_B, mean_B, positive_B, num_rows, num_splits, BLOCK_B=128, num_warps=4
        )
    return lse_B, positive_B, mean_B


def _operands(q_BD: torch.Tensor, docs_PD: torch.Tensor, block_b: int, block_p: int, block_d: int) -> tuple:
    """-> q, docs as the columns kernels take them, and whether as descriptors for the bulk copy engine (TMA)"""
    if any(x.shape[1] * x.element_size() % 16 or x.data_ptr() % 16 for x in (q_BD, docs_PD)):
        return q_BD, docs_PD, False
    q = TensorDescriptor.from_tensor(q_BD, [block_b, block_d])
    return q, TensorDescriptor.from_tensor(docs_PD, [block_p, block_d]), True


def _or_unread(stand_in: torch.Tensor, *optional: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """An absent tensor is never read; the kernels want a pointer all the same."""
    return tuple(stand_in if x is None else x.contiguous() for x in optional)


@_columns_fwd.register_fake
def _(q_BD, docs_PD, temperature, constant, labels_B, row_groups_B, groups_P, known_groups_BJ):
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> dq [B, D], ddocs [P, D]. d(scores) is rounded to the inputs' dtype, as autograd does in plain torch."""
    num_rows, hidden_size = q_BD.shape
    num_columns = docs_PD.shape[0]
    if not num_rows or not num_columns:
        return torch.zeros_like(q_BD), torch.zeros_like(docs_PD)
    has_known = known_groups_BJ is not None
    block_b, block_p, block_d, num_warps, num_stages = _columns_config(num_rows, q_BD.element_size(), has_known)
    q_BD, docs_PD = q_BD.contiguous(), docs_PD.contiguous()
    q, docs, tma = _operands(q_BD, docs_PD, block_b, block_p, block_d)
    optional = _or_unread(lse_B, labels_B, row_groups_B, groups_P, known_groups_BJ)
    chunk = max(block_p, _WORKSPACE // (num_rows * q_BD.element_size()) // block_p * block_p)
    ddocs_PD, dq_BD = torch.empty_like(docs_PD), None
    # Rows start at multiples of 64 elements, whatever P is: GEMMs are slow on unaligned ones.
    row_stride = triton.cdiv(min(chunk, num_columns), 64) * 64
    workspace = q_BD.new_empty(num_rows, row_stride)
    for first in range(0, num_columns, chunk):
        width = min(chunk, num_columns - first)
        dscores = workspace[:, :width]
        _columns_dscores_kernel[(triton.cdiv(num_rows, block_b) * triton.cdiv(width, block_p),)](
            dlse_B.contiguous(), dpositive_B.contiguous(), q, docs, *optional, _learned_or(temperature, constant), lse_B,
            dscores, num_rows, num_columns, _num_known(known_groups_BJ), first, width, row_stride,
            D=hidden_size, BLOCK_B=block_b, BLOCK_P=block_p, BLOCK_D=block_d, GROUP=_GROUP,
            HAS_LABELS=labels_B is not None, HAS_GROUPS=groups_P is not None,
            HAS_KNOWN=has_known, TMA=tma, PRECISION=_FP32_PRECISION, LEARNED=temperature is not None, PART=_PART_WITH_KNOWN if has_known else _PART,
                num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        torch.mm(dscores.t(), q_BD, out=ddocs_PD[first : first + width])
        if width == num_columns:
            return torch.mm(dscores, docs_PD), ddocs_PD
        part_BD = _matmul_wide(dscores, docs_PD[first : first + width])
        dq_BD = part_BD if dq_BD is None else dq_BD.add_(part_BD)
    assert dq_BD is not None
    return dq_BD.to(q_BD.dtype), ddocs_PD


@_columns_bwd.register_fake
def _(
    dlse_B, dpositive_B, q_BD, docs_PD, temperature, constant, lse_B, labels_B, row_groups_B, groups_P, known_groups_BJ
):
    return q_BD.new_empty(q_BD.shape), docs_PD.new_empty(docs_PD.shape)


def _columns_setup_context(ctx, inputs, output):
    q_BD, docs_PD, temperature, ctx.constant, *optional = inputs
    ctx.save_for_backward(q_BD, docs_PD, temperature, *output, *optional)


def _columns_backward(ctx, dlse_B, dpositive_B, _):
    q_BD, docs_PD, temperature, lse_B, positive_B, mean_B, *optional = ctx.saved_tensors
    dq_BD, ddocs_PD = _columns_bwd(dlse_B, dpositive_B, q_BD, docs_PD, temperature, ctx.constant, lse_B, *optional)
    dtemperature = None
    if ctx.needs_input_grad[2]:
        dtemperature = -(_without_empty_rows(dlse_B, lse_B) * mean_B + dpositive_B * positive_B).sum() / temperature
    return dq_BD, ddocs_PD, dtemperature, None, None, None, None, None


_columns_fwd.register_autograd(_columns_backward, setup_context=_columns_setup_context)


def _temperature(temperature: float | torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """-> a tensor, or None and a number"""
    if isinstance(temperature, torch.Tensor):
        return temperature.to(like.device, torch.float32).reshape(()), 0.0
    return None, temperature


def _learned_or(temperature: torch.Tensor | None, constant: float) -> torch.Tensor | float:
    return constant if temperature is None else temperature


def _num_known(known_groups_BJ: torch.Tensor | None) -> int:
    return 0 if known_groups_BJ is None else known_groups_BJ.shape[1]


def _groups(
    row_ids_B, doc_ids_P, valid_P, num_rows: int, known_ids_BJ=None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """-> row_groups [B], groups [P], known_groups [B, J], int32: a column counts if its group is >= 0 and neither the row's
    nor one of those that the row knows (or it is the label).

    Ids are renumbered to int32, and valid folded in, because a tile's 64-bit ids would fill the kernel's registers. By a
    sort and without torch.unique, whose output size would have to be read back.
    """
    if doc_ids_P is None:
        if valid_P is None:
            return None, None, None
        groups_P = torch.where(valid_P, 0, -1).to(torch.int32)
        return torch.full((num_rows,), -2, dtype=torch.int32, device=valid_P.device), groups_P, None
    all_ids = [row_ids_B, doc_ids_P]
    if known_ids_BJ is not None and known_ids_BJ.shape[1]:
        all_ids.append(known_ids_BJ.flatten())
    ids, order = torch.cat(all_ids).sort()
    rank = torch.zeros_like(ids)
    rank[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    groups = torch.empty_like(rank, dtype=torch.int32).scatter_(0, order, rank.to(torch.int32))
    row_groups_B, groups_P, *known = groups.split([len(x) for x in all_ids])
    known_groups_BJ = known[0].view(known_ids_BJ.shape) if known else None
    return row_groups_B, groups_P if valid_P is None else groups_P.masked_fill(~valid_P, -1), known_groups_BJ


def info_nce_hard_kernel(
    q_BD: torch.Tensor,
    docs_BMD: torch.Tensor,
    mask_BM: torch.Tensor,
    temperature: float | torch.Tensor,
    normalize: bool = False,
) -> torch.Tensor:
    return _own_fwd(q_BD, docs_BMD, mask_BM, *_temperature(temperature, q_BD), True, normalize)[0]


def in_batch_logsumexp_kernel(
    rows_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    temperature: float | torch.Tensor,
    row_ids_B: torch.Tensor | None = None,
    doc_ids_P: torch.Tensor | None = None,
    valid_P: torch.Tensor | None = None,
) -> torch.Tensor:
    groups = _groups(row_ids_B, doc_ids_P, valid_P, rows_BD.shape[0])
    return _columns_fwd(rows_BD, docs_PD, *_temperature(temperature, rows_BD), None, *groups)[0]


def info_nce_in_batch_kernel(
    q_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    labels_B: torch.Tensor,
    temperature: float | torch.Tensor,
    doc_ids_P: torch.Tensor | None = None,
    valid_P: torch.Tensor | None = None,
    own_docs_BKD: torch.Tensor | None = None,
    own_mask_BK: torch.Tensor | None = None,
    extra_lse_B: torch.Tensor | None = None,
    known_ids_BJ: torch.Tensor | None = None,
) -> torch.Tensor:
    scale = _temperature(temperature, q_BD)
    _, row_ids_B, has_positive_B = _positives(labels_B, doc_ids_P, valid_P)
    groups = _groups(row_ids_B, doc_ids_P, valid_P, q_BD.shape[0], known_ids_BJ)
    lse_B, positive_B, _ = _columns_fwd(q_BD, docs_PD, *scale, labels_B, *groups)
    own_lse_B = None
    if own_docs_BKD is not None:
        own_mask_BK = _own_mask(own_docs_BKD, own_mask_BK)
        own_lse_B = _own_fwd(q_BD, own_docs_BKD, own_mask_BK, *scale, False, False)[0]
    return _join(lse_B, positive_B, has_positive_B, own_lse_B, extra_lse_B)


def _check(name: str, q_BD: torch.Tensor, docs: torch.Tensor) -> None:
    if q_BD.dim() != 2 or docs.shape[-1] != q_BD.shape[1] or docs.dtype != q_BD.dtype:
        raise ValueError(
            f"{name} wants rows [B, D] and documents of the same D and dtype, not {list(q_BD.shape)} {q_BD.dtype} "
            f"and {list(docs.shape)} {docs.dtype}"
        )


def _use_kernel(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def info_nce_hard(
    q_BD: torch.Tensor,
    docs_BMD: torch.Tensor,
    mask_BM: torch.Tensor,
    temperature: float | torch.Tensor,
    normalize: bool = False,
) -> torch.Tensor:
    """scores = (docs @ q[:, :, None]).squeeze(2) / temperature; F.cross_entropy(scores[existing], 0, reduction="none")

    q [B, D], docs [B, M, D]: bf16, fp16, fp32 (fp64: plain torch); docs[:, 0] is the positive.  mask [B, M] bool: False for
    a missing document, whose contents are never used; a row without its positive has loss 0 and gradient 0.
    temperature: float or 0-d tensor, with gradient.  normalize: rows are scaled to unit length first, in the same pass.
    Returns the loss of every query, [B] fp32 (fp64 for fp64).  CUDA: Triton, tensors on the current device.
    """
    _check("info_nce_hard", q_BD, docs_BMD)
    if docs_BMD.dim() != 3 or docs_BMD.shape[0] != q_BD.shape[0] or mask_BM.shape != docs_BMD.shape[:2]:
        raise ValueError(
            f"info_nce_hard wants q [B, D], docs [B, M, D] and mask [B, M], not {list(q_BD.shape)}, "
            f"{list(docs_BMD.shape)} and {list(mask_BM.shape)}"
        )
    if docs_BMD.shape[1] == 0 or mask_BM.dtype != torch.bool:
        raise ValueError(f"info_nce_hard wants M >= 1 and a bool mask, not M={docs_BMD.shape[1]} and {mask_BM.dtype}")
    run = info_nce_hard_kernel if _use_kernel(q_BD) else info_nce_hard_ref
    return run(q_BD, docs_BMD, mask_BM, temperature, normalize)


def in_batch_logsumexp(
    rows_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    temperature: float | torch.Tensor,
    row_ids_B: torch.Tensor | None = None,
    doc_ids_P: torch.Tensor | None = None,
    valid_P: torch.Tensor | None = None,
) -> torch.Tensor:
    """(rows @ docs.T / temperature).masked_fill(row_ids[:, None] == doc_ids, -inf).logsumexp(1), without the matrix.

    The building block of ablation terms, to be given to info_nce_in_batch as extra_lse; e.g. document against document:
    in_batch_logsumexp(docs[labels], docs, temperature, doc_ids[labels], doc_ids, valid), where equal ids leave out the
    document itself, its copies and every other query's copy of it.  Join several terms with torch.logaddexp.
    rows [B, D], docs [P, D]; ids int64, both or neither; valid [P] bool, False = missing.  Returns [B] fp32 (fp64 for
    fp64); -inf, with gradient 0, for a row that no column is left for.
    """
    _check("in_batch_logsumexp", rows_BD, docs_PD)
    if (row_ids_B is None) != (doc_ids_P is None):
        raise ValueError("in_batch_logsumexp: row_ids and doc_ids exclude columns together; give both or neither")
    run = in_batch_logsumexp_kernel if _use_kernel(rows_BD) else in_batch_logsumexp_ref
    return run(rows_BD, docs_PD, temperature, row_ids_B, doc_ids_P, valid_P)


def info_nce_in_batch(
    q_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    labels_B: torch.Tensor,
    temperature: float | torch.Tensor,
    doc_ids_P: torch.Tensor | None = None,
    valid_P: torch.Tensor | None = None,
    own_docs_BKD: torch.Tensor | None = None,
    own_mask_BK: torch.Tensor | None = None,
    extra_lse_B: torch.Tensor | None = None,
    known_ids_BJ: torch.Tensor | None = None,
) -> torch.Tensor:
    """F.cross_entropy(q @ docs.T / temperature, labels, reduction="none") without the [B, P] logits.

    q [B, D], docs [P, D]: bf16, fp16, fp32 (fp64: plain torch).  labels [B] int64: column of each positive; -1: none, then
    loss 0 and gradient 0 (likewise where the positive is not valid).  temperature: float or 0-d tensor, with gradient.
    doc_ids [P] int64: columns with the id of the row's own positive, other than the positive itself, do not count.
    known_ids [B, J] int64: nor do columns with one of these ids, documents that are right for the row too; -2 in empty places.
    valid [P] bool: False for a missing passage, whose contents must be finite and get gradient 0.
    own_docs [B, K, D], own_mask [B, K]: documents that are terms of their own row only.
    extra_lse [B]: logsumexp of further terms of each row, with gradient (in_batch_logsumexp makes them).
    Returns the loss of every query, [B] fp32 (fp64 for fp64).

    The terms of the paper's ablation, each a choice of columns:
      other rows' positives            docs = positives
      and shared hard negatives        docs = positives and hard negatives of all rows
      hard negatives of the row only   own_docs
      query-query                      append the queries to docs and doc_ids[labels] to doc_ids: the row's own query, and
                                       queries with the same positive, then carry its id and do not count
      document-document                extra_lse = in_batch_logsumexp(docs[labels], docs, ...)
    """
    _check("info_nce_in_batch", q_BD, docs_PD)
    if labels_B.shape != q_BD.shape[:1] or docs_PD.dim() != 2 or docs_PD.shape[0] == 0:
        raise ValueError(
            f"info_nce_in_batch wants q [B, D], docs [P, D] with P >= 1 and labels [B], not {list(q_BD.shape)}, "
            f"{list(docs_PD.shape)} and {list(labels_B.shape)}"
        )
    if own_docs_BKD is not None:
        _check("info_nce_in_batch (own_docs)", q_BD, own_docs_BKD)
    if known_ids_BJ is not None and (doc_ids_P is None or known_ids_BJ.shape[:1] != q_BD.shape[:1]):
        raise ValueError(
            "info_nce_in_batch: known_ids [B, J] exclude columns by doc_ids; give both, one row for each of q"
        )
    run = info_nce_in_batch_kernel if _use_kernel(q_BD) else info_nce_in_batch_ref
    return run(
        q_BD, docs_PD, labels_B, temperature, doc_ids_P, valid_P, own_docs_BKD, own_mask_BK, extra_lse_B, known_ids_BJ
    )
