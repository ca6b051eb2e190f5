"""A run as a whole: what is the model's own, what is known over all data sets, what is checked before
anything is encoded."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from tiny import count_readings, llama_tensors, write_tokenizer
from toy_mining import FakeEmbedder

from nemo_embed_core.checkpoint.source import Prompts, Source, Usage
from nemo_embed_core.config import DataConfig, DatasetConfig, MineConfig, MineDatasetConfig
from nemo_embed_core.data.dataset import read_metadata
from nemo_embed_core.data.prepare import write_datasets
from nemo_embed_core.data.readers import read_rows
from nemo_embed_core.errors import DataError, UserError
from nemo_embed_core.mine import run
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.inputs import read_all
from nemo_embed_core.mine.run import make_plan, mine
from nemo_embed_core.mine.teachers import using

SMALL = ("--query_max_length", "48", "--document_max_length", "48", "--method", "fp32")


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


def write(path: Path, *rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"neg": [], **row}) + "\n" for row in rows))
    return str(path)


def beir(folder: Path, corpus: dict, queries: dict, **qrels: list) -> str:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for split, judgements in qrels.items():
        lines = ["query-id\tcorpus-id\tscore\n", *("\t".join(map(str, one)) + "\n" for one in judgements)]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(lines))
    return str(folder)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def mined(tmp_path, monkeypatch, said=None, **options):
    """{data set: lines} of a run with a model that is no folder: `resolve` and the check of its tokenizer are
    set aside."""
    source = Source(Path("toy"), Path("toy"), "llama", options.pop("usage", Usage()))
    monkeypatch.setattr(run, "resolve", lambda path: source)
    monkeypatch.setattr(run, "check_source", lambda *arguments: None)
    (tmp_path / "toy").mkdir(parents=True, exist_ok=True)
    log = said.append if said is not None else lambda _: None
    planned = options.pop("planned", Ranks())
    config = MineConfig(
        model=str(tmp_path / "toy"), output=str(tmp_path / "out"), **{"dtype": "float32", **options}
    )
    plan = make_plan(config, log, planned)
    reports = mine(plan, Ranks(), "cpu", lambda source: FakeEmbedder(), log)
    outputs = {name: lines_of(plan.output(name)) for name in reports}
    return outputs, reports


# ------------------------------------------------------------------------------------------ the model's own

TRAINED = Usage(
    prompts={
        "nq": Prompts("Instruct: answer\nQuery: "),
        "banking": Prompts("Instruct: intent\nQuery: ", "Text: "),
    },
    query_max_length=64,
    document_max_length=256,
)


def source(kind="checkpoint", usage=TRAINED, path="model"):
    return Source(Path(path), Path(path), kind, usage)


def used(source, name="nq", dataset=None, **options):
    said: list[str] = []
    config = MineConfig(model="model", data=f"{name}.jsonl", output="o", **options)
    return using(source, name, dataset or MineDatasetConfig(path="x"), config, said.append), said


def test_a_models_own_prompts_and_lengths_are_used_by_name_of_the_task_and_said():
    nq, said = used(source())
    assert (nq["prompt"], nq["document_prompt"]) == ("Instruct: answer\nQuery: ", "")
    assert (nq["query_max_length"], nq["document_max_length"], nq["similarity"]) == (64, 256, "cosine")
    assert (
        "'Instruct: answer\\nQuery: '" in said[0]
        and "64 tokens (the model's)" in said[0]
        and "of nq" in said[0]
    )
    banking, _ = used(source(), "banking")
    assert (banking["prompt"], banking["document_prompt"]) == ("Instruct: intent\nQuery: ", "Text: ")
    other, said = used(source(), "scifact")
    assert other["prompt"] == nq["prompt"] and "of nq, scifact is no task of the model's" in said[0]
    nothing, said = used(source("llama", Usage()))
    assert (nothing["prompt"], nothing["query_max_length"]) == ("", 512) and "none known" in said[0]


@pytest.mark.parametrize("kind", ["checkpoint", "llama", "sentence-transformers"])
def test_options_override_what_is_the_models_own_whatever_it_is_and_say_so(kind):
    given = MineDatasetConfig(path="x", task="find", document_task="")
    options = {"query_max_length": 32, "document_max_length": 128}
    got, said = used(source(kind), "banking", given, **options)
    assert got["prompt"] == "Instruct: find\nQuery: " and got["document_prompt"] == ""
    assert (got["query_max_length"], got["document_max_length"]) == (32, 128)
    assert "(task in place of its own 'Instruct: intent\\nQuery: '), 32 tokens (option)" in said[0]
    assert "(document_task in place of its own 'Text: ')" in said[1]
    # A folder without prompts: the task was dropped here once.
    got, said = used(source(kind, Usage()), "x", given)
    assert got["prompt"] == "Instruct: find\nQuery: " and "(task)" in said[0]


def test_a_foreign_folder_is_cut_at_its_own_limit_where_an_option_asks_for_more():
    usage = Usage(query_max_length=48, document_max_length=48)
    got, said = used(source("sentence-transformers", usage), query_max_length=64, document_max_length=32)
    assert (got["query_max_length"], got["document_max_length"]) == (48, 32)
    assert "48 tokens (the folder's limit, below query_max_length=64)" in said[0]


def test_similarity_is_the_folders_and_what_has_no_ceiling_is_refused_with_what_to_do(tmp_path):
    assert used(source("sentence-transformers", Usage(similarity="dot")))[0]["similarity"] == "dot"
    assert (
        used(source("sentence-transformers", Usage(similarity="dot")), similarity="cosine")[0]["similarity"]
        == "cosine"
    )
    for similarity in ("euclidean", "manhattan"):
        with pytest.raises(UserError, match=rf"compares by {similarity}: .*--similarity cosine"):
            used(source("sentence-transformers", Usage(similarity=similarity)))
        assert (
            used(source("llama", Usage(similarity=similarity)), similarity="cosine")[0]["similarity"]
            == "cosine"
        )
    # Our encoder of Llama folders normalises; a folder whose own modules do not would be mined by something
    # else.
    (tmp_path / "modules.json").write_text('[{"type": "Transformer"}, {"type": "Pooling"}]')
    with pytest.raises(UserError, match=r"not normalised.*--similarity cosine"):
        used(source("llama", Usage(similarity="dot"), str(tmp_path)))
    (tmp_path / "modules.json").write_text(
        '[{"type": "Transformer"}, {"type": "Pooling"}, {"type": "Normalize"}]'
    )
    assert used(source("llama", Usage(similarity="dot"), str(tmp_path)))[0]["similarity"] == "dot"


def test_a_checkpoint_is_mined_with_the_instruction_and_lengths_that_it_was_trained_with(miner, tmp_path):
    data = [{"path": miner.data, "task": "find it", "document_task": "a text"}]
    shape = [a for a in miner.shape if a.startswith("--model.")]
    made = miner.server.launch(
        ["launch/train.py", "--output_dir", str(tmp_path / "run"), "--tokenizer",
        str(miner.folder / "tokenizer"),
         "--steps", "0", "--device", "cpu", "--global_batch_size", "8", "--data.datasets", json.dumps(data),
         "--data.query_max_length", "40", "--data.document_max_length", "56", *shape]
    )  # fmt: skip
    assert made.code == 0, made.output
    options = ("--data", miner.data, "--model", str(tmp_path / "run"), "--method", "fp32")
    result = miner(*options, "--output", str(tmp_path / "own.jsonl"))
    assert result.code == 0, result.output
    report = json.loads((tmp_path / "own.jsonl.report.json").read_text())
    assert report["models"][0]["prompt"] == "Instruct: find it\nQuery: "
    assert report["models"][0]["document_prompt"] == "Instruct: a text\nQuery: "
    assert (report["query_max_length"], report["document_max_length"]) == (40, 56)
    same = (
        "--task",
        "find it",
        "--document_task",
        "a text",
        "--query_max_length",
        "40",
        "--document_max_length",
        "56",
    )
    other = miner(*options, *same, "--output", str(tmp_path / "same.jsonl"))
    assert other.code == 0 and (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()
    refused = miner(*options, "--output", str(tmp_path / "no.jsonl"), "--query_max_length", "8")
    assert refused.code == 2 and "query_max_length=8 tokens leaves no room for text" in refused.output
    assert not list(tmp_path.glob("no.jsonl*")), "nothing was encoded"


# ------------------------------------------------------------------------------------- one run, one knowledge


def test_what_another_data_set_of_the_run_judges_relevant_is_never_a_negative(tmp_path, monkeypatch):
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(12)]
    a = write(tmp_path / "a.jsonl", {"query": "w1 w2 w3 w4", "pos": [texts[1]], "neg": texts[2:9]})
    b = write(tmp_path / "b.jsonl", {"query": "  W1 w2 W3 w4?", "pos": [texts[2], texts[3].upper()]})
    options = {"threshold": 1.9, "num_negatives": 12}
    outputs, _ = mined(
        tmp_path, monkeypatch, datasets=[MineDatasetConfig(path=a), MineDatasetConfig(path=b)], **options
    )
    assert not {texts[2], texts[3]} & set(outputs["a"][0]["neg"]) and len(outputs["a"][0]["neg"]) == 5
    shutil.rmtree(tmp_path / "out")
    alone, _ = mined(tmp_path, monkeypatch, data=a, **options)
    assert {texts[2], texts[3]} <= set(alone["a"][0]["neg"]), "nobody else says so"


def test_documents_that_only_another_split_judges_are_counted_known_for_its_queries_and_left_out_when_asked(
    tmp_path, monkeypatch
):
    corpus = {f"d{i}": f"w{i} w{i + 1} w{i + 2}" for i in range(10)}
    queries = {"q0": "w0 w1 w2 w3", "q1": "w1 w2 w5"}
    folder = beir(
        tmp_path / "nq", corpus, queries, train=[("q0", "d0", 1), ("q0", "d5", 0)],
        test=[("q0", "d1", 1), ("q1", "d2", 1), ("q1", "d3", 1)],
    )  # fmt: skip
    said: list[str] = []
    options = {"data": folder, "threshold": 1.9, "num_negatives": 10}
    outputs, reports = mined(tmp_path, monkeypatch, said, **options)
    (line,) = outputs["nq"]
    assert line["id"] == "q0" and line["pos_ids"] == ["d0"]
    assert line["neg_ids"] == [f"d{[*corpus.values()].index(text)}" for text in line["neg"]]
    assert "d1" not in line["neg_ids"] and {"d2", "d3"} <= set(line["neg_ids"])
    assert any(
        f"3 documents are relevant in split test only: searched too; --exclude {folder}:test" in one
        for one in said
    )
    given = reports["nq"]["given_negatives"]
    assert given == {
        "given": 1, "mined_again": 1, "at_or_above_the_ceiling": 0, "known_to_be_relevant": 0, "kept": False,
    }  # fmt: skip
    other = write(tmp_path / "more.jsonl")
    Path(other).write_text(json.dumps({"text": corpus["d7"].upper() + "."}) + "\n")
    (tmp_path / "out").unlink(), shutil.rmtree(tmp_path / "out.work")
    outputs, reports = mined(tmp_path, monkeypatch, said, exclude=[f"{folder}:test", other], **options)
    assert set(outputs["nq"][0]["neg_ids"]) == {"d4", "d5", "d6", "d8", "d9"}
    assert reports["nq"]["documents_excluded"] == 4 and reports["nq"]["positives_excluded"] == 0
    assert any("3 documents are relevant in split test only: not searched" in one for one in said)
    with pytest.raises(UserError, match=rf"exclude {folder} is a folder: add the split"):
        mined(tmp_path, monkeypatch, exclude=[folder], **options)


def test_a_positive_that_is_excluded_keeps_its_ceiling_and_is_counted(tmp_path, monkeypatch):
    data = write(
        tmp_path / "a.jsonl", {"query": "w1 w2", "pos": ["w1 w2 w3"], "neg": ["w1 w7", "w8 w9", "w2 w9"]}
    )
    (tmp_path / "held.jsonl").write_text('{"text": "W1 w2 w3."}\n{"text": "w8 w9"}\n')
    outputs, reports = mined(tmp_path, monkeypatch, data=data, exclude=[str(tmp_path / "held.jsonl")])
    assert outputs["a"][0]["pos"] == ["w1 w2 w3"] and set(outputs["a"][0]["neg"]) == {"w1 w7", "w2 w9"}
    assert reports["a"]["positives_excluded"] == 1


def test_the_corpus_can_be_the_only_pool(tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", {"query": "w1 w2", "pos": ["w1 w2 w3"], "neg": ["w1 w7"]})
    corpus = tmp_path / "c.jsonl"
    lines = [{"_id": f"c{i}", "text": f"w{i} w9"} for i in range(4)] + [
        {"text": "W1 W2 W3"},
        {"text": "\u200b"},
    ]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"data": data, "corpus": str(corpus), "threshold": 1.9, "num_negatives": 9}
    outputs, reports = mined(tmp_path, monkeypatch, pool="corpus", **options)
    assert sorted(outputs["a"][0]["neg"]) == [f"w{i} w9" for i in range(4)] and reports["a"]["documents"] == 5
    assert sorted(outputs["a"][0]["neg_ids"]) == [f"c{i}" for i in range(4)]
    assert reports["a"]["documents_without_content"] == 1
    (tmp_path / "out").unlink(), shutil.rmtree(tmp_path / "out.work")
    both, _ = mined(tmp_path, monkeypatch, **options)
    assert "w1 w7" in both["a"][0]["neg"]
    with pytest.raises(UserError, match="--pool corpus searches nothing but --corpus"):
        MineConfig(model="m", data="d", output="o", pool="corpus")


# --------------------------------------------------------------------------------- before anything is encoded


def test_every_file_is_read_before_the_first_is_mined_and_all_bad_lines_are_named(tmp_path, monkeypatch):
    good = write(tmp_path / "good.jsonl", {"query": "q", "pos": ["p"]})
    bad = [tmp_path / "b1.jsonl", tmp_path / "b2.jsonl"]
    for path in bad:
        path.write_text('{"query": "a", "pos": ["b"], "neg": []}\n{"query": "a"}\n{\n')
    datasets = [MineDatasetConfig(path=path) for path in (good, *map(str, bad))]
    with pytest.raises(DataError) as error:
        mined(tmp_path, monkeypatch, datasets=datasets)
    for path in bad:
        assert f"{path}:2: " in str(error.value) and f"{path}:3: " in str(error.value)
    assert "4 bad lines in all" in str(error.value) and not (tmp_path / "out").exists()
    missing = [str(tmp_path / f"{name}.jsonl") for name in ("nowhere", "no-corpus", "no-exclude")]
    datasets = [MineDatasetConfig(path=missing[0]), *datasets]
    with pytest.raises(UserError) as error:
        mined(tmp_path, monkeypatch, datasets=datasets, corpus=missing[1], exclude=missing[2:])
    said = str(error.value)
    assert all(f"{path} does not exist" in said for path in missing), "and the others' bad lines with them"
    assert all(f"{path}:3: " in said for path in bad) and "4 bad lines in all" in said
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_and_a_causal_model_are_said_before_anything_is_encoded(tmp_path, capsys):
    model = {
        "model_type": "llama", "architectures": ["LlamaModel"], "vocab_size": 512, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    folder = write_tokenizer(tmp_path / "llama")
    (folder / "config.json").write_text(json.dumps(model))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in llama_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors")
    data = write(tmp_path / "a.jsonl", {"query": "alpha", "pos": ["beta"]})
    config = MineConfig(model=[str(folder)], data=data, output=str(tmp_path / "out"))
    make_plan(config, lambda _: None)
    assert f"note: {folder}: config.json does not say is_causal: false" in capsys.readouterr().out
    (folder / "config.json").write_text(json.dumps({**model, "vocab_size": 300}))
    embedding = next(name for name in tensors if "embed_tokens" in name)
    save_file({**tensors, embedding: tensors[embedding][:300]}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"300"):
        make_plan(config, lambda _: None)
    save_file({name: x for name, x in tensors.items() if "norm" not in name}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"norm"):
        make_plan(config, lambda _: None)


def test_one_model_is_in_memory_at_a_time(tmp_path, monkeypatch):
    alive: list[weakref.ref] = []

    def load(source):
        assert not any(model() for model in alive), "the one before is gone"
        encoder = FakeEmbedder(digest=str(source.path))
        alive.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(run, "resolve", lambda path: Source(Path(path), Path(path), "llama", Usage()))
    monkeypatch.setattr(run, "check_source", lambda *arguments: None)
    data = write(tmp_path / "a.jsonl", {"query": "w1", "pos": ["w1 w2"], "neg": ["w1 w3", "w4 w5"]})
    models = [str(tmp_path / name) for name in ("m1", "m2", "m3")]
    for model in models:
        Path(model).mkdir()
    config = MineConfig(model=models, data=data, output=str(tmp_path / "out"))
    mine(make_plan(config, lambda _: None), Ranks(), "cpu", load, lambda _: None)
    assert len(alive) == 3


def test_embeddings_that_do_not_fit_the_disk_are_refused_before_they_are_made(tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", {"query": "q", "pos": ["p"], "neg": [f"n{i}" for i in range(98)]})
    monkeypatch.setattr(run, "_hidden_size", lambda source: 1 << 20)  # 100 x 4 MiB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 399 << 20))
    with pytest.raises(UserError, match=r"embeddings take 0\.4 GiB and .* 0\.4 GiB free"):
        mined(tmp_path, monkeypatch, data=data)
    assert not (tmp_path / "out.work").exists()
    # And 286 bytes of texts of the rows and 4 of --corpus, on each rank.
    (tmp_path / "pool.jsonl").write_text('{"text": "more"}\n')
    options = {"data": data, "corpus": str(tmp_path / "pool.jsonl"), "planned": Ranks(0, 3)}
    for room, is_enough in ((3 * 290 - 1, False), (3 * 290, True)):
        free = (404 << 20) + room
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, free))  # noqa: B023
        with nullcontext() if is_enough else pytest.raises(UserError, match="embeddings take"):
            mined(tmp_path, monkeypatch, **options)


def test_mining_puts_no_texts_into_the_folder_for_temporary_files(tmp_path, monkeypatch):
    """Of a BEIR folder with other splits, --corpus and --exclude; room is asked for its corpus twice."""
    texts = {f"d{i}": f"w{i} w{i + 1} w{i * 3 % 7}" for i in range(12)}
    queries = {f"q{i}": f"w{i}" for i in range(6)}
    one, other = ([[f"q{i}", f"d{i + j}", 1] for i in range(a, b)] for a, b, j in ((0, 4, 0), (2, 6, 1)))
    data = beir(tmp_path / "nq", texts, queries, train=one, dev=other, test=other[1:])
    pool = write(tmp_path / "pool.jsonl", {"text": "w1 w2 w7"}, {"text": "w3 w0"})
    options = {"data": data, "corpus": pool, "exclude": [f"{data}:dev", f"{data}:test"]}
    readings = count_readings(monkeypatch)
    calm = mined(tmp_path / "calm", monkeypatch, **options)
    assert readings["corpus.jsonl"] == 5, "excluded, rows checked, all splits; rows mined, documents"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert mined(tmp_path / "none", monkeypatch, **options) == calm
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = MineConfig(model=str(tmp_path), output=str(tmp_path / "out"), **options)
    room = read_all(config, run.named_datasets(config), lambda _: None, Ranks()).num_bytes
    assert room == 2 * (len("".join(texts.values())) + 2 * (4 + 4 + 3)) + 13


# ------------------------------------------------------------------------------------------ a dataset folder


def test_a_dataset_folder_is_mined_into_one_that_shares_its_corpus(tmp_path, monkeypatch):
    """The rows are those that JSON lines have; no text of the corpus is written again."""
    rows = [
        {"id": f"r{i}", "query": f"w{i} w{i + 1}", "pos": [f"w{i} w{i + 1} w{i + 2}"], "neg": [f"w{i} w9"]}
        for i in range(6)
    ]
    config = DataConfig(datasets=[DatasetConfig(path=write(tmp_path / "rows.jsonl", *rows), task="Find")])
    data = write_datasets(config, tmp_path / "data", lambda message: None).datasets[0].path
    pool = write(tmp_path / "pool.jsonl", {"text": "w1 w2 w7"}, {"text": "W1 w2 w7."})
    options = {"data": data, "corpus": pool, "num_negatives": 3, "formats": ["automodel"]}
    (lines,) = mined(tmp_path / "a", monkeypatch, **options)[0].values()
    (tmp_path / "b").mkdir()
    output = tmp_path / "b" / "out"
    model, options["output_format"] = str(tmp_path / "a" / "toy"), "dataset"
    config = MineConfig(model=model, output=str(output), dtype="float32", **options)
    mine(make_plan(config, lambda _: None), Ranks(), "cpu", lambda source: FakeEmbedder(), lambda _: None)
    assert any("w1 w2 w7" in line["neg"] for line in lines)
    found = list(read_rows(DatasetConfig(path=str(output))))
    as_lines = [(r.id, r.query, r.pos, r.neg, list(r.pos_scores), list(r.neg_scores)) for r in found]
    names = ("id", "query", "pos", "neg", "pos_scores", "neg_scores")
    assert as_lines == [tuple(line[name] for name in names) for line in lines]
    shared, new = sorted(output.glob("corpus-*"))
    assert shared.samefile(Path(data) / "corpus.parquet")
    assert [entry["text"] for entry in pq.read_table(new).to_pylist()] == ["w1 w2 w7"]
    assert read_metadata(output).query_instruction == "Instruct: Find\nQuery:"
    assert Path(f"{output}.automodel.json").is_file()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        make_plan(config, lambda _: None)


def test_rows_are_mined_into_a_dataset_folder_of_their_own(tmp_path, monkeypatch):
    data = write(tmp_path / "rows.jsonl", *({"query": f"w{i}", "pos": [f"w{i} w{i + 1}"]} for i in range(6)))
    (lines,) = mined(tmp_path / "a", monkeypatch, data=data, num_negatives=2)[0].values()
    config = MineConfig(
        model=str(tmp_path / "a" / "toy"), output=str(tmp_path / "out"), output_format="dataset", data=data,
        num_negatives=2, dtype="float32",
    )  # fmt: skip
    mine(make_plan(config, lambda _: None), Ranks(), "cpu", lambda source: FakeEmbedder(), lambda _: None)
    rows = [(row.query, row.pos, row.neg) for row in read_rows(DatasetConfig(path=str(tmp_path / "out")))]
    assert rows == [(line["query"], line["pos"], line["neg"]) for line in lines]
    own = write(tmp_path / "own.jsonl", {"query": "w", "pos": ["w w"], "prompt": "Mine"})
    with pytest.raises(UserError, match=r"own.jsonl:1: the row has an instruction of its own"):
        make_plan(replace(config, data=own, output=str(tmp_path / "other")), lambda _: None)


@pytest.mark.parametrize("kind", ["data", "one of several", "a link", "corpus", "exclude", "texts of BEIR"])
def test_a_file_that_is_read_is_never_written_over(kind, tmp_path, monkeypatch):
    row = {"query": "w1 w2", "pos": ["w1 w2 w3"], "neg": ["w1 w7", "w5 w6"]}
    data, other = write(tmp_path / "out", row), write(tmp_path / "in" / "b.jsonl", row)
    (tmp_path / "texts.jsonl").write_text('{"text": "w1 w9"}\n')
    options = {"data": data}
    if kind == "one of several":  # out/b.jsonl is what one of them is written to
        (tmp_path / "out").unlink()
        data = write(tmp_path / "out" / "b.jsonl", row)
        more = write(tmp_path / "in" / "c.jsonl", row)
        options = {"datasets": [MineDatasetConfig(path=data), MineDatasetConfig(path=more)]}
    elif kind == "a link":
        (tmp_path / "link.jsonl").symlink_to(data)
        options = {"data": str(tmp_path / "link.jsonl")}
    elif kind in ("corpus", "exclude"):
        data = str((tmp_path / "texts.jsonl").rename(tmp_path / "out"))
        options = {"data": other, kind: data if kind == "corpus" else [data]}
    if kind == "texts of BEIR":
        folder = beir(tmp_path / "nq", {"d0": "w0 w1"}, {"q0": "w0"}, train=[("q0", "d0", 1)])
        data = f"{folder}/queries.jsonl"
        config = MineConfig(data=folder, write_texts=folder)
    before = Path(data).read_bytes()
    with pytest.raises(UserError, match=rf"^{data} is read.*: choose another name"):
        if kind == "texts of BEIR":
            run.write_texts(config)
        else:
            mined(tmp_path, monkeypatch, **options)
    assert Path(data).read_bytes() == before and not list(tmp_path.glob("out*.work"))
