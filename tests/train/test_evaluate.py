"""Scores in training: mteb's figures, at every layout, without a trace in the training; the best checkpoint,
through kills and resumes."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash import Worker, config_for, final_state
from forked import Server
from tiny import MODEL, WORDS, train_config
from toy_evaluation import write_beir

from nemo_embed_core.checkpoint.manifest import read_manifest
from nemo_embed_core.checkpoint.runs import checkpoints, find_checkpoint
from nemo_embed_core.checkpoint.source import resolve
from nemo_embed_core.config import EvalConfig, EvalDatasetConfig, EvaluateConfig, TrainConfig
from nemo_embed_core.config.evaluate import LocalTask
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel.mesh import build_mesh, distributed
from nemo_embed_core.train.evaluate import Evaluation
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def write_dev(folder: Path) -> None:
    """folder/dev: 40 queries over 150 documents of ragged lengths, some of them twice under other ids, with
    grades, zeros, queries that are documents; folder/sts.jsonl: 60 pairs, some twice or of one text."""
    if folder.joinpath("dev").exists():
        return
    rng = random.Random(5)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(150)]
    for i in range(0, 150, 10):
        texts[i] = texts[(i + 37) % 150]
    corpus = [{"_id": f"x{i * 7919 % 1000}", "title": "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"x{i * 7919 % 1000}" if i % 4 == 0 else f"q{i}",
                "text": text if i % 4 == 0 else " ".join(rng.sample(text.split(), min(4, len(text.split()))))}
               for i, text in enumerate(texts[:40])]  # fmt: skip
    judged = [(query["_id"], corpus[i]["_id"], 1 + i % 3) for i, query in enumerate(queries)]
    judged += [(query["_id"], corpus[i + 50]["_id"], i % 3) for i, query in enumerate(queries)]
    write_beir(folder / "dev", corpus, queries, judged)
    (folder / "dev/qrels/test.tsv").rename(folder / "dev/qrels/dev.tsv")
    pairs = [{"sentence1": " ".join(rng.choices(WORDS, k=5)), "sentence2": " ".join(rng.choices(WORDS, k=5)),
              "score": rng.randint(0, 10) / 2} for _ in range(50)]  # fmt: skip
    pairs += [{**pair, "score": 3} for pair in pairs[:5]]
    pairs += [{**pair, "sentence2": pair["sentence1"], "score": 5} for pair in pairs[:5]]
    (folder / "sts.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def dev_config(folder: Path, **changes: Any) -> EvalConfig:
    write_dev(folder)
    datasets = [
        EvalDatasetConfig(path=str(folder / "dev")),
        EvalDatasetConfig(path=str(folder / "dev"), name="own", task="other", ignore_identical_ids=True),
        EvalDatasetConfig(path=str(folder / "sts.jsonl"), task_type="sts"),
    ]
    return dataclasses.replace(EvalConfig(datasets=datasets, every=2, max_share=1.0), **changes)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path) -> dict[int, dict[str, float]]:
    clocks = ("seconds", "share")
    return {line["step"]: {k: v for k, v in line["eval"].items() if k not in clocks}
            for line in lines(run) if "eval" in line}  # fmt: skip


def run(config: TrainConfig) -> list[str]:
    log: list[str] = []
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        Trainer(config, mesh, prepare(config), log=log.append).run()
    return log


def of_formula(folder: Path, model: Path, instruction: str, ignores_own: bool) -> float:
    """The mean loss over the queries: texts as they are, one at a time, in fp64."""
    embedder = Embedder.load(model, "cpu")
    read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]  # noqa: E731
    queries, corpus = read("queries.jsonl"), {row["_id"]: row["text"] for row in read("corpus.jsonl")}
    texts = list(dict.fromkeys(corpus.values()))
    q = embedder.encode([row["text"] for row in queries], f"Instruct: {instruction}\nQuery: ", 20)
    d = embedder.encode(texts, "", 48).astype(np.float64)
    judged = [line.split("\t") for line in (folder / "qrels/dev.tsv").read_text().splitlines()[1:]]
    losses = []
    for query, row in zip(queries, q.astype(np.float64), strict=True):
        right = {corpus[doc] for asked, doc, grade in judged if asked == query["_id"] and int(grade) > 0}
        own = {corpus[query["_id"]]} if ignores_own and query["_id"] in corpus else set()
        e = {text: math.exp(float(row @ vector) / 0.02) for text, vector in zip(texts, d, strict=True)}
        negatives = math.fsum(e[text] for text in e.keys() - right - own)
        if each := [-math.log(e[text] / (e[text] + negatives)) for text in right - own]:
            losses.append(np.mean(each))
    assert len(losses) < len(queries) if ignores_own else len(losses) == len(queries)
    return float(np.mean(losses))


def test_figures_are_those_of_launch_evaluate_and_of_the_formula_of_the_loss(tmp_path: Path) -> None:
    """On the checkpoints of two steps, mteb's: to the last digit but one of fp32's order of near ties."""
    from nemo_embed_core.evaluation.run import run as evaluate

    config = train_config(
        tmp_path, steps=3, eval=dev_config(tmp_path), checkpoint={"every": 1, "keep": 9},
        data={"query_max_length": 20, "max_tokens": 330}, optim={"lr": 3e-3},
    )  # fmt: skip
    run(config)
    found = figures(tmp_path / "run")
    assert list(found) == [0, 2, 3]
    models = {step: tmp_path / f"run/step-{step:08d}" for step in (2, 3)}
    data, reports = {"data": str(tmp_path / "dev"), "split": "dev"}, tmp_path / "reports"
    local = [
        LocalTask(name="dev", **data),
        LocalTask(name="own", task="other", ignore_identical_ids=True, **data),
        LocalTask(name="sts", data=str(tmp_path / "sts.jsonl"), split="dev", task_type="sts"),
    ]
    names = [str(model) for model in models.values()]
    report = evaluate(EvaluateConfig(models=names, local=local, device="cpu", output=str(reports)))
    for step, model in models.items():
        for name in ("dev", "own"):
            entry = report[name][str(model)]
            rows = [json.loads(line) for line in (reports / entry["per_query"]).read_text().splitlines()]
            want = math.fsum(row["ndcg_at_10"] for row in rows) / len(rows)
            assert abs(found[step][f"{name}/ndcg_at_10"] - want) < 1e-6, (step, name)
            assert abs(entry["ndcg_at_10"] - want) < 1e-5  # mteb rounds
        assert abs(found[step]["sts/spearman"] - report["sts"][str(model)]["spearman"]) < 1e-6
        means = [found[step][key] for key in ("dev/ndcg_at_10", "own/ndcg_at_10", "sts/spearman")]
        assert found[step]["mean"] == math.fsum(means) / 3
        for name, options in (("dev", ("find it", False)), ("own", ("other", True))):
            want = of_formula(tmp_path / "dev", model, *options)
            assert abs(found[step][f"{name}/loss"] / want - 1) < 1e-5, (step, name)
    assert len({found[step]["dev/ndcg_at_10"] for step in found}) > 2, "the weights that train are scored"


def trained(config: TrainConfig) -> tuple[list[float], dict[int, dict[str, float]]]:
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        Trainer(config, mesh, prepare(config), log=lambda message: None).run()
    folder = Path(config.output_dir)
    return [line["loss"] for line in lines(folder) if "loss" in line], figures(folder)


@pytest.mark.parametrize("in_batch", ["none", pytest.param("all", marks=pytest.mark.slow)])
def test_losses_and_weights_are_those_of_a_run_that_is_not_evaluated(tmp_path: Path, in_batch: str) -> None:
    data = {"max_tokens": 200} if in_batch == "none" else {}
    calm = train_config(tmp_path, steps=3, loss={"in_batch": in_batch}, data=data)
    scored = dataclasses.replace(
        calm, output_dir=str(tmp_path / "scored"), eval=dev_config(tmp_path, every=1)
    )
    losses, none = trained(calm)
    assert len(losses) == 3 and not none
    again, found = trained(scored)
    assert again == losses and list(found) == [0, 1, 2, 3]
    assert final_state(tmp_path / "scored", 3) == final_state(tmp_path / "run", 3)


LAYOUTS = {2: [(2, False, 1), (2, True, 1), (1, False, 2)], 4: [(2, True, 2), (1, False, 4)]}


def figures_of_rank(config: TrainConfig, layouts: list[tuple[int, bool, int]]) -> list[Any]:
    """Of two evaluations and a step between them, under each layout."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found = []
    for tp_size, sequence_parallel, dp_size in layouts:
        parallel = dataclasses.replace(config.parallel, tp_size=tp_size, sequence_parallel=sequence_parallel)
        name = f"run-{tp_size}-{sequence_parallel}-{dp_size}"
        one = dataclasses.replace(config, parallel=parallel, output_dir=str(Path(config.output_dir, name)))
        mesh = build_mesh(torch.device("cpu"), dp_size, tp_size, sequence_parallel)
        trainer = Trainer(one, mesh, prepare(one), log=lambda message: None, dtype=torch.float64)
        values = [trainer.evaluation.after(0)["eval"]]
        trainer.train_step()
        values.append(trainer.evaluation.after(1)["eval"])
        trainer.close()
        found.append([{k: v for k, v in value.items() if k not in ("seconds", "share")} for value in values])
    return found


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_gives_the_same_figures(tmp_path: Path, server: Server, world_size: int) -> None:
    """Each rank has batches that others have not, and of four some have none. Of the same weights to the last
    digit at any number of data-parallel ranks; tensor parallelism adds in another order, and so does the step
    between, which moves no document."""
    config = train_config(tmp_path, steps=1, eval=dev_config(tmp_path), optim={"lr": 3e-3, "warmup_steps": 0})
    (((before, after),),) = server.results(figures_of_rank, 1, config, [(1, False, 1)])
    assert before != after
    for of_rank in server.results(figures_of_rank, world_size, config, LAYOUTS[world_size]):
        for layout, found in zip(LAYOUTS[world_size], of_rank, strict=True):
            for want, have in zip((before, after), found, strict=True):
                if layout[0] == 1 and want is before:
                    assert have == want, layout
                for name, value in want.items():
                    limit = {"ndcg_at_10": 0, "loss": 5e-6}.get(name.rpartition("/")[2], 1e-3)
                    assert abs(have[name] - value) <= limit * value, (layout, name)


PLAN = {0: 0.9, 1: 0.2, 2: 0.1, 3: 0.6, 4: 0.6, 5: 0.3, 6: 0.1}


def planned(monkeypatch: pytest.MonkeyPatch, plan: dict[int, float]) -> None:
    def retrieval(self: Evaluation, *_: Any) -> dict[str, float]:
        return {"ndcg_at_10": plan[self._step], "loss": 1 - plan[self._step]}

    monkeypatch.setattr(Evaluation, "_retrieval", retrieval)


@pytest.mark.parametrize("metric", ["mean", "dev/loss"])
def test_the_best_checkpoint_is_kept_beside_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """Step 0 has no checkpoint; a step that equals the best is not better; what was the best may go."""
    planned(monkeypatch, PLAN)
    dev = dev_config(tmp_path, every=1, metric=metric)
    dev = dataclasses.replace(dev, datasets=dev.datasets[:1])
    checkpoint = {"every": 5, "keep": 1, "resume": "auto"}
    config = train_config(tmp_path, steps=6, eval=dev, checkpoint=checkpoint)
    run(config)
    folder = tmp_path / "run"
    assert [path.name for path in checkpoints(folder)] == ["step-00000006", "step-00000003"]
    assert find_checkpoint(folder / "best") == folder / "step-00000003"
    assert find_checkpoint(folder) == folder / "step-00000006"
    assert resolve(folder / "best").folder == folder / "step-00000003"
    assert (
        Embedder.load(folder / "best", "cpu").digest == Embedder.load(folder / "step-00000003", "cpu").digest
    )
    best = {"step": 3, "value": 0.6 if metric == "mean" else 1 - 0.6}
    assert read_manifest(folder / "step-00000006")["eval"]["best"] == best
    # A run that goes on knows what it has to beat, and forgets it where the dev set is another one.
    planned(monkeypatch, {7: 0.6, 8: 0.5})
    assert not any(
        "step 7: " in line and "best of step 7" in line for line in run(dataclasses.replace(config, steps=8))
    )
    assert [path.name for path in checkpoints(folder)] == ["step-00000008", "step-00000003"]
    planned(monkeypatch, {8: 0.1, 9: 0.4})
    other = dataclasses.replace(dev, datasets=[dataclasses.replace(dev.datasets[0], max_queries=39)])
    log = run(dataclasses.replace(config, steps=9, eval=other))
    assert any("cannot be compared" in line for line in log)
    assert [path.name for path in checkpoints(folder)] == ["step-00000009"]
    assert find_checkpoint(folder / "best") == folder / "step-00000009"


def test_a_best_that_is_not_there_is_said(tmp_path: Path) -> None:
    config = train_config(tmp_path, steps=1)
    run(config)
    with pytest.raises(UserError, match=r"run has no best checkpoint: it was trained without eval.datasets"):
        resolve(tmp_path / "run/best")
    with pytest.raises(UserError, match="is not a folder"):
        resolve(tmp_path / "best")


@pytest.mark.dist
def test_killed_in_an_evaluation_and_in_the_save_of_the_best(tmp_path: Path, worker: Worker) -> None:
    """Figures, best and weights are those of the calm run, on two ranks."""
    changes: dict[str, Any] = {"steps": 5, "eval": dev_config(tmp_path, every=1), "optim": {"lr": 3e-3}}
    changes["checkpoint"] = {"every": 4, "keep": 1}
    calm, killed = (config_for(tmp_path, name, **changes) for name in ("calm", "killed"))
    assert worker.run(calm, world_size=2) == [0, 0]
    best = read_manifest(checkpoints(tmp_path / "calm")[0])["eval"]["best"]["step"]
    for kill in ("step.begin@0", "save.before_rename@1", "eval.batch@3.4"):
        assert -9 in worker.run(killed, fail=kill, world_size=2), kill
    assert worker.run(killed, world_size=2) == [0, 0]
    assert figures(tmp_path / "killed") == figures(tmp_path / "calm")
    steps = [[line["step"] for line in lines(tmp_path / name)] for name in ("calm", "killed")]
    assert steps == [[0, 1, 2, 3, 4, 5]] * 2
    assert final_state(tmp_path / "killed", 5) == final_state(tmp_path / "calm", 5)
    records = [read_manifest(checkpoints(tmp_path / name)[0])["eval"] for name in ("calm", "killed")]
    assert records[0] == records[1]
    kept = [[path.name for path in checkpoints(tmp_path / name)] for name in ("calm", "killed")]
    assert kept[0] == kept[1] and f"step-{best:08d}" in kept[0]


@pytest.mark.slow
def test_a_signal_leaves_an_evaluation_and_the_resume_makes_it(tmp_path: Path) -> None:
    config = train_config(tmp_path, steps=3, eval=dev_config(tmp_path), checkpoint={"resume": "auto"})
    calm = dataclasses.replace(config, output_dir=str(tmp_path / "calm"))
    run(calm)
    log: list[str] = []
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=log.append)
        real = trainer.evaluation._before

        def before(phase: str, i: int) -> None:
            trainer._stop |= trainer.step == 2 and i == 3
            real(phase, i)

        trainer.evaluation._before = before
        trainer.run()
    assert trainer.step == 2 and any(
        "left the evaluation of step 2 before evaluation 3/" in line for line in log
    )
    run(config)
    assert figures(tmp_path / "run") == figures(tmp_path / "calm")
    assert final_state(tmp_path / "run", 3) == final_state(tmp_path / "calm", 3)


def test_an_evaluation_that_costs_too_much_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which an evaluation takes 2 s and a step 1 s; a quarter of the time: 6 steps apart."""
    time_s = [0.0]
    real_step = Trainer.train_step

    def train_step(self: Trainer) -> Any:
        time_s[0] += 1
        return real_step(self)

    def retrieval(self: Evaluation, *_: Any) -> dict[str, float]:
        time_s[0] += 2
        return {"ndcg_at_10": 0.5, "loss": 1.0}

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(Evaluation, "_retrieval", retrieval)
    dev = dev_config(tmp_path, every=2, max_share=0.25)
    dev = dataclasses.replace(dev, datasets=dev.datasets[:1])
    config = train_config(tmp_path, steps=16, eval=dev, log_every=100)
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        log: list[str] = []
        trainer = Trainer(config, mesh, prepare(config), log=log.append)
        trainer.evaluation._clock = lambda: time_s[0]
        trainer.run()
    found = {line["step"]: line["eval"] for line in lines(tmp_path / "run") if "eval" in line}
    assert list(found) == [0, 6, 12, 16]
    assert [found[step]["seconds"] for step in found] == [2] * 4
    assert [found[step]["share"] for step in (6, 12)] == [2 / 8, 4 / 16]
    assert sum("left out" in line for line in log) == 3 and "eval.max_share=0.25" in "".join(log)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "nowhere"}, r"eval.datasets: nowhere: .*nowhere"),
        ({"split": "test"}, r"eval.datasets: dev: .*qrels"),
        ({"prompt_name": "nq"}, r"eval.datasets: dev: prompt_name='nq': the model's prompts are train"),
        ({"task": "a " * 60}, r"eval.datasets: dev: data.query_max_length=48 tokens leaves no room"),
        ({"name": "a/b"}, "must be of letters"),
        ({"task_type": "sts", "max_queries": 3}, "max_queries is of task_type retrieval"),
        ({"task_type": "sts", "on_missing": "allow"}, "on_missing is of task_type retrieval"),
    ],
)  # fmt: skip
def test_a_wrong_dev_set_stops_the_run_before_it_begins(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    dev = dev_config(tmp_path)
    with pytest.raises(UserError, match=message):
        prepare(train_config(tmp_path, eval=dataclasses.replace(
            dev, datasets=[dataclasses.replace(dev.datasets[0], **change)]
        )))  # fmt: skip


def test_wrong_options_of_the_evaluation_are_refused(tmp_path: Path) -> None:
    for change, message in (
        ({"every": 0}, "eval.every=0"),
        ({"max_share": 1.5}, "eval.max_share=1.5"),
        ({"metric": "sts/loss"}, "is none of mean, dev/ndcg_at_10, own/ndcg_at_10, sts/spearman, dev/loss"),
    ):
        with pytest.raises(UserError, match=message):
            dev_config(tmp_path, **change)


def test_samples_are_those_of_launch_evaluate_and_hold_what_is_judged(tmp_path: Path) -> None:
    from nemo_embed_core.evaluation.retrieval_task import Retrieval

    dev = dev_config(tmp_path, seed=3)
    sample = dataclasses.replace(dev.datasets[0], max_queries=7, max_documents=60)
    whole, part = (
        prepare(train_config(tmp_path, eval=dataclasses.replace(dev, datasets=[one]))).dev_sets
        for one in (dev.datasets[0], sample)
    )
    ids = [json.loads(line)["_id"] for line in (tmp_path / "dev/queries.jsonl").read_text().splitlines()]
    data = EvaluateConfig(data=str(tmp_path / "dev"), split="dev", max_queries=7)
    queries = [Retrieval(data, seed).beirs[0].queries for seed in (3, 4)]
    chosen, other = ([ids.index(query) for query in one] for one in queries)
    assert len(chosen) == 7 and chosen == sorted(set(chosen)) != other and chosen != list(range(7))
    assert len(part[0].queries.of) == 7 and len(part[0].documents.of) == 60
    tokens = [part[0].queries.tokens[i].tolist() for i in part[0].queries.of]
    assert tokens == [whole[0].queries.tokens[whole[0].queries.of[i]].tolist() for i in chosen]
    assert part[0].ideal_Q.tolist() == whole[0].ideal_Q[chosen].tolist()
    assert len(part[0].judged_J) == sum(1 + (i % 3 > 0) for i in chosen)


@pytest.mark.parametrize("best", [3, 1])
def test_a_signal_in_the_last_step_leaves_its_evaluation_to_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    """It is in the metrics once, in the manifest of the checkpoint that is there already, and made once."""
    planned(monkeypatch, {0: 0.1, 1: 0.5, 2: 0.4, 3: 0.6 if best == 3 else 0.2})
    dev = dev_config(tmp_path, every=1)
    dev = dataclasses.replace(dev, datasets=dev.datasets[:1])
    config = train_config(tmp_path, steps=3, eval=dev, checkpoint={"resume": "auto"})
    real_step = Trainer.train_step

    def train_step(self: Trainer) -> Any:
        real_clip = self.engine.clip

        def clip() -> Any:  # after the last forward, which a signal would leave out
            self._stop = self.step == 2
            return real_clip()

        self.engine.clip = clip
        return real_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        run(config)
    assert list(figures(tmp_path / "run")) == [0, 1, 2]
    for made in (1, 0):
        log = run(config)
        assert sum("evaluation of step 3: " in line for line in log) == made
        assert list(figures(tmp_path / "run")) == [0, 1, 2, 3]
        record = read_manifest(tmp_path / "run/step-00000003")["eval"]
        assert record["step"] == 3 and record["best"]["step"] == best
        assert find_checkpoint(tmp_path / "run/best").name == f"step-{best:08d}"
