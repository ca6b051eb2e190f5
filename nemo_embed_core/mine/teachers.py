"""Who scores the pairs: an encoder for each side, and how the texts of that side are given to it.

    Teacher.of(embedder, prompt="Instruct: ...")              # any TextEncoder of unit rows
    Teacher.of_encoder(encoder, "dot")                  # any TextEncoder, rows of any length
    precomputed(documents, document_texts, queries, query_texts)   # arrays of numpy, torch, CuPy
    open_precomputed("embeddings/", dataset)                  # documents.npy and queries.npy

A score is a dot product of rows brought to unit length (similarity "cosine"), or as they are ("dot").
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.checkpoint.source import DEFAULT_LENGTH, Source
from nemo_embed_core.checkpoint.weights import open_weights
from nemo_embed_core.config import DatasetConfig, MineConfig, MineDatasetConfig
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.encoders import check_precision
from nemo_embed_core.encoders.precomputed import Lookup, Similarity, precomputed_sides, scaled
from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.errors import UserError

PROMPT_OF = {"query": "prompt", "document": "document_prompt"}  # of a Teacher, by side


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """An encoder for each side, the prompt before its texts, and where they are cut."""

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
        rows = self.encoder.encode(texts, prompt, max_length, self.side)
        return scaled(np.asarray(rows, np.float32), self.similarity)


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
        columns = f"queries have {by_query.hidden_size} columns and documents {by_document.hidden_size}"
        raise UserError(f"{name}: {columns}: they come from different models")
    return Teacher(queries=by_query, documents=by_document, similarity=similarity, name=name)


def open_precomputed(
    folder: str | Path, dataset: DatasetConfig | None = None, similarity: Similarity = "cosine"
) -> Teacher:
    """documents.npy and queries.npy of a folder, memory-mapped. Row i is the text of line i: of
    documents.jsonl and queries.jsonl in that folder (`--write_texts` writes them), else of the BEIR
    folder's corpus and queries.
    """
    sides = precomputed_sides(folder, dataset)
    return precomputed(*sides[0], *sides[1], name=str(folder), similarity=similarity)


# ------------------------------------------------------------------------------------------ models of a run


def using(
    source: Source, name: str, dataset: MineDatasetConfig, config: MineConfig, log: Callable[[str], None]
) -> dict[str, Any]:
    """The options of this model's Teacher for this data set; log is told where each of them comes from."""
    own, model = source.usage, str(source.path)
    similarity = config.similarity or own.similarity
    if similarity not in ("cosine", "dot"):
        raise UserError(
            f"{model} compares by {similarity}: a threshold x the positive's score needs scores that grow "
            "with likeness. Mine with --similarity cosine (of rows of unit length the order is that of the "
            "euclidean distance), or another model"
        )
    if source.kind == "precomputed":
        if dataset.task or dataset.document_task:
            log(f"model {model}: the instruction is not added to embeddings, which have been made already")
        log(f"model {model} (precomputed): {similarity}")
        return {"similarity": similarity, "name": model}
    is_own_dot = config.similarity is None and own.similarity == "dot"
    if source.kind == "llama" and is_own_dot and not _normalizes(source.folder):
        raise UserError(
            f"{model} compares by dot products of rows that are not normalised, and our encoder of Llama "
            "folders normalises: --similarity cosine to mine by cosines"
        )
    prompts = own.prompts.get(name, own.default)
    where = "the model's" if own.prompts else "none known"
    if len(own.prompts) > 1:
        other = f"of {next(iter(own.prompts))}, {name} is no task of the model's"
        where = f"of {name}" if name in own.prompts else other
    usage: dict[str, Any] = {"similarity": similarity, "name": model}
    for side, option in (("query", "task"), ("document", "document_task")):
        task, prompt, whose = getattr(dataset, option), getattr(prompts, side), where
        if task is not None:
            instead = f" in place of its own {prompt!r}" if prompt and query_prompt(task) != prompt else ""
            prompt, whose = query_prompt(task), f"{option}{instead}"
        length, limit = (getattr(options, f"{side}_max_length") for options in (config, own))
        tokens = length or limit or DEFAULT_LENGTH
        origin = "option" if length else "the model's" if limit else "none known"
        if source.kind == "sentence-transformers" and limit and tokens > limit:
            tokens, origin = limit, f"the folder's limit, below {side}_max_length={length}"
        usage |= {PROMPT_OF[side]: prompt, f"{side}_max_length": tokens}
        used = f"{side} prompt {prompt!r} ({whose}), {tokens} tokens ({origin}), {similarity}"
        log(f"model {model}, {name}: {used}")
    return usage


def _normalizes(folder: Path) -> bool:
    file = folder / "modules.json"
    return not file.is_file() or "Normalize" in file.read_text(encoding="utf-8")


def check_source(
    source: Source, datasets: Iterable[MineDatasetConfig], usages: Iterable[dict[str, Any]], precision: str
) -> None:
    """Tokenizer, prompts that leave room for text, libraries, embeddings, names and shapes of weights, and
    whether the precision fits: without reading a weight. usages: of `using`, for each data set."""
    folder = source.folder
    if source.kind == "precomputed":
        for dataset in datasets:
            precomputed_sides(folder, dataset.as_data())
        return
    is_foreign = source.kind == "sentence-transformers"
    if is_foreign and importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(f"{source.path} needs sentence-transformers: pip install nemo_embed_core[eval]")
    check_precision(source, precision, is_foreign)
    if is_foreign and not (folder / "tokenizer.json").is_file():
        return  # the library has the only reader of it; the prompt is checked when the model is loaded
    tokenizer = load_tokenizer(folder)
    if not is_foreign:
        tokenizer.check_fits(open_weights(source, hashed=False).model.vocab_size)
    for usage in usages:
        _check_prompts(tokenizer, usage)


def _check_prompts(reader: Any, usage: dict[str, Any]) -> None:
    for side, prompt in PROMPT_OF.items():
        reader.check_prompt(usage[prompt], usage[f"{side}_max_length"], f"{side}_max_length")


class Teachers:
    """The models of a run, one in memory at a time; a single one is loaded once for all data sets."""

    def __init__(self, sources: list[Source], load: Callable[[Source], TextEncoder]):
        self.sources, self.load = sources, load
        self.kept: dict[Path, Any] = {}

    def of(self, dataset: MineDatasetConfig, usages: list[dict[str, Any]]) -> Iterator[Teacher]:
        """usages: of `using`, for each model."""
        for source, usage in zip(self.sources, usages, strict=True):
            if source.kind == "precomputed":
                yield open_precomputed(source.folder, dataset.as_data(), usage["similarity"])
                continue
            if source.path not in self.kept:
                self.kept.clear()  # before the next one is loaded; no local name may hold it either
                self.kept[source.path] = self.load(source)
            if source.kind == "sentence-transformers":
                _check_prompts(self.kept[source.path], usage)
                yield Teacher.of_encoder(self.kept[source.path], **usage)
            else:
                yield Teacher.of(self.kept[source.path], **usage)
