"""Of several datasets the rows that a run draws: caps and weights.

names_of(datasets)                     what reports call them
parts(datasets, rows, ends, seed)      for the Sampler; UserError names a dataset whose options do not fit
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.sampler import Part, permutation
from nemo_embed_core.errors import UserError


def dataset_names(paths: Iterable[str], given: Iterable[str] = ()) -> list[str]:
    """A name for each dataset's file or folder, with a number where two have the same; given: the names that
    they have already, or ""."""
    paths = list(paths)
    names = list(given) or [""] * len(paths)
    for i, path in enumerate(paths):
        if names[i]:
            continue
        stem = re.sub(r"(\.(jsonl?|csv|tsv|parquet|arrow))?(\.(gz|zst))?$", "", Path(path).name)
        stem = re.sub(r"[^\w.-]+", "_", stem)  # of a glob
        count = 1
        while (name := stem if count == 1 else f"{stem}-{count}") in names:
            count += 1
        names[i] = name
    return names


def names_of(datasets: Sequence[DatasetConfig]) -> list[str]:
    return dataset_names((d.path for d in datasets), (d.name for d in datasets))


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


def _by_dataset(rows: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, np.searchsorted(rows, ends[:-1]))
