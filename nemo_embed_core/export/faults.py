"""What the known faults of serving would change in a model's vectors, and how much of it is in a variant's.

    share = sum <v - o, f - o> / sum |f - o|^2        over texts; o: our vectors, f: with the fault, v: theirs

About 0 of a faultless variant, whatever rounding it has: that does not point where a fault does. About 1 of
one that has the fault. So a variant in eight bits, whose cosines nobody can promise, is judged like the rest.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.checkpoint.source import resolve
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.spec import POOLINGS

MOST = 0.5  # of a fault's change
SEEN = 1e-3  # of a distance: less than that a fault does not change here (a norm whose weights are 1)


def faulty_vectors(path: Path, texts: list[str], limit: int) -> dict[str, np.ndarray]:
    """{fault: [N, D] unit rows in fp32} of the same weights with another pooling, mask or final norm."""
    embedder = Embedder.load(resolve(path), "cpu", "fp32")
    encoder, found = embedder.encoder, dict[str, np.ndarray]()

    def rows() -> np.ndarray:
        return embedder.encode(texts, max_length=limit)

    own: ModelConfig = embedder.model
    for pooling in POOLINGS:
        if pooling != own.pooling:
            encoder.pooling = pooling
            found[f"pooling={pooling}"] = rows()
    encoder.pooling = own.pooling
    layers: list[Any] = [module for module in encoder.modules() if hasattr(module, "attention")]
    before = [layer.attention for layer in layers]
    for layer in layers:
        layer.attention = layer.attention.func if own.is_causal else partial(layer.attention, causal=True)
    found["no causal mask" if own.is_causal else "a causal mask"] = rows()
    for layer, attention in zip(layers, before, strict=True):
        layer.attention = attention
    encoder.model.norm.weight.fill_(1.0)
    found["no final norm"] = rows()
    return found


def check_faults(what: str, theirs: np.ndarray, ours: np.ndarray, faulty: dict[str, np.ndarray]) -> None:
    """UserError where most of a fault's change is in `theirs`, or rows are not of length 1."""
    lengths = np.linalg.norm(theirs, axis=1)
    if not np.abs(lengths - 1).max() <= 1e-3:
        raise UserError(f"{what}: rows of length {lengths.min():.3f} to {lengths.max():.3f}, not normalised")
    found = []
    for fault, rows in faulty.items():
        change = (rows - ours).astype(np.float64)
        if np.sqrt((change**2).sum(1).mean()) < SEEN:
            continue
        share = float(((theirs - ours) * change).sum() / (change**2).sum())
        if not share <= MOST:
            found.append((float(np.square(theirs - rows).sum()), share, fault))
    if found:
        _, share, fault = min(found)  # faults have parts in common: the nearest one is named
        raise UserError(
            f"{what}: {share:.0%} of what {fault} would change is in its vectors; it was made of another "
            "graph: export it again"
        )
