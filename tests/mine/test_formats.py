from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from nemo_embed_core.config import UserError
from nemo_embed_core.mine.formats import FORMATS, convert

ROWS = [
    {"query": "a", "pos": ["p1", "p2"], "neg": ["n1", "n2"], "pos_scores": [0.9, 0.8], "neg_scores": [0.5, 0.4]},
    {"query": "b", "pos": ["p3"], "neg": ["n1"], "pos_scores": [0.7], "neg_scores": [0.6]},
    {"query": "c", "pos": ["n2"], "neg": [], "pos_scores": [0.1], "neg_scores": []},
]


@pytest.fixture
def mined(tmp_path):
    path = tmp_path / "mined.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_flagembedding_keeps_every_row(mined, tmp_path):
    assert convert(mined, tmp_path / "out.jsonl", "flagembedding", prompt="P ") == {"rows": 3, "left_out": 0}
    assert [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {**r, "prompt": "P "} for r in ROWS
    ]


def test_tevatron_gives_one_docid_to_one_text(mined, tmp_path):
    assert convert(mined, tmp_path / "out.jsonl", "tevatron", prompt="P ") == {"rows": 2, "left_out": 1}
    first, second = (json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["query"] == "P a" and [p["text"] for p in first["positive_passages"]] == ["p1", "p2"]
    n1 = {"docid": "d2", "title": "", "text": "n1"}
    assert first["negative_passages"][0] == {**n1, "score": 0.5} and second["negative_passages"][0] == {
        **n1,
        "score": 0.6,
    }
    assert first["query_id"] != second["query_id"]


def test_sentence_transformers_rows_are_whole_tuples_one_per_positive(mined, tmp_path):
    counts = convert(mined, tmp_path / "out.parquet", "sentence-transformers", num_negatives=2)
    assert counts == {"rows": 1, "left_out": 2}
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [r["positive"] for r in table] == ["p1", "p2"] and [r["score_positive"] for r in table] == [0.9, 0.8]
    assert all((r["query"], r["negative_1"], r["negative_2"], r["score_2"]) == ("a", "n1", "n2", 0.4) for r in table)


def test_automodel_ids_lead_to_the_texts(mined, tmp_path):
    assert convert(mined, tmp_path / "out.json", "automodel", prompt="Q: ") == {"rows": 2, "left_out": 1}
    whole = json.loads((tmp_path / "out.json").read_text())
    corpus = tmp_path / whole["corpus"][0]["path"]
    texts = {r["id"]: r["text"] for r in pq.read_table(corpus / "train.parquet").to_pylist()}
    metadata = json.loads((corpus / "merlin_metadata.json").read_text())
    assert metadata["query_instruction"] == "Q:" and metadata["corpus_id"] == whole["data"][0]["corpus_id"]
    for row, want in zip(whole["data"], ROWS[:2], strict=True):
        assert row["question"] == want["query"]
        assert [texts[d["id"]] for d in row["pos_doc"]] == want["pos"]
        assert [texts[d["id"]] for d in row["neg_doc"]] == want["neg"]
        assert [d["score"] for d in row["pos_doc"] + row["neg_doc"]] == want["pos_scores"] + want["neg_scores"]
    assert len(texts) == 5 and not list(tmp_path.glob(".*")), "every text once, and nothing left behind"


@pytest.mark.parametrize("form", FORMATS)
def test_large_files_pass_in_groups_and_come_out_the_same(tmp_path, monkeypatch, form):
    rows = [
        {
            "query": f"q {i}",
            "pos": [f"p {i}"],
            "neg": [f"n {i % 7}", f"n {i}"],
            "pos_scores": [0.5],
            "neg_scores": [0.4, 0.3],
        }
        for i in range(40)
    ]
    (tmp_path / "mined.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def content(name):
        convert(tmp_path / "mined.jsonl", tmp_path / name / "out", form, num_negatives=2)
        found = {}
        for path in sorted((tmp_path / name).rglob("*")):
            if path.is_file():
                is_parquet = path.name == "train.parquet" or form == "sentence-transformers"
                found[path.name] = pq.read_table(path).to_pylist() if is_parquet else path.read_text()
        return found

    for name in ("whole", "grouped"):
        (tmp_path / name).mkdir()
    whole = content("whole")
    monkeypatch.setattr("nemo_embed_core.mine.formats.ROWS_PER_GROUP", 7)
    assert content("grouped") == whole and whole


def test_format_that_would_be_empty_or_is_unknown_is_refused(mined, tmp_path):
    with pytest.raises(UserError, match="none of 3 rows has the 9 negatives"):
        convert(mined, tmp_path / "x", "sentence-transformers", num_negatives=9)
    with pytest.raises(UserError, match="tevatron"):
        convert(mined, tmp_path / "x", "parquet")
