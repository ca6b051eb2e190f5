"""Mining that is killed at any point and started again writes the bytes of a run that was left alone, and
repeats nothing."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.prepare import write_datasets
from nemo_embed_core.data.readers import read_rows

KILLED = -9
SMALL = (
    "--shard_size",
    "32",
    "--block_queries",
    "16",
    "--query_max_length",
    "48",
    "--document_max_length",
    "48",
    "--method",
    "fp32",
)

# In the order of a run: 61 queries in 2 shards, more than 100 documents in at least 4, 4 blocks of the
# search.
POINTS = [
    "documents.encoded@0",  # a shard of documents lost in the middle
    "rename@documents/00001.npy",  # written beside, not yet under its name
    "rename@documents/00002.json",  # bytes there, sidecar not: the shard does not exist
    "documents.encoded@3",  # between shards
    "queries.encoded@1",
    "searched@0",  # before the first block is published
    "rename@{search}/00001.npz",
    "search.published@2",
    "rename@{folder}/mined.jsonl",  # the whole output beside, not yet under its name
    "rename@{folder}/mined.jsonl.report.json",  # output there, report not
]


@pytest.fixture(scope="module")
def calm(miner, tmp_path_factory):
    output = tmp_path_factory.mktemp("calm") / "mined.jsonl"
    result = miner("--model", miner.model, "--data", miner.data, "--output", str(output), *SMALL)
    assert result.code == 0, result.output
    assert any(json.loads(line)["neg"] for line in output.read_text().splitlines())
    return output


def shards(work: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(work)): p.read_bytes()
        for p in sorted(work.rglob("*"))
        if p.is_file() and p.name[0] != "."
    }


@pytest.mark.fault(21)
def test_killed_at_ten_points_one_after_the_other_and_resumed(miner, calm, tmp_path):
    output = tmp_path / "mined.jsonl"
    work = tmp_path / "mined.jsonl.work"
    search = next((calm.parent / "mined.jsonl.work" / "search").iterdir()).name
    options = ("--model", miner.model, "--data", miner.data, "--output", str(output), *SMALL)
    before: dict[str, bytes] = {}
    for point in POINTS:
        name = point.format(search=search, folder=tmp_path.name)
        result = miner(*options, env={"NEMO_EMBED_FAIL": name})
        assert result.code == KILLED, f"{name} was not reached:\n{result.output[-2000:]}"
        now = shards(work)
        assert before.items() <= now.items(), f"{name}: what was published is gone or changed"
        assert len(now) > len(before) or point in POINTS[:1] + POINTS[-2:], (
            f"{name}: no progress since the last kill"
        )
        assert output.exists() == (point == POINTS[-1])
        before = now
    result = miner(*options)
    assert result.code == 0, result.output
    assert output.read_bytes() == calm.read_bytes()
    assert shards(work) == shards(calm.parent / "mined.jsonl.work")
    report, expected = (
        json.loads(p.with_name("mined.jsonl.report.json").read_text()) for p in (output, calm)
    )
    assert report == expected
    assert not re.search(r"^(encoded|searched) ", result.output, re.M), "all of it was there"


def launch(argv: list[str]) -> None:
    """A rank; at the top level, so that a forked server can find it."""
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def test_a_dataset_folder_killed_at_three_points_and_resumed_by_two_ranks_is_the_same_bytes(
    miner, calm, tmp_path
):
    config = DataConfig(datasets=[DatasetConfig(path=miner.data)])
    data = write_datasets(config, tmp_path / "data", lambda message: None).datasets[0].path
    how = ("--model", miner.model, "--data", data, "--output_format", "dataset", *SMALL)
    alone = miner(*how, "--output", str(tmp_path / "calm/mined"))
    assert alone.code == 0, alone.output
    rows, lines = ([*read_rows(DatasetConfig(path=str(path)))] for path in (tmp_path / "calm/mined", calm))
    assert [(r.query, r.pos, r.neg, list(r.neg_scores)) for r in rows] == [
        (line.query, line.pos, line.neg, list(line.neg_scores)) for line in lines
    ]
    output, work = tmp_path / "again/mined", tmp_path / "again/mined.work"
    points = ["documents.encoded@1", "dataset.row@40", "rename@again/mined.report.json"]
    for point in points:
        killed = miner(*how, "--output", str(output), env={"NEMO_EMBED_FAIL": point})
        assert killed.code == KILLED, f"{point} was not reached:\n{killed.output[-2000:]}"
        assert output.exists() == (point == points[-1])
    argv = ["launch/mine.py", "--device", "cpu", *how, "--output", str(output)]
    outcomes = miner.server.run(launch, 2, argv)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    assert shards(work) == shards(tmp_path / "calm/mined.work")
    assert shards(output) == shards(tmp_path / "calm/mined")
    assert (output / "corpus.parquet").samefile(Path(data) / "corpus.parquet")
    report, expected = (
        json.loads((tmp_path / name / "mined.report.json").read_text()) for name in ("again", "calm")
    )
    assert report == expected
    shutil.rmtree(tmp_path / "again")
    outcomes = miner.server.run(launch, 2, argv)
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert shards(tmp_path / "again") == shards(tmp_path / "calm")


def launch_without_a_temporary_folder(argv: list[str], fail: str) -> None:
    tempfile.tempdir = "/nowhere"
    os.environ["NEMO_EMBED_FAIL"] = fail
    launch(argv)


def test_texts_beside_the_output_are_killed_and_resumed_without_a_temporary_folder(miner, tmp_path):
    """A dataset folder with --corpus, whose texts do not stand in its files alone."""
    config = DataConfig(datasets=[DatasetConfig(path=miner.data)])
    data = write_datasets(config, tmp_path / "data", lambda message: None).datasets[0].path
    (tmp_path / "pool.jsonl").write_text("".join(f'{{"text": "moon {i} violin"}}\n' for i in range(40)))
    how = ("--model", miner.model, "--data", data, "--corpus", str(tmp_path / "pool.jsonl"), *SMALL)
    alone = miner(*how, "--output", str(tmp_path / "calm/mined.jsonl"))
    assert alone.code == 0 and "40 " in alone.output, alone.output
    argv = ["launch/mine.py", "--device", "cpu", *how, "--output", str(tmp_path / "again/mined.jsonl")]
    for point in ("documents.encoded@2", "rename@again/mined.jsonl", ""):
        (outcome,) = miner.server.run(launch_without_a_temporary_folder, 1, argv, point)
        assert outcome.code == (KILLED if point else 0), outcome.output
        left = [path.name for path in (tmp_path / "again").rglob("tmp*")]
        assert not left, "nothing of the texts is left by a kill"
    assert shards(tmp_path / "again") == shards(tmp_path / "calm")


def test_killed_with_several_datasets_the_finished_ones_are_not_done_again(miner, calm, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(miner.data).read_text().splitlines(keepends=True)[:20]))
    config = tmp_path / "mine.yaml"
    config.write_text(f"datasets:\n- {{path: {miner.data}}}\n- {{path: {other}, task: find it}}\n")
    options = ("--config", str(config), "--model", miner.model, "--output", str(tmp_path / "mined"), *SMALL)
    killed = miner(*options, env={"NEMO_EMBED_FAIL": "rename@mined/other.jsonl"})
    assert killed.code == KILLED, killed.output
    assert (tmp_path / "mined/train.jsonl").read_bytes() == calm.read_bytes() and not (
        tmp_path / "mined/other.jsonl"
    ).exists()
    result = miner(*options)
    assert result.code == 0, result.output
    assert not re.search(r"^(encoded|searched) ", result.output, re.M)
    alone = miner(
        "--model",
        miner.model,
        "--data",
        str(other),
        "--task",
        "find it",
        "--output",
        str(tmp_path / "o"),
        *SMALL,
    )
    assert alone.code == 0 and (tmp_path / "mined/other.jsonl").read_bytes() == (tmp_path / "o").read_bytes()
    report = json.loads((tmp_path / "mined/report.json").read_text())
    assert list(report) == ["train", "other"] and report["other"]["queries"] == 20
    assert (
        report["train"]["models"][0]["prompt"] == "" and "find it" in report["other"]["models"][0]["prompt"]
    )
    assert re.search(r"^  other +20 ", result.output, re.M), "the table has a line for it"


@pytest.mark.fault(21)
def test_what_was_altered_or_is_of_something_else_is_refused_or_made_again_but_never_believed(
    miner, calm, tmp_path
):
    output = tmp_path / "mined.jsonl"
    work = tmp_path / "mined.jsonl.work"
    shutil.copytree(calm.parent / "mined.jsonl.work", work)
    options = ("--model", miner.model, "--data", miner.data, "--output", str(output), *SMALL)

    def refused(*fragments: str, extra: tuple[str, ...] = ()) -> None:
        result = miner(*options, *extra)
        assert result.code == 2 and "Traceback" not in result.output, result.output
        for fragment in (*fragments, "never reused"):
            assert fragment in result.output, result.output
        assert not output.exists()

    # Another model, other texts, another prompt, another length.
    refused("documents/00000.npy", "with max_length 48", extra=("--document_max_length", "40"))
    refused("queries/00000.npy", "with prompt ''", extra=("--task", "another"))
    other = tmp_path / "changed.jsonl"
    other.write_text(Path(miner.data).read_text().replace("moon", "sun"))
    refused("of other texts", extra=("--data", str(other)))
    sidecar = work / "documents/00001.json"
    true = sidecar.read_text()
    sidecar.write_text(true.replace('"model": "', '"model": "0'))
    refused("documents/00001.npy", "with model")
    sidecar.write_text(true)
    # Bytes that are not those of the sidecar: made again, and said so.
    for path in (work / "documents/00002.npy", work / "queries/00001.npy"):
        data = np.load(path)
        data[0] = -data[0]
        np.save(path, data)
    (work / "documents/00003.json").write_text(
        re.sub(r'"sha256": "..', '"sha256": "zz', (work / "documents/00003.json").read_text())
    )
    result = miner(*options)
    assert result.code == 0, result.output
    for name in ("documents/00002.npy", "queries/00001.npy", "documents/00003.npy"):
        assert f"{name} is damaged or missing" in result.output
    assert output.read_bytes() == calm.read_bytes()
