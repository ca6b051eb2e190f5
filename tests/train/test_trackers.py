"""Trackers behind a queue: one that hangs, raises or is slow neither stops a run nor another tracker."""

import dataclasses
import json
import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import MODEL, train_config

from nemo_embed_core.config import TrainConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train import trackers
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trackers import Trackers, scalars
from nemo_embed_core.train.trainer import Trainer


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


class Kept:
    """Keeps what it is sent; waits at each line for `gate` where it has one, and raises at `bad` steps."""

    def __init__(self, gate: threading.Event | None = None, bad: tuple[int, ...] = ()):
        self.got: list[tuple[int, dict[str, float]]] = []
        self.gate, self.bad, self.is_closed, self.taken = gate, bad, False, threading.Event()

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self.taken.set()
        if self.gate is not None:
            self.gate.wait()
        if step in self.bad:
            raise ConnectionError(f"no route\nto host at {step}")
        self.got.append((step, dict(scalars)))

    def close(self) -> None:
        self.is_closed = True


def test_what_a_tracker_gets_is_numbers_by_name() -> None:
    values = {"step": 3, "loss": 0.5, "mfu": None, "skipped": True, "eval": {"dev/loss": 1, "none": None}}
    assert scalars(values) == {"loss": 0.5, "skipped": 1.0, "eval/dev/loss": 1.0}


def test_one_that_hangs_loses_lines_counted_and_ends_within_its_time() -> None:
    """Its thread is left behind; the tracker beside it gets every line and is closed."""
    gate, log = threading.Event(), list[str]()
    stuck, beside = Kept(gate), Kept()
    both = Trackers([("stuck", lambda: stuck), ("beside", lambda: beside)], log.append, size=4)
    both.write({"step": 0, "loss": 0.0})
    assert stuck.taken.wait(60), "it has taken the first line, and hangs in it"
    for step in range(1, 8):
        both.behind[0].write({"step": step, "loss": float(step)})
    assert both.behind[0].dropped == 3 and sum("is behind by 4 lines" in line for line in log) == 1
    both.behind[1].write({"step": 9, "loss": 9.0})
    both.close(wait_s=0.0)
    both.behind[1].thread.join(60)
    assert beside.got == [(0, {"loss": 0.0}), (9, {"loss": 9.0})] and beside.is_closed
    assert both.behind[0].thread.is_alive() and both.behind[0].thread.daemon
    assert any("tracker stuck: 4 lines were not yet taken, 3 lines found it behind" in line for line in log)
    gate.set()  # one that was only slow: what was in the queue is written, and it is closed
    both.behind[0].thread.join(60)
    assert [step for step, _ in stuck.got] == [0, 1, 2, 3, 4] and stuck.is_closed


def test_one_that_raises_is_warned_of_once_and_goes_on() -> None:
    log, tracker = list[str](), Kept(bad=(1, 2))
    one = Trackers([("bad", lambda: tracker)], log.append)
    for step in range(4):
        one.write({"step": step, "loss": 1.0})
    one.close(60)
    assert [step for step, _ in tracker.got] == [0, 3] and tracker.is_closed
    assert log == ["WARNING: tracker bad failed: ConnectionError: no route to host at 1",
                   "WARNING: tracker bad: 2 calls failed; metrics.jsonl has every line"]  # fmt: skip


def test_one_that_cannot_be_made_stops_nothing() -> None:
    def make() -> Kept:
        raise SystemExit("no key")

    log: list[str] = []
    none = Trackers([("keyless", make)], log.append)
    none.write({"step": 1, "loss": 1.0})
    none.close(60)
    assert log[0] == "WARNING: tracker keyless failed: SystemExit: no key" and "2 calls failed" in log[1]


def test_a_run_with_a_tracker_that_hangs_trains_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, made = threading.Event(), list[tuple[TrainConfig, int]]()

    def hang(config: TrainConfig, resume_step: int) -> Kept:
        made.append((config, resume_step))
        gate.wait()
        return Kept()

    monkeypatch.setattr(trackers, "TRACKERS", {**trackers.TRACKERS, "tensorboard": (hang, "tensorboard")})
    monkeypatch.setattr(trackers.Trackers.close, "__defaults__", (0.0,))
    config = train_config(tmp_path, steps=3, report_to=["tensorboard"])
    log: list[str] = []
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        Trainer(config, mesh, prepare(config), log=log.append).run()
    gate.set()
    assert made[0][1] == 0
    assert any("tracker tensorboard: 3 lines were not yet taken" in line for line in log)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run/step-00000003").is_dir()


def test_the_older_spelling_and_wrong_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_config(tmp_path, tensorboard=True, report_to=["wandb"]).report_to == ["wandb", "tensorboard"]
    again = train_config(tmp_path, tensorboard=True)
    assert dataclasses.replace(again, steps=3).report_to == ["tensorboard"]
    with pytest.raises(
        UserError, match=r"report_to has 'wanbd'; it takes tensorboard, wandb, mlflow, trackio"
    ):
        train_config(tmp_path, report_to=["wanbd"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="report_to has trackio, but it is not installed: pip install trackio"
    ):
        prepare(train_config(tmp_path, report_to=["trackio"]))


def test_each_library_is_asked_as_its_signature_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins with the parameters of wandb 0.31, mlflow 3.17 and trackio 0.43 that are used here; a resumed
    run goes on under the name that it had."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def __init__(self, name: str):
            self.name, self.info = name, types.SimpleNamespace(run_id="run-1")

        def log(self, data: dict[str, Any], step: int | None = None) -> None:
            calls.append((f"{self.name}.log", (data, step)))

        def finish(self) -> None:
            calls.append((f"{self.name}.finish", None))

    def init_wandb(
        *, project: str, name: str, dir: str, id: str, resume: str, config: dict, settings: Any
    ) -> Run:
        calls.append(("wandb.init", (project, name, id, resume, config["steps"], vars(settings))))
        return Run("wandb")

    def init_trackio(*, project: str, name: str, config: dict, resume: str, embed: bool) -> Run:
        calls.append(("trackio.init", (project, name, resume, embed)))
        return Run("trackio")

    def start_run(run_id: str | None = None, *, run_name: str | None = None) -> Run:
        calls.append(("mlflow.start_run", (run_id, run_name)))
        return Run("mlflow")

    libraries = {
        "wandb": {"init": init_wandb, "Settings": types.SimpleNamespace},
        "trackio": {"init": init_trackio},
        "mlflow": {
            "start_run": start_run,
            "log_params": lambda params, run_id: calls.append(
                ("mlflow.log_params", (params["optim.lr"], run_id))
            ),
            "log_metrics": lambda metrics, step, run_id: calls.append(
                ("mlflow.log", (metrics, step, run_id))
            ),
            "end_run": lambda: calls.append(("mlflow.finish", None)),
        },
    }
    for name, members in libraries.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    config = train_config(tmp_path, report_to=["wandb", "mlflow", "trackio"])
    Path(config.output_dir).mkdir()
    names: list[dict[str, Any]] = []
    for resume_step in (0, 5, 0):
        calls.clear()
        log: list[str] = []
        all_three = Trackers.of(config, resume_step, log.append)
        all_three.write({"step": resume_step + 1, "loss": 0.5, "eval": {"mean": 0.25}})
        all_three.close(60)
        assert not log
        said = dict(calls)
        want = {"loss": 0.5, "eval/mean": 0.25}
        assert said["wandb.log"] == said["trackio.log"] == (want, resume_step + 1)
        assert said["mlflow.log"] == (want, resume_step + 1, "run-1")
        assert {"wandb.finish", "mlflow.finish", "trackio.finish"} <= said.keys()
        assert said["wandb.init"][:2] == ("nemo_embed_core", "run") and said["wandb.init"][3:5] == (
            "allow",
            10,
        )
        assert said["wandb.init"][5] == {"console": "off", "disable_code": True, "disable_git": True}
        assert said["mlflow.start_run"] == ("run-1" if resume_step else None, "run")
        assert ("mlflow.log_params" in said) == (not resume_step)
        assert said["trackio.init"][2:] == ("allow" if resume_step else "never", False)
        names.append({"wandb": said["wandb.init"][2], "trackio": said["trackio.init"][1]})
    assert names[0] == names[1] and names[2]["wandb"] != names[0]["wandb"]


def test_tensorboard_has_the_lines_of_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = train_config(tmp_path, steps=3, report_to=["tensorboard"])
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        Trainer(config, mesh, prepare(config), log=lambda message: None).run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    read = [(event.step, event.value) for event in events.Scalars("lr")]
    assert [step for step, _ in read] == [1, 2, 3]
    assert all(
        abs(value - line["lr"]) <= 1e-6 * line["lr"] for (_, value), line in zip(read, lines, strict=True)
    )


def test_tensorboard_of_a_resumed_run_forgets_the_steps_that_run_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from nemo_embed_core.train.tracker_libraries import TensorBoard

    config = train_config(tmp_path, report_to=["tensorboard"])
    for resume_step, loss in ((0, 3.0), (2, 5.0)):
        board = TensorBoard(config, resume_step)
        for step in range(resume_step + 1, 5 - resume_step // 2):
            board.write({"loss": loss}, step)
        board.close()
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 3.0), (3, 5.0)]
