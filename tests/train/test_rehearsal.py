"""The largest micro-batch is run before the first step, and the run is the one that it would have been."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server
from tiny import MODEL, train_config

from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

# FSDP2 keeps gradients between micro-batches in another place for each; split masters go without it on one
# rank.
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {"loss": {"in_batch": "positives"}, "activation_checkpointing": "full"},
    "split": {"precision": "bf16", "optim": {"master_weights": "split"}, "parallel": {"tp_size": 1}},
}


def rehearsed(folder: str, name: str) -> dict[bool, tuple[list[Any], list[Any]]]:
    """{whether it was rehearsed: (losses and norms, (tokens, sequences, longest, queries) of every
    micro-batch)}"""
    import torch.distributed as dist

    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train import engine
    from nemo_embed_core.train.preflight import Prepared

    dist.init_process_group("gloo")
    mesh, results = build_mesh(torch.device("cpu"), dist.get_world_size(), 1, False), {}
    forward_backward = engine.forward_backward
    for with_it in (False, True):
        config = train_config(
            Path(folder), steps=3, output_dir=f"{folder}/{name}-{with_it}", global_batch_size=16,
            **OPTIONS[name], data={"max_tokens": 200},
        )  # fmt: skip
        shapes: list[Any] = []

        def spy(model: Any, batches: Any, *args: Any, shapes: Any = shapes) -> Any:
            shapes.append(
                [(len(b.input_ids), len(b.lengths), b.max_seqlen, len(b.query_index)) for b in batches]
            )
            return forward_backward(model, batches, *args)

        engine.forward_backward = spy
        trainer = Trainer(config, mesh, Prepared(MODEL, load_tokenizer(config.tokenizer)), lambda line: None)
        if with_it:
            random = torch.get_rng_state()
            before = {n: p.detach().clone() for n, p in trainer.engine.model.named_parameters()}
            trainer.rehearse()
            assert torch.equal(torch.get_rng_state(), random)
            for n, p in trainer.engine.model.named_parameters():
                assert p.grad is None and torch.equal(p.detach(), before[n]), n
        steps = [trainer.train_step()[0] for _ in range(3)]
        results[with_it] = [(m["loss"], m["grad_norm"]) for m in steps], shapes
        trainer.prefetch.close()
        trainer.close()
    return results


@pytest.mark.dist
@pytest.mark.parametrize("name, ranks", [("fp32", 2), ("split", 2), ("split", 1)])
def test_a_rehearsed_run_has_the_same_bits(tmp_path: Path, server: Server, name: str, ranks: int) -> None:
    train_config(tmp_path)  # writes the data, before two ranks would
    answers = server.results(rehearsed, ranks, str(tmp_path), name)
    for answer in answers:
        (plain, _), (values, shapes) = answer[False], answer[True]
        assert values == plain and len({loss for loss, _ in values}) == 3
        first, steps = shapes[0], shapes[1:]
        assert len(first) == 2 and first[0] == first[1] and first == answers[0][True][1][0], "on all ranks"
        for batch in (batch for step in steps for batch in step):
            most = first[0][:3] if name == "fp32" else first[0]
            assert all(a <= b for a, b in zip(batch, most, strict=False)), (batch, most)
        assert first[0][0] > 150, "of 200"


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = train_config(tmp_path, steps=6)
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        yield trainer
        trainer.close()


def test_memory_that_does_not_suffice_is_said_before_the_first_step(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(trainer.engine.model, "forward", no_memory)
    with pytest.raises(MemoryError) as caught:
        trainer.rehearse()
    first, second = caught.value.__notes__
    assert "rank 0 was in micro-batch 1 of 2:" in first and "Lower data.max_tokens=320" in first
    assert second.startswith("No step was begun: this was as large as any micro-batch of steps 1 to 6")


def test_a_run_on_a_gpu_begins_with_it(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rehearsed(Exception):
        pass

    def rehearse() -> None:
        raise Rehearsed

    monkeypatch.setattr(trainer, "rehearse", rehearse)
    trainer.mesh = dataclasses.replace(trainer.mesh, device=torch.device("cuda", 0))
    with pytest.raises(Rehearsed):
        trainer.run()
    assert trainer.step == 0 and not (trainer.output / "metrics.jsonl").read_text()


def test_a_run_on_a_cpu_goes_without(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "rehearse", lambda: pytest.fail("nothing is kept for the largest there"))
    trainer.run()
    assert trainer.step == 6
