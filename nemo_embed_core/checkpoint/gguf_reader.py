"""A Llama in a GGUF file of llama.cpp, de-quantised, as a Hugging Face folder that init_from takes.

    read_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), Path("models/smollm2"), layers=2)

llama.cpp keeps the rows of a head of q and k as (pair, half), for rotations of neighbours; Hugging Face's
rotate_half wants (half, pair). The de-quantisation is the gguf library's (pip install gguf).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import new_folder
from nemo_embed_core.files.safetensors import SafetensorsWriter

TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD = "output.weight"  # of an untied head, which an encoder has not
CONTROL = 3  # token type of llama.cpp: <|im_start|> and the like


def read_gguf(file: Path, output: Path, layers: int = 0) -> None:
    """output/: model.safetensors (bf16), config.json, tokenizer.json; the first `layers` blocks, 0: all.

    UserError for another family, another tokenizer, a tensor that a Llama has not or lacks.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise UserError("reading GGUF needs the gguf library: pip install 'nemo_embed_core[demo]'") from None
    try:
        reader = GGUFReader(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no readable GGUF file: {error}") from None
    facts = _Facts(file, reader.fields)
    if (family := facts["general.architecture"]) not in ("llama", "llama-embed"):
        raise UserError(f"{file} holds a {family}; only llama is read")
    total = facts["llama.block_count"]
    if not 0 <= layers <= total:
        raise UserError(f"layers={layers}: {file.name} has {total}; 0 takes all")
    state = _weights(file, reader.tensors, facts, layers or total)
    config = _config(facts, state, layers or total)
    tokenizer, settings = _tokenizer(facts, len(state["model.embed_tokens.weight"]))
    with new_folder(output) as folder:
        # Not the library's save_file, whose file no other user may read, as that of a container.
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
            for tensor in state.values():
                writer.write(tensor)
            writer.close()
        for name, value in (("config.json", config), ("tokenizer_config.json", settings)):
            (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        tokenizer.save(str(folder / "tokenizer.json"))


class _Facts:
    """The file's metadata by key."""

    def __init__(self, file: Path, fields: Any):
        self.file, self.fields = file, fields

    def __getitem__(self, key: str) -> Any:
        key = self._key(key)
        if key not in self.fields:
            raise UserError(f"{self.file} does not say its {key}")
        return self.fields[key].contents()

    def _key(self, key: str) -> str:
        """llama-embed, a Llama without a causal mask, has its own keys of its own name."""
        own = key.replace("llama.", "llama-embed.", 1)
        return own if own in self.fields else key

    def get(self, key: str, default: Any) -> Any:
        key = self._key(key)
        return self.fields[key].contents() if key in self.fields else default


def _weights(file: Path, tensors: Any, facts: _Facts, layers: int) -> dict[str, Any]:
    import torch
    from gguf import dequantize

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    state = {}
    for tensor in tensors:
        part = ""
        if tensor.name == HEAD:
            continue
        name = TENSORS.get(tensor.name)
        if tensor.name.startswith("blk."):
            _, layer, part, _ = tensor.name.split(".")
            if int(layer) >= layers:
                continue
            name = f"model.layers.{layer}.{BLOCK[part]}.weight" if part in BLOCK else None
        if name is None or not tensor.name.endswith(".weight"):
            raise UserError(f"{file} has {tensor.name}, which is no tensor of a Llama that is read")
        weight = dequantize(tensor.data, tensor.tensor_type)
        if part in heads:
            weight = unpermute(weight, heads[part])
        # A copy: the file is mapped.
        state[name] = torch.from_numpy(np.array(weight)).to(torch.bfloat16)
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in BLOCK.values()]
    if missing := [name for name in (*TENSORS.values(), *names) if name not in state]:
        raise UserError(f"{file} has no {missing[0]}")
    return state


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """[H * A, D], rows (pair, half) of each head -> rows (half, pair)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(facts: _Facts, state: dict[str, Any], layers: int) -> dict[str, Any]:
    width, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    epsilon = facts["llama.attention.layer_norm_rms_epsilon"]
    if facts.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(f"{facts.file} scales its rotary embedding, which is not read")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts.get("llama.attention.key_length", width // heads),
        "vocab_size": len(state["model.embed_tokens.weight"]),
        "rms_norm_eps": float(f"{epsilon:.7g}"),  # of fp32
        "rope_theta": facts.get("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": facts["llama.context_length"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
    }


def _tokenizer(facts: _Facts, vocab_size: int) -> tuple[Any, dict[str, Any]]:
    """The byte-level BPE of the file with its own merges; digits stand alone, as SmolLM's do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (facts["tokenizer.ggml.model"], facts.get("tokenizer.ggml.pre", ""))
    if kind != ("gpt2", "smollm"):
        raise UserError(f"{facts.file} has a tokenizer {kind[0]}, {kind[1]}; only gpt2, smollm is read")
    tokens = facts["tokenizer.ggml.tokens"]
    if len(tokens) != vocab_size or len(set(tokens)) < vocab_size:
        unequal = f"{len(tokens)} tokens, {len(set(tokens))} of them different"
        raise UserError(f"{facts.file}: {unequal}, for embeddings of {vocab_size}")
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    types = facts["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if facts.get("tokenizer.ggml.add_bos_token", False):
        raise UserError(f"{facts.file} wants a BOS in front, which is not written")
    ids = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    names = {
        f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in ids.items()
        if f"tokenizer.ggml.{key}_token_id" in facts.fields
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    return tokenizer, {**settings, "model_max_length": facts["llama.context_length"]}
