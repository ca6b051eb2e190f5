"""Splits and pools of documents by their language, from one encoding, on one rank and on two."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tiny import count_readings
from toy_evaluation import write_beir, write_table

from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.run import run


def run_many(models: list[Path | str], **options: Any) -> dict[str, dict[str, Any]]:
    return run(EvaluateConfig(models=[str(model) for model in models], device="cpu", **options))


def cross_lingual(folder: Path) -> Path:
    """Documents in three languages, queries in two; a query judges documents of several languages."""
    languages = ["de", "en", "fr"]
    corpus = [
        {"_id": f"d{i}", "text": f"w{i % 20} w{(i * 3 + 1) % 20} w{i // 9}", "lang": languages[i % 3]}
        for i in range(36)
    ]
    queries = [{"_id": f"q{i}", "text": f"w{i} w{i // 2}", "lang": languages[i % 2]} for i in range(12)]
    judged = [(f"q{i}", f"d{j}", 1) for i in range(12) for j in (i, i + 4, i + 20) if (i, j) != (5, 5)]
    judged += [("q3", "d10", 0), ("q6", "d34", 2)]
    folder = write_beir(folder, corpus, queries, judged)
    lines = (folder / "qrels/test.tsv").read_text().splitlines()
    (folder / "qrels/dev.tsv").write_text("\n".join([lines[0], *lines[1:13]]) + "\n")
    return folder


def narrowed(folder: Path, source: Path, split: str, language: str) -> Path:
    """The data of one pool as a BEIR folder of its own: its documents, judgements of them, and the queries
    that have a relevant one."""
    rows = {
        name: [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()]
        for name in ("corpus", "queries")
    }
    corpus = [row for row in rows["corpus"] if row["lang"] == language]
    inside = {row["_id"] for row in corpus}
    lines = [line.split("\t") for line in (source / f"qrels/{split}.tsv").read_text().splitlines()[1:]]
    judged = [(q, d, int(s)) for q, d, s in lines if d in inside]
    relevant = {q for q, _, score in judged if score > 0}
    queries = [row for row in rows["queries"] if row["_id"] in relevant]
    return write_beir(folder, corpus, queries, [row for row in judged if row[0] in relevant])


def test_pools_and_splits_are_folders_of_their_own_from_one_encoding(ours, tmp_path, monkeypatch, capsys):
    """Figures, queries and by-language means of each (split, pool), by the same documents in a folder."""
    from nemo_embed_core.encoders.embedder import Embedder

    data = cross_lingual(tmp_path / "data")
    encoded: list[int] = []
    encode = Embedder.encode_tokens
    monkeypatch.setattr(
        Embedder, "encode_tokens", lambda self, ids: encoded.append(len(ids)) or encode(self, ids)
    )
    monkeypatch.setattr("nemo_embed_core.evaluation.retrieval.MAX_SCORES", 60)  # five documents at a time
    options = {"data": str(data), "name": "x", "output": str(tmp_path / "reports")}
    with monkeypatch.context() as patched:
        readings = count_readings(patched)
        patched.setattr(tempfile, "tempdir", "/nowhere")  # texts stand beside the reports
        many = run_many([ours, "bm25"], **options, split="dev, test", pool=["lang=each", "lang=all"])
    assert sum(encoded) == 36 + 12, "every text once"
    assert readings == {"corpus.jsonl": 1, "queries.jsonl": 2}
    names = [
        f"x@{split}{pool}" for split in ("dev", "test") for pool in ("@lang=de", "@lang=en", "@lang=fr", "")
    ]
    assert list(many) == names
    assert {path.name for path in (tmp_path / "reports").glob("*.json")} == {f"{name}.json" for name in names}
    for split, language in (("dev", "en"), ("test", "de"), ("test", "fr")):
        own = narrowed(tmp_path / f"{split}-{language}", data, split, language)
        alone = run_many([ours, "bm25"], data=str(own))[own.name]
        report = many[f"x@{split}@lang={language}"]
        for model, entry in alone.items():
            for metric in ("ndcg_at_10", "recall_at_10", "mrr_at_10"):
                assert report[model][metric] == pytest.approx(entry[metric], abs=1e-6), (split, language)
            assert report[model]["by_language"].keys() == entry["by_language"].keys()
            for fact in ("queries", "documents", "digest", "found"):
                assert report[model]["data"][fact] == entry["data"][fact], fact
        assert report[str(ours)]["data"]["pool"] == f"lang={language}"
    whole = run_many([ours], data=str(data))["data"][str(ours)]
    assert many["x@test"][str(ours)]["data"]["digest"] == whole["data"]["digest"]
    assert many["x@test"][str(ours)]["ndcg_at_10"] == pytest.approx(whole["ndcg_at_10"], abs=1e-6)
    by_language = whole["by_language"]
    total = sum(found["queries"] * found["ndcg_at_10"] for found in by_language.values())
    assert {name: found["queries"] for name, found in by_language.items()} == {"de": 6, "en": 6}
    assert total / 12 == pytest.approx(whole["ndcg_at_10"], abs=1e-5)
    encoded.clear()
    only = run_many([ours], data=str(data), name="x", pool=["lang=en"])
    assert sum(encoded) == 12 + only["x@lang=en"][str(ours)]["data"]["queries"], "of one pool its texts alone"
    said = capsys.readouterr().out
    assert "have no relevant document in it" in said


def test_splits_share_what_a_corpus_has_to_say_and_refuse_one_that_is_bad(tmp_path, monkeypatch, capsys):
    data = cross_lingual(tmp_path / "data")
    with open(data / "corpus.jsonl", "a") as corpus:
        corpus.write('{"_id": "x", "text": "w1", "title": null}\n')
    monkeypatch.setattr("nemo_embed_core.evaluation.run.SAID_BYTES", 100)
    found = run_many(["bm25"], data=str(data), name="x", split="dev,test")
    assert f"GiB of texts stand in {tempfile.gettempdir()} (TMPDIR) until the end" in capsys.readouterr().out
    for report in found.values():
        assert report["bm25"]["data"]["found"] == {"documents with a null title, read as without": 1}
    alone = run_many(["bm25"], data=str(data), name="x", split="dev", output=str(tmp_path / "x.json"))
    assert alone["x"]["bm25"]["data"] == {**found["x@dev"]["bm25"]["data"], "name": "x"}
    assert "(TMPDIR)" not in capsys.readouterr().out
    readings = count_readings(monkeypatch)
    with pytest.raises(UserError, match=r"qrels/train.tsv \(or .gz\) does not exist"):
        run_many(["bm25"], data=str(data), split="test,train")
    assert not readings["corpus.jsonl"], "it may be large"
    with open(data / "corpus.jsonl", "a") as corpus:
        corpus.write('{"_id": "y"}\n')
    with pytest.raises(UserError) as error:
        run_many(["bm25"], data=str(data), split="dev,test")
    assert str(error.value) == f"{data}/corpus.jsonl:38: field 'text' is missing"


def test_a_matrix_of_languages_is_printed(ours, tmp_path, capsys):
    data = cross_lingual(tmp_path / "data")
    reports = run_many([ours], data=str(data), name="x", pool=["lang=de", "lang=en"])
    lines = capsys.readouterr().out.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("  ndcg_at_10 of test: queries in"))
    assert lines[start + 1].split() == ["de", "en"]
    for line, language in zip(lines[start + 2 : start + 4], ("de", "en"), strict=True):
        cells = [reports[f"x@lang={pool}"][str(ours)]["by_language"][language] for pool in ("de", "en")]
        assert line.split() == [language, *(f"{cell['ndcg_at_10']:.4f}" for cell in cells)]


def test_a_dataset_folder_has_pools_by_the_lang_of_its_documents(ours, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    data = cross_lingual(tmp_path / "data")
    from nemo_embed_core.config import DataConfig, DatasetConfig
    from nemo_embed_core.data.prepare import write_datasets

    config = DataConfig(datasets=[DatasetConfig(path=str(data), split="test")])
    folder = Path(write_datasets(config, tmp_path / "set", lambda _: None).datasets[0].path)
    table_ = pyarrow.parquet.read_table(folder / "corpus.parquet")
    languages = [("de", "en", "fr")[int(key.rsplit("d", 1)[1]) % 3] for key in table_["id"].to_pylist()]
    pyarrow.parquet.write_table(table_.append_column("lang", pa.array(languages)), folder / "corpus.parquet")
    metadata = json.loads((folder / "dataset_metadata.json").read_text())
    (folder / "dataset_metadata.json").write_text(json.dumps({**metadata, "files": {}}))
    pool = run_many([ours], data=str(folder), name="x", pool=["lang=en"])["x@lang=en"][str(ours)]
    assert pool["data"]["documents"] == languages.count("en")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": ["en"]}, "pool=en must be lang=LANGUAGE, lang=each or lang=all"),
        ({"pool": ["lang=ru"]}, "pool=lang=ru: the documents are in de, en, fr"),
        ({"pool": ["lang=en"], "task_type": "sts"}, "pool and several splits are of task_type retrieval"),
        ({"split": "test,dev", "output": "a.json"}, "output=a.json: each task, split and pool has a report"),
    ],
)
def test_pools_that_cannot_be_are_refused(tmp_path, options, message):
    data = cross_lingual(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        run_many(["bm25"], data=str(data), **options)


def test_a_corpus_without_languages_has_no_pools(beir):
    with pytest.raises(UserError, match="pool: no document of the corpus has a lang"):
        run_many(["bm25"], data=str(beir), pool=["lang=each"])


# ------------------------------------------------------------------------------------------ ranks


def evaluated(models: list[str], output: str, tables: dict[str, str]) -> dict[str, Any]:
    """A run in this process's group; how many texts this rank encoded, with it."""
    import torch.distributed as dist

    from nemo_embed_core.config.evaluate import LocalTask
    from nemo_embed_core.encoders.embedder import Embedder

    counts: list[int] = []
    encode = Embedder.encode_tokens

    def counted(self: Embedder, ids: list[Any]) -> Any:
        counts.append(len(ids))
        return encode(self, ids)

    Embedder.encode_tokens = counted  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    local = [LocalTask(name=kind, data=path, task_type=kind) for kind, path in tables.items()]
    reports = run_many([*models], local=local, output=output)
    return {"reports": reports, "encoded": sum(counts)}


@pytest.mark.dist
def test_two_ranks_share_the_texts_of_a_task_and_report_as_one(server, ours, static, beir, tmp_path):
    """A search, and tables with documents and without; the other tables' texts go the same way."""
    tables = {"retrieval": str(beir)}
    kinds = ("reranking", "classification")
    tables |= {kind: str(write_table(tmp_path / kind, kind)) for kind in kinds}
    models, outputs = [str(ours), str(static)], [str(tmp_path / f"{n}-ranks") for n in (1, 2)]
    (one,), two = (server.results(evaluated, n + 1, models, outputs[n], tables) for n in (0, 1))
    assert two[0]["reports"].keys() == two[1]["reports"].keys() == one["reports"].keys() == tables.keys()
    assert two[0]["encoded"] + two[1]["encoded"] == one["encoded"] and min(t["encoded"] for t in two) > 0
    assert abs(two[0]["encoded"] - two[1]["encoded"]) <= 20, "halves of each piece, but for an odd text"
    for kind in tables:
        for model in models:
            entries = [found["reports"][kind][model] for found in (one, *two)]
            figures = [
                {k: v for k, v in entry.items() if isinstance(v, float) and k != "seconds"}
                for entry in entries
            ]
            assert figures[1] == pytest.approx(figures[0], abs=1e-6) and figures[2] == figures[1], kind
            told = [(e["truncated"], e["encoding"]["texts"], e["encoding"]["tokens"]) for e in entries]
            assert told[0] == told[1] == told[2] and told[0][1] > 20
        written = json.loads((Path(outputs[1]) / f"{kind}.json").read_text())
        assert list(written) == models
