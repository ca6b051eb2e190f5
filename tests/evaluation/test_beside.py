"""Beside a score: the share of the task in training data, and alarms; planted faults sound and healthy models
do not."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from toy_evaluation import WORDS, word_tokenizer, write_beir

from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation import beside as module
from nemo_embed_core.evaluation.beside import Sample, trained_with
from nemo_embed_core.evaluation.compare import compare
from nemo_embed_core.evaluation.run import evaluate


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Of each of 20 words two queries, of the first ten in th; 20 documents begin with them, 60 do not."""
    generator = random.Random(0)
    corpus = [{"_id": f"d{i}", "text": f"w{i} w{i} w{(i + 7) % 20}"} for i in range(20)]
    corpus += [{"_id": f"x{i}", "text": " ".join(generator.choices(WORDS[5:], k=5))} for i in range(60)]
    queries = [
        {"_id": f"q{i}-{n}", "text": " ".join([f"w{i}"] * n), "lang": "th" if i < 10 else "en"}
        for i in range(20) for n in (1, 2)
    ]  # fmt: skip
    judged = [(query["_id"], f"d{query['_id'][1:-2]}", 1) for query in queries]
    return write_beir(tmp_path_factory.mktemp("data") / "words", corpus, queries, judged)


def bag(folder: Path, vectors: np.ndarray) -> str:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    own = StaticEmbedding(word_tokenizer(), embedding_weights=vectors.astype(np.float32))
    SentenceTransformer(modules=[own], device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """good; alike: other vectors, as good; half: the words of th are told from no other one; point."""
    folder = tmp_path_factory.mktemp("bags")
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), 16))
    half = vectors.copy()
    half[WORDS.index("w0") : WORDS.index("w9") + 1] = vectors[0]
    turned = vectors @ np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
    point = vectors[0] + 0.01 * vectors
    made = {"good": vectors, "alike": turned, "half": half, "point": point}
    return {name: bag(folder / name, own) for name, own in made.items()}


def kinds(entry: dict) -> list[str]:
    return [alarm["kind"] for alarm in entry["alarms"]]


def test_a_language_that_is_lost_and_vectors_that_lie_together(models, data, capsys):
    names = [models[name] for name in ("alike", "half", "point")]
    report = evaluate(names, data, base=models["good"], device="cpu", draws=2000)
    assert list(report) == [models["good"], *names], "the base first"
    good, alike, half, point = report.values()
    assert kinds(good) == kinds(alike) == []
    assert kinds(half) == ["degradation"] and "th " in half["alarms"][0]["says"]
    assert "en " not in half["alarms"][0]["says"] and "worse than" in half["alarms"][0]["says"]
    groups = {one["group"]: one for one in half["base"]["groups"]}
    assert groups["th"]["queries"] == 20 and groups["th"]["high"] < 0 <= groups["en"]["high"]
    assert kinds(point)[0] == "collapse" and point["spread"]["document"]["mean_norm"] > 0.99
    assert good["spread"]["document"]["rows"] == 80 and "query" not in good["spread"], "40 rows are too few"
    assert "base" not in good
    said = capsys.readouterr().out
    assert said.count("alarm: degradation") == 1 and said.count("alarm: collapse: the document vectors") == 1


def test_an_instruction_that_helps_less_than_another_tasks(models, data):
    """Of a model whose own instruction leads every query to one word."""
    options = {"device": "cpu", "draws": 1000, "other_task": "{text}"}
    (misled,) = evaluate([models["good"]], data, task="w3 w3 w3 {text}", **options).values()
    assert kinds(misled) == ["confusion"] and misled["other_task"]["difference"] > 0.3
    assert "{text}" in misled["alarms"][0]["says"]
    options["other_task"] = "w3 w3 w3 {text}"
    (led,) = evaluate([models["good"]], data, **options).values()
    assert kinds(led) == [] and led["other_task"]["difference"] < -0.3
    assert led["other_task"]["base"] == pytest.approx(led["ndcg_at_10"], abs=1e-5), "its own is the base"


def test_the_share_of_training_data_is_beside_every_score(models, data, tmp_path, capsys, monkeypatch):
    rows = [{"query": "W3", "pos": ["w3 w3  W10."], "neg": []}, {"query": "w1 w2", "pos": ["w5"], "neg": []}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = [str(tmp_path / "train.jsonl")]
    names = [models["good"], models["alike"]]
    options = {"training": training, "device": "cpu", "output": str(tmp_path / "a.json")}
    report = evaluate([*names, "bm25"], data, **options, strict=0.05)
    for entry in report.values():
        own = entry["overlap"]
        assert [own[side]["exact"] for side in ("queries", "documents")] == [2, 1], "w3 and w5; d3"
        assert own["queries"]["first"][0] | {"text": 0} == {
            "id": "q3-1", "text": 0, "where": f"{training[0]}:1", "data": "W3", "kind": "exact",
            "similarity": 1.0,
        }  # fmt: skip
    assert capsys.readouterr().out.count("in training data: queries 5.00%, documents 1.25%") == 3
    notes = compare([tmp_path / "a.json"], draws=1000)["settings"]["notes"]
    assert f"{names[0]} queries 5.00%, documents 1.25%; {names[1]} queries 5.00%" in "".join(notes)
    monkeypatch.setattr(module.Beside, "add", lambda *_: pytest.fail("a text was encoded"))
    with pytest.raises(UserError, match=r"5\.00% of the queries of words .* strict=4\.00%: q3-1 'w3' at"):
        evaluate(names, data, **options, strict=0.04)
    with pytest.raises(UserError, match="does not say what it was trained on"):
        evaluate([models["good"]], data, training=["own"], device="cpu")
    for strict, given in ((0.5, []), (1.5, training)):
        with pytest.raises(UserError, match="is a share from 0 to 1 of what --training has"):
            EvaluateConfig(models=["m"], data="d", strict=strict, training=given)


def test_a_sample_has_each_row_with_the_same_chance(monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 8)
    drawn = np.zeros(40)
    sample = Sample()
    for _ in range(400):
        sample._rows = {}
        for part in np.split(np.arange(40.0)[:, None], [3, 20, 21]):
            sample("query", part)
        numbers = sample._rows["query"][1][:, 0].astype(int)
        assert len(set(numbers)) == 8
        drawn[numbers] += 1
    assert drawn.min() > 45 and drawn.max() < 120, "80 each, standard deviation 8"


def test_alarms_of_the_run_are_those_up_to_its_checkpoint(tmp_path):
    lines = [{"step": step, "loss": 1.0, **({"alarms": {"collapse": 1}} if step in (2, 3, 9) else {})}
             for step in range(1, 11)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    (alarm,) = trained_with(tmp_path / "step-00000008")
    assert alarm.kind == "collapse" and "sounded in 2 steps of training, 2 to 3" in alarm.says
    assert trained_with(tmp_path / "step-00000001") == trained_with(tmp_path / "export") == []
