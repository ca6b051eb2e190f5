"""A model to evaluate: what it is and how its texts are encoded, checked before any text is encoded.

subject = Subject.of("exports/model")
usage, overridden = subject.usage(config)          # options override the folder's own prompts and lengths
encoder = subject.check(config, [usage])           # a TextEncoder where the check had to load it, else None
encoder = encoder or subject.load(config)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from nemo_embed_core.checkpoint.source import DEFAULT_LENGTH, Similarity, Source, Usage, resolve
from nemo_embed_core.checkpoint.weights import open_weights
from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.config.evaluate import ENCODING, TaskOptions
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.encoders import check_precision, open_encoder
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.encoders.onnx_runtime import OnnxEncoder, is_onnx
from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.encoders.sentence_transformer import SentenceTransformerEncoder
from nemo_embed_core.errors import UserError


@dataclass(frozen=True)
class Subject:
    name: str
    source: Source
    dim: int | None = None  # columns that its vectors are cut to: of "exports/model@256" 256
    onnx: str = ""  # the file of the folder that is run instead: of "exports/model/onnx/model.onnx" that

    @classmethod
    def of(cls, name: str) -> Subject:
        if is_onnx(name):
            folder = cls.of(str(Path(name).parent.parent))
            if not folder.is_ours:
                raise UserError(f"{name}: no export of ours is around it, so its prompts are not known")
            return replace(folder, name=name, onnx=name)
        at = None if Path(name).exists() else re.fullmatch(r"(.+)@([1-9][0-9]*)", name)
        try:
            source = resolve(at[1] if at else name)
        except UserError as error:
            bm25 = "" if Path(name).is_dir() else '; the only model without a folder is "bm25"'
            raise UserError(f"{error}{bm25}") from None
        if source.kind == "precomputed":
            raise UserError(f"{name} holds embeddings of other texts: give the model that made them")
        if source.usage.similarity not in get_args(Similarity):
            raise UserError(
                f"{name}: similarity_fn_name is {source.usage.similarity!r}, and only "
                f"{', '.join(get_args(Similarity))} of one vector a text are evaluated"
            )
        return cls(name, source, int(at[2]) if at else None)

    def usage(self, options: TaskOptions) -> tuple[Usage, dict[str, Any]]:
        """(with the one pair of prompts that is used, the options that changed the folder's)."""
        try:
            return self.source.usage.override(**{name: getattr(options, name) for name in ENCODING})
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    @property
    def is_ours(self) -> bool:
        """Whether our encoder gives its vectors: always of length 1, so only where cosine is meant."""
        return self.source.kind != "sentence-transformers" and self.source.usage.similarity == "cosine"

    def check_columns(self) -> None:
        """Of ours; those of another model are known when it is loaded."""
        if self.dim is not None and self.is_ours:
            columns = open_weights(self.source, hashed=False).model.hidden_size
            if self.dim > columns:
                raise UserError(f"{self.name}: the model's vectors have {columns} columns")

    def check(self, config: EvaluateConfig, usages: Iterable[Usage]) -> TextEncoder | None:
        """UserError when it cannot be loaded or a prompt leaves no room; of ours only headers are read."""
        encoder = None
        if self.onnx and (config.precision != "auto" or config.device == "cuda"):
            raise UserError(
                f"{self.name} runs on the CPU in its own precision: leave out precision and device"
            )
        check_precision(self.source, config.precision, not self.is_ours)
        if self.is_ours:
            tokenizer = load_tokenizer(self.source.folder)
            model = open_weights(self.source, hashed=False).model
            tokenizer.check_fits(model.vocab_size)
            self.check_columns()
            check_prompt = tokenizer.check_prompt
        else:
            encoder = self.load(config)
            check_prompt = encoder.check_prompt
        asked = {
            (getattr(prompts, side), length, f"{side}_max_length"): None
            for usage in (cut_by(usage, encoder) for usage in usages)
            for prompts in usage.prompts.values()
            for side in ("query", "document")
            if (length := getattr(usage, f"{side}_max_length")) is not None
        }
        for prompt, length, name in asked:
            try:
                check_prompt(prompt, length, name)
            except UserError as error:
                raise UserError(f"{self.name}: {error}") from None
        return encoder

    def load(self, config: EvaluateConfig) -> Embedder | SentenceTransformerEncoder | OnnxEncoder:
        if self.onnx:
            return OnnxEncoder(self.onnx)
        how = (config.device, config.precision, config.max_tokens)
        by: Any = "ours" if self.is_ours else "sentence-transformers"
        return open_encoder(self.source, *how, by=by, dim=self.dim)


def cut_by(usage: Usage, encoder: TextEncoder | None) -> Usage:
    """The usage with the lengths that this encoder cuts at; None where it reads whole texts."""
    query, document = usage.query_max_length, usage.document_max_length
    if not isinstance(encoder, SentenceTransformerEncoder):
        query, document = query or DEFAULT_LENGTH, document or DEFAULT_LENGTH
    elif (limit := encoder.limit) is None:
        query = document = None
    else:
        query, document = min(query or limit, limit), min(document or limit, limit)
    return replace(usage, query_max_length=query, document_max_length=document)
