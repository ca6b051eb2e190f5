"""A projection to a teacher's vectors outlives its process, bit for bit and under another layout, and is no
part of a model; what it is in a step is test_oracle's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server
from safetensors import safe_open
from tiny import MODEL, train_config
from toy_mining import FakeEmbedder, mine

from nemo_embed_core.checkpoint.manifest import read_manifest
from nemo_embed_core.config import DatasetConfig, LossConfig, OptimConfig, TrainConfig
from nemo_embed_core.data.readers import read_rows
from nemo_embed_core.data.shapes import Shape
from nemo_embed_core.errors import UserError
from nemo_embed_core.loss.contrastive import Groups
from nemo_embed_core.loss.distill import teacher_vectors
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.plan.pretend import pretend
from nemo_embed_core.train.learned import Projection
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

LOSS = {"temperature": 0.1, "teacher_vectors_weight": 0.5, "teacher_vectors_lr": 0.01}


def configure(folder: Path, name: str, steps: int, teacher: str = "fake", **changes: Any) -> TrainConfig:
    work = folder / f"{teacher}.jsonl.work"
    config = train_config(
        folder, output_dir=str(folder / name), steps=steps, checkpoint={"resume": "auto", "every": 1},
        optim={"warmup_steps": 0, "min_lr": 1e-5}, **{"loss": LOSS, **changes},
    )  # fmt: skip  # a constant rate, whatever steps is
    (dataset,) = config.data.datasets
    if not work.exists():
        given = read_rows(DatasetConfig(path=dataset.path))
        embedder = FakeEmbedder(40 if teacher == "wide" else 24, teacher)
        mine(given, folder / f"{teacher}.jsonl", embedder, num_negatives=2)
    dataset = replace(dataset, teacher_vectors=str(work))
    return replace(config, data=replace(config.data, datasets=[dataset]))


def run(config: TrainConfig, lines: list[str] | None = None) -> list[dict[str, Any]]:
    with distributed(config.parallel, "cpu") as mesh:
        log = (lines if lines is not None else []).append
        Trainer(config, mesh, prepare(config), log=log).run()
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name.endswith("teacher_projection"):
                    assert name not in found, "written twice"
                    found[name] = stored.get_tensor(name)
    return found


def test_a_resumed_run_goes_on_with_the_projection_and_its_moments(tmp_path: Path) -> None:
    calm = run(configure(tmp_path, "calm", 4))
    run(configure(tmp_path, "stopped", 2))
    stopped = run(configure(tmp_path, "stopped", 4))
    assert [m["losses"] for m in stopped] == [m["losses"] for m in calm]
    assert all(m["losses"].keys() == {"info_nce", "teacher_vectors"} for m in calm)
    assert calm[3]["losses"]["teacher_vectors"] < calm[0]["losses"]["teacher_vectors"] < 2
    ends = [tmp_path / name / "step-00000004" for name in ("calm", "stopped")]
    held = read_manifest(ends[1])["teacher_vectors"]
    assert held == {"models": ["fake"], "columns": 24, "updates": 4}
    one, other = map(tensors_of, ends)
    assert one.keys() == {f"{state}/teacher_projection" for state in ("value", "exp_avg", "exp_avg_sq")}
    assert all(torch.equal(one[name], other[name]) and one[name].shape == (24, 64) for name in one)
    assert not torch.equal(one["value/teacher_projection"], torch.eye(24, 64))


def continued(folder: str, name: str, layout: dict[str, int]) -> dict[str, torch.Tensor]:
    """What the projection is after a resume, before another step."""
    config = configure(Path(folder), name, 3, parallel=layout)
    with distributed(config.parallel, "cpu") as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        projection = trainer.engine.projection
        assert projection is not None and projection.moments["step"] == 2 == trainer.step
        trainer.close()
        return {name: tensor.clone() for name, tensor in projection.tensors().items()}


def trained(folder: str, name: str, layout: dict[str, int]) -> None:
    run(configure(Path(folder), name, 2, parallel=layout))


@pytest.mark.dist
@pytest.mark.parametrize(
    "first, then", [({"dp_size": 2}, {"tp_size": 2}), ({"tp_size": 2}, {"dp_size": 2, "dp_replicate": 2})]
)
def test_another_layout_has_the_same_on_every_rank(
    first: dict[str, int], then: dict[str, int], server: Server, tmp_path: Path
) -> None:
    configure(tmp_path, "run", 2)  # data and vectors
    server.results(trained, 2, str(tmp_path), "run", first)
    saved = tensors_of(tmp_path / "run/step-00000002")
    for found in server.results(continued, 2, str(tmp_path), "run", then):
        assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


def test_it_is_no_part_of_the_model(tmp_path: Path) -> None:
    from nemo_embed_core.merge.merge import merge

    run(configure(tmp_path, "run", 1))
    merge(tmp_path / "run", tmp_path / "merged")
    for file in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            assert stored.keys() and not any("projection" in name for name in stored.keys())  # noqa: SIM118


def test_a_run_may_begin_to_learn_it_when_it_resumes_and_does_not_drop_it(tmp_path: Path) -> None:
    without = {**LOSS, "teacher_vectors_weight": 0.0, "in_batch": "positives"}
    lines: list[str] = []
    run(configure(tmp_path, "run", 1, loss=without))
    run(configure(tmp_path, "run", 3, loss={**LOSS, "in_batch": "positives"}), lines)
    assert any("the projection is learned from step 2 on" in line for line in lines)
    assert read_manifest(tmp_path / "run/step-00000003")["teacher_vectors"]["updates"] == 2
    with pytest.raises(
        UserError, match=r"learned a projection to .* loss.teacher_vectors_weight=0, which would drop"
    ):
        prepare(configure(tmp_path, "run", 4, loss=without))
    for teacher, has in (("other", r"24 of \['other'\]"), ("wide", r"40 of \['wide'\]")):
        with pytest.raises(UserError, match=rf"to 24 columns of \['fake'\], and .* has {has}: continue with"):
            prepare(configure(tmp_path, "run", 4, teacher, loss={**LOSS, "in_batch": "positives"}))


def test_a_plan_has_its_bytes_and_its_all_reduce(tmp_path: Path) -> None:
    config = configure(tmp_path, "run", 1)
    without = replace(config, loss=replace(config.loss, teacher_vectors_weight=0.0))
    shapes = [Shape((5,) * 12, 4, 2)]  # of four queries with two documents each
    seen, less = (pretend(one, MODEL, 2, shapes, parts=False) for one in (config, without))
    bytes_of_one = 4 * 24 * MODEL.hidden_size  # it, its moments, its gradient
    assert 4 * bytes_of_one <= seen.peak - less.peak <= 6 * bytes_of_one
    assert seen.traffic.keys() == less.traffic.keys()
    calls = {
        key: (t.calls - less.traffic[key].calls, t.bytes - less.traffic[key].bytes)
        for key, t in seen.traffic.items()
    }
    assert {key: more for key, more in calls.items() if any(more)} == {
        ("dp_shard", "all_reduce"): (1, bytes_of_one)
    }


def test_what_is_wrong_is_said_before_a_step(tmp_path: Path) -> None:
    config = configure(tmp_path, "run", 1)
    (dataset,) = config.data.datasets
    data = replace(
        config.data, datasets=[replace(dataset, teacher_vectors="")], cache_dir=str(tmp_path / "no")
    )
    with pytest.raises(UserError, match="names none: set its teacher_vectors"):
        prepare(replace(config, data=data))
    assert not (tmp_path / "no").exists()  # nothing was tokenised for it
    path = Path(dataset.path)
    path.write_text(path.read_text().replace('"find ', '"seek ', 1))
    with pytest.raises(UserError, match=r"no vector of 1 of 61 queries; the first is of .*train.jsonl:1"):
        prepare(config)
    for loss, says in (
        ({"teacher_vectors_weight": -1.0}, "teacher_vectors_weight=-1, .* must not be negative"),
        ({"teacher_vectors_lr": -1.0}, "teacher_vectors_lr=-1.0 must not be negative"),
    ):
        with pytest.raises(UserError, match=says):
            LossConfig(**loss)


def test_rows_without_negatives_are_drawn_where_they_have_vectors() -> None:
    assert not LossConfig().takes_lone_rows and LossConfig(in_batch="all").takes_lone_rows
    assert LossConfig(teacher_vectors_weight=0.1).takes_lone_rows


def test_a_teacher_s_length_and_what_a_missing_slot_holds_do_not_matter() -> None:
    torch.manual_seed(0)
    q, docs, W = torch.randn(2, 6).double(), torch.randn(2, 3, 6).double(), torch.randn(4, 6).double()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    teacher = torch.randn(2, 4, 4).double()
    teacher[0, 3] = 0
    groups = Groups(q, docs, mask, torch.zeros(2, 3, dtype=torch.int64), teacher_BND=teacher)
    rows = torch.cat([q[:, None], docs], 1) @ W.T
    cosines = (rows * teacher).sum(-1) / rows.norm(dim=-1) / teacher.norm(dim=-1)
    wanted = torch.stack([1 - cosines[0, :3].mean(), 1 - cosines[1].mean()])
    torch.testing.assert_close(teacher_vectors(groups, W), wanted, rtol=1e-12, atol=0)
    longer = replace(groups, teacher_BND=3 * teacher, docs_BMD=docs.masked_fill(~mask[..., None], 7.0))
    torch.testing.assert_close(teacher_vectors(longer, W), wanted, rtol=1e-12, atol=0)


def test_a_refused_step_leaves_it() -> None:
    loss = LossConfig(teacher_vectors_weight=1.0, teacher_vectors_lr=0.5)
    learned = Projection((3, 2), loss, OptimConfig(lr=1e-2), torch.float64, torch.device("cpu"))
    assert learned.value.tolist() == [[1, 0], [0, 1], [0, 0]]
    learned.value.grad = torch.full((3, 2), torch.nan, dtype=torch.float64)
    learned.update(1e-2, torch.tensor(False))
    assert (
        learned.value.tolist() == [[1, 0], [0, 1], [0, 0]]
        and not learned.tensors()["exp_avg/teacher_projection"].any()
    )
    learned.value.grad = torch.ones(3, 2, dtype=torch.float64)
    learned.update(5e-3, torch.tensor(True))  # half of the peak
    torch.testing.assert_close(learned.value, torch.eye(3, 2).double() - 0.25, rtol=1e-6, atol=1e-6)
