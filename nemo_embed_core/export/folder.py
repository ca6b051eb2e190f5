"""The files around the weights of an export: config, tokenizer, sentence-transformers files, card.

The weights themselves (model.safetensors or shards of it, names without `model.`) are streamed by
merge/stream.py; export/proof.py re-opens the whole folder and proves it. Spellings are chosen for their
readers:

- `is_causal: false` makes transformers >= 5.2 run the model bidirectionally; older ones are silently causal.
- `use_bidirectional_attention` and `pooling` are what text-embeddings-inference and vLLM look at.
- RoPE in both spellings: `rope_theta` and `rope_scaling` for transformers 4 and TEI, `rope_parameters` for 5.
- sentence-transformers files in the verbose spelling of its versions before 5.4: the later one is not read by
  TEI, llama.cpp's converter and older vLLM (which then pools the last token without a word).

The formats of one set of tensors: export/formats.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_embed_core.checkpoint.source import USAGE_KEY, Source, Usage, modules_of
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.data.tokenizer_files import export_files, json_bytes
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.card import Card, model_card
from nemo_embed_core.export.formats import FORMATS, Format
from nemo_embed_core.model.spec import ARCHITECTURES, FAMILIES, MODULES, POOLINGS, flags_of, rope_fields

DTYPES = ("float32", "bfloat16", "float16")  # as transformers and torch name them


def write_folder(
    output: Path,
    model: ModelConfig,
    dtype: str,
    tokenizer_files: Mapping[str, bytes],
    *,
    format: Format = "native",
    usage: Usage,
    card: Card,
) -> None:
    """Write config.json, tokenizer, sentence-transformers files and README.md into `output`.

    dtype: of the weights, "float32", "bfloat16" or "float16".  usage: prompts, lengths, similarity: all.
    tokenizer_files: fit the model (Tokenizer.check_fits).  UserError when they cannot be served.
    """
    assert dtype in DTYPES, dtype
    unknown = set(card) - set(Card.__annotations__)
    assert not unknown, f"model card has no place for {sorted(unknown)}"
    assert usage.query_max_length and usage.document_max_length, usage
    transformers_4 = FORMATS[format].transformers_4
    files, special_ids = export_files(
        tokenizer_files, max_length=usage.longest, transformers_4=transformers_4
    )
    files |= card.get("license_files", {})
    if (code := FORMATS[format].code) is not None:
        files[code.name] = code.read_bytes()

    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
    _write_json(output / "config.json", hf_config(model, dtype, special_ids, format))
    for name, value in sentence_transformers_files(model, usage).items():
        _write_json(output / name, value)
    # Normalize has no settings; the folder exists because modules.json names it.
    (output / "2_Normalize").mkdir(exist_ok=True)
    text = model_card(model, dtype, usage, card, format)
    (output / "README.md").write_text(text, encoding="utf-8")


def check_mergeable(source: Source) -> None:
    """UserError for vectors of any length compared by anything but cosines: an export normalises."""
    modules = modules_of(source.folder) if source.usage.similarity != "cosine" else None
    if modules is not None and "Normalize" not in modules.kinds:
        raise UserError(
            f"{source.path} compares vectors of any length by {source.usage.similarity} (modules.json has no "
            "Normalize); an export's are normalised, so its scores would be others"
        )


def hf_config(
    model: ModelConfig, dtype: str, special_ids: Mapping[str, int | None], format: Format = "native"
) -> dict[str, Any]:
    """config.json of the model; `special_ids` has bos_token_id, eos_token_id, pad_token_id."""
    model_type = FORMATS[format].model_type or model.model_type
    auto_map = FORMATS[format].auto_map
    scaling = None
    if model.rope_scaling is not None:
        scaling = rope_fields(model.rope_scaling)
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **({"auto_map": dict(auto_map)} if auto_map else {}),
        "is_causal": model.is_causal,
        "use_bidirectional_attention": not model.is_causal,
        "pooling": POOLINGS[model.pooling].config_word,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        **{key: values[0] for key, values in FAMILIES[model_type].supported.items()},
        "rms_norm_eps": model.rms_norm_eps,
        "attention_dropout": 0.0,
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


def sentence_transformers_files(model: ModelConfig, usage: Usage) -> dict[str, Any]:
    """{file: JSON} for Transformer -> the model's pooling, prompt tokens included -> Normalize."""
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (name, path) in enumerate(MODULES)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": model.hidden_size,
            **flags_of(model.pooling),
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": usage.longest, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": usage.named_prompts(),  # strings only: TEI reads a map of strings
            "default_prompt_name": None,
            "similarity_fn_name": usage.similarity,
            USAGE_KEY: usage.to_json(),  # which no version of sentence-transformers looks at
        },
    }


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_bytes(value))
