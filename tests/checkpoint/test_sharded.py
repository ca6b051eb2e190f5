"""Faults around checkpoints: full and vanished disks, damage, locks, other layouts, and what may not be
continued."""

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Outcome, Server
from tiny import MODEL, manifest_meta, train_config

from nemo_embed_core.checkpoint import write as write_module
from nemo_embed_core.checkpoint.manifest import (
    CheckpointError,
    check_coverage,
    read_manifest,
    seal,
    verify_checkpoint,
)
from nemo_embed_core.checkpoint.reader import Reader
from nemo_embed_core.checkpoint.runs import checkpoints, newest_whole
from nemo_embed_core.checkpoint.weights import open_weights
from nemo_embed_core.checkpoint.write import Piece, save_checkpoint
from nemo_embed_core.config import CheckpointConfig, TrainConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.files import durable
from nemo_embed_core.files.durable import start_time
from nemo_embed_core.files.lock import Lock
from nemo_embed_core.model.spec import parameter_shapes
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer


def train(
    config: TrainConfig,
    plant: Callable[[Trainer], None] = lambda trainer: None,
    dtype: torch.dtype | None = None,
) -> None:
    """What launch/train.py does, in a forked rank."""
    prepared = prepare(config)
    with distributed(config.parallel, config.device, prepared.model) as mesh:
        trainer = Trainer(config, mesh, prepared, dtype=dtype)
        plant(trainer)
        trainer.run()


def stop_at(trainer: Trainer, step: int) -> None:
    """As a signal does, but after a given step."""
    inner = trainer.train_step

    def step_then_stop() -> tuple[dict[str, Any], bool]:
        values, stop = inner()
        return values, stop or trainer.step == step

    trainer.train_step = step_then_stop  # type: ignore[method-assign]


def train_until(config: TrainConfig, step: int) -> None:
    train(config, lambda trainer: stop_at(trainer, step))


def config_for(folder: Path, name: str, **changes: Any) -> TrainConfig:
    checkpoint = {"every": 3, "resume": "auto", **changes.pop("checkpoint", {})}
    return train_config(folder, output_dir=str(folder / name), checkpoint=checkpoint, **changes)


def codes(outcomes: list[Outcome]) -> list[int]:
    return [outcome.code for outcome in outcomes]


def final_state(run: Path) -> tuple[str, dict[str, str]]:
    manifest = verify_checkpoint(checkpoints(run)[0])
    assert manifest["step"] == 10
    return manifest["ledger"], {name: f["sha256"] for name, f in manifest["files"].items()}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


META = manifest_meta(dataclasses.asdict(MODEL))


def save(root: Path, step: int, numel: int = 8, **options: Any) -> Path:
    """A checkpoint of one vector and as many others as the model has parameters, from one rank."""
    names = [*parameter_shapes(MODEL), "exp_avg/model.norm.weight"]
    pieces = {
        n: Piece((numel,), ((0,), (numel,)), torch.full((numel,), float(step + i)))
        for i, n in enumerate(names)
    }
    fixed: dict[str, Any] = {"rank": 0, "world_size": 1, "meta": META, "extra_files": {}, "keep": 2}
    return save_checkpoint(root, step, pieces, **{**fixed, "gather": lambda value: [value], **options})


def steps_in(root: Path) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in checkpoints(root)]


# ------------------------------------------------------------------------------------------ which are kept


def test_the_newest_and_every_mth_are_kept(tmp_path: Path) -> None:
    for step in range(1, 12):
        save(tmp_path, step, keep=2, keep_every=4)
    assert steps_in(tmp_path) == [11, 10, 8, 4]
    for step in range(12, 15):
        save(tmp_path, step, keep=1)
    assert steps_in(tmp_path) == [14]


def test_nothing_is_deleted_before_the_new_one_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep=1)

    def full(tmp: Path, final: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(write_module, "publish", full)
    with pytest.raises(CheckpointError, match=r"publishing .*step-00000002 failed on rank 0"):
        save(tmp_path, 2, keep=1)
    assert steps_in(tmp_path) == [1] and verify_checkpoint(tmp_path / "step-00000001")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]


def test_a_damaged_checkpoint_neither_counts_nor_is_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    (tmp_path / "step-00000003" / "model-00000-of-00001.safetensors").write_bytes(b"")
    damaged: set[str] = set()
    found = newest_whole(tmp_path, lambda message: None, damaged)
    assert found is not None and found.name == "step-00000002" and damaged == {"step-00000003"}
    for step in (4, 5):
        save(tmp_path, step, keep=2, damaged=damaged)
    assert steps_in(tmp_path) == [5, 4, 3]


def test_a_damaged_checkpoint_makes_room_for_its_step_and_keeps_its_files(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, keep=9)
    weights = "model-00000-of-00001.safetensors"
    (tmp_path / "step-00000002" / weights).write_bytes(b"broken")
    damaged: set[str] = set()
    log: list[str] = []
    assert newest_whole(tmp_path, log.append, damaged) == tmp_path / "step-00000001"
    save(tmp_path, 2, keep=2, damaged=damaged, log=log.append)
    (aside,) = tmp_path.glob("damaged-step-00000002-*")
    assert (aside / weights).read_bytes() == b"broken" and str(aside) in log[-1]
    assert verify_checkpoint(tmp_path / "step-00000002") and not damaged
    for step in (3, 4):
        save(tmp_path, step, keep=2, damaged=damaged)
    assert steps_in(tmp_path) == [4, 3], "its successor is pruned as any other"


def test_a_folder_named_after_another_step_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=2)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000007")
    with pytest.raises(CheckpointError, match="step-00000007 holds step 1: name it step-00000001"):
        verify_checkpoint(tmp_path / "step-00000007")
    (tmp_path / "step-00000007").rename(tmp_path / "best")
    assert verify_checkpoint(tmp_path / "best")["step"] == 1


def test_a_leftover_that_cannot_be_deleted_does_not_end_the_run(tmp_path: Path) -> None:
    log: list[str] = []
    save(tmp_path, 1, keep=1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".tmp-old-step-00000000").symlink_to(elsewhere)  # rmtree refuses links
    save(tmp_path, 2, keep=1, log=log.append)
    assert steps_in(tmp_path) == [2] and elsewhere.is_dir()
    assert len(log) == 1 and log[0].startswith("WARNING: ") and ".tmp-old-step-00000000" in log[0]


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    save(tmp_path, 1, keep=1)

    def busy(path: Path, **options: Any) -> None:
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, 2, keep=1, log=log.append)
    assert len(log) == 1 and log[0].startswith("WARNING: ") and "busy" in log[0]
    assert steps_in(tmp_path) == [2]
    save(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"], "the next save cleans up"


# --------------------------------------------------------------------------------- full, unwritable, vanished


def train_on_a_disk_that_fills(config: TrainConfig) -> None:
    """From the save of step 6 on no file may grow beyond 50 kB."""

    def failpoint(name: str, step: int) -> None:
        if name == "save.begin" and step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    write_module.failpoint = failpoint
    train(config)


@pytest.mark.fault(18)
@pytest.mark.dist
def test_a_full_disk_costs_no_checkpoint_and_the_resume_is_bit_exact(tmp_path: Path, server: Server) -> None:
    config = config_for(tmp_path, "run")
    outcomes = server.run(train_on_a_disk_that_fills, 2, config)
    assert codes(outcomes) == [2, 2]
    for outcome in outcomes:
        found = re.search(
            r"writing (\S+) failed on rank [01]: .*; the checkpoint needs "
            r"([\d,]+) bytes in all, ([\d,]+) are",
            outcome.output,
        )
        assert found and found[1] == str(tmp_path / "run" / "step-00000006"), outcome.output
        parameters = sum(torch.Size(s).numel() for s in parameter_shapes(MODEL).values())
        assert int(found[2].replace(",", "")) == 12 * parameters
    assert steps_in(tmp_path / "run") == [3] and verify_checkpoint(tmp_path / "run" / "step-00000003")
    assert not list((tmp_path / "run").glob(".*")), "a temporary folder or the lock is left"
    assert codes(server.run(train, 2, config)) == [0, 0]
    assert codes(server.run(train, 2, config_for(tmp_path, "calm"))) == [0, 0]
    assert final_state(tmp_path / "run") == final_state(tmp_path / "calm")


@pytest.fixture
def one_megabyte(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here; RLIMIT_FSIZE above stands for it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault(18)
def test_a_really_full_disk(one_megabyte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 kB a checkpoint: the third does not fit beside two, which is seen before it is begun; and if not,
    while it is."""
    numel = 400_000 // (4 * (len(parameter_shapes(MODEL)) + 1))
    for step in (1, 2):
        save(one_megabyte, step, numel)
    with pytest.raises(CheckpointError) as early:
        save(one_megabyte, 3, numel)
    assert re.search(r"step 3 needs [\d,]+ bytes, [\d,]+ are free on its file system", str(early.value))
    monkeypatch.setattr(write_module, "check_free_space", lambda *args: None)
    with pytest.raises(CheckpointError) as late:
        save(one_megabyte, 3, numel)
    assert re.search(
        r"\[Errno 28\] No space left on device; the checkpoint needs [\d,]+ bytes", str(late.value)
    )
    assert sorted(p.name for p in one_megabyte.iterdir()) == ["step-00000001", "step-00000002"]
    assert verify_checkpoint(one_megabyte / "step-00000002")
    shutil.rmtree(one_megabyte / "step-00000001")
    save(one_megabyte, 3, numel)
    assert steps_in(one_megabyte) == [3, 2]


def test_too_little_room_is_refused_at_the_start(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2.2 checkpoints in a new folder, 1.1 where one is already."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    size = 12 * sum(torch.Size(s).numel() for s in parameter_shapes(MODEL).values())
    config = config_for(tmp_path, "run")
    free = {"bytes": int(2.2 * size) - 1}
    monkeypatch.setattr(durable, "free_bytes", lambda path: free["bytes"])
    with pytest.raises(UserError) as caught:
        prepare(config)
    text = str(caught.value)
    assert (
        str(tmp_path / "run") in text
        and f"{int(2.2 * size):,} bytes" in text
        and f"{free['bytes']:,} are free" in text
    )
    free["bytes"] += 1
    prepare(config)
    (tmp_path / "run" / "step-00000001").mkdir()
    free["bytes"] = int(1.1 * size)
    prepare(config)
    free["bytes"] -= 1
    with pytest.raises(UserError):
        prepare(config)


@pytest.mark.fault(19)
def test_an_unwritable_output_is_refused_at_the_start() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(UserError, match=rf"output_dir {folder} is not writable: .*Permission denied"):
                durable.probe(Path(folder))
            with pytest.raises(UserError, match="is not writable"):
                durable.probe(Path(folder) / "run")
        finally:
            if root:
                os.seteuid(0)
        os.chmod(folder, 0o755)
        durable.probe(Path(folder) / "run")
        assert not list(Path(folder, "run").iterdir())


def train_in_a_folder_that_vanishes(config: TrainConfig) -> None:
    def plant(trainer: Trainer) -> None:
        inner = trainer.train_step

        def step() -> Any:
            if trainer.step == 4 and trainer.mesh.rank == 1:
                shutil.rmtree(config.output_dir)
            return inner()

        trainer.train_step = step  # type: ignore[method-assign]

    train(config, plant)


@pytest.mark.fault(19)
@pytest.mark.dist
def test_an_output_that_vanishes_ends_all_ranks(tmp_path: Path, server: Server) -> None:
    outcomes = server.run(
        train_in_a_folder_that_vanishes, 2, config_for(tmp_path, "run", checkpoint={"every": 6})
    )
    assert codes(outcomes) == [2, 2]
    for outcome in outcomes:
        assert f"the lock {tmp_path / 'run' / '.lock'} of this run is gone" in outcome.output
    assert not (tmp_path / "run").exists(), "it was not made again behind the user's back"


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.fault(4)
def test_all_damaged_ends_with_code_3_and_a_reason_for_each(tmp_path: Path, server: Server) -> None:
    config = config_for(tmp_path, "run")
    assert codes(server.run(train, 1, config)) == [0]
    run = tmp_path / "run"
    (run / "step-00000009" / "optim-00000-of-00001.safetensors").unlink()
    weights = run / "step-00000010" / "model-00000-of-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 4
    weights.write_bytes(data)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name not in (".lock", "run")}
    for world_size in (1, 2):
        outcomes = server.run(train, world_size, config)
        assert codes(outcomes) == [3] * world_size
        for outcome in outcomes:
            text = outcome.output.splitlines()[-1]
            assert "step-00000010/model-00000-of-00001.safetensors: sha256 differs" in text
            assert "step-00000009/optim-00000-of-00001.safetensors is missing" in text
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name not in (".lock", "run")} == before


@pytest.mark.fault(3)
def test_a_stale_shard_beside_the_others_is_not_read(tmp_path: Path) -> None:
    """A world of 2 left its shard where a world of 1 has saved: the manifest decides."""
    folder = save(tmp_path, 1)
    want = Reader(folder).read_box("model.norm.weight", ((0,), (8,)))
    other = save(tmp_path / "x", 2) if (tmp_path / "x").mkdir() is None else None
    assert other is not None
    shutil.copy(other / "model-00000-of-00001.safetensors", folder / "model-00001-of-00002.safetensors")
    verify_checkpoint(folder)
    assert torch.equal(Reader(folder).read_box("model.norm.weight", ((0,), (8,))), want)


@pytest.mark.fault(11)
def test_masters_of_a_bf16_run_resume_bit_exactly_and_are_never_done_without(
    tmp_path: Path, server: Server
) -> None:
    calm, halted = (config_for(tmp_path, name, precision="bf16") for name in ("calm", "halted"))
    assert codes(server.run(train, 1, calm)) == [0]
    assert codes(server.run(train_until, 1, halted, 5)) == [0]
    assert steps_in(tmp_path / "halted")[0] == 5
    manifest = json.loads((tmp_path / "halted/step-00000005/manifest.json").read_text())
    assert {tensor["dtype"] for tensor in manifest["tensors"].values()} == {"float32"}
    assert codes(server.run(train, 1, halted)) == [0]
    assert final_state(tmp_path / "halted") == final_state(tmp_path / "calm")
    # Without one moment the folder is whole in itself, and yet no checkpoint of this model.
    path = tmp_path / "halted/step-00000010/manifest.json"
    manifest = json.loads(path.read_text())
    for table in ("tensors", "pieces"):
        del manifest[table]["exp_avg_sq/model.norm.weight"]
    path.write_bytes(seal(manifest))
    (outcome,) = server.run(train, 1, dataclasses.replace(halted, steps=12))
    assert outcome.code == 2 and "exp_avg_sq/model.norm.weight is missing" in outcome.output


# ----------------------------------------------------------------------------------------- one run per folder


def write_lock(folder: Path, age_s: float = 0.0, **changes: Any) -> Lock:
    lock = Lock(folder, lambda message: None)
    (folder / ".lock").write_text(json.dumps({**lock._owner, "run": "another", **changes}))
    os.utime(folder / ".lock", (time.time() - age_s, time.time() - age_s))
    return lock


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.fault(20)
def test_a_live_run_is_refused_and_a_dead_one_is_taken_over(
    tmp_path: Path, sleeper: subprocess.Popen
) -> None:
    log: list[str] = []
    held = Lock(tmp_path, log.append)
    start = start_time(sleeper.pid)
    assert start is not None
    write_lock(tmp_path, pid=sleeper.pid, start=start, age_s=3600)  # alive, so its heartbeat does not matter
    with pytest.raises(
        UserError, match=rf"in use by process {sleeper.pid} on {held._owner['host']} .*delete \S*\.lock"
    ):
        held.acquire()
    # The same pid, but another process: it has been given again.
    write_lock(tmp_path, pid=sleeper.pid, start=str(int(start) - 100))
    held.acquire().release()
    assert "WARNING" in log[0] and f"process {sleeper.pid}" in log[0] and "taking it over" in log[0]
    write_lock(tmp_path, pid=sleeper.pid, start=start)
    sleeper.kill()
    while start_time(sleeper.pid) is not None:  # a zombie from now on: dead
        time.sleep(0.01)
    held = Lock(tmp_path, log.append).acquire()
    assert len(log) == 2 and json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    held.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"pid_namespace": "pid:[1]"}])
def test_on_another_host_the_heartbeat_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: dict[str, str]
) -> None:
    """Older than five minutes: taken over. Younger: waited for, until it moves (refused) or is five minutes
    old."""
    monkeypatch.setattr(Lock, "POLL_S", 0.01)
    log: list[str] = []
    write_lock(tmp_path, age_s=310, **where)
    Lock(tmp_path, log.append).acquire().release()
    assert len(log) == 1 and "taking it over" in log[0]
    start = time.monotonic()
    write_lock(tmp_path, age_s=299.5, **where)
    Lock(tmp_path, log.append).acquire().release()
    assert len(log) == 3 and "waiting until its heartbeat moves or is 5 minutes old" in log[1]
    assert 0.3 < time.monotonic() - start < 5
    write_lock(tmp_path, age_s=150, **where)
    threading.Timer(0.2, os.utime, [tmp_path / ".lock"]).start()
    with pytest.raises(UserError, match="in use by process"):
        Lock(tmp_path, log.append).acquire()
    assert len(log) == 4


def test_the_heartbeat_goes_on_while_the_lock_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lock, "BEAT_S", 0.01)
    lock = Lock(tmp_path, lambda message: None).acquire()
    os.utime(tmp_path / ".lock", (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / ".lock").stat().st_mtime == 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


def test_of_two_that_start_together_one_gets_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All see that there is no lock before one of them makes it."""
    got, refused, barrier = [], [], threading.Barrier(8)
    look = Lock.refuse_if_held

    def look_together(lock: Lock) -> bool:
        held = look(lock)
        if not held and not barrier.broken:
            barrier.wait(10)
        return held

    monkeypatch.setattr(Lock, "refuse_if_held", look_together)

    def start() -> None:
        lock = Lock(tmp_path, lambda message: None)
        lock._owner["pid"], lock._owner["start"] = 1, start_time(1)  # threads stand for processes
        try:
            got.append(lock.acquire())
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7
    got[0].check()
    got[0].release()


def test_who_has_lost_the_lock_writes_nothing(tmp_path: Path) -> None:
    lock = Lock(tmp_path, lambda message: None).acquire()
    save(tmp_path, 1, check=lock.check)
    write_lock(tmp_path)
    with pytest.raises(CheckpointError, match="was taken by another run"):
        save(tmp_path, 2, check=lock.check)
    assert steps_in(tmp_path) == [1]
    lock.release()
    assert (tmp_path / ".lock").exists(), "it is the other run's"


def train_and_be_killed(config: TrainConfig) -> None:
    os.environ["NEMO_EMBED_FAIL"] = "step.end@4"
    train(config)


@pytest.mark.fault(20)
def test_a_second_run_in_the_same_folder(tmp_path: Path, server: Server, sleeper: subprocess.Popen) -> None:
    """Refused while the first one lives, with nothing touched; after kill -9 the lock is taken over with a
    warning."""
    config = config_for(tmp_path, "run")
    (tmp_path / "run").mkdir()
    write_lock(tmp_path / "run", pid=sleeper.pid, start=start_time(sleeper.pid))
    (outcome,) = server.run(train, 1, config)
    assert outcome.code == 2 and f"in use by process {sleeper.pid}" in outcome.output
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    (tmp_path / "run" / ".lock").unlink()
    assert codes(server.run(train_and_be_killed, 1, config)) == [-9]
    left = json.loads((tmp_path / "run" / ".lock").read_text())
    (outcome,) = server.run(train, 1, config)
    assert outcome.code == 0
    assert (
        len(re.findall(rf"WARNING: .* is of process {left['pid']} on .*taking it over", outcome.output)) == 1
    )
    assert not (tmp_path / "run" / ".lock").exists()
    runs = {read_manifest(p)["run"] for p in checkpoints(tmp_path / "run")}
    assert left["run"] not in runs and len(runs) == 1


# ------------------------------------------------------------------------------------------ what may change


def test_other_samples_need_an_explicit_word(tmp_path: Path, server: Server) -> None:
    config = config_for(tmp_path, "run", steps=3)
    assert codes(server.run(train, 1, config)) == [0]
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 1},
        "global_batch_size": {"global_batch_size": 4},
        "data": {"data": {"num_hard_negatives": 1}},
    }
    for i, (name, change) in enumerate(changes.items()):
        run = f"changed-{name}"
        shutil.copytree(tmp_path / "run", tmp_path / run)
        others = [other for other in changes if other != name]
        for allow in ([], others):
            changed = config_for(tmp_path, run, steps=5, checkpoint={"allow_changed": allow}, **change)
            (outcome,) = server.run(train, 1, changed)
            assert outcome.code == 2 and f"--checkpoint.allow_changed {name}" in outcome.output
        changed = config_for(tmp_path, run, steps=5, checkpoint={"allow_changed": [name]}, **change)
        (outcome,) = server.run(train, 1, changed)
        assert (
            outcome.code == 0
            and "WARNING" in outcome.output
            and "no promise holds any more" in outcome.output
        )
        manifest = read_manifest(checkpoints(tmp_path / run)[0])
        assert [o["step"] for o in manifest["overrides"]] == [3] and name in manifest["overrides"][0][
            "changed"
        ], i
    # It is still known after a resume that changes nothing.
    changed = dataclasses.replace(changed, steps=6)
    assert codes(server.run(train, 1, changed)) == [0]
    assert len(read_manifest(checkpoints(tmp_path / run)[0])["overrides"]) == 1
    model = dataclasses.replace(MODEL, num_hidden_layers=1)
    allow_all = {"allow_changed": [*changes]}
    (outcome,) = server.run(train, 1, config_for(tmp_path, "run", steps=5, checkpoint=allow_all, model=model))
    assert outcome.code == 2 and "another shape" in outcome.output
    with pytest.raises(UserError, match=r"allow_changed has \['model'\]"):
        CheckpointConfig(allow_changed=["model"])


def test_a_run_never_goes_back_behind_its_newest_checkpoint(tmp_path: Path, server: Server) -> None:
    """Otherwise the later ones of the abandoned past would be resumed from one day."""
    config = config_for(tmp_path, "run", steps=6)
    assert codes(server.run(train, 1, config)) == [0]
    for resume in ("none", str(tmp_path / "run" / "step-00000003")):
        (outcome,) = server.run(
            train, 1, dataclasses.replace(config, checkpoint=CheckpointConfig(resume=resume))
        )
        assert outcome.code == 2 and "already holds checkpoints (newest step-00000006)" in outcome.output
    older = str(tmp_path / "run" / "step-00000003")
    elsewhere = dataclasses.replace(
        config, checkpoint=CheckpointConfig(resume=older), output_dir=str(tmp_path / "new")
    )
    assert codes(server.run(train, 1, elsewhere)) == [0]
    assert [m["step"] for m in metrics(tmp_path / "new")] == [4, 5, 6]
    newest = str(tmp_path / "run" / "step-00000006")
    same = dataclasses.replace(config, checkpoint=CheckpointConfig(resume=newest), steps=7)
    assert codes(server.run(train, 1, same)) == [0]


# ------------------------------------------------------------------------------------------ other layouts


def load_then_train(config: TrainConfig, dtype: torch.dtype, step: int, beside: str = "") -> None:
    """Resume; save at once what was loaded, in another folder; train up to `step`; all in fp32 or fp64."""
    torch.set_default_dtype(dtype)

    def plant(trainer: Trainer) -> None:
        if beside and trainer.step:
            save_checkpoint(
                Path(beside),
                trainer.step,
                trainer.state.pieces(),
                rank=trainer.mesh.rank,
                world_size=trainer.mesh.world_size,
                meta=trainer.state.meta(),
                extra_files=trainer.tokenizer.files,
                keep=1,
            )
        stop_at(trainer, step)

    train(config, plant, dtype)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight and moment of a checkpoint, joined."""
    verify_checkpoint(folder)
    reader = Reader(folder)
    shapes = {n: tuple(t["shape"]) for n, t in reader.manifest["tensors"].items()}
    return {n: reader.read_box(n, ((0,) * len(shape), shape)) for n, shape in shapes.items()}


def same_bits(a: Path, b: Path) -> None:
    left, right = whole(a), whole(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# At the recipe's 0.02 a cosine's rounding error is multiplied by 50, and single losses near zero differ by
# some 6e-6 in fp32.
ROUNDINGS = [
    pytest.param({"temperature": 0.1}, torch.float32, 1e-6, id="fp32", marks=pytest.mark.slow),
    pytest.param({"temperature": 0.02}, torch.float64, 1e-12, id="fp64"),
]


def close_losses(a: Path, b: Path, tolerance: float, steps: int) -> float:
    left, right = ([(m["step"], m["loss"]) for m in metrics(run)] for run in (a, b))
    assert [s for s, _ in left] == [s for s, _ in right] == list(range(1, steps + 1))
    worst = max(abs(x - y) / abs(x) for (_, x), (_, y) in zip(left, right, strict=True))
    print(f"largest relative difference of a loss: {worst:.1e}")
    assert worst <= tolerance
    return worst


@pytest.mark.fault(8)
@pytest.mark.dist
@pytest.mark.parametrize("loss, dtype, tolerance", ROUNDINGS)
def test_stopped_at_2_ranks_and_continued_at_1_2_and_4(
    tmp_path: Path, server: Server, loss: dict[str, float], dtype: torch.dtype, tolerance: float
) -> None:
    fixed: dict[str, Any] = {"steps": 40, "loss": loss, "checkpoint": {"every": 40}}
    assert codes(server.run(load_then_train, 2, config_for(tmp_path, "calm", **fixed), dtype, 40)) == [0, 0]
    assert codes(server.run(load_then_train, 2, config_for(tmp_path, "start", **fixed), dtype, 17)) == [0, 0]
    assert steps_in(tmp_path / "start") == [17]
    for world_size in (1, 2, 4):
        name = f"at-{world_size}"
        shutil.copytree(tmp_path / "start", tmp_path / name)
        (tmp_path / f"beside-{world_size}").mkdir()
        config = config_for(tmp_path, name, **fixed)
        beside = str(tmp_path / f"beside-{world_size}")
        assert codes(server.run(load_then_train, world_size, config, dtype, 40, beside)) == [0] * world_size
        same_bits(tmp_path / "start" / "step-00000017", Path(beside) / "step-00000017")
        ends = [read_manifest(checkpoints(tmp_path / n)[0]) for n in ("calm", name)]
        assert ends[0]["ledger"] == ends[1]["ledger"], "the same samples in every step"
        assert {f"torch.{t['dtype']}" for t in ends[1]["tensors"].values()} == {str(dtype)}
        worst = close_losses(tmp_path / "calm", tmp_path / name, tolerance, 40)
        assert worst == 0.0 or world_size != 2, "at the same world size not one bit differs"


@pytest.mark.fault(9)
@pytest.mark.dist
@pytest.mark.parametrize("loss, dtype, tolerance", ROUNDINGS)
def test_layouts_from_hop_to_hop(
    tmp_path: Path, server: Server, loss: dict[str, float], dtype: torch.dtype, tolerance: float
) -> None:
    """Five hops of eight steps over tp_size, dp_size, dp_replicate; the model has 4 KV heads."""
    fixed: dict[str, Any] = {"steps": 40, "loss": loss, "checkpoint": {"every": 40, "keep": 9}}
    assert codes(server.run(load_then_train, 1, config_for(tmp_path, "calm", **fixed), dtype, 40)) == [0]
    for hop, sizes in enumerate(((1, 1, 1), (2, 1, 1), (1, 4, 2), (4, 1, 1), (2, 2, 2))):
        beside = tmp_path / f"beside-{hop}"
        beside.mkdir()
        layout = dict(zip(("tp_size", "dp_size", "dp_replicate"), sizes, strict=True))
        config = config_for(tmp_path, "moved", **fixed, parallel=layout)
        world_size = sizes[0] * sizes[1]
        outcomes = server.run(load_then_train, world_size, config, dtype, 8 * hop + 8, str(beside))
        assert codes(outcomes) == [0] * world_size
        if hop:
            step = f"step-{8 * hop:08d}"
            assert read_manifest(beside / step)["layout"] == layout
            same_bits(tmp_path / "moved" / step, beside / step)
    close_losses(tmp_path / "calm", tmp_path / "moved", tolerance, 40)
    ledgers = {read_manifest(checkpoints(tmp_path / n)[0])["ledger"] for n in ("calm", "moved")}
    assert len(ledgers) == 1
    assert open_weights(str(tmp_path / "moved")).model == MODEL


def test_pieces_that_overlap_and_leave_a_hole_of_their_size_are_refused(tmp_path: Path) -> None:
    """As many elements as the tensor has, but one of them twice and one never."""
    pieces = [
        {"file": "a", "offset": [0, 0], "size": [3, 2]},
        {"file": "b", "offset": [2, 0], "size": [1, 2]},
    ]
    with pytest.raises(CheckpointError, match="w is stored twice, in b and a"):
        check_coverage(tmp_path, "w", [4, 2], pieces)
