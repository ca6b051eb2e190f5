"""Saving behind training's back: what is written is what was there, one at a time, and an error stops all
ranks."""

import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server
from tiny import MODEL, train_config

from nemo_embed_core.checkpoint import write as write_module
from nemo_embed_core.checkpoint.manifest import CheckpointError, verify_checkpoint
from nemo_embed_core.checkpoint.runs import checkpoints, newest_whole
from nemo_embed_core.checkpoint.saver import Saver
from nemo_embed_core.checkpoint.write import Piece
from nemo_embed_core.config import TrainConfig
from nemo_embed_core.files.safetensors import SafetensorsWriter
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

WRITE_S = 0.05  # a file takes this much longer where a test slows the disk down


def train(config: TrainConfig, plant: Callable[[Trainer], None] = lambda trainer: None) -> None:
    """What launch/train.py does, in a forked rank."""
    prepared = prepare(config)
    with distributed(config.parallel, config.device, prepared.model) as mesh:
        trainer = Trainer(config, mesh, prepared)
        trainer.stop_on_signals()
        plant(trainer)
        trainer.run()


def config_for(folder: Path, name: str, **changes: Any) -> TrainConfig:
    checkpoint = {"every": 2, "keep": 99, "resume": "auto", **changes.pop("checkpoint", {})}
    return train_config(folder, output_dir=str(folder / name), checkpoint=checkpoint, **changes)


def digests(run: Path) -> dict[str, dict[str, str]]:
    """sha256 of every file of every checkpoint."""
    return {
        folder.name: {name: f["sha256"] for name, f in verify_checkpoint(folder)["files"].items()}
        for folder in checkpoints(run)
    }


def slow_disk() -> None:
    close = SafetensorsWriter.close

    def slow(writer: SafetensorsWriter) -> dict[str, Any]:
        time.sleep(WRITE_S)
        return close(writer)

    SafetensorsWriter.close = slow  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------ the Saver alone


class Disk:
    """Stands for save_checkpoint: keeps what it is given once `may_write` is set."""

    def __init__(self) -> None:
        self.may_write, self.begun = threading.Event(), threading.Event()
        self.written: list[tuple[int, torch.Tensor]] = []
        self.error: Exception | None = None

    def __call__(self, step: int, pieces: dict[str, Piece], **rest: Any) -> Path:
        self.begun.set()
        assert self.may_write.wait(10)
        if self.error is not None:
            raise self.error
        self.written.append((step, pieces["w"].tensor.clone()))
        return Path(f"step-{step}")


def pieces_of(tensor: torch.Tensor) -> dict[str, Piece]:
    shape = tuple(tensor.shape)
    return {"w": Piece(shape, ((0,) * len(shape), shape), tensor)}


def test_what_is_written_is_what_was_there_when_save_returned() -> None:
    disk, weights = Disk(), torch.arange(6.0)
    saver = Saver(disk, log=lambda message: None)
    saver.save(1, pieces_of(weights))
    assert disk.begun.wait(10) and not disk.written, "save() returns while the disk is still at work"
    weights += 100  # the optimizer
    disk.may_write.set()
    saver.wait()
    assert disk.written[0][0] == 1 and torch.equal(disk.written[0][1], torch.arange(6.0))
    first = {name: buffer.data_ptr() for name, buffer in saver._buffers.items()}
    saver.save(2, pieces_of(weights))
    saver.wait()
    assert torch.equal(disk.written[1][1], torch.arange(6.0) + 100)
    assert {name: buffer.data_ptr() for name, buffer in saver._buffers.items()} == first, (
        "host memory is taken once"
    )


def test_without_the_copy_the_test_above_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saver, "snapshot", lambda self, pieces: pieces)
    disk, weights = Disk(), torch.arange(6.0)
    saver = Saver(disk, log=lambda message: None)
    saver.save(1, pieces_of(weights))
    weights += 100
    disk.may_write.set()
    saver.wait()
    assert not torch.equal(disk.written[0][1], torch.arange(6.0))


def test_a_second_save_waits_for_the_first_and_counts_as_a_stall() -> None:
    disk, weights = Disk(), torch.zeros(3)
    saver = Saver(disk, log=lambda message: None)
    saver.save(1, pieces_of(weights))
    assert saver.take_stall() < 1
    second = threading.Thread(target=saver.save, args=(2, pieces_of(weights + 1)))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not disk.written
    disk.may_write.set()
    second.join(10)
    saver.wait()
    assert [step for step, _ in disk.written] == [1, 2]
    assert saver.take_stall() >= 0.15 and saver.take_stall() == 0.0


def test_an_error_behind_the_back_is_raised_once_and_printed_when_nobody_asks() -> None:
    log: list[str] = []
    disk = Disk()
    disk.error = CheckpointError("the disk is gone")
    saver = Saver(disk, log=log.append)
    disk.may_write.set()
    saver.save(1, pieces_of(torch.zeros(3)))
    saver.join()
    assert saver.failed
    with pytest.raises(CheckpointError, match="the disk is gone"):
        saver.wait()
    assert not saver.failed
    saver.save(2, pieces_of(torch.zeros(3)))
    saver.close()
    assert log == ["WARNING: the last save failed: the disk is gone"]


# ------------------------------------------------------------------------------------------ in a run


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_training_goes_on_meanwhile_and_no_bit_differs(
    tmp_path: Path, no_launcher: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafetensorsWriter, "close", SafetensorsWriter.close)  # put back afterwards
    slow_disk()
    ahead, reported = [], []
    for name in ("async", "sync"):
        config = config_for(tmp_path, name, steps=6, checkpoint={"async_save": name == "async"})
        with distributed(config.parallel, "cpu", MODEL) as mesh:

            def log(message: str) -> None:
                if message.startswith("saved "):
                    folder = Path(re.split(r"[: ]", message)[1])
                    assert verify_checkpoint(folder), "reported before it is there"
                    ahead.append(trainer.step - int(folder.name.removeprefix("step-")))  # noqa: B023
                    reported.append(message)

            def until_the_next_step(point: str, step: int) -> None:
                deadline = time.monotonic() + 20
                while point == "save.model_written" and step < 6 and trainer.step == step:  # noqa: B023
                    assert time.monotonic() < deadline, "training waits for the disk"
                    time.sleep(0.002)

            trainer = Trainer(config, mesh, prepare(config), log=log)
            with monkeypatch.context() as patch:
                if name == "async":
                    patch.setattr(write_module, "failpoint", until_the_next_step)
                trainer.run()
        assert not list((tmp_path / name).glob(".*")), "no lock and no temporary folder is left"
    assert digests(tmp_path / "async") == digests(tmp_path / "sync")
    assert len(digests(tmp_path / "async")) == 3
    assert min(ahead[:2]) > 0, "no step was made while a checkpoint was written"
    assert ahead[2] == 0 and ahead[3:] == [0, 0, 0], "the last one is waited for; without async_save each is"
    assert re.search(r"step-00000002: copied in \d\.\d\d s, published after \d\.\d\d s", reported[0])
    stalls = {
        name: [json.loads(line)["checkpoint_stall_s"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("async", "sync")
    }
    assert [s > 0 for s in stalls["sync"]] == [False, False, True, False, True, False]
    assert stalls["sync"][2] > 2 * WRITE_S > stalls["async"][2] > 0


def plant_full_disk(trainer: Trainer) -> None:
    """At step 80 rank 1 cannot write a moment."""
    write = SafetensorsWriter.write

    def fail(writer: SafetensorsWriter, tensor: torch.Tensor) -> None:
        if trainer.mesh.rank == 1 and "step-00000080" in str(writer.path) and "optim" in writer.path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, tensor)

    SafetensorsWriter.write = fail  # type: ignore[method-assign]


def train_until_the_disk_is_full(config: TrainConfig) -> None:
    train(config, plant_full_disk)


@pytest.mark.dist
@pytest.mark.parametrize("async_save", [True, False])
def test_one_rank_that_cannot_write_stops_all_at_the_next_step(
    tmp_path: Path, server: Server, async_save: bool
) -> None:
    rising = {"optim": {"warmup_steps": 45}}  # up to step 40 the rate does not depend on the number of steps
    config = config_for(
        tmp_path,
        "run",
        steps=2000,
        log_every=2000,
        checkpoint={"async_save": async_save, "every": 40},
        **rising,
    )
    outcomes = server.run(train_until_the_disk_is_full, 2, config)
    assert [o.code for o in outcomes] == [2, 2]
    for outcome in outcomes:
        assert re.search(
            r"writing \S*step-00000080 failed on rank 1: \[Errno 28\] No space left on device; "
            r"the checkpoint needs "
            r"[\d,]+ bytes in all, [\d,]+ are free\. Nothing was published",
            outcome.output,
        )
    steps = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 80 <= steps <= 120 if async_save else steps == 80, "it went on, to the next save at most"
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000040"]
    assert not list((tmp_path / "run").glob(".*")), "a temporary folder or the lock is left"
    if not async_save:
        return
    for name in ("run", "calm"):  # shorter than before
        short = config_for(tmp_path, name, steps=50, log_every=50, checkpoint={"every": 50}, **rising)
        assert [o.code for o in server.run(train, 2, short)] == [0, 0]
    assert digests(tmp_path / "run")["step-00000050"] == digests(tmp_path / "calm")["step-00000050"]


def train_and_die(config: TrainConfig, step: int) -> None:
    def plant(trainer: Trainer) -> None:
        slow_disk()
        inner = trainer.train_step

        def step_and_die() -> Any:
            if trainer.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner()

        trainer.train_step = step_and_die  # type: ignore[method-assign]

    train(config, plant)


def test_a_kill_costs_at_most_the_steps_since_the_last_reported_save(tmp_path: Path, server: Server) -> None:
    in_flight = 0
    for step in (3, 4, 6):
        config = config_for(tmp_path, f"run-{step}", steps=10)
        (outcome,) = server.run(train_and_die, 1, config, step)
        assert outcome.code == -9
        reported = max([int(n) for n in re.findall(r"saved \S*step-(\d+)", outcome.output)], default=0)
        found = newest_whole(tmp_path / f"run-{step}", lambda message: None)
        assert (int(found.name.removeprefix("step-")) if found else 0) >= reported
        in_flight += reported < step // 2 * 2
    assert in_flight >= 2, "no kill came while a save was in flight: nothing was tried"


def train_with_signals(config: TrainConfig, count: int) -> None:
    """SIGTERM `count` times in the midst of the save of step 4."""

    def plant(trainer: Trainer) -> None:
        def failpoint(name: str, step: int) -> None:
            if (name, step) == ("save.model_written", 4):
                for _ in range(count):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)

        write_module.failpoint = failpoint

    train(config, plant)


def test_one_or_two_sigterms_during_a_save(tmp_path: Path, server: Server) -> None:
    """The save is finished, the step that was reached is saved as well, and the resume is bit-exact."""
    assert server.run(train, 1, config_for(tmp_path, "calm", steps=10))[0].code == 0
    for count in (1, 2):
        config = config_for(tmp_path, f"run-{count}", steps=10)
        run = Path(config.output_dir)
        (outcome,) = server.run(train_with_signals, 1, config, count)
        assert outcome.code == 0 and "stopped by a signal" in outcome.output
        saved = sorted(digests(run))
        assert "step-00000004" in saved and saved[-1] < "step-00000010", saved
        assert not list(run.glob(".*"))
        assert server.run(train, 1, config)[0].code == 0
        assert digests(run)["step-00000010"] == digests(tmp_path / "calm")["step-00000010"]
