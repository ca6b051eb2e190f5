"""A turned model has transformers' own vectors, turned, and its first columns hold the most of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Server
from safetensors.torch import load_file, save_file
from tiny import MODEL, of_transformers, train_config, write_hf

from nemo_embed_core.checkpoint.manifest import read_manifest
from nemo_embed_core.checkpoint.turned_axes import TurnedAxes
from nemo_embed_core.checkpoint.weights import open_weights
from nemo_embed_core.config import DatasetConfig, LoraConfig, ModelConfig, TrainConfig
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.card import describe
from nemo_embed_core.model.spec import parameter_shapes
from nemo_embed_core.parallel.boxes import Box, unpadded
from nemo_embed_core.parallel.grad_norm import local_tensor
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train import principal_axes
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

# Of one a head is as wide as the model.
QWEN3 = dataclasses.replace(
    MODEL, model_type="qwen3", hidden_size=40, head_dim=40, num_attention_heads=2, num_key_value_heads=2
)
SHAPES = {
    "llama": dataclasses.replace(MODEL, hidden_size=56),
    "qwen2": dataclasses.replace(MODEL, model_type="qwen2", rope_scaling=None),
    "qwen3": dataclasses.replace(QWEN3, rope_scaling=None),
}


def write_base(folder: Path, shape: ModelConfig) -> Path:
    """With norms of unequal weights, some of them negative, and vectors that are far from one another."""
    write_hf(folder, torch.float32, config=shape)
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.copy_(torch.rand(tensor.shape, generator=draw) * 1.5 - 0.2)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * (1.0 if "embed" in name else 0.1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def configure(folder: Path, name: str, init_from: Path, steps: int = 0, **changes: Any) -> TrainConfig:
    options = {"init_axes": "principal", "checkpoint": {"resume": "auto"}, "optim": {"warmup_steps": 0}}
    options |= {"loss": {"matryoshka_dims": [40, 12]}, "precision": "fp32"}
    return train_config(
        folder, init_from=str(init_from), output_dir=str(folder / name), steps=steps, **{**options, **changes}
    )


def run(config: TrainConfig, dtype: torch.dtype | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    lines: list[str] = []
    with distributed(config.parallel, "cpu") as mesh:
        Trainer(config, mesh, prepare(config), log=lines.append, dtype=dtype).run()
    metrics = Path(config.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()], lines


def texts_of(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [row["query"] for row in rows] + [row["pos"][0] for row in rows]


@pytest.mark.parametrize("family, layers", [*((family, []) for family in SHAPES), ("llama", [1])])
def test_vectors_are_turned_and_their_first_columns_hold_the_most(
    family: str, layers: list[int], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "hf", SHAPES[family])
    config = configure(tmp_path, "run", base, loss={"in_batch": "positives", "matryoshka_dims": [32, 12]})
    (dataset,) = config.data.datasets
    data = dataclasses.replace(config.data, num_hard_negatives=0, datasets=[DatasetConfig(path=dataset.path)])
    # Every text once a step, and without a prompt.
    _, lines = run(dataclasses.replace(config, data=data, global_batch_size=61, init_layers=layers))
    texts = texts_of(tmp_path)
    rows = Embedder.load(tmp_path / "run", "cpu").encode(texts)
    expected, plain = (of_transformers(base, texts, layers, equal_norm) for equal_norm in (True, False))
    assert np.abs(rows @ rows.T - expected @ expected.T).max() < 1e-5, "angles are those of the base"
    assert np.abs(rows @ rows.T - plain @ plain.T).max() > 1e-3, "the final norm's weights do matter here"
    assert np.abs(rows - expected).max() > 0.05, "it is turned"
    held = np.square(rows).mean(0).cumsum()
    most = np.square(np.linalg.svd(expected)[1]).cumsum() / len(texts)
    assert np.abs(held - most).max() < 1e-5
    assert (np.diff(held, prepend=0)[:20] > np.diff(held)[:20]).all() and held[11] < 0.99, "no trivial case"
    (line,) = [line for line in lines if "init_axes=principal" in line]
    for dim in (12, 32):
        assert f"{dim} columns {held[dim - 1]:.1%}" in line
    (checkpoint,) = (tmp_path / "run").glob("step-*")
    assert read_manifest(checkpoint)["config"]["init_axes"] == "principal"
    assert "init_axes" in json.dumps(describe([open_weights(checkpoint)]))


@pytest.mark.parametrize("family", SHAPES)
def test_a_box_is_a_part_of_the_whole(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every edge of the parts that are turned at once."""
    monkeypatch.setattr("nemo_embed_core.checkpoint.turned_axes.ROWS", 7)
    shape = SHAPES[family]
    weights = open_weights(write_base(tmp_path / "hf", shape), base=True)
    axes_DD = torch.linalg.qr(torch.randn(shape.hidden_size, shape.hidden_size, dtype=torch.float64))[0]
    turned = TurnedAxes(weights.reader, shape, axes_DD)
    for name, whole_shape in parameter_shapes(shape).items():
        whole = turned.read_box(name, ((0,) * len(whole_shape), whole_shape))
        assert whole.shape == whole_shape
        box = tuple(n // 3 for n in whole_shape), tuple(n // 2 for n in whole_shape)
        part = turned.read_box(name, box)
        cut = whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]
        assert torch.allclose(part, cut, rtol=0, atol=1e-12), name
        plain = weights.reader.read_box(name, ((0,) * len(whole_shape), whole_shape)).double()
        if "o_proj" in name or "down_proj" in name:
            assert torch.allclose(axes_DD @ whole, plain, atol=1e-10), name
        elif name.endswith("layernorm.weight"):  # so that rates fit as they did
            assert torch.allclose(whole.double(), plain.square().mean().sqrt()), name


def begun(folder: str, name: str, layout: dict[str, Any]) -> dict[str, tuple[Box, torch.Tensor]]:
    """Of every parameter what this rank holds before the first step, and where."""
    config = configure(Path(folder), name, Path(folder) / "hf", 2, parallel=layout)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_tokens=120))
    prepared = prepare(config)
    torch.set_default_dtype(torch.float64)  # of the weights; the process is a fork that ends here
    with distributed(config.parallel, "cpu") as mesh:
        trainer = Trainer(config, mesh, prepared, log=lambda line: None, dtype=torch.float64)
        trainer.close()
        engine = trainer.engine
        boxes = {n: (engine.box(n), local_tensor(p).detach().clone()) for n, p in engine.trained()}
    return {name: (box, unpadded(tensor, box)) for name, (box, tensor) in boxes.items()}


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout",
    [
        {"tp_size": 2, "sequence_parallel": True},
        {"tp_size": 2, "sequence_parallel": False},
        {"dp_size": 2},
        {"dp_size": 2, "dp_replicate": 2},
        {"tp_size": 2, "dp_size": 2},
    ],
)
def test_every_layout_turns_alike(layout: dict[str, Any], server: Server, tmp_path: Path) -> None:
    """In several micro-batches, of which each rank has others."""
    write_base(tmp_path / "hf", MODEL)
    alone = server.results(begun, 1, str(tmp_path), "alone", {})[0]
    size = layout.get("tp_size", 1) * layout.get("dp_size", 1)
    for found in server.results(begun, size, str(tmp_path), "together", layout):
        assert found.keys() == alone.keys()
        for name, ((offset, sizes), held) in found.items():
            whole = alone[name][1][tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]
            assert (held - whole).abs().max() <= 1e-9 * whole.abs().max(), name


def test_axes_that_no_text_decides_are_decided() -> None:
    """Of vectors that lie in 5 of 32 columns, whichever way the sum is rounded."""
    x_ND = torch.nn.functional.pad(torch.randn(50, 5, dtype=torch.float64), (0, 27))
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    x_ND = x_ND @ turn
    noise = torch.randn(32, 32, dtype=torch.float64) * 1e-15
    one, other = (principal_axes._axes(s) for s in (x_ND.T @ x_ND, x_ND.T @ x_ND + noise + noise.T))
    assert (one - other).abs().max() < 1e-6
    assert torch.allclose(one.T @ one, torch.eye(32, dtype=torch.float64), atol=1e-12)
    assert (x_ND @ one)[:, 5:].abs().max() < 1e-5 and one.gather(0, one.abs().argmax(0)[None]).min() > 0


def test_a_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    base = write_base(tmp_path / "hf", MODEL)
    calm, _ = run(configure(tmp_path, "calm", base, 2))
    run(configure(tmp_path, "stopped", base, 1))
    stopped, lines = run(configure(tmp_path, "stopped", base, 2))
    assert [m["loss"] for m in stopped] == [m["loss"] for m in calm]
    assert not any("init_axes" in line for line in lines), "it is not turned again"
    with pytest.raises(UserError, match="began with init_axes=principal and this run has init_axes=own"):
        run(configure(tmp_path, "stopped", base, 3, init_axes="own"))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"init_from": ""}, "init_axes=principal are those of init_from's vectors: give that"),
        ({"lora": LoraConfig(rank=2)}, "init_axes=principal turns them: save the model first"),
    ],
)
def test_what_cannot_be_turned_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "hf", MODEL)
    with pytest.raises(UserError, match=says):
        dataclasses.replace(configure(tmp_path, "run", base, 1), **changes)
