"""The alarms of a run: what its steps have at hand reaches them, and no number of the run changes."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from tiny import MODEL, train_config

from nemo_embed_core.config import CheckpointConfig, LossConfig
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
            more = dataclasses.replace(config, steps=5, checkpoint=CheckpointConfig(resume="auto"))
            Trainer(more, mesh, prepare(more), log=said.append).run()
        Trainer(plain, mesh, prepare(plain), log=lambda message: None).run()
    *found, resumed = lines_of(tmp_path / "run")
    assert resumed["alarms"] == {"collapse": 1}, "its first look is not of the run's start"
    assert [[name for name in line if name.startswith("spread")] for line in found] == [
        [], ["spread_queries", "spread_documents"], [], ["spread_queries", "spread_documents"]
    ], "8 rows a step: 10 after the second; then from step 3 on, which the fourth fills"  # fmt: skip
    assert [len(part) for part in rows.values()][:4] == [10, 10, 10, 10]
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
    watch = Watch(8, LossConfig(), said.append)
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
    watch = Watch(8, LossConfig(), lambda line: None)
    dev = {10: 3.0, 20: 2.0, 30: 2.1, 40: 2.2, 50: 1.9}
    sounded = []
    for step in range(1, 51):
        figures = {"eval": {"mean": 0.1, "wiki/loss": dev[step], "sts/spearman": 0.2}} if step in dev else {}
        more = watch.after(values(step, 2.0 - step / 50, **figures))
        sounded += [step] if "apart" in more.get("alarms", {}) else []
    assert sounded == list(range(40, 50)), "until the next evaluation is better"


@pytest.mark.parametrize(
    ("loss", "step", "sounds"),
    [
        ({"info_nce_weight": 0.5}, {"loss": 0.0049}, 1),
        ({"info_nce_weight": 0.5}, {"loss": 0.0051}, 0),  # 0.0102 without its weight
        ({"info_nce_weight": 0.0, "margin_mse_weight": 9.0}, {"loss": 0.001}, 0),
        ({"kl_weight": 1.0}, {"loss": 0.9, "losses": {"info_nce": 0.009, "kl": 0.891}}, 1),
        ({"kl_weight": 1.0}, {"loss": 0.001, "losses": {"info_nce": 0.02, "kl": 0.0001}}, 0),
        ({"matryoshka_dims": [9, 4]}, {"loss": 1, "losses": {"info_nce@9": 0.008, "info_nce@4": 0.009}}, 1),
        ({"matryoshka_dims": [9, 4]}, {"loss": 0, "losses": {"info_nce@9": 0.001, "info_nce@4": 0.011}}, 0),
        ({"cosent_weight": 1.0}, {"loss": 0.001, "losses": {"info_nce": None, "cosent": 0.001}}, 0),
    ],
)  # fmt: skip
def test_negatives_are_trivial_by_the_contrastive_term_alone(loss: dict, step: dict, sounds: int):
    watch = Watch(8, LossConfig(**loss), lambda line: None)
    found = [watch.after(values(number, **step)) for number in range(1, 31)]
    assert ("trivial_negatives" in found[-1].get("alarms", {})) == sounds


def test_graded_pairs_are_none_of_the_rows_that_lack_negatives():
    """A row in eight of every tenth step, whose others are graded pairs, is 1.25 % of all and 12.5 % of those
    that are contrasted."""
    watch = Watch(8, LossConfig(cosent_weight=1.0), lambda line: None)
    found = [
        watch.after(values(step, without=step % 10 == 0, graded_rows=0 if step % 10 == 0 else 8))
        for step in range(1, 31)
    ]
    assert found[-1]["alarms"] == {"no_negatives": 1}


def test_a_resumed_run_goes_on_with_what_its_metrics_say(tmp_path: Path):
    """Every alarm sounds in the same steps as in a run that was not stopped, and is not said again."""
    narrow = {"mean_norm": 0.99, "effective_rank": 2.0, "isotropy": 0.1, "rows": 128}

    def line(step: int) -> dict:
        figures = (
            {"eval": {"wiki/loss": {10: 2.0, 20: 2.3, 30: 2.4, 40: 1.9}[step]}} if step % 10 == 0 else {}
        )
        spreads = dict.fromkeys(("spread_queries", "spread_documents"), narrow) if step in (5, 15) else {}
        return values(step, 0.009 - step / 1e4, without=2, **figures, **spreads)

    said: dict[str, list[str]] = {"calm": [], "resumed": []}
    calm = Watch(8, LossConfig(), said["calm"].append)
    sounding = [set(calm.recall([line(step)])) for step in range(1, 45)]
    assert [len(kinds) for kinds in sounding][14:35:10] == [1, 3, 4] and len(sounding[-1]) == 3
    resumed = Watch(8, LossConfig(), said["resumed"].append)
    resumed.recall([line(step) for step in range(1, 33)])
    for step in range(33, 45):
        assert set(resumed.after(line(step))["alarms"]) == sounding[step - 1], step
    assert not said["resumed"]
