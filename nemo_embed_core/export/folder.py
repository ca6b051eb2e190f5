"""Everything around the weights of a Hugging Face folder: config, tokenizer, sentence-transformers files, model card.

The weights themselves (model.safetensors or shards of it, names without `model.`) are streamed by checkpoint/merge.py;
export/verify.py re-opens the whole folder and proves it. Spellings are chosen for their readers:

- `is_causal: false` makes transformers >= 5.2 run LlamaModel bidirectionally; older ones ignore it and are silently causal.
- `use_bidirectional_attention` and `pooling` are what text-embeddings-inference and vLLM look at.
- RoPE in both spellings: transformers 4 and TEI know `rope_theta` + `rope_scaling`, transformers 5 `rope_parameters`.
- sentence-transformers files in the verbose spelling of its versions before 5.4: what 5.4 and later save themselves is not
  understood by TEI, llama.cpp's converter and older vLLM (which then pools the last token without a word).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from nemo_embed_core.config import ModelConfig, UserError

DTYPES = ("float32", "bfloat16", "float16")  # as transformers and torch name them


class Card(TypedDict, total=False):
    """What the model card says; whatever is not given is not written."""

    title: str
    base_model: str  # hub id or folder of the weights that training started from
    parents: list[str]  # the run that these weights are from, or the runs and folders that were averaged
    license: str  # an identifier of the Hugging Face hub, e.g. "apache-2.0"
    datasets: list[dict[str, Any]]  # one row of facts per source, e.g. {"name", "rows", "digest"}
    recipe: dict[str, Any]  # options of the run, nested or flat
    metrics: dict[str, dict[str, float]]  # {evaluation: {metric: value}}
    command: str
    commit: str


def write_folder(
    output: Path,
    model: ModelConfig,
    dtype: str,
    tokenizer_files: Mapping[str, bytes],
    *,
    query_prompt: str = "",
    max_seq_length: int = 512,
    card: Card,
) -> None:
    """Write config.json, the tokenizer, the sentence-transformers files and README.md into `output` (made if missing).

    dtype: of the weights, "float32", "bfloat16" or "float16".  query_prompt: put before queries, verbatim; documents are
    raw.  max_seq_length: tokens, special tokens included.  UserError when the tokenizer does not fit the model.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} of an export must be one of {', '.join(DTYPES)}")
    unknown = set(card) - set(Card.__annotations__)
    assert not unknown, f"model card has no place for {sorted(unknown)}"
    files, special_ids = _tokenizer(tokenizer_files, model)

    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
    _write_json(output / "config.json", hf_config(model, dtype, special_ids))
    for name, value in sentence_transformers_files(model.hidden_size, query_prompt, max_seq_length).items():
        _write_json(output / name, value)
    # Normalize has no settings; the folder exists because modules.json names it.
    (output / "2_Normalize").mkdir(exist_ok=True)
    (output / "README.md").write_text(model_card(model, dtype, query_prompt, max_seq_length, card), encoding="utf-8")


def hf_config(model: ModelConfig, dtype: str, special_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """config.json of a bidirectional `LlamaModel`; `special_ids` has bos_token_id, eos_token_id, pad_token_id."""
    scaling = None
    if model.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **dataclasses.asdict(model.rope_scaling)}
    return {
        "architectures": ["LlamaModel"],
        "model_type": "llama",
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


def _tokenizer(given: Mapping[str, bytes], model: ModelConfig) -> tuple[dict[str, bytes], dict[str, int | None]]:
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
    # Transformers 4 refuses this class, which is right: it would run the model causally.
    if not config.get("tokenizer_class"):
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
    if added:
        files["tokenizer_config.json"] = _json({**config, **added})
    return files, special_ids


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json: a string, or {"content": ...} in older files."""
    return token["content"] if isinstance(token, dict) else token or None


# ------------------------------------------------------------------------------------------ model card


def model_card(model: ModelConfig, dtype: str, query_prompt: str, max_seq_length: int, card: Card) -> str:
    """README.md: what is known, in the hub's front matter and in words. No figure that was not handed in."""
    import yaml

    base = card.get("base_model", "")
    title = card.get("title") or "Bidirectional Llama text embedding model"
    parents = [Path(parent).name for parent in card.get("parents", [])]
    is_hub_id = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()
    front: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity"],
    }
    if "license" in card:
        front["license"] = card["license"]
    if is_hub_id:
        front["base_model"] = base

    shape = f"{model.num_hidden_layers} layers, hidden size {model.hidden_size}, {model.num_attention_heads} query and "
    shape += f"{model.num_key_value_heads} key/value heads, vocabulary {model.vocab_size}, {dtype}"
    query = f"`{json.dumps(query_prompt, ensure_ascii=False)}` (JSON spelling)" if query_prompt else "none"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {title}",
        "",
        "Text embeddings from a Llama without its causal mask: mean of the last hidden states over all tokens (special",
        "tokens and prompt included), then L2 normalisation. Scores are cosines. Trained with nemo_embed_core.",
        "",
        f"- Shape: {shape}",
        f"- Longest text: {max_seq_length} tokens; longer ones are cut",
        f"- Prompt before queries: {query}; before documents: none",
        *([f"- Base model: {base if is_hub_id else Path(base).name}"] if base else []),
        *([f"- {'Average of' if len(parents) > 1 else 'Weights of'}: {', '.join(parents)}"] if parents else []),
        "",
        "## Usage",
        "",
        "It needs transformers >= 5.2: older versions ignore `is_causal: false` in config.json, run the model with a causal",
        "mask and return other vectors without an error.",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("path/to/this/folder")',
        'queries = model.encode_query(["how do plants turn light into sugar?"])',
        'documents = model.encode_document(["Photosynthesis stores the energy of light in glucose."])',
        "print(model.similarity(queries, documents))",
        "```",
        "",
        "With transformers alone:",
        "",
        "```python",
        "import torch",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        'model = AutoModel.from_pretrained("path/to/this/folder").eval()',
        f"prompt = {query_prompt!r}  # before queries only",
        'texts = [prompt + "how do plants turn light into sugar?"]',
        f'batch = tokenizer(texts, padding=True, truncation=True, max_length={max_seq_length}, return_tensors="pt")',
        "with torch.no_grad():",
        "    hidden = model(**batch).last_hidden_state.float()",
        'mask = batch["attention_mask"][..., None]',
        "embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)",
        "```",
    ]
    if card.get("datasets"):
        columns = list(dict.fromkeys(key for row in card["datasets"] for key in row))
        rows = [[row.get(column, "") for column in columns] for row in card["datasets"]]
        lines += ["", "## Training data", "", *_table(columns, rows)]
    if card.get("recipe"):
        lines += ["", "## Recipe", "", *_table(["option", "value"], [[k, v] for k, v in _flat(card["recipe"])])]
    if card.get("metrics"):
        rows = [[name, metric, value] for name, values in card["metrics"].items() for metric, value in values.items()]
        lines += ["", "## Results", "", *_table(["evaluation", "metric", "value"], rows)]
    facts = {"command": card.get("command"), "commit": card.get("commit")}
    if any(facts.values()):
        lines += ["", "## Provenance", ""]
        lines += [f"- {name}: `{fact}`" for name, fact in facts.items() if fact]
    if "llama" in Path(base).name.lower():
        lines += [
            "",
            "## Licence of the base model",
            "",
            f"The base model, {Path(base).name}, says Llama. Weights derived from Meta's Llama models stay under the licence of",
            "their version. Since Llama 3 it asks whoever distributes a derived model to pass on a copy of that licence, to show",
            '"Built with Llama" prominently, and to begin the name of the derived model with "Llama". Read the licence that came',
            "with the base model before you publish this folder.",
        ]
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", "\\n") for cell in row] for row in [header, *rows]]
    body = ["| " + " | ".join(row) + " |" for row in cells]
    return [body[0], "|" + " --- |" * len(header), *body[1:]]


def _flat(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """{"optim": {"lr": 1}} -> [("optim.lr", 1)]"""
    flat: list[tuple[str, Any]] = []
    for key, value in options.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return flat


# ------------------------------------------------------------------------------------------ files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_json(value))
