"""Folders in many spellings against transformers: the same hidden states, or a refusal that names both sides.

The oracle reads the folder itself; where it would draw random weights (tensors under other names), it is the
model that was saved.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nemo_embed_core.checkpoint.hf_folder import INDEX, SINGLE
from nemo_embed_core.checkpoint.source import resolve
from nemo_embed_core.checkpoint.weights import fill, open_weights, read_model_config
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.attention import Segments, sdpa_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.parallel.mesh import TensorParallel

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = torch.arange(3, 40)


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, **changes})).eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def edit(folder: Path, *drop: str, **changes: Any) -> None:
    file = folder / "config.json"
    raw = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps({**raw, **changes}))


def rope(folder: Path, v5: dict | None = None, **v4: Any) -> None:
    """config.json with these rotary fields and no other."""
    edit(folder, "rope_parameters", **({"rope_parameters": v5} if v5 is not None else {}), **v4)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    save_file({change(name): x for name, x in load_file(folder / SINGLE).items()}, folder / SINGLE)


def add(folder: Path, file: str = SINGLE, **tensors: torch.Tensor) -> None:
    save_file(
        {**load_file(folder / file), **{n.replace("__", "."): x for n, x in tensors.items()}}, folder / file
    )


def shards(folder: Path, seed: int = 0) -> list[str]:
    """The same model as several files and an index; the names of the files."""
    (folder / SINGLE).unlink()
    llama(seed).save_pretrained(folder, max_shard_size="30KB")
    return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))


def index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    value = json.loads((folder / INDEX).read_text()) if (folder / INDEX).is_file() else {"weight_map": {}}
    change(value["weight_map"])
    (folder / INDEX).write_text(json.dumps(value))


def names_of(folder: Path, file: str = SINGLE) -> dict[str, str]:
    return dict.fromkeys(load_file(folder / file), file)


def ours(path: Path) -> torch.Tensor:
    weights = open_weights(str(path))
    assert read_model_config(str(path)) == weights.model == resolve(path).model
    encoder = Encoder(weights.model, TensorParallel(), sdpa_attention)
    fill(encoder, weights.reader, weights.model)
    n = len(IDS)
    with torch.no_grad():
        return encoder(
            IDS,
            torch.arange(n),
            Segments(torch.tensor([0, n], dtype=torch.int32), [n], n),
            return_hidden=True,
        )


def hidden(model: Any) -> torch.Tensor:
    model.config.is_causal = False
    for layer in model.layers:
        layer.self_attn.is_causal = False
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS[None]).last_hidden_state[0]


def theirs(path: Path) -> torch.Tensor:
    config = AutoConfig.from_pretrained(path)
    config.is_causal = False
    return hidden(AutoModel.from_pretrained(path, config=config, attn_implementation="eager"))


# ------------------------------------------------------------------------------ read as transformers reads it

READ: dict[str, Callable[[Path], Any]] = {
    "as saved": lambda f: None,
    "shards": shards,
    "bfloat16": lambda f: llama().bfloat16().save_pretrained(f),
    "tied": lambda f: llama(tie_word_embeddings=True).save_pretrained(f),
    "no prefix": lambda f: llama().model.save_pretrained(f),
    "norm alone without prefix": lambda f: rename(f, lambda n: n.replace("model.norm", "norm")),
    "a classifier's head": lambda f: add(f, score__weight=torch.ones(3, 32)),
    "old rotary buffers": lambda f: add(
        f, **{"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    ),
    "an index of the single file": lambda f: index(f, lambda where: where.update(names_of(f))),
    "an index that lacks a tensor": lambda f: (
        shards(f),
        index(f, lambda where: where.pop("model.norm.weight")),
    ),
    "shards of before beside the index": lambda f: (
        shards(f),
        shutil.copy(f / sorted(f.glob("model-00001-*"))[0].name, f / "model-00001-of-00002.safetensors"),
    ),
    "a pickle beside it": lambda f: torch.save({}, f / "pytorch_model.bin"),
    "theta of transformers 4": lambda f: rope(f, rope_theta=123456.0),
    "theta as a whole number": lambda f: rope(f, rope_theta=500000),
    "theta nowhere": lambda f: rope(f),
    "llama3 of transformers 5": lambda f: rope(f, {**LLAMA3, "rope_theta": 5e5}),
    "llama3 of transformers 4": lambda f: rope(f, rope_scaling=LLAMA3, rope_theta=5e5),
    "type in place of rope_type": lambda f: rope(
        f,
        rope_scaling={"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}},
        rope_theta=5e5,
    ),
    "type and rope_type": lambda f: rope(f, rope_scaling={**LLAMA3, "type": "llama3"}, rope_theta=5e5),
    "both spellings": lambda f: rope(f, {**LLAMA3, "rope_theta": 5e5}, rope_scaling=LLAMA3, rope_theta=5e5),
    "both spellings, whole numbers": lambda f: rope(
        f, {**LLAMA3, "rope_theta": 500000}, rope_scaling={**LLAMA3, "factor": 8}, rope_theta=5e5
    ),
    "both, not scaled": lambda f: rope(
        f, {"rope_type": "default", "rope_theta": 5e5}, rope_theta=5e5, rope_scaling=None
    ),
    "theta inside rope_scaling": lambda f: rope(f, rope_scaling={**LLAMA3, "rope_theta": 5e5}),
    "theta beside rope_parameters": lambda f: rope(f, LLAMA3, rope_theta=5e5),
    "an empty rope_scaling": lambda f: rope(f, {**LLAMA3, "rope_theta": 5e5}, rope_scaling={}),
    "trained length beside it": lambda f: rope(
        f, rope_scaling={k: v for k, v in LLAMA3.items() if k[0] != "o"}, original_max_position_embeddings=32
    ),
    "trained length nowhere": lambda f: rope(
        f, rope_scaling={k: v for k, v in LLAMA3.items() if k[0] != "o"}
    ),
    "factor without a type": lambda f: rope(f, {"factor": 8.0, "rope_theta": 1e4}),
    "partial_rotary_factor": lambda f: rope(
        f, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "swish": lambda f: edit(f, hidden_act="swish"),
    "fields that have defaults": lambda f: edit(
        f, "rms_norm_eps", "head_dim", "initializer_range", "attention_bias"
    ),
    "head_dim null": lambda f: edit(f, head_dim=None),
    "pretraining_tp": lambda f: edit(f, pretraining_tp=2),
    "torch_dtype beside dtype": lambda f: edit(f, torch_dtype="bfloat16", dtype="float32"),
    "said to be tied, with a head of its own": lambda f: edit(f, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", READ)
def test_read_as_transformers_reads_it(folder: Path, name: str) -> None:
    READ[name](folder)
    assert (ours(folder) - theirs(folder)).abs().max() < 1e-5


def test_no_case_is_blind(folder: Path) -> None:
    """Another theta, scaling or weight moves the hidden states by far more than they may differ."""
    base = ours(folder)
    for change in (
        lambda: rope(folder, rope_theta=2e4),
        lambda: rope(folder, rope_scaling=LLAMA3),
        lambda: shards(folder, 1),
    ):
        change()
        assert (ours(folder) - base).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------ names of wrappers

RENAMED = {
    "DDP": lambda n: "module." + n,
    "torch.compile": lambda n: "_orig_mod." + n,
    "compiled blocks": lambda n: n.replace("layers.0.", "layers.0._orig_mod.").replace(
        "layers.1.", "layers.1._orig_mod."
    ),
    "FSDP around checkpointing": lambda n: n.replace(
        ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    ),
    "both": lambda n: "module._orig_mod." + n,
    "model twice": lambda n: "model." + n,
    "base_model": lambda n: "base_model." + n,
    "a part of a larger model": lambda n: "language_model." + n,
    "an encoder's attribute": lambda n: n.replace("model.", "encoder."),
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_of_wrappers_are_taken_off_and_said(folder: Path, plain: Path, capsys, name: str) -> None:
    rename(folder, RENAMED[name])
    assert torch.equal(ours(folder), ours(plain))
    said = capsys.readouterr().out
    assert said.count("its tensors have other names than transformers'") == 1 and str(folder) in said


def test_a_tied_model_saved_with_its_head_alone(folder: Path, capsys) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(folder)
    save_model(model, str(folder / SINGLE), {"format": "pt"})
    assert "model.embed_tokens.weight" not in load_file(folder / SINGLE)
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").model
    assert (ours(folder) - hidden(loaded)).abs().max() < 1e-5
    assert "lm_head.weight is read as the embedding" in capsys.readouterr().out
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(
        UserError, match=r"lm_head\.weight but no embed_tokens\.weight, .* tie_word_embeddings"
    ):
        ours(folder)


# ------------------------------------------------------------------------------------------ the hub's cache


def test_the_hubs_cache_is_read_at_the_snapshot_that_main_names(
    folder: Path, plain: Path, tmp_path: Path, capsys
) -> None:
    outer = tmp_path / "models--a--b"
    for commit, seed in (("0123", 0), ("4567", 1)):
        (outer / "blobs").mkdir(parents=True, exist_ok=True)
        snapshot = outer / "snapshots" / commit
        snapshot.mkdir(parents=True)
        llama(seed).save_pretrained(folder)
        for file in (SINGLE, "config.json"):
            shutil.copy(folder / file, outer / "blobs" / f"{commit}{file}")
            (snapshot / file).symlink_to(Path("../../blobs") / f"{commit}{file}")
    with pytest.raises(UserError, match=r"names no snapshot of it; give one: .*/0123, .*/4567"):
        resolve(outer)
    (outer / "refs").mkdir()
    (outer / "refs" / "main").write_text("0123\n")
    assert torch.equal(ours(outer), ours(plain))
    assert "reading snapshots/0123 (refs/main names it)" in capsys.readouterr().out
    assert resolve(str(outer)).folder == resolve(outer).folder == outer / "snapshots" / "0123"


def test_what_is_no_folder_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"hf download org/model-1 --local-dir model-1, then give model-1"):
        resolve("org/model-1")
    cached = tmp_path / "hub" / "models--org--model-1"
    cached.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"in this machine's cache: give {cached}"):
        resolve("org/model-1")
    with pytest.raises(
        UserError, match=r"is not a folder; give a checkpoint, a run or a Hugging Face folder$"
    ):
        resolve(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^hub/model is not a folder; give [^.]*$"
    ):  # hub is a folder of ours
        resolve("hub/model")
    for name, what in (
        ("m.gguf", "a GGUF file"),
        (SINGLE, f"give the folder that holds it, {tmp_path}"),
        ("x", "a file, not"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=what):
            resolve(tmp_path / name)


# ------------------------------------------------------------------------------------------ refused


def two_sets(f: Path) -> None:
    shards(f)
    shutil.copy(shutil.copytree(f, f.parent / "new") / INDEX, f)  # anything but a model
    llama(1).save_pretrained(f.parent / "new")
    shutil.copy(f.parent / "new" / SINGLE, f)


def pooled(f: Path, modes: dict[str, Any], **config: Any) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    value = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"}
        for i, (p, t) in enumerate(modules)
    ]
    (f / "modules.json").write_text(json.dumps(value))
    (f / "1_Pooling").mkdir()
    (f / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    edit(f, is_causal=False, **config)


def only(f: Path, name: str, content: bytes = b"x") -> None:
    (f / SINGLE).unlink()
    (f / name).write_bytes(content)


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
MEAN, MAX = {"pooling_mode": "mean"}, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}
REFUSED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a new file beside an old index": (two_sets, [SINGLE + ", which transformers reads", INDEX]),
    "an index that names it and a shard": (
        lambda f: (
            save_file({"x": torch.ones(1)}, f / "a.safetensors"),
            index(f, lambda where: where.update({**names_of(f), "x": "a.safetensors"})),
        ),
        [SINGLE, INDEX, "a.safetensors"],
    ),
    "an index of other shards": (
        lambda f: (
            shards(f),
            index(f, lambda where: where.update({"model.norm.weight": min(where.values())})),
        ),
        ["weight_map says that model.norm.weight is in model-00001", "it is in model-000"],
    ),
    "an index of more than there is": (
        lambda f: (shards(f), index(f, lambda where: where.update({"extra": min(where.values())}))),
        ["weight_map says that extra is in", "no file has it"],
    ),
    "a tensor in two shards": (
        lambda f: add(f, shards(f)[0], model__norm__weight=torch.zeros(32)),
        ["holds model.norm.weight twice, in model-00001-of-", "and in model-000"],
    ),
    "with and without prefix": (
        lambda f: add(f, norm__weight=torch.zeros(32)),
        ["holds both", "model.norm.weight", " norm.weight"],
    ),
    "wrapped and not": (
        lambda f: add(f, module__model__norm__weight=torch.zeros(32)),
        ["holds both", "module.model.norm.weight"],
    ),
    "two models in one": (
        lambda f: add(f, **{f"query.{n}".replace(".", "__"): x for n, x in load_file(f / SINGLE).items()}),
        ["model.layers.0.input_layernorm.weight", "query.model.layers.0.input_layernorm.weight"],
    ),
    "a part of a larger model": (
        lambda f: (rename(f, lambda n: "language_model." + n), add(f, vision__weight=torch.ones(1))),
        ["vision.weight is not part of this model"],
    ),
    "an adapter beside a model": (
        lambda f: (f / "adapter_config.json").write_text(ADAPTER),
        ["adapter_config.json", SINGLE, "org/base", "merge_and_unload"],
    ),
    "an adapter alone": (
        lambda f: only(f, "adapter_config.json", ADAPTER.encode()),
        ["is an adapter (adapter_config.json) of org/base", "merge_and_unload"],
    ),
    "an adapter inside": (
        lambda f: add(f, model__layers__0__self_attn__q_proj__lora_A__weight=torch.ones(2, 32)),
        ["lora_A", "not merged"],
    ),
    "another file named": (
        lambda f: (
            shutil.copy(f / SINGLE, f / "b.safetensors"),
            edit(f, transformers_weights="b.safetensors"),
        ),
        ["transformers_weights is 'b.safetensors'", SINGLE],
    ),
    "embeddings beside a model": (
        lambda f: (f / "documents.npy").write_bytes(b""),
        ["documents.npy", SINGLE],
    ),
    "a run beside a model": (
        lambda f: (f / "step-00000002").mkdir(),
        ["a checkpoint of ours (step-00000002)", SINGLE],
    ),
    "a checkpoint beside a model": (
        lambda f: (f / "manifest.json").write_text('{"format": 1, "pieces": {}}'),
        ["a checkpoint of ours (manifest.json)", SINGLE],
    ),
    "theta": (
        lambda f: rope(f, {"rope_type": "default", "rope_theta": 5e5}, rope_theta=1e4),
        [
            "rope_theta=10000.0, which transformers 4 reads",
            "rope_parameters.rope_theta=500000.0, which transformers 5 reads",
        ],
    ),
    "theta inside rope_scaling": (
        lambda f: rope(f, rope_scaling={**LLAMA3, "rope_theta": 1e6}, rope_theta=5e5),
        [
            "rope_theta=500000.0, which transformers 4",
            "rope_scaling.rope_theta=1000000.0, which transformers 5",
        ],
    ),
    "theta in one spelling only": (
        lambda f: rope(f, {**LLAMA3, "rope_theta": 5e5}, rope_scaling=LLAMA3),
        ["rope_scaling (theta 10000,", "which transformers reads", "rope_parameters (theta 500000,"],
    ),
    "factor": (
        lambda f: rope(f, LLAMA3, rope_scaling={**LLAMA3, "factor": 2.0}, rope_theta=5e5),
        ["rope_scaling (theta 500000, factor 2,", "rope_parameters (theta 500000, factor 8,"],
    ),
    "trained length": (
        lambda f: rope(f, LLAMA3, original_max_position_embeddings=32),
        ["original_max_position_embeddings=32, which transformers 5", "of rope_parameters, 64"],
    ),
    "scaled in 5, not in 4": (
        lambda f: rope(
            f, {**LLAMA3, "rope_theta": 5e5}, rope_scaling={"rope_type": "default"}, rope_theta=5e5
        ),
        ["rope_scaling (theta 500000, not scaled)", "rope_parameters (theta 500000, factor 8"],
    ),
    "scaled in 4, not in 5": (
        lambda f: rope(f, {"rope_type": "default", "rope_theta": 5e5}, rope_scaling=LLAMA3, rope_theta=5e5),
        ["rope_scaling (theta 500000, factor 8", "rope_parameters (theta 500000, not scaled)"],
    ),
    "type and rope_type": (
        lambda f: rope(f, rope_scaling={**LLAMA3, "type": "default"}),
        ["rope_type='llama3', which transformers 5 reads, and type='default', which transformers 4 reads"],
    ),
    "a number as a string": (
        lambda f: rope(f, rope_scaling={**LLAMA3, "factor": "8.0"}),
        ["rope_scaling.factor='8.0' must be a finite number"],
    ),
    "theta as a string": (lambda f: rope(f, rope_theta="10000"), ["rope_theta='10000' must be a number"]),
    "theta zero": (lambda f: rope(f, rope_theta=0), ["rope_theta=0.0 must be positive"]),
    "theta null": (lambda f: rope(f, rope_theta=None), ["rope_theta is null"]),
    "a factor missing": (
        lambda f: rope(f, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        ["rope_scaling is of type llama3 and has no low_freq_factor"],
    ),
    "factors crossed": (
        lambda f: rope(f, {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
        ["low_freq_factor=4.0 must be below high_freq_factor=4.0"],
    ),
    "another scaling": (
        lambda f: rope(f, rope_scaling={"type": "dynamic", "factor": 4.0}),
        ["rope_type 'dynamic'"],
    ),
    "scaling as a list": (lambda f: rope(f, rope_scaling=[8.0]), ["rope_scaling=[8.0] must be an object"]),
    "scaling by layer": (
        lambda f: rope(f, {"full_attention": LLAMA3}),
        ["rope_parameters differs from layer to layer"],
    ),
    "partial and llama3": (
        lambda f: rope(f, {**LLAMA3, "partial_rotary_factor": 0.5}),
        ["partial_rotary_factor=0.5 is not supported"],
    ),
    "causal and not": (
        lambda f: edit(f, is_causal=False, use_bidirectional_attention=False),
        ["is_causal=False, which transformers reads", "use_bidirectional_attention=False, which vLLM"],
    ),
    "pooling in two words": (
        lambda f: pooled(f, MAX, pooling="avg"),
        ["pools by max, which sentence-transformers reads", "pooling='avg'"],
    ),
    "pooling in two spellings": (
        lambda f: pooled(f, {**MAX, **MEAN}),
        ["pooling_mode='mean' and the flags of max"],
    ),
    "pooling that is not ours": (
        lambda f: pooled(f, MAX),
        ["sentence-transformers model with pooling by max"],
    ),
    "quantised": (
        lambda f: edit(f, quantization_config={"quant_method": "bitsandbytes"}),
        ["quantization_config (bitsandbytes)"],
    ),
    "a model inside": (
        lambda f: edit(f, text_config={"hidden_size": 99}),
        ["text_config describes a second model"],
    ),
    "fewer layers than tensors": (
        lambda f: edit(f, num_hidden_layers=1),
        ["layers.1.input_layernorm.weight is not part of this model"],
    ),
    "bias tensors": (
        lambda f: add(f, model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
        ["q_proj.bias is not part of this model"],
    ),
    "a vocabulary of another size": (
        lambda f: edit(f, vocab_size=120),
        ["embed_tokens.weight has shape (128, 32), config.json says (120, 32)"],
    ),
    "cut short": (
        lambda f: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size - 1000),
        ["is not a readable safetensors file", "cut short"],
    ),
    "a git-lfs pointer": (
        lambda f: only(f, SINGLE, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        [f"{SINGLE} is a git-lfs pointer", "git lfs pull"],
    ),
    "config.json a git-lfs pointer": (
        lambda f: (f / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ["config.json is a git-lfs pointer"],
    ),
    "a pickle alone": (
        lambda f: only(f, "pytorch_model.bin"),
        ["pytorch_model.bin is a pickle", "save_pretrained"],
    ),
    "Meta's format": (lambda f: only(f, "consolidated.00.pth"), ["consolidated.00.pth is Meta's own format"]),
    "a GGUF file": (lambda f: only(f, "model-q4.gguf"), ["model-q4.gguf is a GGUF file"]),
    "a variant alone": (
        lambda f: only(f, "model.fp16.safetensors"),
        ["model.fp16.safetensors", f"to {SINGLE}"],
    ),
    "shards without their index": (
        lambda f: (shards(f), (f / INDEX).unlink()),
        ["model-00001-of-", f"need {INDEX}"],
    ),
    "checkpoints of a trainer": (
        lambda f: (
            shutil.copytree(f, f / "checkpoint-500"),
            (f / SINGLE).unlink(),
            (f / "config.json").unlink(),
        ),
        ["has no config.json; there are models inside: give", "checkpoint-500"],
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), ["has no config.json", "model.safetensors"]),
    "another architecture": (lambda f: edit(f, model_type="gemma2"), ["model_type is 'gemma2'"]),
    "modules.json damaged": (
        lambda f: (f / "modules.json").write_text("[{}]"),
        ["modules.json is no list of modules"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_both_names(folder: Path, name: str) -> None:
    spoil, fragments = REFUSED[name]
    spoil(folder)
    with pytest.raises(UserError) as caught:
        open_weights(str(folder), hashed=False)
    text = str(caught.value)
    assert all(fragment in text for fragment in fragments), text
    assert str(folder) in text and "\n" not in text


@pytest.mark.parametrize(
    "name",
    ["theta", "theta in one spelling only", "factor", "scaled in 5, not in 4", "scaled in 4, not in 5"],
)
def test_the_message_says_what_transformers_reads(folder: Path, name: str) -> None:
    REFUSED[name][0](folder)
    read = AutoConfig.from_pretrained(folder).rope_parameters
    with pytest.raises(UserError) as caught:
        resolve(folder)
    text = str(caught.value)
    if name == "theta":
        assert f"={read['rope_theta']!r}, which transformers 5 reads" in text
    else:
        scaled = f"factor {read['factor']:g}" if read["rope_type"] == "llama3" else "not scaled"
        said = text[: text.index("), which transformers reads")]
        assert f"theta {read['rope_theta']:g}, {scaled}" in said and " and " not in said


def test_a_manifest_of_something_else_does_not_hide_a_model(folder: Path, plain: Path) -> None:
    (folder / "manifest.json").write_text('{"name": "a package"}')
    assert torch.equal(ours(folder), ours(plain))


def test_weights_of_another_pooling_start_a_training_and_are_not_published(folder: Path) -> None:
    pooled(folder, MAX)
    assert open_weights(str(folder), base=True).model == read_model_config(str(folder))
    assert resolve(folder).kind == "sentence-transformers"
    with pytest.raises(UserError, match="pooling by max"):
        open_weights(str(folder))


def test_a_causal_folder_that_is_run_as_bidirectional_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not when a training starts from it, nor where config.json says what it is; which then counts."""
    open_weights(str(folder), base=True)
    for changes in ({"is_causal": False}, {"use_bidirectional_attention": True}):
        edit(folder, "is_causal", "use_bidirectional_attention", **changes)
        open_weights(str(folder))
    assert "causal" not in capsys.readouterr().out
    edit(folder, "is_causal", "use_bidirectional_attention")
    assert not open_weights(str(folder)).model.is_causal
    assert f"note: {folder}: config.json does not say is_causal: false" in capsys.readouterr().out
    edit(folder, is_causal=True)
    assert open_weights(str(folder)).model.is_causal and "note" not in capsys.readouterr().out
