"""Any local sentence-transformers folder as a TextEncoder, run by its own library."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from nemo_embed_core.data.tokenizer import MIN_ROOM
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import sha256_folder
from nemo_embed_core.model.pooling import cut_rows

BATCH_CHARACTERS = 1 << 20  # per call of the tokenizer, which takes about 23 bytes of memory for each


class SentenceTransformerEncoder:
    """A local sentence-transformers folder, any architecture, loaded offline.

    limit: the most tokens of a text, as the folder says; None for a bag of words, which reads whole texts.
    device: "cpu", "cuda" or "auto".  precision: "bf16", "fp32" or "auto" (bf16 on a GPU, fp32 on a CPU).
    dim: vectors are their first columns (truncate_dim), of length 1 again where whole ones are.
    """

    def __init__(
        self, path: str | Path, device: str = "auto", precision: str = "auto", dim: int | None = None
    ):
        # Before the first import of huggingface_hub, which reads it once.
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging

            from nemo_embed_core.parallel.mesh import DTYPES, pick_device, pick_precision
        except ModuleNotFoundError as error:
            raise UserError(f"{path} needs {error.name}: pip install 'nemo_embed_core[eval]'") from None

        logging.disable_progress_bar()  # "Loading weights" across the table that a launcher prints
        self.device = pick_device(device)
        precision = pick_precision(precision, self.device)
        try:
            dtype = {"dtype": DTYPES[precision]}
            self._model = SentenceTransformer(str(path), device=str(self.device), model_kwargs=dtype)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{path} does not load in sentence-transformers: {reason[0]}") from error
        limit = self._model.max_seq_length
        self.limit = None if limit is None or limit == math.inf else int(limit)
        self.digest = f"{sha256_folder(Path(path))}-{precision}{f'-{dim}' if dim else ''}"
        self._dim: int | None = None
        columns = self.hidden_size if dim is not None else 0
        if dim is not None and not 1 <= dim <= columns:
            raise UserError(f"{path}: vectors have {columns} columns and cannot be cut to {dim}")
        self._dim = dim
        self._tokenizer = _backend(self._model)
        if self._tokenizer is not None:
            self.tokenize = self._tokenize  # else nobody can say what is cut

    @property
    def hidden_size(self) -> int:
        return self._dim or self._columns

    @cached_property
    def _columns(self) -> int:
        return self.encode(["a"]).shape[1]

    def encode(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512, side: str | None = None
    ) -> np.ndarray:
        """[n, D] float32 in the given order, cut at max_length tokens or the folder's own limit if less.

        side: "query" or "document", for folders that have a path of modules for each (Router); others give
        the same for both.
        """
        if self.limit is not None:
            self._model.max_seq_length = min(self.limit, max_length)
        of_side = {"query": self._model.encode_query, "document": self._model.encode_document}
        encode = of_side.get(side or "", self._model.encode)
        rows = encode(list(texts), prompt=prompt, convert_to_numpy=True, show_progress_bar=False)
        rows = rows.astype(np.float32)
        if self._dim is None:
            return rows
        # By each row's own length: a vector is the same, whatever it is encoded with.
        is_unit = np.abs(np.linalg.norm(rows, axis=1, keepdims=True) - 1) <= 1e-2
        return np.where(is_unit, cut_rows(torch.from_numpy(rows), self._dim).numpy(), rows[:, : self._dim])

    def _tokenize(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512
    ) -> tuple[list[np.ndarray], int]:
        """(ids of prompt + text, cut as `encode` cuts, for each text; how many texts lost tokens)."""
        assert self._tokenizer is not None
        if self.limit is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(min(self.limit, max_length))
        ids, num_truncated = [], 0
        for batch in pieces([prompt + text for text in texts], BATCH_CHARACTERS):
            for encoding in self._tokenizer.encode_batch_fast(batch):
                ids.append(np.array(encoding.ids, np.int32))
                num_truncated += bool(encoding.overflowing)
        return ids, num_truncated

    def check_prompt(self, prompt: str, max_length: int, name: str) -> None:
        """UserError when the prompt leaves no room for text: every text would be cut to the same tokens."""
        if not prompt or self.limit is None or self._tokenizer is None:
            return
        self._tokenizer.no_truncation()
        length, limit = len(self._tokenizer.encode(prompt).ids), min(self.limit, max_length)
        if limit - length < MIN_ROOM:
            raised = f"raise it to at least {length + MIN_ROOM}"
            fix = raised if limit < self.limit else "the folder takes no more tokens"
            raise UserError(
                f"{name}={limit} tokens leaves no room for text: the instruction {prompt[:60]!r} alone has "
                f"{length}; {fix}, or take a shorter instruction"
            )


def pieces(texts: Iterable[str], characters: int, count: int = 1 << 14) -> Iterator[list[str]]:
    """Lists of at most `count` texts that have at most `characters` together, or of one text."""
    piece: list[str] = []
    held = 0
    for text in texts:
        if piece and (held + len(text) > characters or len(piece) == count):
            yield piece
            piece, held = [], 0
        piece.append(text)
        held += len(text)
    if piece:
        yield piece


def _backend(model: Any) -> tokenizers.Tokenizer | None:
    """A copy of the folder's tokenizer that neither pads nor cuts; None when it is of another library."""
    own = getattr(model, "tokenizer", None)
    own = getattr(own, "backend_tokenizer", own)
    if not isinstance(own, tokenizers.Tokenizer):
        return None
    copy = tokenizers.Tokenizer.from_str(own.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
