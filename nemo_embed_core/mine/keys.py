"""16-byte keys and numbers by the million: columns of numpy, no Python object for each.

first_of(keys)[i]              the first place whose key is that of place i
Numbers(keys).of(other)        where in `keys` each of `other` stands, -1: nowhere
lists_of(rows, ids, count)     row -> its distinct ids, ascending
"""

from __future__ import annotations

import numpy as np

from nemo_embed_core.mine.search.exclude import Exclude

KEY = 16  # bytes


def as_keys(data: bytes | bytearray) -> np.ndarray:
    """[n] of the keys that stand in `data` one after the other, to be compared and sorted."""
    return np.frombuffer(data, f"S{KEY}")  # a zero at the end is no end: all are equally long


def first_of(keys: np.ndarray) -> np.ndarray:
    """[n] int64: the first place with the same key. 40 bytes a key while it sorts."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_new = np.ones(len(keys), bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    del ordered
    first = np.empty(len(keys), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


class Numbers:
    """{key: number}, 24 bytes each; the numbers are places in `keys` unless they are given."""

    def __init__(self, keys: np.ndarray, numbers: np.ndarray | None = None):
        order = np.argsort(keys, kind="stable")
        self.keys, self.numbers = keys[order], order if numbers is None else numbers[order]

    def of(self, keys: np.ndarray) -> np.ndarray:
        """[n] int64, -1 for a key that is not there."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        at = np.searchsorted(self.keys, keys)
        at[at == len(self.keys)] = 0
        return np.where(self.keys[at] == keys, self.numbers[at], -1)


def lists_of(rows: np.ndarray, ids: np.ndarray, num_rows: int) -> Exclude:
    """CSR of the pairs (rows[i], ids[i]), each once."""
    order = np.lexsort((ids, rows))
    rows, ids = rows[order], ids[order]
    del order
    is_new = np.ones(len(ids), bool)
    is_new[1:] = (ids[1:] != ids[:-1]) | (rows[1:] != rows[:-1])
    indptr = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(rows[is_new], minlength=num_rows), out=indptr[1:])
    return Exclude(indptr, ids[is_new])


def rows_of(lists: Exclude) -> np.ndarray:
    """The row of each id of a CSR."""
    return np.repeat(np.arange(len(lists.indptr) - 1), np.diff(lists.indptr))
