"""Who scores the pairs: an encoder for each side, and how the texts of that side are given to it.

    Teacher.of(embedder, prompt="Instruct: ...")              # any TextEncoder of unit rows
    Teacher.of_encoder(encoder, "dot")                        # any TextEncoder, whose rows need not have length 1
    precomputed(documents, document_texts, queries, query_texts)          # arrays: numpy, memory maps, torch, CuPy
    open_precomputed("embeddings/", dataset)                  # documents.npy and queries.npy

A score is a dot product: of rows brought to unit length (similarity "cosine"), or of the rows as they are
("dot").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.encoders.precomputed import Lookup, Similarity, precomputed_sides, scaled
from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """An encoder for each side, the text that stands before every text of that side, and where texts are cut."""

    queries: TextEncoder
    documents: TextEncoder
    prompt: str = ""
    document_prompt: str = ""
    query_max_length: int = 512  # tokens
    document_max_length: int = 512  # tokens
    similarity: Similarity = "cosine"
    name: str = ""  # for messages and the report

    @classmethod
    def of(cls, embedder: TextEncoder, **usage: Any) -> Teacher:
        return cls(queries=embedder, documents=embedder, **usage)

    @classmethod
    def of_encoder(cls, encoder: TextEncoder, similarity: Similarity = "cosine", **usage: Any) -> Teacher:
        """Its rows divided by their lengths (cosine), or as they are (dot)."""
        queries, documents = (_Rows(encoder, similarity, side) for side in ("query", "document"))
        return cls(queries=queries, documents=documents, similarity=similarity, **usage)


class _Rows:
    """One side of an encoder, its rows brought to the length that is compared."""

    def __init__(self, encoder: TextEncoder, similarity: Similarity, side: str):
        self.encoder, self.similarity, self.side = encoder, similarity, side
        self.digest = encoder.digest + ("" if similarity == "cosine" else f"-{similarity}")
        self.hidden_size = encoder.hidden_size
        if hasattr(encoder, "tokenize"):
            self.tokenize = encoder.tokenize

    def encode(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512, side: str | None = None
    ) -> np.ndarray:
        return scaled(
            np.asarray(self.encoder.encode(texts, prompt, max_length, self.side), np.float32), self.similarity
        )


def precomputed(
    documents: Any,
    document_texts: Iterable[str],
    queries: Any,
    query_texts: Iterable[str],
    name: str = "embeddings",
    similarity: Similarity = "cosine",
) -> Teacher:
    """A teacher from arrays [N, D] and [Q, D] whose rows belong to these texts, in this order.

    Arrays: numpy, a memory map, a torch tensor, or anything with __dlpack__ (CuPy, JAX); float16, bfloat16
    (torch), float32 or float64. A text is found by the text itself, so there may be more rows than the run
    needs, in any order; where a text stands twice its first row counts. Never loaded whole.
    """
    by_query = Lookup(queries, query_texts, f"{name}: queries", similarity)
    by_document = Lookup(documents, document_texts, f"{name}: documents", similarity)
    if by_query.hidden_size != by_document.hidden_size:
        raise UserError(
            f"{name}: queries have {by_query.hidden_size} columns and documents {by_document.hidden_size}: they come from "
            "different models"
        )
    return Teacher(queries=by_query, documents=by_document, similarity=similarity, name=name)


def open_precomputed(
    folder: str | Path, dataset: DatasetConfig | None = None, similarity: Similarity = "cosine"
) -> Teacher:
    """documents.npy and queries.npy of a folder, memory-mapped; which text a row belongs to is said by, first
    of these:

    - documents.jsonl and queries.jsonl (or .jsonl.gz) in that folder, lines {"text": ...}: row i is line i
      (`launch/mine.py --write_texts FOLDER` writes them);
    - corpus.jsonl and queries.jsonl of the dataset, when it is a BEIR folder: row i is line i.
    """
    sides = precomputed_sides(folder, dataset)
    return precomputed(*sides[0], *sides[1], name=str(folder), similarity=similarity)
