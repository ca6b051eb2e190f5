"""What a model folder is, asked once: `resolve(path)`; and how its texts are to be encoded: `Usage`.

    kind                       what it is                                                        who reads the weights
    "checkpoint"               a checkpoint of ours, or the newest one of a run                  checkpoint/sharded.py
    "llama"                    a Hugging Face Llama that we run bidirectionally, our exports     model/hf.py
    "sentence-transformers"    modules.json of another architecture or other modules             sentence-transformers
    "precomputed"              documents.npy and queries.npy                                     mine/teachers.py

Prompts, lengths, pooling and similarity belong to the run that trained the model: they go from the training options to the
manifest, from there to the exported folder and its card, and every launcher uses them unless an option says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nemo_embed_core.checkpoint import sharded
from nemo_embed_core.config import UserError
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.model.hf_config import read_json

Kind = Literal["checkpoint", "llama", "sentence-transformers", "precomputed"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]

# Of config_sentence_transformers.json, beside its own keys, which have one length for both sides: ours are kept there.
USAGE_KEY = "nemo_embed_core"


class Prompts(NamedTuple):
    """What stands before a text, verbatim; "" for the text as it is."""

    query: str = ""
    document: str = ""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How texts of both sides become vectors that may be compared, as training did it.

    prompts: by name of the task's data set, the default one first; empty where nothing is known (a bare Llama folder).
    *_max_length: tokens, special tokens and prompt included; None where nothing is known.
    """

    prompts: Mapping[str, Prompts] = field(default_factory=dict)
    query_max_length: int | None = None
    document_max_length: int | None = None
    pooling: str = "mean"
    similarity: Similarity = "cosine"

    @property
    def default(self) -> Prompts:
        return next(iter(self.prompts.values()), Prompts())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "prompts": {name: prompts._asdict() for name, prompts in self.prompts.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Usage:
        """The inverse of to_json; ValueError, KeyError or TypeError for anything else."""
        prompts = {name: Prompts(str(p["query"]), str(p["document"])) for name, p in value["prompts"].items()}
        return cls(**{**value, "prompts": prompts})


@dataclass(frozen=True)
class Source:
    """A model folder: `folder` is the checkpoint itself where `path` was a run."""

    path: Path
    folder: Path
    kind: Kind
    usage: Usage


def resolve(path: str | Path) -> Source:
    """What the folder is and how its texts are encoded, without touching a weight; UserError when it is no model folder."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a checkpoint, a run, a Hugging Face folder or embeddings")
    if sharded.is_checkpoint(path):
        folder = sharded.find(path)
        return Source(path, folder, "checkpoint", usage_of_manifest(sharded.read_manifest(folder)))
    if (path / "documents.npy").is_file() or (path / "queries.npy").is_file():
        return Source(path, path, "precomputed", Usage())
    return Source(path, path, "sentence-transformers" if _is_foreign(path) else "llama", usage_of_folder(path))


def usage_of_training(data: Mapping[str, Any], rows: list[int] | None = None) -> Usage:
    """From the `data` options of a run (as to_dict gives them); rows: of each dataset, the largest one's prompts are the default."""
    order = list(enumerate(data["datasets"]))
    if rows is not None:
        order.sort(key=lambda item: -rows[item[0]])  # stable: of equals the first
    prompts: dict[str, Prompts] = {}
    for _, dataset in order:
        entry = Prompts(query_prompt(dataset.get("task") or ""), query_prompt(dataset.get("document_task") or ""))
        if entry in prompts.values():
            continue
        stem = Path(dataset.get("path", "")).name.removesuffix(".gz").removesuffix(".jsonl") or "query"
        name, count = stem, 1
        while name in prompts or name in ("query", "document"):
            count += 1
            name = f"{stem}-{count}"
        prompts[name] = entry
    return Usage(
        prompts=prompts,
        query_max_length=data["query_max_length"],
        document_max_length=data["document_max_length"],
    )


def usage_of_manifest(manifest: Mapping[str, Any]) -> Usage:
    """The manifest's own; of a checkpoint from before it had one, from its options."""
    if "usage" in manifest:
        try:
            return Usage.from_json(manifest["usage"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"manifest.json: usage is damaged: {error!r}") from None
    return usage_of_training(manifest["config"]["data"])


def usage_of_folder(folder: Path) -> Usage:
    """From the sentence-transformers files of a folder: ours say it all, others have prompts, one length and a similarity."""
    settings = read_json(file) if (file := folder / "config_sentence_transformers.json").is_file() else {}
    if USAGE_KEY in settings:
        try:
            return Usage.from_json(settings[USAGE_KEY])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: {USAGE_KEY} is damaged: {error!r}") from None
    own = settings.get("prompts") or {}
    if not isinstance(own, dict) or not all(isinstance(text, str) for text in own.values()):
        raise UserError(f"{file}: prompts is {json.dumps(own)} and must be strings under names")
    document = own.get("document") or own.get("passage") or own.get("corpus") or ""
    prompts = {"query": Prompts(own.get("query", ""), document)} if own.get("query") or document else {}
    limit = None
    if (length_file := folder / "sentence_bert_config.json").is_file():
        limit = read_json(length_file).get("max_seq_length")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise UserError(f"{length_file}: max_seq_length is {json.dumps(limit)} and must be a number of tokens")
        if limit is None:  # as sentence-transformers finds it
            places = (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings"))
            values = [read_json(folder / file).get(key) for file, key in places if (folder / file).is_file()]
            limit = min((value for value in values if type(value) is int and 0 < value < 1 << 30), default=None)
    return Usage(
        prompts=prompts,
        query_max_length=limit,
        document_max_length=limit,
        similarity=settings.get("similarity_fn_name") or "cosine",
    )


def _is_foreign(path: Path) -> bool:
    """Whether a model folder needs sentence-transformers: it has modules.json and they are not ours.

    Ours are a Llama that is not causal, mean pooling, and at most a normalisation; so a bare Llama folder and our own
    exports are not foreign, whatever they are called.
    """
    if not (path / "modules.json").is_file():
        return False
    modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    config = read_json(file) if (file := path / "config.json").is_file() else {}
    pooling = read_json(file) if (file := path / "1_Pooling" / "config.json").is_file() else {}
    modes = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True}
    is_mean = modes == {"pooling_mode_mean_tokens"} or (not modes and pooling.get("pooling_mode") == "mean")
    return not (
        config.get("model_type") in ("llama", "llama_bidirec")
        and config.get("is_causal") is False
        and kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
        and is_mean
    )
