"""A learned temperature outlives its process, bit for bit; what it is in a step is test_oracle's."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import train_config

from nemo_embed_core.checkpoint.manifest import read_manifest
from nemo_embed_core.config import LossConfig, OptimConfig
from nemo_embed_core.config.train import TEMPERATURE_RANGE
from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.learned import Temperature
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer


def run(folder: Path, name: str, steps: int, lr: float, lines: list[str] | None = None) -> list[dict]:
    """metrics.jsonl of a run that goes on to step `steps` of 6 in name; a run of its own where it is new."""
    loss = {"temperature": 0.1, "temperature_lr": lr, "in_batch": "positives"}
    checkpoint = {"resume": "auto", "every": 1}
    config = train_config(
        folder, output_dir=str(folder / name), steps=steps, loss=loss, checkpoint=checkpoint,
        optim={"warmup_steps": 0, "min_lr": 1e-5},
    )  # fmt: skip  # a constant rate, whatever steps is
    with distributed(config.parallel, "cpu") as mesh:
        Trainer(config, mesh, prepare(config), log=(lines if lines is not None else []).append).run()
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_goes_on_with_the_temperature_and_its_moments(tmp_path: Path) -> None:
    calm = run(tmp_path, "calm", 4, 0.05)
    run(tmp_path, "stopped", 2, 0.05)
    stopped = run(tmp_path, "stopped", 4, 0.05)
    assert [m["temperature"] for m in stopped] == [m["temperature"] for m in calm]
    assert len({m["temperature"] for m in calm}) == 4 and abs(calm[0]["temperature"] / 0.1 - 1) < 1e-6
    ends = [read_manifest(tmp_path / name / "step-00000004")["temperature"] for name in ("calm", "stopped")]
    assert ends[0] == ends[1] and ends[0]["step"] == 4 and ends[0]["exp_avg_sq"] > 0


def test_a_run_may_begin_to_learn_it_when_it_resumes(tmp_path: Path) -> None:
    assert "temperature" not in run(tmp_path, "run", 1, 0.0)[0]
    lines: list[str] = []
    later = run(tmp_path, "run", 3, 0.05, lines)
    assert any("temperature_lr: learned from step 2 on, from 0.1" in line for line in lines)
    assert (
        abs(later[1]["temperature"] / 0.1 - 1) < 1e-6 and later[2]["temperature"] != later[1]["temperature"]
    )


def test_a_run_does_not_go_back_from_the_temperature_that_it_has_learned(tmp_path: Path) -> None:
    run(tmp_path, "run", 1, 0.05)
    with pytest.raises(UserError, match=r"learned a temperature, 0\.\d+ by now, and this run has loss\.tem"):
        run(tmp_path, "run", 2, 0.0)


@pytest.mark.parametrize("end, sign", [(0, 1.0), (1, -1.0)])
def test_it_stays_in_its_range_and_a_refused_step_leaves_it(end: int, sign: float) -> None:
    """Three steps of AdamW by its formula, cut to the range, with a refused one after the first."""
    loss, optim = LossConfig(temperature=0.07, temperature_lr=4.0), OptimConfig(lr=1e-2, beta1=0.8, beta2=0.9)
    learned = Temperature(loss, optim, torch.float64, torch.device("cpu"))
    bounds = math.log(TEMPERATURE_RANGE[0]), math.log(TEMPERATURE_RANGE[1])
    log, m, v, logs = math.log(0.07), 0.0, 0.0, []
    for step, (gradient, lr) in enumerate([(2.0, 5e-3), (math.nan, 1e-2), (1.0, 1e-2), (-4.0, 2e-3)]):
        learned.value.grad = torch.tensor(sign * gradient, dtype=torch.float64)
        before = learned.state()
        learned.update(lr, torch.tensor(math.isfinite(gradient)))
        if step == 1:
            assert learned.state() == before
            continue
        n = len(logs) + 1
        m, v = 0.8 * m + 0.2 * sign * gradient, 0.9 * v + 0.1 * gradient**2
        log -= 4.0 * lr / 1e-2 * (m / (1 - 0.8**n)) / (math.sqrt(v / (1 - 0.9**n)) + 1e-8)
        log = min(max(log, bounds[0]), bounds[1])
        logs.append(log)
        assert learned.value.item() == pytest.approx(log, abs=1e-12)
    assert logs[1] == bounds[end] and logs[0] not in bounds and logs[2] not in bounds


@pytest.mark.parametrize(
    "options, says",
    [
        ({"temperature_lr": -1.0}, "temperature_lr=-1.0 must not be negative"),
        ({"temperature": 0.001, "temperature_lr": 1e-3}, "temperature=0.001 must lie between 0.005 and 1"),
        (
            {"temperature_lr": 1e-3, "info_nce_weight": 0.0, "cosent_weight": 1.0},
            "temperature_lr=0.001 learns a temperature that no term has",
        ),
        ({"false_negative_margin": -0.1}, "false_negative_margin=-0.1 must lie between 0 and 2"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        LossConfig(**options)
