"""model.gguf: read back by our reader and by the gguf library, against the weights and tokens it is of."""

import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODEL, WORDS
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from nemo_embed_core.checkpoint.gguf_reader import read_gguf
from nemo_embed_core.checkpoint.hf_folder import open_folder
from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.config import ModelConfig, RopeScaling
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.errors import UserError
from nemo_embed_core.export import gguf as ours
from nemo_embed_core.export import serving
from nemo_embed_core.export.folder import write_folder
from nemo_embed_core.model.spec import hf_shapes

gguf = pytest.importorskip("gguf", reason="the extra demo")

USAGE = Usage(prompts={"qa": Prompts("find it: ")}, query_max_length=24, document_max_length=40)
TEXTS = ["alpha beta 1234", "  quiet   green\n\ttower ", "llamas' bread; copper's <s> 12", "naïve Zürich"]


def bpe(pre_tokenizer: Any, bos: bool = False, **model: Any) -> Tokenizer:
    """Byte-level, with a control token and one that texts may hold."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
        )
    return tokenizer


def sentencepiece(prepend: bool = True) -> Tokenizer:
    """In the manner of Llama 2."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("▁", "a"),
        ("l", "l"),
        ("a", "ll"),
        ("▁a", "ll"),
        ("▁", "▁"),
    ]
    pieces += ["".join(merge) for merge in merges if "".join(merge) not in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])


def write(folder: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: str = "float32") -> Path:
    names = {"bos_token": tokenizer.id_to_token(1), "eos_token": tokenizer.id_to_token(0)}
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(names).encode(),
    }
    write_folder(folder, model, dtype, files, usage=USAGE, card={})
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in hf_shapes(model).items():  # values that every dtype holds
        state[name] = (torch.randn(shape, generator=generator) * 16).round().clamp(-64, 64) / 64
    save_file({n: w.to(getattr(torch, dtype)) for n, w in state.items()}, folder / "model.safetensors")
    return folder


def facts(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(keys without the architecture's name, tensors) as the gguf library reads them."""
    reader = gguf.GGUFReader(ours.write_gguf(folder))
    keys = {key: field.contents() for key, field in reader.fields.items()}
    prefix = f"{keys['general.architecture']}."
    return {key.removeprefix(prefix): value for key, value in keys.items()}, {
        t.name: t.data for t in reader.tensors
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_our_reader_finds_the_folder_again(tmp_path: Path, dtype: str) -> None:
    own = {
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "rope_theta": 77.0,
    }
    model = replace(MODEL, **own, rope_scaling=None, vocab_size=344)  # rows without a token
    folder = write(tmp_path / "from", model, bpe(digits()), dtype)
    read_gguf(ours.write_gguf(folder), tmp_path / "to")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "to"))
    assert len(after) == len(before)
    for name, weight in before.items():
        torch.testing.assert_close(after[f"model.{name}"].float(), weight.float(), rtol=0, atol=0)
    assert replace(open_folder(tmp_path / "to").model, is_causal=False, initializer_range=0.1) == model
    first, second = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (folder, tmp_path / "to"))
    assert [first.encode(text).ids for text in TEXTS] == [second.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, {"general.architecture": "llama-embed", "pooling_type": 1, "attention.causal": False}),
        ({"is_causal": True, "pooling": "last"},
         {"general.architecture": "llama", "pooling_type": 3, "attention.causal": True}),
        ({"model_type": "qwen3", "rope_scaling": None, "pooling": "cls"},
         {"general.architecture": "qwen3", "pooling_type": 2, "attention.causal": False,
          "rope.scaling.type": "none"}),
        ({"model_type": "mistral", "rope_scaling": RopeScaling(rope_type="linear", factor=3.0)},
         {"general.architecture": "llama-embed", "rope.scaling.type": "linear", "rope.scaling.factor": 3.0}),
        ({"rope_scaling": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16,
                                      attention_factor=1.25)},
         {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16}),
    ],
)  # fmt: skip
def test_keys_say_mask_pooling_and_positions(
    tmp_path: Path, changes: dict[str, Any], keys: dict[str, Any]
) -> None:
    model = replace(MODEL, **changes)
    found, tensors = facts(write(tmp_path / "m", model, bpe(pre_tokenizers.ByteLevel(False), bos=True)))
    assert {key: found[key] for key in keys} == keys
    assert found["attention.key_length"] == 16 and found["attention.head_count_kv"] == 4
    names = {
        "bos_token_id": 1,
        "eos_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": True,
        "pre": "gpt-2",
    }
    assert {name: found[f"tokenizer.ggml.{name}"] for name in names} == names
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and found["tokenizer.ggml.token_type"][-1] == 5
    state = load_file(tmp_path / "m" / "model.safetensors")
    k, size = state["layers.1.self_attn.k_proj.weight"].numpy(), 16
    halves = [h * size + j * (size // 2) + i for h in range(4) for i in range(size // 2) for j in (0, 1)]
    rotates_halves = model.model_type == "qwen3"
    np.testing.assert_array_equal(tensors["blk.1.attn_k.weight"], k if rotates_halves else k[halves])
    if rotates_halves:
        q_norm = state["layers.1.self_attn.q_norm.weight"].numpy()
        np.testing.assert_array_equal(tensors["blk.1.attn_q_norm.weight"], q_norm)
    if found.get("rope.scaling.type") == "yarn":
        # llama.cpp multiplies by 0.1 ln(factor) + 1.
        assert found["rope.scaling.attn_factor"] * (0.1 * np.log(4.0) + 1) == pytest.approx(1.25)
    assert ("rope_freqs.weight" in tensors) == (
        model.rope_scaling is not None and not keys.get("rope.scaling.type")
    )


def test_llama3_wavelengths_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = write(tmp_path / "m", MODEL, bpe(pre_tokenizers.ByteLevel(False)))
    _, tensors = facts(folder)
    config = LlamaConfig(**json.loads((folder / "config.json").read_text()))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = MODEL.rope_theta ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / tensors["rope_freqs.weight"], scaled.numpy(), rtol=1e-6)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def split(pattern: str) -> Any:
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"),
    [(LLAMA3, True, "llama-bpe"), (QWEN2, False, "qwen2"), (TEKKEN, True, "tekken")],
)
def test_patterns_have_llama_cpps_names(pattern: str, ignore_merges: bool, name: str) -> None:
    tokenizer = bpe(split(pattern), ignore_merges=ignore_merges)
    assert ours._tokens(tokenizer, MODEL.vocab_size)["pre"] == name
    with pytest.raises(UserError, match=f"ignore_merges={not ignore_merges}"):
        ours._tokens(bpe(split(pattern), ignore_merges=not ignore_merges), MODEL.vocab_size)


@pytest.mark.parametrize("prepend", [True, False])
def test_scores_of_sentencepiece_join_as_its_merges_do(prepend: bool) -> None:
    tokenizer = sentencepiece(prepend)
    found = ours._tokens(tokenizer, 320)
    tokens, scores = found["tokens"], found["scores"]
    assert (found["model"], found["space"], found["unknown"]) == ("llama", prepend, 0)
    assert found["types"][:5] == [2, 3, 3, 6, 6] and found["types"][-1] == 5
    for text in ("the all  tall", "all the  the ", "hello"):
        symbols = list(("▁" if prepend else "") + text.replace(" ", "▁"))
        while True:  # llama.cpp: of all neighbours that are a token together those with the greatest score
            joined = ["".join(pair) for pair in itertools.pairwise(symbols)]
            pairs = [(-scores[tokens.index(pair)], i) for i, pair in enumerate(joined) if pair in tokens]
            if not pairs:
                break
            _, i = min(pairs)
            symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
        assert symbols == tokenizer.encode(text, add_special_tokens=False).tokens, text


def with_normalizer(normalizer: Any, tokenizer: Tokenizer | None = None) -> Tokenizer:
    tokenizer = tokenizer or bpe(digits())
    tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="no xllamacpp: `make consumers` installs it"
)
@pytest.mark.parametrize(
    ("tokenizer", "left_out"),
    [
        (lambda: bpe(digits(), bos=True), ""),
        (lambda: bpe(split(LLAMA3), bos=True, ignore_merges=True), ""),
        (
            lambda: with_normalizer(normalizers.NFC(), bpe(split(QWEN2), bos=True)),
            "1 left out, as it does not",
        ),
        (lambda: bpe(split(TEKKEN), bos=True, ignore_merges=True), ""),
        (sentencepiece, ""),
    ],
    ids=["smollm", "llama3", "qwen2", "tekken", "sentencepiece"],
)
def test_llama_cpp_makes_the_tokens_of_tokenizer_json(tmp_path: Path, tokenizer: Any, left_out: str) -> None:
    folder = write(tmp_path / "m", replace(MODEL, rope_scaling=None), tokenizer())
    ours.write_gguf(folder)
    embedder = Embedder.load(str(folder), "cpu", "fp32")
    answer = serving.ask(folder, "llama.cpp", lambda texts, limit: embedder.encode(texts, max_length=limit))
    assert (answer.state, left_out in answer.words) == ("proven", True)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "weightedmean"}, "llama.cpp has no pooling=weightedmean, only mean, cls, last"),
        ({"model_type": "qwen3"}, "llama.cpp's qwen3 has no rope_type=llama3"),
        ({"model_type": "qwen2", "rope_scaling": None}, "qwen2 takes no 8 heads of 16 and hidden_size=64"),
        ({"rope_scaling": RopeScaling(**YARN, truncate=False)}, "and this model has truncate=False"),
        ({"rope_scaling": RopeScaling(**YARN, beta_fast=16.0)}, "this model has .* beta_fast=16.0"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(changes: dict[str, Any], message: str) -> None:
    files = {"tokenizer.json": bpe(digits()).to_str().encode()}
    ours.check_gguf(MODEL, files)
    with pytest.raises(UserError, match=message):
        ours.check_gguf(replace(MODEL, **changes), files)


def two_in_front() -> Tokenizer:
    tokenizer = bpe(digits())
    template = "<|im_start|> <|endoftext|> $A"
    special = [("<|im_start|>", 1), ("<|endoftext|>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def stripped() -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), tokenizer.normalizer])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: Tokenizer(models.Unigram([("a", 0.0)])), "this one is Unigram"),
        (lambda: with_normalizer(normalizers.Lowercase()), "does not normalise texts by Lowercase"),
        (lambda: bpe(pre_tokenizers.ByteLevel(True)), "names no pre-tokenizer that splits texts as this one"),
        (lambda: bpe(split(r"\w+")), "names no pre-tokenizer"),
        (two_in_front, r"puts \[1, 0\] and \[\]"),
        (stripped, "escapes spaces, and this tokenizer does otherwise"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(tokenizer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours._tokens(tokenizer(), MODEL.vocab_size)
