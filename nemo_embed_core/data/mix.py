"""Of several datasets the rows that a run draws: caps and weights.

parts(datasets, rows, ends, seed)      for the Sampler; UserError names a dataset whose options do not fit
planned(parts), drawn(counts)          lines that say what an epoch draws of each, and what was drawn
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.config.data import names_of
from nemo_embed_core.data.sampler import Part, permutation
from nemo_embed_core.errors import UserError


def capped(datasets: Sequence[DatasetConfig], rows: np.ndarray, ends: np.ndarray, seed: int) -> np.ndarray:
    """`rows` [n], ascending, with a sample of `cap` of those of each dataset; ends: of their rows in the
    store."""
    left = []
    for i, (dataset, own) in enumerate(zip(datasets, _by_dataset(rows, ends), strict=True)):
        if dataset.cap is not None and dataset.cap < len(own):
            own = own[np.sort(permutation(seed, i, -1, len(own))[: dataset.cap])]
        left.append(own)
    return np.concatenate(left)


def parts(datasets: Sequence[DatasetConfig], rows: np.ndarray, ends: np.ndarray) -> list[Part]:
    """`rows` with the number of draws of each dataset in an epoch: n x weight, half up."""
    found = []
    for name, dataset, own in zip(names_of(datasets), datasets, _by_dataset(rows, ends), strict=True):
        # The decimal number that was written: 0.29 is 29/100, and 50 x 0.29 is 14.5.
        draws = int(len(own) * Fraction(repr(dataset.weight)) + Fraction(1, 2))
        if len(own) and not draws:
            raise UserError(
                f"data.datasets: {name}: weight={dataset.weight:g} of {len(own):,} rows is less than half a "
                "row an epoch; raise it or leave the dataset out"
            )
        found.append(Part(own, draws, name))
    return found


Counts = dict[str, list[int]]  # of each dataset: rows, and tokens of their texts


def count(
    counts: Counts, parts: Sequence[Part], ends: np.ndarray, rows_B: np.ndarray, tokens_B: np.ndarray
) -> None:
    """Adds a step's rows. tokens_B [B]: of each row's own texts, so that neither the number of ranks nor what
    micro-batches share changes them."""
    dataset_B = np.searchsorted(ends, rows_B, side="right")
    rows = np.bincount(dataset_B, minlength=len(parts)).tolist()
    tokens = np.bincount(dataset_B, tokens_B, len(parts)).tolist()  # exact below 2^53
    for part, more in zip(parts, zip(rows, tokens, strict=True), strict=True):
        before = counts.get(part.name, [0, 0])
        counts[part.name] = [before[0] + more[0], before[1] + int(more[1])]


def planned(parts: Sequence[Part]) -> str:
    """`mix as planned, of 79 draws an epoch: a 50 (63.3%), b 9 (11.4%), c 20 (25.3%)`."""
    total = sum(part.draws for part in parts)
    each = (f"{part.name} {part.draws:,} ({part.draws / total:.1%})" for part in parts)
    return f"mix as planned, of {total:,} draws an epoch: {', '.join(each)}"


def drawn(counts: Mapping[str, Sequence[int]], step: int) -> str:
    """`mix as drawn until step 3, of 24 rows and 901 tokens: a 15 (62.5%; 55.0% of the tokens), ...`."""
    rows, tokens = (max(1, sum(each)) for each in zip(*counts.values(), strict=True))
    each = (
        f"{name} {n:,} ({n / rows:.1%}; {t / tokens:.1%} of the tokens)" for name, (n, t) in counts.items()
    )
    return f"mix as drawn until step {step}, of {rows:,} rows and {tokens:,} tokens: {', '.join(each)}"


def _by_dataset(rows: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, np.searchsorted(rows, ends[:-1]))
