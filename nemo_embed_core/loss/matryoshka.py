"""Matryoshka (arXiv:2205.13147): the loss of rows cut to their first columns, for each of several widths.

    loss = sum over dims d of weight_d loss(normalize(rows[:, :d]))

It is sentence-transformers' MatryoshkaLoss. The rows of other ranks are gathered once, whole, and cut here.
Bytes beside the loss itself are those of a copy and its gradient: for each width 3 d elements a row forward,
5 d backward.
"""

from __future__ import annotations

from dataclasses import replace

from nemo_embed_core.loss.contrastive import Columns, Groups
from nemo_embed_core.model.pooling import cut_rows


def cut_groups(groups: Groups, dim: int) -> Groups:
    return replace(groups, q_BD=cut_rows(groups.q_BD, dim), docs_BMD=cut_rows(groups.docs_BMD, dim))


def cut_columns(columns: Columns | None, dim: int) -> Columns | None:
    if columns is None:
        return None
    docs, queries = (
        None if rows is None else cut_rows(rows, dim) for rows in (columns.docs_PD, columns.queries_QD)
    )
    return replace(columns, docs_PD=docs, queries_QD=queries)
