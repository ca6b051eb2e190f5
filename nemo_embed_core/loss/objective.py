"""The terms of LossConfig joined, and what metrics.jsonl says of them: all that a step asks of this package.

losses_B, sums = objective(groups, loss, run, dp_group, dp_rank)      a micro-batch, or the global batch
figures(totals, loss)           of sums over micro-batches and ranks by sum_names(loss), "rows" and "loss"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.config import LossConfig
from nemo_embed_core.config.train import TERMS
from nemo_embed_core.loss.contrastive import (
    Columns,
    Groups,
    contrastive_loss,
    gather_columns,
    retrieval_stats,
    scored_dtype,
)
from nemo_embed_core.loss.distill import kl, margin_mse, scored, teacher_vectors
from nemo_embed_core.loss.graded import cosent
from nemo_embed_core.loss.matryoshka import cut_columns, cut_groups

_STATS = ("hits", "positive", "negative", "negatives", "ranked_rows")  # of retrieval_stats


def sum_names(loss: LossConfig) -> tuple[str, ...]:
    """What `objective` sums over micro-batches and ranks, and `figures` reads."""
    names = [*_STATS, *(["temperature"] if loss.temperature_lr else []), *map(_sum_of, _terms(loss))]
    names += ["scored_rows"] if loss.needs_scores else []
    return (*names, "graded_rows") if loss.cosent_weight else tuple(names)


def _terms(loss: LossConfig) -> list[str]:
    """Those that metrics.jsonl tells apart; none where there is but one."""
    each = [name for name in TERMS if getattr(loss, f"{name}_weight")]
    if loss.matryoshka_dims:
        return [f"{name}@{dim}" for dim in loss.matryoshka_dims for name in each]
    return each if len(each) > 1 else []


def _sum_of(term: str) -> str:
    return f"loss of {term}"


def objective(
    groups: Groups,
    loss: LossConfig,
    run: torch.dtype,
    dp_group: Any,
    dp_rank: int,
    log_temperature: Tensor | None = None,
    projection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss [B] to take gradients of, sums in fp64 to report).

    run: dtype of the forward. Gradients have the dtype of the groups' rows. log_temperature: learned, in
    place of loss.temperature. projection [a teacher's columns, D]: W of teacher_vectors.
    """
    temperature = loss.temperature if log_temperature is None else log_temperature.exp()
    dtype = scored_dtype(loss.has_in_batch, run)
    columns = gather_columns(groups, loss, dp_group, dp_rank, dtype)
    sums = [retrieval_stats(groups, loss.in_batch)]
    if log_temperature is not None:
        sums.append(log_temperature.detach().exp().double()[None] * len(groups.q_BD))
    dims = loss.matryoshka_dims or [groups.q_BD.shape[1]]
    weights, losses, is_told = loss.matryoshka_weights or [1.0] * len(dims), [], bool(_terms(loss))
    for dim, weight in zip(dims, weights, strict=True):
        cut = cut_groups(groups, dim), cut_columns(columns, dim)
        for own_weight, losses_B in _each(*cut, loss, temperature, dtype, dp_group, projection):
            factor = weight * own_weight
            losses.append(losses_B if factor == 1 else factor * losses_B)
            if is_told:
                sums.append(losses_B.detach().double().sum()[None])
    if loss.needs_scores:
        sums.append(scored(groups)[1].sum().double()[None])
    if loss.cosent_weight:
        sums.append(_is_graded(groups).sum().double()[None])
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0), torch.cat(sums)


def _is_graded(groups: Groups) -> Tensor:
    """bool [B]"""
    return groups.mask_BM[:, 0] & False if groups.grade_B is None else ~groups.grade_B.isnan()


def _each(
    groups: Groups, columns: Columns | None, loss: LossConfig, temperature: float | Tensor,
    dtype: torch.dtype, dp_group: Any, projection: Tensor | None,
) -> Iterator[tuple[float, Tensor]]:  # fmt: skip
    """(weight, [B]) of each term that has a weight, in the order of TERMS. A graded pair may be far apart: it
    is no positive."""
    if loss.info_nce_weight:
        losses_B = contrastive_loss(groups, columns, loss, temperature, dtype)
        if groups.grade_B is not None:
            losses_B = losses_B.masked_fill(_is_graded(groups), 0.0)
        yield loss.info_nce_weight, losses_B
    if loss.kl_weight:
        yield loss.kl_weight, kl(groups, temperature, loss.kl_temperature)
    if loss.margin_mse_weight:
        yield loss.margin_mse_weight, margin_mse(groups)
    if loss.needs_vectors:
        assert projection is not None
        yield loss.teacher_vectors_weight, teacher_vectors(groups, projection)
    if loss.cosent_weight:
        if groups.grade_B is None:
            yield loss.cosent_weight, groups.q_BD.new_zeros(len(groups.q_BD)) * groups.q_BD.sum()
        else:
            whole = cosent(groups, loss.cosent_temperature, dp_group)
            yield loss.cosent_weight, whole.expand(len(groups.q_BD))


def figures(totals: Mapping[str, float], loss: LossConfig) -> dict[str, Any]:
    """Of the sums of a global batch, "rows" and "loss" (their sum). losses: of each term, without its weight;
    over the rows that have what it is of, None where no row has. rows_without_candidates: but for graded
    pairs, which are contrasted with nothing."""
    graded = totals.get("graded_rows", 0.0)
    found: dict[str, Any] = {
        "loss": totals["loss"] / totals["rows"],
        # Of rows that have a candidate; None where no row of the step has one.
        "accuracy": totals["hits"] / totals["ranked_rows"] if totals["ranked_rows"] else None,
        "rows_without_candidates": round(totals["rows"] - graded - totals["ranked_rows"]),
        "positive_similarity": totals["positive"] / totals["rows"],
        "negative_similarity": totals["negative"] / max(1.0, totals["negatives"]),
    }
    if "temperature" in totals:
        found["temperature"] = totals["temperature"] / totals["rows"]
    if terms := _terms(loss):
        count = {"info_nce": totals["rows"] - graded, "cosent": graded, "teacher_vectors": totals["rows"]}
        of = {term: count.get(term.partition("@")[0], totals.get("scored_rows", 0.0)) for term in terms}
        found["losses"] = {term: totals[_sum_of(term)] / of[term] if of[term] else None for term in terms}
    found |= {name: round(totals[name]) for name in ("scored_rows", "graded_rows") if name in totals}
    return found
