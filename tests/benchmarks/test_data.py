"""The benchmark of data runs on generated texts, refuses to time other ids, and is put on the page."""

import json
from pathlib import Path

import pytest

from benchmarks import ceilings, data, report


def test_a_whole_run_has_a_line_of_each_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "RESULTS", tmp_path)
    monkeypatch.setattr(data, "RANKS", 3)
    monkeypatch.setattr(data, "LONG", 20_000)
    options = ["--data", "", "--tokenizer", "", "--rows", "30", "--packed", "400", "--negatives", "2"]
    data.main([*options, "--rounds", "2", "--max_tokens", "2048"])
    (file,) = tmp_path.glob("data-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    compiled = {(row["shape"], row["variant"]): row for row in lines if row["what"] == "compile"}
    shapes = [shape for shape, variant in compiled if variant == "ours"]
    assert shapes == ["pairs", "2 negatives", "long documents"]
    for (shape, variant), row in compiled.items():
        assert row["tokens"] == compiled[shape, "ours"]["tokens"] and len(row["all_seconds"]) == 2, variant
    assert compiled["2 negatives", "ours"]["tokens"] > 2 * compiled["pairs", "ours"]["tokens"]
    useful = {row["variant"]: row["useful"] for row in lines if row["what"] == "packing"}
    assert len(useful) == 5 and useful["packed, 128 rows a rank and step"] > 0.9 > useful["padded, 4 rows"]
    assert useful["padded, 4 rows"] > useful["padded, 16 rows"]
    assert useful["padded, 16 rows, sorted by the longest text"] > useful["padded, 16 rows"]
    assert all(row["useful"] <= row.get("ceiling", 1) for row in lines if row["what"] == "packing")
    (loaded, more) = (row for row in lines if row["what"] == "loading")
    assert (loaded["ranks"], loaded["rows_a_rank"], loaded["goal_per_s"]) == (3, 32, 45_000)
    assert loaded["tokens_per_s"] == pytest.approx(45_000 / loaded["share_of_step"])
    assert more["rows_a_rank"] == 128 and more["tokens"] > 3 * loaded["tokens"]

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = report.page()
    assert "## data" in page and "generated texts" in page and "datasets.map" in page


def test_other_ids_are_not_timed(tmp_path: Path) -> None:
    pairs = data.generated(5)
    file = data.write_rows(tmp_path / "rows.jsonl", pairs, 2)
    tokenizer = data.train_sentencepiece(
        [text for pair in pairs for text in pair], 300, tmp_path / "tokenizer"
    )
    options = data.argparse.Namespace(max_tokens=4096, negatives=2)
    store = data.compiled(file, tmp_path / "cache", tokenizer, options)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = [
        {
            "query": tokenizer.encode([row["query"]], 512)[0].tolist(),
            "documents": [ids.tolist() for ids in tokenizer.encode(row["pos"] + row["neg"], 512)],
        }
        for row in rows
    ]
    assert data.gate(store, found) == sum(len(f["query"]) + sum(map(len, f["documents"])) for f in found)
    found[3]["documents"][-1][-1] += 1
    with pytest.raises(SystemExit, match="row 3 has other ids"):
        data.gate(store, found)
