"""Each fault is planted into a copy of a good folder; the two faults of behaviour need a real reload, the rest must not."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nemo_embed_core.config import ModelConfig, RopeScaling, UserError
from nemo_embed_core.embedder import Embedder
from nemo_embed_core.export import verify
from nemo_embed_core.export.folder import hf_config, write_folder
from nemo_embed_core.export.verify import TEXTS, compare_vectors, expected_tensors, verify_folder

MODEL = ModelConfig(
    vocab_size=330,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not hidden_size / num_attention_heads
    max_position_embeddings=2048,
    rope_scaling=RopeScaling(original_max_position_embeddings=128),
)


def tokenizer_files() -> dict[str, bytes]:
    """A byte-level BPE of 330 entries that puts BOS before every text, in the manner of Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", pair=f"{special[0]} $A $B", special_tokens=[(special[0], 0)]
    )
    config = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def random_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_tensors(hf_config(MODEL, "float32", {}))
    scaled = {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    return {name: (1 + 0.1 * w if w.dim() == 1 else w).to(dtype) for name, w in scaled.items()}


def write(folder, dtype: str = "float32"):
    write_folder(folder, MODEL, dtype, tokenizer_files(), query_prompt="Instruct: x\nQuery: ", card={})
    save_file(random_weights(getattr(torch, dtype)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("export") / "good")


@pytest.fixture
def folder(good, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "folder")


@pytest.fixture
def no_reload(monkeypatch):
    """Faults of the files must be found before ten seconds of imports."""

    def reached(*_):
        raise AssertionError("the files passed")

    monkeypatch.setattr(verify, "_reload", reached)


def edit(file, **changes):
    """Set keys of a JSON object; a value of ... deletes the key."""
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_transformers_has_exactly_the_expected_tensors():
    from transformers import LlamaConfig, LlamaModel

    config = hf_config(MODEL, "float32", {})
    with torch.device("meta"):
        theirs = LlamaModel(LlamaConfig(**config)).state_dict()
    assert {name: tuple(weight.shape) for name, weight in theirs.items()} == expected_tensors(config)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_good_folder_gives_our_embeddings_everywhere(good, tmp_path, dtype):
    path = good if dtype == "float32" else write(tmp_path / "bf16", dtype)
    embedder = Embedder.load(str(path), "cpu", {"float32": "fp32", "bfloat16": "bf16"}[dtype])
    report = verify_folder(path, embedder.encode)
    assert report["tensors"] == 20
    assert report["parameters"] == sum(w.numel() for w in random_weights(torch.float32).values())
    assert report["first_state_change"] > 1e-3
    assert len(report["max_abs_diff"]) == 3
    assert all(difference <= report["tolerance"] for difference in report["max_abs_diff"].values())
    assert embedder.tokenizer.num_truncated == 1  # the long text was cut on all three sides


def test_a_causal_folder_is_caught_by_its_hidden_states(folder):
    edit(folder / "config.json", is_causal=...)
    with pytest.raises(UserError, match=r"runs with a causal mask.*is_causal: false \(found: \"nothing\"\)"):
        verify_folder(folder)


def test_a_folder_that_does_not_load_is_reported_with_the_last_line_of_the_other_process(folder, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'ValueError: unknown tokenizer' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(UserError, match=r"does not load .*exit code 1\): ValueError: unknown tokenizer"):
        verify_folder(folder)


WEIGHT = "layers.1.mlp.up_proj.weight"


def test_nan_and_infinity_are_found_with_their_row(folder, no_reload):
    for value in (math.nan, math.inf, -math.inf):
        edit_weights(folder, lambda weights: weights[WEIGHT][37, 5].fill_(value))  # noqa: B023
        with pytest.raises(UserError, match=rf"{WEIGHT} has 1 values that are NaN or infinite .*first in row 37"):
            verify_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(WEIGHT), rf"lacks 1 tensors, the first of them {WEIGHT} \(19 found, 20 implied"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(2, 2)}), "should not have 1 tensors, .* lm_head.weight"),
        (lambda w: w.update({WEIGHT: torch.zeros(48, 64)}), r"has shape \(48, 64\); config.json implies \(64, 48\)"),
        (lambda w: w.update({WEIGHT: w[WEIGHT].half()}), "up_proj.weight is float16; config.json says float32"),
        (lambda w: w.update({f"model.{WEIGHT}": w.pop(WEIGHT)}), f"lacks 1 tensors, the first of them {WEIGHT}"),
    ],
)
def test_tensors_must_be_exactly_those_of_the_config(folder, no_reload, change, message):
    edit_weights(folder, change)
    with pytest.raises(UserError, match=message):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "pooling_mode_"),
        ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}, "pooling_mode_lasttoken is true and must be false"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": ...}, "mean_tokens is null and must be true"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 64}, "is 64 and must be 48"),
        ("config.json", {"vocab_size": 331}, r"shape \(330, 48\); config.json implies \(331, 48\)"),
        ("config.json", {"num_hidden_layers": 3}, r"lacks 9 tensors, .*layers.2.*\(20 found, 29 implied"),
        ("config.json", {"head_dim": ...}, r"k_proj.weight has shape \(32, 48\); config.json implies \(24, 48\)"),
        ("config.json", {"rope_theta": 1e4}, "rope_parameters, against rope_theta"),
        ("config.json", {"rope_scaling": None}, "rope_parameters, against rope_theta"),
        ("config.json", {"dtype": "float64"}, "dtype"),
        ("config.json", {"torch_dtype": "bfloat16"}, "torch_dtype"),
        ("config.json", {"model_type": "llama_bidirec"}, 'model_type is "llama_bidirec" and must be "llama"'),
        ("config.json", {"attention_bias": True}, "attention_bias is true and must be false"),
        ("config.json", {"hidden_size": 48.0}, "hidden_size is 48.0 and must be a positive integer"),
        ("sentence_bert_config.json", {"max_seq_length": ...}, "max_seq_length is null"),
        ("config_sentence_transformers.json", {"prompts": {"query": None}}, 'prompts is {"query": null}'),
    ],
)
def test_a_wrong_setting_is_named(folder, no_reload, file, change, message):
    edit(folder / file, **change)
    with pytest.raises(UserError, match=message):
        verify_folder(folder)


def test_the_modules_are_transformer_pooling_normalize(folder, no_reload):
    modules = json.loads((folder / "modules.json").read_text())
    for broken in (modules[:2], [modules[0], modules[2], modules[1]], {}, ["Transformer"]):
        (folder / "modules.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"modules\.json"):
            verify_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "modules.json", "model.safetensors", "1_Pooling/config.json"])
def test_a_missing_or_torn_file_is_named(folder, no_reload, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        verify_folder(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name.split("/")[-1]):
        verify_folder(folder)


def test_sharded_weights_need_every_shard_and_no_other(folder, no_reload):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(sorted(weights.items())[:9]), dict(sorted(weights.items())[9:])]
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for half, file in zip(halves, files, strict=True):
        save_file(half, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for half, file in zip(halves, files, strict=True) for name in half}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(AssertionError, match="the files passed"):
        verify_folder(folder)

    index.write_text(json.dumps({"weight_map": {**weight_map, min(weight_map): files[1]}}))
    with pytest.raises(UserError, match=rf"disagree on the tensors .*{min(weight_map)}"):
        verify_folder(folder)
    index.write_text(json.dumps({"weight_map": {**weight_map, min(weight_map): "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match=r"missing \['\.\./elsewhere"):
        verify_folder(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(folder / files[0], folder / "model.safetensors")
    with pytest.raises(UserError, match=r"extra \['model.safetensors'\]"):
        verify_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / files[0]).unlink()
    with pytest.raises(UserError, match=r"missing.*00001-of-00002"):
        verify_folder(folder)


def unit_rows(num_channels: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(len(TEXTS), num_channels))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_vectors_that_differ_are_refused_with_the_text_that_shows_it(tmp_path):
    good = unit_rows(64)
    assert compare_vectors(tmp_path, {"a": good, "b": good + np.float32(5e-6)}, "float32")["a / b"] <= 1e-5
    for dtype, step in (("float32", 2e-5), ("bfloat16", 3e-2), ("float32", np.nan)):
        bad = good.copy()
        bad[3, 7] += step
        with pytest.raises(UserError, match=f"a and b disagree, most for the text {TEXTS[3][:40]!r}"):
            compare_vectors(tmp_path, {"a": good, "b": bad}, dtype)
    with pytest.raises(UserError, match=r"shape \(8, 64\) .*\(8, 32\)"):
        compare_vectors(tmp_path, {"a": good, "b": good[:, :32]}, "float32")


def test_the_bf16_tolerance_means_something_for_wide_models(tmp_path):
    """At 4096 channels unrelated unit vectors can stay within 2e-2 in most coordinates: the distance must bind."""
    good = unit_rows(4096)
    bad = good + 0.01 * np.sign(np.random.default_rng(1).normal(size=good.shape)).astype(np.float32)
    assert np.abs(bad - good).max() < 2e-2
    with pytest.raises(UserError, match="distance"):
        compare_vectors(tmp_path, {"a": good, "b": bad}, "bfloat16")


def test_a_tokenizer_that_transformers_reads_otherwise_is_caught(good):
    tokenizer = Tokenizer.from_file(str(good / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(512)
    rows = [tokenizer.encode(text).ids for text in TEXTS]

    def as_read(rows):
        counts = np.array([len(row) for row in rows])
        return {"token_ids": np.array([i for row in rows for i in row]), "token_counts_N": counts}

    verify._check_tokens(good, as_read(rows), 512)
    with pytest.raises(UserError, match=r"for 'hello' and tokenizer.json"):
        verify._check_tokens(good, as_read([row[1:] for row in rows]), 512)  # BOS lost
