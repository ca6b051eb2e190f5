"""Micro-batches as far as memory and the wire go, and the largest that a run can meet; no token is read.

N sequences · M = 1 + K documents of a query
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_embed_core.config import DataConfig, LossConfig
from nemo_embed_core.data.packing import MicroBatch, draw_batch, padded, whole_room
from nemo_embed_core.data.sampler import Sampler

if TYPE_CHECKING:  # the tokenizers package is not needed for lengths
    from nemo_embed_core.data.store import Store


@dataclass(frozen=True)
class Shape:
    """lengths: of its sequences, the padding one, if any, among them."""

    lengths: tuple[int, ...]
    num_queries: int
    num_documents: int  # of each query

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def tensors(self, loss: LossConfig, teacher_width: int = 0) -> MicroBatch:
        """Of token 0 throughout, with the scores, vectors and grades that the loss's terms take."""
        T, N, b, M = self.num_tokens, len(self.lengths), self.num_queries, self.num_documents
        rows = torch.arange(b * (1 + M)) % N
        return MicroBatch(
            input_ids=torch.zeros(T, dtype=torch.int64),
            position_ids=torch.cat([torch.arange(n) for n in self.lengths]),
            cu_seqlens=torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32),
            lengths=self.lengths, max_seqlen=max(self.lengths), num_sequences=N, num_tokens=T,
            query_index=rows[:b], document_index=rows[b:].view(b, M),
            document_mask=torch.ones(b, M, dtype=torch.bool), document_ids=torch.arange(b * M).view(b, M),
            known_ids=torch.zeros(b, 0, dtype=torch.int64), rows=np.zeros(b, dtype=np.int64),
            teacher_scores=torch.zeros(b, M) if loss.needs_scores else None,
            teacher_vectors=torch.zeros(b, 1 + M, teacher_width) if teacher_width else None,
            grades=torch.zeros(b) if loss.cosent_weight else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Most:
    """The most of each in any micro-batch, be it in different ones."""

    tokens: int = 0  # with padding
    sequences: int = 0  # with the padding one
    longest: int = 0  # tokens of a sequence
    queries: int = 0
    micro_batches: int = 0  # of a step and rank

    @staticmethod
    def of(found: Iterable[Most]) -> Most:
        return Most(*(max(values) for values in zip(*map(astuple, found), strict=True)))

    def step(self, num_documents: int, couples_rows: bool, queries_of_rank: int) -> list[Shape]:
        """Micro-batches that need no less memory than any of the run: the peak of one comes where gradients
        are added to those of another, so there are two where a step can have several.

        One of them has as many tokens, sequences, queries and as long a sequence as any. Rows that need
        others meet in one loss, so there the queries are those of a whole step, halved.
        """
        count = min(2, self.micro_batches)
        queries = -(-queries_of_rank // count) if couples_rows else self.queries
        rest = self.tokens - self.longest
        others = min(self.sequences - 1, rest)
        short = [rest // others + (i < rest % others) for i in range(others)]
        return [Shape((*sorted(short), self.longest), queries, num_documents)] * count


def most_of(
    store: Store, sampler: Sampler, steps: range, dp_size: int, config: DataConfig, pad_to_multiple: int,
    seed: int, few_shapes: bool,
) -> Most:  # fmt: skip
    """Over all dp ranks: every one of these steps is drawn and packed as load_batch does it."""
    room, most = whole_room(config.max_tokens, pad_to_multiple), astuple(Most())
    for step in steps:
        drawn = draw_batch(store, sampler, step, dp_size, config, pad_to_multiple, seed)
        for bins in drawn.bins:
            for bin_ in bins:
                lengths = drawn.lengths(store, bin_)
                real = int(lengths.sum())
                T = padded(real, pad_to_multiple, room if few_shapes else real + pad_to_multiple, few_shapes)
                pad, longest = T - real, max(int(lengths.max()), T - real)
                here = T, len(lengths) + (pad > 0), longest, len(bin_), len(bins)
                most = tuple(map(max, most, here))
    return Most(*most)
