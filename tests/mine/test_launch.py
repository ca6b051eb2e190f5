"""launch/mine.py as users run it: texts written for others to embed, several models, several thresholds,
wrong options."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nemo_embed_core.config import MineConfig, MineDatasetConfig
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.mine.run import named_datasets

SMALL = ("--query_max_length", "48", "--document_max_length", "48", "--method", "fp32", "--dtype", "float32")


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_texts_written_embedded_elsewhere_and_mined_give_what_the_model_gives(miner, tmp_path):
    data, folder = ("--data", miner.data), tmp_path / "embeddings"
    written = miner(*data, "--write_texts", str(folder))
    assert written.code == 0 and "row i for line i" in written.output, written.output
    embedder = Embedder.load(miner.model, "cpu")
    for side in ("documents", "queries"):
        texts = [line["text"] for line in lines_of(folder / f"{side}.jsonl")]
        assert len(set(texts)) == len(texts)
        np.save(folder / f"{side}.npy", 3 * embedder.encode(texts, max_length=48))  # of no particular length
    ours = miner(*data, "--model", miner.model, "--output", str(tmp_path / "a.jsonl"), *SMALL)
    theirs = miner(*data, "--model", str(folder), "--output", str(tmp_path / "b.jsonl"), *SMALL)
    assert ours.code == theirs.code == 0, theirs.output
    a, b = lines_of(tmp_path / "a.jsonl"), lines_of(tmp_path / "b.jsonl")
    assert [line["query"] for line in a] == [line["query"] for line in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x["pos_scores"], y["pos_scores"], atol=1e-6)
        np.testing.assert_allclose(x["neg_scores"], y["neg_scores"], atol=1e-6)
    assert sum(x["neg"] == y["neg"] for x, y in zip(a, b, strict=True)) > 0.95 * len(a)

    # Both as two models that agree: the intersection of the best 100 is what one of them finds.
    both = ("--model", miner.model, str(folder), "--output", str(tmp_path / "c.jsonl"))
    more = ("--sweep", "0.5", "0.98", "--formats", "automodel", "tevatron", "sentence-transformers")
    # In the way of one format, which ends neither the run nor the others.
    (tmp_path / "c.jsonl.automodel.json").mkdir()
    result = miner(*data, *both, *more, *SMALL)
    assert result.code == 2 and "Traceback" not in result.output, result.output
    assert "all is mined, but 1 of --formats could not be written: " in result.output
    assert sum(
        x["neg"] == y["neg"] for x, y in zip(a, lines_of(tmp_path / "c.jsonl"), strict=True)
    ) > 0.9 * len(a)
    report = json.loads((tmp_path / "c.jsonl.report.json").read_text())
    assert [entry["threshold"] for entry in report["sweep"]] == [0.5, 0.98] and len(report["models"]) == 2
    for threshold in ("0.5 ", "0.98"):
        assert f"\n  {threshold} " in result.output, "the table has a line for it"
    assert (tmp_path / "c.jsonl.report.png").read_bytes()[:4] == b"\x89PNG"
    assert len(lines_of(tmp_path / "c.jsonl.tevatron.jsonl")) <= len(a)
    assert (tmp_path / "c.jsonl.sentence-transformers.parquet").exists()


def test_wrong_options_are_refused_before_anything_is_read(miner, tmp_path):
    out = ("--output", str(tmp_path / "o.jsonl"))
    data, model = ("--data", miner.data), ("--model", miner.model)
    datasets = ("--datasets", json.dumps([{"path": miner.data}, {"path": miner.data}]))
    for name, dtype in (("empty", np.float64), ("bytes", np.int8)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "documents.npy", np.ones((2, 2), dtype))
    for options, words in [
        ((*data, *out), "--model is missing"),
        ((*data, *model), "--output is missing"),
        ((*model, *out), "--data PATH"),
        ((*data, *datasets, *model, *out), "not both"),
        ((*datasets, *model, *out, "--task", "x"), "--task: of --data alone, each of `datasets` has its own"),
        (
            (*datasets, *model, *out, "--min_grade", "2", "--ignore", "x"),
            "--ignore and --min_grade: of --data",
        ),
        ((*datasets, *model, *out, "--on_missing", "allow"), "--on_missing: of --data alone"),
        ((*data, *model, *out, "--max_tokens", "0"), "max_tokens=0 must be at least 1"),
        ((*data, *model, *out, "--threshold", "2"), "threshold=2.0 must be in (0, 2)"),
        ((*data, *model, *out, "--sweep", "0.9", "0"), "sweep=0.0 must be in (0, 2)"),
        ((*data, *model, *out, "--sweep", "0.9", "high"), "sweep"),
        ((*data, *model, *out, "--combine", "union"), "combine"),
        ((*data, *model, *out, "--formats", "csv"), "formats=['csv']: none of flagembedding"),
        ((*data, *model, "nowhere", *out), "nowhere is not a folder"),
        ((*data, *model, "--output", str(tmp_path)), "is a folder, and one dataset is written to a file"),
        ((*datasets, *model, "--output", miner.data), "is a file, and several need a folder"),
        (
            (*data, "--model", str(tmp_path / "empty"), *out),
            "which texts do the rows of documents.npy belong to",
        ),
        (
            (*data, "--model", str(tmp_path / "bytes"), *out),
            "documents.npy holds int8 [2, 2]: save [N, D] as float16,",
        ),
    ]:
        result = miner(*options)
        assert result.code == 2 and "Traceback" not in result.output, (options, result.output)
        assert words in result.output, (options, result.output)
    assert not (tmp_path / "o.jsonl").exists()


def test_datasets_of_one_name_get_files_of_their_own():
    paths = ["a/train.jsonl", "b/train.jsonl.gz", "c/train", "train-2.jsonl", "nq/"]
    config = MineConfig(model="m", output="o", datasets=[MineDatasetConfig(path=path) for path in paths])
    named = named_datasets(config)
    assert list(named) == ["train", "train-2", "train-3", "train-2-2", "nq"]
    assert [dataset.path for dataset in named.values()] == paths


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_lines_in_a_log_and_a_bar_with_the_time_left_on_a_terminal(monkeypatch, capsys, terminal):
    from nemo_embed_core.mine.progress import Progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    said = []
    progress = Progress("encoded", "documents", 100, said.append)
    progress.skip(40)
    progress.step(20)
    progress.step(40)
    progress.close()
    bar = capsys.readouterr().err
    if terminal:
        assert not said and "100%" in bar and "100/100" in bar
    else:
        assert (
            not bar
            and said[0].startswith("encoded 60 of 100 documents, ")
            and said[-1].endswith("00:00:00 left")
        )
    Progress("encoded", "documents", 1, said.append, shown=False).step(1)
    assert terminal == (len(said) == 0)


def test_the_same_rows_in_any_format_are_mined_alike(miner, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    rows = lines_of(miner.data)
    of = {
        "ours.jsonl": rows,
        "flagembedding.jsonl": [{**row, "type": "normal"} for row in rows],
        "tevatron.jsonl": [
            {"query_id": str(i), "query": row["query"]}
            | {
                f"{side}_passages": [
                    {"docid": f"{hash(text)}", "title": "", "text": text} for text in row[key]
                ]
                for side, key in (("positive", "pos"), ("negative", "neg"))
            }
            for i, row in enumerate(rows)
        ],
        "automodel.json": [{"question": r["query"], "pos_doc": r["pos"], "neg_doc": r["neg"]} for r in rows],
        "contrastors.parquet": [
            {"query": row["query"], "document": row["pos"][0], "negatives": row["neg"]} for row in rows
        ],
        "ms-swift.jsonl": [
            {"query": row["query"], "response": row["pos"][0], "rejected_response": row["neg"]}
            for row in rows
        ],
    }
    for name, records in of.items():
        if name.endswith(".parquet"):
            pq.write_table(pytest.importorskip("pyarrow").Table.from_pylist(records), tmp_path / name)
        elif name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps(records, indent=1))
        else:
            (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    data = json.dumps([{"path": str(tmp_path / name)} for name in of])
    result = miner("--datasets", data, "--model", miner.model, "--output", str(tmp_path / "out"), *SMALL)
    assert result.code == 0, result.output
    for name in of:
        stem = name.split(".")[0]
        assert stem == "ours" or f"data sets read as {stem} (" in result.output
        mined, right = lines_of(tmp_path / "out" / f"{stem}.jsonl"), lines_of(tmp_path / "out" / "ours.jsonl")
        assert [{key: line[key] for key in right[0]} for line in mined] == right, name
        assert all("pos_ids" in line and "id" in line for line in mined) == (stem == "tevatron")
