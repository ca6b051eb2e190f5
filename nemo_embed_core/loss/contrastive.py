"""InfoNCE of the paper and its in-batch variants, equal at any world size and any micro-batching.

    loss[b] = logsumexp_c(s_c / t) - s(q_b, d_b) / t       over its positive d_b and the row's candidates c

                     candidates of row b beside its own hard negatives, with their similarity s_c
in_batch             s(q_b, d_j) of other rows j of the global batch: "positives", "all": hard negatives too
query_query          s(q_b, q_j) of other rows' queries
document_document    s(d_b, d_j) of its positive with the same documents (with in_batch "none" positives)

What is right for the row is no candidate, wherever it comes from: the same text as its positive, another
positive of the row, a positive of a row with the same query or of the same class, and the queries of such
positives (Groups.known_BJ). Exactly these: no row excludes what another one knows. document_document leaves
out copies of the row's own negatives too. false_negative_margin: nor is a candidate, an own hard negative
too, with s_c > s(q_b, d_b) + margin.

b, B queries (of this rank) · K hard negatives · M = 1 + K documents per query · D hidden_size · P columns of
the batch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.config import LossConfig
from nemo_embed_core.kernels.info_nce import in_batch_logsumexp, info_nce_hard, info_nce_in_batch
from nemo_embed_core.parallel.collectives import all_gather_rows, gather_tokens


@dataclass(frozen=True)
class Groups:
    """Queries with their documents; document 0 of a row is its positive."""

    q_BD: Tensor
    docs_BMD: Tensor
    mask_BM: Tensor  # bool; False: this row has fewer negatives, the slot does not exist
    ids_BM: Tensor  # int64 document ids (same text, same id); -1 where mask is False
    known_BJ: Tensor | None = None  # int64 ids that are right for the row too; -2 in empty places
    teacher_BM: Tensor | None = None  # fp32 scores of a teacher; NaN where there is none
    teacher_BND: Tensor | None = (
        None  # its vectors of the query and the documents, as wide as its own; 0: none
    )
    grade_B: Tensor | None = None  # fp32, of a graded pair (query, document 0); NaN: the row is none

    def is_right(self, ids_BP: Tensor) -> Tensor:
        """bool [B, P], of ids [B or 1, P]: the id of the row's positive, or a known one."""
        right_BP = ids_BP == self.ids_BM[:, :1]
        for known_B in () if self.known_BJ is None else self.known_BJ.unbind(1):
            right_BP = right_BP | (ids_BP == known_B[:, None])
        return right_BP

    @property
    def negative_BK(self) -> Tensor:
        """bool: which of the row's own documents, but for its positive, exist and are not right."""
        return self.mask_BM[:, 1:] & ~self.is_right(self.ids_BM[:, 1:])


@dataclass(frozen=True)
class Columns:
    """What all ranks contribute of their rows, in the order of ranks; None where no term needs it."""

    docs_PD: Tensor | None  # each row's positive, or all its documents
    ids_P: Tensor  # of the documents; without them of the positives
    valid_P: Tensor  # bool
    queries_QD: Tensor | None
    labels_B: Tensor  # column of this rank's positives


def scored_dtype(in_batch: bool, run: torch.dtype) -> torch.dtype:
    """Of the rows that the loss scores in a run of this dtype; sums are fp32 (fp64 for fp64) in any case.

    With in-batch terms the scores are GEMMs, 8 B P D FLOP: in a bf16 run unit rows are rounded once from fp32
    to bf16, which tensor cores multiply exactly. The standard deviation of a cosine is then 3.6e-5 near 0 and
    6.2e-5 near 0.95 at D = 4096 (3e-3 of a logit at temperature 0.02); where most of a row's length is in one
    coordinate a cosine may be off by 2^-8. A query's own documents alone are bound by memory, and rounding
    them moves more bytes (18 an element) than it saves (12 without): they stay fp32.
    """
    return run if in_batch else torch.promote_types(run, torch.float32)


def gather_columns(
    groups: Groups, loss: LossConfig, dp_group: Any, dp_rank: int, dtype: torch.dtype
) -> Columns | None:
    """Every dp rank calls this with equally many rows. Rows travel rounded to dtype, with gradient.

    The gather's backward sums over ranks and FSDP averages over dp: with the mean over this rank's rows that
    is exactly the gradient of the mean over the global batch.
    """
    if not loss.has_in_batch:
        return None
    num_documents = loss.columns(groups.ids_BM.shape[1] - 1)
    count = max(1, num_documents)  # queries alone are known by their positives
    ids_B = groups.ids_BM.masked_fill(~groups.mask_BM, -1)[:, :count].flatten()
    ids_P = all_gather_rows(ids_B, dp_group) if dp_group.size() > 1 else ids_B
    local = groups.docs_BMD[:, :count].flatten(0, 1)
    docs_PD = gather_tokens(local, dp_group, dtype) if num_documents else None
    queries_QD = gather_tokens(groups.q_BD, dp_group, dtype) if loss.has_query_columns else None
    B = len(groups.q_BD)
    labels_B = count * (dp_rank * B + torch.arange(B, device=local.device))
    return Columns(docs_PD, ids_P, ids_P >= 0, queries_QD, labels_B)


def contrastive_loss(
    groups: Groups,
    columns: Columns | None,
    loss: LossConfig,
    temperature: float | Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """loss [B] in fp32, one value per query of this rank; rows are rounded to dtype before they are scored.

    A row without any candidate has loss 0.
    """
    negative_BK, dtype, known_BJ = groups.negative_BK, dtype or groups.q_BD.dtype, groups.known_BJ
    q_BD, docs_BMD = groups.q_BD.to(dtype), groups.docs_BMD.to(dtype)
    needs_positive = loss.query_query or loss.document_document or loss.false_negative_margin is not None
    positive_B = own_scores(q_BD, docs_BMD[:, :1])[:, 0] if needs_positive else None
    limits_B = None
    if loss.false_negative_margin is not None:
        assert positive_B is not None
        limits_B = positive_B.detach() + loss.false_negative_margin
        with torch.no_grad():
            negative_BK = negative_BK & (own_scores(q_BD, docs_BMD[:, 1:]) <= limits_B[:, None])
    if columns is None or columns.docs_PD is None or loss.in_batch == "none":
        losses_B = info_nce_hard(
            q_BD, docs_BMD, torch.cat([groups.mask_BM[:, :1], negative_BK], 1), temperature
        )
    else:
        own = {}
        if loss.in_batch == "positives" and negative_BK.shape[1]:
            own = {"own_docs_BKD": docs_BMD[:, 1:], "own_mask_BK": negative_BK}
        losses_B = info_nce_in_batch(
            q_BD, columns.docs_PD, columns.labels_B, temperature, doc_ids_P=columns.ids_P,
            valid_P=columns.valid_P, known_ids_BJ=known_BJ, limits_B=limits_B, **own,
        )  # fmt: skip
    for extra_B in _extra_terms(groups, columns, loss, temperature, q_BD, docs_BMD[:, 0], limits_B):
        assert positive_B is not None
        losses_B = torch.logaddexp(losses_B, extra_B - positive_B / temperature)
    return losses_B


def _extra_terms(
    groups: Groups, columns: Columns | None, loss: LossConfig, temperature: float | Tensor,
    q_BD: Tensor, positives_BD: Tensor, limits_B: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """logsumexp [B] over the candidates of each further term; -inf where a row has none."""
    terms: list[Tensor] = []
    if columns is None:
        return terms
    row_ids_B, known_BJ = groups.ids_BM[:, 0], groups.known_BJ
    if columns.queries_QD is not None:
        # A query stands for its positive: it is left out where that is right for the row.
        count = len(columns.ids_P) // len(columns.queries_QD)
        ids_Q, valid_Q = columns.ids_P[::count], columns.valid_P[::count]
        rule = row_ids_B, ids_Q, valid_Q, known_BJ, limits_B
        terms.append(in_batch_logsumexp(q_BD, columns.queries_QD, temperature, *rule))
    if loss.document_document and columns.docs_PD is not None:
        own_BK = groups.ids_BM[:, 1:].masked_fill(~groups.mask_BM[:, 1:], -2)
        left_out = own_BK if known_BJ is None else torch.cat([known_BJ, own_BK], 1)
        rule = row_ids_B, columns.ids_P, columns.valid_P, left_out, limits_B
        terms.append(in_batch_logsumexp(positives_BD, columns.docs_PD, temperature, *rule))
    return terms


def own_scores(q_BD: Tensor, docs_BMD: Tensor) -> Tensor:
    """torch.einsum("bd,bmd->bm", q, docs): a query's cosines with its own documents, summed in fp32 or
    wider."""
    wide = torch.promote_types(q_BD.dtype, torch.float32)
    return (q_BD.to(wide)[:, None] * docs_BMD.to(wide)).sum(-1)


@torch.no_grad()
def retrieval_stats(groups: Groups, in_batch: str) -> Tensor:
    """[5] in fp64, to be added over micro-batches and ranks: rows whose positive outranks every candidate at
    hand, sum of positive similarities, sum of negative similarities, number of negatives, rows with a
    candidate.

    Candidates at hand: the row's hard negatives and, with in_batch, the other positives of the same
    micro-batch, but for documents that are right for the row. A row without one, as a graded pair, is neither
    a hit nor a miss.
    """
    own_BM = own_scores(groups.q_BD, groups.docs_BMD)
    scores, exists = own_BM[:, 1:], groups.negative_BK
    if in_batch != "none":
        wide = own_BM.dtype
        scores = torch.cat([scores, groups.q_BD.to(wide) @ groups.docs_BMD[:, 0].to(wide).T], 1)
        exists = torch.cat(
            [exists, groups.mask_BM[None, :, 0] & ~groups.is_right(groups.ids_BM[None, :, 0])], 1
        )
    if groups.grade_B is not None:
        exists = exists & groups.grade_B.isnan()[:, None]
    positive, ranked = own_BM[:, 0], exists.any(1)
    outranked = (exists & (scores >= positive[:, None])).any(1)
    negatives = scores.masked_fill(~exists, 0.0).sum()
    return torch.stack(
        [(ranked & ~outranked).sum(), positive.sum(), negatives, exists.sum(), ranked.sum()]
    ).double()
