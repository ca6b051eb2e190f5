"""launch/evaluate.py: what is used, overridden, counted and refused; figures equal to mteb's own on every shape of data."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from toy_evaluation import copied, write_beir

from nemo_embed_core.config import UserError
from nemo_embed_core.evaluation.retrieval import METRICS, mteb_imported


def figures(entry: Mapping[str, Any]) -> list[float]:
    return [entry[metric] for metric in METRICS]


def test_our_model_a_foreign_folder_and_bm25_side_by_side(launcher, ours, static, beir, tmp_path, capsys, monkeypatch):
    output = tmp_path / "reports" / "report.json"
    models = [str(ours), str(static), "bm25"]
    options = ["--data", str(beir), "--split", "test", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--models", *models, *options])
    launcher.main()
    report = json.loads(output.read_text())
    assert list(report) == models
    for entry in report.values():
        # One relevant document for each query.
        assert 0 <= entry["mrr_at_10"] <= entry["ndcg_at_10"] <= entry["recall_at_10"] <= 1
        assert entry["data"]["languages"] == {"de": 9, "en": 3} and entry["data"]["queries"] == 12
    own, foreign, bm25 = report.values()
    # A word is in three documents of equal length, so BM25 cannot do better than chance among the three, nor worse.
    assert bm25["recall_at_10"] == 1.0
    assert own["prompts"] == {"query": "query: ", "document": ""} and foreign["prompts"] == {
        "query": "",
        "document": "",
    }
    assert own["query_max_length"] == own["document_max_length"] == 64 and own["similarity"] == "cosine"
    assert foreign["query_max_length"] is None, "a bag of words reads whole texts"
    assert own["truncated"] == foreign["truncated"] == {"query": 0, "document": 0}
    assert own["precision"] == "fp32" and len(own["digest"]) == 64 and own["overridden"] == {}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("12 queries of split test, 20 documents")
    assert lines[1] == "languages of the queries: de 9, en 3"
    assert lines[2].split() == ["model", "ndcg@10", "recall@10", "mrr@10", "seconds"]
    assert [line.split()[0] for line in lines[3:] if not line.startswith(" ")] == models
    assert lines[4].strip() == (
        'query "query: " 64 tokens, 0.0% truncated; document "" 64 tokens, 0.0% truncated; cosine, fp32, '
        + own["digest"][:12]
    )


# ------------------------------------------------------------------------------------------ the model's own


def test_a_folder_brings_its_prompts_and_lengths_and_what_overrides_them_is_said(
    launcher, ours, beir, tmp_path, capsys
):
    other = copied(
        ours,
        tmp_path / "other",
        "config_sentence_transformers.json",
        prompts={"query": "query: ", "document": "w3 ", "other": "w5 w6 "},
        nemo_embed_core=...,  # else it is a folder of ours that was edited, which is refused
    )
    options = {"models": [str(other)], "data": str(beir)}
    entry = launcher.run(tmp_path / "a.json", **options)[str(other)]
    assert entry["prompts"] == {"query": "query: ", "document": "w3 "} and entry["overridden"] == {}
    capsys.readouterr()
    changed = launcher.run(
        tmp_path / "b.json", **options, task="w1", document_task="", query_max_length=10, document_max_length=3
    )[str(other)]
    assert changed["prompts"] == {"query": "Instruct: w1\nQuery: ", "document": ""}
    assert (changed["query_max_length"], changed["document_max_length"]) == (10, 3)
    assert changed["overridden"] == {
        "task": "w1",
        "document_task": "",
        "query_max_length": 10,
        "document_max_length": 3,
    }
    assert changed["truncated"] == {"query": 0.0, "document": 1.0}  # BOS and two of three words
    assert "; overridden: task, document_task, query_max_length, document_max_length" in capsys.readouterr().out
    assert figures(changed) != figures(entry)
    named = launcher.run(tmp_path / "c.json", **options, prompt_name="other")[str(other)]
    assert named["prompts"] == {"query": "w5 w6 ", "document": "w3 "} and figures(named) != figures(entry)
    assert named["overridden"] == {"prompt_name": "other"}
    same = launcher.run(tmp_path / "d.json", **options, query_max_length=64)[str(other)]
    assert same["overridden"] == {} and figures(same) == figures(entry)
    with pytest.raises(UserError, match="prompt_name='wiki': it has query, other"):
        launcher.run(tmp_path / "e.json", **options, prompt_name="wiki")


# ------------------------------------------------------------------------------------------ mteb's own figures


def mteb_figures(folder: Path, task_name: str, corpus, queries, qrels) -> list[float]:
    """mteb's own task class and its own wrapper of sentence-transformers, over these texts."""
    with mteb_imported():
        import mteb
        from datasets import Dataset
        from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
        from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
        from sentence_transformers import SentenceTransformer

        judged: dict[str, dict[str, int]] = {}
        for query, document, score in qrels:
            judged.setdefault(query, {})[document] = score
        rows = [{"id": row["_id"], "title": row.get("title") or "", "text": row["text"]} for row in corpus]
        asked = [{"id": row["_id"], "text": row["text"]} for row in queries if row["_id"] in judged]
        task = mteb.get_task(task_name)
        data = RetrievalSplitData(
            corpus=Dataset.from_list(rows), queries=Dataset.from_list(asked), relevant_docs=judged, top_ranked=None
        )
        task.dataset, task.data_loaded = {"default": {"test": data}}, True
        model = SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder), device="cpu"))
        found = task.evaluate(model, "test", encode_kwargs={"batch_size": 32, "show_progress_bar": False})["default"]
        return [found[metric] for metric in METRICS]


CORPUS = [{"_id": f"d{i}", "title": "", "text": f"w{i} w{(i + 7) % 20} w{(i + 11) % 20}"} for i in range(20)]
QUERIES = [{"_id": f"q{i}", "text": f"w{i}"} for i in range(12)]
JUDGED = [(f"q{i}", f"d{(i + 3) % 20}", 1) for i in range(12)]
COPIES = [{"_id": f"c{i}", "text": "w2 w9"} for i in range(150)]  # more than a search that stops at 100 would see
SHAPES: dict[str, dict[str, Any]] = {
    "dangling documents": {"qrels": [*JUDGED, ("q1", "gone", 1), ("q2", "gone too", 2)]},
    "dangling queries": {"qrels": [*JUDGED, ("nobody", "d1", 1)]},
    "empty documents": {"corpus": [*CORPUS, *({"_id": f"e{i}", "title": "", "text": " " * i} for i in range(3))]},
    "titles": {"corpus": [{**row, "title": f" w{i} w{i}"} if i % 2 else row for i, row in enumerate(CORPUS)]},
    "null titles": {"corpus": [{**row, "title": None} for row in CORPUS]},
    "white space": {"corpus": [{**row, "text": f"  {row['text']}\n"} for row in CORPUS]},
    "grades": {"qrels": [*JUDGED, *((f"q{i}", f"d{i}", 3) for i in range(6))]},
    "zero judgements": {"qrels": [*JUDGED[:6], *((f"q{i}", f"d{i}", 0) for i in range(12))]},
    "negative scores": {"qrels": [*JUDGED, *((f"q{i}", f"d{i}", -1) for i in range(12))]},
    "unjudged queries": {"qrels": JUDGED[:5]},
    "ties": {"corpus": [*CORPUS, *COPIES], "qrels": [*JUDGED, ("q2", "c37", 1), ("q9", "c95", 1), ("q3", "c99", 1)]},
    "TREC": {"header": "", "trec": True},
    "no header": {"header": ""},
    "the query's own document": {
        "corpus": [*CORPUS, *({"_id": f"q{i}", "text": f"w{i}"} for i in range(12))],
        "qrels": JUDGED,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_figures_are_mtebs_own(launcher, ours, static, tmp_path, shape):
    """nDCG@10, recall@10 and MRR@10 of a folder of ours and of a foreign one, ArguAna's flag and without."""
    given = SHAPES[shape]
    corpus, qrels = given.get("corpus", CORPUS), given.get("qrels", JUDGED)
    lines = [(query, "0", document, score) for query, document, score in qrels] if given.get("trec") else qrels
    header = given.get("header", "query-id\tcorpus-id\tscore")
    data = write_beir(tmp_path / "beir", corpus, QUERIES, lines, header)
    models = [str(static)] if shape == "ties" else [str(ours), str(static)]  # padding turns ties of ours into near ties
    for task, ignore in (("ArguAna", True), ("SciFact", False)):
        options = {"models": models, "data": str(data), "on_missing": "allow", "ignore_identical_ids": ignore}
        report = launcher.run(tmp_path / "report.json", **options)
        for model in models:
            expected = mteb_figures(Path(model), task, corpus, QUERIES, qrels)
            assert figures(report[model]) == pytest.approx(expected, abs=1e-6), (model, task)
            assert 0 < expected[0] < 1, "a case that tells nothing"
