"""Any source written as a dataset folder trains as the source does, in the same bytes each time; a document
is written once for each normal form; a folder's corpus is shared without a second copy."""

import gzip
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_release import RELEASE, write_release

from nemo_embed_core.config import DataConfig, DatasetConfig, PrepareConfig
from nemo_embed_core.data import dataset_writer
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.dataset import Metadata, read_metadata
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.inspect import inspect
from nemo_embed_core.data.prepare import check_datasets, write_datasets
from nemo_embed_core.data.readers import Findings, Row, read_beir, read_rows
from nemo_embed_core.data.store import ARRAY_FILES, TOKEN_FILES
from nemo_embed_core.errors import UserError

ROWS = [
    {"query": f"query {i}", "pos": [f"Positive {i % 7}.", f"more {i}"],
     "neg": [f"negative {j} of {i % 5}" for j in range(i % 4)],
     "lang": "de" if i % 2 else "", "neg_scores": [0.1 * j for j in range(i % 4)], "group": i % 3}
    for i in range(40)
]  # fmt: skip


def source(path: Path, rows=ROWS) -> DatasetConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetConfig(path=str(path), task="Find", document_task="Read")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def silent(message: str) -> None:
    pass


def test_a_folder_trains_as_its_source(tmp_path, tokenizer):
    """Rows, tokens, positives and negatives in order: all that losses and draws are made of."""
    config = DataConfig(datasets=[source(tmp_path / "rows.jsonl")], cache_dir=str(tmp_path / "cache"))
    folders = write_datasets(config, tmp_path / "out", silent)
    (before, after) = (open_store(one, tokenizer, silent) for one in (config, folders))
    assert before.digest != after.digest
    for name in (*TOKEN_FILES, *ARRAY_FILES):
        assert (before.folder / name).read_bytes() == (after.folder / name).read_bytes(), name
    assert before.manifest["noise"].keys() == after.manifest["noise"].keys()
    fields = [(r.lang, r.group, list(r.neg_scores)) for r in read_rows(folders.datasets[0])]
    assert fields == [(r.lang, r.group, list(r.neg_scores)) for r in read_rows(config.datasets[0])]


def test_a_beir_folder_keeps_ids_and_the_whole_corpus(tmp_path, tokenizer):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": f"T{i}", "text": f"text {i}"} for i in range(6)]
    queries = [{"_id": f"q{i}", "text": f"what is {i}"} for i in range(3)]
    for name, lines in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td4\t1\nq0\td1\t1\nq0\td2\t0\n")
    config = DataConfig(datasets=[DatasetConfig(path=str(folder))], cache_dir=str(tmp_path / "cache"))
    folders = write_datasets(config, tmp_path / "out", silent)
    assert dict(read_beir(DatasetConfig(path=str(tmp_path / "out"), split="train")).corpus) == dict(
        read_beir(DatasetConfig(path=str(folder), split="train")).corpus
    )
    rows = [(row.id, list(row.pos_ids), list(row.neg_ids)) for row in read_rows(folders.datasets[0])]
    assert rows == [("q2", ["d4"], []), ("q0", ["d1"], ["d2"])]
    (before, after) = (open_store(one, tokenizer, silent) for one in (config, folders))
    assert (before.folder / "document_tokens.bin").read_bytes() == (
        after.folder / "document_tokens.bin"
    ).read_bytes()


def test_nothing_stands_in_the_folder_for_temporary_files(tmp_path, tokenizer, monkeypatch):
    """Of a corpus, of rows that are left out, of a folder of ids and its source, and looked at."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        lines = [json.dumps({"_id": f"{i}", "text": f"{name} {i}"}) + "\n" for i in range(30)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    judged = "".join(f"{i}\t{i}\t1\n" for i in range(30))
    (folder / "qrels/train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    (tmp_path / "qrels").mkdir()
    write_release(tmp_path)
    ids = DatasetConfig(path=str(tmp_path / RELEASE / "GooAQ"), source=str(tmp_path / "data/sources/GooAQ"))
    datasets, shown = [DatasetConfig(path=str(folder)), source(tmp_path / "rows.jsonl"), ids], []
    for name, temporary in (("calm", tmp_path), ("none", tmp_path / "absent")):
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        config = DataConfig(datasets=datasets, cache_dir=str(tmp_path / name / "cache"), on_bad="drop")
        check_datasets(config, tokenizer, silent)
        folders = write_datasets(config, tmp_path / name / "out", silent).datasets
        store = open_store(config, tokenizer, silent)
        found = inspect(config, tokenizer, store, [f"{folder}:train"], silent)
        shown.append((store.digest, found, [content(Path(one.path)) for one in folders]))
    assert shown[0] == shown[1]


def test_several_sources_are_a_folder_each_and_the_same_bytes_again(tmp_path):
    (tmp_path / "b").mkdir()
    datasets = [source(tmp_path / "rows.jsonl"), source(tmp_path / "b/rows.jsonl", ROWS[:5])]
    config = DataConfig(datasets=datasets)
    names = [Path(d.path).name for d in write_datasets(config, tmp_path / "one", silent).datasets]
    assert names == ["rows", "rows-2"]
    write_datasets(config, tmp_path / "two", silent)
    for name in names:
        assert content(tmp_path / "one" / name) == content(tmp_path / "two" / name)
    said: list[str] = []
    write_datasets(config, tmp_path / "one", said.append)
    assert said == [f"{tmp_path}/one/{name} is there, made of the same sources" for name in names]
    source(tmp_path / "b/rows.jsonl", ROWS[:6])
    with pytest.raises(UserError, match="rows-2 exists and is not empty"):
        write_datasets(config, tmp_path / "one", silent)


def row(query: str, pos: list[str], neg: list[str], **fields) -> Row:
    return Row(query, pos, neg, "rows", 1, **fields)


def test_a_document_is_written_once_for_each_normal_form(tmp_path):
    rows = [
        row("a", ["The Moon"], ["the moon.", "Mars"], pos_ids=["m1"], neg_ids=["m2", "m3"]),
        row("b", ["mars"], ["The Moon", "Venus"], neg_ids=["m9", "m3"]),
    ]
    counts = write_dataset(
        tmp_path / "out", rows, Metadata(corpus_id="sky"), [("x", "Pluto"), ("", "VENUS!")]
    )
    assert counts == {
        "queries": 2, "documents": 4, "variants": 3, "renamed": 1, "negatives_left_out": 1
    }  # fmt: skip
    corpus = pq.read_table(tmp_path / "out" / "corpus.parquet").to_pylist()
    assert [entry["text"] for entry in corpus] == ["The Moon", "Mars", "Venus", "Pluto"]
    assert [entry["id"] for entry in corpus][:2] == ["m1", "m3"] and corpus[3]["id"] == "x"
    first, second = read_rows(DatasetConfig(path=str(tmp_path / "out")))
    assert (first.pos, first.neg) == (["The Moon"], ["Mars"])
    assert (second.pos, second.neg) == (["Mars"], ["The Moon", "Venus"])


def test_shards_and_row_groups_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_writer, "ROWS_PER_GROUP", 3)
    monkeypatch.setattr(dataset_writer, "BYTES_PER_SHARD", 60)
    rows = [row(f"q{i}", [f"document number {i}"], []) for i in range(20)]
    write_dataset(tmp_path / "out", rows, Metadata(corpus_id="c"))
    files = sorted((tmp_path / "out").glob("corpus-*"))
    assert len(files) == 4 and files[0].name == "corpus-00000-of-00004.parquet"
    groups = [pq.ParquetFile(file).metadata for file in files]
    assert max(meta.row_group(i).num_rows for meta in groups for i in range(meta.num_row_groups)) == 3
    assert {meta.row_group(0).column(0).compression for meta in groups} == {"ZSTD"}
    assert [r.query for r in read_rows(DatasetConfig(path=str(tmp_path / "out")))] == [r.query for r in rows]


def test_a_shared_corpus_is_the_same_file_and_new_documents_a_shard(tmp_path):
    base = tmp_path / "base"
    write_dataset(base, [row("q", ["one"], ["two"], pos_ids=["d1"], neg_ids=["d2"])], Metadata(corpus_id="c"))
    rows = [row("q", ["one"], ["two", "three"], pos_ids=["d1"], neg_ids=["d2", "d1"], neg_scores=[0.5, 0.25])]
    write_dataset(tmp_path / "mined", rows, read_metadata(base), shared=base)
    parts = sorted((tmp_path / "mined").glob("corpus-*"))
    assert os.path.samefile(parts[0], base / "corpus.parquet") and len(parts) == 2
    (new,) = pq.read_table(parts[1]).to_pylist()
    assert new["text"] == "three" and new["id"] not in ("d1", "d2")
    (mined,) = read_rows(DatasetConfig(path=str(tmp_path / "mined")))
    assert mined.neg == ["two", "three"] and mined.neg_scores == [0.5, 0.25] and list(mined.pos_ids) == ["d1"]
    same = [replace_neg(rows[0])]
    write_dataset(tmp_path / "again", same, read_metadata(base), shared=base)
    assert os.path.samefile(tmp_path / "again" / "corpus.parquet", base / "corpus.parquet")


def replace_neg(one: Row) -> Row:
    return one._replace(neg=["two"], neg_ids=["d2"], neg_scores=[0.5])


def test_what_is_written_is_read_back_with_odd_ids_and_languages(tmp_path):
    """Ids of some rows, one of them the name that the row behind it would get; any string is a language."""
    rows = [dict(ROWS[i], lang=lang) for i, lang in enumerate([" de", "pt BR", "", "zh\t"])]
    rows[0]["id"], rows[2]["id"] = "q1", "x y"
    config = DataConfig(datasets=[source(tmp_path / "rows.jsonl", rows)])
    folders = write_datasets(config, tmp_path / "out", silent)
    check_datasets(folders, log=silent)
    got = list(read_rows(folders.datasets[0]))
    assert [one.lang for one in got] == [" de", "pt BR", "", "zh\t"]
    assert [one.query for one in got] == [one["query"] for one in rows]
    ids = [one.id for one in got]
    assert ids[0] == "q1" and ids[2] == "x y" and len(set(ids)) == 4
    again = [dict(ROWS[0]), dict(ROWS[1], id="q0")]
    config = DataConfig(datasets=[source(tmp_path / "other.jsonl", again)])
    with pytest.raises(UserError, match=r"other.jsonl:2: id 'q0' is the id of another row, maybe"):
        write_datasets(config, tmp_path / "other", silent)


def test_what_a_folder_cannot_hold_is_refused(tmp_path):
    rows = [dict(ROWS[0], prompt="A"), dict(ROWS[1], prompt="B")]
    config = DataConfig(datasets=[source(tmp_path / "rows.jsonl", rows)])
    with pytest.raises(
        UserError, match=r"rows.jsonl:2: the instruction 'Instruct: B.* is not that of the first"
    ):
        write_datasets(config, tmp_path / "out", silent)
    whole = replace(source(tmp_path / "rows.jsonl"), task="query:{text}")
    with pytest.raises(UserError, match=r"'query:' does not end in a space"):
        write_datasets(DataConfig(datasets=[whole]), tmp_path / "out", silent)
    inside = DataConfig(datasets=[replace(whole, task="find {text} in it")])
    for call in (lambda: write_datasets(inside, tmp_path / "out", silent), lambda: check_datasets(inside)):
        with pytest.raises(UserError, match=r"task 'find \{text\} in it': \{text\} has to be its end"):
            call()
    with pytest.raises(UserError, match="give --tokenizer FOLDER"):
        PrepareConfig()
    assert not (tmp_path / "out").exists()


def test_a_file_that_changed_since_is_refused(tmp_path):
    write_dataset(tmp_path / "out", [row("q", ["one"], [])], Metadata(corpus_id="c"))
    table = pq.read_table(tmp_path / "out/corpus.parquet")
    pq.write_table(table, tmp_path / "out/corpus.parquet", compression="none")
    with pytest.raises(UserError, match=r"corpus.parquet is not the one that was written"):
        list(read_rows(DatasetConfig(path=str(tmp_path / "out"))))


# ------------------------------------------------------------------------------------------ bad rows

BAD = [
    ('{"query": "q", "pos": [], "neg": []}', "field 'pos' is empty: every query needs"),
    ("not JSON", "not JSON: Expecting value (character 1)"),
    ('{"query": " ", "pos": ["p"], "neg": []}', "field 'query' is empty or only spaces"),
    (json.dumps({**ROWS[3], "prompt": "Find it " * 600}), "data.query_max_length=512 tokens leaves no room"),
]  # fmt: skip


def with_bad(folder: Path, num_rows: int = 40) -> tuple[DatasetConfig, DatasetConfig, list[str]]:
    """(rows with bad ones between them, the good rows alone, where and why), the first line is bad."""
    lines, where = list[str](), list[str]()
    for i, row in enumerate(ROWS[:num_rows]):
        if i % (num_rows // 4) == 0:
            bad, reason = BAD[len(where)]
            lines.append(bad)
            where.append(f"{folder}/bad.jsonl:{len(lines)}: {reason}")
        lines.append(json.dumps(row))
    (folder / "bad.jsonl").write_text("\n".join(lines) + "\n")
    clean = source(folder / "clean.jsonl", ROWS[:num_rows])
    return replace(clean, path=f"{folder}/bad.jsonl"), clean, where


def test_bad_rows_are_left_out_counted_and_listed_and_a_run_that_would_not_is_refused(tmp_path, tokenizer):
    bad, clean, where = with_bad(tmp_path)
    config = DataConfig(datasets=[clean, bad], cache_dir=str(tmp_path / "cache"), on_bad="drop")
    said: list[str] = []
    store = open_store(config, tokenizer, said.append)
    right = open_store(replace(config, datasets=[clean, clean], on_bad="error"), tokenizer, silent)
    for name in set(TOKEN_FILES) | set(ARRAY_FILES) - {"row_lines.npy"}:
        assert (store.folder / name).read_bytes() == (right.folder / name).read_bytes(), name
    assert [store.where(row).rpartition("/")[2] for row in (39, 40, 49, 50)] == [
        "clean.jsonl:40", "bad.jsonl:2", "bad.jsonl:11", "bad.jsonl:13",
    ]  # fmt: skip
    listed = (store.folder / "dropped.txt").read_text().splitlines()
    assert len(listed) == 4 and all(map(str.startswith, listed, where)), listed
    assert store.manifest["dropped"]["count"] == 4 and "dropped" not in right.manifest
    text = "\n".join(said)
    assert "WARNING: 4 bad lines are left out, as data.on_bad=drop says:\n  " + listed[0] in text
    assert f"WARNING: bad lines left out: 4 (4.76%), listed in {store.folder}/dropped.txt" in text
    assert open_store(config, tokenizer, silent).digest == store.digest
    for options in ({}, {"store": store.digest}, {"store": store.digest, "datasets": []}):
        with pytest.raises(
            UserError, match=r"on_bad=drop: 4 bad lines are left out, the first .*bad\.jsonl:1: "
        ):
            open_store(replace(config, on_bad="error", **options), tokenizer, silent)
    with pytest.raises(UserError, match="4 bad lines in all"):  # another store, of which nothing is built
        open_store(replace(config, on_bad="error", query_max_length=40), tokenizer, silent)


def test_a_dataset_folder_without_the_bad_rows_trains_as_the_good_ones(tmp_path, tokenizer):
    bad, clean, where = with_bad(tmp_path)
    config = DataConfig(datasets=[bad], cache_dir=str(tmp_path / "cache"), on_bad="drop")
    said: list[str] = []
    folders = write_datasets(config, tmp_path / "out", said.append, tokenizer)
    assert "4 bad lines left out" in said[-1]
    listed = (tmp_path / "out/dropped.txt").read_text().splitlines()
    assert len(listed) == 4 and all(map(str.startswith, listed, where)), listed
    stores = [open_store(one, tokenizer, silent) for one in (folders, replace(config, datasets=[clean]))]
    for name in (*TOKEN_FILES, *ARRAY_FILES):
        assert len({(store.folder / name).read_bytes() for store in stores}) == 1, name


def test_only_rows_are_left_out(tmp_path, tokenizer):
    """A file that ends early, a corpus with a bad line, and data of which nothing is left are errors."""
    bad, clean, _ = with_bad(tmp_path)
    data = gzip.compress(Path(clean.path).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "none.jsonl").write_text('{"query": 1, "pos": ["p"], "neg": []}\n' * 30)
    (tmp_path / "beir/qrels").mkdir(parents=True)
    (tmp_path / "beir/corpus.jsonl").write_text('{"_id": "d1", "text": "x"}\n{"_id": "d2", "text"\n')
    (tmp_path / "beir/queries.jsonl").write_text('{"_id": "q1", "text": "x"}\n')
    (tmp_path / "beir/qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    for name, message in (
        ("cut.jsonl.gz", r"cut\.jsonl\.gz:\d+: the gzip stream ends early"),
        (
            "none.jsonl",
            r"(none\.jsonl:\d+: field 'query' must be a string.*\n.*){20}no row is left; .*\(30 bad",
        ),
        (
            "beir",
            r"corpus\.jsonl:2: not JSON.*\n.*no row is left; only rows can be left out, a corpus has to be",
        ),
    ):
        datasets = [bad, DatasetConfig(path=str(tmp_path / name))]
        with pytest.raises(UserError, match=message):
            check_datasets(DataConfig(datasets=datasets, on_bad="drop"), tokenizer, silent)


@pytest.mark.parametrize("kind", ["csv", "parquet", "dataset"])
def test_rows_of_other_containers_are_left_out_one_by_one(tmp_path, kind):
    texts = [f"text {i}" for i in range(130)]
    table = pa.table({"anchor": texts, "positive": [t if i != 70 else None for i, t in enumerate(texts)]})
    path, left = tmp_path / f"rows.{kind}", [i for i in range(130) if i not in (70, 90)]
    if kind == "csv":
        lines = [f"a{i},b{i}" if i not in (70, 90) else f"a{i}" for i in range(130)]
        path.write_text("anchor,positive\n" + "\n".join(lines) + "\n")
    elif kind == "parquet":
        data = pa.array([b"x"] * 90 + [b"\xff"] + [b"x"] * 39, pa.binary()).view(pa.string())
        pq.write_table(table.append_column("negative", data), path)
    else:
        rows = [row(f"q{i}", [f"p{i}"], []) for i in range(130)]
        write_dataset(path, rows, Metadata(corpus_id="c"))
        queries = pq.read_table(path / "queries.parquet").to_pylist()
        queries[70]["pos_doc"], queries[90]["corpus_id"] = [], "other"
        pq.write_table(pa.Table.from_pylist(queries), path / "queries.parquet")
        metadata = json.loads((path / "dataset_metadata.json").read_text())
        (path / "dataset_metadata.json").write_text(json.dumps({**metadata, "files": {}}))
    findings = check_datasets(
        DataConfig(datasets=[DatasetConfig(path=str(path))], on_bad="drop"), None, silent
    )
    assert findings.num_rows == 128 and len(findings.dropped) == 2
    first = 2 if kind == "csv" else 1
    found = [one.line - first for one in read_rows(DatasetConfig(path=str(path)), Findings(drop=True))]
    assert found == left


def test_check_names_all_that_is_bad_and_writes_and_tokenises_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(tokenizer), "encode_cut", lambda *_: pytest.fail("tokenised"))
    bad, clean, where = with_bad(tmp_path)
    Path(clean.path).write_text('{"query": "q"}\n' * 30)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        check_datasets(DataConfig(datasets=[bad, clean]), tokenizer, silent)
    lines = str(caught.value).split("\n")
    assert len(lines) == 21 and lines[-1] == "34 bad lines in all" and all(map(str.startswith, lines, where))
    said: list[str] = []
    findings = check_datasets(DataConfig(datasets=[bad], on_bad="drop"), tokenizer, said.append)
    assert findings.num_rows == 40
    assert said[-1] == "checked 40 rows of 1 datasets, 4 bad lines left out; nothing is written"
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match=r"data\.query_max_length=3 tokens leaves no room"):
        check_datasets(DataConfig(datasets=[bad], query_max_length=3), tokenizer, silent)


# ------------------------------------------------------------------------------------------ kills


def prepare(folder: str, tokenizer_folder: str, kind: str) -> None:
    from nemo_embed_core.data import compile as compile_module
    from nemo_embed_core.data.tokenizer import load_tokenizer

    os.chdir(folder)
    compile_module.COMMIT_S, tokenizer = 0.0, load_tokenizer(tokenizer_folder)
    datasets = [DatasetConfig(path=f"../{name}.jsonl", task="Find") for name in ("bad", "clean")]
    config = DataConfig(datasets=datasets, cache_dir="cache", on_bad="drop")
    if kind == "dataset":
        config = write_datasets(config, "out", print, tokenizer)
    open_store(config, tokenizer).verify()


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["rows", "dataset"])
def test_a_command_that_is_killed_and_given_again_leaves_the_same_bytes(
    kind, tmp_path, tokenizer_folder, server
):
    with_bad(tmp_path, 8)
    unlinked = [f"store.unlink@{name}" for name in ("state.json", "positives.part")]
    places = [*(f"store.row@{row}" for row in (0, 5, 11)), *unlinked]
    if kind == "dataset":
        places = ["dataset.row@5", "dataset.metadata@bad", "dataset.metadata@clean", *places[2:4]]
    server.preload("nemo_embed_core.data.prepare", "pyarrow.parquet")
    work, whole = tmp_path / "work", tmp_path / "whole"
    outputs = []
    for folder, faults in ((whole, [""]), (work, [*places, ""])):
        folder.mkdir()
        for fault in faults:
            ask = (str(folder), str(tokenizer_folder), kind)
            outcome = server.call(prepare, *ask, env={"NEMO_EMBED_FAIL": fault})
            assert outcome.code == (-9 if fault else 0), (fault, outcome.output)
            outputs.append(outcome.output)
    assert any("11 of 16 rows were done" in output for output in outputs)
    assert kind == "rows" or "out/bad is there, made of the same sources" in outputs[-1]
    left, right = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (work, whole)
    )
    for files in (left, right):
        files.pop(Path("cache/sources.json"), None)
    assert left == right and len(left) > 10
