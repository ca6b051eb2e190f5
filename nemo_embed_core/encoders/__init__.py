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
from nemo_embed_core.model.spec import check_fp8

__all__ = ["TextEncoder", "check_precision", "open_encoder"]


def open_encoder(
    path: str | Path | Source,
    device: str = "auto",
    precision: str = "auto",
    max_tokens: int = 16384,
    by: Literal["auto", "ours", "sentence-transformers"] = "auto",
    dim: int | None = None,
) -> Embedder | SentenceTransformerEncoder:
    """The encoder of a model folder, loaded.

    device: "cpu", "cuda" or "auto".  precision: "bf16", "fp32", "fp8" (ours alone) or "auto" (bf16 on a GPU,
    fp32 on a CPU).
    max_tokens: of a packed batch of ours.  by: "auto" takes ours for checkpoints and bidirectional Llamas,
    else the library; "ours" refuses other models; "sentence-transformers" takes the library, also for rows
    that are not of length 1.  dim: vectors are cut to so many columns, and of length 1 again.
    """
    source = resolve(path)
    if source.kind == "precomputed":
        raise UserError(f"{source.path} holds embeddings of other texts: give the model that made them")
    by_library = by == "sentence-transformers" or (by == "auto" and source.kind == "sentence-transformers")
    check_precision(source, precision, by_library)
    if by_library:
        return SentenceTransformerEncoder(source.folder, device, precision, dim)
    return Embedder.load(source, device, precision, max_tokens, dim)


def check_precision(source: Source, precision: str, by_library: bool) -> None:
    """UserError where the model cannot be run in fp8; no weight is read. by_library: sentence-transformers
    runs it."""
    if precision == "fp8" and by_library:
        raise UserError(
            f"precision=fp8 is of our own encoder, and {source.path} is run by sentence-transformers: use "
            "precision=bf16"
        )
    if precision == "fp8" and source.model is not None:
        check_fp8(source.model)
