"""InfoNCE of the paper and its in-batch variants, equal at any world size and any micro-batching.

    loss[b] = logsumexp_c(q_b . d_c / t) - q_b . d_pos(b) / t        summed over the candidates c of row b

in_batch   candidates of row b
"none"       its positive and its own hard negatives (arXiv:2511.07025)
"positives"  + the positives of all other rows of the global batch
"all"        + the positives and the hard negatives of all other rows

A document that is right for the row is no candidate, wherever it comes from: the same text as its positive,
another positive of the row, a positive of a row with the same query (Groups.known_BJ). Exactly these: no row
excludes what another one knows.

b, B queries (of this rank) · K hard negatives · M = 1 + K documents per query · D hidden_size · P columns of
the batch
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_embed_core.config import LossConfig
from nemo_embed_core.kernels.info_nce import info_nce_hard, info_nce_in_batch
from nemo_embed_core.parallel.collectives import all_gather_rows, gather_tokens

InBatch = Literal["none", "positives", "all"]


@dataclass(frozen=True)
class Groups:
    """Queries with their documents; document 0 of a row is its positive."""

    q_BD: Tensor
    docs_BMD: Tensor
    mask_BM: Tensor  # bool; False: this row has fewer negatives, the slot does not exist
    ids_BM: Tensor  # int64 document ids (same text, same id); -1 where mask is False
    known_BJ: Tensor | None = None  # int64 ids that are right for the row too; -2 in empty places

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


# What `objective` sums over micro-batches and ranks, and `figures` reads.
SUMS = ("hits", "positive", "negative", "negatives", "ranked_rows")


def scored_dtype(in_batch: InBatch, run: torch.dtype) -> torch.dtype:
    """Of the rows that the loss scores in a run of this dtype; sums are fp32 (fp64 for fp64) in any case.

    With in_batch the scores are GEMMs, 8 B P D FLOP: in a bf16 run unit rows are rounded once from fp32 to
    bf16, which tensor cores multiply exactly. The standard deviation of a cosine is then 3.6e-5 near 0 and
    6.2e-5 near 0.95 at D = 4096 (3e-3 of a logit at temperature 0.02); where most of a row's length is in one
    coordinate a cosine may be off by 2^-8. A query's own documents alone are bound by memory, and rounding
    them moves more bytes (18 an element) than it saves (12 without): they stay fp32.
    """
    return run if in_batch != "none" else torch.promote_types(run, torch.float32)


def objective(
    groups: Groups, loss: LossConfig, run: torch.dtype, dp_group: Any, dp_rank: int
) -> tuple[Tensor, Tensor]:
    """(loss [B] to take gradients of, SUMS in fp64 to report): all that a step asks of this package.

    run: dtype of the forward. Gradients have the dtype of the groups' rows.
    """
    dtype = scored_dtype(loss.in_batch, run)
    losses_B = contrastive_loss(groups, loss.temperature, loss.in_batch, dp_group, dp_rank, dtype)
    return losses_B, retrieval_stats(groups, loss.in_batch)


def figures(totals: Mapping[str, float]) -> dict[str, float | None]:
    """What metrics.jsonl says of the loss, from SUMS of a global batch, "rows" and "loss" (their sum)."""
    return {
        "loss": totals["loss"] / totals["rows"],
        # Of rows that have a candidate; None where no row of the step has one.
        "accuracy": totals["hits"] / totals["ranked_rows"] if totals["ranked_rows"] else None,
        "rows_without_candidates": round(totals["rows"] - totals["ranked_rows"]),
        "positive_similarity": totals["positive"] / totals["rows"],
        "negative_similarity": totals["negative"] / max(1.0, totals["negatives"]),
    }


def contrastive_loss(
    groups: Groups,
    temperature: float,
    in_batch: InBatch,
    dp_group: Any,
    dp_rank: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """loss [B] in fp32, one value per query of this rank; rows are rounded to dtype before they are scored.

    With in_batch every dp rank must call this with equally many rows: documents are gathered over dp with
    gradient. The gather's backward sums over ranks and FSDP averages over dp: with the mean over this rank's
    rows that is exactly the gradient of the mean over the global batch. A row without any candidate has loss
    0.
    """
    negative_BK, dtype = groups.negative_BK, dtype or groups.q_BD.dtype
    q_BD = groups.q_BD.to(dtype)
    if in_batch == "none":
        mask_BM = torch.cat([groups.mask_BM[:, :1], negative_BK], 1)
        return info_nce_hard(q_BD, groups.docs_BMD.to(dtype), mask_BM, temperature)
    B, M = groups.mask_BM.shape
    if in_batch == "positives":
        local, ids, valid = groups.docs_BMD[:, 0], groups.ids_BM[:, 0], groups.mask_BM[:, 0]
        own = {"own_docs_BKD": groups.docs_BMD[:, 1:].to(dtype), "own_mask_BK": negative_BK} if M > 1 else {}
    else:
        local, ids, valid = groups.docs_BMD.flatten(0, 1), groups.ids_BM.flatten(), groups.mask_BM.flatten()
        own = {}
    columns_PD = gather_tokens(local, dp_group, dtype)
    if dp_group.size() > 1:
        ids = all_gather_rows(ids, dp_group)
        valid = all_gather_rows(valid.to(torch.int64), dp_group).bool()
    rows = torch.arange(B, device=local.device)
    labels_B = dp_rank * local.shape[0] + rows * (local.shape[0] // B)
    known = groups.known_BJ
    return info_nce_in_batch(
        q_BD, columns_PD, labels_B, temperature, doc_ids_P=ids, valid_P=valid, known_ids_BJ=known, **own
    )


@torch.no_grad()
def retrieval_stats(groups: Groups, in_batch: InBatch) -> Tensor:
    """SUMS [5] in fp64, to be added over micro-batches and ranks: rows whose positive outranks every
    candidate at hand, sum of positive similarities, sum of negative similarities, number of negatives, rows
    with a candidate.

    Candidates at hand: the row's hard negatives and, with in_batch, the other positives of the same
    micro-batch, but for documents that are right for the row. A row without one is neither a hit nor a miss.
    """
    own_BM = torch.einsum("bd,bmd->bm", groups.q_BD.float(), groups.docs_BMD.float())
    scores, exists = own_BM[:, 1:], groups.negative_BK
    if in_batch != "none":
        scores = torch.cat([scores, groups.q_BD.float() @ groups.docs_BMD[:, 0].float().T], 1)
        exists = torch.cat(
            [exists, groups.mask_BM[None, :, 0] & ~groups.is_right(groups.ids_BM[None, :, 0])], 1
        )
    positive, ranked = own_BM[:, 0], exists.any(1)
    outranked = (exists & (scores >= positive[:, None])).any(1)
    negatives = scores.masked_fill(~exists, 0.0).sum()
    return torch.stack(
        [(ranked & ~outranked).sum(), positive.sum(), negatives, exists.sum(), ranked.sum()]
    ).double()
