"""Mining that is killed at any point and started again writes the bytes of a run that was left alone, and
repeats nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

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
