"""Batches as lengths: of a real store, drawn as training draws them, or of a stated distribution.

B queries of the global batch · M = 1 + num_hard_negatives documents of each
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nemo_embed_core.config.data import DataConfig
from nemo_embed_core.config.plan import LengthsConfig
from nemo_embed_core.data.bins import plan, split_over_ranks
from nemo_embed_core.data.population import longest_draws, population
from nemo_embed_core.data.sampler import Sampler, choose_documents, sampler
from nemo_embed_core.data.store import Store
from nemo_embed_core.errors import UserError

NUM_STEPS = 4  # global batches that are looked at


@dataclass(frozen=True)
class Texts:
    """batches: of some steps, tokens of each sequence [B, 1 + M], the query first, 0 where a row has no more
    documents. longest: tokens of the longest row that can be drawn."""

    batches: Sequence[np.ndarray]
    longest: int
    words: str  # where they come from
    sampler: Sampler | None = None  # of a real store


@dataclass(frozen=True)
class Split:
    """The step's micro-batches under a layout: of the fullest rank in each, tokens, sum of squared lengths,
    sequences."""

    micro_batches: list[tuple[int, int, int]]
    tokens: int  # of all ranks
    squares: int


def texts_of(
    store: str, data: DataConfig, takes_lone_rows: bool, lengths: LengthsConfig, batch_size: int, seed: int
) -> Texts:
    """takes_lone_rows: of the loss, which decides what rows of a store are drawn."""
    M = 1 + data.num_hard_negatives
    if store:
        if not (Path(store) / "manifest.json").is_file():
            raise UserError(
                f"store={store} is no folder of a token store, which has a manifest.json: it is "
                "data.cache_dir/DIGEST, as nemo-embed prepare and training print it"
            )
        opened = Store(Path(store))
        roomy = replace(data, max_tokens=2**31)  # which rows are too long is said of each layout
        drawn = population(opened, roomy, takes_lone_rows, log=lambda message: None, seed=seed)
        found, batches = sampler(drawn.parts, data.batches, batch_size, seed), []
        for step in range(NUM_STEPS):
            rows = found.rows(step)
            ids = choose_documents(
                opened, rows, found.epochs(step), data.num_hard_negatives, seed, data.negatives
            )
            documents = np.where(ids >= 0, opened.document_lengths[ids], 0).astype(np.int64)
            batches.append(
                np.concatenate([opened.query_lengths[rows].astype(np.int64)[:, None], documents], 1)
            )
        longest = int(longest_draws(opened, data.num_hard_negatives, data.negatives).max())
        return Texts(batches, longest, f"the store {store}, {len(opened):,} rows", found)
    rng = np.random.default_rng(seed)
    most = [max(each) for each in zip(*data.all_lengths(), strict=True)]
    query = lengths.query_mean, lengths.query_p95, most[0]
    document = lengths.document_mean, lengths.document_p95, most[1]
    batches = [
        np.concatenate([draw(rng, (batch_size, 1), *query), draw(rng, (batch_size, M), *document)], 1)
        for _ in range(NUM_STEPS)
    ]
    # Whatever the distribution, a text may be as long as it is allowed, unless all are alike.
    at = [round(mean) if mean == p95 else 2**31 for mean, p95, _ in (query, document)]
    longest = max(min(q, at[0]) + M * min(d, at[1]) for q, d in data.all_lengths())
    words = (
        f"stated lengths: queries of {lengths.query_mean:g} tokens (95 %: {lengths.query_p95:g}), "
        f"documents of {lengths.document_mean:g} (95 %: {lengths.document_p95:g})"
    )
    return Texts(batches, longest, words)


def draw(rng: np.random.Generator, shape: tuple[int, int], mean: float, p95: float, most: int) -> np.ndarray:
    """int64 lognormal with this mean and 95th percentile, cut to [2, most]."""
    # p95 / mean = exp(1.645 s - s^2 / 2): the smaller root in s.
    s = 1.645 - math.sqrt(max(0.0, 1.645**2 - 2 * math.log(p95 / mean)))
    return np.clip(np.rint(rng.lognormal(math.log(mean) - s * s / 2, s, shape)), 2, most).astype(np.int64)


def split(lengths_BS: np.ndarray, dp_size: int, room: int) -> Split:
    """As training splits the batch over ranks and packs it; a document that two rows of a micro-batch share
    counts twice here."""
    tokens_B = lengths_BS.sum(1)
    positions = split_over_ranks(tokens_B, dp_size)
    bins = plan([tokens_B[p] for p in positions], room)
    fullest = []
    for i in range(len(bins[0])):
        rows = max(
            (p[b[i]] for p, b in zip(positions, bins, strict=True)),
            key=lambda rows: int(tokens_B[rows].sum()),
        )
        found = lengths_BS[rows]
        fullest.append((int(found.sum()), int(np.square(found).sum()), int((found > 0).sum())))
    return Split(fullest, int(lengths_BS.sum()), int(np.square(lengths_BS).sum()))
