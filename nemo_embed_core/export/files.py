"""A folder's files against what config.json implies: code, settings, modules and every weight."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_embed_core.checkpoint.hf_folder import HFFolder
from nemo_embed_core.config import Pooling
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.folder import DTYPES
from nemo_embed_core.export.formats import FORMATS
from nemo_embed_core.files.safetensors import dtype_name
from nemo_embed_core.files.strict_json import read, read_object
from nemo_embed_core.model.spec import ARCHITECTURES, MODULES, POOLING_MODES, POOLINGS, hf_shapes

Shapes = dict[str, tuple[int, ...]]


def _require(file: Path, found: Any, wanted: Any, what: str) -> None:
    if type(found) is not type(wanted) or found != wanted:
        raise UserError(f"{file}: {what} is {json.dumps(found)} and must be {json.dumps(wanted)}")


def check_code(path: Path, trusted: bool) -> bool:
    """Whether loading the folder runs Python; UserError for other bytes than ours, unless `trusted`."""
    foreign, has_code = [], False
    ours = {name: (format.code, format.auto_map) for name, format in FORMATS.items() if format.code}
    for file in sorted(path.rglob("*.json")):
        # By this key transformers imports a class, out of the folder or out of another one or a repository.
        auto_map = value.get("auto_map") if isinstance(value := read(file), dict) else None
        if auto_map is not None:
            has_code = True
            code = next((code for code, its_map in ours.values() if auto_map == its_map), None)
            if file != path / "config.json" or code is None:
                foreign.append(f"auto_map in {file.relative_to(path)}")
            elif not (path / code.name).is_file():
                raise UserError(
                    f"{path} has no {code.name}, which auto_map in config.json names; export it again"
                )
            elif (path / code.name).read_bytes() != code.read_bytes():
                foreign.append(code.name)
    if has_code and (path / "adapter_config.json").exists():
        foreign.append("adapter_config.json, which loads yet another folder")
    if foreign and not trusted:
        known = " or ".join(f"the {code.name} of --format {name}" for name, (code, _) in ours.items())
        raise UserError(
            f"{path} brings code that this version did not write ({', '.join(foreign)}), and checking the "
            "folder would run it. Read it, then add --trust-remote-code; without that flag a folder may "
            f"name no code, or exactly {known}"
        )
    return has_code


# ------------------------------------------------------------------------------------------ settings


def check_config(path: Path, config: dict[str, Any]) -> str:
    """The dtype of the weights. is_causal is not read here: hidden states show it."""
    file = path / "config.json"
    _require(file, config.get("architectures"), [ARCHITECTURES[config["model_type"]]], "architectures")
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in DTYPES:
        raise UserError(f"{file}: dtype is {json.dumps(dtype)} and must be one of {', '.join(DTYPES)}")
    _require(file, config.get("torch_dtype", dtype), dtype, "torch_dtype")
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if (
        new is not None and "rope_theta" in config
    ):  # transformers 4 reads the old ones alone, also where they are null
        legacy = {**(old or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
        _require(file, new, legacy, "rope_parameters, against rope_theta and rope_scaling,")
    return dtype


def check_sentence_transformers_files(path: Path, hidden_size: int, pooling: Pooling) -> int:
    """max_seq_length, after checking that the modules are Transformer, this pooling, Normalize."""
    file = path / "modules.json"
    modules = read(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{file} must hold a list of objects with type and path")
    wanted = [[f"sentence_transformers.models.{name}", folder] for name, folder in MODULES]
    found = [[module.get("type"), module.get("path")] for module in modules]
    _require(file, found, wanted, "the list of types and paths")

    file = path / "1_Pooling" / "config.json"
    settings, (flag, _) = read_object(file), POOLING_MODES[POOLINGS[pooling].mode]
    for key, value in settings.items():
        if key.startswith("pooling_mode_"):
            _require(file, value, key == flag, key)
    _require(file, settings.get(flag), True, flag)
    _require(file, settings.get("include_prompt", True), True, "include_prompt")
    _require(file, settings.get("word_embedding_dimension"), hidden_size, "word_embedding_dimension")

    file = path / "config_sentence_transformers.json"
    prompts = read_object(file).get("prompts")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        wanted_prompts = 'strings under names, {"query": "..."}'
        raise UserError(f"{file}: prompts is {json.dumps(prompts)} and must be {wanted_prompts}")

    file = path / "sentence_bert_config.json"
    max_seq_length = read_object(file).get("max_seq_length")
    if type(max_seq_length) is not int or max_seq_length < 2:
        found_length = f"max_seq_length is {json.dumps(max_seq_length)}"
        raise UserError(f"{file}: {found_length} and must be a number of tokens, at least 2")
    return max_seq_length


# ------------------------------------------------------------------------------------------ weights


def check_weights(opened: HFFolder, dtype: str | None = None) -> tuple[Shapes, set[str]]:
    """(shapes by name, dtypes) of the weights: all that config.json implies, of their shape and finite.

    dtype: of a folder that we wrote, which has it throughout, and no other tensors, names and files.
    """
    path, shapes = opened.folder, hf_shapes(opened.model)
    in_files, dtypes = set[str](), set[str]()
    files = sorted({file for _, file in opened.where.values()})
    for file in files:
        try:
            with safe_open(path / file, framework="pt") as tensors:
                in_files.update(tensors.keys())
                for name, (stored, its_file) in opened.where.items():
                    if its_file == file and name in shapes:
                        tensor = tensors.get_slice(stored)
                        dtypes.add(_check_tensor(path / file, stored, tensor, shapes[name], dtype))
        except (SafetensorError, OSError) as error:
            closed = f"{path / file} does not open as safetensors ({error})"
            raise UserError(f"{closed}; copy or export it again") from None
    found = in_files if dtype is not None else opened.where.keys()
    for problem, names in (("lacks", shapes.keys() - found), ("should not have", found - shapes.keys())):
        if names:
            raise UserError(
                f"{path} {problem} {len(names)} tensors, the first of them {min(names)} "
                f"({len(found)} found, {len(shapes)} implied by config.json)"
            )
    if dtype is not None and (
        extra := sorted({file.name for file in path.glob("*.safetensors")} - set(files))
    ):
        raise UserError(f"{path}: weight files {extra} are extra; export into an empty folder")
    return shapes, dtypes


def _check_tensor(file: Path, name: str, tensor: Any, shape: tuple[int, ...], dtype: str | None) -> str:
    """Its dtype. `tensor` is a lazy slice: blocks of rows keep memory at 64 MB for a tensor of any size."""
    if tuple(tensor.get_shape()) != shape:
        raise UserError(f"{file}: {name} has shape {tuple(tensor.get_shape())}; config.json implies {shape}")
    rows, found = max(1, (16 << 20) // math.prod(shape[1:])), ""
    for start in range(0, shape[0], rows):
        block = tensor[start : start + rows]
        found = dtype_name(block.dtype)
        if found != (dtype or found) or found not in DTYPES:
            raise UserError(
                f"{file}: {name} is {found}; config.json says {dtype or 'nothing'}, and it must be one of "
                f"{', '.join(DTYPES)}"
            )
        finite = torch.isfinite(block)
        if not finite.all():
            row = start + int((~finite).reshape(len(block), -1).any(dim=1).nonzero()[0])
            raise UserError(
                f"{file}: {name} has {int((~finite).sum())} values that are NaN or infinite in rows {start} "
                f"to {start + len(block) - 1}, the first in row {row}; the run diverged or the file is "
                f"damaged, take an earlier checkpoint"
            )
    return found
