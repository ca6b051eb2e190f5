"""What a run says it has drawn of each dataset is what it drew, whatever its ranks, kills and resumes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash import Worker, config_for
from tiny import MODEL, write_rows
from tokenizers import Tokenizer as Library

from nemo_embed_core.checkpoint.manifest import read_manifest, seal
from nemo_embed_core.config import DatasetConfig, TrainConfig
from nemo_embed_core.data.sampler import Part, Sampler
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

ROWS, DRAWS = {"a": 14, "b": 5}, {"a": 14, "b": 10}  # of an epoch: three steps of 8


def config_of(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """Every row brings all its texts, so that its tokens are those of the file."""
    datasets = [
        DatasetConfig(path=str(write_rows(folder / f"{n}.jsonl", ROWS[n], seed=i)), weight=1.0 + i, name=n)
        for i, n in enumerate(ROWS)
    ]
    datasets[1] = replace(datasets[1], document_max_length=14)
    data = {"datasets": datasets, "num_hard_negatives": 3}
    return config_for(folder, name, data=data, loss={"in_batch": "positives"}, **changes)


def expected(config: TrainConfig, steps: int) -> list[dict[str, Any]]:
    """From the files, after each step."""
    library, tokens, parts, found = Library.from_file(f"{config.tokenizer}/tokenizer.json"), [], [], []
    for dataset, length in zip(config.data.datasets, (48, 14), strict=True):
        first = len(tokens)
        for line in Path(dataset.path).read_text().splitlines():
            row = json.loads(line)
            texts = [(row["query"], 48), *((text, length) for text in row["pos"] + row["neg"])]
            tokens.append(sum(min(most, len(library.encode(text).ids)) for text, most in texts))
        parts.append(Part(np.arange(first, len(tokens)), DRAWS[dataset.name]))
    sampler, rows = Sampler(parts, 8, config.seed), []
    for step in range(steps):
        rows += sampler.rows(step).tolist()
        own = {"a": [r for r in rows if r < ROWS["a"]], "b": [r for r in rows if r >= ROWS["a"]]}
        each = {name: sum(tokens[r] for r in drawn) for name, drawn in own.items()}
        found.append({"drawn_rows": {n: len(r) for n, r in own.items()}, "drawn_tokens": each})
    assert found[2]["drawn_rows"] == DRAWS, "an epoch"
    assert sum(found[2]["drawn_tokens"].values()) == sum(tokens) + sum(tokens[ROWS["a"] :])
    return found


def said(config: TrainConfig) -> list[dict[str, Any]]:
    lines = [
        json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{name: line[name] for name in ("drawn_rows", "drawn_tokens")} for line in lines]


@pytest.mark.dist
def test_two_ranks_that_are_killed_and_one_that_goes_on_say_what_was_drawn(
    tmp_path: Path, worker: Worker
) -> None:
    config = config_of(tmp_path, "run", steps=8, checkpoint={"async_save": False})
    assert worker.run(config, fail="step.end@4", world_size=2, fail_rank=1)[1] == -9
    assert read_manifest(tmp_path / "run/step-00000003")["drawn"]["a"][0] == 14
    assert worker.run(replace(config, steps=6), world_size=2) == [0, 0]
    assert said(config) == expected(config, 6)
    assert worker.run(config, world_size=1) == [0]
    assert said(config) == expected(config, 8)
    manifest = read_manifest(tmp_path / "run/step-00000008")
    last = expected(config, 8)[-1]
    assert manifest["drawn"] == {n: [last["drawn_rows"][n], last["drawn_tokens"][n]] for n in ROWS}


def run(config: TrainConfig) -> list[str]:
    printed: list[str] = []
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        Trainer(config, mesh, prepare(config), log=printed.append).run()
    return [line for line in printed if "drawn" in line or line.startswith("mix")]


def without(folder: Path, **changes: Any) -> None:
    """A checkpoint from before it said what was drawn."""
    manifest = {k: v for k, v in read_manifest(folder).items() if k not in ("drawn", "digest")}
    (folder / "manifest.json").write_bytes(seal({**manifest, **changes}))


def test_the_mix_is_printed_as_planned_and_as_drawn(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tmp_path, "run", steps=3, tensorboard=True)
    want = expected(config, 8)
    plan = "mix as planned, of 24 draws an epoch: a 14 (58.3%), b 10 (41.7%)"

    def drawn(step: int) -> str:
        rows, tokens = want[step - 1]["drawn_rows"], want[step - 1]["drawn_tokens"]
        n, t = sum(rows.values()), sum(tokens.values())
        each = [f"{k} {rows[k]} ({rows[k] / n:.1%}; {tokens[k] / t:.1%} of the tokens)" for k in rows]
        return f"mix as drawn until step {step}, of {n} rows and {t:,} tokens: {', '.join(each)}"

    assert run(config) == [plan, drawn(3)]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for n in ROWS:
        values = [event.value for event in events.Scalars(f"drawn_tokens/{n}")]
        assert values == [step["drawn_tokens"][n] for step in want[:3]]
    assert run(replace(config, steps=4)) == [plan, drawn(3), drawn(4)]
    without(tmp_path / "run/step-00000004")
    assert run(replace(config, steps=7)) == [plan, drawn(4), drawn(6), drawn(7)]
    assert said(config) == want[:7]
    without(tmp_path / "run/step-00000007", overrides=[{"step": 2, "changed": "seed"}])
    lines = run(replace(config, steps=8))
    assert "drawn_rows and drawn_tokens count from step 8 on" in lines[0] and "of 8 rows" in lines[-1]


def test_a_dataset_that_is_gone_keeps_what_was_drawn_of_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", steps=3)
    assert len(run(config)) == 2
    alone = replace(config.data, datasets=[replace(config.data.datasets[0], name="c")])
    allowed = replace(config.checkpoint, allow_changed=["data"])
    run(replace(config, steps=4, data=alone, checkpoint=allowed))
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["drawn_rows"] == {"a": 14, "b": 10, "c": 8}
