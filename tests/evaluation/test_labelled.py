"""Graded and labelled texts: mteb's own figures on toy tasks of every type, scores of rows, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_evaluation import copied, table, write_table

from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.compare import compare
from nemo_embed_core.evaluation.labelled import KINDS, Labelled
from nemo_embed_core.evaluation.rank_statistics import average_precision, closeness, spearman
from nemo_embed_core.evaluation.retrieval import mteb_imported, task_metadata
from nemo_embed_core.evaluation.tasks import plans_of


def mteb_figures(folder: Path, task_type: str, prompt: str) -> dict[str, float]:
    """mteb's own task classes and its own wrapper of sentence-transformers, on the same texts."""
    with mteb_imported():
        from datasets import Dataset, DatasetDict
        from mteb import abstasks
        from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
        from sentence_transformers import SentenceTransformer
        from sklearn.neighbors import KNeighborsClassifier

        kind = KINDS[task_type].type
        if task_type == "reranking":
            return mteb_reranking(folder, prompt)
        base: Any = getattr(abstasks, f"AbsTask{kind}")
        main = {"STS": "spearman", "PairClassification": "max_ap", "Classification": "accuracy"}
        main = {**main, "Clustering": "v_measure"}.get(kind, "f1")
        known = {"metadata": task_metadata(kind, main), "max_fraction_of_documents_to_embed": None}
        classes = type("Local", (base,), known)
        prompts = {kind: prompt} if prompt else None
        model = SentenceTransformerEncoderWrapper(
            SentenceTransformer(str(folder), device="cpu"), model_prompts=prompts
        )
        # Of pairs mteb knows no euclidean and manhattan; without a name it asks sentence-transformers.
        meta = model.mteb_model_meta.model_copy(update={"similarity_fn_name": None})
        model.mteb_model_meta = meta

        def figures(splits: dict[str, list[dict[str, Any]]], classifier: Any = None) -> dict[str, float]:
            task = classes()
            if classifier is not None:
                task.evaluator_model = classifier
            task.dataset = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
            task.data_loaded = True
            return task.evaluate(model, "test", encode_kwargs={"batch_size": 8, "show_progress_bar": False})[
                "default"
            ]

        rows = table(task_type, 1, 30)
        if task_type == "sts":
            return figures({"test": rows})
        if task_type == "pair_classification":
            return figures({"test": [{**row, "labels": row["label"]} for row in rows]})
        if task_type == "clustering":
            return figures({"test": [{"sentences": row["text"], "labels": row["label"]} for row in rows]})
        if task_type == "classification":
            number = {"one": 0, "three": 1, "two": 2}
            splits = {"train": table(task_type, 2, 60), "test": rows}
            splits = {
                name: [{**r, "label": number[r["label"]]} for r in part] for name, part in splits.items()
            }
            nearest = figures(splits, KNeighborsClassifier(n_neighbors=5))
            return {**figures(splits), **{f"knn_{name}": nearest[name] for name in ("accuracy", "f1")}}
        forth = figures({"test": [{"sentence1": row["en"], "sentence2": row["de"]} for row in rows]})["f1"]
        back = figures({"test": [{"sentence1": row["de"], "sentence2": row["en"]} for row in rows]})["f1"]
        return {"f1": (forth + back) / 2, "f1_forth": forth, "f1_back": back}


def mteb_reranking(folder: Path, prompt: str) -> dict[str, float]:
    """By mteb's deprecated class, from its own format of rows."""
    from datasets import Dataset
    from mteb.abstasks.text import reranking
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    rows = table("reranking", 1, 30)

    class Local(reranking.AbsTaskReranking):
        metadata = task_metadata("Reranking", "map_at_1000")

    task = Local()
    reranking.OLD_FORMAT_RERANKING_TASKS.append("LocalReranking")
    task.transform_old_dataset_format({"test": Dataset.from_list(rows)})
    task.data_loaded = True
    prompts = {"query": prompt, "document": ""}
    model = SentenceTransformerEncoderWrapper(
        SentenceTransformer(str(folder), device="cpu"), model_prompts=prompts
    )
    options = {"batch_size": 8, "show_progress_bar": False}
    return task.evaluate(model, "test", encode_kwargs=options)["default"]


@pytest.mark.parametrize("task_type", KINDS)
def test_figures_are_mtebs_own_and_those_of_the_rows(launcher, ours, static, tmp_path, capsys, task_type):
    """By ours with its query prompt before all texts, and by a foreign folder without one."""
    data, output = write_table(tmp_path / "data", task_type), tmp_path / "report.json"
    models = [str(ours), str(static)]
    report = launcher.run(output, models=models, data=str(data), task_type=task_type)
    for model, prompt in zip(models, ("query: ", ""), strict=True):
        theirs, entry = mteb_figures(Path(model), task_type, prompt), report[model]
        own = {name: value for name, value in entry.items() if name in theirs and value != "fp32"}
        assert own == pytest.approx({name: theirs[name] for name in own}, abs=1e-6) and len(own) >= 2
        assert 0.05 < abs(entry[entry["data"]["main_score"]]) < 0.99, "a case that tells nothing"
        assert entry["prompts"] == {"query": prompt, "document": "" if task_type == "reranking" else prompt}
        assert entry["truncated"] == {"query": 0, "document": 0} and entry["data"]["queries"] == 30
    assert f"30 rows of split test of {data}" in capsys.readouterr().out
    found = compare([str(output)], draws=1000, allow=["prompts", "lengths"])
    assert found["tasks"]["data"]["type"] == KINDS[task_type].type
    pair = found["pairs"][0]["tasks"]["data"]
    if task_type == "clustering":
        assert (
            pair["low"] is pair["p"] is found["pairs"][0]["over_queries"] is None and not found["differ_most"]
        )
        return
    assert pair["low"] <= pair["score"] <= pair["high"] and 0 < pair["p"] <= 1
    shown = found["differ_most"][0]
    assert (shown["losses"] or shown["gains"])[0]["id"].startswith("test.jsonl:")


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("task_type", ["sts", "pair_classification", "bitext", "reranking"])
def test_texts_are_compared_by_the_models_own_similarity(launcher, static, tmp_path, task_type, name):
    """Of vectors of any length, as mteb compares them."""
    settings = "config_sentence_transformers.json"
    folder = copied(static, tmp_path / "model", settings, similarity_fn_name=name)
    data, output = write_table(tmp_path / "data", task_type), tmp_path / "r.json"
    entry = launcher.run(output, models=[str(folder)], data=str(data), task_type=task_type)[str(folder)]
    theirs = mteb_figures(folder, task_type, "")
    own = {key: value for key, value in entry.items() if key in theirs and isinstance(value, float)}
    assert own == pytest.approx({key: theirs[key] for key in own}, abs=1e-6) and len(own) >= 2
    assert entry["similarity"] == name
    if task_type == "sts":
        is_other = entry["spearman"] != pytest.approx(entry["cosine_spearman"], abs=1e-4)
        assert is_other == (name != "cosine")


def test_rank_statistics_of_draws_are_those_of_copied_rows():
    """scipy and scikit-learn on each draw's rows, copies and ties with them."""
    from scipy.stats import rankdata, spearmanr
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(0)
    predicted_n, grades_n = generator.normal(size=25).round(1), generator.integers(0, 4, size=25) / 2
    labels_n = (grades_n + generator.normal(size=25) > 1).astype(float)
    counts_Bn = generator.multinomial(25, np.ones(25) / 25, size=40)
    for own, gold_n, theirs in (
        (spearman, grades_n, lambda x, y: spearmanr(x, y)[0]),
        (average_precision, labels_n, lambda x, y: average_precision_score(y, x)),
    ):
        drawn = [np.repeat(np.arange(25), row) for row in counts_Bn]
        expected = [theirs(predicted_n[rows], gold_n[rows]) for rows in drawn]
        np.testing.assert_allclose(own(counts_Bn, predicted_n, gold_n), expected, atol=1e-12)
        assert np.isnan(own(counts_Bn, predicted_n * np.nan, gold_n)).all()
    one = np.zeros((1, 25), np.int64)
    one[0, 3] = 25
    assert (
        spearman(one, predicted_n, grades_n) == 0 and average_precision(one, predicted_n, 0 * labels_n) == 0
    )
    distance = np.abs(rankdata(predicted_n) - rankdata(grades_n)) / 25
    np.testing.assert_allclose(closeness(predicted_n[None], grades_n)[0], 1 - distance)


@pytest.mark.parametrize(
    ("task_type", "row", "message"),
    [
        (
            "sts",
            {"sentence1": "a", "score": 1},
            r"test.jsonl:31: field 'sentence2' is missing: give {\"sentence1",
        ),
        (
            "sts",
            {"sentence1": "a", "sentence2": "b", "score": "x"},
            r"test.jsonl:31: field 'score' must be a number",
        ),
        ("sts", {"sentence1": "", "sentence2": "b", "score": 1}, "test.jsonl:31: "),
        (
            "pair_classification",
            {"sentence1": "a", "sentence2": "b", "label": 2},
            "31: field 'label' must be 0 or 1",
        ),
        (
            "classification",
            {"text": "a", "label": 0.5},
            "31: field 'label' must be a string or an integer, got 0.5",
        ),
        ("reranking", {"query": "a", "positive": ["b"]}, "31: field 'negative' is missing"),
        ("reranking", {"query": "a", "positive": "b", "negative": []}, "31: field 'negative' must be texts"),
        ("reranking", {"query": "a", "positive": "b", "negative": ["b"]}, "31: a candidate stands twice"),
        ("bitext", {"en": "a", "de": "b", "fr": "c"}, "31: field 'sentence1' is missing"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path, task_type, row, message):
    data = write_table(tmp_path / "data", task_type)
    with (data / "test.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        Labelled(EvaluateConfig(data=str(data), task_type=task_type))


@pytest.mark.parametrize(
    ("task_type", "options", "message"),
    [
        ("sts", {"models": ["bm25"]}, "bm25 ranks documents for queries: task_type=sts has none"),
        ("clustering", {"models": ["bm25"]}, "bm25 ranks .*: task_type=clustering has none"),
        ("bitext", {"max_queries": 3}, "max_queries is of task_type retrieval, not of bitext: remove it"),
        ("sts", {"on_missing": "allow"}, "on_missing is of task_type retrieval, not of sts: remove it"),
        (
            "classification",
            {"split": "train"},
            "classification needs a folder with files of train and of train",
        ),
        (
            "classification",
            {"data": "test.jsonl"},
            "classification needs a folder with files of train and of test",
        ),
    ],
)
def test_what_a_task_has_not_is_refused(tmp_path, task_type, options, message):
    data = write_table(tmp_path / "data", task_type)
    options = {**options, "data": str(data / options.get("data", ""))}
    with pytest.raises(UserError, match=message):
        config = EvaluateConfig(**{"task_type": task_type, "models": ["m"], **options})
        (plan,) = plans_of(config)
        plan.check(config.models)
        plan.open()


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("task_type", "gold", "message"),
    [
        ("sts", lambda i: 1.5, "d.jsonl: 5 rows of split test with one grade have no order"),
        ("pair_classification", lambda i: 1, "d.jsonl: 5 rows of split test all have the label 1; give"),
        ("pair_classification", lambda i: 0.0, "d.jsonl: 5 rows of split test all have the label 0; give"),
        ("clustering", lambda i: "a", "d.jsonl: 5 rows of split test have one label: nothing is to be"),
        ("clustering", lambda i: i, "d.jsonl: 5 rows of split test have as many labels: nothing is to be"),
    ],
)
def test_grades_and_labels_that_no_model_could_get_wrong_are_refused(tmp_path, task_type, gold, message):
    """Before anything is encoded."""
    name = "score" if task_type == "sts" else "label"
    rows = [{**row, name: gold(i)} for i, row in enumerate(table(task_type, 1, 5))]
    data = written(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError, match=message):
        Labelled(EvaluateConfig(data=str(data), task_type=task_type))


def test_labels_of_a_classification_that_training_has_not_are_refused_or_said(tmp_path, capsys):
    texts = [{"text": f"w{i} w{i + 1}", "label": i % 2} for i in range(12)]
    written(tmp_path / "data/test.jsonl", [*texts, {"text": "w3", "label": 7}, {"text": "w4", "label": "8"}])
    config = EvaluateConfig(data=str(tmp_path / "data"), task_type="classification")
    written(tmp_path / "data/train.jsonl", [{**row, "label": 1} for row in texts])
    with pytest.raises(UserError, match="data: 12 rows of split train all have the label '1'; give others"):
        Labelled(config)
    written(tmp_path / "data/train.jsonl", texts)
    counts = {"texts with a label that no row of train has, which cannot be right": 2}
    assert counts.items() <= Labelled(config).facts["found"].items()
    said = "2 of 14 texts have a label that no row of train has, and cannot be right (first: test.jsonl:13, "
    assert f"{said}label '7')" in capsys.readouterr().out


def test_similarities_that_are_all_the_same_are_refused(launcher, static, tmp_path):
    data = written(
        tmp_path / "same.jsonl", [{"sentence1": "w1", "sentence2": "w1", "score": i} for i in range(5)]
    )
    with pytest.raises(UserError, match=r"same.jsonl: spearman is not a number: all similarities of"):
        launcher.run(tmp_path / "r.json", models=[str(static)], data=str(data), task_type="sts")
