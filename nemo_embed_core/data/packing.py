"""Rows into micro-batches: split over ranks by tokens, whole groups, queries and documents together.

A group is a query with its positive and hard negatives; data/bins.py says which go together.

# T packed tokens · N sequences · B queries of the global batch · b queries of a micro-batch · K hard
negatives # J documents that a row knows to be right and that others bring
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from nemo_embed_core.config import DataConfig
from nemo_embed_core.data.bins import plan, split_over_ranks
from nemo_embed_core.data.judge import known_of
from nemo_embed_core.data.sampler import Sampler, choose_documents
from nemo_embed_core.errors import UserError

if TYPE_CHECKING:  # the tokenizers package is not needed to pack
    from nemo_embed_core.data.store import Store
    from nemo_embed_core.data.teacher_vectors import TeacherVectors

P = TypeVar("P", bound="PackedBatch")


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """N sequences laid end to end, shortest first; a dummy sequence at the end when T had to be padded."""

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, from 0 in every sequence
    cu_seqlens: torch.Tensor  # [N + 1] int32
    lengths: tuple[int, ...]  # [N], host side; the dummy included
    max_seqlen: int
    num_sequences: int  # real ones: pooled rows [num_sequences:] are the dummy's and are never indexed
    num_tokens: int  # real ones

    def to(self: P, device: torch.device | str) -> P:
        """The same batch with its tensors on `device`, from pinned memory where the copy then overlaps."""
        device = torch.device(device)
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                pinned = value.pin_memory() if (value.device.type, device.type) == ("cpu", "cuda") else value
                moved[field.name] = pinned.to(device, non_blocking=True)
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class MicroBatch(PackedBatch):
    """A packed batch of b whole groups. query_index, document_index: rows of the pooled [N, D]."""

    query_index: torch.Tensor  # [b] int64
    document_index: torch.Tensor  # [b, 1 + K] int64; column 0 the positive; 0 where missing
    document_mask: torch.Tensor  # [b, 1 + K] bool; False: the row has fewer negatives
    # [b, 1 + K] int64; the same text has the same id (Store.same_as); -1 where missing.
    document_ids: torch.Tensor
    # [b, J] int64; ids within the global batch that are no negatives of the row; -2 in empty places.
    known_ids: torch.Tensor
    rows: np.ndarray  # [b] int64 rows of the store, to name a sample in an error
    grades: torch.Tensor | None = None  # [b] fp32; NaN: not graded; None: no row of the store is
    # [b, 1 + 1 + K, a teacher's columns]: of the query, then the documents; 0 where missing. None: not asked.
    teacher_vectors: torch.Tensor | None = None
    teacher_scores: torch.Tensor | None = None  # [b, 1 + K] fp32; NaN where missing; None: the store has none


# ------------------------------------------------------------------------------------------ tensors


def shapes_cost_memory(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether every new T costs memory for good: oneDNN keeps some 2 MB for each bf16 GEMM of another size.

    Nothing else does by the shape: fp32 on a CPU keeps nothing, Triton specialises its kernels on whether an
    integer is 1 or a multiple of 16, and CUDA's caching allocator hands freed blocks out again.
    """
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def padded(num_tokens: int, pad_to_multiple: int, room: int, few_shapes: bool) -> int:
    """T >= num_tokens, a multiple of pad_to_multiple, at most `room` (which is one).

    few_shapes: one of at most 32 equal steps up to `room`, below the fourth of them of two an octave: some 40
    values of T.
    """
    step = pad_to_multiple
    if few_shapes:
        equal, octave = -(-room // 32), 2 ** (max(num_tokens, 64) - 1).bit_length() // 4
        step = -(-min(equal, octave) // pad_to_multiple) * pad_to_multiple
    return min(-(-num_tokens // step) * step, room)


def _pack(
    sequences: Sequence[np.ndarray], lengths: np.ndarray, pad_to_multiple: int, room: int | None = None
) -> dict[str, Any]:
    """The fields of a PackedBatch from sequences in their final order; room: pad to one of few T up to it."""
    num_tokens = int(lengths.sum())
    parts = list(sequences)
    # A multiple of tp_size: reduce-scatter over tokens needs equal slices on every rank. One extra real
    # sequence (not padding inside the last one) keeps the pooled rows of the others untouched.
    T = padded(num_tokens, pad_to_multiple, room or num_tokens + pad_to_multiple, room is not None)
    if pad := T - num_tokens:
        parts.append(np.zeros(pad, np.int32))
        lengths = np.append(lengths, pad)
    cu_seqlens = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    assert T < 2**31, f"{T} tokens do not fit int32 cu_seqlens"
    input_ids = np.empty(T, np.int64)
    np.concatenate(parts, out=input_ids, casting="same_kind")
    position_ids = np.arange(T, dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        "lengths": tuple(lengths.tolist()),
        "max_seqlen": int(lengths.max()),
        "num_sequences": len(sequences),
        "num_tokens": num_tokens,
    }


def _same_ids(store: Store, doc_ids: np.ndarray) -> np.ndarray:
    """int64, one id for all documents that are the same text; -1 where missing."""
    return np.where(doc_ids >= 0, store.same_as[doc_ids], -1).astype(np.int64)


def known_in_batch(store: Store, rows_B: np.ndarray, ids_BM: np.ndarray) -> np.ndarray:
    """[B, J]: of what each row knows to be right (Store.known_positives) the ids that stand in ids_BM, but
    for the row's own positive ids_BM[:, 0]; -2 in empty places. J is the most that any row has, most often 0.
    """
    present = np.unique(ids_BM[ids_BM >= 0])
    known_BJ = known_of(store.known_offsets, store.known_ids, store.row_groups[rows_B], present)
    if store.row_classes is not None:
        of_class_BJ = known_of(store.known_offsets, store.known_ids, store.row_classes[rows_B], present)
        known_BJ = -np.sort(-np.concatenate([known_BJ, of_class_BJ], axis=1), axis=1)
        known_BJ[:, 1:][known_BJ[:, 1:] == known_BJ[:, :-1]] = -2
    known_BJ[known_BJ == ids_BM[:, :1]] = -2
    known_BJ = -np.sort(-known_BJ, axis=1)  # empty places last
    return known_BJ[:, : int((known_BJ >= 0).sum(1).max(initial=0))]


def build_micro_batch(
    store: Store,
    rows_b: np.ndarray,
    doc_ids: np.ndarray,
    pad_to_multiple: int = 1,
    known_ids: np.ndarray | None = None,
    room: int | None = None,
    vectors: TeacherVectors | None = None,
) -> MicroBatch:
    """One micro-batch of the groups (rows_b [b], doc_ids [b, 1 + K], -1: missing).

    room: the most tokens that there may be, where T is to be one of few values. vectors: a teacher's.
    known_ids [b, J]: of the global batch that this is a part of; without it this is all there is.

    A document that several groups bring is encoded once: the same text has the same embedding, and its
    gradient is the sum, as autograd's index_select makes it. Sequences stand shortest first, queries and
    documents mixed, so that equal lengths are neighbours.
    """
    assert doc_ids.ndim == 2 and doc_ids.shape[0] == len(rows_b), f"{doc_ids.shape=} {rows_b.shape=}"
    b = len(rows_b)
    mask = doc_ids >= 0
    unique, inverse = np.unique(doc_ids[mask], return_inverse=True)
    lengths = np.concatenate([store.query_lengths[rows_b], store.document_lengths[unique]]).astype(np.int64)
    order = np.argsort(lengths, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    tokens = [store.query_tokens(row) for row in rows_b.tolist()]
    tokens += [store.document_tokens(doc_id) for doc_id in unique.tolist()]
    document_index = np.zeros(doc_ids.shape, np.int64)
    document_index[mask] = place[b + inverse]
    same_ids = _same_ids(store, doc_ids)
    if known_ids is None:
        known_ids = known_in_batch(store, rows_b, same_ids)
    return MicroBatch(
        **_pack([tokens[i] for i in order.tolist()], lengths[order], pad_to_multiple, room),
        query_index=torch.from_numpy(place[:b].copy()),
        document_index=torch.from_numpy(document_index),
        document_mask=torch.from_numpy(mask),
        document_ids=torch.from_numpy(same_ids),
        known_ids=torch.from_numpy(known_ids.astype(np.int64)),
        rows=rows_b,
        grades=None if store.row_grades is None else torch.from_numpy(store.row_grades[rows_b]),
        teacher_vectors=None if vectors is None else torch.from_numpy(vectors.of(rows_b, doc_ids)),
        teacher_scores=None
        if (scores := store.scores(rows_b, doc_ids)) is None
        else torch.from_numpy(scores),
    )


def pack_texts(
    token_arrays: Sequence[np.ndarray], max_tokens: int, pad_to_multiple: int = 1, few_shapes: bool = False
) -> Iterator[tuple[np.ndarray, PackedBatch]]:
    """(indices [n], batch): pooled row i is of token_arrays[indices[i]]; at most max_tokens each.

    Texts of similar length travel together, longest batches first (running out of memory shows at once).
    few_shapes: T is one of some 40 values (shapes_cost_memory).
    """
    lengths = np.fromiter((len(tokens) for tokens in token_arrays), np.int64, len(token_arrays))
    for indices in text_bins(lengths, max_tokens, pad_to_multiple):
        arrays = [token_arrays[i] for i in indices.tolist()]
        yield indices, pack_bin(arrays, max_tokens, pad_to_multiple, few_shapes)


def pack_bin(
    arrays: Sequence[np.ndarray], max_tokens: int, pad_to_multiple: int = 1, few_shapes: bool = False
) -> PackedBatch:
    """The batch of one of text_bins, whose texts these are in its order."""
    room = whole_room(max_tokens, pad_to_multiple) if few_shapes else None
    lengths = np.fromiter((len(tokens) for tokens in arrays), np.int64, len(arrays))
    return PackedBatch(**_pack(arrays, lengths, pad_to_multiple, room))


def text_bins(lengths: np.ndarray, max_tokens: int, pad_to_multiple: int = 1) -> Iterator[np.ndarray]:
    """[n] indices of the texts of each batch of pack_texts, in its order; shortest first."""
    room = whole_room(max_tokens, pad_to_multiple)
    if len(lengths) and int(lengths.max()) > room:
        i = int(lengths.argmax())
        raise UserError(
            f"text {i} has {int(lengths[i])} tokens, more than max_tokens={max_tokens} (in whole multiples "
            f"of {pad_to_multiple}: {room}); raise max_tokens or lower max_length"
        )
    order = np.argsort(lengths, kind="stable")
    end = len(order)
    cumulated = np.concatenate([[0], np.cumsum(lengths[order])])
    while end:
        start = int(np.searchsorted(cumulated, cumulated[end] - room, side="left"))
        yield order[start:end]
        end = start


def whole_room(max_tokens: int, pad_to_multiple: int) -> int:
    """The largest number of real tokens whose padded length is still at most max_tokens."""
    if max_tokens < pad_to_multiple:
        raise UserError(
            f"max_tokens={max_tokens} is less than the {pad_to_multiple} tensor-parallel slices of a batch"
        )
    return max_tokens // pad_to_multiple * pad_to_multiple


# ------------------------------------------------------------------------------------------ a step


@dataclass(frozen=True)
class Drawn:
    """A global batch before any token is read; bins [rank][micro-batch]: positions in it."""

    rows_B: np.ndarray
    doc_ids: np.ndarray  # [B, 1 + K]; -1: missing
    tokens_B: np.ndarray  # int64: of each row's own texts, whichever other rows have them too
    bins: list[list[np.ndarray]]

    def lengths(self, store: Store, bin_: np.ndarray) -> np.ndarray:
        """int64 [N]: of the sequences of a micro-batch, in which a repeated document stands once."""
        ids = np.unique(self.doc_ids[bin_])
        documents = store.document_lengths[ids[ids >= 0]]
        return np.concatenate([store.query_lengths[self.rows_B[bin_]], documents]).astype(np.int64)


def draw_rows(
    store: Store, sampler: Sampler, step: int, config: DataConfig, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows_B, tokens_B, doc_ids) of Drawn."""
    rows_B = sampler.rows(step)
    doc_ids = choose_documents(
        store, rows_B, sampler.epochs(step), config.num_hard_negatives, seed, config.negatives
    )
    # Missing documents (-1) index the last length; the mask takes it away again.
    document_tokens = np.where(doc_ids >= 0, store.document_lengths[doc_ids], 0).astype(np.int64)
    return rows_B, store.query_lengths[rows_B].astype(np.int64) + document_tokens.sum(1), doc_ids


def draw_batch(
    store: Store,
    sampler: Sampler,
    step: int,
    dp_size: int,
    config: DataConfig,
    pad_to_multiple: int,
    seed: int,
) -> Drawn:
    """Pure; UserError for a row that does not fit."""
    rows_B, tokens_B, doc_ids = draw_rows(store, sampler, step, config, seed)
    room = whole_room(config.max_tokens, pad_to_multiple)
    if int(tokens_B.max()) > room:
        worst = int(tokens_B.argmax())
        raise UserError(
            f"row {int(rows_B[worst])} of the store (0-based) has {int(tokens_B[worst])} tokens with its "
            f"passages, more than data.max_tokens={config.max_tokens} (in whole multiples of "
            f"{pad_to_multiple}: {room}); raise data.max_tokens, or lower data.document_max_length or "
            "data.num_hard_negatives"
        )
    positions = split_over_ranks(tokens_B, dp_size)
    plans = plan([tokens_B[p] for p in positions], room)
    return Drawn(
        rows_B, doc_ids, tokens_B, [[p[b] for b in bins] for p, bins in zip(positions, plans, strict=True)]
    )


def load_batch(
    store: Store,
    sampler: Sampler,
    step: int,
    dp_rank: int,
    dp_size: int,
    config: DataConfig,
    pad_to_multiple: int = 1,
    seed: int = 0,
    few_shapes: bool = False,
    vectors: TeacherVectors | None = None,
) -> tuple[list[MicroBatch], int]:
    """(micro-batches of this dp rank, real tokens of the global batch): pure, the same on all tp ranks.

    Every rank gets the same number of queries and of micro-batches. The token count is that of the sequences
    really encoded on all ranks, without dummies and with a document repeated within a micro-batch counted
    once.
    """
    drawn = draw_batch(store, sampler, step, dp_size, config, pad_to_multiple, seed)
    return pack_batch(store, drawn, dp_rank, config, pad_to_multiple, few_shapes, vectors)


def pack_batch(
    store: Store, drawn: Drawn, dp_rank: int, config: DataConfig, pad_to_multiple: int, few_shapes: bool,
    vectors: TeacherVectors | None = None,
) -> tuple[list[MicroBatch], int]:  # fmt: skip
    """load_batch, of what draw_batch has drawn."""
    num_tokens = sum(int(drawn.lengths(store, bin_).sum()) for bins in drawn.bins for bin_ in bins)
    rows_B, doc_ids = drawn.rows_B, drawn.doc_ids
    most = whole_room(config.max_tokens, pad_to_multiple) if few_shapes else None
    known_BJ = known_in_batch(store, rows_B, _same_ids(store, doc_ids))
    micro_batches = [
        build_micro_batch(store, rows_B[bin_], doc_ids[bin_], pad_to_multiple, known_BJ[bin_], most, vectors)
        for bin_ in drawn.bins[dp_rank]
    ]
    return micro_batches, num_tokens
