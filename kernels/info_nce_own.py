"""InfoNCE of a query against its own documents: forward reads q and docs once, backward reads them once more
and writes their gradients once. Memory-bound. The contract stands in info_nce.py, which has the public
functions.
"""

# B queries · M documents of one query (positive first) · D hidden_size

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _own_scores_ref(q_BD, docs_BMD, mask_BM, normalize) -> torch.Tensor:
    q_BD, docs_BMD = wide(q_BD), wide(docs_BMD).masked_fill(~mask_BM[..., None], 0.0)
    if normalize:
        q_BD, docs_BMD = F.normalize(q_BD, dim=-1), F.normalize(docs_BMD, dim=-1)
    return torch.bmm(docs_BMD, q_BD[..., None]).squeeze(-1)


def masked_logsumexp_ref(scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """logsumexp over the kept columns, -inf where none is kept; plain logsumexp has a NaN gradient there."""
    any_kept = keep.any(1)
    scores = scores.masked_fill(~keep & any_kept[:, None], -math.inf)
    return scores.logsumexp(1).masked_fill(~any_kept, -math.inf)


def info_nce_hard_ref(q_BD, docs_BMD, mask_BM, temperature, normalize=False) -> torch.Tensor:
    scores_BM = _own_scores_ref(q_BD, docs_BMD, mask_BM, normalize)
    # Relative to the positive before the logsumexp: a loss of 1e-6 is then not the difference of two numbers
    # near 50.
    scores_BM = (scores_BM - scores_BM[:, :1]) / temperature
    scores_BM = scores_BM.masked_fill(~mask_BM & mask_BM[:, :1], -math.inf)
    return scores_BM.logsumexp(1).masked_fill(~mask_BM[:, 0], 0.0)


def own_logsumexp_ref(q_BD, docs_BMD, mask_BM, temperature) -> torch.Tensor:
    scores_BM = _own_scores_ref(q_BD, docs_BMD, mask_BM, normalize=False) / temperature
    return masked_logsumexp_ref(scores_BM, mask_BM)


# A warp holds all BLOCK_M documents of its 256 columns, so that the sums over documents stay within threads:
# any other division took twice the time.
_OWN_FORWARD = (8, 2048, 8)  # largest BLOCK_M, largest BLOCK_D, num_warps
_OWN_BACKWARD = (8, 4096, 16)  # all columns at once: fewer loads that wait for those before


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
            offs = (b * M + m)[:, None] * D + offs_d[None, :]
            docs = tl.load(docs_ptr + offs, mask=mask_m[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
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
    dlse_ptr, mask_ptr, scores_ptr, lse_ptr, docs_inverse_ptr, inverse_temperature, q_inverse, b, m,
    M: tl.constexpr, RELATIVE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """-> of documents m of row b, 0 for those that do not exist: is it there, the factor between its row and
    q's gradient and the other way round, the share of its own direction that its gradient loses, and that of
    q's"""
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
    """One program: one query. With c the gradients of its scores s (cosines if NORMALIZE, a and d_m the
    inverse norms):

    dq = sum_m c_m doc_m,                                  ddoc_m = c_m q     or, if NORMALIZE,
    dq = sum_m (c_m a d_m) doc_m - (a^2 sum_m c_m s_m) q,  ddoc_m = (c_m a d_m) q - (c_m s_m d_m^2) doc_m.
    """
    b = tl.program_id(0).to(tl.int64)
    inverse_temperature = 1.0 / (tl.load(temperature) if LEARNED else temperature)
    offs_m = tl.arange(0, BLOCK_M)
    q_inverse = tl.load(q_inverse_ptr + b) if NORMALIZE else 1.0
    # Once where one block holds all documents, so that no load of a row waits for them; else again for every
    # block.
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
            mask = (m < M)[:, None] & mask_d[None, :]
            tl.store(ddocs_ptr + offs, ddocs.to(ddocs_ptr.dtype.element_ty), mask=mask)
        tl.store(dq_ptr + b * D + offs_d, dq.to(dq_ptr.dtype.element_ty), mask=mask_d)


def _own_config(config: tuple[int, int, int], num_documents: int, hidden_size: int) -> tuple[int, int, int]:
    block_m, block_d, num_warps = config
    return (
        min(block_m, triton.next_power_of_2(num_documents)),
        min(block_d, max(16, triton.next_power_of_2(hidden_size))),
        num_warps,
    )


def temperature_argument(temperature, like: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """-> a tensor, or None and a number"""
    if isinstance(temperature, torch.Tensor):
        return temperature.to(like.device, torch.float32).reshape(()), 0.0
    return None, temperature


def learned_or(temperature: torch.Tensor | None, constant: float) -> torch.Tensor | float:
    return constant if temperature is None else temperature


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

    temperature: a learned one, or None for `constant`, which saves the launch that would put a number into a
    tensor.
    """
    num_rows, num_documents, hidden_size = docs_BMD.shape
    block_m, block_d, num_warps = _own_config(_OWN_FORWARD, num_documents, hidden_size)
    lse_B, mean_B = (q_BD.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    scores_BM = q_BD.new_empty(num_rows, num_documents, dtype=torch.float32)
    q_inverse_B = q_BD.new_empty(num_rows if normalize else 0, dtype=torch.float32)
    docs_inverse_BM = q_BD.new_empty(num_rows if normalize else 0, num_documents, dtype=torch.float32)
    if num_rows:
        _own_fwd_kernel[(num_rows,)](
            q_BD.contiguous(), docs_BMD.contiguous(), mask_BM.contiguous().view(torch.uint8),
            learned_or(temperature, constant),
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
            dlse_B.contiguous(), q_BD, docs_BMD, mask_BM.contiguous().view(torch.uint8),
            learned_or(temperature, constant), lse_B, scores_BM,
            q_inverse_B, docs_inverse_BM, dq_BD, ddocs_BMD,
            M=num_documents, D=hidden_size, BLOCK_M=block_m, BLOCK_D=block_d,
            RELATIVE=relative, NORMALIZE=q_inverse_B.numel() > 0, LEARNED=temperature is not None,
            num_warps=num_warps,
        )  # fmt: skip
    return dq_BD, ddocs_BMD


@_own_bwd.register_fake
def _(dlse_B, q_BD, docs_BMD, *_):
    return q_BD.new_empty(q_BD.shape), docs_BMD.new_empty(docs_BMD.shape)


def _own_setup_context(ctx, inputs, output):
    *tensors, temperature, ctx.constant, ctx.relative, _ = inputs
    lse_B, mean_B, *rest = output
    ctx.set_materialize_grads(False)  # zeros for outputs that nobody differentiates would be launches
    ctx.save_for_backward(*tensors, temperature, lse_B, mean_B, *rest)


def without_empty_rows(dlse_B: torch.Tensor, lse_B: torch.Tensor) -> torch.Tensor:
    """0 where no column is left: torch.logaddexp(-inf, -inf) hands back NaN. The backward kernels do the same
    in passing, since this costs four launches, nearly the time of the hard loss of 128 queries."""
    return dlse_B.masked_fill(lse_B == -math.inf, 0.0)


def _own_backward(ctx, dlse_B, *_):
    if dlse_B is None:
        return (None,) * 7
    q_BD, docs_BMD, mask_BM, temperature, lse_B, mean_B, *rest = ctx.saved_tensors
    tensors = q_BD, docs_BMD, mask_BM, temperature
    dq_BD, ddocs_BMD = _own_bwd(dlse_B, *tensors, ctx.constant, lse_B, *rest, ctx.relative)
    dtemperature = None
    if ctx.needs_input_grad[3]:
        dtemperature = -(without_empty_rows(dlse_B, lse_B) * mean_B).sum() / temperature
    return dq_BD, ddocs_BMD, None, dtemperature, None, None, None


_own_fwd.register_autograd(_own_backward, setup_context=_own_setup_context)


def info_nce_hard_kernel(q_BD, docs_BMD, mask_BM, temperature, normalize=False) -> torch.Tensor:
    return _own_fwd(q_BD, docs_BMD, mask_BM, *temperature_argument(temperature, q_BD), True, normalize)[0]


def own_logsumexp_kernel(q_BD, docs_BMD, mask_BM, temperature) -> torch.Tensor:
    return _own_fwd(q_BD, docs_BMD, mask_BM, *temperature_argument(temperature, q_BD), False, False)[0]
