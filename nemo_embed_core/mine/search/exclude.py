"""The documents that a query must not be given: CSR of ids on the host and on the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Exclude(NamedTuple):
    """CSR: query i must not be given the documents ids[indptr[i] : indptr[i + 1]]."""

    indptr: np.ndarray  # [Q + 1] int64
    ids: np.ndarray  # int64

    @staticmethod
    def from_lists(lists: list[list[int]]) -> Exclude:
        indptr = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(x) for x in lists], out=indptr[1:])
        return Exclude(indptr, np.array([i for x in lists for i in x], np.int64))

    def of(self, i: int) -> np.ndarray:
        return self.ids[self.indptr[i] : self.indptr[i + 1]]

    def ascending(self) -> Exclude:
        """The ids of every query in ascending order: the kernel finds them by binary search."""
        rows = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        return Exclude(self.indptr, self.ids[np.lexsort((self.ids, rows))])

    def take(self, rows: np.ndarray) -> Exclude:
        counts = np.diff(self.indptr)[rows]
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        assert self.ids.dtype == np.int64 and self.indptr.dtype == np.int64
        at = np.arange(indptr[-1]) - np.repeat(indptr[:-1], counts) + np.repeat(self.indptr[rows], counts)
        return Exclude(indptr, self.ids[at])


class DeviceExclude:
    """Exclude on the device, where the kernels read it; None: nothing is excluded."""

    def __init__(self, exclude: Exclude | None, device: torch.device):
        self.indptr = self.ids = None
        if exclude is not None:
            self.indptr = torch.from_numpy(exclude.indptr).to(device)
            self.ids = torch.from_numpy(exclude.ids).to(device)

    def of(self, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """(indptr, ids) of these queries, as the ops of streaming.py take them."""
        return (None if self.indptr is None else self.indptr[rows.start : rows.stop + 1]), self.ids

    def positions(self, rows: slice, first_id: int, num_columns: int) -> tuple[Tensor, Tensor] | None:
        """(row, column) in the tile of these queries and documents from first_id; None: no exclusions."""
        return excluded_positions(*self.of(rows), first_id, num_columns)


def excluded_positions(
    indptr: Tensor | None, ids: Tensor | None, first_id: int, num_columns: int
) -> tuple[Tensor, Tensor] | None:
    """(rows, columns) of the excluded documents among num_columns from first_id; None: there is no CSR."""
    if indptr is None or ids is None:
        return None
    counts = indptr.diff()
    columns = ids[indptr[0] : indptr[-1]] - first_id
    rows = torch.repeat_interleave(torch.arange(len(counts), device=ids.device), counts)
    here = (columns >= 0) & (columns < num_columns)
    return rows[here], columns[here]


def not_excluded(rows: Tensor, columns: Tensor, excluded: tuple[Tensor, Tensor], num_columns: int) -> Tensor:
    """Which of (rows, columns) are none of the excluded ones."""
    return torch.isin(rows * num_columns + columns, excluded[0] * num_columns + excluded[1], invert=True)
