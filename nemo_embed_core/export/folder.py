"""Everything around the weights of a Hugging Face folder: config, tokenizer, sentence-transformers files, model card.

The weights themselves (model.safetensors or shards of it, names without `model.`) are streamed by checkpoint/merge.py;
export/verify.py re-opens the whole folder and proves it. Spellings are chosen for their readers:

- `is_causal: false` makes transformers >= 5.2 run LlamaModel bidirectionally; older ones ignore it and are silently causal.
- `use_bidirectional_attention` and `pooling` are what text-embeddings-inference and vLLM look at.
- RoPE in both spellings: transformers 4 and TEI know `rope_theta` + `rope_scaling`, transformers 5 `rope_parameters`.
- sentence-transformers files in the verbose spelling of its versions before 5.4: what 5.4 and later save themselves is not
  understood by TEI, llama.cpp's converter and older vLLM (which then pools the last token without a word).

Two formats with the same tensors: "native" is a plain LlamaModel and needs no code; "compat" is a `llama_bidirec` with
remote/modeling_llama_bidirec.py beside the weights, for transformers that do not know `is_causal` in config.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_embed_core.config import ModelConfig, UserError
from nemo_embed_core.export.card import REMOTE_CODE, Card, Format, model_card

DTYPES = ("float32", "bfloat16", "float16")  # as transformers and torch name them

ARCHITECTURES = {"llama": "LlamaModel", "llama_bidirec": "LlamaBidirectionalModel"}  # by model_type
AUTO_MAP = {
    "AutoConfig": "modeling_llama_bidirec.LlamaBidirectionalConfig",
    "AutoModel": "modeling_llama_bidirec.LlamaBidirectionalModel",
}


def write_folder(
    output: Path,
    model: ModelConfig,
    dtype: str,
    tokenizer_files: Mapping[str, bytes],
    *,
    format: Format = "native",
    query_prompt: str = "",
    max_seq_length: int = 512,
    card: Card,
) -> None:
    """Write config.json, the tokenizer, the sentence-transformers files and README.md into `output` (made if missing).

    dtype: of the weights, "float32", "bfloat16" or "float16".  format: "native" for transformers >= 5.2, "compat" adds the
    code that 4.51 and later need.  query_prompt: put before queries, verbatim; documents are raw.  max_seq_length: tokens,
    special tokens included.  UserError when the tokenizer does not fit the model.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} of an export must be one of {', '.join(DTYPES)}")
    unknown = set(card) - set(Card.__annotations__)
    assert not unknown, f"model card has no place for {sorted(unknown)}"
    files, special_ids = _tokenizer(tokenizer_files, model, format)
    files |= card.get("license_files", {})
    if format == "compat":
        files[REMOTE_CODE.name] = REMOTE_CODE.read_bytes()

    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
    _write_json(output / "config.json", hf_config(model, dtype, special_ids, format))
    for name, value in sentence_transformers_files(model.hidden_size, query_prompt, max_seq_length).items():
        _write_json(output / name, value)
    # Normalize has no settings; the folder exists because modules.json names it.
    (output / "2_Normalize").mkdir(exist_ok=True)
    text = model_card(model, dtype, query_prompt, max_seq_length, card, format)
    (output / "README.md").write_text(text, encoding="utf-8")


def hf_config(
    model: ModelConfig, dtype: str, special_ids: Mapping[str, int | None], format: Format = "native"
) -> dict[str, Any]:
    """config.json of a bidirectional Llama; `special_ids` has bos_token_id, eos_token_id, pad_token_id."""
    model_type = {"native": "llama", "compat": "llama_bidirec"}[format]
    scaling = None
    if model.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **dataclasses.asdict(model.rope_scaling)}
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **({"auto_map": AUTO_MAP} if format == "compat" else {}),
        "is_causal": False,
        "use_bidirectional_attention": True,
        "pooling": "avg",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,  # there is no output head to tie
        "use_cache": False,
        "initializer_range": model.initializer_range,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_theta},
        **special_ids,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def sentence_transformers_files(hidden_size: int, query_prompt: str, max_seq_length: int) -> dict[str, Any]:
    """{file: JSON} for Transformer -> mean pooling -> Normalize, prompt tokens pooled too (`include_prompt`)."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": False,
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": query_prompt, "document": ""},  # strings only: TEI reads a map of strings
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }


def _tokenizer(
    given: Mapping[str, bytes], model: ModelConfig, format: Format
) -> tuple[dict[str, bytes], dict[str, int | None]]:
    """The files to write (as given, tokenizer_config.json completed where it lacks something) and config.json's ids."""
    from tokenizers import Tokenizer

    if "tokenizer.json" not in given:
        raise UserError(f"an export needs tokenizer.json; the tokenizer has only {sorted(given) or 'no files'}")
    tokenizer = Tokenizer.from_buffer(given["tokenizer.json"])
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= model.vocab_size:
        raise UserError(
            f"the tokenizer's largest id is {largest} but model.vocab_size={model.vocab_size}: "
            f"use the tokenizer that the model was trained with (vocab_size must be at least {largest + 1})"
        )
    config = json.loads(given.get("tokenizer_config.json", b"{}"))
    added: dict[str, Any] = {}
    is_changed = config.pop("auto_map", None) is not None  # tokenizer.json is complete: no tokenizer code is passed on
    if format == "compat":
        # The spelling of transformers 4, which 5 reads too; 4 stops at the names that 5 writes.
        if config.get("tokenizer_class", "TokenizersBackend") in ("TokenizersBackend", None):
            added["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            added["additional_special_tokens"] = config.pop("extra_special_tokens")
    elif not config.get("tokenizer_class"):
        # Transformers 4 refuses this class, which is right: it would run the model causally.
        added["tokenizer_class"] = "TokenizersBackend"
    if not config.get("model_max_length"):
        added["model_max_length"] = model.max_position_embeddings
    if not config.get("model_input_names"):
        # The library's default has token_type_ids, which LlamaModel.forward does not take.
        added["model_input_names"] = ["input_ids", "attention_mask"]
    if config.get("split_special_tokens") is not True:
        # As in training: "<|end_of_text|>" inside a text is ordinary text, never the special token.
        added["split_special_tokens"] = True
    names = {key: _content(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    if names["pad_token"] is None:
        # Padding is masked in attention and pooling, so any token serves; sentence-transformers cannot batch without one.
        special = [t.content for _, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special]
        choices = [names["eos_token"], names["bos_token"], _content(config.get("unk_token")), *special]
        pad = next((token for token in choices if token is not None), None)
        if pad is None:
            raise UserError(
                "the tokenizer has no special token that could pad a batch; name one as pad_token in tokenizer_config.json"
            )
        names["pad_token"] = added["pad_token"] = pad
    special_ids = {}
    for key, token in names.items():
        special_ids[f"{key}_id"] = None if token is None else tokenizer.token_to_id(token)
        if token is not None and special_ids[f"{key}_id"] is None:
            raise UserError(f"tokenizer_config.json names {key} {token!r}, which tokenizer.json does not have")
    files = dict(given)
    if added or is_changed:
        files["tokenizer_config.json"] = _json({**config, **added})
    return files, special_ids


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json: a string, or {"content": ...} in older files."""
    return token["content"] if isinstance(token, dict) else token or None


# ------------------------------------------------------------------------------------------ files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_json(value))
