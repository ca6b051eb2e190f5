"""A folder's files against what config.json implies: code, settings, modules and every weight."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_embed_core.config import ModelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.folder import DTYPES
from nemo_embed_core.export.formats import FORMATS
from nemo_embed_core.files.strict_json import read, read_object
from nemo_embed_core.model.spec import (
    ARCHITECTURES,
    MODULES,
    POOLING_MODES,
    POOLINGS,
    hf_shapes,
    is_ours,
    modes_of,
    pooling_of_config,
    pooling_of_modes,
)


def _require(file: Path, found: Any, wanted: Any, what: str) -> None:
    if type(found) is not type(wanted) or found != wanted:
        raise UserError(f"{file}: {what} is {json.dumps(found)} and must be {json.dumps(wanted)}")


def check_code(path: Path, config: dict[str, Any], trusted: bool) -> bool:
    """Whether loading the folder runs Python; UserError for other bytes than ours, unless `trusted`."""
    foreign, has_code = [], False
    ours = {name: (format.code, format.auto_map) for name, format in FORMATS.items() if format.code}
    for file in sorted(path.rglob("*.json")):
        # The key by which transformers imports a class out of the folder, or out of another folder or
        # repository.
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


# ------------------------------------------------------------------------------------------ config.json


def check_config(path: Path, config: dict[str, Any]) -> str:
    """The dtype of the weights. is_causal is not read here: hidden states show it."""
    file = path / "config.json"
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{file}: model_type is {json.dumps(model_type)} and must be one of {known}")
    _require(file, config.get("architectures"), [ARCHITECTURES[model_type]], "architectures")
    _check_settings(path, config)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in DTYPES:
        raise UserError(f"{file}: dtype is {json.dumps(dtype)} and must be one of {', '.join(DTYPES)}")
    _require(file, config.get("torch_dtype", dtype), dtype, "torch_dtype")
    return dtype


def _check_settings(path: Path, config: dict[str, Any]) -> None:
    """What of config.json decides vectors, in any folder of a Llama."""
    file = path / "config.json"
    for key in ("attention_bias", "mlp_bias"):
        _require(file, config.get(key, False), False, key)
    _require(file, config.get("hidden_act", "silu"), "silu", "hidden_act")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*sizes, "num_key_value_heads"):
        value = config.get(key, config.get("num_attention_heads") if key == "num_key_value_heads" else None)
        if type(value) is not int or value < (0 if key == "num_hidden_layers" else 1):
            raise UserError(f"{file}: {key} is {json.dumps(value)} and must be a positive integer")
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new is not None and "rope_theta" in config:
        # Two spellings for two generations of readers: where they differ, the same folder gives two sets of
        # vectors.
        legacy = {**(old or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
        _require(file, new, legacy, "rope_parameters, against rope_theta and rope_scaling,")


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a headless Llama with this config.json, no more and no less."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {key: config[key] for key in (*sizes, "num_key_value_heads")}
    return hf_shapes(ModelConfig(**values, head_dim=config.get("head_dim") or 0))


# ---------------------------------------------------------------------------------- sentence-transformers


def check_sentence_transformers_files(path: Path, config: dict[str, Any]) -> int:
    """max_seq_length, after checking that the modules are Transformer, config.json's pooling, Normalize."""
    file = path / "modules.json"
    modules = read(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{file} must hold a list of objects with type and path")
    wanted = [[f"sentence_transformers.models.{name}", folder] for name, folder in MODULES]
    found = [[module.get("type"), module.get("path")] for module in modules]
    _require(file, found, wanted, "the list of types and paths")

    file = path / "1_Pooling" / "config.json"
    pooling, name = read_object(file), pooling_of_config(config.get("pooling"))
    if name is None:
        raise UserError(
            f"{path / 'config.json'}: pooling is {json.dumps(config['pooling'])}, which is not computed here"
        )
    flag, _ = POOLING_MODES[POOLINGS[name].mode]
    for key, value in pooling.items():
        if key.startswith("pooling_mode_"):
            _require(file, value, key == flag, key)
    _require(file, pooling.get(flag), True, flag)
    _require(file, pooling.get("include_prompt", True), True, "include_prompt")
    _require(file, pooling.get("word_embedding_dimension"), config["hidden_size"], "word_embedding_dimension")

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


def modules_of(path: Path) -> list[dict[str, Any]] | None:
    if not (path / "modules.json").is_file():
        return None
    modules = read(path / "modules.json")
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules
    ):
        raise UserError(f"{path / 'modules.json'} must hold a list of objects with type and path")
    return modules


def other_pooling(path: Path, modules: list[dict[str, Any]]) -> str:
    """ "" for Transformer, a pooling of ours and at most Normalize, in any spelling; else what it is instead."""
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if not is_ours(kinds):
        return f"its modules are {', '.join(kinds)}"
    file = path / str(modules[1].get("path", "1_Pooling")) / "config.json"
    pooling = read_object(file)
    modes = modes_of(file, pooling)
    if pooling_of_modes(modes) is None:
        return f"its pooling is {', '.join(sorted(modes)) or 'not stated'}"
    return "" if pooling.get("include_prompt", True) is True else "its pooling leaves the prompt out"


# ------------------------------------------------------------------------------------------ weights


def check_weights(path: Path, expected: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Every tensor that config.json implies, once, with its shape and dtype and finite, and no other."""
    files = _weight_files(path)
    seen: dict[str, str] = {}
    for file, listed in files.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                names = set(tensors.keys())
                if listed is not None and names != listed:
                    raise UserError(
                        f"{file} and model.safetensors.index.json disagree on the tensors "
                        f"{sorted(names ^ listed)[:4]}; the folder mixes two exports, write it again"
                    )
                for name in sorted(names):
                    if name in seen:
                        raise UserError(f"tensor {name} is both in {seen[name]} and in {file.name} of {path}")
                    seen[name] = file.name
                    if name in expected:
                        check_tensor(file, name, tensors.get_slice(name), expected[name], dtype)
        except (SafetensorError, OSError) as error:
            closed = f"{file} does not open as safetensors ({error})"
            raise UserError(f"{closed}; copy or export it again") from None
    missing, extra = expected.keys() - seen.keys(), seen.keys() - expected.keys()
    for problem, names in (("lacks", missing), ("should not have", extra)):
        if names:
            raise UserError(
                f"{path} {problem} {len(names)} tensors, the first of them {min(names)} "
                f"({len(seen)} found, {len(expected)} implied by config.json)"
            )


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """{file: its tensors by the index, None without an index}; every .safetensors file is one."""
    present = {file.name for file in path.glob("*.safetensors")}
    if (path / "model.safetensors.index.json").exists():
        file = path / "model.safetensors.index.json"
        weight_map = read_object(file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{file}: weight_map must be an object of tensor names and file names")
        listed: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            listed.setdefault(name, set()).add(tensor)
    elif "model.safetensors" in present:
        listed = {"model.safetensors": set()}
    else:
        neither = "neither model.safetensors nor model.safetensors.index.json"
        raise UserError(f"{path} has {neither}; merge the checkpoint first")
    if present != set(listed):
        missing, extra = sorted(set(listed) - present), sorted(present - set(listed))
        wrong = f"weight files are missing {missing} or extra {extra}"
        raise UserError(f"{path}: {wrong}; export into an empty folder")
    return {path / name: tensors or None for name, tensors in sorted(listed.items())}


def check_tensor(file: Path, name: str, tensor: Any, shape: tuple[int, ...], dtype: str | None) -> str:
    """Its dtype. `tensor` is a lazy slice: blocks of rows keep memory at 64 MB for a tensor of any size."""
    if tuple(tensor.get_shape()) != shape:
        raise UserError(f"{file}: {name} has shape {tuple(tensor.get_shape())}; config.json implies {shape}")
    rows, found = max(1, (16 << 20) // math.prod(shape[1:])), ""
    for start in range(0, shape[0], rows):
        block = tensor[start : start + rows]
        found = str(block.dtype).removeprefix("torch.")
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
