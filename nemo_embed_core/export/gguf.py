"""model.gguf of a folder, for llama.cpp: weights, tokenizer, pooling and the missing causal mask in one file.

Written through the gguf library (pip install 'nemo_embed_core[serve]'), tensor by tensor. What llama.cpp
would not compute or cut into the same tokens is refused. Prompts have no place in it: the card says them.

- A bidirectional Llama or Mistral is a `llama-embed`: older versions refuse the name, where of a `llama` they
  ignore `attention.causal` and give other vectors without a word. Qwens have one name: the version counts.
- llama.cpp rotates neighbours: rows of a head of q and k go from (half, pair) to (pair, half), not of Qwens.
- Wavelengths of Llama 3 are factors in rope_freqs.weight; linear and YaRN are keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nemo_embed_core.checkpoint.gguf_reader import BLOCK, CONTROL, TENSORS
from nemo_embed_core.checkpoint.hf_folder import open_folder
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.data.tokenizer_files import added_ids
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.strict_json import read_object

FILE = "model.gguf"
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "ministral3": "mistral3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
EMBEDDERS = {"llama": "llama-embed"}  # of those: the name of the same blocks without a causal mask
NEIGHBOURS = ("llama", "llama-embed", "mistral3")  # rotate neighbours, and read rope_freqs.weight
POOLING = {"mean": "MEAN", "cls": "CLS", "last": "LAST"}
PART = {hf: part for part, hf in BLOCK.items()} | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
OUTER = {hf.removeprefix("model."): name for name, hf in TENSORS.items()}
KINDS = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16")}
Q8_0 = ("Q8_0", "MOSTLY_Q8_0")  # 32 values of a row: int8 each, and their largest / 127 in fp16
NORMAL, UNKNOWN, USER_DEFINED, UNUSED, BYTE = 1, 2, 4, 5, 6  # token types of llama.cpp, beside CONTROL


# ------------------------------------------------------------------------------------------ what it computes


def check_gguf(model: ModelConfig, tokenizer_files: Mapping[str, bytes]) -> None:
    """UserError, before anything is written, for what llama.cpp would not compute or tokenise alike."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        install = "pip install 'nemo_embed_core[serve]'"
        raise UserError(f"format=gguf needs the gguf library: {install}") from None
    architecture = _architecture(model)
    if architecture == "qwen2" and model.num_attention_heads * model.head_dim != model.hidden_size:
        sizes = f"{model.num_attention_heads} heads of {model.head_dim} and hidden_size={model.hidden_size}"
        raise UserError(f"format=gguf: llama.cpp's qwen2 takes no {sizes}; use format=onnx")
    if model.pooling not in POOLING:
        known = ", ".join(POOLING)
        raise UserError(
            f"format=gguf: llama.cpp has no pooling={model.pooling}, only {known}; use format=onnx"
        )
    _rope(model)
    _tokens(Tokenizer.from_buffer(tokenizer_files["tokenizer.json"]), model.vocab_size)


def _architecture(model: ModelConfig) -> str:
    name = ARCHITECTURES[model.model_type]
    return name if model.is_causal else EMBEDDERS.get(name, name)


def _rope(model: ModelConfig) -> dict[str, Any]:
    """Keys of the rotary embedding; "freqs": divisors of each frequency, for rope_freqs.weight."""
    scaling, architecture = model.rope_scaling, _architecture(model)
    if scaling is None:
        return {}
    if scaling.rope_type == "llama3":
        if architecture not in NEIGHBOURS:
            raise UserError(
                f"format=gguf: llama.cpp's {architecture} has no rope_type=llama3; use format=onnx"
            )
        from nemo_embed_core.model.llama import rope_inv_freq

        plain = model.rope_theta ** -(np.arange(0, model.head_dim, 2, dtype=np.float64) / model.head_dim)
        return {"freqs": (plain / rope_inv_freq(model).numpy()).astype(np.float32)}
    keys: dict[str, Any] = {"type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type == "linear":
        return keys
    betas = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if not scaling.truncate or (architecture != "mistral3" and betas != {"beta_fast": 32, "beta_slow": 1}):
        given = f"truncate={scaling.truncate}, beta_fast={scaling.beta_fast}, beta_slow={scaling.beta_slow}"
        raise UserError(
            f"format=gguf: llama.cpp's {architecture} reads YaRN with truncate=True, beta_fast=32 and "
            f"beta_slow=1 alone, and this model has {given}; use format=onnx"
        )
    # It multiplies by 0.1 ln(factor) + 1 itself, and then by this.
    own = 0.1 * float(np.log(max(scaling.factor, 1.0))) + 1
    keys |= {"original": scaling.original_max_position_embeddings, "magnitude": scaling.magnitude / own}
    if architecture == "mistral3":
        keys |= {**betas, "temperature": scaling.llama_4_scaling_beta}
    return keys


# ------------------------------------------------------------------------------------------ tokenizer

_SPLIT = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
)
# What splits a text -> (llama.cpp's name of it, whether it takes whole words of the vocabulary first).
PATTERNS = {
    f"{_WORDS}\\p{{N}}{{1,3}}{_SIGNS}{_SPLIT}": ("llama-bpe", True),
    f"{_WORDS}\\p{{N}}{_SIGNS}{_SPLIT}": ("qwen2", False),
    f"{_TEKKEN}{_SPLIT}": ("tekken", True),
}


def _pre_tokenizer(raw: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a byte-level BPE; UserError for one that it has not."""
    steps = _steps(raw["pre_tokenizer"], "pretokenizers")
    kinds, found = [step["type"] for step in steps], ("", False)
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            found = ("gpt-2", False)
        elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            found = ("smollm", False)
        elif kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and not steps[0]["invert"]:
            is_isolated = steps[0]["behavior"] == "Isolated"
            found = PATTERNS.get(steps[0]["pattern"].get("Regex", "") if is_isolated else "", found)
    name, ignores_merges = found
    if not name or raw["model"].get("ignore_merges", False) != ignores_merges:
        shown = json.dumps(raw["pre_tokenizer"], ensure_ascii=False)[:300]
        raise UserError(
            f"format=gguf: llama.cpp names no pre-tokenizer that splits texts as this one with "
            f"ignore_merges={raw['model'].get('ignore_merges', False)} does: {shown}; use format=onnx"
        )
    return name


def _steps(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    return value[key] if value["type"] == "Sequence" else [value]


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The tokenizer as llama.cpp keeps it; UserError for one that it would not follow."""
    raw = json.loads(tokenizer.to_str())
    model = raw["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(
            f"format=gguf writes tokenizers of BPE, and this one is {model['type']}; use format=onnx"
        )
    steps = _steps(raw["normalizer"], "normalizers")
    found: dict[str, Any]
    if model.get("byte_fallback"):
        found = {"model": "llama", "pre": "default", "space": _space_prefix(raw, steps)}
    elif all(step["type"] == "NFC" for step in steps):
        found = {"model": "gpt2", "pre": _pre_tokenizer(raw), "space": False}
    else:
        kinds = ", ".join(step["type"] for step in steps)
        raise UserError(f"format=gguf: llama.cpp does not normalise texts by {kinds}; use format=onnx")
    before, after = added_ids(tokenizer)
    if len(before) > 1 or len(after) > 1:
        raise UserError(
            f"format=gguf: llama.cpp puts at most one token before and behind a text, this tokenizer puts "
            f"{before} and {after}; use format=onnx"
        )
    vocabulary = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = {token["id"]: token for token in raw["added_tokens"]}
    tokens, types = [], []
    for i in range(vocab_size):
        if i not in vocabulary:  # rows of the embedding without a token
            tokens.append(f"[PAD{i}]")
            types.append(UNUSED)
            continue
        tokens.append(vocabulary[i])
        special = added.get(i, {}).get("special")
        types.append(NORMAL if special is None else CONTROL if special else USER_DEFINED)
    merges = [" ".join(merge) for merge in model["merges"]]
    found |= {"tokens": tokens, "types": types, "merges": merges, "before": before, "after": after}
    if model.get("byte_fallback"):
        found |= _scores(model, tokens, types)
    return found


def _space_prefix(raw: Mapping[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Of a BPE of sentencepiece: whether a space stands before a text; UserError for more than that."""
    given = [
        (s["type"], s.get("prepend") or s.get("pattern", {}).get("String"), s.get("content")) for s in steps
    ]
    replace, before = ("Replace", " ", "▁"), raw["pre_tokenizer"]
    if before is None and given in ([("Prepend", "▁", None), replace], [replace]):
        return len(given) == 2
    is_metaspace = before is not None and before["type"] == "Metaspace" and not before.get("split", True)
    if not given and is_metaspace and before["replacement"] == "▁":
        return before["prepend_scheme"] != "never"
    shown = json.dumps({"normalizer": raw["normalizer"], "pre_tokenizer": before}, ensure_ascii=False)[:300]
    raise UserError(
        f"format=gguf: llama.cpp puts a space before a text and escapes spaces, and this tokenizer does "
        f"otherwise: {shown}; use format=onnx"
    )


def _scores(model: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Of sentencepiece: the joined piece with the greatest score goes first, as that of the first merge."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(model["merges"]):
        rank.setdefault(left + right, i)
    types = [
        BYTE if kind == NORMAL and len(t) == 6 and t.startswith("<0x") and t.endswith(">") else kind
        for t, kind in zip(tokens, types, strict=True)
    ]
    types = [UNKNOWN if t == model["unk_token"] else kind for t, kind in zip(tokens, types, strict=True)]
    scores = [-float(rank.get(token, 0)) for token in tokens]
    unknown = tokens.index(model["unk_token"]) if model["unk_token"] is not None else None
    return {"types": types, "scores": scores, "unknown": unknown}


# ------------------------------------------------------------------------------------------ the file


def write_gguf(folder: Path, file: Path | None = None, kinds: tuple[str, str] | None = None) -> Path:
    """The file, `folder`/model.gguf unless another is named, of the model in `folder`, in its dtype.

    kinds: Q8_0 for that instead.  Vectors stay in fp32, as llama.cpp wants them, and so do matrices whose
    rows are not of blocks.
    """
    import gguf
    import torch
    from safetensors import safe_open

    opened, config = open_folder(folder), read_object(folder / "config.json")
    model, file = opened.model, file or folder / FILE
    tokenizer_files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    check_gguf(model, tokenizer_files)
    kind, file_type = kinds or KINDS[config["dtype"]]
    architecture, rope = _architecture(model), _rope(model)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    _add_shape(writer, model, rope)
    _add_tokenizer(
        writer, _tokens(Tokenizer.from_buffer(tokenizer_files["tokenizer.json"]), model.vocab_size), config
    )

    matrix = gguf.GGMLQuantizationType[kind]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (stored, in_file) in opened.where.items():
        with safe_open(folder / in_file, framework="pt") as tensors:
            shapes[name] = tuple(tensors.get_slice(stored).get_shape())
    if "freqs" in rope:
        writer.add_tensor_info(
            "rope_freqs.weight", rope["freqs"].shape, np.dtype(np.float32), rope["freqs"].nbytes
        )
    values_of_block, block_bytes = gguf.GGML_QUANT_SIZES[matrix]
    plain = {name for name, shape in shapes.items() if len(shape) == 1 or shape[-1] % values_of_block}
    for name, shape in shapes.items():
        of, count = gguf.GGMLQuantizationType.F32 if name in plain else matrix, int(np.prod(shape))
        size = 4 * count if name in plain else count // values_of_block * block_bytes
        writer.add_tensor_info(_name(name), shape, np.dtype(np.float32), size, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if "freqs" in rope:
        writer.write_tensor_data(rope["freqs"])
    heads = {"q_proj": model.num_attention_heads, "k_proj": model.num_key_value_heads}
    for name in shapes:
        stored, in_file = opened.where[name]
        with safe_open(folder / in_file, framework="pt") as tensors:
            tensor = tensors.get_tensor(stored)
        of_heads = heads.get(name.split(".")[-2], 0)
        if of_heads and architecture in NEIGHBOURS:
            rows = torch.from_numpy(permute(np.arange(len(tensor))[:, None], of_heads)[:, 0])
            tensor = tensor[rows]
        if name in plain or kinds is not None:
            tensor = tensor.float()
        if name not in plain and kinds is not None:
            writer.write_tensor_data(gguf.quants.quantize(tensor.contiguous().numpy(), matrix))
            continue
        values = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bf16
        writer.write_tensor_data(values.contiguous().numpy())
    writer.close()
    return file


def _name(name: str) -> str:
    """model.safetensors' -> llama.cpp's"""
    if name in OUTER:
        return OUTER[name]
    _, layer, rest = name.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{PART[part]}.{kind}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """[H * A, D], rows (half, pair) of each head -> rows (pair, half); undone by gguf_reader.unpermute."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_shape(writer: Any, model: ModelConfig, rope: Mapping[str, Any]) -> None:
    import gguf

    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_causal_attention(model.is_causal)
    writer.add_pooling_type(gguf.PoolingType[POOLING[model.pooling]])
    if "type" not in rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if "original" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original"])
        writer.add_rope_scaling_attn_factors(rope["magnitude"])
    if "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if rope.get("temperature") is not None:
        writer.add_attn_temperature_scale(rope["temperature"])


def _add_tokenizer(writer: Any, found: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    writer.add_tokenizer_model(found["model"])
    writer.add_tokenizer_pre(found["pre"])
    writer.add_token_list(found["tokens"])
    writer.add_token_types(found["types"])
    if "scores" in found:
        writer.add_token_scores(found["scores"])
        if found["unknown"] is not None:
            writer.add_unk_token_id(found["unknown"])
    else:
        writer.add_token_merges(found["merges"])
    before, after = found["before"], found["after"]
    for ids, named, add in (
        (before, config.get("bos_token_id"), writer.add_bos_token_id),
        (after, config.get("eos_token_id"), writer.add_eos_token_id),
    ):
        if ids or named is not None:
            add(ids[0] if ids else named)
    if config.get("pad_token_id") is not None:
        writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    writer.add_add_space_prefix(found["space"])
