"""Which rows of a store a run draws, and how long their documents are: decided before the first step.

population(store, config, takes_lone_rows) -> rows [n] and what an epoch draws of them, and the store's
document_lengths shortened where config.on_long_row says so

The longest draw of a row is its query, its longest positive and its num_hard_negatives longest negatives:
where that fits into max_tokens every draw of every epoch does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.judge import by_group, closure
from nemo_embed_core.data.mix import capped, parts
from nemo_embed_core.data.normal_form import bytes_key
from nemo_embed_core.data.sampler import Part
from nemo_embed_core.data.store import Store
from nemo_embed_core.errors import UserError

NAMED = 20  # rows that an error names
MIN_LENGTH = 16  # tokens that on_long_row=truncate leaves of a document at least


@dataclass(frozen=True)
class Population:
    """rows [n] int64, ascending, and by dataset how often an epoch draws them: what the sampler permutes.
    digest: "" for all rows as in the store, each once."""

    rows: np.ndarray
    parts: list[Part]
    digest: str
    keeps_lone: bool = False  # of rows without a candidate, as the run began


def population(
    store: Store,
    config: DataConfig,
    takes_lone_rows: bool,
    pad_to_multiple: int = 1,
    log: Callable[[str], None] = print,
    keep_lone: bool = False,
    seed: int = 0,
) -> Population:
    """UserError with path:line of the rows that do not fit (on_long_row=error), or when no row is left.

    takes_lone_rows: whether rows without hard negatives are of use: of other rows' candidates, or of vectors.
    pad_to_multiple: tensor-parallel ranks, which take equal slices of a micro-batch.
    keep_lone: draw rows without a candidate too, as a run did that was begun before they were left out.
    seed: of the run, for the samples of datasets with a cap: of rows that can be drawn, so that a cap is met
    where there are as many.
    """
    datasets = _datasets(store, config)
    rows = _with_candidates(store, keep_lone, log) if not takes_lone_rows else np.arange(len(store))
    room = config.max_tokens // pad_to_multiple * pad_to_multiple
    tokens_R = longest_draws(store, config.num_hard_negatives, config.negatives)
    if config.on_long_row != "drop":
        rows = capped(datasets, rows, store.dataset_ends, seed)
    long = rows[tokens_R[rows] > room]
    shortened: dict[int, int] = {}
    if len(long):
        most = f"data.max_tokens={config.max_tokens}"
        what = f"{len(long):,} of {len(rows):,} rows can have more than {most} tokens"
        where = _named(store, long[:3])
        if config.on_long_row == "error":
            named = [f"{store.where(row)}: {tokens_R[row]} tokens" for row in long[:NAMED].tolist()]
            named += [f"and {len(long) - NAMED:,} more"] if len(long) > NAMED else []
            needed = -(-int(tokens_R[long].max()) // pad_to_multiple) * pad_to_multiple
            which = "first" if config.negatives == "first" else "longest"
            draw = f"the query with its longest positive and {config.num_hard_negatives} {which} negatives"
            names = "\n  ".join([f"{what}, {draw}:", *named])
            raise UserError(
                f"{names}\nraise data.max_tokens to at least {needed}, lower data.document_max_length (or a "
                "dataset's own) or data.num_hard_negatives, or set data.on_long_row to drop or truncate"
            )
        if config.on_long_row == "drop":
            log(f"WARNING: {what}: left out, as data.on_long_row=drop says (first: {where})")
            rows = np.setdiff1d(rows, long)
            if not len(rows):
                raise UserError(f"{what}: data.on_long_row=drop leaves none; raise data.max_tokens")
        else:
            shortened = _shorten(store, long, config.num_hard_negatives, room, config.negatives)
            equal = _join_equal(store, shortened)
            joined = f"; documents that are equal to another one since, and no negatives of it: {equal:,}"
            log(
                f"WARNING: {what}: their {len(shortened):,} longest documents are shortened to fit, as "
                f"data.on_long_row=truncate says (first: {where}){joined if equal else ''}"
            )
    if config.on_long_row == "drop":
        rows = capped(datasets, rows, store.dataset_ends, seed)
    drawn = parts(datasets, rows, store.dataset_ends)
    is_once = all(len(part.rows) == part.draws for part in drawn)
    if len(rows) == len(store) and not shortened and is_once:
        return Population(rows, drawn, "", keep_lone)
    content = np.concatenate([rows, np.array(sorted(shortened.items()), np.int64).reshape(-1)])
    digest = hashlib.sha256(content.astype("<i8").tobytes())
    if not is_once:
        digest.update(repr([part.draws for part in drawn]).encode())
    return Population(rows, drawn, digest.hexdigest(), keep_lone)


def _datasets(store: Store, config: DataConfig) -> list[DatasetConfig]:
    """One for each of the store's, with the options of how they are mixed."""
    num_datasets = len(store.dataset_ends)
    if len(config.datasets) == num_datasets:
        return config.datasets
    if any(d.cap is not None or d.weight != 1 for d in config.datasets):
        raise UserError(
            f"data.datasets has {len(config.datasets)}, of which some have a cap or weight, and the store "
            f"{store.folder} was made of {num_datasets}: name all of them, in their order"
        )
    return [DatasetConfig(path=source["path"]) for source in store.manifest["sources"]]


def _with_candidates(store: Store, keep_lone: bool, log: Callable[[str], None]) -> np.ndarray:
    """Rows that have a hard negative or a grade, for loss.in_batch=none; all of them where a run began so."""
    lone = np.diff(store.negative_offsets) == 0
    if store.row_grades is not None:  # which need none
        lone &= np.isnan(store.row_grades)
    if lone.all():
        raise UserError(
            f"no negatives: none of the {len(store)} rows has a hard negative and loss.in_batch=none, so "
            "every loss is 0; mine negatives first (launch/mine.py) or set loss.in_batch=positives"
        )
    what = f"{lone.sum():,} of {len(store):,} rows have no negative and loss.in_batch=none"
    if lone.any() and keep_lone:
        log(
            f"WARNING: {what}: their loss is 0. This run was begun by a version that drew them, so it goes "
            "on to; a new run (--init_from) leaves them out"
        )
    elif lone.any():
        log(
            f"WARNING: {what}: their loss would be 0, they are left out (first: "
            f"{_named(store, np.flatnonzero(lone)[:3])}); mine negatives for them or set "
            "loss.in_batch=positives"
        )
    return np.arange(len(store)) if keep_lone else np.flatnonzero(~lone)


def longest_draws(store: Store, num_hard_negatives: int, negatives: str = "sample") -> np.ndarray:
    """int64 [rows]: tokens of each query, its longest positive and num_hard_negatives longest negatives, or
    its first ones (data.negatives)."""
    positive_lengths = store.document_lengths[store.positive_ids].astype(np.int64)
    tokens_R = store.query_lengths + np.maximum.reduceat(positive_lengths, store.positive_offsets[:-1])
    counts_R = np.diff(store.negative_offsets)
    if not len(store.negative_ids) or not num_hard_negatives:
        return tokens_R
    lengths_N = store.document_lengths[store.negative_ids].astype(np.int64)
    if counts_R.max() > num_hard_negatives:
        row_N = np.repeat(np.arange(len(store)), counts_R)
        order = np.arange(len(row_N)) if negatives == "first" else np.lexsort((-lengths_N, row_N))
        # Within the row: rows keep their places.
        place_N = np.arange(len(order)) - store.negative_offsets[row_N]
        lengths_N = np.where(place_N < num_hard_negatives, lengths_N[order], 0)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N)])
    return tokens_R + sums[store.negative_offsets[1:]] - sums[store.negative_offsets[:-1]]


def _shorten(
    store: Store, long: np.ndarray, num_hard_negatives: int, room: int, which: str
) -> dict[int, int]:
    """{document: tokens}: of each long row, capped at the largest length with which its longest draw fits.

    A document has one length in all rows and epochs, so that it is encoded once and a run can be resumed.
    """
    shortened: dict[int, int] = {}
    for row in long.tolist():
        positives, negatives = store.positives(row), store.negatives(row)
        if which == "first":
            negatives = negatives[:num_hard_negatives]

        def longest(cap: int, positives: np.ndarray = positives, negatives: np.ndarray = negatives) -> int:
            most = np.sort(np.minimum(store.document_lengths[negatives], cap))[::-1][:num_hard_negatives]
            return int(np.minimum(store.document_lengths[positives], cap).max()) + int(most.sum())

        budget = room - int(store.query_lengths[row])
        low, high = 0, room  # longest(low) fits, longest(high + 1) need not
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if longest(middle) <= budget else (low, middle - 1)
        if low < MIN_LENGTH:
            raise UserError(
                f"{store.where(row)}: the query of {store.query_lengths[row]} tokens leaves "
                f"{max(0, budget)} of data.max_tokens for its documents, {low} tokens for each: too few to "
                "shorten them to; raise data.max_tokens or set data.on_long_row=drop"
            )
        for doc_id in {*positives.tolist(), *negatives.tolist()}:
            if store.document_lengths[doc_id] > low:
                store.document_lengths[doc_id] = shortened[doc_id] = low
    return shortened


def _join_equal(store: Store, shortened: dict[int, int]) -> int:
    """Texts with equal tokens since they were shortened become one for the loss; counts the joined documents.

    Documents: store.same_as. Queries: the document is known to be right in the query's group (data/judge.py).
    """
    lengths = np.unique(np.fromiter(shortened.values(), np.int64))
    first: dict[bytes, int] = {}  # tokens -> the first document that has them
    token_D = np.arange(store.num_documents)
    for doc_id in np.flatnonzero(np.isin(store.document_lengths, lengths)).tolist():
        token_D[doc_id] = first.setdefault(bytes_key(store.document_tokens(doc_id).tobytes()), doc_id)
    before, same_D = store.same_as, closure(store.same_as, token_D)
    num_groups = len(store.known_offsets) - 1
    groups = np.repeat(np.arange(num_groups), np.diff(store.known_offsets))
    pairs = [groups * store.num_documents + same_D[store.known_ids]]
    for row in np.flatnonzero(np.isin(store.query_lengths, lengths)).tolist():
        if (equal := first.get(bytes_key(store.query_tokens(row).tobytes()))) is not None:
            pairs.append(store.row_groups[row : row + 1] * store.num_documents + same_D[equal])
    store.known_offsets, store.known_ids = by_group(
        np.unique(np.concatenate(pairs)), num_groups, store.num_documents
    )
    store.same_as = same_D
    return int((same_D != before).sum())


def _named(store: Store, rows: np.ndarray) -> str:
    return ", ".join(store.where(row) for row in rows.tolist())
