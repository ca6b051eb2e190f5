"""What the step benchmark trains on and encodes: shapes, groups of texts, and global batches of
them, packed for ours and as rows for the peers.

T packed tokens · N padded sequences · L longest of them · B queries · M = 1 + K passages of a query
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.config import DataConfig, ModelConfig
from nemo_embed_core.data.packing import MicroBatch, load_batch
from nemo_embed_core.data.sampler import Sampler, choose_documents
from nemo_embed_core.train.metrics import training_flops

SHAPES = {
    # Llama-3.2-1B, head_dim 64.
    "1b": ModelConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
    "8b": ModelConfig(),  # Llama-3.1-8B
    # 28 M parameters, 9 M of them in GEMMs, as small encoders divide them: what a CPU can step through.
    "tiny": ModelConfig(
        vocab_size=49152, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2,
    ),
}  # fmt: skip

# Lengths in tokens: (mean, 95th percentile) of a lognormal, cut at MAX_LENGTH. Package descriptions in the
# Llama-3.1 tokenizer (mean 105, median 81, p95 249, p99 418) and titles as queries.
PASSAGES, QUERIES, MAX_LENGTH = (105.0, 249.0), (14.0, 26.0), 512

TEMPERATURE = 0.02


def draw_lengths(rng: np.random.Generator, n: int, mean: float, p95: float, longest: int) -> np.ndarray:
    """int32 [n], lognormal with this mean and 95th percentile, cut to [2, longest]."""
    # p95 / mean = exp(1.645 s - s^2 / 2): the smaller root in s.
    s = 1.645 - math.sqrt(1.645**2 - 2 * math.log(p95 / mean))
    return np.clip(np.rint(rng.lognormal(math.log(mean) - s * s / 2, s, n)), 2, longest).astype(np.int32)


class Groups:
    """What data/packing.py and data/sampler.py read of a Store: rows of a query, a positive and K hard
    negatives.

    Token ids fall off steeply with their rank, as words do: the backward of the embedding depends on repeated
    ids.
    """

    def __init__(
        self, num_rows: int, num_hard_negatives: int, vocab_size: int, seed: int, longest: int = MAX_LENGTH
    ):
        rng, M = np.random.default_rng(seed), 1 + num_hard_negatives
        self.query_lengths = draw_lengths(rng, num_rows, *QUERIES, longest)
        self.document_lengths = draw_lengths(rng, num_rows * M, *PASSAGES, longest)

        def texts(lengths: np.ndarray) -> list[np.ndarray]:
            ids = (vocab_size * rng.random(int(lengths.sum())) ** 3).astype(np.int32)
            return np.split(ids, np.cumsum(lengths)[:-1])

        self.queries, self.documents = texts(self.query_lengths), texts(self.document_lengths)
        rows = np.arange(num_rows, dtype=np.int64)
        self.positive_ids, self.positive_offsets = rows * M, np.arange(num_rows + 1)
        self.negative_ids = (rows[:, None] * M + np.arange(1, M)).ravel()
        self.negative_offsets = np.arange(num_rows + 1) * (M - 1)
        self.same_as = np.arange(num_rows * M)  # no two documents are the same
        # Each row has a query of its own and knows its own positive alone.
        self.row_groups, self.known_offsets, self.known_ids = rows, self.positive_offsets, self.positive_ids
        self.row_classes = None
        self.row_grades = None

    def __len__(self) -> int:
        return len(self.queries)

    def query_tokens(self, row: int) -> np.ndarray:
        return self.queries[row]

    def document_tokens(self, doc_id: int) -> np.ndarray:
        return self.documents[doc_id]

    def scores(self, rows_B: np.ndarray, doc_ids_BM: np.ndarray) -> None:
        """No row has a teacher's."""


def pad(sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """ids [N, L] int64 and mask [N, L] bool: right-padded to the longest, in multiples of 8."""
    longest = -(-max(len(s) for s in sequences) // 8) * 8
    ids, mask = (
        torch.zeros(len(sequences), longest, dtype=torch.int64),
        torch.zeros(len(sequences), longest).bool(),
    )
    for i, s in enumerate(sequences):
        ids[i, : len(s)], mask[i, : len(s)] = torch.from_numpy(s.astype(np.int64)), True
    return ids, mask


@dataclass(frozen=True)
class Padded:
    """A micro-batch as the peers take it."""

    query_ids: Tensor  # [B, L]
    query_mask: Tensor
    document_ids: Tensor  # [B * M, L], the positive of a query first
    document_mask: Tensor

    def to(self, device: torch.device) -> Padded:
        if device.type == "cpu":
            return self
        return Padded(*(t.pin_memory().to(device, non_blocking=True) for t in vars(self).values()))

    @property
    def num_rows(self) -> int:
        return len(self.query_ids)

    @property
    def num_positions(self) -> int:
        return self.query_ids.numel() + self.document_ids.numel()


@dataclass(frozen=True)
class GlobalBatch:
    """The same groups packed for us and as (row, its documents) for the peers."""

    micro_batches: list[MicroBatch]
    rows: np.ndarray  # [B]
    documents: np.ndarray  # [B, M]
    num_tokens: int
    flops: float

    def padded(self, groups: Groups, batch_size: int) -> list[Padded]:
        out = []
        for i in range(0, len(self.rows), batch_size):
            queries = [groups.query_tokens(row) for row in self.rows[i : i + batch_size]]
            documents = [groups.document_tokens(d) for d in self.documents[i : i + batch_size].ravel()]
            out.append(Padded(*pad(queries), *pad(documents)))
        return out


def global_batches(
    groups: Groups, model: ModelConfig, num_queries: int, max_tokens: int
) -> list[GlobalBatch]:
    """Steps 0, 1, ... of a run over `groups`, made by the training code's own sampler and packing."""
    K = len(groups.negative_ids) // len(groups)
    config = DataConfig(num_hard_negatives=K, max_tokens=max_tokens)
    sampler = Sampler(len(groups), num_queries, seed=0)
    out = []
    for step in range(len(groups) // num_queries):
        micro_batches, num_tokens = load_batch(groups, sampler, step, 0, 1, config)  # type: ignore[arg-type]
        rows = sampler.rows(step)
        documents = choose_documents(groups, rows, sampler.epochs(step), K, 0)  # type: ignore[arg-type]
        squares = sum(int(np.square(np.asarray(b.lengths, np.int64)).sum()) for b in micro_batches)
        flops = training_flops(model, num_tokens, squares)
        out.append(GlobalBatch(micro_batches, rows, documents, num_tokens, flops))
    return out


def with_layers(shape: str, layers: int) -> ModelConfig:
    """The shape with fewer layers and as small a share of its vocabulary: GEMMs and optimizer keep their
    ratio."""
    full = SHAPES[shape]
    if not layers or layers == full.num_hidden_layers:
        return full
    rows = -(-full.vocab_size * layers // full.num_hidden_layers // 64) * 64
    return replace(full, num_hidden_layers=layers, vocab_size=rows)


def describe(shape: str, model: ModelConfig, parameters: int) -> tuple[str, dict[str, Any]]:
    full = SHAPES[shape]
    gemm = training_flops(model, 1, 0) / 6
    label = f"{shape}: {model.num_hidden_layers} layers"
    if model.num_hidden_layers != full.num_hidden_layers:
        label += (
            f" of {full.num_hidden_layers} and {model.vocab_size:,} of {full.vocab_size:,} embedding rows"
        )
    label += (
        f", hidden {model.hidden_size}, {parameters / 1e6:,.0f} M parameters ({gemm / 1e6:,.0f} M in GEMMs)"
    )
    return label, {"shape": shape, "layers": model.num_hidden_layers, "vocab_size": model.vocab_size}
