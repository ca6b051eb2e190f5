"""InfoNCE without a matrix of logits: against a query's own documents, or against all documents of the global
batch.

Contract: scores are dot products over D in fp32 (fp64 for fp64 inputs) divided by the temperature; losses are
fp32, one per query. At temperature 0.02 bf16 scores would leave 75 distinct logits of 1,280, so bf16 inputs
are multiplied exactly and summed in fp32. Rows are used as they come: pass unit rows for cosines. A query
without a positive has loss 0 and gradient 0. Documents masked out of a query's own list may hold anything,
NaN too; documents of the batch with valid False must be finite. No atomics: same input, same bits.

The kernels stand in info_nce_own.py (a query against its own M documents) and info_nce_columns.py (every
query against all P columns); here are the public functions, which columns count, and how the terms of a loss
are joined.
"""

# B queries · M documents of one query (positive first) · P columns: documents of the global batch · K extra
# documents of one query · J documents that are right for a query too · D hidden_size

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from nemo_embed_core.kernels.info_nce_columns import columns_fwd
from nemo_embed_core.kernels.info_nce_own import (
    info_nce_hard_kernel,
    info_nce_hard_ref,
    masked_logsumexp_ref,
    own_logsumexp_kernel,
    own_logsumexp_ref,
    temperature_argument,
    wide,
)


def _columns_ref(
    q_BD, docs_PD, temperature, labels_B, row_ids_B, doc_ids_P, valid_P, known_ids_BJ=None, limits_B=None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> logsumexp [B] over the columns that count, score of the label's column [B] (None without labels)"""
    keep_BP = torch.ones(q_BD.shape[0], docs_PD.shape[0], dtype=torch.bool, device=q_BD.device)
    if row_ids_B is not None:
        keep_BP &= row_ids_B[:, None] != doc_ids_P
        for known_ids_B in () if known_ids_BJ is None else known_ids_BJ.unbind(1):
            keep_BP &= known_ids_B[:, None] != doc_ids_P
    scores_BP = wide(q_BD) @ wide(docs_PD).T
    if limits_B is not None:
        keep_BP &= scores_BP.detach() <= limits_B[:, None]
    scores_BP = scores_BP / temperature
    if labels_B is not None:
        keep_BP |= labels_B[:, None] == torch.arange(docs_PD.shape[0], device=q_BD.device)
    if valid_P is not None:
        keep_BP &= valid_P
    positive_B = None if labels_B is None else scores_BP.gather(1, labels_B.clamp(min=0)[:, None]).squeeze(1)
    return masked_logsumexp_ref(scores_BP, keep_BP), positive_B


def _groups(
    row_ids_B, doc_ids_P, valid_P, num_rows: int, known_ids_BJ=None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """-> row_groups [B], groups [P], known_groups [B, J], int32: a column counts if its group is >= 0 and
    neither the row's nor one of those that the row knows (or it is the label).

    Ids are renumbered to int32, and valid folded in, because a tile's 64-bit ids would fill the kernel's
    registers. By a sort and without torch.unique, whose output size would have to be read back.
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


def _columns_kernel(
    q_BD, docs_PD, temperature, labels_B, row_ids_B, doc_ids_P, valid_P, known_ids_BJ=None, limits_B=None
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = _groups(row_ids_B, doc_ids_P, valid_P, q_BD.shape[0], known_ids_BJ)
    t = temperature_argument(temperature, q_BD)
    limits_B = None if limits_B is None else limits_B.float()
    return columns_fwd(q_BD, docs_PD, *t, labels_B, *groups, limits_B)[:2]


def _in_batch(
    columns: Callable, own_logsumexp: Callable,
    q_BD, docs_PD, labels_B, temperature, doc_ids_P=None, valid_P=None,
    own_docs_BKD=None, own_mask_BK=None, extra_lse_B=None, known_ids_BJ=None, limits_B=None,
) -> torch.Tensor:  # fmt: skip
    """info_nce_in_batch by the kernels or by plain torch: logsumexp over all terms of a row minus its
    positive score."""
    label_B = labels_B.clamp(min=0)  # safe as an index
    has_positive_B = labels_B >= 0 if valid_P is None else (labels_B >= 0) & valid_P[label_B]
    row_ids_B = None if doc_ids_P is None else doc_ids_P[label_B]
    lse_B, positive_B = columns(
        q_BD, docs_PD, temperature, labels_B, row_ids_B, doc_ids_P, valid_P, known_ids_BJ, limits_B
    )
    terms = [lse_B, extra_lse_B]
    if own_docs_BKD is not None:
        if own_mask_BK is None:
            own_mask_BK = own_docs_BKD.new_ones(own_docs_BKD.shape[:2], dtype=torch.bool)
        terms.insert(1, own_logsumexp(q_BD, own_docs_BKD, own_mask_BK, temperature))
    # Rows without a positive first, not only last: logaddexp(-inf, -inf) has a NaN gradient, and 0 * NaN
    # would reach the inputs.
    terms = [term_B.masked_fill(~has_positive_B, 0.0) for term_B in terms if term_B is not None]
    return (functools.reduce(torch.logaddexp, terms) - positive_B).masked_fill(~has_positive_B, 0.0)


def _logsumexp(
    columns: Callable, rows_BD, docs_PD, temperature, row_ids_B=None, doc_ids_P=None, valid_P=None,
    known_ids_BJ=None, limits_B=None,
) -> torch.Tensor:  # fmt: skip
    rule = row_ids_B, doc_ids_P, valid_P, known_ids_BJ, limits_B
    return columns(rows_BD, docs_PD, temperature, None, *rule)[0]


info_nce_in_batch_ref = functools.partial(_in_batch, _columns_ref, own_logsumexp_ref)
info_nce_in_batch_kernel = functools.partial(_in_batch, _columns_kernel, own_logsumexp_kernel)
in_batch_logsumexp_ref = functools.partial(_logsumexp, _columns_ref)
in_batch_logsumexp_kernel = functools.partial(_logsumexp, _columns_kernel)


def _check(name: str, q_BD: torch.Tensor, docs: torch.Tensor) -> None:
    if q_BD.dim() != 2 or docs.shape[-1] != q_BD.shape[1] or docs.dtype != q_BD.dtype:
        raise ValueError(
            f"{name} wants rows [B, D] and documents of the same D and dtype, not {list(q_BD.shape)} "
            f"{q_BD.dtype} and {list(docs.shape)} {docs.dtype}"
        )


def _check_rules(name: str, rows_BD, doc_ids_P, known_ids_BJ, limits_B) -> None:
    if known_ids_BJ is not None and (doc_ids_P is None or known_ids_BJ.shape[:1] != rows_BD.shape[:1]):
        raise ValueError(
            f"{name}: known_ids [B, J] exclude columns by doc_ids; give both, one row for each of q"
        )
    if limits_B is not None and limits_B.shape != rows_BD.shape[:1]:
        raise ValueError(f"{name} wants one limit a row, {list(rows_BD.shape[:1])}: {list(limits_B.shape)}")


def _use_kernel(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def info_nce_hard(
    q_BD: torch.Tensor,
    docs_BMD: torch.Tensor,
    mask_BM: torch.Tensor,
    temperature: float | torch.Tensor,
    normalize: bool = False,
) -> torch.Tensor:
    """scores = (docs @ q[:, :, None]).squeeze(2) / temperature; F.cross_entropy(scores[existing], 0,
    reduction="none")

    q [B, D], docs [B, M, D]: bf16, fp16, fp32 (fp64: plain torch); docs[:, 0] is the positive.  mask [B, M]
    bool: False for a missing document, whose contents are never used; a row without its positive has loss 0
    and gradient 0. temperature: float or 0-d tensor, with gradient.  normalize: rows are scaled to unit
    length first, in the same pass. Returns the loss of every query, [B] fp32 (fp64 for fp64).  CUDA: Triton,
    tensors on the current device.
    """
    _check("info_nce_hard", q_BD, docs_BMD)
    if docs_BMD.dim() != 3 or docs_BMD.shape[0] != q_BD.shape[0] or mask_BM.shape != docs_BMD.shape[:2]:
        raise ValueError(
            f"info_nce_hard wants q [B, D], docs [B, M, D] and mask [B, M], not {list(q_BD.shape)}, "
            f"{list(docs_BMD.shape)} and {list(mask_BM.shape)}"
        )
    if docs_BMD.shape[1] == 0 or mask_BM.dtype != torch.bool:
        raise ValueError(
            f"info_nce_hard wants M >= 1 and a bool mask, not M={docs_BMD.shape[1]} and {mask_BM.dtype}"
        )
    run = info_nce_hard_kernel if _use_kernel(q_BD) else info_nce_hard_ref
    return run(q_BD, docs_BMD, mask_BM, temperature, normalize)


def in_batch_logsumexp(
    rows_BD: torch.Tensor,
    docs_PD: torch.Tensor,
    temperature: float | torch.Tensor,
    row_ids_B: torch.Tensor | None = None,
    doc_ids_P: torch.Tensor | None = None,
    valid_P: torch.Tensor | None = None,
    known_ids_BJ: torch.Tensor | None = None,
    limits_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """(rows @ docs.T / temperature).masked_fill(row_ids[:, None] == doc_ids, -inf).logsumexp(1), without the
    matrix.

    The building block of ablation terms, to be given to info_nce_in_batch as extra_lse; e.g. document against
    document: in_batch_logsumexp(docs[labels], docs, temperature, doc_ids[labels], doc_ids, valid), where
    equal ids leave out the document itself, its copies and every other query's copy of it.  Join several
    terms with torch.logaddexp. rows [B, D], docs [P, D]; ids int64, both or neither; valid [P] bool, False =
    missing; known_ids [B, J], limits [B]: as in info_nce_in_batch.  Returns [B] fp32 (fp64 for fp64); -inf,
    with gradient 0, for a row that no column is left for.
    """
    _check("in_batch_logsumexp", rows_BD, docs_PD)
    if (row_ids_B is None) != (doc_ids_P is None):
        raise ValueError(
            "in_batch_logsumexp: row_ids and doc_ids exclude columns together; give both or neither"
        )
    _check_rules("in_batch_logsumexp", rows_BD, doc_ids_P, known_ids_BJ, limits_B)
    run = in_batch_logsumexp_kernel if _use_kernel(rows_BD) else in_batch_logsumexp_ref
    return run(rows_BD, docs_PD, temperature, row_ids_B, doc_ids_P, valid_P, known_ids_BJ, limits_B)


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
    limits_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """F.cross_entropy(q @ docs.T / temperature, labels, reduction="none") without the [B, P] logits.

    q [B, D], docs [P, D]: bf16, fp16, fp32 (fp64: plain torch).  labels [B] int64: column of each positive;
    -1: none, then loss 0 and gradient 0 (likewise where the positive is not valid).  temperature: float or
    0-d tensor, with gradient. doc_ids [P] int64: columns with the id of the row's own positive, other than
    the positive itself, do not count. known_ids [B, J] int64: nor do columns with one of these ids, documents
    that are right for the row too; -2 in empty places. limits [B] fp32, without gradient: nor do columns,
    other than the positive, whose score before the temperature is above the row's. valid [P] bool: False for
    a missing document, whose contents must be finite and get gradient 0. own_docs [B, K, D], own_mask [B, K]:
    documents that are terms of their own row only. extra_lse [B]: logsumexp of further terms of each row,
    with gradient (in_batch_logsumexp makes them). Returns the loss of every query, [B] fp32 (fp64 for fp64).

    The terms of the paper's ablation, each a choice of columns:
      other rows' positives            docs = positives
      and shared hard negatives        docs = positives and hard negatives of all rows
      hard negatives of the row only   own_docs
      query-query                      append the queries to docs and doc_ids[labels] to doc_ids: the row's
      own
                                       query, and queries with the same positive, then carry its id and do not
                                       count
      document-document                extra_lse = in_batch_logsumexp(docs[labels], docs, ...)
    """
    _check("info_nce_in_batch", q_BD, docs_PD)
    if labels_B.shape != q_BD.shape[:1] or docs_PD.dim() != 2 or docs_PD.shape[0] == 0:
        raise ValueError(
            "info_nce_in_batch wants q [B, D], docs [P, D] with P >= 1 and labels [B], not "
            f"{list(q_BD.shape)}, {list(docs_PD.shape)} and {list(labels_B.shape)}"
        )
    if own_docs_BKD is not None:
        _check("info_nce_in_batch (own_docs)", q_BD, own_docs_BKD)
    _check_rules("info_nce_in_batch", q_BD, doc_ids_P, known_ids_BJ, limits_B)
    run = info_nce_in_batch_kernel if _use_kernel(q_BD) else info_nce_in_batch_ref
    own = own_docs_BKD, own_mask_BK
    rules = known_ids_BJ, limits_B
    return run(q_BD, docs_PD, labels_B, temperature, doc_ids_P, valid_P, *own, extra_lse_B, *rules)
