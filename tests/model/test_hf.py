"""Our Llama against Hugging Face's with is_causal=False, and the reading of its folders."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODEL, read_config, to_hf
from transformers import LlamaConfig, LlamaModel

from nemo_embed_core.checkpoint.hf_reader import HFReader
from nemo_embed_core.checkpoint.weights import RandomReader, fill
from nemo_embed_core.config import ModelConfig, ParallelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.model import spec
from nemo_embed_core.model.attention import Segments, reference_attention, sdpa_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.parallel.boxes import local_box
from nemo_embed_core.parallel.layout import check_layout
from nemo_embed_core.parallel.mesh import TensorParallel


def hf_llama(config: ModelConfig, seed: int = 0) -> LlamaModel:
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    model = LlamaModel(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=rope,
            initializer_range=0.1,
            is_causal=False,
        )
    ).eval()
    with torch.no_grad():  # ones would hide a norm weight that is ignored
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
    return model


def ours(folder: Path, attention=sdpa_attention) -> Encoder:
    config = read_config(folder)
    encoder = Encoder(config, TensorParallel(), attention)
    fill(encoder, HFReader(folder, config), config)
    return encoder.requires_grad_(False)


@pytest.mark.parametrize("num_kv_heads", [8, 4, 1])
@pytest.mark.parametrize("scaled", [True, False])
def test_hidden_states_equal_bidirectional_hf(tmp_path: Path, num_kv_heads: int, scaled: bool) -> None:
    config = dataclasses.replace(
        MODEL,
        num_key_value_heads=num_kv_heads,
        rope_theta=500000.0 if scaled else 10000.0,
        rope_scaling=MODEL.rope_scaling if scaled else None,
    )
    theirs = hf_llama(config)
    theirs.save_pretrained(tmp_path)
    encoder = ours(tmp_path, reference_attention)
    lengths = [1, 5, 9, 9, 33]
    texts = [torch.randint(0, 512, (n,)) for n in lengths]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    got = encoder(torch.cat(texts), positions, Segments(cu_seqlens, lengths, 33), return_hidden=True)
    with torch.no_grad():
        want = torch.cat([theirs(input_ids=t[None]).last_hidden_state[0] for t in texts])
    assert (got - want).abs().max() < 1e-5
    embeddings = encoder(torch.cat(texts), positions, Segments(cu_seqlens, lengths, 33))
    means = torch.stack([h.mean(0) for h in want.split(lengths)])
    assert (embeddings - torch.nn.functional.normalize(means, dim=-1)).abs().max() < 1e-5


# (hidden_size, intermediate_size, query heads, KV heads, vocabulary) as published; what is fused must cut at
# every tp.
PUBLISHED = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32000),
    "Llama-2-13B": (5120, 13824, 40, 40, 32000),
    "LLaMA-30B": (6656, 17920, 52, 52, 32000),
    "Sheared-LLaMA-2.7B": (2560, 6912, 20, 20, 32000),
    "Llama-3.2-1B": (2048, 8192, 32, 8, 128256),
    "Llama-3.2-3B": (3072, 8192, 24, 8, 128256),
    "SmolLM-135M": (576, 1536, 9, 3, 49152),
    "AMD-Llama-135m": (768, 2048, 12, 12, 32000),
    "Minitron": (4096, 9216, 32, 8, 128256),
    "one token added": (4096, 11008, 32, 32, 32001),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_cut_at_every_tp_that_divides_the_kv_heads(name: str) -> None:
    """Each element of each tensor is held by one rank, whole gate and up blocks together, equally much memory
    on all."""
    D, F, H, G, V = PUBLISHED[name]
    config = ModelConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=128 if name in ("Llama-3.2-3B", "Minitron") else 0,
    )
    if F % G == 0:  # checkpoints from before other shapes were read
        rows = spec.hf_rows("model.layers.0.mlp.gate_up_proj.weight", config)
        assert rows[2:4] == [
            ("layers.0.mlp." + part, F // G, F // G) for part in ("gate_proj.weight", "up_proj.weight")
        ]
    shapes = spec.parameter_shapes(config)
    with torch.device("meta"):
        for tp in (tp for tp in range(1, G + 1) if G % tp == 0):
            check_layout(ParallelConfig(tp_size=tp), tp, config)
            held = Encoder(config, TensorParallel(size=tp), reference_attention)
            for full_name, parameter in held.named_parameters():
                dim, unit = spec.tp_dim(full_name), spec.tp_unit(full_name, config)
                boxes = [local_box(shapes[full_name], dim, r, tp, 0, 1, unit) for r in range(tp)]
                if dim is None:
                    continue
                ends = [offset[dim] + size[dim] for offset, size in boxes]
                assert [offset[dim] for offset, _ in boxes] == [0, *ends[:-1]] and ends[-1] == shapes[
                    full_name
                ][dim]
                assert all(size[dim] % unit == 0 and size[dim] <= parameter.shape[dim] for _, size in boxes)
                if tp <= 8 and F > 4096:  # a few percent of memory, no more
                    assert parameter.shape[dim] * tp <= 1.04 * shapes[full_name][dim]


@pytest.mark.parametrize(("heads", "kv_heads", "intermediate"), [(20, 20, 216), (12, 4, 130), (6, 3, 97)])
def test_hidden_states_where_kv_heads_do_not_divide_the_mlp(
    tmp_path: Path, heads: int, kv_heads: int, intermediate: int
) -> None:
    config = dataclasses.replace(
        MODEL,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        hidden_size=120,
    )
    theirs = hf_llama(config)
    theirs.save_pretrained(tmp_path)
    ids, n = torch.arange(40, 49), 9
    segments = Segments(torch.tensor([0, n], dtype=torch.int32), [n], n)
    got = ours(tmp_path)(ids, torch.arange(n), segments, return_hidden=True)
    with torch.no_grad():
        assert (got - theirs(input_ids=ids[None]).last_hidden_state[0]).abs().max() < 1e-5


def test_every_token_sees_the_last_one(tmp_path: Path) -> None:
    hf_llama(MODEL).save_pretrained(tmp_path)
    encoder = ours(tmp_path)
    ids, n = torch.arange(10), 10
    segments = Segments(torch.tensor([0, n], dtype=torch.int32), [n], n)
    a = encoder(ids, torch.arange(n), segments, return_hidden=True)
    ids = ids.clone()
    ids[-1] = 99
    b = encoder(ids, torch.arange(n), segments, return_hidden=True)
    assert (a[0] - b[0]).abs().max() > 1e-3


def test_hf_rows_cover_every_parameter_once() -> None:
    shapes = spec.hf_shapes(MODEL)
    counted = {name: torch.zeros(shape[0]) for name, shape in shapes.items()}
    for name in spec.parameter_shapes(MODEL):
        for hf_name, start, rows in spec.hf_rows(name, MODEL):
            counted[hf_name][start : start + rows] += 1
    assert all(bool((c == 1).all()) for c in counted.values())
    assert sum(torch.Size(s).numel() for s in shapes.values()) == sum(
        p.numel() for p in hf_llama(MODEL).parameters()
    )


def test_to_hf_inverts_the_fused_layout(tmp_path: Path) -> None:
    theirs = hf_llama(MODEL)
    theirs.save_pretrained(tmp_path)
    reader = HFReader(tmp_path, MODEL)
    back = {}
    for name, shape in spec.parameter_shapes(MODEL).items():
        back.update(to_hf(name, reader.read_box(name, ((0,) * len(shape), shape)), MODEL))
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], state[n]) for n in state)


@pytest.mark.parametrize("tp, dp", [(1, 1), (2, 1), (4, 1), (2, 2), (1, 3)])
def test_ranks_read_exactly_their_own_bytes(tmp_path: Path, tp: int, dp: int) -> None:
    """All ranks together read each sharded weight once; a rank's boxes joined give the whole tensor."""
    hf_llama(MODEL).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    whole = HFReader(tmp_path, MODEL)
    for name, shape in spec.parameter_shapes(MODEL).items():
        full = whole.read_box(name, ((0,) * len(shape), shape))
        joined = torch.full(shape, float("nan"))
        read = 0
        for tp_rank in range(tp):
            for dp_rank in range(dp):
                reader = HFReader(tmp_path, MODEL)
                box = local_box(shape, spec.tp_dim(name), tp_rank, tp, dp_rank, dp)
                joined[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))] = reader.read_box(name, box)
                assert reader.bytes_read == torch.Size(box[1]).numel() * 4
                read += reader.bytes_read
        assert torch.equal(joined, full)
        assert read == full.numel() * 4 * (tp if spec.tp_dim(name) is None else 1)


def test_random_weights_do_not_depend_on_the_layout() -> None:
    reader = RandomReader(MODEL, seed=3)
    name, shape = "model.layers.0.mlp.gate_up_proj.weight", (192, 64)
    whole = reader.read_box(name, ((0, 0), shape))
    assert torch.equal(reader.read_box(name, ((96, 0), (96, 64))), whole[96:])
    assert 0.09 < whole.std() < 0.11
    assert not torch.equal(RandomReader(MODEL, seed=4).read_box(name, ((0, 0), shape)), whole)
    assert bool((reader.read_box("model.norm.weight", ((0,), (64,))) == 1).all())


def test_both_spellings_of_rope_are_read(tmp_path: Path) -> None:
    hf_llama(MODEL).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw and read_config(tmp_path).rope_scaling == MODEL.rope_scaling
    rope = raw.pop("rope_parameters")
    raw["rope_theta"], raw["rope_scaling"] = rope.pop("rope_theta"), rope
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path).rope_scaling == MODEL.rope_scaling
    assert read_config(tmp_path).rope_theta == 500000.0


@pytest.mark.parametrize(
    ("key", "value"), [("pooling", "max"), ("hidden_act", "gelu"), ("attention_bias", True)]
)
def test_what_we_would_compute_differently_is_refused(tmp_path: Path, key: str, value: object) -> None:
    hf_llama(MODEL).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(UserError, match=f"{key}={value!r} is not supported"):
        read_config(tmp_path)


def _edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda w: w.pop("norm.weight"), "norm.weight is missing"),
        (lambda w: w.update(extra=torch.zeros(2)), "extra is not part of this model"),
        (
            lambda w: w.update({"norm.weight": torch.ones(63)}),
            "norm.weight has shape (63,), config.json says (64,)",
        ),
        (lambda w: w.update({"norm.weight": torch.ones(64, dtype=torch.int32)}), "norm.weight has dtype I32"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, damage, message: str) -> None:
    hf_llama(MODEL).save_pretrained(tmp_path)
    _edit_weights(tmp_path, damage)
    with pytest.raises(UserError) as caught:
        HFReader(tmp_path, MODEL)
    assert message in str(caught.value)


def test_an_lm_head_and_a_model_prefix_are_accepted(tmp_path: Path) -> None:
    hf_llama(MODEL).save_pretrained(tmp_path)
    weights = {"model." + n: t for n, t in load_file(tmp_path / "model.safetensors").items()}
    save_file({**weights, "lm_head.weight": torch.zeros(512, 64)}, tmp_path / "model.safetensors")
    got = HFReader(tmp_path, MODEL).read_box("model.norm.weight", ((0,), (64,)))
    assert torch.equal(got, weights["model.norm.weight"])
