import json

import pytest
import yaml
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from nemo_embed_core.config import ModelConfig, RopeScaling, UserError
from nemo_embed_core.export.folder import hf_config, model_card, write_folder

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL = ModelConfig(vocab_size=12, num_key_value_heads=2, rope_scaling=RopeScaling(factor=4.0), **SHAPE)
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
COMPLETE = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 99,
    "model_input_names": ["input_ids", "attention_mask"],
    "split_special_tokens": True,
    "pad_token": "<s>",
}


def tokenizer_files(config: dict, special: tuple[str, ...] = ("<s>", "</s>")) -> dict[str, bytes]:
    tokenizer = Tokenizer(models.WordLevel({**{t: i for i, t in enumerate(special)}, "a": 10, "b": 11}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def written(tmp_path, config: dict, special: tuple[str, ...] = ("<s>", "</s>")) -> tuple[dict, dict]:
    """(config.json, tokenizer_config.json) of an export with this tokenizer."""
    write_folder(tmp_path, MODEL, "float32", tokenizer_files(config, special), card={})
    return tuple(json.loads((tmp_path / name).read_text()) for name in ("config.json", "tokenizer_config.json"))


@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=4.0)])
def test_transformers_reads_the_same_rope_from_either_spelling(scaling):
    from transformers import LlamaConfig

    model = ModelConfig(vocab_size=12, num_key_value_heads=2, rope_scaling=scaling, rope_theta=7e5, **SHAPE)
    config = hf_config(model, "float32", IDS)
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    new = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    both, old, new = (LlamaConfig(**spelling).rope_parameters for spelling in (config, old, new))
    assert both == old == new
    assert both["rope_theta"] == 7e5
    assert both.get("factor") == (4.0 if scaling else None)


def test_config_says_bidirectional_to_every_reader():
    config = hf_config(MODEL, "bfloat16", IDS)
    assert config["is_causal"] is False  # transformers >= 5.2, vLLM, llama.cpp
    assert config["use_bidirectional_attention"] is True  # text-embeddings-inference
    assert config["pooling"] == "avg"
    assert config["architectures"] == ["LlamaModel"]
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["head_dim"] == 16


def test_sentence_transformers_files_have_the_verbose_spelling(tmp_path):
    prompt = "Instruct: find the answer\nQuery: "
    files = tokenizer_files({"bos_token": "<s>"})
    write_folder(tmp_path, MODEL, "float32", files, query_prompt=prompt, max_seq_length=300, card={})
    read = {str(f.relative_to(tmp_path)): json.loads(f.read_text()) for f in tmp_path.rglob("*.json")}
    prefix = "sentence_transformers.models."
    assert read["modules.json"] == [
        {"idx": 0, "name": "0", "path": "", "type": prefix + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": prefix + "Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": prefix + "Normalize"},
    ]
    pooling = read["1_Pooling/config.json"]
    assert pooling["word_embedding_dimension"] == 64
    assert {key for key, value in pooling.items() if value is True} == {"pooling_mode_mean_tokens", "include_prompt"}
    assert pooling.keys().isdisjoint({"pooling_mode", "embedding_dimension"})  # older versions raise on these
    assert read["sentence_bert_config.json"] == {"max_seq_length": 300, "do_lower_case": False}
    assert read["config_sentence_transformers.json"]["prompts"] == {"query": prompt, "document": ""}
    assert (tmp_path / "2_Normalize").is_dir()


def test_complete_tokenizer_files_are_copied_byte_for_byte(tmp_path):
    files = {**tokenizer_files(COMPLETE), "special_tokens_map.json": b"{}"}
    write_folder(tmp_path, MODEL, "float32", files, card={})
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


def test_only_what_is_missing_is_added_to_the_tokenizer_config(tmp_path):
    given = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "model_max_length": 99, "extra": 1}
    config, tokenizer_config = written(tmp_path, given)
    assert tokenizer_config == {
        **given,
        "tokenizer_class": "TokenizersBackend",
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True,
        "pad_token": "</s>",
    }
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 1)


@pytest.mark.parametrize(
    ("given", "special", "pad"),
    [
        ({"pad_token": "<p>", "eos_token": "</s>"}, ("<s>", "</s>", "<p>"), "<p>"),
        ({"bos_token": "<s>", "eos_token": None}, ("<s>", "</s>"), "<s>"),
        ({}, ("<x>", "<y>"), "<x>"),
    ],
)
def test_there_is_always_a_token_to_pad_with(tmp_path, given, special, pad):
    config, tokenizer_config = written(tmp_path, given, special)
    assert tokenizer_config["pad_token"] == pad
    assert config["pad_token_id"] == special.index(pad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bf16"}, "dtype='bf16'"),
        ({"tokenizer_files": {"tokenizer.model": b""}}, r"needs tokenizer.json.*tokenizer.model"),
        ({"tokenizer_files": tokenizer_files({}, special=())}, "no special token that could pad"),
        ({"tokenizer_files": tokenizer_files({"bos_token": "<q>"})}, "bos_token '<q>'"),
        ({"model": ModelConfig(vocab_size=11, num_key_value_heads=2, **SHAPE)}, "largest id is 11 .*vocab_size=11.*12"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, change, message):
    arguments = {"model": MODEL, "dtype": "float32", "tokenizer_files": tokenizer_files(COMPLETE), "card": {}, **change}
    with pytest.raises(UserError, match=message):
        write_folder(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_model_card_says_what_it_was_given_and_nothing_else():
    card = {
        "base_model": "/some/disk/base-1b",
        "parents": ["/some/disk/run-a", "run-b"],
        "datasets": [{"name": "a|b", "rows": 3}, {"name": "c", "digest": "12ab"}],
        "recipe": {"optim": {"lr": 1e-5}, "steps": 7},
        "metrics": {"held-out": {"ndcg_at_10": 0.25}},
        "commit": "abc123",
    }
    text = model_card(MODEL, "float32", "Instruct: x\nQuery: ", 512, card)
    tables = (
        "| optim.lr | 1e-05 |",
        "| steps | 7 |",
        "| a\\|b | 3 |  |",
        "| c |  | 12ab |",
        "| held-out | ndcg_at_10 | 0.25 |",
    )
    for words in (*tables, "`abc123`", "Average of: run-a, run-b"):
        assert words in text, words
    assert "/some/disk" not in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "sentence-transformers"
    assert "base_model" not in front and "license" not in front  # a folder name is no id of the hub
    compile(text.split("```python")[2].split("```")[0], "usage", "exec")

    empty = model_card(MODEL, "float32", "", 512, {})
    for heading in ("Training data", "Recipe", "Results", "Provenance", "Licence"):
        assert f"## {heading}" in text or heading == "Licence"
        assert f"## {heading}" not in empty


@pytest.mark.parametrize(
    ("base", "says_llama"),
    [("meta-llama/Llama-3.1-8B", True), ("/models/Meta-Llama-3-8B", True), ("/llama-runs/other", False), ("", False)],
)
def test_llama_licence_note_only_when_the_base_says_llama(base, says_llama):
    text = model_card(MODEL, "float32", "", 512, {"base_model": base})
    assert ("Built with Llama" in text) == says_llama
    front = yaml.safe_load(text.split("---")[1])
    assert front.get("base_model") == (base if base == "meta-llama/Llama-3.1-8B" else None)
