"""What a model folder is, asked once: `resolve(path)`; and how its texts are to be encoded: `Usage`.

    kind                       what it is                                                    who reads it
    "checkpoint"               a checkpoint of ours, or the newest one of a run              Reader
    "llama"                    a Hugging Face Llama or relative that we run, an export       HFReader
    "sentence-transformers"    modules.json of another architecture or other modules         its library
    "precomputed"              documents.npy and queries.npy                                 precomputed.py

Prompts, lengths and similarity belong to the run that trained the model: they go from the training options to
the manifest, from there to the exported folder and its card, and every launcher uses them unless an option
says otherwise. Pooling is the model's own (ModelConfig.pooling), shown beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from nemo_embed_core.checkpoint.hf_folder import (
    INDEX,
    SINGLE,
    find_folder,
    has_weights,
    open_folder,
    weight_files,
)
from nemo_embed_core.checkpoint.manifest import MANIFEST, model_from_dict, read_manifest
from nemo_embed_core.checkpoint.runs import checkpoints, find_checkpoint, is_checkpoint
from nemo_embed_core.config import ModelConfig, Pooling
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.strict_json import read, read_object
from nemo_embed_core.model.spec import ARCHITECTURES, is_ours, mode_of_config, modes_of, pooling_of_modes
from nemo_embed_core.parallel.layout import rank_from_env

Kind = Literal["checkpoint", "llama", "sentence-transformers", "precomputed"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]

# Our own key in config_sentence_transformers.json, whose others have one length for both sides.
USAGE_KEY = "nemo_embed_core"
DEFAULT_LENGTH = 512  # tokens of a text, where neither the folder nor an option says how many
PRECOMPUTED = ("documents.npy", "queries.npy")
# Names of prompts for documents, in the order in which sentence-transformers looks for them.
DOCUMENT_NAMES = ("document", "passage", "corpus")


class Prompts(NamedTuple):
    """What stands before a text, verbatim; "" for the text as it is."""

    query: str = ""
    document: str = ""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How texts of both sides become vectors that may be compared, as training did it.

    prompts: by name of the task's data set, the default one first; empty of a bare Llama.
    *_max_length: tokens, special tokens and prompt included; None where nothing is known.
    pooling: as the model has it, or of a folder that is not ours in sentence-transformers' words.
    """

    prompts: Mapping[str, Prompts] = field(default_factory=dict)
    query_max_length: int | None = None
    document_max_length: int | None = None
    pooling: str = ModelConfig.pooling
    similarity: Similarity = "cosine"
    dims: tuple[int, ...] = ()  # widths that vectors were trained to be cut to (loss.matryoshka_dims)

    @property
    def default(self) -> Prompts:
        return next(iter(self.prompts.values()), Prompts())

    @property
    def longest(self) -> int:
        """The limit of sentence-transformers, which has one for both sides: the larger cuts nothing more."""
        return max(self.query_max_length or 0, self.document_max_length or 0)

    def override(
        self,
        *,
        prompt_name: str = "",
        task: str | None = None,
        document_task: str | None = None,
        query_max_length: int | None = None,
        document_max_length: int | None = None,
    ) -> tuple[Usage, dict[str, Any]]:
        """(what options make of it, with one pair of prompts; {option: value} of those that change it).

        None is the model's own, "" no instruction. UserError for a prompt_name that it does not have.
        """
        if prompt_name and prompt_name not in self.prompts:
            have = ", ".join(self.prompts) or "none"
            raise UserError(f"prompt_name={prompt_name!r}: the model's prompts are {have}")
        own = self.prompts[prompt_name] if prompt_name else self.default
        query = own.query if task is None else query_prompt(task)
        document = own.document if document_task is None else query_prompt(document_task)
        given = {"query_max_length": query_max_length, "document_max_length": document_max_length}
        lengths: dict[str, Any] = {n: getattr(self, n) if x is None else x for n, x in given.items()}
        changed = {
            "prompt_name": prompt_name if own != self.default else None,
            "task": task if query != own.query else None,
            "document_task": document_task if document != own.document else None,
            **{name: length for name, length in lengths.items() if length != getattr(self, name)},
        }
        name = prompt_name or next(iter(self.prompts), "query")
        usage = replace(self, prompts={name: Prompts(query, document)}, **lengths)
        return usage, {option: value for option, value in changed.items() if value is not None}

    def named_prompts(self) -> dict[str, str]:
        """Prompts as sentence-transformers names them: query and document, and of several tasks each one's.

        "query" and "document" are the default's; NAME is a task's prompt before queries, NAME-document the
        one before its documents, also "" where it has none and the default has one: who asks for
        NAME-document must not get "document".
        """
        named = {"query": self.default.query, "document": self.default.document}
        if len(self.prompts) > 1:
            for name, prompts in self.prompts.items():
                named[name] = prompts.query
                if prompts.document or self.default.document:
                    named[f"{name}-document"] = prompts.document
        return named

    def lines(self, mark: str = "") -> list[str]:
        """For people: prompts of each task, lengths, pooling and similarity; mark: around prompts."""
        rows, lines = [("", self.default)], []
        if len(self.prompts) > 1:
            rows += [(f" of {name}", prompts) for name, prompts in self.prompts.items()]
        for of, prompts in rows:
            shown = [f"{mark}{json.dumps(t, ensure_ascii=False)}{mark}" if t else "none" for t in prompts]
            lines.append(f"prompt{of} before queries: {shown[0]}; before documents: {shown[1]}")
        limits = (self.query_max_length, self.document_max_length)
        lengths = [f"{n} tokens" if n else "not known" for n in limits]
        lines.append(f"longest query: {lengths[0]}; longest document: {lengths[1]}; longer ones are cut")
        return [*lines, f"pooling: {self.pooling}; similarity: {self.similarity}"]

    def to_json(self) -> dict[str, Any]:
        value = {**asdict(self), "prompts": {name: p._asdict() for name, p in self.prompts.items()}}
        return {name: entry for name, entry in value.items() if name != "dims" or entry}

    @classmethod
    def from_json(cls, value: Any, pooling: str, where: str) -> Usage:
        """Of what to_json gave, with the model's own pooling; UserError names where a damaged value is."""
        try:
            prompts = {n: Prompts(str(p["query"]), str(p["document"])) for n, p in value["prompts"].items()}
            dims = tuple(int(dim) for dim in value.get("dims", ()))
            return cls(**{**value, "prompts": prompts, "pooling": pooling, "dims": dims})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where} is damaged: {error!r}") from None


@dataclass(frozen=True)
class Source:
    """A model folder: `folder` is the checkpoint where `path` was a run, the snapshot of a hub's cache.

    model: its shape, of a checkpoint or a Llama.  where: the tensors of a Llama folder (hf_folder.py).
    foreign: what a sentence-transformers folder asks for that our encoder does not compute.
    """

    path: Path
    folder: Path
    kind: Kind
    usage: Usage
    model: ModelConfig | None = None
    where: Mapping[str, tuple[str, str]] | None = None
    foreign: str = ""


def resolve(path: str | Path | Source) -> Source:
    """What the folder is and how its texts are encoded, without touching a weight; UserError: no model.

    The gate of every launcher: a folder in which two things contradict is refused by both names, and what is
    read in another way than its files' names say is said once. A Source is what it was when it was asked.
    """
    if isinstance(path, Source):
        return path
    path = Path(path)
    folder, notes = find_folder(path)
    _refuse_two_models(folder)
    if _is_checkpoint(folder):
        folder = find_checkpoint(folder)
        manifest = read_manifest(folder)
        model = model_from_dict(manifest["model"], folder / MANIFEST)
        source = Source(path, folder, "checkpoint", usage_of_manifest(manifest), model)
    elif any((folder / name).is_file() for name in PRECOMPUTED):
        source = Source(path, folder, "precomputed", Usage())
    else:
        foreign, usage = _foreign(folder), usage_of_folder(folder)
        if foreign:  # its own library reads it; of two sets of weights that would take one too
            if has_weights(folder):
                weight_files(folder, _config(folder))
            source = Source(path, folder, "sentence-transformers", usage, foreign=foreign)
        else:
            opened = open_folder(folder)
            notes += opened.notes
            # Which modules.json may say alone.
            model = replace(opened.model, pooling=cast(Pooling, usage.pooling))
            source = Source(path, folder, "llama", usage, model, opened.where)
    for note in notes:
        say_note(note)
    return source


_said: set[str] = set()


def say_note(note: str) -> None:
    """Once per process, on the first rank."""
    if note not in _said and rank_from_env() == 0:
        print(f"note: {note}", flush=True)
    _said.add(note)


def _is_checkpoint(folder: Path) -> bool:
    """Also manifest.json of something else, unless there is another model beside it."""
    if not is_checkpoint(folder):
        return False
    if checkpoints(folder) or not has_weights(folder):
        return True
    try:
        return "pieces" in read_object(folder / MANIFEST)
    except UserError:
        return True  # one of ours that is damaged, for all we know


def _refuse_two_models(folder: Path) -> None:
    found = {}
    if _is_checkpoint(folder):
        steps = checkpoints(folder)
        found["a checkpoint of ours"] = MANIFEST if (folder / MANIFEST).is_file() else steps[0].name
    if has_weights(folder):
        found["a Hugging Face model"] = SINGLE if (folder / SINGLE).is_file() else INDEX
    if arrays := [name for name in PRECOMPUTED if (folder / name).is_file()]:
        found["embeddings"] = arrays[0]
    if len(found) > 1:
        both = " and ".join(f"{what} ({name})" for what, name in found.items())
        raise UserError(f"{folder} holds {both}; move one of them to another folder")


def usage_of_training(data: Mapping[str, Any], pooling: str, rows: list[int] | None = None) -> Usage:
    """From the `data` options of a run (as to_dict gives them) and its model's pooling.

    rows: of each dataset, the largest one's prompts are the default. Lengths are the largest of any dataset.
    """
    order = list(enumerate(data["datasets"]))
    if rows is not None:
        order.sort(key=lambda item: -rows[item[0]])  # stable: of equals the first
    prompts: dict[str, Prompts] = {}
    for _, dataset in order:
        entry = Prompts(*(query_prompt(dataset.get(side) or "") for side in ("task", "document_task")))
        if entry in prompts.values():
            continue
        stem = Path(dataset.get("path", "")).name.removesuffix(".gz").removesuffix(".jsonl") or "query"
        stem = dataset.get("name") or stem
        name, count = stem, 1
        while name in prompts or name in ("query", "document"):
            count += 1
            name = f"{stem}-{count}"
        prompts[name] = entry
    sides = ("query_max_length", "document_max_length")
    each = {side: [dataset.get(side) or data[side] for dataset in data["datasets"]] for side in sides}
    lengths = {side: max(found, default=data[side]) for side, found in each.items()}
    return Usage(prompts=prompts, pooling=pooling, **lengths)


def usage_of_manifest(manifest: Mapping[str, Any]) -> Usage:
    """The manifest's own; of a checkpoint from before it had one, from its options."""
    pooling = model_from_dict(manifest["model"]).pooling
    if "usage" in manifest:
        return Usage.from_json(manifest["usage"], pooling, "manifest.json: usage")
    return usage_of_training(manifest["config"]["data"], pooling)


def usage_of_folder(folder: Path) -> Usage:
    """From the sentence-transformers files: ours say it all, others prompts, one length and a similarity."""
    pooling = _pooling(modules_of(folder), folder)
    settings = read_object(file) if (file := folder / "config_sentence_transformers.json").is_file() else {}
    if USAGE_KEY in settings:
        usage = Usage.from_json(settings[USAGE_KEY], pooling, f"{file}: {USAGE_KEY}")
        check_prompts(file, settings, usage)
        return usage
    own = settings.get("prompts") or {}
    if not isinstance(own, dict) or not all(isinstance(text, str) for text in own.values()):
        raise UserError(f"{file}: prompts is {json.dumps(own)} and must be strings under names")
    document = next((own[name] for name in DOCUMENT_NAMES if own.get(name)), "")
    # NAME-document: as named_prompts writes.
    sides = {"query", *DOCUMENT_NAMES, *(f"{name}-document" for name in own)}
    others = {n: Prompts(own[n], own.get(f"{n}-document", document)) for n in own if n not in sides}
    is_known = own.get("query") or document or others
    prompts = {"query": Prompts(own.get("query", ""), document), **others} if is_known else {}
    similarity: Any = settings.get("similarity_fn_name") or "cosine"
    limit = _limit_of(folder)
    lengths: dict[str, Any] = {"query_max_length": limit, "document_max_length": limit}
    return Usage(prompts=prompts, pooling=pooling, similarity=similarity, **lengths)


def _limit_of(folder: Path) -> int | None:
    """Tokens at which sentence-transformers cuts, found as it finds them; None where no file of its says."""
    file = folder / "sentence_bert_config.json"
    if not file.is_file():
        return None
    limit = read_object(file).get("max_seq_length")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"{file}: max_seq_length is {json.dumps(limit)} and must be a number of tokens")
    places = (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings"))
    stated = [read_object(folder / file).get(key) for file, key in places if (folder / file).is_file()]
    return limit or min((n for n in stated if type(n) is int and 0 < n < 1 << 30), default=None)


def check_prompts(file: Path, settings: Mapping[str, Any], usage: Usage) -> None:
    """UserError where the keys that sentence-transformers reads and ours differ: one was edited."""
    theirs, ours = settings.get("prompts"), usage.named_prompts()
    if theirs != ours:
        theirs = theirs if isinstance(theirs, dict) else {}
        name = next(n for n in [*ours, *theirs] if ours.get(n) != theirs.get(n))
        raise UserError(
            f"{file}: the prompt {name!r} is {json.dumps(theirs.get(name))} in prompts, which "
            "sentence-transformers reads, and "
            f"{json.dumps(ours.get(name))} by {USAGE_KEY}, which says how the model was trained; the file "
            f"was edited: make them agree, or delete the key {USAGE_KEY} to have prompts count alone"
        )
    if (found := settings.get("similarity_fn_name") or "cosine") != usage.similarity:
        raise UserError(
            f"{file}: similarity_fn_name is {json.dumps(found)} and similarity by {USAGE_KEY} "
            f"{json.dumps(usage.similarity)}; the file was edited: make them agree"
        )


class Modules(NamedTuple):
    """modules.json: each one's kind; how they pool in sentence-transformers' words, empty without Pooling."""

    kinds: list[str]
    pooling_modes: set[str]
    include_prompt: bool = True

    def unlike_ours(self) -> str:
        """Which modules an encoder of ours does not compute; "" where it computes them all."""
        if not is_ours(self.kinds):
            return f"modules {', '.join(self.kinds)}"
        if pooling_of_modes(self.pooling_modes) is None:
            return f"pooling by {', '.join(sorted(self.pooling_modes)) or 'nothing'}"
        return "" if self.include_prompt else "pooling that leaves the prompt out"


def modules_of(folder: Path) -> Modules | None:
    """None without modules.json; UserError where config.json says another pooling."""
    file = folder / "modules.json"
    if not file.is_file():
        return None
    modules = read(file)
    try:
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        places = [str(module["path"]) for module in modules if str(module["type"]).endswith(".Pooling")]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is no list of modules with type and path: {error!r}") from None
    if not places:
        return Modules(kinds, set())
    pooling = folder / places[0] / "config.json"
    settings = read_object(pooling) if pooling.is_file() else {}
    modes, word = modes_of(pooling, settings), _config(folder).get("pooling")
    if (mode := mode_of_config(word)) is not None and modes != {mode}:
        raise UserError(
            f"{pooling} pools by {', '.join(sorted(modes)) or 'nothing'}, which sentence-transformers "
            f"reads, and {folder / 'config.json'} says pooling={word!r}, which servers read; correct one"
        )
    return Modules(kinds, modes, settings.get("include_prompt", True) is True)


def _config(folder: Path) -> dict[str, Any]:
    return read_object(file) if (file := folder / "config.json").is_file() else {}


def _pooling(modules: Modules | None, folder: Path) -> str:
    """Our name for how a folder pools, else the words of who computes it."""
    if modules is not None:
        return pooling_of_modes(modules.pooling_modes) or ", ".join(sorted(modules.pooling_modes)) or "none"
    mode = mode_of_config(_config(folder).get("pooling"))
    return (pooling_of_modes({mode}) or mode) if mode else ModelConfig.pooling


def _foreign(folder: Path) -> str:
    """Why a model folder needs sentence-transformers: its modules.json is not ours; "" when it is.

    Ours are a Llama or a relative that says whether it is causal, a pooling of ours, and at most a
    normalisation; so a bare folder and our own exports are not foreign, whatever they are called.
    """
    modules = modules_of(folder)
    if modules is None:
        return ""
    config = _config(folder)
    if config.get("model_type") not in ARCHITECTURES:
        return f"model_type {config.get('model_type')!r}"
    if unlike := modules.unlike_ours():
        return unlike
    return "" if isinstance(config.get("is_causal"), bool) else "causal attention"
