"""Runs with LoRA: what their checkpoints hold, who reads them and as what, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forked import Server
from oracle import write_model
from safetensors.torch import load_file, save_file
from tiny import MODEL, train_config, write_tokenizer

from nemo_embed_core.checkpoint.adapter import AdaptedReader, Adapter
from nemo_embed_core.checkpoint.manifest import CheckpointError, read_manifest
from nemo_embed_core.checkpoint.weights import open_weights, write_values
from nemo_embed_core.config import TrainConfig
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.errors import UserError
from nemo_embed_core.merge.merge import merge
from nemo_embed_core.merge.stream import write_weights
from nemo_embed_core.model.attention import Segments
from nemo_embed_core.parallel.grad_norm import local_tensor
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

TEXTS = ["alpha beta river", "moon violin copper engine and more of it", "cat"]
# GQA with R = 2, and MLP blocks: no row of B is where a plain stacking would have it.
LORA = {"rank": 3, "alpha": 12.0}


def configure(folder: Path, name: str, **changes: Any) -> TrainConfig:
    base = {
        "init_from": str(folder / "hf"), "output_dir": str(folder / name), "steps": 4, "seed": 5,
        "lora": LORA, "optim": {"lr": 3e-2, "warmup_steps": 0},
        "checkpoint": {"every": 2, "keep": 9, "async_save": False},
    }  # fmt: skip
    return train_config(folder, **(base | changes))


def train(config: TrainConfig) -> None:
    with distributed(config.parallel, "cpu") as mesh:
        Trainer(config, mesh, prepare(config), log=lambda message: None).run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in bf16, and a run of LoRA on it."""
    root = tmp_path_factory.mktemp("lora")
    shape = {name: getattr(MODEL, name) for name in ("hidden_size", "num_hidden_layers", "head_dim")}
    write_model(root / "hf", MODEL.vocab_size, MODEL.intermediate_size, torch.bfloat16, **shape)
    write_tokenizer(root / "hf")
    train(configure(root, "run"))
    return root


def by_hand(folder: Path, run: Path) -> dict[str, torch.Tensor]:
    """{Hugging Face name: W + s B A in fp64}: rows of B by the order that docs/checkpoint-format.md gives."""
    found = {n: w.double() for n, w in load_file(folder / "hf/model.safetensors").items()}
    factors = {n: w.double() for n, w in load_file(run / "model-00000-of-00001.safetensors").items()}
    H, G, A = MODEL.num_attention_heads, MODEL.num_key_value_heads, MODEL.head_dim
    F = MODEL.intermediate_size
    for i in range(MODEL.num_hidden_layers):
        for layer, block in (("self_attn.qkv_proj", (H // G + 2) * A), ("mlp.gate_up_proj", 2 * F // G)):
            pair = [factors[f"model.layers.{i}.{layer}.lora.{x}"] for x in "BA"]
            rows = (LORA["alpha"] / LORA["rank"] * pair[0] @ pair[1]).view(G, block, MODEL.hidden_size)
            if layer.startswith("self"):
                ends = [0, H // G * A, (H // G + 1) * A, block]
                names = [f"self_attn.{x}_proj" for x in "qkv"]
            else:
                ends, names = [0, F // G, 2 * F // G], ["mlp.gate_proj", "mlp.up_proj"]
            for name, low, high in zip(names, ends, ends[1:], strict=False):
                found[f"layers.{i}.{name}.weight"] += rows[:, low:high].reshape(-1, MODEL.hidden_size)
        for layer in ("self_attn.o_proj", "mlp.down_proj"):
            pair = [factors[f"model.layers.{i}.{layer}.lora.{x}"] for x in "BA"]
            found[f"layers.{i}.{layer}.weight"] += LORA["alpha"] / LORA["rank"] * pair[0] @ pair[1]
    return found


def written(folder: Path, name: str, sources: list[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a merge writes, without its proof."""
    (folder / name).mkdir()
    write_weights(folder / name, [open_weights(source, hashed=False) for source in sources], dtype)
    return load_file(folder / name / "model.safetensors")


def test_every_reader_has_the_folded_model(folder: Path) -> None:
    """Checkpoints hold adapters alone. Vectors, merged folders, averages and a run that starts from it are of
    W + s B A, each value the nearest of its dtype."""
    run = folder / "run/step-00000004"
    manifest = read_manifest(run)
    kinds = {name.split("/")[-1].rpartition(".")[2] for name in manifest["tensors"]}
    assert kinds == {"A", "B"} and len(manifest["tensors"]) == 3 * 2 * 4 * MODEL.num_hidden_layers
    want = by_hand(folder, run)
    models = {}
    for kind in (torch.bfloat16, torch.float32):
        got = models[kind] = written(folder, f"{kind}", [run], kind)
        assert got.keys() == want.keys()
        for name, value in want.items():
            error = (got[name].double() - value).abs()
            ends = [torch.nextafter(got[name], torch.full_like(got[name], end)) for end in (-9e9, 9e9)]
            gap = torch.stack([(end.double() - value).abs() for end in ends]).amin(0)
            # A value in the middle of two, as fp64 has it, may be either.
            assert (error <= gap * (1 + 1e-12)).all(), f"{name} is not the nearest {kind}"
    shutil.copytree(folder / "hf", folder / "folded")
    for precision, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        save_file(models[kind], folder / "folded/model.safetensors", {"format": "pt"})
        rows = [Embedder.load(path, "cpu", precision).encode(TEXTS) for path in (run, folder / "folded")]
        assert np.array_equal(*rows), precision
    base = Embedder.load(folder / "hf", "cpu", "fp32").encode(TEXTS)
    assert np.abs(Embedder.load(run, "cpu", "fp32").encode(TEXTS) - base).max() > 1e-2

    plain = load_file(folder / "hf/model.safetensors")
    for name, w in written(folder, "mean", [run, folder / "hf"], torch.float32).items():
        assert (w - (want[name] + plain[name].double()) / 2).abs().max() < 1e-7, name

    train(configure(folder, "full", init_from=str(run), lora={"rank": 0}, steps=0))
    again = Embedder.load(folder / "full", "cpu", "fp32")
    assert np.array_equal(again.encode(TEXTS), Embedder.load(run, "cpu", "fp32").encode(TEXTS))


def test_peft_has_the_adapters(folder: Path) -> None:
    """Tensors under peft's names, whose products are what is folded; where peft is installed, its model's
    hidden states are the merged folder's."""
    run, out = folder / "run/step-00000004", folder / "adapter"
    merge(run, out, format="peft", say=lambda line: None)
    settings = json.loads((out / "adapter_config.json").read_text())
    scale, tensors = settings["lora_alpha"] / settings["r"], load_file(out / "adapter_model.safetensors")
    base, want = load_file(folder / "hf/model.safetensors"), by_hand(folder, run)
    adapted = {name for name in want if name.endswith("_proj.weight")}
    assert {name.rsplit(".", 2)[1] for name in adapted} == {*settings["target_modules"]}
    assert len(tensors) == 2 * len(adapted) and settings["lora_dropout"] == 0.0
    for name in adapted:
        A, B = (
            tensors[f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight"].double() for x in "AB"
        )
        assert (base[name].double() + scale * B @ A - want[name]).abs().max() < 1e-12, name
    assert str(folder) not in (out / "README.md").read_text() + (out / "adapter_config.json").read_text()

    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder / "hf")
    config.is_causal = False
    model = AutoModel.from_pretrained(folder / "hf", config=config, dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(model, out).double().eval()
    ids = torch.arange(2, 90).view(2, 44)
    with torch.no_grad():
        got = model(input_ids=ids).last_hidden_state
        with model.disable_adapter():
            base_hidden = model(input_ids=ids).last_hidden_state
        folded = AutoModel.from_config(config, dtype=torch.float64)
        folded.load_state_dict(want)
        wanted = folded(input_ids=ids).last_hidden_state
    assert (got - wanted).abs().max() < 1e-6 * wanted.abs().max() < (base_hidden - wanted).abs().max()


def test_only_adapters_go_to_peft(folder: Path) -> None:
    for sources, says in (([folder / "hf"], "holds a whole model"), ([folder / "run"] * 2, "of one run")):
        with pytest.raises(UserError, match=says):
            merge(sources, folder / "no", format="peft", say=lambda line: None)
    assert not (folder / "no").exists()


def test_folding_rounds_once(tmp_path: Path) -> None:
    """1 + 2^-8 + 2^-30 is nearest to 1 + 2^-7 in bf16, and in fp32 on the middle between that and 1."""
    name = "model.layers.0.self_attn.o_proj"
    model = dataclasses.replace(MODEL, num_hidden_layers=1)
    factors = {
        f"{name}.lora.A": torch.full((1, 128), 2**-9 + 2**-31), f"{name}.lora.B": torch.ones(64, 1),
    }  # fmt: skip
    # Only rows 8 and 9 of columns 16 to 19 are these; all of rows 3 to 7 are four times as much.
    factors[f"{name}.lora.B"][[*range(8), *range(10, 64)]] = 4
    factors[f"{name}.lora.A"][:, [*range(16), *range(20, 128)]] = 0
    read = SimpleNamespace(folder=tmp_path, manifest={}, read_box=lambda name, box: factors[name])
    base: Any = SimpleNamespace(
        reader=SimpleNamespace(read_box=lambda name, box: torch.ones(box[1], dtype=torch.bfloat16))
    )
    adapter = Adapter(rank=1, alpha=2.0, targets=["o_proj"], base="", files={})
    reader: Any = AdaptedReader(read, base, adapter, model)  # type: ignore[arg-type]
    values = reader.read_box(f"{name}.weight", ((8, 16), (2, 4)))
    assert values.shape == (2, 4) and (values == 1 + 2**-8 + 2**-30).all()
    assert (values.float().bfloat16() == 1).all()
    out = torch.empty(2, 4, dtype=torch.bfloat16)
    write_values(values, out)
    assert (out == 1 + 2**-7).all()
    delta = reader.delta("layers.0.self_attn.o_proj.weight", 3, 5)
    assert (delta[:, 16:20] == 2**-6 + 2**-28).all() and delta.count_nonzero() == 5 * 4


def resume(folder: str, name: str, steps: int, parallel: dict[str, Any], dropout: float) -> list[float]:
    import torch.distributed as dist

    from nemo_embed_core.parallel.mesh import build_mesh

    dist.init_process_group("gloo")
    config = configure(
        Path(folder), name, steps=steps, parallel=parallel,
        checkpoint={"every": 2, "keep": 9, "resume": "auto"},
        optim={"lr": 3e-2, "min_lr": 3e-2, "warmup_steps": 0, "eps": 1e-3},
        lora={**LORA, "dropout": dropout},
    )  # fmt: skip
    p = config.parallel
    mesh = build_mesh(
        torch.device("cpu"),
        dist.get_world_size() // p.tp_size,
        p.tp_size,
        p.sequence_parallel,
        p.dp_replicate,
    )
    trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
    trainer.run()
    lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    from nemo_embed_core.checkpoint.reader import Reader

    reader = Reader(folder)
    shapes = {name: tuple(t["shape"]) for name, t in reader.manifest["tensors"].items()}
    return {name: reader.read_box(name, ((0, 0), shape)) for name, shape in shapes.items()}


@pytest.mark.dist
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_goes_on_in_another_layout(folder: Path, server: Server, dropout: float) -> None:
    """Factors, their moments and masks: tp 2 with sequence parallelism, then dp 2, as one rank throughout."""
    calm, moved = f"calm-{dropout}", f"moved-{dropout}"
    losses = server.results(resume, 1, str(folder), calm, 4, {}, dropout)[0]
    assert len(losses) == 4
    server.results(resume, 2, str(folder), moved, 2, {"tp_size": 2}, dropout)
    others = server.results(resume, 2, str(folder), moved, 4, {"dp_size": 2}, dropout)[0]
    assert np.abs(np.array(others) - losses).max() < 1e-4
    want, got = (values_of(folder / name / "step-00000004") for name in (calm, moved))
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 1e-3 * value.abs().max(), name
    assert read_manifest(folder / moved / "step-00000004")["layout"]["dp_size"] == 2


def test_only_training_has_dropout(folder: Path) -> None:
    """Vectors while it trains, before and after a step, are those of a run without it; the steps are not. Its
    adapters tell peft the rate, and a run may go on with another one."""
    ids, bounds = torch.arange(20), torch.tensor([0, 8, 20], dtype=torch.int32)
    positions = torch.cat([torch.arange(8), torch.arange(12)])
    segments, found = Segments(bounds, [8, 12], 12), {}
    for name, dropout in (("wet", 0.4), ("dry", 0.0)):
        config = configure(folder, name, lora={**LORA, "dropout": dropout}, steps=2)
        with distributed(config.parallel, "cpu") as mesh:
            trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
            engine = trainer.engine
            losses = [trainer.train_step()[0]["loss"] for _ in range(2)]
            generator = torch.Generator().manual_seed(0)
            for _, p in engine.trained():
                local_tensor(p).copy_(0.3 * torch.rand(p.shape, generator=generator) - 0.15)
            with engine.encoding(), torch.no_grad():
                rows = engine.model(ids, positions, segments)
            with torch.no_grad():
                training = [engine.model(ids, positions, segments) for _ in range(2)]
            trainer.close()
        found[name] = losses, rows, training
    (wet, rows, training), (dry, others, plain) = found.values()
    assert torch.equal(rows, others) and torch.equal(plain[0], others)
    assert torch.equal(*training) and (training[0] - rows).abs().max() > 1e-2
    assert wet[0] == dry[0] and abs(wet[1] - dry[1]) > 1e-5, "B is 0 in the first step"

    train(configure(folder, "wet", lora={**LORA, "dropout": 0.4}, steps=2))
    merge(folder / "wet", folder / "wet-adapter", format="peft", say=lambda line: None)
    assert json.loads((folder / "wet-adapter/adapter_config.json").read_text())["lora_dropout"] == 0.4
    again = configure(folder, "wet", lora={**LORA, "dropout": 0.1}, checkpoint={"resume": "auto"})
    train(again)
    assert read_manifest(folder / "wet/step-00000004")["config"]["lora"]["dropout"] == 0.1


@pytest.mark.parametrize("precision, off", [("bf16", 0.1), ("fp8", 0.5)])
def test_lower_precision_computes_about_the_same(
    folder: Path, precision: str, off: float, tmp_path: Path
) -> None:
    """The base is kept in bf16, the factors in fp32 and so their gradients; masks are those of fp32."""
    shutil.copytree(folder / "hf", tmp_path / "hf")
    norms = []
    for kind in ("fp32", precision):
        config = configure(
            tmp_path, kind, precision=kind, activation_checkpointing="selective",
            loss={"temperature": 0.3}, optim={"lr": 1e-3, "warmup_steps": 0}, lora={**LORA, "dropout": 0.3},
        )  # fmt: skip
        with distributed(config.parallel, "cpu") as mesh:
            trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
            norms.append([trainer.train_step()[0]["grad_norm"] for _ in range(3)])
            for name, p in trainer.engine.model.named_parameters():
                is_factor = ".lora." in name
                wide = is_factor or kind == "fp32"
                assert p.dtype == (torch.float32 if wide else torch.bfloat16), name
                assert (p.grad is not None) == is_factor == p.requires_grad, name
            trainer.close()
    assert np.abs(np.array(norms[1]) / norms[0] - 1).max() < off, norms


def test_a_base_that_is_not_the_same_is_refused(folder: Path, tmp_path: Path) -> None:
    """By who reads it, also without hashing first, and by the run that goes on."""
    root = tmp_path / "moved"
    shutil.copytree(folder / "hf", root / "hf")
    train(configure(root, "run", steps=2))
    run = root / "run"
    assert open_weights(run).digest != open_weights(root / "hf").digest
    shutil.move(root / "hf", root / "away")
    for read in (Embedder.load, lambda path: open_weights(path, hashed=False)):
        with pytest.raises(CheckpointError, match=r"LoRA adapters alone, of .*hf, which is not there"):
            read(run)
    shutil.copytree(root / "away", root / "hf")
    weights = load_file(root / "hf/model.safetensors")
    weights["layers.1.mlp.up_proj.weight"][5, 7] += 1
    save_file(weights, root / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"other weights than those of .*hf: model.safetensors"):
        Embedder.load(run, "cpu")
    with pytest.raises(CheckpointError, match=r"sha256 differs"):
        written(root, "out", [run], torch.float32)
    goes_on = configure(root, "run", checkpoint={"resume": "auto"})
    with pytest.raises(CheckpointError, match=r"other weights than those of .*hf: model.safetensors"):
        train(goes_on)
    train(dataclasses.replace(goes_on, init_from=str(root / "away")))  # it may lie elsewhere
    assert read_manifest(run / "step-00000004")["adapter"]["base"] == str((root / "away").resolve())
    Embedder.load(run, "cpu")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"lora": {"rank": -1}}, "lora.rank=-1 must not be negative"),
        ({"lora": {"rank": 2, "alpha": 0.0}}, r"lora.alpha=0.0 positive"),
        ({"lora": {"rank": 2, "targets": ["q_proj"]}}, "has 'q_proj'; it takes qkv_proj, o_proj"),
        ({"lora": {"rank": 2, "targets": []}}, "must be one or more different layers"),
        ({"lora": {"rank": 2, "targets": ["o_proj", "o_proj"]}}, "must be one or more different layers"),
        ({"lora": {"rank": 2, "dropout": 1.0}}, r"lora.dropout=1.0 must be 0 or more and below 1"),
        ({"lora": {"rank": 2, "dropout": -0.1}}, r"lora.dropout=-0.1 must be 0 or more"),
        ({"lora": {"rank": 0, "dropout": 0.1}}, r"0 where there are no adapters \(lora.rank=0\)"),
        ({"lora": {"rank": 65}}, r"lora.rank=65 is more than .*qkv_proj.weight has, 256 x 64"),
        ({"init_from": ""}, "and that is not set"),
        ({"init_layers": [0]}, r"init_layers=\[0\] leaves some out"),
        ({"precision": "bf16", "optim": {"master_weights": "split"}}, "nothing to split"),
        ({"init_from": "run"}, "holds LoRA adapters itself, of .*hf; make one model"),
        ({"output_dir": "run", "lora": {"rank": 4}}, r"holds LoRA adapters \(rank=3, alpha=12.*is rank=4, a"),
        ({"output_dir": "run", "lora": {"rank": 3, "alpha": 6.0}}, r"alpha=12, .* is rank=3, alpha=6"),
        ({"output_dir": "run", "lora": {"rank": 0}}, r"holds LoRA adapters .* has no lora: continue as"),
        ({"output_dir": "plain"}, "holds a whole model and this run lora is rank=3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    for name in ("init_from", "output_dir"):
        if changes.get(name):
            changes = changes | {name: str(folder / changes[name]), "checkpoint": {"resume": "auto"}}
    if changes.get("output_dir", "").endswith("plain") and not (folder / "plain").exists():
        train(configure(folder, "plain", lora={"rank": 0}, steps=0))
    with pytest.raises(UserError, match=says):
        prepare(configure(folder, "refused", **changes))


@pytest.mark.slow
def test_a_merge_of_adapters_is_proven(folder: Path) -> None:
    """In transformers and sentence-transformers, with a card that says what was trained."""
    merge(folder / "run", folder / "proven", say=lambda line: None)
    assert "lora.rank" in (folder / "proven/README.md").read_text()
