"""launch/evaluate.py: what is used, overridden, counted and refused; figures equal to mteb's own on every
shape of data."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from toy_evaluation import copied, write_beir

from nemo_embed_core.config import DataConfig, DatasetConfig, EvaluateConfig
from nemo_embed_core.data.prepare import write_datasets
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.compare import compare
from nemo_embed_core.evaluation.retrieval import METRICS, mteb_imported
from nemo_embed_core.evaluation.run import evaluate

ROOT = Path(__file__).resolve().parents[2]


def figures(entry: Mapping[str, Any]) -> list[float]:
    return [entry[metric] for metric in METRICS]


def test_our_model_a_foreign_folder_and_bm25_side_by_side(
    launcher, ours, static, beir, tmp_path, capsys, monkeypatch
):
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
    # A word is in three documents of equal length, so BM25 cannot do better than chance among the three, nor
    # worse.
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


# ------------------------------------------------------------------------------------------ of each query


def test_an_evaluation_writes_the_scores_that_a_comparison_reads(launcher, ours, static, beir, tmp_path):
    """Of each query what mteb says of it, by the formula of one relevant document; documents by their ids."""
    report = launcher.run(
        tmp_path / "wiki.json", models=[str(ours), str(static), "bm25"], data=str(beir), name="words"
    )
    for model, entry in report.items():
        rows = [json.loads(line) for line in (tmp_path / entry["per_query"]).read_text().splitlines()]
        assert [row["id"] for row in rows] == [f"q{i}" for i in range(12)], model
        assert [row["language"] for row in rows] == ["de"] * 9 + ["en"] * 3
        for i, row in enumerate(rows):
            place = row["found"].index(f"d{i}") + 1 if f"d{i}" in row["found"] else None
            assert row["ndcg_at_10"] == pytest.approx(1 / math.log2(place + 1) if place else 0)
            assert row["mrr_at_10"] == pytest.approx(1 / place if place else 0) and row[
                "recall_at_10"
            ] == bool(place)
            assert row["scores"] == sorted(row["scores"], reverse=True) and len(row["found"]) <= 10
            text = f"w{i} w{(i + 7) % 20} w{(i + 11) % 20}"
            assert row["judged"] == {f"d{i}": 1} and row["texts"][f"d{i}"] == text and row["text"] == f"w{i}"
            assert row["found"][0] in row["texts"]
        for metric in ("ndcg_at_10", "recall_at_10", "mrr_at_10"):
            assert statistics.mean([row[metric] for row in rows]) == pytest.approx(entry[metric], abs=6e-6)
    with pytest.raises(UserError, match=r"--allow prompts$|--allow lengths prompts$"):
        compare([str(tmp_path / "wiki.json")], draws=1000)
    found = compare([str(tmp_path / "wiki.json")], draws=1000, allow=["prompts", "lengths"])
    assert list(found["tasks"]) == ["words"] and set(found["tasks"]["words"]["languages"]) == {"de", "en"}


# ------------------------------------------------------------------------------------------ the model's own


def test_a_folder_brings_its_prompts_and_lengths_and_what_overrides_them_is_said(
    launcher, ours, beir, tmp_path, capsys
):
    other = copied(
        ours,
        tmp_path / "other",
        "config_sentence_transformers.json",
        prompts={"query": "query: ", "document": "w3 ", "other": "w5 w6 ", "other-document": "w7 "},
        nemo_embed_core=...,  # else it is a folder of ours that was edited, which is refused
    )
    options = {"models": [str(other)], "data": str(beir)}
    entry = launcher.run(tmp_path / "a.json", **options)[str(other)]
    assert entry["prompts"] == {"query": "query: ", "document": "w3 "} and entry["overridden"] == {}
    capsys.readouterr()
    changed = launcher.run(
        tmp_path / "b.json",
        **options,
        task="w1",
        document_task="",
        query_max_length=10,
        document_max_length=3,
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
    assert (
        "; overridden: task, document_task, query_max_length, document_max_length" in capsys.readouterr().out
    )
    assert figures(changed) != figures(entry)
    named = launcher.run(tmp_path / "c.json", **options, prompt_name="other")[str(other)]
    assert named["prompts"] == {"query": "w5 w6 ", "document": "w7 "} and figures(named) != figures(entry)
    assert named["overridden"] == {"prompt_name": "other"}
    same = launcher.run(tmp_path / "d.json", **options, query_max_length=64)[str(other)]
    assert same["overridden"] == {} and figures(same) == figures(entry)
    with pytest.raises(UserError, match="prompt_name='wiki': the model's prompts are query, other"):
        launcher.run(tmp_path / "e.json", **options, prompt_name="wiki")


def test_a_dataset_folder_is_evaluated_with_its_own_instructions(launcher, ours, beir, tmp_path):
    """The figures of the BEIR folder that it was written from, with the same task."""
    data = DatasetConfig(path=str(beir), split="test", task="w1")
    folder = write_datasets(DataConfig(datasets=[data]), tmp_path / "set", lambda _: None).datasets[0].path
    first = launcher.run(tmp_path / "a.json", models=[str(ours)], data=str(beir), task="w1")[str(ours)]
    own = launcher.run(tmp_path / "b.json", models=[str(ours)], data=folder)[str(ours)]
    assert own["prompts"] == first["prompts"] == {"query": "Instruct: w1\nQuery: ", "document": ""}
    assert figures(own) == figures(first) and own["overridden"] == {"task": "w1"}
    other = launcher.run(tmp_path / "c.json", models=[str(ours)], data=folder, task="")[str(ours)]
    assert other["prompts"]["query"] == ""


# ----------------------------------------------------------------------------------------- mteb's own figures


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
            corpus=Dataset.from_list(rows),
            queries=Dataset.from_list(asked),
            relevant_docs=judged,
            top_ranked=None,
        )
        task.dataset, task.data_loaded = {"default": {"test": data}}, True
        model = SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder), device="cpu"))
        found = task.evaluate(model, "test", encode_kwargs={"batch_size": 32, "show_progress_bar": False})[
            "default"
        ]
        return [found[metric] for metric in METRICS]


CORPUS = [{"_id": f"d{i}", "title": "", "text": f"w{i} w{(i + 7) % 20} w{(i + 11) % 20}"} for i in range(20)]
QUERIES = [{"_id": f"q{i}", "text": f"w{i}"} for i in range(12)]
JUDGED = [(f"q{i}", f"d{(i + 3) % 20}", 1) for i in range(12)]
# More than a search that stops at 100 would see.
COPIES = [{"_id": f"c{i}", "text": "w2 w9"} for i in range(150)]
SHAPES: dict[str, dict[str, Any]] = {
    "dangling documents": {"qrels": [*JUDGED, ("q1", "gone", 1), ("q2", "gone too", 2)]},
    "dangling queries": {"qrels": [*JUDGED, ("nobody", "d1", 1)]},
    "empty documents": {
        "corpus": [*CORPUS, *({"_id": f"e{i}", "title": "", "text": " " * i} for i in range(3))]
    },
    "titles": {"corpus": [{**row, "title": f" w{i} w{i}"} if i % 2 else row for i, row in enumerate(CORPUS)]},
    "null titles": {"corpus": [{**row, "title": None} for row in CORPUS]},
    "white space": {"corpus": [{**row, "text": f"  {row['text']}\n"} for row in CORPUS]},
    "grades": {"qrels": [*JUDGED, *((f"q{i}", f"d{i}", 3) for i in range(6))]},
    "zero judgements": {"qrels": [*JUDGED[:6], *((f"q{i}", f"d{i}", 0) for i in range(12))]},
    "negative scores": {"qrels": [*JUDGED, *((f"q{i}", f"d{i}", -1) for i in range(12))]},
    "unjudged queries": {"qrels": JUDGED[:5]},
    "ties": {
        "corpus": [*CORPUS, *COPIES],
        "qrels": [*JUDGED, ("q2", "c37", 1), ("q9", "c95", 1), ("q3", "c99", 1)],
    },
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
    lines = (
        [(query, "0", document, score) for query, document, score in qrels] if given.get("trec") else qrels
    )
    header = given.get("header", "query-id\tcorpus-id\tscore")
    data = write_beir(tmp_path / "beir", corpus, QUERIES, lines, header)
    # Padding turns ties of ours into near ties.
    models = [str(static)] if shape == "ties" else [str(ours), str(static)]
    for task, ignore in (("ArguAna", True), ("SciFact", False)):
        options = {"models": models, "data": str(data), "on_missing": "allow", "ignore_identical_ids": ignore}
        report = launcher.run(tmp_path / "report.json", **options)
        for model in models:
            expected = mteb_figures(Path(model), task, corpus, QUERIES, qrels)
            assert figures(report[model]) == pytest.approx(expected, abs=1e-6), (model, task)
            assert 0 < expected[0] < 1, "a case that tells nothing"


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_a_folder_is_compared_by_its_own_similarity(launcher, ours, static, beir, tmp_path, name):
    """Ours without Normalize is a Llama with vectors of any length, static ones have any length too."""
    settings = "config_sentence_transformers.json"
    foreign = copied(static, tmp_path / "static", settings, similarity_fn_name=name)
    plain = copied(ours, tmp_path / "plain", settings, similarity_fn_name=name)
    modules = json.loads((plain / "modules.json").read_text())
    (plain / "modules.json").write_text(json.dumps(modules[:2]))
    report = launcher.run(
        tmp_path / "report.json", models=[str(foreign), str(plain), str(ours)], data=str(beir)
    )
    corpus = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line) for line in (beir / "queries.jsonl").read_text().splitlines()]
    judged = [(f"q{i}", f"d{i}", 1) for i in range(12)]
    for model in (foreign, plain):
        assert report[str(model)]["similarity"] == name
        expected = mteb_figures(model, "SciFact", corpus, queries, judged)
        assert figures(report[str(model)]) == pytest.approx(expected, abs=1e-6), model
    assert (figures(report[str(plain)]) == figures(report[str(ours)])) == (name == "cosine"), (
        "the lengths must matter"
    )


def test_a_checkpoint_its_export_and_sentence_transformers_give_one_figure(launcher, tmp_path, monkeypatch):
    """No option says how to encode: prompts of both sides and lengths come from the run."""
    from tiny import train_config

    from nemo_embed_core.config import DatasetConfig
    from nemo_embed_core.merge import merge
    from nemo_embed_core.parallel.mesh import distributed
    from nemo_embed_core.train.preflight import prepare
    from nemo_embed_core.train.trainer import Trainer

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = train_config(tmp_path, steps=1)
    dataset = DatasetConfig(
        path=str(tmp_path / "train.jsonl"), task="find the row", document_task="name what it is about"
    )
    lengths = {"query_max_length": 40, "document_max_length": 40}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=[dataset], **lengths))
    with distributed(config.parallel, "cpu", config.model) as mesh:
        Trainer(config, mesh, prepare(config), log=lambda message: None).run()
    export = tmp_path / "export"
    # It takes a process; here the figures are the proof.
    monkeypatch.setattr(merge, "check", lambda *_, **__: {"consumers": []})
    merge.merge(config.output_dir, export)

    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    # One text has more than 40 tokens with its instruction on each side.
    corpus = [
        {"_id": f"d{i}", "text": row["pos"][0] + " moon llama" * (10 * (i == 5))}
        for i, row in enumerate(rows)
    ]
    queries = [
        {"_id": f"q{i}", "text": row["query"] + " river" * (20 * (i == 7))} for i, row in enumerate(rows)
    ]
    judged = [(f"q{i}", f"d{i}", 1) for i in range(len(rows))]
    data = write_beir(tmp_path / "beir", corpus, queries, judged)
    report = launcher.run(tmp_path / "report.json", models=[config.output_dir, str(export)], data=str(data))
    own, merged = report.values()
    assert own["prompts"] == merged["prompts"] == {
        "query": "Instruct: find the row\nQuery: ", "document": "Instruct: name what it is about\nQuery: "
    }  # fmt: skip
    for entry in (own, merged):
        assert (entry["query_max_length"], entry["document_max_length"]) == (40, 40) and not entry[
            "overridden"
        ]
        assert entry["truncated"]["query"] > 0 and entry["truncated"]["document"] > 0
    expected = mteb_figures(export, "SciFact", corpus, queries, judged)
    for found in (own, merged):
        assert figures(found) == pytest.approx(expected, abs=1e-6)
    without = launcher.run(
        tmp_path / "other.json",
        models=[config.output_dir],
        data=str(data),
        task="",
        document_task="",
        query_max_length=512,
    )
    assert figures(without[config.output_dir]) != figures(own), "instructions and lengths must matter"


# --------------------------------------------------------------------------------- before any text is encoded


class Encoded(AssertionError):
    pass


@pytest.fixture
def nothing_is_encoded(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise Encoded

    monkeypatch.setattr("nemo_embed_core.encoders.embedder.Embedder.encode", refuse)
    monkeypatch.setattr(
        "nemo_embed_core.encoders.sentence_transformer.SentenceTransformerEncoder.encode", refuse
    )


def broken(ours: Path, static: Path, target: Path, what: str) -> Path:
    """A folder that cannot be evaluated."""
    settings = "config_sentence_transformers.json"
    if what == "no tokenizer":
        (copied(ours, target) / "tokenizer.json").unlink()
    elif what == "no weights":
        (copied(ours, target) / "model.safetensors").unlink()
    elif what == "unknown similarity":
        copied(static, target, settings, similarity_fn_name="maxsim")
    elif what == "unknown module":
        target.mkdir()
        (target / "modules.json").write_text(
            '[{"idx": 0, "name": "0", "path": "", "type": "no.such.Module"}]'
        )
    elif what == "embeddings":
        target.mkdir()
        (target / "documents.npy").write_bytes(b"")
    elif what in ("long prompt", "long document prompt"):
        prompts = (
            {"query": "w1 " * 63, "document": ""}
            if what == "long prompt"
            else {"query": "", "document": "w1 " * 70}
        )
        copied(ours, target, settings, prompts=prompts)
    elif what == "long prompt, foreign":
        copied(
            ours, target, settings, prompts={"query": "w1 " * 63, "document": ""}, similarity_fn_name="dot"
        )
    return target


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", r"nothing is not a folder.*only model without a folder is \"bm25\""),
        ("no tokenizer", "tokenizer"),
        ("no weights", "safetensors"),
        ("unknown similarity", "similarity_fn_name"),
        ("unknown module", "unknown module.* does not load in sentence-transformers"),
        ("embeddings", "embeddings"),
        ("long prompt", r"long prompt: query_max_length=64 tokens leaves no room for text: .* alone has 64"),
        ("long document prompt", r"long document prompt: document_max_length=64 .* alone has 71"),
        ("long prompt, foreign", r"foreign: query_max_length=64 .* alone has 64; the folder takes no more"),
    ],
)
def test_a_broken_model_is_found_before_the_first_text_is_encoded(
    launcher, ours, static, beir, tmp_path, nothing_is_encoded, what, message
):
    models = [str(ours), str(broken(ours, static, tmp_path / what, what))]
    with pytest.raises(UserError, match=message):
        launcher.run(tmp_path / "report.json", models=models, data=str(beir))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["bm25", "bm25"]}, "names one twice"),
        ({"models": []}, "no models"),
        ({"data": ""}, "data is missing: give the folder to evaluate on, or --compare"),
        ({"split": "validation"}, "validation"),
        ({"output": "."}, "output . is a folder"),
        ({"output": "/proc/nowhere/report.json"}, "output /proc/nowhere/report.json cannot be written"),
        ({"task": "w1 " * 70}, "query_max_length=64 tokens leaves no room for text"),
        ({"query_max_length": 5}, "query_max_length=5 tokens leaves no room for text"),
    ],
)
def test_wrong_options_are_refused_before_the_first_text_is_encoded(
    launcher, ours, beir, nothing_is_encoded, options, message
):
    with pytest.raises(UserError, match=message):
        evaluate(**{"models": [str(ours)], "data": str(beir), "device": "cpu", **options})
    with pytest.raises(UserError, match="query_max_length=0 must be at least 1"):
        EvaluateConfig(data=str(beir), query_max_length=0)
    with pytest.raises(UserError, match="max_tokens=0 must be at least 1"):
        EvaluateConfig(data=str(beir), max_tokens=0)


# ----------------------------------------------------------------------------------- what is said of the data


def test_a_query_that_is_its_own_document_is_warned_about_and_left_out_when_told_to(
    launcher, tmp_path, capsys
):
    """ArguAna and Quora: the first of every ranking is the query itself, the answer is the second."""
    words = [[f"w{(7 * i + j * j) % 97}" for j in range(12)] for i in range(20)]
    corpus = [{"_id": f"a{i}", "text": " ".join(row)} for i, row in enumerate(words)]
    answers = [
        {"_id": f"a{i}-con", "text": " ".join([*row[:6], "but", "not"])} for i, row in enumerate(words)
    ]
    data = write_beir(
        tmp_path / "beir", [*corpus, *answers], corpus, [(f"a{i}", f"a{i}-con", 1) for i in range(20)]
    )
    options = {"models": ["bm25"], "data": str(data)}
    entry = launcher.run(tmp_path / "a.json", **options)["bm25"]
    assert entry["ndcg_at_10"] == pytest.approx(1 / math.log2(3), abs=1e-4) and entry["mrr_at_10"] == 0.5
    assert entry["data"]["identical_ids"] == 20 and entry["data"]["ignore_identical_ids"] is False
    said = capsys.readouterr().out
    assert (
        "warning: 20 of 20 queries have the id of a document, 20 of them are in its text, 0 judge it relevant"
        in said
    )
    assert "--ignore_identical_ids true" in said
    entry = launcher.run(tmp_path / "b.json", **options, ignore_identical_ids=True)["bm25"]
    assert figures(entry) == [1.0, 1.0, 1.0] and entry["data"]["ignore_identical_ids"] is True
    said = capsys.readouterr().out
    assert "warning" not in said and "20 of 20 queries have the id of a document" in said


def test_queries_without_a_relevant_document_count_as_0_and_are_said(launcher, tmp_path, capsys):
    """As in mteb and trec_eval; a task of nothing else measures nothing. Grades below 0 are not relevant."""
    corpus = [{"_id": f"d{i}", "text": f"w{i} w{i + 1}"} for i in range(6)]
    queries = [{"_id": f"q{i}", "text": f"w{i} w{i + 1}"} for i in range(4)]
    judged = [("q0", "d0", 0), ("q1", "d1", 2), ("q2", "d2", -1), ("q3", "d3", 1)]
    data = write_beir(tmp_path / "some", corpus, queries, judged)
    entry = launcher.run(tmp_path / "a.json", models=["bm25"], data=str(data))["bm25"]
    assert figures(entry) == [0.5, 0.5, 0.5]
    assert entry["data"]["found"] == {"queries without a relevant document, which count as 0": 2}
    said = "2 of 4 queries have no relevant document and count as 0, as in mteb (first: 'q0')"
    assert said in capsys.readouterr().out
    data = write_beir(tmp_path / "none", corpus, queries, [(q, d, min(g, 0)) for q, d, g in judged])
    with pytest.raises(UserError, match="none: no query of split test has a relevant document"):
        launcher.run(tmp_path / "b.json", models=["bm25"], data=str(data))


def test_max_queries_is_a_sample_by_its_seed(launcher, beir, tmp_path, capsys):
    def ids(seed: int, count: int = 6) -> tuple[dict[str, int], list[float]]:
        entry = launcher.run(
            tmp_path / "r.json", models=["bm25"], data=str(beir), max_queries=count, seed=seed
        )["bm25"]
        assert (entry["data"]["queries"], entry["data"]["queries_of_the_split"]) == (min(count, 12), 12)
        assert entry["data"]["seed"] == (seed if count < 12 else None)
        return entry["data"]["languages"], figures(entry)

    # The file has nine in German, then three in English: its first six are German.
    assert any("en" in ids(seed)[0] for seed in range(3))
    assert ids(1) == ids(1) and len({str(ids(seed)) for seed in range(6)}) > 1
    capsys.readouterr()
    assert ids(3)[0].keys() <= {"de", "en"} and sum(ids(3)[0].values()) == 6
    assert capsys.readouterr().out.startswith(
        "6 queries of split test, a sample of 12 (seed 3), 20 documents"
    )
    assert ids(0, count=99)[0] == {"de": 9, "en": 3}
