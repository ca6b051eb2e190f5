"""Forward and backward of one global batch, in micro-batches, with exactly the gradient of the whole batch.

Own hard negatives: a row's loss needs no other row, so micro-batches simply accumulate. In-batch negatives
couple the rows: with several micro-batches the embeddings are made first, the loss of the whole global batch
gives their gradients, and a second forward per micro-batch carries those into the weights (GradCache,
arXiv:2101.06983). One micro-batch needs none: the first pass ends with it and keeps its graph, so that n
micro-batches take 2 n - 1 forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from nemo_embed_core.config import LossConfig
from nemo_embed_core.data.packing import MicroBatch, PackedBatch
from nemo_embed_core.loss.contrastive import Groups
from nemo_embed_core.loss.objective import objective
from nemo_embed_core.model.attention import Segments
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.parallel.fsdp import begin_micro_batch
from nemo_embed_core.parallel.mesh import Mesh


class Stopped(Exception):
    """All ranks leave here what they do; the text is what they would have done next."""


def embed(model: Encoder, batch: PackedBatch) -> Tensor:
    """[N, D] unit rows of a batch; the padding sequence, if any, is the last row and nobody points at
    it."""
    segments = Segments(batch.cu_seqlens, batch.lengths, batch.max_seqlen)
    return model(batch.input_ids, batch.position_ids, segments)


def group(embeddings_ND: Tensor, batch: MicroBatch) -> Groups:
    return Groups(
        q_BD=embeddings_ND[batch.query_index],
        docs_BMD=embeddings_ND[batch.document_index],
        mask_BM=batch.document_mask,
        ids_BM=batch.document_ids,
        known_BJ=batch.known_ids,
        teacher_BM=batch.teacher_scores,
        teacher_BND=batch.teacher_vectors,
        grade_B=batch.grades,
    )


def _concat(groups: Sequence[Groups]) -> Groups:
    """J of known_BJ is that of the global batch; what one micro-batch lacks, all do."""
    names = [field.name for field in fields(Groups) if getattr(groups[0], field.name) is not None]
    return Groups(**{name: torch.cat([getattr(g, name) for g in groups]) for name in names})


def forward_backward(
    model: Encoder,
    batches: Sequence[MicroBatch],
    mesh: Mesh,
    loss: LossConfig,
    dtype: torch.dtype,
    before: Callable[[str, int], None] = lambda phase, i: None,
    log_temperature: Tensor | None = None,
    projection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss of each of this rank's queries [B], loss.objective.sum_names of them); gradients are left on the
    parameters, and on log_temperature and projection (loss.objective), where they are learned.

    `before("forward", i)` and the like are called before each forward and backward of micro-batch i, equally
    often on every rank; what it raises ends the step there. dtype: of the forward.

    Every dp rank has equally many queries and equally many micro-batches, so the mean over ranks that FSDP2
    takes is the mean over the global batch.
    """
    rows = sum(len(batch.query_index) for batch in batches)
    batches = [batch.to(mesh.device) for batch in batches]
    if loss.couples_rows and len(batches) > 1:
        return _grad_cache(model, batches, mesh, loss, dtype, rows, before, log_temperature, projection)
    losses, stats = [], []
    for i, batch in enumerate(batches):
        before("forward", i)
        begin_micro_batch(model, i == len(batches) - 1)
        groups = group(embed(model, batch), batch)
        losses_B, sums = objective(
            groups, loss, dtype, mesh.dp_group, mesh.dp_rank, log_temperature, projection
        )
        before("backward", i)
        (losses_B.sum() / rows).backward()
        losses.append(losses_B.detach())
        stats.append(sums)
    return torch.cat(losses), torch.stack(stats).sum(0)


def _grad_cache(
    model: Encoder,
    batches: Sequence[MicroBatch],
    mesh: Mesh,
    loss: LossConfig,
    dtype: torch.dtype,
    rows: int,
    before: Callable[[str, int], None],
    log_temperature: Tensor | None,
    projection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    embeddings = []
    for i, batch in enumerate(batches[1:], 1):
        before("embedding", i)
        with torch.no_grad():
            embeddings.append(embed(model, batch).requires_grad_())
    # Micro-batch 0 keeps its graph, because its backward comes first: gradients are added in order of i.
    before("embedding", 0)
    begin_micro_batch(model, False)
    with_graph = embed(model, batches[0])
    embeddings.insert(0, with_graph.detach().requires_grad_())
    before("loss", 0)
    groups = _concat([group(e, batch) for e, batch in zip(embeddings, batches, strict=True)])
    losses_B, sums = objective(groups, loss, dtype, mesh.dp_group, mesh.dp_rank, log_temperature, projection)
    (losses_B.sum() / rows).backward()
    for i, (e, batch) in enumerate(zip(embeddings, batches, strict=True)):
        if i > 0:
            before("forward", i)
            begin_micro_batch(model, i == len(batches) - 1)
            with_graph = embed(model, batch)
        before("backward", i)
        with_graph.backward(e.grad)
    return losses_B.detach(), sums
