"""What can be evaluated, behind one face: our own models, and any sentence-transformers folder beside them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from nemo_embed_core.config import UserError


class Encoder(Protocol):
    """What evaluation needs of a model; `embedder.Embedder` has it."""

    @property
    def digest(self) -> str: ...  # of the weights: two models with other weights never have the same

    def encode(self, texts: Sequence[str], prompt: str = "", max_length: int = 512) -> np.ndarray: ...


class SentenceTransformerEncoder:
    """A local sentence-transformers folder, any architecture, loaded offline.

    prompts: those of the folder, {"query": ..., "document": ...}; a name is missing where the folder has no text for it.
    precision: "bf16", "fp32" or "auto" (bf16 on a GPU, fp32 on a CPU).
    """

    def __init__(self, path: str | Path, device: str = "auto", precision: str = "auto", batch_size: int = 32):
        # Before the first import of huggingface_hub, which reads it once.
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()  # "Loading weights" across the table that a launcher prints
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if precision == "auto":
            precision = "bf16" if device == "cuda" else "fp32"
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        try:
            self._model = SentenceTransformer(str(path), device=device, model_kwargs={"dtype": dtype})
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{path} does not load in sentence-transformers: {reason[0]}") from error
        self._limit = self._model.max_seq_length
        self._batch_size = batch_size
        own = self._model.prompts
        document = own.get("document") or own.get("passage") or own.get("corpus")
        self.prompts = {name: text for name, text in (("query", own.get("query")), ("document", document)) if text}
        self.digest = f"{folder_digest(Path(path))}-{precision}"

    def encode(self, texts: Sequence[str], prompt: str = "", max_length: int = 512) -> np.ndarray:
        """[n, D] float32 in the given order, cut at max_length tokens or at the folder's own limit, whichever is less."""
        if self._limit != math.inf:  # inf: a bag-of-words model, which has no limit to set
            self._model.max_seq_length = min(self._limit or max_length, max_length)
        vectors = self._model.encode(
            list(texts), prompt=prompt, batch_size=self._batch_size, convert_to_numpy=True, show_progress_bar=False
        )
        return vectors.astype(np.float32)


def folder_digest(path: Path) -> str:
    """sha256 over the names and contents of all files of a folder, hex."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(path).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()
