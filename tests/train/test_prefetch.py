"""Batches made ahead by a thread are those that a step would make itself, and so are its errors."""

import json
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash import final_state
from tiny import MODEL, train_config

from nemo_embed_core.data.packing import MicroBatch
from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train import trainer as trainer_module
from nemo_embed_core.train.prefetch import Prefetch, Upload
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

CPU = torch.device("cpu")
BITS = ("loss", "grad_norm", "accuracy", "tokens", "micro_batches")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


class SlowDevice(Upload):
    """A device that makes a copy only when it is waited for, or at the end."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.pending: list[Any] = []
        self.allocated: list[int] = []

    def _pinned(self, size: int) -> torch.Tensor:
        self.allocated.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    def _copy(self, pinned: torch.Tensor) -> tuple[torch.Tensor, Any]:
        copy = torch.empty_like(pinned)

        class Event:
            def synchronize(event) -> None:
                copy.copy_(pinned)
                event.synchronize = lambda: None  # the copy is made once

        event = Event()
        self.pending.append(event)
        return copy, event

    def catch_up(self) -> None:
        for event in self.pending:
            event.synchronize()


class InTime(SlowDevice):
    """The same, for the work that is launched behind a copy."""

    def __call__(self, batches: Any) -> list[MicroBatch]:
        moved = super().__call__(batches)
        self.catch_up()
        return moved


def micro_batch(rng: np.random.Generator, tokens: int) -> MicroBatch:
    ints = {
        name: torch.from_numpy(rng.integers(0, 2**40, shape))
        for name, shape in {
            "input_ids": tokens, "position_ids": tokens, "query_index": 3, "document_index": (3, 4),
            "document_ids": (3, 4), "known_ids": (3, tokens % 2),
        }.items()
    }  # fmt: skip
    return MicroBatch(
        **ints, cu_seqlens=torch.from_numpy(rng.integers(0, 99, 7).astype(np.int32)), lengths=(tokens,),
        document_mask=torch.from_numpy(rng.random((3, 4)) > 0.5), max_seqlen=tokens, num_sequences=1,
        num_tokens=tokens, rows=np.arange(3),
    )  # fmt: skip


def test_no_pinned_buffer_is_written_while_its_copy_is_in_flight() -> None:
    rng, device = np.random.default_rng(0), SlowDevice()
    steps = [[micro_batch(rng, n) for n in sizes] for sizes in ([7], [40, 3], [900, 5], [7], [901], [12, 8])]
    moved = [device(batches) for batches in steps]
    device.catch_up()
    for before, after in zip(steps, moved, strict=True):
        for a, b in zip(before, after, strict=True):
            for name, value in vars(a).items():
                if isinstance(value, torch.Tensor):
                    other = getattr(b, name)
                    assert other.dtype == value.dtype and torch.equal(other, value), name
                    assert other.data_ptr() % 16 == 0, "else Triton compiles a kernel once more"
                else:
                    assert getattr(b, name) is value
    assert len(device.allocated) == 3, "a buffer that is large enough is used again"


def lines(folder: Path) -> list[list[Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [[m[name] for name in BITS] for m in map(json.loads, text.splitlines())]


def run(
    folder: Path, *, steps: int, upload: Upload | None = None, load: Any = None, **changes: Any
) -> Trainer:
    """In folder / "run"; several micro-batches a step, over an epoch's end."""
    config = train_config(
        folder, steps=steps, global_batch_size=16, data={"max_tokens": 200},
        checkpoint={"resume": "auto", "every": 9}, **changes,
    )  # fmt: skip
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        trainer.prefetch._upload = upload
        if load is not None:
            trainer.prefetch._load = load(trainer._load)
        trainer.run()
    return trainer


def test_a_run_has_the_bits_of_one_whose_steps_load_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = {"in_batch": "positives"}  # GradCache takes each micro-batch twice
    run(tmp_path / "ahead", steps=4, upload=InTime(), loss=loss)
    with monkeypatch.context() as patched:
        patched.setattr(Prefetch, "begin", lambda self, step: None)
        patched.setattr(Prefetch, "take", lambda self, step: self._load(step))
        run(tmp_path / "itself", steps=4, loss=loss)
    ahead, itself = (tmp_path / name / "run" for name in ("ahead", "itself"))
    assert lines(ahead) == lines(itself) and len(lines(ahead)) == 4
    assert min(m[-1] for m in lines(ahead)) > 1, "micro-batches"
    (ledger, files), (right_ledger, right) = (final_state(folder, 4) for folder in (ahead, itself))
    shards = [name for name in right if name.endswith(".safetensors")]
    assert ledger == right_ledger and shards and all(files[name] == right[name] for name in shards)


def test_the_next_batch_is_begun_before_the_loss_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    threads: set[int] = set()

    def totals(*args: Any) -> Any:
        finite, read = step_totals(*args)
        return finite, lambda: (seen.append("read"), read())[1]

    def load(real: Any) -> Any:
        def loading(step: int) -> Any:
            threads.add(threading.get_ident())
            return real(step)

        return loading

    step_totals, begin = trainer_module.step_totals, Prefetch.begin
    monkeypatch.setattr(trainer_module, "step_totals", totals)
    monkeypatch.setattr(
        Prefetch, "begin", lambda self, step: (seen.append(f"begin {step}"), begin(self, step))[1]
    )
    run(tmp_path, steps=3, load=load)
    assert seen == ["begin 0", "begin 1", "read", "begin 2", "read", "read"], "and none that is not run"
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_what_fails_in_the_thread_fails_the_step_that_needs_it(tmp_path: Path) -> None:
    def load(real: Any) -> Any:
        def loading(step: int) -> Any:
            if step == 2:
                raise UserError("the store is gone")
            return real(step)

        return loading

    with pytest.raises(UserError, match="the store is gone") as caught:
        run(tmp_path, steps=4, load=load)
    assert "in loading\n" in "".join(traceback.format_exception(caught.value)), "its own traceback"
    assert len(lines(tmp_path / "run")) == 2, "the steps before it were made"


def test_a_batch_of_another_step_is_not_taken() -> None:
    let_go, order = threading.Event(), []

    def load(step: int) -> Any:
        assert let_go.wait(60)
        order.append(step)
        return np.array([step]), [], step

    prefetch = Prefetch(load, CPU)
    prefetch.begin(3)  # returns while the thread waits
    let_go.set()
    assert prefetch.take(5)[2] == 5 and prefetch.take(6)[2] == 6
    prefetch.begin(7)
    assert prefetch.take(7)[2] == 7 and order == [3, 5, 6, 7], "each is made once"
    prefetch.close()
