"""Schedule, accounting and signals of the trainer."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from crash import ledger_of
from safetensors.torch import save_file
from tiny import MODEL, train_config

from nemo_embed_core.checkpoint.manifest import CheckpointError, read_manifest, seal, verify_checkpoint
from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.checkpoint.source import resolve
from nemo_embed_core.config import DatasetConfig, ModelConfig, OptimConfig
from nemo_embed_core.data.packing import load_batch
from nemo_embed_core.errors import UserError
from nemo_embed_core.loss.contrastive import Groups
from nemo_embed_core.loss.objective import objective
from nemo_embed_core.model.spec import hf_shapes
from nemo_embed_core.parallel.fsdp import begin_micro_batch
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train import preflight
from nemo_embed_core.train.metrics import MetricsLog, training_flops
from nemo_embed_core.train.optim import build_optimizer
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.schedule import learning_rate
from nemo_embed_core.train.spikes import LossWindow, NonFiniteError
from nemo_embed_core.train.step import embed, group
from nemo_embed_core.train.trainer import Trainer


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def restore_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_warm_up_and_decay_are_linear() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, 12, config) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and all(abs((a - b) - 0.9 / 8) < 1e-12 for a, b in itertools.pairwise(rates[4:]))
    assert abs(learning_rate(12, 12, config) - 0.1) < 1e-12


def test_a_warm_up_that_is_left_out_reaches_the_rate() -> None:
    config = OptimConfig(lr=1.0)
    for steps, warmup_steps in ((1, 0), (5, 0), (50, 5), (700, 70), (1000, 100), (9000, 100)):
        rates = [learning_rate(step, steps, config) for step in range(steps)]
        assert max(rates) == 1.0 and rates.index(1.0) == max(0, warmup_steps - 1), steps


def test_a_run_keeps_its_warm_up_whatever_its_length_becomes(tmp_path: Path) -> None:
    """The default of a run from before it followed the steps, 100, too."""
    with distributed(train_config(tmp_path).parallel, "cpu", MODEL) as mesh:

        def run(steps: int, warmup_steps: int | None = None) -> tuple[Trainer, list[str]]:
            log: list[str] = []
            config = train_config(tmp_path, steps=steps, checkpoint={"resume": "auto"})
            trainer = Trainer(config, mesh, prepare(config), log=log.append)
            if warmup_steps is not None:
                trainer.state.optim = dataclasses.replace(trainer.state.optim, warmup_steps=warmup_steps)
            trainer.run()
            return trainer, log

        trainer, log = run(20)
        assert any("rises for 2 of 20 steps" in line for line in log), log
        manifest = read_manifest(checkpoints(tmp_path / "run")[0])
        assert manifest["config"]["optim"]["warmup_steps"] == 2
        trainer, log = run(40)
        assert trainer.state.optim.warmup_steps == 2 and not any("optim changed" in line for line in log), log
        run(45, warmup_steps=100)
        assert run(50)[0].state.optim.warmup_steps == 100
        with pytest.raises(
            UserError, match=r"step-00000050 has done 50 steps already and steps=2 .* set steps above 50"
        ):
            prepare(train_config(tmp_path, steps=2, checkpoint={"resume": "auto"}))
        _, log = run(50)
        assert "step 50 of steps=50 is done: nothing is left to train" in log and not any(
            "step 51" in line for line in log
        )


def test_epochs_are_steps_for_schedule_warm_up_and_resume(tmp_path: Path, capsys) -> None:
    """45 rows have a negative: two epochs are 12 steps of 8, the last of which has 6 rows of the third."""
    steps, epochs = (train_config(tmp_path, output_dir=str(tmp_path / name), **length) for name, length in (
        ("steps", {"steps": 12}), ("epochs", {"steps": None, "epochs": 2}))
    )  # fmt: skip
    with distributed(steps.parallel, "cpu", MODEL) as mesh:
        for config in (steps, epochs):
            Trainer(config, mesh, prepare(config), log=lambda message: None).run()
    said = "epochs=2 of 45 draws: 12 steps of 8 queries; 6 draws of the next epoch fill the last batches"
    assert said in capsys.readouterr().out
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("steps", "epochs")]
    for one, other in zip(*lines, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert one["lr"] == other["lr"] and one["loss"] == other["loss"]
    manifest = read_manifest(tmp_path / "epochs/step-00000012")
    assert manifest["config"]["steps"] == 12 and manifest["config"]["optim"]["warmup_steps"] == 1
    assert "epochs: 2" in (tmp_path / "epochs/config.yaml").read_text()
    resume = dataclasses.replace(epochs, checkpoint=dataclasses.replace(epochs.checkpoint, resume="auto"))
    prepare(resume)
    with pytest.raises(UserError, match="has done 12 steps already and steps=6 is the last"):
        prepare(dataclasses.replace(resume, epochs=1))
    with pytest.raises(UserError, match="give steps or epochs, not steps=3 and epochs=2"):
        dataclasses.replace(epochs, steps=3)
    with pytest.raises(UserError, match="give steps or epochs: how long"):
        dataclasses.replace(epochs, epochs=None)
    with pytest.raises(UserError, match="epochs=0 must be at least 1"):
        dataclasses.replace(epochs, epochs=0)
    with pytest.raises(UserError, match=r"warmup_steps=12 is not below steps=12"):
        prepare(dataclasses.replace(resume, optim=OptimConfig(warmup_steps=12)))


def test_wrong_resumes_are_refused_before_any_process_group(tmp_path: Path) -> None:
    config = train_config(tmp_path, steps=1)
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        Trainer(config, mesh, prepare(config), log=lambda message: None).run()
    done = str(tmp_path / "run/step-00000001")

    def refused(match: str, **changes: Any) -> None:
        changes = {"steps": 3, "checkpoint": {"resume": "auto"}, **changes}
        with pytest.raises(UserError, match=match):
            prepare(train_config(tmp_path, **changes))

    refused("nowhere is neither a checkpoint", checkpoint={"resume": str(tmp_path / "nowhere")})
    refused("already holds checkpoints", checkpoint={"resume": "none"})
    refused("seed was 0, now 1", seed=1)
    refused("global_batch_size was 8, now 4", global_batch_size=4)
    refused("num_hard_negatives was 2, now 1", data={"num_hard_negatives": 1})
    refused(r"data \(digest\) was", data={"document_max_length": 30})
    (dataset,) = config.data.datasets
    for option, value, before in (("weight", 2.5, "1.0"), ("cap", 20, "None")):
        mix = {"datasets": [dataclasses.replace(dataset, **{option: value})]}
        refused(rf"{option} of data.datasets was \[{before}\], now \[{value}\]", data=mix)
    refused("data.negatives was 'sample', now 'rotate'", data={"negatives": "rotate"})
    refused("data.batches was 'mixed', now 'one_source'", data={"batches": "one_source"})
    refused("a model of another shape", model=dataclasses.replace(MODEL, rope_theta=1e4))
    other = {"output_dir": str(tmp_path / "other"), "checkpoint": {"resume": done}}
    refused("step-00000001 has done 1 steps already and steps=0", steps=0, **other)
    prepare(train_config(tmp_path, steps=3, **other))


def test_a_run_begun_before_rows_without_candidates_were_left_out_goes_on_with_them(
    tmp_path: Path, capsys
) -> None:
    """Such a manifest has no population: steps 3 to 5 take their rows from all 61, over two resumes."""

    def run(steps: int, **changes: Any) -> dict[str, Any]:
        config = train_config(tmp_path, steps=steps, checkpoint={"resume": "auto", "keep": 9}, **changes)
        with distributed(config.parallel, "cpu", MODEL) as mesh:
            Trainer(config, mesh, prepare(config), log=lambda message: None).run()
        return read_manifest(checkpoints(tmp_path / "run")[0])

    manifest = run(2, loss={"in_batch": "positives"})  # draws all rows
    assert manifest.pop("population") == "" and "draws_lone_rows" not in manifest
    (tmp_path / "run/step-00000002/manifest.json").write_bytes(seal(manifest))
    capsys.readouterr()
    for steps in (4, 5):
        manifest = run(steps)
        assert (
            "WARNING: 16 of 61 rows have no negative" in (said := capsys.readouterr().out)
            and "it goes on to" in said
        )
        assert manifest["ledger"] == ledger_of(steps, rows=61) and manifest["draws_lone_rows"]
    # What it says is then step 4's to say.
    (tmp_path / "run/step-00000005/manifest.json").write_text("damaged")
    assert run(6)["ledger"] == ledger_of(6, rows=61)
    assert "it goes on to" in (said := capsys.readouterr().out) and "left out (first" not in said
    with pytest.raises(UserError, match=r"of 61 rows can have more than data.max_tokens=60 tokens"):
        run(7, data={"max_tokens": 60})


def test_a_keep_every_that_few_saves_meet_is_warned_of(tmp_path: Path, capsys) -> None:
    for every, keep_every, warned in ((4, 6, True), (4, 8, False), (4, 0, False)):
        prepare(train_config(tmp_path, checkpoint={"every": every, "keep_every": keep_every}))
        assert ("keep_every=6 is no multiple of checkpoint.every=4: "
        "of the steps that are saved only every 12th is kept"
                in capsys.readouterr().out) == warned  # fmt: skip


def test_a_checkpoint_says_how_its_texts_are_encoded(tmp_path: Path) -> None:
    config = train_config(tmp_path, steps=0)
    (tmp_path / "more.jsonl").write_text(
        "".join(f'{{"query": "a {i}", "pos": ["b {i}"], "neg": []}}\n' for i in range(70))
    )
    first = dataclasses.replace(config.data.datasets[0], document_task="say it")
    more = DatasetConfig(path=str(tmp_path / "more.jsonl"), task="other")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, datasets=[first, more], document_max_length=40)
    )
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        Trainer(config, mesh, prepare(config), log=lambda message: None).run()
    folder = checkpoints(tmp_path / "run")[0]
    assert read_manifest(folder)["usage"]["pooling"] == "mean"
    usage = resolve(folder).usage
    assert (usage.query_max_length, usage.document_max_length) == (48, 40)
    assert dict(usage.prompts) == {  # the data set with more rows first
        "more": ("Instruct: other\nQuery: ", ""),
        "train": ("Instruct: find it\nQuery: ", "Instruct: say it\nQuery: "),
    }


def test_another_pooling_cannot_continue_a_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[ModelConfig.__module__], "Pooling", Literal["mean", "last"])
    config = train_config(tmp_path, steps=1, checkpoint={"resume": "auto"})
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        meta = trainer.state.meta()
        assert meta["model"].pop("pooling") == "mean"  # as a run from before it was recorded
        trainer.state.meta = lambda: meta  # type: ignore[method-assign]
        trainer.save()
        prepare(config)
        meta["model"]["pooling"] = "last"
        shutil.rmtree(checkpoints(tmp_path / "run")[0])
        trainer.save()
        trainer.close()
    with pytest.raises(
        UserError, match=r"was trained with model\.pooling=last and this run has model\.pooling=mean"
    ):
        prepare(config)


def write_hf(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    shape = dataclasses.asdict(MODEL)
    shape["rope_scaling"] |= {"rope_type": "llama3"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    return {name: torch.full(shape, 0.1) for name, shape in hf_shapes(MODEL).items()}


def test_weights_that_are_not_finite_are_named_before_the_first_step(tmp_path: Path) -> None:
    """Of a checkpoint and of a Hugging Face folder, whose two tensors are rows of one of ours."""
    config = train_config(tmp_path, steps=1)
    bad = {"model.layers.0.self_attn.o_proj.weight": float("inf"), "exp_avg/model.norm.weight": float("nan")}
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        for name, value in bad.items():
            trainer.state.tensors()[name].view(-1)[7] = value
        trainer.save()
        trainer.close()
        resumed = train_config(tmp_path, steps=1, checkpoint={"resume": "auto"})
        with pytest.raises(
            UserError, match=r"step-00000000: NaN or infinite .*exp_avg/model.norm.weight, .*o_proj.weight;"
        ):
            Trainer(resumed, mesh, prepare(resumed), log=lambda message: None)
        copied = train_config(
            tmp_path, steps=1, output_dir=str(tmp_path / "copied"), init_from=str(tmp_path / "run")
        )
        with pytest.raises(
            UserError, match=r"step-00000000: NaN or infinite values in layers.0.self_attn.o_proj.weight;"
        ):
            Trainer(copied, mesh, prepare(copied), log=lambda message: None)
        theirs = tmp_path / "theirs"
        tensors = write_hf(theirs)
        for name, row in (("k_proj", 17), ("v_proj", 63)):
            tensors[f"layers.1.self_attn.{name}.weight"][row, 3] = float("-inf")
        save_file(tensors, theirs / "model.safetensors")
        config = train_config(tmp_path, steps=1, output_dir=str(tmp_path / "new"), init_from=str(theirs))
        names = r"layers.1.self_attn.k_proj.weight, layers.1.self_attn.v_proj.weight;"
        with pytest.raises(UserError, match=rf"theirs: NaN or infinite values in {names}"):
            Trainer(config, mesh, prepare(config), log=lambda message: None)


def test_a_loss_that_was_never_finite_is_not_blamed_on_the_rate(tmp_path: Path) -> None:
    config = train_config(tmp_path)
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        weight = trainer.state.tensors()["model.embed_tokens.weight"]
        for blamed in (False, True):
            kept = weight.clone()
            weight.fill_(float("nan"))
            with pytest.raises(NonFiniteError) as caught:
                trainer.train_step()
            assert ("Lower optim.lr" in str(caught.value)) == blamed
            assert ("optim.lr is not the cause" in str(caught.value)) == (not blamed)
            weight.copy_(kept)
            trainer.train_step()


def test_weight_decay_spares_the_norms(tmp_path: Path) -> None:
    config = train_config(tmp_path, optim={"weight_decay": 0.3})
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        decayed, spared = build_optimizer(trainer.engine.model, config.optim).param_groups
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
        assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in spared["params"])
        assert len(spared["params"]) == 2 * MODEL.num_hidden_layers + 1


def test_flops_of_llama_8b_per_token() -> None:
    """41.87 GF of GEMM a token, 1.57 MF x length of attention (from the shapes of Llama-3.1-8B)."""
    model = ModelConfig()
    assert abs(training_flops(model, 1, 0) / 41.87e9 - 1) < 1e-3
    assert training_flops(model, 0, 512 * 512) / 512 == 12 * 32 * 4096 * 512


def test_a_spike_enters_the_window_at_its_limit() -> None:
    window = LossWindow(6.0, [1.0, 1.2] * 10)
    zscore = window.judge(50.0)
    assert zscore is not None and abs(zscore - 489) < 1e-6 and abs(window.losses[-1] - 1.7) < 1e-12


def test_metrics_have_each_step_once_after_a_resume(tmp_path: Path) -> None:
    config = train_config(tmp_path, output_dir=str(tmp_path))
    log = MetricsLog(config, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    log = MetricsLog(config, 2)
    log.write({"step": 3, "loss": 0.25})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(m["step"], m["loss"]) for m in lines] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_metrics_say_what_a_step_was(tmp_path: Path) -> None:
    config = train_config(tmp_path, steps=2, tensorboard=True)
    printed: list[str] = []
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        Trainer(config, mesh, prepare(config), log=printed.append).run()
    first, second = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert (
        first["step"] == 1 and second["step"] == 2 and second["epoch"] == 2 * 8 / 45
    )  # of 61 rows 16 have no negative
    assert 0 <= first["accuracy"] <= 1 and -1 <= first["positive_similarity"] <= 1
    assert 0 < first["packing_density"] <= 1 and first["tokens_per_s"] > 0 and first["mfu"] is None
    assert sum(line.startswith("step ") for line in printed) == 2
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_sigterm_saves_and_stops_cleanly(tmp_path: Path, restore_signals: None) -> None:
    config = train_config(tmp_path, steps=1000, checkpoint={"every": 1000})
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        trainer.stop_on_signals()

        def terminate() -> None:
            while trainer.step < 3:
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=terminate).start()
        trainer.run()
    assert 3 <= trainer.step < 1000
    newest = checkpoints(tmp_path / "run")[0]
    assert verify_checkpoint(newest)["step"] == trainer.step


def test_a_nan_is_refused_and_leaves_the_weights_alone(tmp_path: Path) -> None:
    config = train_config(tmp_path)
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        embedding = trainer.state.tensors()["model.embed_tokens.weight"]
        row = int(trainer.store.query_tokens(int(trainer.sampler.rows(0)[0]))[-1])
        kept = embedding[row].clone()
        embedding[row] = float("nan")
        before = {name: t.clone() for name, t in trainer.state.tensors().items()}
        with pytest.raises(NonFiniteError, match=r"step 1: .*rows with a non-finite loss: \["):
            trainer.train_step()
        for name, t in trainer.state.tensors().items():
            assert torch.equal(t.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
        embedding[row] = kept
        trainer.train_step()
        assert trainer.step == 1


def test_what_a_nan_is_about_is_said_before_the_last_save_is_waited_for(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    config, said = train_config(tmp_path), []
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        trainer.state.tensors()["model.embed_tokens.weight"].fill_(float("nan"))
        close = trainer.saver.close
        monkeypatch.setattr(trainer.saver, "close", lambda: (said.append(capsys.readouterr().err), close()))
        with pytest.raises(NonFiniteError):
            trainer.run()
    assert len(said) == 1 and "error: step 1: " in said[0] and "rows with a non-finite loss" in said[0]


def test_a_restart_of_torchrun_goes_on_from_its_own_checkpoints(tmp_path: Path, monkeypatch) -> None:
    """Whatever the command says about resuming; before there is one of its own, as the command says."""

    def reached(name: str, steps: int, resume: str) -> tuple[int, list[str]]:
        log: list[str] = []
        config = train_config(
            tmp_path, steps=steps, output_dir=str(tmp_path / name), checkpoint={"every": 1, "resume": resume}
        )
        with distributed(config.parallel, "cpu", MODEL) as mesh:
            Trainer(config, mesh, prepare(config), log=log.append).run()
        return read_manifest(checkpoints(tmp_path / name)[0])["step"], log

    reached("old", 2, "none")
    old = str(tmp_path / "old/step-00000002")
    assert reached("new", 3, old)[0] == 3
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        reached("new", 4, old)
    monkeypatch.setattr(preflight, "begun_before", lambda: True)
    for steps, resume in ((4, old), (5, "none")):
        step, log = reached("new", steps, resume)
        assert step == steps and any(
            f"new/step-{steps - 1:08d} at step {steps - 1}" in line for line in log
        ), log
    step, log = reached("newer", 3, old)
    assert step == 3 and any("old/step-00000002 at step 2" in line for line in log), log


def run_losses(folder: Path, **changes: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    config = train_config(folder, steps=3, **changes)
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        losses = [trainer.train_step()[0]["loss"] for _ in range(3)]
        return losses, {name: t.clone() for name, t in trainer.state.tensors().items()}


def test_activation_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    plain, state = run_losses(tmp_path)
    for word in ("selective", "full"):
        recomputed, same_state = run_losses(tmp_path, activation_checkpointing=word)
        assert plain == recomputed and state.keys() == same_state.keys()
        assert all(torch.equal(state[name], same_state[name]) for name in state)


def test_grad_cache_takes_one_forward_less_for_the_same_bits(tmp_path: Path) -> None:
    """Its own graph in the last forward of the first pass, beside a second forward of every micro-batch."""
    config = train_config(tmp_path, loss={"in_batch": "all"}, data={"max_tokens": 200})
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
        engine, forwards = trainer.engine, []
        model = engine.model
        model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
        batches, _ = load_batch(trainer.store, trainer.sampler, 0, 0, 1, config.data, 1, config.seed)
        n = len(batches)
        losses_B, _ = engine.forward_backward(batches)
        assert n >= 3 and forwards == [False] * (n - 1) + [True] * n
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}

        engine.optimizer.zero_grad()
        with torch.no_grad():
            embeddings = [embed(model, batch).requires_grad_() for batch in batches]
        each = [group(e, batch) for e, batch in zip(embeddings, batches, strict=True)]
        names = [f.name for f in dataclasses.fields(Groups) if getattr(each[0], f.name) is not None]
        whole = Groups(**{name: torch.cat([getattr(g, name) for g in each]) for name in names})
        want_B, _ = objective(whole, config.loss, engine.dtype, mesh.dp_group, mesh.dp_rank)
        want_B.mean().backward()
        for i, (e, batch) in enumerate(zip(embeddings, batches, strict=True)):
            begin_micro_batch(model, i == n - 1)
            embed(model, batch).backward(e.grad)
        assert torch.equal(losses_B, want_B.detach())
        assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


def test_bf16_follows_fp32_and_keeps_fp32_masters(tmp_path: Path) -> None:
    exact, _ = run_losses(tmp_path)
    rounded, state = run_losses(tmp_path, precision="bf16")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(abs(a - b) < 0.05 * a for a, b in zip(exact, rounded, strict=True)), (exact, rounded)
    assert rounded != exact


def test_a_tokenizer_that_could_not_be_served_is_refused_before_step_0(tmp_path: Path, capsys) -> None:
    config = train_config(tmp_path)
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "truncation_side": "left", "add_eos_token": True}))
    prepare(config)
    said = capsys.readouterr().out
    assert (
        'WARNING: tokenizer_config.json says add_eos_token: true, truncation_side: "left", which is not in'
        in said
    )
    file.write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    with pytest.raises(UserError, match=r"names pad_token '<pad>', which tokenizer.json does not have"):
        prepare(config)
    assert not list(tmp_path.glob("run/step-*"))
