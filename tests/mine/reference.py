"""Brute force in extended precision, written to be obviously right: what every search is compared with."""

from __future__ import annotations

import numpy as np


def brute_force(queries, documents, ceilings, k, excluded=None):
    """(scores [Q, k], ids [Q, k]) by (score descending, id ascending) among finite scores strictly below the
    ceiling."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    with np.errstate(all="ignore"):
        for i, query in enumerate(queries):
            s = (query.astype(np.longdouble) * documents.astype(np.longdouble)).sum(-1).astype(np.float32)
            ok = np.isfinite(s) & (s.astype(np.float64) < float(ceilings[i]))
            ok[[d for d in (excluded[i] if excluded else ()) if 0 <= d < len(documents)]] = False
            order = sorted(np.flatnonzero(ok), key=lambda d: (-s[d], d))[:k]
            ids[i, : len(order)], scores[i, : len(order)] = order, s[order]
    return scores, ids
