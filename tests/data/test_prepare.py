"""Any source written as a dataset folder trains as the source does, in the same bytes each time; a document
is written once for each normal form; a folder's corpus is shared without a second copy."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nemo_embed_core.config import DataConfig, DatasetConfig, PrepareConfig
from nemo_embed_core.data import dataset_writer
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.dataset import Metadata, read_metadata
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.prepare import write_datasets
from nemo_embed_core.data.readers import Row, read_beir, read_rows
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


def test_several_sources_are_a_folder_each_and_the_same_bytes_again(tmp_path):
    (tmp_path / "b").mkdir()
    datasets = [source(tmp_path / "rows.jsonl"), source(tmp_path / "b/rows.jsonl", ROWS[:5])]
    config = DataConfig(datasets=datasets)
    names = [Path(d.path).name for d in write_datasets(config, tmp_path / "one", silent).datasets]
    assert names == ["rows", "rows-2"]
    write_datasets(config, tmp_path / "two", silent)
    for name in names:
        assert content(tmp_path / "one" / name) == content(tmp_path / "two" / name)
    with pytest.raises(UserError, match="exists and is not empty"):
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
    with pytest.raises(UserError, match="give --tokenizer FOLDER"):
        PrepareConfig()
    assert not (tmp_path / "out").exists()


def test_a_file_that_changed_since_is_refused(tmp_path):
    write_dataset(tmp_path / "out", [row("q", ["one"], [])], Metadata(corpus_id="c"))
    table = pq.read_table(tmp_path / "out/corpus.parquet")
    pq.write_table(table, tmp_path / "out/corpus.parquet", compression="none")
    with pytest.raises(UserError, match=r"corpus.parquet is not the one that was written"):
        list(read_rows(DatasetConfig(path=str(tmp_path / "out"))))
