"""Encoders, which make vectors of texts: `open_encoder(path)`; vectors in files: precomputed.py.

encoder = open_encoder("runs/stage1")      # or a checkpoint, an export, a sentence-transformers folder
vectors = encoder.encode(["a text"])       # [1, D] fp32
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nemo_embed_core.checkpoint.source import Source, resolve
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.encoders.sentence_transformer import SentenceTransformerEncoder
from nemo_embed_core.errors import UserError

__all__ = ["TextEncoder", "open_encoder"]


def open_encoder(
    path: str | Path | Source,
    device: str = "auto",
    precision: str = "auto",
    max_tokens: int = 16384,
    by: Literal["auto", "ours", "sentence-transformers"] = "auto",
) -> Embedder | SentenceTransformerEncoder:
    """The encoder of a model folder, loaded.

    device: "cpu", "cuda" or "auto".  precision: "bf16", "fp32" or "auto" (bf16 on a GPU, fp32 on a CPU).
    max_tokens: of a packed batch of ours.  by: "auto" takes ours for checkpoints and bidirectional Llamas,
    else the library; "ours" refuses other models; "sentence-transformers" takes the library, also for rows
    that are not of length 1.
    """
    source = resolve(path)
    if source.kind == "precomputed":
        raise UserError(f"{source.path} holds embeddings of other texts: give the model that made them")
    if by == "sentence-transformers" or (by == "auto" and source.kind == "sentence-transformers"):
        return SentenceTransformerEncoder(source.folder, device, precision)
    return Embedder.load(source, device, precision, max_tokens)
