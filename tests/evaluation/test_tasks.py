"""Several tasks in one run: mteb's by name from a mirror, local ones from a list; each by its own oracle."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from toy_evaluation import copied, table, write_table

from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.config.evaluate import LocalTask
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.compare import compare
from nemo_embed_core.evaluation.instructions import paper_instruction
from nemo_embed_core.evaluation.model_meta import model_meta, results_of
from nemo_embed_core.evaluation.retrieval import mteb_imported
from nemo_embed_core.evaluation.run import run

Rows = list[dict[str, Any]]
PAIRS = ("de-en", "fr-en", "ru-en", "zh-en")  # subsets of BUCC.v2
CORPUS = [
    {"id": f"d{i}", "title": f"w{i}" if i % 2 else "", "text": f"w{i} w{(i + 7) % 20}"} for i in range(20)
]
QUERIES = [{"id": f"q{i}", "text": f"w{i} w{(i + 3) % 20}"} for i in range(12)]
# Grades, a judgement of 0 and one of a document that is not there.
JUDGED = [*((f"q{i}", f"d{(i + 3) % 20}", 1 + i % 2) for i in range(12)), ("q1", "d1", 0), ("q2", "gone", 1)]


def bucc(subset: str) -> Rows:
    rows = table("bitext", 10 + PAIRS.index(subset), 20)
    return [{"sentence1": row["en"], "sentence2": row["de"], "lang": subset} for row in rows]


def labelled(seed: int, rows: int) -> Rows:
    number = {"one": 0, "two": 1, "three": 2}
    return [{**row, "label": number[row["label"]]} for row in table("classification", seed, rows)]


def clustered(seed: int) -> dict[str, Any]:
    rows = table("clustering", seed, 300)
    return {"sentences": [row["text"] for row in rows], "labels": [row["label"] for row in rows]}


DATA: dict[str, tuple[str, dict[str, dict[str, Rows]]]] = {
    "STS12": ("mteb/sts12-sts", {"default": {"test": table("sts", 1, 30)}}),
    "Banking77Classification": (
        "mteb/banking77",
        {"default": {"train": labelled(2, 60), "test": labelled(1, 30)}},
    ),
    # mteb takes 4 % of the texts, by draws of the task's own.
    "MedrxivClusteringS2S.v2": (
        "mteb/medrxiv-clustering-s2s",
        {"default": {"test": [clustered(part) for part in (3, 4)]}},
    ),
    "BUCC.v2": (
        "mteb/bucc-bitext-mining",
        {"default": {"test": [row for subset in PAIRS for row in bucc(subset)]}},
    ),
    "SciFact": (
        "mteb/scifact",
        {
            "corpus": {"test": CORPUS},
            "queries": {"test": QUERIES},
            "default": {"test": [{"query-id": q, "corpus-id": d, "score": s} for q, d, s in JUDGED]},
        },
    ),
}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    """Copies of data sets as the hub has them: a card with configurations, and their files."""
    folder = tmp_path_factory.mktemp("hub")
    for path, configurations in DATA.values():
        own = folder / path
        own.mkdir(parents=True)
        card = ["---", "configs:"]
        for name, splits in configurations.items():
            card += [f"- config_name: {name}", "  data_files:"]
            for split, rows in splits.items():
                card += [f"  - split: {split}", f"    path: {name}-{split}.jsonl"]
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (own / f"{name}-{split}.jsonl").write_text(text)
        (own / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """An empty one, for what datasets makes of the mirror and for what it does not find."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def mteb_scores(folder: Path, name: str, prompts: dict[str, str], loaded: Any = None) -> dict[str, Any]:
    """By mteb's own task and wrapper of sentence-transformers, or the model that mteb loaded, of rows in
    memory: {subset: scores}."""
    with mteb_imported():
        import mteb
        from datasets import Dataset, DatasetDict
        from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
        from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
        from sentence_transformers import SentenceTransformer

        task, (_, data) = mteb.get_task(name), DATA[name]
        if name == "SciFact":
            judged: dict[str, dict[str, int]] = {}
            for query, document, score in JUDGED:
                judged.setdefault(query, {})[document] = score
            split = RetrievalSplitData(
                corpus=Dataset.from_list(CORPUS),
                queries=Dataset.from_list(QUERIES),
                relevant_docs=judged,
                top_ranked=None,
            )
            task.dataset = {"default": {"test": split}}
        else:
            splits = {split: Dataset.from_list(rows) for split, rows in data["default"].items()}
            task.dataset = DatasetDict(splits)
            if name.startswith("Medrxiv"):
                task.dataset_transform()
            if name == "BUCC.v2":
                task.dataset = {
                    subset: DatasetDict({"test": Dataset.from_list(bucc(subset))}) for subset in PAIRS
                }
        task.data_loaded = True
        model = loaded
        if loaded is None:
            model = SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder), device="cpu"))
            model.model_prompts = prompts or model.model_prompts
        options = {"batch_size": 8, "show_progress_bar": False}
        return dict(task.evaluate(model, "test", encode_kwargs=options))


def run_many(models: list[Path | str], **options: Any) -> dict[str, dict[str, Any]]:
    return run(EvaluateConfig(models=[str(model) for model in models], device="cpu", **options))


def test_tasks_by_name_have_mtebs_own_scores_from_a_mirror(ours, static, mirror, tmp_path, capsys):
    """Of splits, subsets and tasks by a foreign folder, a search and pairs by ours; compared, and mteb's own
    tools read them."""
    typed = copied(
        static,
        tmp_path / "typed",
        "config_sentence_transformers.json",
        prompts={"query": "w1 ", "document": "", "STS": "w7 w8 ", "BUCC.v2": "w2 "},
    )
    results = tmp_path / "scores"
    options = {"mirror": str(mirror), "results": str(results)}
    tasks = {typed: list(DATA), ours: ["STS12", "SciFact"]}  # the others would be asked for the same again
    reports: dict[Path, dict[str, Any]] = {}
    for model, names in tasks.items():
        output = tmp_path / "reports" / model.name
        reports[model] = run_many([model], tasks=names, output=str(output), **options)
        assert list(reports[model]) == names
        for name, report in reports[model].items():
            written = json.loads((output / f"{name}.json").read_text())
            assert written == json.loads(json.dumps(report)) and list(report) == [str(model)]
            theirs, entry = mteb_scores(model, name, {}), report[str(model)]
            own = entry["scores"]["test"]
            expected = {subset: scores["main_score"] for subset, scores in theirs.items()}
            assert own == pytest.approx(expected, abs=1e-6) and 0 < min(own.values()) < 1, (name, model)
            main = entry["data"]["main_score"]
            assert entry[main] == pytest.approx(sum(expected.values()) / len(expected), abs=1e-6)
            assert entry["encoding"]["texts"] > 0 and entry["truncated"] == {"query": 0, "document": 0}
    prompts = {
        (model, name): report[str(model)]["prompts"]
        for model in tasks
        for name, report in reports[model].items()
    }
    assert prompts[typed, "STS12"] == {"query": "w7 w8 ", "document": "w7 w8 "}
    assert prompts[typed, "SciFact"] == {"query": "w1 ", "document": ""}
    assert prompts[ours, "STS12"] == {"query": "", "document": ""}
    said = capsys.readouterr().out
    assert said.count(str(typed)) == 2 and "mean of 5 tasks: " in said  # a heading, and its mean

    found = compare([str(tmp_path / "reports")], draws=1000, allow=["prompts", "lengths"])
    pair = found["pairs"][0]["tasks"]
    assert {name for name in pair if pair[name]["p"] is not None} == {"STS12", "SciFact"}
    assert found["tasks"]["BUCC.v2"]["type"] == "BitextMining"

    with mteb_imported():
        import mteb

        loaded = mteb.ResultCache(results).load_results(include_remote=False)
        assert {result.model_name for result in loaded.model_results} == {
            f"{model.parent.name}/{model.name}" for model in tasks
        }
        for result in loaded.model_results:
            model = next(m for m in tasks if f"{m.parent.name}/{m.name}" == result.model_name)
            assert result.model_revision == f"{reports[model]['STS12'][str(model)]['digest'][:12]}-fp32"
            assert {task.task_name for task in result.task_results} == set(tasks[model])
            for task in result.task_results:
                entry = reports[model][task.task_name][str(model)]
                assert task.get_score() == pytest.approx(entry[entry["data"]["main_score"]], abs=1e-6)
        table_ = loaded.to_dataframe()
        assert set(table_["task_name"]) == set(DATA)
        assert {f"{model.parent.name}/{model.name}" for model in tasks} <= set(table_.columns)


def test_instructions_are_those_of_the_published_model(ours, mirror):
    """By its own code in mteb, for every task of two benchmarks; then what a run does with them."""
    with mteb_imported():
        import mteb
        from mteb.models.model_implementations.nvidia_models import TASK_PROMPTS, LlamaEmbedNemotron
        from mteb.types import PromptType

        published = LlamaEmbedNemotron.__new__(LlamaEmbedNemotron)
        published.task_prompts = TASK_PROMPTS
        for name in ("MTEB(Multilingual, v2)", "NanoBEIR"):
            for task in mteb.get_benchmark(name).tasks:
                is_search = "Retrieval" in task.metadata.type or "Reranking" in task.metadata.type
                for side in ("query", "document") if is_search else (None,):
                    kind = PromptType(side) if side else None
                    theirs = published._get_task_specific_instruction(task.metadata, kind)
                    assert paper_instruction(task.metadata, side) == theirs, task.metadata.name
    names = ["STS12", "BUCC.v2", "SciFact"]
    reports = run_many([ours], tasks=names, mirror=str(mirror), instructions="paper")
    prompts = [reports[name][str(ours)]["prompts"] for name in names]
    assert prompts[0] == dict.fromkeys(
        ("query", "document"), "Instruct: Retrieve semantically similar text\nQuery: "
    )
    assert prompts[1]["document"] == "Instruct: Retrieve parallel sentences\nQuery: "
    assert prompts[2]["query"].startswith("Instruct: Given a ") and prompts[2]["document"] == ""
    assert reports["STS12"][str(ours)]["overridden"] == {"instructions": "paper"}
    theirs = mteb_scores(ours, "STS12", {"STS": prompts[0]["query"]})["default"]["main_score"]
    assert reports["STS12"][str(ours)]["scores"]["test"]["default"] == pytest.approx(theirs, abs=1e-6)


def test_a_model_of_instructions_has_the_papers_by_itself_and_others_do_not(ours, mirror, tmp_path):
    prompts = {"query": "Instruct: w1\nQuery: ", "document": ""}
    other = copied(ours, tmp_path / "other", "config_sentence_transformers.json", prompts=prompts)
    report = run_many([ours, other], tasks=["STS12"], mirror=str(mirror))["STS12"]
    assert report[str(ours)]["prompts"]["query"] == ""  # mteb takes none where there are only two sides
    assert report[str(other)]["prompts"]["query"] == "Instruct: Retrieve semantically similar text\nQuery: "
    own = run_many([other], tasks=["STS12"], mirror=str(mirror), instructions="own")["STS12"]
    assert own[str(other)]["prompts"]["query"] == ""
    said = run_many([other], tasks=["STS12"], mirror=str(mirror), task="w2")["STS12"]
    assert said[str(other)]["prompts"] == dict.fromkeys(("query", "document"), "Instruct: w2\nQuery: ")


FIELDS = {"license": "mit", "language": ["en", "de"], "base_model": "a/base"}


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("instructed", {"query": "Instruct: w1\nQuery: ", "document": ""}),
        ("plain", {"query": "w1 ", "document": "w3 w4 ", "STS12": "w7 "}),
    ],
)
def test_mteb_loads_an_export_by_its_meta_and_scores_as_we_do(
    ours, mirror, tmp_path, monkeypatch, name, prompts
):
    monkeypatch.chdir(tmp_path)  # where me/NAME is a folder, as it is a repository on the hub
    folder = copied(ours, tmp_path / "me" / name, "config_sentence_transformers.json", prompts=prompts)
    (folder / "model_meta.json").write_bytes(model_meta(folder, f"me/{name}", FIELDS))
    with mteb_imported():
        from mteb.models import ModelMeta

        meta = ModelMeta.model_validate_json_resolved((folder / "model_meta.json").read_bytes())
        loaded = meta.load_model(device="cpu")
    reports = run_many([folder], tasks=list(DATA), mirror=str(mirror))
    for task, report in reports.items():
        theirs = {
            subset: each["main_score"] for subset, each in mteb_scores(folder, task, {}, loaded).items()
        }
        assert report[str(folder)]["scores"]["test"] == pytest.approx(theirs, abs=1e-6), task
        assert 0 < min(theirs.values()) < 1


def test_the_meta_has_the_papers_prompts_for_every_task_and_the_facts_of_the_folder(ours, tmp_path, recwarn):
    """By the published model's own code in mteb."""
    prompts = {"query": "Instruct: w1\nQuery: ", "document": ""}
    folder = copied(ours, tmp_path / "model", "config_sentence_transformers.json", prompts=prompts)
    (folder / "LICENSE").write_text("ask")
    for fields in (FIELDS, {"license": "llama3.1", "datasets": ["mteb/scifact", "NFCorpus", "mine"]}):
        data = model_meta(folder, "me/model", fields)
        with mteb_imported():
            import mteb
            from mteb.models import ModelMeta
            from mteb.models.model_implementations.nvidia_models import TASK_PROMPTS, LlamaEmbedNemotron

            meta = ModelMeta.model_validate_json_resolved(data)
        sizes = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
        counts = (sum(sizes.values()), sizes["embed_tokens.weight"])
        assert (meta.n_parameters, meta.n_embedding_parameters) == counts
        assert (meta.embed_dim, meta.max_tokens, meta.use_instructions) == (32, 64, True)
        assert (meta.name, meta.similarity_fn_name, meta.output_dtypes) == ("me/model", "cosine", "float32")
        if fields is FIELDS:
            assert meta.languages == ["deu-Latn", "eng-Latn"] and meta.license == "mit"
            assert meta.adapted_from == "a/base" and meta.training_datasets is None
        else:
            assert meta.languages is None and meta.license.endswith("/me/model/blob/main/LICENSE")
            assert {"SciFact", "NFCorpus"} <= meta.training_datasets and "mine" not in meta.training_datasets
    with mteb_imported():
        from mteb.abstasks.aggregated_task import AbsTaskAggregate
        from mteb.types import PromptType

        published, stub = LlamaEmbedNemotron.__new__(LlamaEmbedNemotron), meta.loader.__new__(meta.loader)
        published.task_prompts = TASK_PROMPTS
        stub.instruction_template = meta.loader_kwargs["instruction_template"]
        stub.prompts_dict = meta.loader_kwargs["prompts_dict"]
        compared = 0
        for task in mteb.get_tasks(modalities=["text"], exclusive_modality_filter=True):
            if isinstance(task, AbsTaskAggregate):
                continue
            is_search = "Retrieval" in task.metadata.type or "Reranking" in task.metadata.type
            for side in (PromptType.query, PromptType.document) if is_search else (None,):
                theirs = published._get_task_specific_instruction(task.metadata, side)
                own = stub.get_task_instruction(task.metadata, side)
                assert own == published._instruction_template(theirs), (task.metadata.name, side)
                compared += 1
        assert compared > 1500


def test_scores_for_the_card_are_mtebs_own_and_of_these_weights(ours, beir, mirror, tmp_path):
    options = {
        "mirror": str(mirror),
        "output": str(tmp_path / "reports"),
        "results": str(tmp_path / "scores"),
    }
    local = LocalTask(name="words", data=str(beir))
    reports = run_many([ours], tasks=["STS12", "BUCC.v2", "words"], local=[local], **options)
    found = results_of(ours, [options["output"]])
    files = [file for name in ("STS12", "BUCC.v2") for file in (tmp_path / "scores").rglob(f"{name}.json")]
    with mteb_imported():
        from mteb.results import TaskResult

        theirs = [result for file in files for result in TaskResult.from_disk(file).get_hf_eval_results()]
    (own,) = (result for result in found if result.dataset_name == "words")
    found.remove(own)
    by_name = [
        [replace(r, metric_value=round(r.metric_value, 6)) for r in sorted(rs, key=lambda r: r.dataset_name)]
        for rs in (found, theirs)  # in files mteb rounds
    ]
    assert by_name[0] == by_name[1] and len(found) == 1 + len(PAIRS)
    assert (own.metric_type, own.metric_value) == ("ndcg_at_10", reports["words"][str(ours)]["ndcg_at_10"])
    assert (own.task_type, own.dataset_split) == ("text-retrieval", "test")
    with pytest.raises(UserError, match=r"none of .*/ours has the weights of .*evaluate that folder itself"):
        other = copied(ours, tmp_path / "other", "config.json", rms_norm_eps=0.25)
        results_of(other, [f"{options['output']}/STS12.json"])


def test_local_tasks_of_a_list_are_those_of_single_runs(launcher, ours, static, beir, tmp_path, monkeypatch):
    """One load of each model for all; prompts and lengths of the run, of the task, of the paper."""
    from nemo_embed_core.evaluation import models

    sts = write_table(tmp_path / "pairs", "sts")
    loaded: list[str] = []
    load = models.open_encoder
    monkeypatch.setattr(
        models, "open_encoder", lambda *a, **k: loaded.append(str(a[0].path)) or load(*a, **k)
    )
    local = [
        LocalTask(name="words", data=str(beir), max_queries=5, query_max_length=9),
        LocalTask(name="pairs", data=str(sts), task_type="sts"),
        LocalTask(name="unused", data=str(tmp_path / "nowhere"), task_type="sts"),
    ]
    options = {"seed": 3, "document_max_length": 5}
    results = tmp_path / "scores"
    reports = run_many([ours, static], tasks=["pairs", "words"], local=local, results=str(results), **options)
    assert list(reports) == ["pairs", "words"] and loaded.count(str(ours)) == 1
    for name, single in (
        ("words", {"data": str(beir), "max_queries": 5, "query_max_length": 9}),
        ("pairs", {"data": str(sts), "task_type": "sts"}),
    ):
        alone = launcher.run(tmp_path / f"{name}.json", models=[str(ours)], **single, **options)[str(ours)]
        entry = reports[name][str(ours)]
        main = entry["data"]["main_score"]
        same = (main, "prompts", "truncated", "overridden", "query_max_length", "document_max_length")
        assert {key: entry[key] for key in same} == {key: alone[key] for key in same}, name
    assert reports["words"][str(ours)]["query_max_length"] == 9
    paper = run_many([ours], local=local[1:2], instructions="paper")["pairs"][str(ours)]
    assert paper["prompts"]["query"] == "Instruct: Retrieve semantically similar text\nQuery: "
    with mteb_imported():
        import mteb

        loaded_results = mteb.ResultCache(results).load_results(include_remote=False)
        (mine,) = (r for r in loaded_results.model_results if r.model_name.endswith("/ours"))
        assert re.fullmatch(r"[0-9a-f]{12}-fp32-[0-9a-f]{8}", mine.model_revision), "options have a part"
        assert {r.task_name: r.get_score() for r in mine.task_results} == {
            name: pytest.approx(reports[name][str(ours)][main])
            for name, main in (("words", "ndcg_at_10"), ("pairs", "spearman"))
        }


def test_bm25_searches_and_reranks_mtebs_and_local_tasks(mirror, tmp_path):
    import math

    report = run_many(["bm25"], tasks=["SciFact"], mirror=str(mirror))["SciFact"]["bm25"]
    local = LocalTask(name="local", data=str(beir_of_scifact(tmp_path)), on_missing="allow")
    same = run_many(["bm25"], local=[local])["local"]["bm25"]
    assert report["ndcg_at_10"] == pytest.approx(same["ndcg_at_10"], abs=1e-6) and 0 < same["ndcg_at_10"] < 1
    rows = [
        {"query": "w1 w2", "positive": ["w1 w3"], "negative": ["w2 w1 w2", "w4 w5"]},
        {"query": "w9 w9", "positive": ["w9"], "negative": ["w1", "w2"]},
    ]
    data = tmp_path / "rerank.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = run_many(["bm25"], local=[LocalTask(name="r", data=str(data), task_type="reranking")])["r"][
        "bm25"
    ]
    # The first: its positive has one of two words, the first negative both.
    assert entry["map_at_1000"] == pytest.approx((1 / 2 + 1) / 2, abs=1e-5)
    assert entry["ndcg_at_10"] == pytest.approx((1 / math.log2(3) + 1) / 2, abs=1e-5)


def beir_of_scifact(folder: Path) -> Path:
    from toy_evaluation import write_beir

    corpus = [{"_id": row["id"], "title": row["title"], "text": row["text"]} for row in CORPUS]
    return write_beir(folder / "beir", corpus, [{"_id": q["id"], "text": q["text"]} for q in QUERIES], JUDGED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["NFCorpus"]}, r"1 of 1 tasks have no data in .*\nNFCorpus: mteb/nfcorpus at"),
        ({"tasks": ["SciFact", "NanoBEIR"]}, r"13 of 14 tasks .*\n.*\n.*\n.*\nand 10 more\nWhere"),
        ({"tasks": ["STS21"]}, r"tasks: 'STS21' is no task or benchmark of mteb.*did you mean 'STS\d\d"),
        ({"tasks": ["STS12"], "models": ["bm25"]}, "bm25 ranks documents for queries: STS12 has none"),
        ({"tasks": ["BUCC.v2", "MTEB(Europe, v1)"]}, "BUCC.v2 is asked for twice, .* of de-en, fr-en, ru-en"),
        ({"tasks": ["STS12"], "data": "x"}, "data is of one task: with tasks or local give it in its entry"),
        ({"tasks": ["STS12"], "output": "a.json"}, "output=a.json: each task, split and pool has a report"),
        ({"tasks": ["STS12"], "mirror": "nowhere"}, "mirror=nowhere is not a folder"),
    ],
)  # fmt: skip
def test_what_a_run_of_tasks_cannot_do_is_said_before_a_model_is_read(mirror, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(EvaluateConfig(**{"models": ["bm25"], "mirror": str(mirror), "device": "cpu", **options}))


def test_a_damaged_mirror_is_named(ours, mirror, tmp_path):
    (tmp_path / "part/mteb/bucc-bitext-mining").mkdir(parents=True)
    with pytest.raises(UserError, match=r"BUCC.v2: its data set .*bucc-bitext-mining cannot be read"):
        run_many([ours], tasks=["BUCC.v2"], mirror=str(tmp_path / "part"))


def test_entries_of_local_are_checked():
    with pytest.raises(UserError, match=r"local: two have the name 'a'"):
        EvaluateConfig(local=[LocalTask(name="a", data="x")] * 2)
    with pytest.raises(UserError, match=r"local.name='a b' must be of letters"):
        LocalTask(name="a b", data="x")
    with pytest.raises(UserError, match="local: a: data is missing"):
        LocalTask(name="a")
