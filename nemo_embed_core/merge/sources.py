"""The sources of a merge before anything is written: one shape, one dtype to write, one tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nemo_embed_core.checkpoint.weights import Weights, open_weights
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.data.tokenizer_files import check_servable, difference
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.safetensors import dtype_name
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.options import to_dict

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def open_sources(paths: Sequence[str], say: Callable[[str], None] = print) -> list[Weights]:
    """Sources of one shape and configuration, headers checked; write_weights hashes what it reads."""
    sources = [open_weights(path, hashed=False) for path in paths]
    first = sources[0]
    for path, other in zip(paths, sources, strict=True):
        if other.model != first.model:
            ours, theirs = to_dict(first.model), to_dict(other.model)
            fields = [f"{k}: {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k]]
            raise UserError(f"{paths[0]} and {path} are models of different shapes: {'; '.join(fields)}")
    for (i, a), (j, b) in itertools.combinations(enumerate(sources), 2):
        both = f"{paths[i]} and {paths[j]}"
        if a.folder.resolve() == b.folder.resolve():
            say(f"WARNING: {both} are the same weights ({a.folder}): they count twice")
        elif differences := _other_settings(a.folder, b.folder):
            say(f"WARNING: config.json of {both} differ in what is not weights: {differences}")
    return sources


# What a config.json says about its writer, and the spellings that model_config already compares.
_NOT_SETTINGS = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "rope_"),
)


def _other_settings(a: Path, b: Path) -> str:
    """Differences of two folders' config.json that ModelConfig does not hold, such as is_causal."""
    if not all((folder / "config.json").is_file() for folder in (a, b)):
        return ""
    ours, theirs = read_object(a / "config.json"), read_object(b / "config.json")
    keys = [k for k in sorted(ours.keys() | theirs.keys()) if not k.startswith(_NOT_SETTINGS)]
    differ = [k for k in keys if ours.get(k) != theirs.get(k)]
    return "; ".join(f"{k}: {ours.get(k)!r} and {theirs.get(k)!r}" for k in differ)


def dtype_of(name: str, sources: Sequence[Weights]) -> torch.dtype:
    """ "auto" is the sources' own, which must then be one."""
    if name != "auto":
        return DTYPES[name]
    kinds = {source.dtype for source in sources}
    if len(kinds) > 1 or torch.float64 in kinds:
        named = ", ".join(f"{s.folder}: {dtype_name(s.dtype)}" for s in sources)
        raise UserError(
            f"the sources' dtypes do not say which one to write ({named}); choose one with --dtype"
        )
    return sources[0].dtype


def one_tokenizer(paths: Sequence[str], sources: Sequence[Weights]) -> tuple[dict[str, bytes], list[str]]:
    """(the files of the tokenizer that all sources share, what is to be said of serving it)."""
    tokenizers = [load_tokenizer(source.folder) for source in sources]
    first = tokenizers[0]
    said = check_servable(first.files)
    for path, tokenizer in zip(paths, tokenizers, strict=True):
        tokenizer.check_fits(sources[0].model.vocab_size)
        if tokenizer.digest == first.digest:
            continue
        if how := difference(first.files["tokenizer.json"], tokenizer.files["tokenizer.json"]):
            differ = f"the tokenizers of {paths[0]} and {path} differ: {how}"
            raise UserError(f"{differ}; only models that share one are averaged")
    return first.files, said
