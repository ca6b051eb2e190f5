"""A grid of toys, and stand-ins for the processes of its steps, which write what the launchers would."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from tiny import MODEL, WORDS, write_rows, write_tokenizer
from toy_evaluation import write_beir

from nemo_embed_core.evaluation.results import write_rows as write_scores


def toy(folder: Path, **changes: Any) -> Path:
    """grid.yaml: two thresholds, two seeds, a first stage that both share; and its data."""
    if not (folder / "test").exists():
        write_tokenizer(folder / "tokenizer")
        write_rows(folder / "train.jsonl", 41)
        rng = np.random.default_rng(1)
        texts = [" ".join(rng.choice(WORDS, 5)) + f" {i}" for i in range(24)]
        queries = [
            {"_id": f"q{i}", "text": "find " + " ".join(text.split()[:2])} for i, text in enumerate(texts)
        ]
        corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
        write_beir(folder / "test", corpus, queries, [(f"q{i}", f"d{i}", 1) for i in range(24)])
    lengths = {"query_max_length": 48, "document_max_length": 48, "max_tokens": 320}
    common = {"global_batch_size": 8, "device": "cpu", "precision": "fp32", "seed": "{seed}"}
    data = {"num_hard_negatives": 2, **lengths}
    first = {**data, "datasets": [{"path": "{data}/train.jsonl", "task": "find it"}]}
    second = {**data, "datasets": [{"path": "{mine}", "task": "find it"}]}
    mine = {"model": "{warm}", "data": "{data}/train.jsonl", "num_negatives": 2, "device": "cpu"}
    tokenizer = {"tokenizer": "{data}/tokenizer", "model": asdict(MODEL)}
    grid = {
        "question": "Does a threshold matter?",
        "constants": {"data": str(folder)},
        "seeds": [1, 2],
        "axes": {"threshold": {"none": {"mine.threshold": None}, "0.6": {"mine.threshold": 0.6}}},
        "steps": {
            "warm": {"verb": "train", "options": {"steps": 2, **common, **tokenizer, "data": first}},
            "mine": {"verb": "mine", "options": mine},
            "train": {"verb": "train", "options": {"init_from": "{warm}", "steps": 2, **common,
                                                   "optim": {"lr": 1e-3}, "data": second}},
        },
        "figures": {"negatives": "mine.negatives"},
        "references": {"words": "bm25"},
        "evaluate": {"toy": {"data": "{data}/test", "device": "cpu"}},
        **changes,
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return folder / "grid.yaml"


def config_of(product: str | Path) -> dict[str, Any]:
    """Of the step that made it."""
    return yaml.safe_load((Path(product).parent / "config.yaml").read_text())


class Verbs:
    """Starts stand-ins in place of a step's process: monkeypatch.setattr(running, "_start", Verbs()).

    score(options of the evaluation) -> the score of each query.  started: names of steps.  acts: name ->
    what happens in place of the product: "fail", "hang" until it is ended, "deaf" to all but a kill, "stop"
    in the middle of training as at a signal.  ended: (name, signal).
    """

    def __init__(self, score: Callable[[dict[str, Any]], Sequence[float]] | None = None) -> None:
        self.score = score or (lambda options: [0.5, 0.25])
        self.started: list[str] = []
        self.commands: list[list[str]] = []
        self.ended: list[tuple[str, str]] = []
        self.acts: dict[str, str] = {}
        self.hanging = threading.Event()  # one does

    def __call__(self, command: list[str], log: IO[str], env: dict[str, str]) -> _Process:
        self.commands.append(command)
        return _Process(self, command[command.index("nemo_embed_core.steps.child") + 2 :])


class _Process:
    def __init__(self, verbs: Verbs, argv: list[str]):
        self.verbs, self.argv, self.signal = verbs, argv, threading.Event()
        self.is_merge = "merge" in argv
        self.config = {} if self.is_merge else yaml.safe_load(Path(argv[-1]).read_text())
        outputs = (self.config.get(name) for name in ("output_dir", "output"))
        self.product = Path(argv[argv.index("-o") + 1] if self.is_merge else next(filter(None, outputs)))
        self.name = self.product.parent.name.rpartition("-")[0]
        verbs.started.append(self.name)

    def wait(self) -> int:
        act = self.verbs.acts.get(self.name)
        if act in ("hang", "deaf"):
            self.verbs.hanging.set()
            assert self.signal.wait(60), "nobody ended it"
            return -15
        if act == "fail":
            assert not {"hang", "deaf"} & {*self.verbs.acts.values()} or self.verbs.hanging.wait(60)
            return 1
        self.make("stop" if act == "stop" else "")
        return 0

    def terminate(self) -> None:
        self._end("terminate")

    def kill(self) -> None:
        self._end("kill")

    def _end(self, way: str) -> None:
        self.verbs.ended.append((self.name, way))
        if way == "kill" or self.verbs.acts.get(self.name) != "deaf":
            self.signal.set()

    def make(self, act: str) -> None:
        cli = "nemo_embed_core.cli"
        kind = self.argv[self.argv.index(cli) + 1] if cli in self.argv else "judge"
        if kind == "train":
            run, last = self.product, self.config["steps"]
            done = 1 if act == "stop" else last
            folder = run / f"step-{done:08}"
            folder.mkdir(parents=True, exist_ok=True)
            manifest = {"step": done, "config": {"steps": last, "seed": self.config["seed"]}}
            (folder / "manifest.json").write_text(json.dumps(manifest))
            (run / "metrics.jsonl").write_text("{}\n")
        elif kind == "merge":
            self.product.mkdir()
        elif kind == "mine":
            assert not self.product.exists(), "mining takes new outputs only"
            self.product.write_text("{}\n")
            report = {"negatives": 100 * self.config["num_negatives"], "noise": {"copies": 3}}
            self.product.with_name(f"{self.product.name}.report.json").write_text(json.dumps(report))
        elif kind == "judge":
            self.product.write_text(json.dumps({"share": 0.125}))
        else:
            self.report()

    def report(self) -> None:
        (model,), scores = self.config["models"], list(self.verbs.score(self.config))
        assert model == "bm25" or Path(model).exists(), f"{model} was deleted before its evaluation"
        facts = {"name": self.config["name"], "type": "Retrieval", "main_score": "ndcg_at_10", "digest": "d",
                 "statistic": "mean" if scores[1:] else "none", "queries": len(scores)}  # fmt: skip
        rows = [{"id": f"q{i}", "ndcg_at_10": score} for i, score in enumerate(scores)]
        entry = {"ndcg_at_10": float(np.mean(scores)), "data": facts, **write_scores(self.product, 0, rows)}
        self.product.write_text(json.dumps({model: entry}))
