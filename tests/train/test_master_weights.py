"""optim.master_weights=split: the masters of fp32, bit for bit, in every layout and every checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import Worker, config_for, final_state
from oracle import write_model
from safetensors.torch import load_file
from tiny import MODEL, to_hf, train_config

from nemo_embed_core.checkpoint.manifest import is_state, read_manifest
from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.checkpoint.weights import RandomReader, open_weights
from nemo_embed_core.errors import UserError
from nemo_embed_core.kernels.adamw import join_master
from nemo_embed_core.merge.stream import write_weights
from nemo_embed_core.parallel.grad_norm import local_tensor
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.engine import Engine
from nemo_embed_core.train.first_weights import fill_engine
from nemo_embed_core.train.optim import remainder_of, state_of
from nemo_embed_core.train.preflight import prepare

SPLIT: dict[str, Any] = {"master_weights": "split"}


def masters_and_moments(engine: Engine) -> list[list[torch.Tensor]]:
    """Of each parameter the master and the moments, in fp32."""
    found = []
    for p in engine.model.parameters():
        half = remainder_of(engine.optimizer, p)
        weight = local_tensor(p.detach())
        master = weight if half is None else join_master(weight, local_tensor(half))
        moments = [local_tensor(t) for t in state_of(engine.optimizer, p).values()]
        assert {t.dtype for t in (master, *moments)} == {torch.float32}
        found.append([t.clone() for t in (master, *moments)])
    return found


def same_bits(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return all(
        torch.equal(x.view(torch.int32), y.view(torch.int32))
        for xs, ys in zip(a, b, strict=True)
        for x, y in zip(xs, ys, strict=True)
    )


def take(engine: Engine, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    """A step with these gradients; their norm."""
    for p, gradient in zip(engine.model.parameters(), gradients, strict=True):
        p.grad_dtype, p.grad = torch.float32, torch.zeros_like(p, dtype=torch.float32)
        local_tensor(p.grad).copy_(gradient)
    norm = engine.clip()
    engine.update(lr)
    return norm


def test_two_hundred_updates_make_the_masters_of_fp32_and_a_refused_one_nothing(tmp_path: Path) -> None:
    options = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "clip_norm": 9.0}
    model = dataclasses.replace(MODEL, num_hidden_layers=1)
    with distributed(train_config(tmp_path).parallel, "cpu", MODEL) as mesh:
        engines = []
        for extra in ({}, SPLIT):
            config = train_config(tmp_path, precision="bf16", optim={**options, **extra})
            engines.append(Engine(config, model, mesh))
            fill_engine(engines[-1], RandomReader(model, 3))
        shapes = [local_tensor(p).shape for p in engines[0].model.parameters()]
        begin = masters_and_moments(engines[0])
        assert (
            same_bits(begin, masters_and_moments(engines[1]))
            and not begin[0][0].bfloat16().eq(begin[0][0]).all()
        )
        generator, norms = torch.Generator().manual_seed(0), []
        for step in range(200):
            scale = 10 ** (-3 + 2.5 * (step % 3) / 2)  # the last of three is clipped
            gradients = [scale * torch.randn(shape, generator=generator) for shape in shapes]
            first, second = (take(engine, gradients, 1e-3 * (1 + step % 5)).item() for engine in engines)
            assert first == second
            norms.append(first)
        assert min(norms) < 9.0 < max(norms)
        ends = [masters_and_moments(engine) for engine in engines]
        assert same_bits(*ends) and not same_bits(ends[0], begin)
        gradients[2].view(-1)[-1] = float("nan")
        for engine in engines:
            before = masters_and_moments(engine)
            assert take(engine, gradients, 1e-3).isnan()
            assert same_bits(before, masters_and_moments(engine))


def test_weights_that_run_in_fp32_have_no_halves(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="master_weights=split keeps weights in bf16, and this run computes in float32"
    ):
        prepare(train_config(tmp_path, optim=SPLIT))


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as bits."""
    reader = Reader(folder)
    shapes = {name: tuple(tensor["shape"]) for name, tensor in reader.manifest["tensors"].items()}
    assert {tensor["dtype"] for tensor in reader.manifest["tensors"].values()} == {"float32"}
    return {n: reader.read_box(n, ((0,) * len(s), s)).view(torch.int32) for n, s in shapes.items()}


@pytest.mark.dist
def test_checkpoints_have_the_masters_for_every_layout_and_either_way_of_keeping_them(
    tmp_path: Path, worker: Worker
) -> None:
    trained = config_for(tmp_path, "first", precision="bf16", steps=3, optim=SPLIT)
    assert worker.run(trained) == [0]
    newest = checkpoints(tmp_path / "first")[0]
    values = whole(newest)
    matrix = values["model.embed_tokens.weight"].view(torch.float32)
    assert not matrix.bfloat16().eq(matrix).all(), "masters are more than their bf16 halves"
    # Each takes up the one before, has nothing to train and saves.
    chain = [("split", 1, 2), ("fp32", 2, 1), ("split", 2, 1)]
    for i, (masters, tp, dp) in enumerate(chain):
        moved = dataclasses.replace(
            trained,
            output_dir=str(tmp_path / f"moved-{i}"),
            checkpoint=dataclasses.replace(trained.checkpoint, resume=str(newest)),
            optim=dataclasses.replace(trained.optim, master_weights=masters),
            parallel=dataclasses.replace(trained.parallel, tp_size=tp),
        )
        assert worker.run(moved, world_size=tp * dp) == [0] * (tp * dp)
        newest = checkpoints(tmp_path / f"moved-{i}")[0]
        layout = read_manifest(newest)["layout"]
        assert (layout["tp_size"], layout["dp_size"]) == (tp, dp)
        again = whole(newest)
        assert again.keys() == values.keys() and all(torch.equal(again[n], v) for n, v in values.items()), (
            masters, tp, dp,
        )  # fmt: skip
    # What is merged of it is the master, rounded to nearest even like any other.
    (tmp_path / "merged").mkdir()
    write_weights(tmp_path / "merged", [open_weights(newest)], torch.bfloat16)
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, bits in values.items():
        if not is_state(name):
            for hf_name, tensor in to_hf(name, bits.view(torch.float32), MODEL):
                assert torch.equal(merged[hf_name], tensor.bfloat16()), hf_name


@pytest.mark.dist
@pytest.mark.parametrize("layout", [{"dp_size": 2}, {"tp_size": 2}])
def test_a_run_with_split_masters_is_killed_and_ends_as_the_calm_one(
    tmp_path: Path, worker: Worker, layout: dict[str, int]
) -> None:
    changes: dict[str, Any] = {"steps": 6, "precision": "bf16", "optim": SPLIT, "parallel": layout}
    calm = config_for(tmp_path, "calm", **changes)
    assert worker.run(calm, world_size=2) == [0, 0]
    crashed = config_for(tmp_path, "crashed", **changes)
    for kill in ("step.optimizer@1", "save.model_written@3", "step.backward@5"):
        assert -9 in worker.run(crashed, fail=kill, world_size=2), kill
    assert worker.run(crashed, world_size=2) == [0, 0]
    assert final_state(tmp_path / "crashed", 6) == final_state(tmp_path / "calm", 6)


def test_a_run_with_split_masters_learns_what_one_in_fp32_learns(tmp_path: Path, worker: Worker) -> None:
    """The first step from bf16 weights is the same in every figure. Later ones are not bit for bit: of 65,536
    masters one lies between two bf16, which FSDP2 rounds to even and a half away from zero."""
    train_config(tmp_path)  # the tokenizer
    source = str(write_model(tmp_path / "model", 380, 96, dtype=torch.bfloat16, hidden_size=64))
    lines = []
    for masters in ("fp32", "split"):
        optim = {"master_weights": masters, "lr": 1e-3}
        config = config_for(
            tmp_path,
            masters,
            precision="bf16",
            init_from=source,
            steps=4,
            optim=optim,
            loss={"temperature": 0.2},
        )
        assert worker.run(config) == [0]
        text = (tmp_path / masters / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    for name in ("loss", "grad_norm", "positive_similarity", "negative_similarity"):
        first, *rest = [(a[name], b[name]) for a, b in zip(*lines, strict=True)]
        assert first[0] == first[1], name
        assert all(abs(a - b) <= 0.01 * abs(a) for a, b in rest), (name, rest)
    assert lines[0][1]["loss"] != lines[0][0]["loss"]
