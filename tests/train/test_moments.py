"""optim.moments: what bf16 and 8 bits keep of AdamW's moments, in every layout, checkpoint and resume."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crash import Worker, config_for, final_state
from forked import Server
from oracle import write_model
from tiny import MODEL, train_config

from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.checkpoint.weights import RandomReader
from nemo_embed_core.config import ModelConfig, OptimConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.spec import parameter_shapes, tp_dim, tp_unit
from nemo_embed_core.parallel.boxes import local_box, unpadded
from nemo_embed_core.parallel.fsdp import plain_name
from nemo_embed_core.parallel.grad_norm import local_tensor
from nemo_embed_core.parallel.mesh import Mesh, build_mesh, distributed
from nemo_embed_core.train.engine import Engine
from nemo_embed_core.train.first_weights import fill_engine
from nemo_embed_core.train.optim import STATE, place_of, state_of, update_bytes

ROUNDED = ("bf16", "8bit")
# tp 2 pads the vocabulary and the MLP, whose blocks of 33 columns do not divide by it; dp 2 cuts uneven rows.
EIGHT_B = ModelConfig(num_hidden_layers=1)
ODD = dataclasses.replace(MODEL, vocab_size=511, intermediate_size=99, num_hidden_layers=1)


def optim(moments: str, **more: Any) -> dict[str, Any]:
    return {"master_weights": "fp32" if moments == "fp32" else "split", "moments": moments, **more}


def test_rounded_moments_of_fp32_masters_are_refused() -> None:
    with pytest.raises(UserError, match=r"moments=8bit needs optim\.master_weights=split: torch's AdamW"):
        OptimConfig(moments="8bit")


def test_bytes_of_an_update() -> None:
    split = {m: update_bytes(OptimConfig(**optim(m, master_weights="split")), 2) for m in ("fp32", *ROUNDED)}
    assert split == {"fp32": 26, "bf16": 18, "8bit": 14 + 4 * 2 / 256}
    assert update_bytes(OptimConfig()) == 28


@pytest.mark.parametrize(
    "model", [EIGHT_B, MODEL, ODD, dataclasses.replace(MODEL, intermediate_size=11008, hidden_size=3200)]
)
def test_no_layout_cuts_a_block(model: ModelConfig) -> None:
    for name, shape in parameter_shapes(model).items():
        unit = tp_unit(name, model)
        for tp, dp in itertools.product((1, 2, 4, 8), (1, 3, 8)):
            if model.num_key_value_heads % tp:
                continue
            for tp_rank, dp_rank in itertools.product(range(tp), range(dp)):
                box = local_box(shape, tp_dim(name), tp_rank, tp, dp_rank, dp, unit)
                place = place_of(name, shape, box, model)
                if len(shape) == 1:
                    assert place is None
                    continue
                assert place is not None and 1 <= place.block <= 256
                offset, size = box[0][1], box[1][1]
                assert offset % place.block == size % place.block == 0, (name, tp, place)
                assert place.block == place_of(name, shape, ((0, 0), shape), model).block, (
                    "of the shape alone"
                )
                assert not all(box[1]) or divmod(place.first, shape[1]) == box[0]
    if model == EIGHT_B:
        blocks = {
            place_of(n, s, ((0, 0), s), model).block for n, s in parameter_shapes(model).items() if len(s) > 1
        }
        assert blocks == {256}


def states_after(folder: str, tp: int, dp: int) -> list[dict[str, Any]]:
    """Some updates with gradients that are functions of the element in the whole: what each rank holds then,
    with its boxes, for each kind of moments."""
    dist.init_process_group("gloo")
    mesh = build_mesh(torch.device("cpu"), dp, tp, tp > 1)
    return [_states_after(folder, mesh, moments) for moments in ROUNDED]


def _states_after(folder: str, mesh: Mesh, moments: str) -> dict[str, Any]:
    options = optim(moments, clip_norm=0.0, weight_decay=0.1, beta2=0.99)
    parallel = {"tp_size": mesh.tp.size, "dp_size": mesh.dp_size}
    config = train_config(Path(folder), precision="bf16", optim=options, parallel=parallel, seed=5)
    engine = Engine(config, ODD, mesh)
    fill_engine(engine, RandomReader(ODD, 3))
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        whole = {n: torch.randn(s, generator=generator) for n, s in parameter_shapes(ODD).items()}
        for full_name, p in engine.model.named_parameters():
            name = plain_name(full_name)
            box = engine.box(name)
            p.grad_dtype, p.grad = torch.float32, torch.zeros_like(p, dtype=torch.float32)
            mine = whole[name][tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]
            unpadded(local_tensor(p.grad), box).copy_(mine)
        engine.factor = torch.ones(())
        engine.update(1e-2 * (1 + step))
    found = {}
    for full_name, p in engine.model.named_parameters():
        state = engine.optimizer.state[p]
        kept = {"weight": p.detach(), **state}
        found[plain_name(full_name)] = (
            engine.box(plain_name(full_name)),
            {k: local_tensor(t).clone() for k, t in kept.items()},
        )
    return found


@pytest.mark.dist
def test_every_layout_rounds_alike(tmp_path: Path, server: Server) -> None:
    train_config(tmp_path)
    (alone,) = server.results(states_after, 1, str(tmp_path), 1, 1)
    ranks = server.results(states_after, 4, str(tmp_path), 2, 2)
    shapes = parameter_shapes(ODD)
    for i, whole in enumerate(alone):
        for name, (_, kept) in whole.items():
            types = [kept[state].dtype for state in STATE]
            rounded = [torch.bfloat16] * 2 if ROUNDED[i] == "bf16" else [torch.int8, torch.uint8]
            assert types == ([torch.float32] * 2 if len(shapes[name]) == 1 else rounded), name
        for rank in ranks:
            for name, ((offset, size), kept) in rank[i].items():
                for what, tensor in kept.items():
                    want = whole[name][1][what]
                    block = shapes[name][-1] // want.shape[-1]
                    at = [slice(o, o + n) for o, n in zip(offset, size, strict=True)]
                    at[-1] = slice(at[-1].start // block, at[-1].stop // block)
                    mine = tensor[tuple(slice(0, s.stop - s.start) for s in at)]
                    assert torch.equal(mine, want[tuple(at)]), (ROUNDED[i], name, what)


def test_every_update_parameter_and_run_rounds_in_another_way(tmp_path: Path) -> None:
    """One gradient for all: what is near each of two bf16 is a pattern that only random bits make."""
    patterns = []
    with distributed(train_config(tmp_path).parallel, "cpu", MODEL) as mesh:
        for seed in (5, 6):
            config = train_config(tmp_path, precision="bf16", optim=optim("bf16", clip_norm=0.0), seed=seed)
            engine = Engine(config, MODEL, mesh)
            fill_engine(engine, RandomReader(MODEL, 3))
            matrices = [p for n, p in engine.model.named_parameters() if n.endswith("qkv_proj.weight")]
            for _ in range(2):
                for p in engine.model.parameters():
                    p.grad_dtype, p.grad = torch.float32, torch.full_like(p, 0.3, dtype=torch.float32)
                    for moment in state_of(engine.optimizer, p).values():
                        moment.zero_()
                engine.factor = torch.ones(())
                engine.update(1e-3)
                for p in matrices:
                    patterns += [local_tensor(t).clone() for t in state_of(engine.optimizer, p).values()]
    assert len(patterns) == 16
    for pattern in patterns:
        assert len(pattern.unique()) == 2
    signs = [(pattern == pattern.max()).double().flatten() for pattern in patterns]
    together = torch.corrcoef(torch.stack(signs)) - torch.eye(16)
    assert together.abs().max() < 5 / signs[0].numel() ** 0.5


@pytest.mark.dist
@pytest.mark.parametrize(("moments", "layout"), [("bf16", {"dp_size": 2}), ("8bit", {"tp_size": 2})])
def test_a_killed_run_ends_as_the_calm_one(
    tmp_path: Path, worker: Worker, moments: str, layout: dict[str, int]
) -> None:
    changes: dict[str, Any] = {"steps": 5, "precision": "bf16", "optim": optim(moments), "parallel": layout}
    calm = config_for(tmp_path, "calm", **changes)
    assert worker.run(calm, world_size=2) == [0, 0]
    crashed = config_for(tmp_path, "crashed", **changes)
    assert -9 in worker.run(crashed, fail="step.backward@4", world_size=2)
    assert worker.run(crashed, world_size=2) == [0, 0]
    assert final_state(tmp_path / "crashed", 5) == final_state(tmp_path / "calm", 5)


def whole_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = Reader(folder)
    shapes = {name: tuple(tensor["shape"]) for name, tensor in reader.manifest["tensors"].items()}
    assert {tensor["dtype"] for tensor in reader.manifest["tensors"].values()} == {"float32"}
    return {n: reader.read_box(n, ((0,) * len(s), s)) for n, s in shapes.items()}


@pytest.mark.dist
def test_checkpoints_go_from_one_kind_to_another_and_to_every_layout(tmp_path: Path, worker: Worker) -> None:
    """Each takes up the one before, has nothing to train and saves. To the same kind nothing is lost, in any
    layout; to bf16 or 8 bits each value is rounded to nearest once; to fp32 nothing."""
    first = config_for(tmp_path, "first", precision="bf16", steps=2, optim=optim("fp32"))
    assert worker.run(first) == [0]
    newest = checkpoints(tmp_path / "first")[0]
    values = whole_of(newest)
    chain = [
        ("bf16", 1, 2), ("bf16", 2, 1), ("fp32", 1, 1), ("8bit", 2, 1), ("8bit", 1, 2), ("8bit", 1, 1),
        ("fp32", 1, 2),
    ]  # fmt: skip
    for i, (moments, tp, dp) in enumerate(chain):
        moved = dataclasses.replace(
            first, output_dir=str(tmp_path / f"moved-{i}"),
            checkpoint=dataclasses.replace(first.checkpoint, resume=str(newest)),
            optim=dataclasses.replace(first.optim, **optim(moments)),
            parallel=dataclasses.replace(first.parallel, tp_size=tp),
        )  # fmt: skip
        assert worker.run(moved, world_size=tp * dp) == [0] * (tp * dp)
        newest = checkpoints(tmp_path / f"moved-{i}")[0]
        again, changed = whole_of(newest), 0
        assert again.keys() == values.keys()
        for name, was in values.items():
            now, rounded = again[name], i in (0, 3) and name.startswith(STATE) and was.ndim == 2
            if rounded and moments == "bf16":
                was = was.bfloat16().float()
            if rounded and moments == "8bit":
                gap = 2.0 ** (was.abs().clamp(min=1e-40).log2().floor() - 3)
                least = was.abs().max() * 2.0 ** (-31 if "sq" in name else -15)
                assert bool(((now - was).abs() <= torch.maximum(gap / 2, least)).all()), name
                assert bool(((was > 0) <= (now > 0)).all()) or "sq" not in name
                changed += int((now != was).sum())
            else:
                assert torch.equal(now.view(torch.int32), was.view(torch.int32)), (i, name)
        assert changed > 1000 or i != 3
        values = again


def test_a_run_learns_what_one_with_fp32_moments_learns(tmp_path: Path, worker: Worker) -> None:
    """Every loss is within 0.005, on the way from 1.7 to 0.02."""
    train_config(tmp_path)  # the tokenizer
    source = str(write_model(tmp_path / "model", 380, 96, dtype=torch.bfloat16, hidden_size=64))
    losses = []
    for moments in ("fp32", *ROUNDED):
        config = config_for(
            tmp_path, moments, precision="bf16", init_from=source, steps=12, loss={"temperature": 0.2},
            optim=optim(moments, master_weights="split", lr=1e-3), checkpoint={"every": 100},
        )  # fmt: skip
        assert worker.run(config) == [0]
        text = (tmp_path / moments / "metrics.jsonl").read_text()
        losses.append([json.loads(line)["loss"] for line in text.splitlines()])
    exact, *others = losses
    assert exact[0] > 1.5 and exact[-1] < 0.03
    for other in others:
        assert other[1] != exact[1] or other[2] != exact[2]
        assert all(abs(a - b) < 0.005 for a, b in zip(exact, other, strict=True))
