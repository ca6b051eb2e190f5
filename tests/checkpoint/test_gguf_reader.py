"""A GGUF that the gguf library writes, read: against the blocks' definitions and the weights before them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nemo_embed_core.checkpoint.gguf_reader import read_gguf
from nemo_embed_core.errors import UserError

gguf = pytest.importorskip("gguf", reason="the extra demo")

WIDTH, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 96, 3
TOKENS = ["<|endoftext|>", "<|im_start|>", "Ġ", *"abcde12.", "ab", "abc", "Ġa"]
MERGES = ["a b", "ab c", "Ġ a"]


def shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face's, by their names."""
    found: dict[str, tuple[int, ...]] = {"embed_tokens": (len(TOKENS), WIDTH), "norm": (WIDTH,)}
    for i in range(LAYERS):
        found |= {
            f"layers.{i}.self_attn.q_proj": (WIDTH, WIDTH),
            f"layers.{i}.self_attn.k_proj": (WIDTH // 2, WIDTH),
            f"layers.{i}.self_attn.v_proj": (WIDTH // 2, WIDTH),
            f"layers.{i}.self_attn.o_proj": (WIDTH, WIDTH),
            f"layers.{i}.mlp.gate_proj": (MLP, WIDTH),
            f"layers.{i}.mlp.up_proj": (MLP, WIDTH),
            f"layers.{i}.mlp.down_proj": (WIDTH, MLP),
            f"layers.{i}.input_layernorm": (WIDTH,),
            f"layers.{i}.post_attention_layernorm": (WIDTH,),
        }
    return found


def in_llama_cpp(name: str) -> str:
    last = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
            "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
            "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    if name in ("embed_tokens", "norm"):
        return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[name]
    _, layer, *rest = name.split(".")
    return f"blk.{layer}.{last[rest[-1]]}.weight"


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2 i + j of each head from row j * A / 2 + i: what llama.cpp rotates stands side by side."""
    size = len(weight) // heads
    order = [h * size + j * (size // 2) + i for h in range(heads) for i in range(size // 2) for j in (0, 1)]
    return weight[order]


def write(file: Path, kind: Any, weights: dict[str, np.ndarray], **changes: Any) -> Path:
    facts = {"architecture": "llama", "pre": "smollm", "without": "", "extra": "", "bos": False, **changes}
    writer = gguf.GGUFWriter(file, facts["architecture"])
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(12345.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(facts["pre"])
    writer.add_token_list(TOKENS[: len(TOKENS) - (facts["without"] == "token")])
    writer.add_token_merges(MERGES)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2 - (facts["without"] == "token")))
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(facts["bos"])
    for name, weight in weights.items():
        if name == facts["without"]:
            continue
        if name[-6:] in ("q_proj", "k_proj"):
            weight = neighbours(weight, HEADS if "q_proj" in name else KV_HEADS)
        of = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(in_llama_cpp(name), gguf.quantize(weight, of), raw_dtype=of)
    if facts["extra"]:
        writer.add_tensor(facts["extra"], np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes().items()}


def blocks(weight: np.ndarray, kind: str) -> np.ndarray:
    """The values that 32 neighbours in a row have after their block, by llama.cpp's formulas."""
    if kind == "F16":
        return weight.astype(np.float16).astype(np.float32)
    parts = weight.reshape(-1, 32).astype(np.float32)
    if kind == "Q8_0":  # d = max |x| / 127, q = round(x / d)
        d = np.abs(parts).max(1, keepdims=True) / 127
        q = parts / d
        q = np.trunc(q + np.copysign(np.float32(0.5), q))
        return (q * d.astype(np.float16).astype(np.float32)).reshape(weight.shape)
    # Q4_1: d = (max - min) / 15, m = min, q = floor((x - m) / d + 1 / 2)
    low = parts.min(1, keepdims=True)
    d = (parts.max(1, keepdims=True) - low) / 15
    q = np.clip(np.trunc((parts - low) / d + np.float32(0.5)), 0, 15)
    d, low = (x.astype(np.float16).astype(np.float32) for x in (d, low))
    return (q * d + low).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_weights_are_those_of_the_blocks_in_hugging_faces_order(tmp_path, weights, kind):
    file = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind], weights)
    read_gguf(file, tmp_path / "out", layers=2)
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {name for name in weights if not name.startswith("layers.2.")}
    assert set(found) == {f"model.{name}.weight" for name in wanted}
    for name in wanted:
        # A block is 32 columns of one row, so that the order of rows is nothing to it.
        own = blocks(weights[name], kind) if weights[name].ndim == 2 else weights[name]
        assert torch.equal(found[f"model.{name}.weight"], torch.from_numpy(own).to(torch.bfloat16)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
    }
    more = {"intermediate_size": MLP, "vocab_size": len(TOKENS), "rope_theta": 12345.0, "rms_norm_eps": 1e-5}
    assert {
        **sizes,
        **more,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
    }.items() <= config.items()


def test_the_folder_is_a_model_and_a_tokenizer_of_ours(tmp_path, weights):
    from nemo_embed_core.checkpoint.source import resolve
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.encoders import open_encoder

    read_gguf(write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, weights), tmp_path / "out")
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "whoever reads the one reads the other, as a container's user"
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == len(TOKENS)
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    # Digits stand alone, also behind a space; a special token is one; the text comes back.
    text = "abc a12<|im_start|>ab. 1"
    assert own.encode(text).tokens == ["abc", "Ġa", "1", "2", "<|im_start|>", "ab", ".", "Ġ", "1"]
    assert own.decode(own.encode(text).ids, skip_special_tokens=False) == text
    encoder = open_encoder(resolve(str(tmp_path / "out")), "cpu", "fp32", 64)
    vectors = encoder.encode(["abc a12", "ab."])
    assert vectors.shape == (2, WIDTH) and np.abs(vectors[0] - vectors[1]).max() > 0.01


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"architecture": "qwen2"}, "holds a qwen2; only llama is read"),
        ({"pre": "llama-bpe"}, "has a tokenizer gpt2, llama-bpe; only gpt2, smollm is read"),
        ({"without": "layers.1.mlp.up_proj"}, "has no model.layers.1.mlp.up_proj.weight"),
        ({"without": "token"}, "13 tokens, 13 of them different, for embeddings of 14"),
        ({"extra": "rope_freqs.weight"}, "has rope_freqs.weight, which is no tensor of a Llama that is read"),
        ({"bos": True}, "wants a BOS in front, which is not written"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, weights, changes, said):
    file = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, weights, **changes)
    with pytest.raises(UserError, match=f"{file}.*{said}"):
        read_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_layers_than_there_are_and_other_files_are_refused(tmp_path, weights):
    file = write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, weights)
    with pytest.raises(UserError, match=r"layers=4: m\.gguf has 3"):
        read_gguf(file, tmp_path / "out", layers=4)
    (tmp_path / "x.gguf").write_bytes(b"no model" * 9)
    with pytest.raises(UserError, match=r"x\.gguf is no readable GGUF file"):
        read_gguf(tmp_path / "x.gguf", tmp_path / "out")
