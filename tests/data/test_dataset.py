"""A dataset folder that plain pyarrow writes is read as its joined rows; what is wrong in one is refused by
path, row and reason; ids-only folders are joined by number; memory is the stated bytes a document."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_embed_core.config import DataConfig, DatasetConfig, LossConfig, TrainConfig
from nemo_embed_core.data.build import open_store, with_store
from nemo_embed_core.data.dataset import Metadata, read_corpus, read_metadata, read_records
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.lines import Findings
from nemo_embed_core.data.prepare import write_datasets
from nemo_embed_core.data.readers import read_beir, read_rows, source_files, with_tasks
from nemo_embed_core.errors import UserError

CORPUS = [
    {"id": "d0", "text": "Chlorophyll takes up red light."},
    {"id": "d1", "text": "Zürich lies on the Limmat."},
    {"id": "d2", "text": "A bassoon has a double reed."},
]
QUERIES = [
    {"question_id": "q0", "question": "why are leaves green", "corpus_id": "toy", "pos_doc": [{"id": "d0"}],
     "neg_doc": [{"id": "d2"}, {"id": "d1"}]},
    {"question_id": "q1", "question": "which river runs through Zürich", "corpus_id": "toy",
     "pos_doc": [{"id": "d1"}], "neg_doc": []},
]  # fmt: skip
METADATA = {
    "class": "TextQADataset", "corpus_id": "toy", "query_instruction": "Instruct: Answer it\nQuery:",
    "passage_instruction": "", "task_type": "Retrieval", "ids_only": False,
}  # fmt: skip


def write(folder: Path, corpus=CORPUS, queries=QUERIES, metadata=METADATA, shards: int = 1) -> DatasetConfig:
    """As docs/data-formats.md tells another program to, with pyarrow alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        for i in range(shards):
            part = rows[i * len(rows) // shards : (i + 1) * len(rows) // shards]
            file = f"{name}.parquet" if shards == 1 else f"{name}-{i:05d}-of-{shards:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(part, pa.Table.from_pylist(rows).schema), folder / file)
    (folder / "dataset_metadata.json").write_text(json.dumps(metadata))
    return DatasetConfig(path=str(folder))


def change(rows: list[dict], at: int, **fields) -> list[dict]:
    return [{**row, **(fields if i == at else {})} for i, row in enumerate(rows)]


def plain(row) -> tuple:
    return row.id, row.query, list(row.pos), list(row.neg), list(row.pos_ids), list(row.neg_ids), row.line


EXPECTED = [
    ("q0", "why are leaves green", [CORPUS[0]["text"]], [CORPUS[2]["text"], CORPUS[1]["text"]], ["d0"],
     ["d2", "d1"], 1),
    ("q1", "which river runs through Zürich", [CORPUS[1]["text"]], [], ["d1"], [], 2),
]  # fmt: skip


def test_what_pyarrow_writes_is_read_as_joined_rows(tmp_path):
    config = write(tmp_path / "toy")
    assert [plain(row) for row in read_rows(config)] == EXPECTED
    names = [file.name for file in source_files(config)]
    assert names == ["dataset_metadata.json", "corpus.parquet", "queries.parquet"]
    beir = read_beir(DatasetConfig(path=str(tmp_path / "toy"), split="test"))
    assert dict(beir.corpus) == {row["id"]: row["text"] for row in CORPUS}
    assert beir.qrels == {"q0": {"d0": 1}, "q1": {"d1": 1}} and dict(beir.queries)["q1"] == EXPECTED[1][1]


def test_shards_are_read_in_order_and_rows_named_by_theirs(tmp_path):
    rows = list(read_rows(write(tmp_path / "toy", shards=2)))
    assert [plain(row)[:6] for row in rows] == [row[:6] for row in EXPECTED]
    assert [(Path(row.path).name, row.line) for row in rows] == [
        (f"queries-0000{i}-of-00002.parquet", 1) for i in range(2)
    ]


def test_optional_columns_scores_and_titles(tmp_path):
    corpus = [
        {**row, "title": title, "lang": "en", "group": "g"}
        for row, title in zip(CORPUS, ["Leaves", None, ""], strict=True)
    ]
    queries = change(
        [{**row, "grade": 0.5, "lang": "en", "group": 7} for row in QUERIES], 0,
        pos_doc=[{"id": "d0", "score": 0.75}], neg_doc=[{"id": "d2", "score": 0.25}],
    )  # fmt: skip
    queries = change(queries, 1, pos_doc=[{"id": "d1", "score": None}])
    row, other = read_rows(write(tmp_path / "toy", corpus, queries), graded=True)
    assert row.pos == ["Leaves Chlorophyll takes up red light."] and row.neg == [CORPUS[2]["text"]]
    assert (row.grade, row.lang, row.group, row.pos_scores, row.neg_scores) == (
        0.5,
        "en",
        "7",
        [0.75],
        [0.25],
    )
    assert other.pos_scores == []


BAD = {
    "a null text": (
        {"corpus": change(CORPUS, 1, text=None)},
        "corpus.parquet:2: field 'text' must be a string, got null",
    ),
    "an empty text": ({"corpus": change(CORPUS, 2, text=" ")}, "corpus.parquet:3: field 'text' is empty"),
    "an id twice": (
        {"corpus": change(CORPUS, 2, id="d0")},
        "corpus.parquet:3: id 'd0' is already the id of row 1",
    ),
    "an unknown document": (
        {"queries": change(QUERIES, 1, pos_doc=[{"id": "d9"}])},
        "queries.parquet:2: pos_doc[0] names document 'd9', which is not in the corpus (3 documents)",
    ),
    "an unknown negative": (
        {"queries": change(QUERIES, 0, neg_doc=[{"id": "d1"}, {"id": "x"}])},
        "queries.parquet:1: neg_doc[1] names document 'x'",
    ),
    "no positive": ({"queries": change(QUERIES, 1, pos_doc=[])}, "queries.parquet:2: pos_doc is empty"),
    "null negatives": ({"queries": change(QUERIES, 1, neg_doc=None)}, "queries.parquet:2: neg_doc is null"),
    "another corpus": (
        {"queries": change(QUERIES, 1, corpus_id="other")},
        "queries.parquet:2: corpus_id is 'other', and the folder's corpus is 'toy'",
    ),
    "a question twice": (
        {"queries": change(QUERIES, 1, question_id="q0")},
        "queries.parquet:2: question_id 'q0' stands twice",
    ),
    "positive and negative": (
        {"queries": change(QUERIES, 0, neg_doc=[{"id": "d1"}, {"id": "d0"}])},
        "queries.parquet:1: document 'd0' is in pos_doc and in neg_doc",
    ),
    "a document twice": (
        {"queries": change(QUERIES, 0, neg_doc=[{"id": "d1"}, {"id": "d1"}])},
        "queries.parquet:1: neg_doc[1] has the id 'd1' again",
    ),
    "scores of some": (
        {"queries": change(QUERIES, 0, neg_doc=[{"id": "d1", "score": 0.5}, {"id": "d2", "score": None}])},
        "queries.parquet:1: neg_doc: 1 of 2 documents have a score",
    ),
    "an infinite score": (
        {"queries": change(QUERIES, 0, neg_doc=[{"id": "d1", "score": float("inf")}])},
        "queries.parquet:1: neg_doc[0].score must be a finite number",
    ),
    "an unknown column": (
        {"corpus": [{**row, "url": "x"} for row in CORPUS]},
        "corpus.parquet:1: unknown columns ['url']",
    ),
    "a missing column": (
        {"queries": [{k: v for k, v in row.items() if k != "corpus_id"} for row in QUERIES]},
        "queries.parquet:1: columns ['corpus_id'] are missing",
    ),
    "numbers as texts": (
        {"corpus": [{**row, "text": i} for i, row in enumerate(CORPUS)]},
        "corpus.parquet:1: column 'text' is int64: it must be of strings",
    ),
    "bare ids": (
        {"queries": [{**row, "pos_doc": ["d0"]} for row in QUERIES]},
        "queries.parquet:1: column 'pos_doc' is list<",
    ),
    "a wrong count": (
        {"metadata": {**METADATA, "counts": {"documents": 4}}},
        "corpus has 3 rows, and dataset_metadata.json counts 4 documents",
    ),
    "a count in quotes": (
        {"metadata": {**METADATA, "counts": {"queries": "2"}}},
        "dataset_metadata.json: counts.queries must be an integer, got a string",
    ),
    "another class": (
        {"metadata": {**METADATA, "class": "Other"}},
        "dataset_metadata.json: class is 'Other'",
    ),
    "a number for a string": (
        {"metadata": {**METADATA, "query_instruction": 3}},
        "query_instruction must be a string, got a number (int)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_each_fault_is_named(name, tmp_path):
    parts, message = BAD[name]
    with pytest.raises(UserError) as error:
        list(read_rows(write(tmp_path / "toy", **parts)))
    assert message in str(error.value)


def test_all_bad_rows_are_collected(tmp_path):
    queries = change(change(QUERIES, 0, pos_doc=[]), 1, corpus_id="c")
    findings = Findings()
    assert list(read_rows(write(tmp_path / "toy", queries=queries), findings)) == []
    assert findings.num_bad == 2 and "queries.parquet:2" in findings.named[1]


def test_missing_damaged_and_mixed_files(tmp_path):
    folder = tmp_path / "toy"
    config = write(folder, shards=2)
    (folder / "corpus-00001-of-00002.parquet").rename(folder / "kept")
    with pytest.raises(UserError, match=r"1 of 2 corpus shards: corpus-00001-of-00002.parquet is missing"):
        list(read_rows(config))
    (folder / "corpus.parquet").write_bytes((folder / "kept").read_bytes())
    with pytest.raises(UserError, match=r"both corpus.parquet and corpus-00000-of-00002.parquet"):
        list(read_rows(config))
    other = tmp_path / "other"
    config = write(other)
    whole = (other / "queries.parquet").read_bytes()
    (other / "queries.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"queries.parquet:1: not a whole Parquet file"):
        list(read_rows(config))
    (other / "queries.parquet").unlink()
    with pytest.raises(UserError, match=r"no queries.parquet and no queries-00000-of-"):
        list(read_rows(config))


def test_an_id_of_another_shard_is_named_by_both(tmp_path):
    config = write(tmp_path / "toy", corpus=[*CORPUS, {**CORPUS[0], "text": "other"}], shards=2)
    message = r"corpus-00001-of-00002.parquet:2: id 'd0' is already the id of row 1 of corpus-00000-of-00002"
    with pytest.raises(UserError, match=message):
        list(read_rows(config))


def test_a_damaged_page_is_an_error_by_file(tmp_path):
    """The footer is whole, so that opening the file tells nothing."""
    config = write(tmp_path / "toy", corpus=[{"id": f"d{i}", "text": f"text {i}"} for i in range(300)])
    path = tmp_path / "toy" / "corpus.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 200] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"corpus.parquet:1: not a whole Parquet file: .*copy it again"):
        list(read_rows(config))


def test_a_folder_of_two_formats_is_refused_by_both_names(tmp_path):
    config = write(tmp_path / "toy")
    (tmp_path / "toy" / "corpus.jsonl").write_text('{"_id": "d0", "text": "x"}\n')
    message = r"is both beir \(corpus\.jsonl\) and dataset \(dataset_metadata\.json\): remove"
    for read in (lambda: list(read_rows(config)), lambda: read_beir(config)):
        with pytest.raises(UserError, match=message):
            read()
    assert [plain(row) for row in read_rows(replace(config, format="dataset"))] == EXPECTED
    assert list(read_beir(replace(config, format="dataset")).corpus) == ["d0", "d1", "d2"]
    (tmp_path / "toy" / "dataset_metadata.json").unlink()
    with pytest.raises(UserError, match=r"toy has both corpus\.jsonl and corpus\.parquet: remove one"):
        list(read_rows(config))


def test_evaluation_finds_relevant_what_training_takes_for_a_positive(tmp_path):
    queries = [{**row, "grade": grade} for row, grade in zip(QUERIES, (2.5, 4.0), strict=True)]
    config = write(tmp_path / "toy", queries=queries)
    with pytest.raises(UserError, match=r"queries.parquet:1: a graded pair \(grade 2.5\).*min_grade"):
        read_beir(config)
    config = replace(config, min_grade=3.0)
    assert read_beir(config).qrels == {"q1": {"d1": 1}} and [row.id for row in read_rows(config)] == ["q1"]


def test_the_folders_instructions_are_prompts_unless_the_run_has_its_own(tmp_path, tokenizer):
    metadata = {**METADATA, "passage_instruction": "passage:"}
    config, said = write(tmp_path / "toy", metadata=metadata), []
    data = DataConfig(
        datasets=[config], cache_dir=str(tmp_path / "cache"), query_max_length=64, document_max_length=64
    )
    (own,) = with_store(data).datasets
    assert (own.task, own.document_task) == ("Answer it", "passage: {text}")
    store = open_store(data, tokenizer, said.append)
    texts = [f"Instruct: Answer it\nQuery: {QUERIES[1]['question']}", f"passage: {CORPUS[1]['text']}"]
    query, document = tokenizer.encode(texts, 64)
    assert store.query_tokens(1).tolist() == list(query)
    assert store.document_tokens(int(store.positives(1)[0])).tolist() == list(document)
    assert any(
        "queries begin with 'Instruct: Answer it\\nQuery: ', documents with 'passage: '" in line
        for line in said
    )
    other = DatasetConfig(path=config.path, task="{text}", document_task="Other")
    data = DataConfig(datasets=[other], cache_dir=data.cache_dir, query_max_length=64, document_max_length=64)
    store = open_store(data, tokenizer, said.append)
    assert store.query_tokens(1).tolist() == list(tokenizer.encode([QUERIES[1]["question"]], 64)[0])
    assert any("queries begin with ''" in line and "Instruct: Other" in line for line in said)


def test_the_folders_task_type_counts_where_no_option_names_one(tmp_path):
    words = {
        "Classification": "classification",
        "BitextMining": "bitext",
        "STS": "sts",
        "": "",
        "MultilabelClassification": "classification",
        "Reranking": "retrieval",
        "Clustering": "clustering",
    }
    for i, (theirs, ours) in enumerate(words.items()):
        config = write(tmp_path / f"d{i}", metadata={**METADATA, "task_type": theirs})
        found = with_tasks(config)
        assert (found.task_type, found.task, found.document_task) == (ours, "Answer it", "")
        assert with_tasks(found) == found
        assert with_tasks(replace(config, task_type="nli")).task_type == "nli"
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"en": "one", "de": "eins"}\n')
    config = DatasetConfig(path=str(rows), task="Retrieve parallel sentences")
    assert with_tasks(config) == config
    bitext = with_tasks(replace(config, task_type="bitext"))
    assert bitext.document_task == "Retrieve parallel sentences" and with_tasks(bitext) == bitext
    assert with_tasks(replace(bitext, document_task="{text}")).document_task == "{text}"
    write_datasets(DataConfig(datasets=[bitext]), tmp_path / "written", log=lambda message: None)
    metadata = json.loads((tmp_path / "written/dataset_metadata.json").read_text())
    assert metadata["task_type"] == "bitext"
    assert metadata["passage_instruction"] == "Instruct: Retrieve parallel sentences\nQuery:"


@pytest.mark.parametrize("name", ["labels", ""])
def test_classes_are_contrasted_with_their_own_dataset_alone(name, tmp_path):
    datasets = [
        DatasetConfig(path="nq.jsonl"),
        DatasetConfig(path="labels.jsonl", name=name, task_type="classification"),
    ]

    def config(datasets, in_batch="positives", **data):
        return TrainConfig(output_dir="x", steps=1, data=DataConfig(datasets=datasets, **data),
                           loss=LossConfig(in_batch=in_batch))  # fmt: skip

    said = rf"{name or 'labels.jsonl'}: task_type=classification with loss.in_batch=positives: .*one_source"
    with pytest.raises(UserError, match=said):
        config(datasets)
    with pytest.raises(UserError, match=r"task_type=clustering with loss\.in_batch=all"):
        config([datasets[0], replace(datasets[1], task_type="clustering")], "all")
    config(datasets, "none")
    config(datasets[1:])
    config(datasets, batches="one_source")
    config([datasets[0], replace(datasets[1], task_type="retrieval")])


def test_a_folder_whose_corpus_changes_gets_another_store(tmp_path, tokenizer):
    digests = set()
    for text in ("A bassoon has a double reed.", "A bassoon has two reeds."):
        config = write(tmp_path / "toy", corpus=change(CORPUS, 2, text=text))
        digests.add(
            open_store(DataConfig(datasets=[config], cache_dir=str(tmp_path / "c")), tokenizer).digest
        )
    assert len(digests) == 2


# ------------------------------------------------------------------------------------------ ids only

IDS_QUERIES = [
    {
        "question_id": f"q_{i}",
        "corpus_id": "toy",
        "pos_doc": [{"id": f"d_{i}"}],
        "neg_doc": [{"id": f"d_{2 - i}"}],
    }
    for i in (0, 2)
]
IDS = {
    "corpus": [{"id": f"d_{i}"} for i in range(3)],
    "queries": IDS_QUERIES,
    "metadata": {**METADATA, "ids_only": True},
}


def ids_only(folder: Path, **source) -> DatasetConfig:
    config = write(folder, **IDS)
    known = {"loader_config": "column", "source_repo": "someone/pairs", "subset": None, "split": "train",
             "query_column": "q", "document_column": "a"}  # fmt: skip
    (folder / "source_config.json").write_text(json.dumps(known | source))
    return config


def pairs(folder: Path, count: int = 3) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {"q": [f"question {i}" for i in range(count)], "a": [f"answer {i}" for i in range(count)]}
    )
    pq.write_table(table, folder / "train.parquet")
    return str(folder)


def test_ids_are_joined_with_columns_by_number(tmp_path):
    config = ids_only(tmp_path / "toy")
    config = DatasetConfig(path=config.path, source=pairs(tmp_path / "pairs"))
    rows = [(row.query, row.pos, row.neg) for row in read_rows(config)]
    assert rows == [("question 0", ["answer 0"], ["answer 2"]), ("question 2", ["answer 2"], ["answer 0"])]
    assert tmp_path / "pairs" / "train.parquet" in source_files(config)


def test_ids_are_joined_with_an_mteb_source_by_number(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    corpus = [{"_id": f"x{i}", "title": "T" if i else "", "text": f"text {i}"} for i in range(3)]
    (source / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    pq.write_table(pa.table({"_id": ["a", "b", "c"], "text": ["qa", "qb", "qc"]}), source / "queries.parquet")
    config = ids_only(tmp_path / "toy", loader_config="mteb", query_column=None, document_column=None)
    rows = list(read_rows(DatasetConfig(path=config.path, source=str(source))))
    assert [(row.query, row.pos, row.neg) for row in rows] == [
        ("qa", ["text 0"], ["T text 2"]),
        ("qc", ["T text 2"], ["text 0"]),
    ]


def test_an_ids_only_folder_says_what_to_download_and_refuses_another_source(tmp_path):
    config = ids_only(tmp_path / "toy", revision="a" * 40)
    with pytest.raises(UserError) as error:
        source_files(config)
    assert f"hf download someone/pairs --repo-type dataset --revision {'a' * 40}" in str(error.value)
    for count, message in (
        (2, "id d_2 is beyond the 2 corpus texts"),
        (4, "4 corpus texts and the folder names 3"),
    ):
        other = DatasetConfig(path=config.path, source=pairs(tmp_path / f"pairs{count}", count))
        with pytest.raises(UserError, match=message):
            list(read_rows(other))
    source = pairs(tmp_path / "hub" / "snapshots" / ("b" * 40))
    with pytest.raises(UserError, match=f"is revision {'b' * 40} of someone/pairs"):
        list(read_rows(DatasetConfig(path=config.path, source=source)))
    downloaded = Path(pairs(tmp_path / "local"))
    record = downloaded / ".cache/huggingface/download/train.parquet.metadata"
    record.parent.mkdir(parents=True)
    record.write_text("a" * 40 + "\netag\n0.0\n")
    assert len(list(read_rows(DatasetConfig(path=config.path, source=str(downloaded))))) == 2


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("written", ["short", "long", "ours"])
def test_memory_does_not_grow_with_a_row_group(tmp_path, written):
    """pyarrow's own buffers: 16 MiB of text in one row group, in pages of a megabyte."""
    config, length = write(tmp_path / "toy"), 1000 if written == "short" else 16_000
    count = (16 << 20) // length
    rows = {"id": [f"d{i}" for i in range(count)], "text": [f"{i:05x}" * (length // 5) for i in range(count)]}
    if written == "ours":
        config = replace(config, path=str(tmp_path / "ours"))
        row = Row("q", ["p"], [], "rows", 1)
        write_dataset(tmp_path / "ours", [row], Metadata(corpus_id="c"), zip(*rows.values(), strict=True))
    else:
        options = {"row_group_size": count, "compression": "none", "write_batch_size": 16}
        pq.write_table(pa.table(rows), tmp_path / "toy/corpus.parquet", **options)
    del rows
    for _ in range(2):  # what was written is freed late, so that the second pass counts
        before, most = pa.total_allocated_bytes(), 0
        for _ in read_records(Path(config.path), "corpus", False, Findings()):
            most = max(most, pa.total_allocated_bytes() - before)
    assert (1 << 20) < most < 7 << 20, most


def test_memory_of_a_corpus_is_the_stated_bytes_a_document(tmp_path):
    used = {}
    for count, length in ((2000, 20), (12000, 20), (2000, 5000)):
        corpus = [{"id": f"document-{i}", "text": f"{i} ".ljust(length, "x")} for i in range(count)]
        folder = tmp_path / f"{count}-{length}"
        write(folder, corpus=corpus)
        metadata = read_metadata(folder)
        tracemalloc.start()
        documents = read_corpus(folder, metadata, Findings())
        assert len(list(documents)) == count and documents[f"document-{count - 1}"]  # all is written to disk
        used[count, length] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert documents["document-7"] == "7 ".ljust(length, "x") and "document-x" not in documents
    a_document = (used[12000, 20] - used[2000, 20]) / 10000
    assert a_document < 48, f"{a_document:.1f} bytes a document"  # 40 stated; arrays grow by an eighth ahead
    assert used[2000, 5000] - used[2000, 20] < 1 << 20  # not the ten million bytes of text
