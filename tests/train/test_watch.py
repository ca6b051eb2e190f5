"""The alarms of a run: what its steps have at hand reaches them, and no number of the run changes."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tiny import MODEL, train_config

from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train import watch as module
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.step import embed
from nemo_embed_core.train.trainer import Trainer
from nemo_embed_core.train.watch import Watch


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(step: int, loss: float = 0.5, without: int = 0, **more) -> dict:
    return {"step": step, "loss": loss, "rows_without_candidates": without, **more}


def test_the_vectors_of_a_step_are_those_of_its_forward(tmp_path: Path):
    """Of 2 steps of 8 rows, in several micro-batches, with in-batch negatives: forwards come twice."""
    config = train_config(tmp_path, steps=4, loss={"in_batch": "all"}, data={"max_tokens": 130})
    plain = train_config(tmp_path, steps=4, output_dir=str(tmp_path / "plain"), loss={"in_batch": "all"},
                         data={"max_tokens": 130})  # fmt: skip
    rows, said, whole = {}, [], []

    def taken(rows_nD: np.ndarray) -> dict[str, float]:
        rows[len(rows)] = rows_nD
        return {"mean_norm": 0.99, "effective_rank": 2.0, "isotropy": 0.1, "rows": 64}

    with distributed(config.parallel, "cpu", MODEL) as mesh:
        trainer = Trainer(config, mesh, prepare(config), log=said.append)
        first = [trainer._load(step)[1] for step in (0, 1)]
        assert len(first[0]) > 1, "several micro-batches"
        with torch.no_grad():
            for batch in first[0]:
                whole.append(embed(trainer.engine.model, batch)[batch.query_index])
        trainer.engine.drop_step()
        with mock.patch.multiple(module, ROWS=10, EVERY=3, spread=taken):
            trainer.run()
        Trainer(plain, mesh, prepare(plain), log=lambda message: None).run()
    found = lines_of(tmp_path / "run")
    assert [[name for name in line if name.startswith("spread")] for line in found] == [
        [], ["spread_queries", "spread_documents"], [], ["spread_queries", "spread_documents"]
    ], "8 rows a step: 10 after the second; then from step 3 on, which the fourth fills"  # fmt: skip
    assert [len(part) for part in rows.values()] == [10, 10, 10, 10]
    expected = torch.cat(whole).numpy()
    for row in expected:  # all 8 of step 0, each once
        assert (np.abs(rows[0][:8] - row).max(1) < 1e-6).sum() == 1
    ids = {int(i) for batches in first for b in batches for i in b.document_ids[b.document_mask]}
    assert len(ids) >= 10
    assert len(np.unique(rows[1].round(5), axis=0)) == 10, "a document once"
    assert [line["loss"] for line in found] == [line["loss"] for line in lines_of(tmp_path / "plain")]
    warned = [line for line in said if "collapse" in line]
    assert len(warned) == 1 and warned[0].startswith("WARNING: step 4: collapse: the vectors of the ")
    assert [line.get("alarms") for line in found] == [None, None, None, {"collapse": 1}], "not of the start"
    assert not any("alarms" in line or "WARNING" in line for line in lines_of(tmp_path / "plain"))


def test_losses_and_rows_of_the_last_steps_sound_until_they_are_well_again():
    said: list[str] = []
    watch = Watch(8, said.append)
    for step in range(1, 131):
        is_trivial = step <= 25
        more = watch.after(values(step, 0.001 if is_trivial else 0.9, 8 if 60 <= step < 70 else 0))
        kinds = set(more.get("alarms", {}))
        assert ("trivial_negatives" in kinds) == (20 <= step <= 25), step
        assert ("no_negatives" in kinds) == (step >= 63), "4 of 63 steps are above 5 %"
    watch.after(values(131))
    assert [line.split(": ")[2] for line in said] == ["trivial_negatives", "no_negatives"]
    for step in range(132, 180):
        watch.after(values(step))
    assert not watch.sounding, "the ten steps have left the window"


def test_the_losses_of_the_dev_sets_are_compared_with_the_steps_before_each():
    watch = Watch(8, lambda line: None)
    dev = {10: 3.0, 20: 2.0, 30: 2.1, 40: 2.2, 50: 1.9}
    sounded = []
    for step in range(1, 51):
        figures = {"eval": {"mean": 0.1, "wiki/loss": dev[step], "sts/spearman": 0.2}} if step in dev else {}
        more = watch.after(values(step, 2.0 - step / 50, **figures))
        sounded += [step] if "apart" in more.get("alarms", {}) else []
    assert sounded == list(range(40, 50)), "until the next evaluation is better"
