"""Texts to unit vectors: what mining, evaluation, export checks and users of the Python API share.

from nemo_embed_core.embedder import Embedder
embedder = Embedder.load("runs/stage1")                       # or a checkpoint, or a Hugging Face folder
vectors = embedder.encode(["a text", "another"])              # [2, D] fp32, in the given order
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nemo_embed_core.checkpoint.source import Source
from nemo_embed_core.checkpoint.weights import Weights, fill, open_weights
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.data.packing import pack_texts, shapes_cost_memory
from nemo_embed_core.data.tokenizer import Tokenizer, load_tokenizer
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.attention import Segments, pick_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.model.pooling import cut_rows
from nemo_embed_core.model.spec import check_fp8, identity
from nemo_embed_core.parallel.fp8 import freeze_weights
from nemo_embed_core.parallel.layers import run_in_fp8
from nemo_embed_core.parallel.mesh import DTYPES, TensorParallel, pick_device, pick_precision


class Embedder:
    """One process, one device, the whole model; packed batches of at most `max_tokens`."""

    def __init__(
        self,
        encoder: Encoder,
        model: ModelConfig,
        tokenizer: Tokenizer,
        digest: str,
        device: torch.device,
        max_tokens: int,
        dim: int | None = None,
    ):
        self.dim = dim  # columns of a vector that are kept; None: all
        self.encoder, self.model, self.tokenizer = encoder, model, tokenizer
        self.digest = digest  # of weights, shape, tokenizer and precision: caches and reports are keyed by it
        self.device, self.max_tokens = device, max_tokens

    @classmethod
    def load(
        cls,
        path: str | Path | Source,
        device: str = "auto",
        precision: str = "auto",
        max_tokens: int = 16384,
        dim: int | None = None,
    ) -> Embedder:
        """A run (its newest checkpoint), a checkpoint (all files verified), or any Hugging Face Llama folder.

        precision: "bf16", "fp32", "fp8" or "auto" (bf16 on a GPU, fp32 on a CPU).  fp8: products of the
        blocks, whose scales are of whole batches: a vector depends a little on the texts beside it.
        dim: vectors are their first columns, normalised again (loss.matryoshka_dims).
        """
        target = pick_device(device)
        precision = pick_precision(precision, target)
        dtype = DTYPES[precision]
        weights = open_weights(path)
        if dim is not None and not 1 <= dim <= weights.model.hidden_size:
            columns = weights.model.hidden_size
            raise UserError(f"{path}: vectors have {columns} columns and cannot be cut to {dim}")
        tokenizer = load_tokenizer(weights.folder)
        tokenizer.check_fits(weights.model.vocab_size)
        if precision == "fp8":
            check_fp8(weights.model)
        with torch.device("meta"):
            attention = pick_attention("auto", target, dtype, backward=False)
            encoder = Encoder(weights.model, TensorParallel(), attention)
        encoder.to(dtype).to_empty(device=target)
        fill(encoder, weights.reader, weights.model)
        encoder.requires_grad_(False).eval()
        if precision == "fp8":
            run_in_fp8(encoder)
            freeze_weights(encoder)
        digest = digest_of(weights, tokenizer, precision, dim)
        return cls(encoder, weights.model, tokenizer, digest, target, max_tokens, dim)

    @property
    def hidden_size(self) -> int:
        return self.dim or self.model.hidden_size

    @property
    def num_encoded(self) -> int:
        """Texts so far; take differences."""
        return self.tokenizer.num_encoded

    @property
    def num_truncated(self) -> int:
        """Of num_encoded, those that were cut to their max_length."""
        return self.tokenizer.num_truncated

    def check_prompt(self, prompt: str, max_length: int, name: str) -> None:
        """UserError when the prompt leaves no room for text in max_length tokens, an option called `name`."""
        self.tokenizer.check_prompt(prompt, max_length, name)

    def encode(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512, side: str | None = None
    ) -> np.ndarray:
        """normalize(pool(hidden states of prompt + text)): [len(texts), D] fp32 unit rows, in their order.

        side changes nothing: one model encodes both.  Texts longer than max_length tokens, prompt and special
        tokens included, are cut there; `num_truncated` counts them.
        UserError when the prompt leaves no room for text: check_prompt asks that before anything is read.
        """
        return self.encode_tokens(self.tokenize(texts, prompt, max_length)[0])

    def tokenize(
        self, texts: Sequence[str], prompt: str = "", max_length: int = 512
    ) -> tuple[list[np.ndarray], int]:
        """(ids of prompt + text, cut at max_length, for each text; how many texts lost tokens)."""
        before = self.num_truncated
        tokens = self.tokenizer.encode(texts, max_length, prompt)
        return tokens, self.num_truncated - before

    @torch.inference_mode()
    def encode_tokens(self, tokens: list[np.ndarray]) -> np.ndarray:
        """encode() of texts that `tokenize` has made ids of."""
        out = np.empty((len(tokens), self.hidden_size), dtype=np.float32)
        few_shapes = shapes_cost_memory(self.device, next(self.encoder.parameters()).dtype)
        for indices, batch in pack_texts(tokens, self.max_tokens, few_shapes=few_shapes):
            batch = batch.to(self.device)
            segments = Segments(batch.cu_seqlens, batch.lengths, batch.max_seqlen)
            rows = self.encoder(batch.input_ids, batch.position_ids, segments)[: batch.num_sequences]
            if self.dim is not None:
                rows = cut_rows(rows, self.dim)
            out[indices] = rows.float().cpu().numpy()
        return out


def digest_of(weights: Weights, tokenizer: Tokenizer, precision: str, dim: int | None = None) -> str:
    """Embedder.digest of what it would load; the weights are hashed, none is read into memory."""
    shape = identity(weights.model)
    known = json.dumps([weights.digest, shape, tokenizer.digest, precision, *([dim] if dim else [])])
    return hashlib.sha256(known.encode()).hexdigest()
