"""Every base model beside Llama against transformers' own class: hidden states, folders there and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import read_config, to_hf

from nemo_embed_core.checkpoint.hf_folder import open_folder
from nemo_embed_core.checkpoint.hf_reader import HFReader
from nemo_embed_core.checkpoint.weights import fill
from nemo_embed_core.config import ModelConfig, RopeScaling
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.folder import hf_config
from nemo_embed_core.export.formats import check_format
from nemo_embed_core.model import spec
from nemo_embed_core.model.attention import Segments, reference_attention, sdpa_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.parallel.mesh import TensorParallel

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 3e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
}  # fmt: skip
# name -> (transformers' configuration class, what of SIZES is another)
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 12, "num_key_value_heads": 4}),
    "ministral3": (
        "Ministral3Config",
        {
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 50.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "smollm": ("LlamaConfig", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
}


def theirs(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """transformers' model with random weights, norms and biases that no default hides."""
    kind, own = BASES[name]
    config = getattr(transformers, kind)(**{**SIZES, **own, **changes})
    model = transformers.AutoModel.from_config(config).eval()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise.tanh() if tensor_name.endswith("norm.weight") else 0.15 * noise)
    return model


def ours(folder: Path, attention: Any = sdpa_attention, **changes: Any) -> Encoder:
    config = dataclasses.replace(read_config(folder), **changes)
    encoder = Encoder(config, TensorParallel(), attention)
    fill(encoder, HFReader(folder, config), config)
    return encoder.requires_grad_(False)


def packed(texts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Segments]:
    lengths = [len(text) for text in texts]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return torch.cat(texts), positions, Segments(ends, lengths, max(lengths))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_hidden_states_equal_transformers(tmp_path: Path, name: str, causal: bool) -> None:
    """Bidirectional: once by is_causal=False, and once by a mask that hides nothing, which knows no flag."""
    model = theirs(name)
    model.save_pretrained(tmp_path)
    texts = [torch.randint(0, 64, (n,)) for n in (1, 5, 9, 9, 33)]
    found = [
        ours(tmp_path, attention, is_causal=causal)(*packed(texts), return_hidden=True)
        for attention in (reference_attention, sdpa_attention)
    ]
    ways: list[dict[str, Any]] = [{}] if causal else [{"is_causal": False}, {"attention_mask": True}]
    with torch.no_grad():
        for way in ways:
            want = []
            for text in texts:
                how = dict(way)
                if "attention_mask" in how:
                    how["attention_mask"] = torch.zeros(1, 1, len(text), len(text))
                want.append(model(input_ids=text[None], **how).last_hidden_state[0])
            assert all((got - torch.cat(want)).abs().max() < 1e-5 for got in found), way


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, not truncated": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False,
        "beta_fast": 6.0, "beta_slow": 1.5,
    },
    "yarn with its factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3,
        "beta_fast": 2.0,
    },
    "yarn by mscale": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.4,
        "mscale_all_dim": 0.6,
    },
    "yarn by half of mscale, which is none": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.4,
    },
    "yarn of one channel's blend": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 7, "beta_fast": 1.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_positions_equals_transformers(tmp_path: Path, kind: str) -> None:
    """By rope_parameters, by rope_scaling, which has the same, and as we write it."""
    model = theirs("qwen2", rope_parameters={**ROPES[kind], "rope_theta": 50.0}, is_causal=False)
    model.save_pretrained(tmp_path)
    by_parameters = read_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    rope = {"type" if key == "rope_type" else key: value for key, value in ROPES[kind].items()}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "rope_theta": 50.0, "rope_scaling": rope}))
    assert read_config(tmp_path) == by_parameters
    texts = [torch.randint(0, 64, (n,)) for n in (1, 9, 70)]
    got = ours(tmp_path)(*packed(texts), return_hidden=True)
    with torch.no_grad():
        want = torch.cat([model(input_ids=text[None]).last_hidden_state[0] for text in texts])
    assert (got - want).abs().max() < 1e-5
    written = hf_config(read_config(tmp_path), "float32", {})
    (tmp_path / "config.json").write_text(json.dumps(written))
    with torch.no_grad():
        again = transformers.AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(again(input_ids=texts[2][None]).last_hidden_state[0], want[10:])


def test_the_text_part_of_a_model_of_images_and_text_is_read(tmp_path: Path) -> None:
    """As Ministral 3 is published, by the names of transformers 5 and by those of its files."""
    text = theirs("ministral3").config
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 16, "patch_size": 8, "head_dim": 4, "model_type": "pixtral"}
    config = transformers.Mistral3Config(text_config=text, vision_config={**vision, **sizes})
    whole = transformers.Mistral3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    stored = load_file(tmp_path / "new" / "model.safetensors")
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    assert all(any(part in name for name in stored) for part in parts)
    old = {}
    for name, tensor in whole.state_dict().items():
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
        old["language_model.lm_head.weight" if name == "lm_head.weight" else name] = tensor.clone()
    save_file(old, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    ids = torch.randint(0, 64, (21,))
    with torch.no_grad():
        want = whole.model.language_model(input_ids=ids[None], is_causal=False).last_hidden_state[0]
    for name in ("new", "old"):
        opened = open_folder(tmp_path / name)
        assert opened.model.model_type == "ministral3" and len(opened.notes) == 1
        assert "of this mistral3 the text part alone is read" in opened.notes[0]
        got = ours(tmp_path / name)(*packed([ids]), return_hidden=True)
        assert (got - want).abs().max() < 1e-5
    raw = json.loads((tmp_path / "old" / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"quantization_config \(fp8\): quantised weights are not read"):
        open_folder(tmp_path / "old")


@pytest.mark.parametrize("name", BASES)
def test_a_folder_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    """transformers -> our parameters and config.json -> transformers: every tensor, every bit."""
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    assert config.model_type == model.config.model_type
    reader, back = HFReader(tmp_path / "theirs", config), dict[str, torch.Tensor]()
    for full_name, shape in spec.parameter_shapes(config).items():
        back.update(to_hf(full_name, reader.read_box(full_name, ((0,) * len(shape), shape)), config))
    state = model.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)
    for causal in (False, True):
        folder = tmp_path / f"ours-{causal}"
        folder.mkdir()
        save_file(back, folder / "model.safetensors", {"format": "pt"})
        written = hf_config(dataclasses.replace(config, is_causal=causal), "float32", {})
        (folder / "config.json").write_text(json.dumps(written))
        assert read_config(folder) == dataclasses.replace(config, is_causal=causal)
        again = transformers.AutoModel.from_pretrained(folder).eval()
        assert type(again) is type(model)
        ids = torch.randint(0, 64, (1, 17))
        with torch.no_grad():
            want = model(input_ids=ids, is_causal=causal).last_hidden_state
            assert torch.equal(again(input_ids=ids).last_hidden_state, want)
            assert not torch.equal(again(input_ids=ids, is_causal=not causal).last_hidden_state, want)


def test_a_language_model_s_head_is_left_out_tied_or_not(tmp_path: Path) -> None:
    for tied in (True, False):
        config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(tied))
        stored = load_file(tmp_path / str(tied) / "model.safetensors")
        assert ("lm_head.weight" in stored) == (not tied)
        encoder = ours(tmp_path / str(tied))
        assert torch.equal(encoder.model.embed_tokens.weight, stored["model.embed_tokens.weight"])


LEFT_OUT = "sliding_window=4096, which transformers takes where it is left out"
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 50.0}
SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 4096}, "sliding_window=4096 is not supported; this Mistral has .*=null"),
    ("mistral", {"sliding_window": ...}, LEFT_OUT),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True is not supported; this Qwen2"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported; this Qwen3"),
    ("qwen3", SLIDING, "layer_types has 'sliding_attention'"),
    ("qwen3", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
    ("ministral3", {"sliding_window": 64}, "sliding_window=64 is not supported; this Ministral 3 has"),
    ("ministral3", {"rope_parameters": YARN}, "model_type=ministral3 needs a rope_scaling.llama_4_scal"),
    (
        "qwen2",
        {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
        "qwen2 has no rope_scaling.llama_4",
    ),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "is of type yarn and has no factor"),
    ("qwen2", {"rope_parameters": {**YARN, "beta_slow": 40}}, "beta_slow=40 must be below beta_fast=32"),
    ("qwen2", {"rope_parameters": {**YARN, "factor": 0}}, "factor=0 must be a positive number"),
    ("qwen2", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported; use"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ("qwen2", {"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'; only .*\"qwen3\""),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_what_would_be_computed_differently_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    theirs(name).config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_a_scale_of_q_that_no_export_could_say_is_refused() -> None:
    with pytest.raises(UserError, match=r"llama_4_scaling_beta=0\.1 is of rope_type=yarn, not llama3"):
        RopeScaling(llama_4_scaling_beta=0.1)
    scaling = RopeScaling(rope_type="yarn", llama_4_scaling_beta=0.1)
    assert ModelConfig(model_type="ministral3", rope_scaling=scaling).rope_scaling == scaling
    with pytest.raises(UserError, match=r"model_type=llama has no rope_scaling\.llama_4_scaling_beta"):
        ModelConfig(rope_scaling=scaling)


@pytest.mark.parametrize("name", BASES)
def test_what_is_left_out_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    """Of a config.json with the sizes that have no default, and what the family needs."""
    kept = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    kept |= {"num_attention_heads", "sliding_window"}
    raw = {k: v for k, v in theirs(name).config.to_dict().items() if k in kept}
    raw["num_attention_heads"] = 32  # of which every family's default of KV heads is a divisor
    raw["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, want = read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    for key in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "initializer_range"):
        assert getattr(config, key) == getattr(want, key), key
    assert config.head_dim == (getattr(want, "head_dim", None) or 2)
    assert config.rope_theta == want.rope_parameters["rope_theta"]


def test_the_code_of_compat_is_a_bidirectional_llama_s() -> None:
    llama = ModelConfig()
    check_format("compat", llama)
    for other in (dataclasses.replace(llama, model_type="qwen3"), dataclasses.replace(llama, is_causal=True)):
        check_format("native", other)
        with pytest.raises(UserError, match="format=compat brings the code of a bidirectional Llama"):
            check_format("compat", other)
