"""Caps and weights of datasets: exact counts, the same for everybody, and refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.config.data import dataset_names
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.population import longest_draws, population
from nemo_embed_core.errors import UserError

COUNTS = {"a": 50, "b": 9, "c": 20}


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Every fifth row of a file has no negative, every seventh a long positive."""
    for name, count in COUNTS.items():
        rows = [
            {"query": f"{name} ask {i}", "pos": [f"{name} answer {i}" + " word" * (30 if i % 7 == 3 else 2)],
             "neg": [f"{name} nothing {i}"] * (i % 5 > 0)}
            for i in range(count)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        datasets=[DatasetConfig(path=str(tmp_path / f"{name}.jsonl")) for name in COUNTS],
        cache_dir=str(tmp_path / "cache"), query_max_length=64, document_max_length=256,
        num_hard_negatives=1, max_tokens=400,
    )  # fmt: skip


@pytest.fixture
def store(config, tokenizer):
    return open_store(config, tokenizer, log=lambda message: None)


def with_options(config: DataConfig, **options: dict[str, Any]) -> DataConfig:
    """b={"cap": 3}: of the dataset b."""
    return replace(config, datasets=[replace(d, **options.get(d.path[-7], {})) for d in config.datasets])


def drawn(store, config: DataConfig, has_in_batch: bool = True, **options: Any):
    return population(store, config, has_in_batch, log=lambda message: None, **options)


# weight: of 50 rows an epoch has
ROUNDED = {0.29: 15, 0.27: 14, 0.03: 2, 0.01: 1, 1.0: 50, 2.5: 125, 0.1: 5, 1.15: 58, 3: 150}


@pytest.mark.parametrize("weight", ROUNDED)
def test_a_weight_is_a_decimal_number_and_rounds_half_up(store, config, weight):
    """50 x 0.29 = 14.5 in decimal numbers; in binary ones it is 14.499999999999998."""
    parts = drawn(store, with_options(config, a={"weight": weight})).parts
    assert [part.draws for part in parts] == [ROUNDED[weight], 9, 20]
    assert [len(part.rows) for part in parts] == [50, 9, 20]


def test_a_weight_that_draws_nothing_is_refused_by_name(store, config):
    with pytest.raises(UserError, match=r"data\.datasets: b: weight=0.05 of 9 rows is less than half a row"):
        drawn(store, with_options(config, b={"weight": 0.05}))
    for option, value in (("cap", 0), ("cap", -3), ("weight", 0.0), ("weight", -1.0), ("name", "a/b")):
        with pytest.raises(UserError, match=rf"b\.jsonl: {option}="):
            with_options(config, b={option: value})
    with pytest.raises(UserError, match="two have the name 'x'"):
        with_options(config, a={"name": "x"}, c={"name": "x"})


def test_a_cap_is_a_sample_that_depends_on_the_seed_alone(store, config):
    config = with_options(config, a={"cap": 12}, c={"cap": 400})
    first, rows = drawn(store, config, seed=7), None
    assert [len(part.rows) for part in first.parts] == [12, 9, 20]
    rows = first.parts[0].rows
    assert (np.diff(rows) > 0).all() and rows[-1] < 50 and rows.tolist() != list(range(12))
    assert first.rows.tolist() == np.concatenate([part.rows for part in first.parts]).tolist()
    assert drawn(store, config, seed=7).digest == first.digest
    other = drawn(store, config, seed=8)
    assert other.digest != first.digest and other.parts[0].rows.tolist() != rows.tolist()
    seen = np.concatenate([drawn(store, config, seed=seed).parts[0].rows for seed in range(200)])
    counts = np.bincount(seen, minlength=50)  # 48 each, standard deviation 6
    assert counts.sum() == 2400 and counts.min() > 48 - 5 * 6 and counts.max() < 48 + 5 * 6


def test_a_cap_is_met_by_rows_that_can_be_drawn(store, config):
    """40 of a's 50 rows have a negative; a row that is left out is not too long, and takes no place."""
    capped = with_options(config, a={"cap": 40})
    parts = drawn(store, capped, False).parts
    assert parts[0].rows.tolist() == [i for i in range(50) if i % 5]
    small = replace(with_options(config, a={"cap": 1}, b={"cap": 1}, c={"cap": 1}), max_tokens=60)
    long = set(np.flatnonzero(longest_draws(store, 1) > 60).tolist())
    assert {3, 10, 17} <= long and len(long) < 20
    for seed in range(20):
        rows = {int(row) for row in drawn(store, replace(small, max_tokens=400), seed=seed).rows}
        if rows & long:
            with pytest.raises(UserError, match=rf"{len(rows & long)} of 3 rows can have more than"):
                drawn(store, small, seed=seed)
        else:
            drawn(store, small, seed=seed)
        dropped = drawn(store, replace(small, on_long_row="drop"), seed=seed)
        assert len(dropped.rows) == 3 and not {*dropped.rows.tolist()} & long


def test_only_a_mix_has_a_digest(store, config):
    """A checkpoint that was written before there was a mix has none, and goes on."""
    assert drawn(store, config).digest == ""
    assert drawn(store, with_options(config, a={"cap": 50, "name": "x"})).digest == ""
    changes = ("a", "weight", 2.0), ("a", "weight", 0.5), ("b", "weight", 2.0), ("a", "cap", 49)
    mixes = [with_options(config, **{name: {option: value}}) for name, option, value in changes]
    digests = {drawn(store, mix).digest for mix in mixes}
    assert len(digests) == 4 and "" not in digests


def test_options_of_a_mix_are_those_of_the_stores_datasets(store, config):
    few = replace(config, datasets=config.datasets[:2])
    assert drawn(store, few).rows.tolist() == list(range(79))
    with pytest.raises(UserError, match=r"data\.datasets has 2, .* was made of 3: name all of them"):
        drawn(store, with_options(few, a={"weight": 3.0}))


def test_names():
    paths = ["data/nq.jsonl.gz", "other/nq.parquet", "beir/nq", "a b*.csv"]
    assert dataset_names(paths) == ["nq", "nq-2", "nq-3", "a_b_"]
    assert dataset_names([".", "..", f"{Path.cwd()}/../"]) == [
        Path.cwd().name, Path.cwd().parent.name, f"{Path.cwd().parent.name}-2",
    ]  # fmt: skip
    assert dataset_names(paths, ["", "q", "", "nq-2"]) == ["nq", "q", "nq-3", "nq-2"]
