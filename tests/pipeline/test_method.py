"""What of a base is trained on a machine of so much memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipelines import config
from tiny import MODEL, train_config

from nemo_embed_core.config import PlanConfig, TrainConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import dump_yaml
from nemo_embed_core.pipeline.method import Chosen, Machine, choose
from nemo_embed_core.plan import plan

GB = 1_000_000_000
LARGE = replace(MODEL, num_hidden_layers=32)


@pytest.fixture
def gigabytes(monkeypatch) -> None:
    """A run's memory in whole GB: 3 a trained layer, 1 a frozen one, and 1 for each 1,024 tokens, less where
    they are computed again."""
    less = {"none": 0, "selective": 2, "full": 4}

    def peak_of(train: TrainConfig, model: Any, world_size: int) -> int:
        layers = model.num_hidden_layers * (1 if train.lora.rank else 3)
        return GB * (layers + train.data.max_tokens // 1024 - less[train.activation_checkpointing])

    monkeypatch.setattr(plan, "peak_of", peak_of)
    monkeypatch.setattr(plan, "needed", lambda peak: peak)


def chosen(folder: Path, memory: int, **options: Any) -> Chosen:
    given = config(folder, **{"method": "auto", "precision": "bf16", **options})

    def options_of(chosen: Chosen) -> dict[str, Any]:
        lora = {"lora": {"rank": given.lora_rank}} if chosen.method == "lora" else {}
        data = {"max_tokens": chosen.max_tokens}
        return {"init_from": "base", "steps": 3, "precision": given.precision, "data": data, **lora,
                "activation_checkpointing": chosen.recompute}  # fmt: skip

    machine = Machine("cpu", memory * GB, 1, "a machine")
    return choose(given, machine, LARGE, options_of)


@pytest.mark.parametrize(
    "memory, wanted",
    [
        (104, Chosen("full", "none", 8192, 0, 104 * GB)),
        (103, Chosen("full", "selective", 8192, 0, 102 * GB)),
        (100, Chosen("full", "full", 8192, 0, 100 * GB)),
        (97, Chosen("full", "full", 4096, 0, 96 * GB)),
        (94, Chosen("full", "full", 2048, 0, 94 * GB)),
        (93, Chosen("lora", "none", 8192, 0, 40 * GB)),
        (31, Chosen("lora", "full", 2048, 0, 30 * GB)),
        (29, Chosen("layers", "full", 2048)),
        (2, Chosen("layers", "full", 2048)),
    ],
)
def test_the_first_that_fits_in_the_fastest_way(tmp_path, gigabytes, memory, wanted):
    found = chosen(tmp_path, memory)
    if wanted.method == "layers":
        assert found.method == "layers" and found.layers >= 1 and found.needed <= memory * GB
        assert 3 * (found.layers + 1) + 2 - 4 > memory  # not one more, in any way
    else:
        assert found == wanted


def test_fp32_on_a_cpu_needs_more(tmp_path, gigabytes):
    assert chosen(tmp_path, 104, precision="fp32").method == "lora"


@pytest.mark.parametrize(
    "memory, options, says",
    [
        (93, {"method": "full"}, r"does not fit 93.0 GB .*: full 94.0 GB are needed .* method=lora"),
        (29, {"method": "lora"}, r"does not fit 29.0 GB .*: lora 30.0 GB .* take method=layers"),
        (8, {"method": "layers", "layers": 4}, r"layers \(4\) 10.0 GB are needed at least"),
        (0, {}, r"full 94.0 GB, lora 30.0 GB, layers \(1\) 1.0 GB are needed at least; take a smaller base"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_bytes(tmp_path, gigabytes, memory, options, says):
    with pytest.raises(UserError, match=says):
        chosen(tmp_path, memory, **options)


def test_layers_that_are_given_are_taken(tmp_path, gigabytes):
    found = chosen(tmp_path, 50, method="layers", layers=4)
    assert (found.layers, found.recompute, found.needed) == (4, "none", 20 * GB)


@pytest.mark.slow
def test_the_bytes_are_those_of_nemo_embed_plan(tmp_path):
    """Where all texts are as long as they may be, which a pipeline assumes."""
    train = train_config(tmp_path, global_batch_size=32, loss={"in_batch": "positives"})
    dump_yaml(train, tmp_path / "train.yaml")
    lengths = {"query_mean": 48.0, "query_p95": 48.0, "document_mean": 48.0, "document_p95": 48.0}
    cluster = {"per_node": 1, "gpu": "L4"}
    given = {"train": str(tmp_path / "train.yaml"), "lengths": lengths, "cluster": cluster, "tp_sizes": [1]}
    found = plan.plan(PlanConfig.from_dict({**given, "max_tokens": [320]}), lambda _: None)
    (same,) = (c for c in found.best if c.recompute == "none")
    assert plan.peak_of(train, MODEL, 1) == pytest.approx(same.peak, rel=0.02)
