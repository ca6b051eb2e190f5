"""A Hugging Face folder before a weight is read: which of its files count. No torch import.

`open_folder(path)` is the gate of training, mining, merging, embedding and checking. Of two files that
contradict, transformers reads one without a word and other programs the other; here both are named and
refused. What is the same twice is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_embed_core.config import ModelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.safetensors import read_header
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.model.hf_config import model_config
from nemo_embed_core.model.spec import EMBEDDING, FIRST_NORM, HEADS, OUTER_MODELS, ROPE_BUFFER

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
# What torch.compile, DDP, FSDP and activation checkpointing put into names.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class HFFolder:
    """What counts in the folder. notes: what a reader should know although nothing contradicts."""

    folder: Path
    model: ModelConfig
    where: Mapping[str, tuple[str, str]]  # name without prefix ("layers.0...") -> (name in the file, file)
    notes: tuple[str, ...]


def open_folder(folder: Path) -> HFFolder:
    """The shape, and where each tensor is; nothing but JSON and headers is read."""
    raw = read_object(folder / "config.json") if (folder / "config.json").is_file() else None
    if raw is None:
        raise UserError(f"{folder} has no config.json{_hint(folder)}")
    model, notes = model_config(folder / "config.json", raw)
    where, more = tensors(folder, raw)
    return HFFolder(folder, model, where, (*notes, *more))


# ------------------------------------------------------------------------------------------ found by a user


def find_folder(path: str | Path) -> tuple[Path, tuple[str, ...]]:
    """The folder and what to say about it; of the hub's cache (models--ORG--NAME) the snapshot that refs/main
    names, of RUN/best the run's best checkpoint."""
    folder = Path(path)
    if folder.name == "best" and not folder.exists():
        from nemo_embed_core.checkpoint.runs import find_checkpoint, is_best  # imports torch

        if is_best(folder):
            found = find_checkpoint(folder)
            return found, (f"{folder} is {found.name}",)
    if folder.is_file():
        what = {
            ".gguf": "a GGUF file, whose tensors are quantised and permuted; get the Hugging Face folder it "
            "was made from",
            ".safetensors": f"one file; give the folder that holds it, {folder.parent}",
        }.get(folder.suffix, "a file, not a folder; give a checkpoint, a run or a Hugging Face folder")
        raise UserError(f"{folder} is {what}")
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; give a checkpoint, a run or a Hugging Face folder{_hub_id(str(path))}"
        )
    if not (folder / "snapshots").is_dir() or (folder / "config.json").exists():
        return folder, ()
    snapshots = sorted(p.name for p in (folder / "snapshots").iterdir() if p.is_dir())
    main = folder / "refs" / "main"
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    if commit in snapshots:
        chosen, why = commit, "refs/main names it"
    elif len(snapshots) == 1:
        chosen, why = snapshots[0], "there is no other"
    else:
        known = ", ".join(str(folder / "snapshots" / name) for name in snapshots)
        known = known or "it has none: the download failed"
        raise UserError(
            f"{folder} is the outer folder of a download and refs/main names no snapshot of it; give one: "
            f"{known}"
        )
    found = folder / "snapshots" / chosen
    return found, (f"{folder}: reading snapshots/{chosen} ({why})",)


def _hub_id(path: str) -> str:
    """How to get a model of the hub, for what looks like its id and is nothing in a folder that is here."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) or Path(path).parent.exists():
        return ""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    cached = cache / f"models--{path.replace('/', '--')}"
    if cached.is_dir():
        return f". The hub's {path} is in this machine's cache: give {cached}"
    name = path.split("/")[1]
    return f". If {path} is a model of the hub: hf download {path} --local-dir {name}, then give {name}"


def _hint(folder: Path) -> str:
    """What the folder is instead, when it is something known; starts with a semicolon."""
    names = sorted(p.name for p in folder.iterdir())
    suffixes = (".safetensors", ".bin", ".gguf", ".pth", ".pt")
    found = {suffix: [n for n in names if n.endswith(suffix)] for suffix in suffixes}
    shards = [n for n in found[".safetensors"] if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n)]
    inner = [n for n in names if (folder / n / "config.json").is_file() and has_weights(folder / n)]
    if ADAPTER in names:
        base = _adapter_base(folder)
        return (
            f"; it is an adapter ({ADAPTER}) of {base}: merge it into its base first (peft: "
            "model.merge_and_unload(), then save_pretrained) and give that folder"
        )
    if shards:
        return (
            f"; its shards ({shards[0]}, ...) need {INDEX}, which says where each tensor is: copy it from "
            "where they come from"
        )
    if found[".safetensors"]:
        some = ", ".join(found[".safetensors"][:3])
        return f"; transformers does not read {some} by itself either: rename what you mean to {SINGLE}"
    if found[".gguf"]:
        file = found[".gguf"][0]
        return f"; {file} is a GGUF file and is not read: get the Hugging Face folder that it was made from"
    if any(n.startswith("consolidated.") for n in found[".pth"]):
        return (
            f"; {found['.pth'][0]} is Meta's own format, a pickle: convert it with transformers' "
            "convert_llama_weights_to_hf.py, or get the -hf folder"
        )
    if pickles := found[".bin"] + found[".pt"] + found[".pth"]:
        load = f"AutoModel.from_pretrained('{folder}').save_pretrained('NEW')"
        return (
            f"; {pickles[0]} is a pickle and is never opened, convert it to safetensors where you trust it: "
            f'python -c "from transformers import AutoModel; {load}", and copy the tokenizer\'s files'
        )
    if inner:
        return f"; there are models inside: give {' or '.join(str(folder / n) for n in inner[:4])}"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f" (it holds {shown})" if names else " (it is empty)"


def _adapter_base(folder: Path) -> str:
    base = read_object(folder / ADAPTER).get("base_model_name_or_path")
    return str(base or "a model that it does not name")


# ------------------------------------------------------------------------------------------ files of weights


def inside(folder: Path, path: Path) -> Path:
    """The path, unless it links out of the folder. Hugging Face's cache links snapshots/*/NAME to blobs/."""
    target, resolved = path.resolve(), folder.resolve()
    allowed = [resolved]
    if resolved.parent.name == "snapshots":
        allowed.append(resolved.parent.parent / "blobs")
    if target.parent not in allowed:
        raise UserError(f"{path} is a link to {target}, outside of {folder}; put the file itself there")
    return path


def has_weights(folder: Path) -> bool:
    """Whether transformers would find safetensors here."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def weight_files(folder: Path, raw: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The files that are read, here as in transformers, and the index's {name: file}, if there is one."""
    index = _index(folder) if (folder / INDEX).is_file() else None
    single = (folder / SINGLE).is_file()
    if index is None and not single:
        raise UserError(f"{folder} has no {SINGLE} and no {INDEX}{_hint(folder)}")
    files = sorted(set(index.values())) if index is not None else [SINGLE]
    if single and files != [SINGLE]:
        raise UserError(
            f"{folder} holds two sets of weights: {SINGLE}, which transformers reads, and the shards of "
            f"{INDEX} ({files[0]}{', ...' if len(files) > 1 else ''}); delete the one that is out of date, "
            "with its index"
        )
    read = INDEX if files != [SINGLE] else SINGLE
    if (explicit := raw.get("transformers_weights")) not in (None, read):
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights is {explicit!r}, which transformers 5 reads, "
            f"and earlier ones read {read}; delete that field, or the file that you do not mean"
        )
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} holds a whole model ({read}) and an adapter ({ADAPTER}): with peft installed "
            f"transformers reads {_adapter_base(folder)} and the adapter, without it {read}; delete "
            "adapter_*, or merge the adapter (peft: merge_and_unload) and save the result elsewhere"
        )
    return files, index or {}


def tensors(folder: Path, raw: Mapping[str, Any]) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    """{name without prefix: (name in the file, file)} of all weights, and notes; UserError where two files
    contradict."""
    files, index = weight_files(folder, raw)
    stored: dict[str, str] = {}
    for file in files:
        for name in read_header(inside(folder, folder / file))[0]:
            if name in stored:
                raise UserError(
                    f"{folder} holds {name} twice, in {stored[name]} and in {file}; {INDEX} is of other "
                    "shards"
                )
            stored[name] = file
    for name, file in index.items():
        if stored.get(name) != file:
            there = f"it is in {stored[name]}" if name in stored else "no file has it"
            raise UserError(
                f"{folder / INDEX}: weight_map says that {name} is in {file}, but {there}; the index is of "
                "other shards"
            )
    others = OUTER_MODELS.get(raw.get("model_type", ""), ())
    parts = tuple(before + part for part in others for before in ("", "model."))
    stored = {name: file for name, file in stored.items() if not name.startswith(parts)}
    where, notes = _plain_names(folder, stored, raw.get("tie_word_embeddings") is True, bool(others))
    return where, (*notes, *_ignored(folder, files))


def _index(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    where = read_object(inside(folder, index)).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f'{index}: no "weight_map" object')
    for file in {str(file): file for file in where.values()}.values():
        plain = isinstance(file, str) and re.fullmatch(r"[A-Za-z0-9_][\w.-]*", file)
        if not plain or not (folder / file).is_file():
            raise UserError(f"{index}: weight_map names {str(file)[:80]!r}, which is not a file of {folder}")
    return where


def _plain_names(
    folder: Path, stored: Mapping[str, str], tied: bool, is_part: bool = False
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Without what wrappers and outer modules put before; the head of a tied model is its embedding.

    is_part: of a model of images and text, whose names are its own.
    """
    notes: list[str] = []
    plain: dict[str, tuple[str, str]] = {}
    if lora := next((name for name in stored if ".lora_" in name or ".base_layer." in name), None):
        raise UserError(
            f"{folder} holds {lora}: an adapter that is not merged; peft's merge_and_unload() does that"
        )
    for name, file in stored.items():
        short = _WRAPPERS.sub("", name)
        if short in plain:
            raise UserError(f"{folder} holds both {plain[short][0]} and {name}; keep one")
        plain[short] = (name, file)
    prefixes = {name.removesuffix(FIRST_NORM) for name in plain if _is_first(name)}
    if not prefixes:
        prefixes = {"model." if any(name.startswith("model.") for name in plain) else ""}
    if len(prefixes) > 1:
        first, second = sorted(prefixes, key=len)[:2]
        raise UserError(
            f"{folder} holds both {first}{FIRST_NORM} and {second}{FIRST_NORM}, two models in one; keep one"
        )
    prefix = prefixes.pop()
    where: dict[str, tuple[str, str]] = {}
    for name, (in_file, file) in plain.items():
        short, outside = name.removeprefix(prefix), name.removeprefix(prefix.removesuffix("model."))
        if short == name and outside in HEADS:  # heads stand outside of `model`
            short = outside
        short = short.removeprefix("model.")  # both usual spellings in one folder
        if short in where:
            raise UserError(f"{folder} holds both {where[short][0]} and {in_file}; keep one")
        where[short] = (in_file, file)
    odd = {short: at[0] for short, at in where.items() if at[0] not in (short, "model." + short)}
    if odd and not is_part:
        short = next((short for short in odd if short not in HEADS), next(iter(odd)))
        notes.append(
            f"{folder}: its tensors have other names than transformers', which would draw random weights for "
            f"them: {odd[short]} is read as {short}"
        )
    head = HEADS[0]
    if EMBEDDING not in where and head in where:
        if not tied:
            raise UserError(
                f"{folder} has {where[head][0]} but no {EMBEDDING}, and config.json does not say "
                "tie_word_embeddings: true; get the embedding, or say so if the head is the embedding"
            )
        where[EMBEDDING] = where.pop(head)
        notes.append(
            f"{folder}: a tied model saved with its head alone: {where[EMBEDDING][0]} is read as the "
            "embedding (transformers does so for AutoModelForCausalLM; AutoModel draws a random one)"
        )
    heads = [name for name in HEADS if where.pop(name, None) is not None and name != head]
    if heads:
        notes.append(f"{folder}: {heads[0]} is the head of another task and is not read")
    # Old exports carry the RoPE buffer of each layer; it is a function of config.json, and transformers reads
    # it there.
    return {name: at for name, at in where.items() if not name.endswith(ROPE_BUFFER)}, notes


def _is_first(name: str) -> bool:
    return name.endswith(FIRST_NORM) and name.removesuffix(FIRST_NORM)[-1:] in ("", ".")


def _ignored(folder: Path, files: Iterable[str]) -> list[str]:
    """Notes on files beside the weights that neither we nor transformers read."""
    notes, read = [], set(files)
    others = sorted(p.name for p in folder.glob("model*.safetensors") if p.name not in read)
    if others:
        more = ", ..." if len(others) > 1 else ""
        notes.append(f"{folder}: {others[0]}{more} is in no index and is not read, here as in transformers")
    newest = max((folder / file).stat().st_mtime for file in read)
    pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin") if p.stat().st_mtime > newest + 60)
    if pickles:
        notes.append(
            f"{folder}: {pickles[0]} is newer than {min(read)} and is not read, here as in transformers"
        )
    return notes
