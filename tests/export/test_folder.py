import ast
import json

import pytest
from tiny import read_config
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from nemo_embed_core.checkpoint.source import USAGE_KEY, Prompts, Usage, resolve, usage_of_folder
from nemo_embed_core.config import ModelConfig, RopeScaling
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.folder import hf_config, write_folder
from nemo_embed_core.export.formats import FORMATS

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


USAGE = Usage(prompts={"a": Prompts("Instruct: x\nQuery: ")}, query_max_length=40, document_max_length=77)

REMOTE_CODE, AUTO_MAP = FORMATS["compat"].code, FORMATS["compat"].auto_map


def tokenizer_files(config: dict, special: tuple[str, ...] = ("<s>", "</s>")) -> dict[str, bytes]:
    tokenizer = Tokenizer(models.WordLevel({**{t: i for i, t in enumerate(special)}, "a": 10, "b": 11}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def written(tmp_path, config: dict, special: tuple[str, ...] = ("<s>", "</s>")) -> tuple[dict, dict]:
    """(config.json, tokenizer_config.json) of an export with this tokenizer."""
    write_folder(tmp_path, MODEL, "float32", tokenizer_files(config, special), usage=USAGE, card={})
    return tuple(
        json.loads((tmp_path / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )


@pytest.mark.parametrize("format", ["native", "compat"])
@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=4.0)])
def test_transformers_reads_the_same_rope_from_either_spelling(scaling, format):
    from transformers import LlamaConfig

    model = ModelConfig(vocab_size=12, num_key_value_heads=2, rope_scaling=scaling, rope_theta=7e5, **SHAPE)
    config = hf_config(model, "float32", IDS, format)
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    new = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    both, old, new = (LlamaConfig(**spelling).rope_parameters for spelling in (config, old, new))
    assert both == old == new
    assert both["rope_theta"] == 7e5
    assert both.get("factor") == (4.0 if scaling else None)


@pytest.mark.parametrize("format", ["native", "compat"])
@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=4.0)])
@pytest.mark.parametrize("head_dim", [16, 48])  # 16 is hidden_size / num_attention_heads
def test_our_reader_gets_back_the_model_that_was_exported(tmp_path, format, scaling, head_dim):
    shape = {
        **SHAPE,
        "head_dim": head_dim,
        "rope_scaling": scaling,
        "rope_theta": 7e5,
        "max_position_embeddings": 4096,
    }
    model = ModelConfig(vocab_size=12, num_key_value_heads=2, rms_norm_eps=1e-6, **shape)
    config = hf_config(model, "float32", IDS, format)
    assert config["head_dim"] == head_dim
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 7e5
    # transformers 4 needs null, not a "default" scaling; every key of llama3's scaling stands in both
    # spellings.
    assert (config["rope_scaling"] is None) == (scaling is None)
    assert (config["rope_scaling"] or {"rope_type": "default"}).items() <= config["rope_parameters"].items()
    for lost in ((), ("rope_parameters",), ("rope_theta", "rope_scaling")):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in lost}))
        assert read_config(tmp_path) == model, lost


def test_compat_differs_from_native_in_what_names_the_code_alone(tmp_path):
    files = tokenizer_files({**COMPLETE, "padding_side": "left", "model_max_length": 99})
    for format in ("native", "compat"):
        write_folder(tmp_path / format, MODEL, "bfloat16", files, format=format, usage=USAGE, card={})
    native, compat = (
        {str(f.relative_to(tmp_path / name)): f.read_bytes() for f in (tmp_path / name).rglob("*.*")}
        for name in ("native", "compat")
    )
    assert compat.pop("modeling_llama_bidirec.py") == REMOTE_CODE.read_bytes()
    assert {name for name in native | compat if native.get(name) != compat.get(name)} == {
        "config.json",
        "README.md",
    }
    a, b = (json.loads(folder["config.json"]) for folder in (native, compat))
    changed = {key: b[key] for key in b if a.get(key) != b[key]}
    assert changed == {
        "model_type": "llama_bidirec",
        "architectures": ["LlamaBidirectionalModel"],
        "auto_map": AUTO_MAP,
    }
    assert a.keys() == b.keys() - {"auto_map"}
    # What is the same is right in both.
    # Whatever the tokenizer's own.
    assert json.loads(compat["tokenizer_config.json"])["padding_side"] == "right"
    assert json.loads(compat["sentence_bert_config.json"])["max_seq_length"] == 77
    prompts = json.loads(compat["config_sentence_transformers.json"])["prompts"]
    assert prompts == {"query": "Instruct: x\nQuery: ", "document": ""}
    assert b["is_causal"] is False and b["use_cache"] is False and b["pad_token_id"] == 0


def test_remote_code_is_ours_short_and_self_contained():
    """It runs on other people's machines: nothing but torch and transformers, and the classes that auto_map
    names."""
    tree = ast.parse(REMOTE_CODE.read_text())
    imports = {node.module if isinstance(node, ast.ImportFrom)
               else node.names[0].name for node in ast.walk(tree)
               if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    llama = "transformers.models.llama"
    assert imports == {"torch", f"{llama}.configuration_llama", f"{llama}.modeling_llama"}
    classes = {f"{REMOTE_CODE.stem}.{node.name}" for node in tree.body if isinstance(node, ast.ClassDef)}
    assert classes == set(AUTO_MAP.values())
    assert REMOTE_CODE.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert len(REMOTE_CODE.read_text().splitlines()) < 60


@pytest.mark.parametrize(
    ("given", "native", "compat"),
    [
        ({}, {"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (
            {"tokenizer_class": "TokenizersBackend"},  # as transformers 5 saves it; 4 has no such class
            {"tokenizer_class": "TokenizersBackend"},
            {"tokenizer_class": "PreTrainedTokenizerFast"},
        ),
        ({"tokenizer_class": "LlamaTokenizerFast"}, *[{"tokenizer_class": "PreTrainedTokenizerFast"}] * 2),
        # The tokenizer's own code is not passed on.
        ({"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}, *[{"auto_map": None}] * 2),
    ],
)
def test_each_format_spells_the_tokenizer_for_its_readers(tmp_path, given, native, compat):
    for format, wanted in (("native", native), ("compat", compat)):
        files = tokenizer_files({**COMPLETE, "tokenizer_class": None, **given})
        write_folder(tmp_path / format, MODEL, "float32", files, format=format, usage=USAGE, card={})
        config = json.loads((tmp_path / format / "tokenizer_config.json").read_text())
        assert {key: config.get(key) for key in wanted} == wanted


def test_config_says_bidirectional_to_every_reader():
    config = hf_config(MODEL, "bfloat16", IDS)
    assert config["is_causal"] is False  # transformers >= 5.2, vLLM, llama.cpp
    assert config["use_bidirectional_attention"] is True  # text-embeddings-inference
    assert config["pooling"] == "avg"
    assert config["architectures"] == ["LlamaModel"]
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["head_dim"] == 16


def test_sentence_transformers_files_have_the_verbose_spelling(tmp_path):
    usage = Usage(
        prompts={"nq": Prompts("q: ", "d: "), "sts": Prompts("s: ")},
        query_max_length=300,
        document_max_length=40,
    )
    write_folder(tmp_path, MODEL, "float32", tokenizer_files({"bos_token": "<s>"}), usage=usage, card={})
    read = {str(f.relative_to(tmp_path)): json.loads(f.read_text()) for f in tmp_path.rglob("*.json")}
    prefix = "sentence_transformers.models."
    assert read["modules.json"] == [
        {"idx": 0, "name": "0", "path": "", "type": prefix + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": prefix + "Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": prefix + "Normalize"},
    ]
    pooling = read["1_Pooling/config.json"]
    assert pooling["word_embedding_dimension"] == 64
    assert {key for key, value in pooling.items() if value is True} == {
        "pooling_mode_mean_tokens",
        "include_prompt",
    }
    assert pooling.keys().isdisjoint({"pooling_mode", "embedding_dimension"})  # older versions raise on these
    assert read["sentence_bert_config.json"] == {"max_seq_length": 300, "do_lower_case": False}
    settings = read["config_sentence_transformers.json"]
    prompts = {
        "query": "q: ",
        "document": "d: ",
        "nq": "q: ",
        "nq-document": "d: ",
        "sts": "s: ",
        "sts-document": "",
    }
    assert settings["prompts"] == prompts and settings["similarity_fn_name"] == "cosine"
    assert settings[USAGE_KEY]["document_max_length"] == 40
    assert usage_of_folder(tmp_path) == usage
    assert (tmp_path / "2_Normalize").is_dir()


def test_one_task_has_no_prompt_beside_the_default(tmp_path):
    write_folder(tmp_path, MODEL, "float32", tokenizer_files({"bos_token": "<s>"}), usage=USAGE, card={})
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "Instruct: x\nQuery: ", "document": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {"query": "Instruct: x\nQuery: ", "document": "d"}}, "'document' is \"d\" in prompts"),
        ({"prompts": {"document": ""}}, "'query' is null in prompts"),
        ({"prompts": {"query": "Instruct: x\nQuery: ", "document": "", "b": "e"}}, "'b' is \"e\" in prompts"),
        ({"similarity_fn_name": "dot"}, 'is "dot" and similarity by nemo_embed_core "cosine"'),
    ],
)
def test_a_folder_whose_prompts_were_edited_afterwards_is_refused_by_everybody(tmp_path, change, message):
    write_folder(tmp_path, MODEL, "float32", tokenizer_files({"bos_token": "<s>"}), usage=USAGE, card={})
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        resolve(tmp_path)


def test_tokenizer_config_is_written_anew_and_says_what_tokenizer_json_does(tmp_path):
    given = {
        "bos_token": {"content": "<s>", "lstrip": True},
        "eos_token": "</s>",
        "additional_special_tokens": ["<q>"],
        "added_tokens_decoder": {"99": {"content": "<r>", "special": True}},
        "chat_template": "x",
        "model_max_length": 99,
        **dict.fromkeys(
            ("add_bos_token", "add_eos_token", "legacy", "do_lower_case", "add_prefix_space"), True
        ),
        **dict.fromkeys(("truncation_side", "padding_side"), "left"),
        "fast_tokenizer_files": ["other.json"],
        "split_special_tokens": False,
    }
    config, tokenizer_config = written(tmp_path, given)
    assert tokenizer_config == {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "model_max_length": 77,
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 1)


def test_nothing_but_two_files_of_the_tokenizer_is_written_and_tokenizer_json_as_it_was(tmp_path):
    files = tokenizer_files(COMPLETE)
    beside = {"tokenizer.model": b"m", "special_tokens_map.json": b"{}", "added_tokens.json": b"{}"}
    write_folder(tmp_path, MODEL, "float32", {**files, **beside}, usage=USAGE, card={})
    assert (tmp_path / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    assert not [name for name in beside if (tmp_path / name).exists()]


def test_truncation_and_padding_inside_tokenizer_json_are_taken_out(tmp_path):
    files = tokenizer_files({"pad_token": None})
    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    tokenizer.enable_truncation(3, direction="left")
    tokenizer.enable_padding(direction="left", pad_id=1, pad_token="</s>", length=9)
    write_folder(
        tmp_path,
        MODEL,
        "float32",
        {**files, "tokenizer.json": tokenizer.to_str().encode()},
        usage=USAGE,
        card={},
    )
    again = json.loads((tmp_path / "tokenizer.json").read_text())
    assert again == json.loads(files["tokenizer.json"])
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "</s>"


@pytest.mark.parametrize("prefix", [True, False])
def test_a_prefix_space_is_stated_because_transformers_4_would_take_it_away(tmp_path, prefix):
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "a": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": b'{"bos_token": "<s>"}'}
    write_folder(tmp_path, MODEL, "float32", files, usage=USAGE, card={})
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_prefix_space"] is prefix


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
        ({"tokenizer_files": {"tokenizer.model": b""}}, r"needs tokenizer.json.*tokenizer.model"),
        ({"tokenizer_files": tokenizer_files({}, special=())}, "no special token that could pad"),
        ({"tokenizer_files": tokenizer_files({"bos_token": "<q>"})}, "bos_token '<q>'"),
    ],
)
def test_a_tokenizer_that_cannot_be_served_is_refused(tmp_path, change, message):
    arguments = {
        "model": MODEL,
        "dtype": "float32",
        "tokenizer_files": tokenizer_files(COMPLETE),
        "usage": USAGE,
        "card": {},
    }
    arguments |= change
    with pytest.raises(UserError, match=message):
        write_folder(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
