"""Formats whose texts are in files of their own: published MS MARCO, and Automodel's JSON of ids."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.readers import Findings, read_beir, read_rows, reading, source_files, with_tasks
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.formats import convert

# As the files of microsoft/MSMARCO-Passage-Ranking are: no headers, TREC's four columns.
COLLECTION = "0\tThe Manhattan Project.\n7\tUranium was enriched.\n12\tBread is baked.\n"
QUERIES = "1185869\twhat was enriched\n2\twho baked\n"
QRELS = "2\t0\t12\t1\n1185869\t0\t7\t1\n1185869\t0\t0\t0\n"


def msmarco(folder: Path, collection=COLLECTION, queries=QUERIES, qrels=QRELS) -> DatasetConfig:
    folder.mkdir()
    (folder / "collection.tsv").write_text(collection)
    (folder / "queries.dev.small.tsv.gz").write_bytes(gzip.compress(queries.encode()))
    (folder / "qrels.dev.small.tsv").write_text(qrels)
    return DatasetConfig(path=str(folder), split="dev.small")


def plain(config: DatasetConfig) -> list[tuple]:
    return [(r.id, r.query, r.pos, r.neg, list(r.pos_ids), list(r.neg_ids)) for r in read_rows(config)]


def test_msmarco_is_read_as_published(tmp_path):
    config = msmarco(tmp_path / "m")
    assert plain(config) == [
        ("2", "who baked", ["Bread is baked."], [], ["12"], []),
        ("1185869", "what was enriched", ["Uranium was enriched."], ["The Manhattan Project."], ["7"], ["0"]),
    ]
    assert [file.name for file in source_files(config)][-1] == "qrels.dev.small.tsv"
    beir = read_beir(DatasetConfig(path=config.path, split="dev.small"))
    assert len(beir.corpus) == 3 and beir.qrels["1185869"] == {"7": 1, "0": 0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"collection": "0\ta\tb\n"}, r"collection.tsv:1: expected 2 tab-separated columns"),
        ({"collection": COLLECTION + "7\tagain\n"}, r"collection.tsv:4: id '7' is already the id of row 2"),
        ({"collection": COLLECTION + "9\t \n"}, r"collection.tsv:4: field 'text' is empty"),
        ({"qrels": "2\t0\t99\t1\n"}, r"qrels.dev.small.tsv:1: pos_doc\[0\] names document '99'"),
        ({"qrels": "3\t0\t7\t1\n"}, r"qrels.dev.small.tsv:1: query '3' is not among the 2 queries"),
        ({"qrels": "2\t0\t7\t0\n"}, r"qrels.dev.small.tsv:1: pos_doc is empty"),
    ],
)
def test_faults_of_msmarco_are_named(changed, message, tmp_path):
    with pytest.raises(UserError, match=message):
        plain(msmarco(tmp_path / "m", **changed))


def test_a_missing_split_of_msmarco_says_what_is_there(tmp_path):
    with pytest.raises(
        UserError, match=r"no queries.train.tsv \(or .gz\); it holds: collection.tsv, qrels.dev"
    ):
        plain(DatasetConfig(path=msmarco(tmp_path / "m").path))


# ------------------------------------------------------------------------------------------ Automodel

DATA = [
    {"question_id": "1", "question": "q one", "corpus_id": "c", "pos_doc": [{"id": "a"}], "neg_doc": ["b"]},
    {"question_id": 2, "question": "q two", "corpus_id": "c", "pos_doc": ["b"], "neg_doc": []},
]


def automodel(folder: Path, data=DATA, instruction: str = "Instruct: Find\nQuery:") -> DatasetConfig:
    corpus = folder / "c"
    corpus.mkdir(parents=True)
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["text a", "text b"]}), corpus / "train.parquet")
    metadata = {
        "class": "TextQADataset", "corpus_id": "c", "query_instruction": instruction,
        "passage_instruction": "", "task_type": "Retrieval",
    }  # fmt: skip
    (corpus / "merlin_metadata.json").write_text(json.dumps(metadata))
    (folder / "train.json").write_text(json.dumps({"corpus": [{"path": "c"}], "data": data}))
    return DatasetConfig(path=str(folder / "train.json"))


def test_automodels_ids_are_joined_with_their_corpus(tmp_path):
    config = automodel(tmp_path / "m")
    assert plain(config) == [
        ("1", "q one", ["text a"], ["text b"], ["a"], ["b"]), ("2", "q two", ["text b"], [], ["b"], [])
    ]  # fmt: skip
    assert with_tasks(config).task == "Find"
    names = ["merlin_metadata.json", "train.parquet", "train.json"]
    assert [file.name for file in source_files(config)] == names
    assert dict(read_beir(config).corpus) == {"a": "text a", "b": "text b"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corpus_id": "d"}, "corpus_id 'd' is none of"),
        ({"pos_doc": ["z"]}, "names document 'z', which is not in the corpus"),
        ({"pos_doc": []}, "pos_doc is empty"),
        ({"neg_doc": [{"id": "b", "text": "x"}]}, r"neg_doc\[0\] must be"),
        ({"question_id": 2}, "question_id '2' is already on line 1"),
        ({"more": 1}, "unknown fields"),
    ],
)
def test_faults_of_automodel_are_named(changed, message, tmp_path):
    with pytest.raises(UserError, match=f"train.json:1: .*{message}"):
        plain(automodel(tmp_path / "m", [{**DATA[0], **changed}, DATA[1]]))


def test_what_mining_writes_for_automodel_is_read_back(tmp_path):
    mined = [
        {
            "query": f"q{i}",
            "pos": [f"p{i}"],
            "neg": [f"n{i}", "n"],
            "pos_scores": [0.9],
            "neg_scores": [0.5, 0.25],
        }
        for i in range(3)
    ]
    (tmp_path / "mined.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mined))
    convert(tmp_path / "mined.jsonl", tmp_path / "out.json", "automodel")
    rows = list(read_rows(DatasetConfig(path=str(tmp_path / "out.json"))))
    back = [(r.query, r.pos, r.neg, list(r.pos_scores), list(r.neg_scores)) for r in rows]
    assert back == [tuple(row.values()) for row in mined]


# One instruction of queries a corpus, as the peer's documentation has a file over several corpora.
def two_corpora(folder: Path, passages: tuple[str, str] = ("", "")) -> DatasetConfig:
    for name, passage in zip(("wiki", "law"), passages, strict=True):
        corpus = folder / name
        corpus.mkdir(parents=True)
        table = pa.table({"id": ["1", "2"], "text": [f"{name} one", f"{name} two"]})
        pq.write_table(table, corpus / "train.parquet")
        metadata = {
            "class": "TextQADataset", "corpus_id": name, "query_instruction": f"Instruct: {name}\nQuery:",
            "passage_instruction": passage, "task_type": "Retrieval",
        }  # fmt: skip
        (corpus / "merlin_metadata.json").write_text(json.dumps(metadata))
    data = [
        {"question_id": "a", "question": "q", "corpus_id": "wiki", "pos_doc": ["1"], "neg_doc": [{"id": 2}]},
        {"question_id": "b", "question": "r", "corpus_id": "law", "pos_doc": [{"id": "2"}], "neg_doc": []},
    ]
    corpora = [{"path": str(folder / "wiki")}, {"path": "law"}]  # absolute, and beside the file
    (folder / "train.json").write_text(json.dumps({"corpus": corpora, "data": data}))
    return DatasetConfig(path=str(folder / "train.json"))


def test_automodels_ids_are_those_of_the_rows_own_corpus(tmp_path):
    config = two_corpora(tmp_path / "m")
    findings = Findings()
    rows = list(read_rows(config, findings))
    assert [(r.query, r.pos, r.neg, r.prompt) for r in rows] == [
        ("q", ["wiki one"], ["wiki two"], "wiki"), ("r", ["law two"], [], "law")
    ]  # fmt: skip
    assert [list(r.pos_ids) for r in rows] == [["wiki/1"], ["law/2"]]
    assert with_tasks(config).task == "" and findings.lines()[0].startswith("data sets read as automodel-ids")
    given = DatasetConfig(path=config.path, task="One for all")
    assert [row.prompt for row in read_rows(given)] == [None, None]
    beir = read_beir(config)
    assert dict(beir.corpus) == {
        f"{c}/{i}": f"{c} {n}" for c in ("wiki", "law") for i, n in ((1, "one"), (2, "two"))
    }
    assert beir.qrels == {"a": {"wiki/1": 1}, "b": {"law/2": 1}}
    with pytest.raises(UserError, match=r"train.json: its corpora have several instructions of documents"):
        with_tasks(two_corpora(tmp_path / "n", ("", "passage:")))


def test_ignored_fields_of_ids_are_not_read(tmp_path):
    config = automodel(tmp_path / "m", [{**DATA[0], "url": "x"}, DATA[1]])
    with pytest.raises(UserError, match=r"train.json:1: unknown fields \['url'\]: .* dataset's ignore"):
        plain(config)
    ignoring = DatasetConfig(path=config.path, ignore=["url"])
    assert len(plain(ignoring)) == 2 and reading(ignoring) == ["format=automodel-ids", "ignore=url"]


# ------------------------------------------------------------------------------------------ tevatron

# As tevatron's own data sets of ids are made: media null, source and answer beside them.
TEVATRON = [
    {"query_id": "1", "query": "q one", "query_image": None, "positive_document_ids": ["7"],
     "negative_document_ids": ["8", "9"], "source": "msmarco", "answer": None},
    {"query_id": 2, "query_text": "q two", "positive_document_ids": [8], "negative_document_ids": []},
]  # fmt: skip
TEVATRON_CORPUS = [
    {"docid": "7", "title": "T", "text": "seven"}, {"docid": 8, "title": "", "text": "eight", "image": None},
    {"docid": "9", "document_text": "nine"},
]  # fmt: skip


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tevatron(folder: Path, rows=TEVATRON, corpus=TEVATRON_CORPUS) -> DatasetConfig:
    folder.mkdir()
    return DatasetConfig(
        path=str(lines(folder / "train.jsonl", rows)), source=str(lines(folder / "texts.jsonl", corpus))
    )


def test_tevatrons_ids_are_joined_with_their_corpus(tmp_path):
    config, findings = tevatron(tmp_path / "t"), Findings()
    right = [
        ("1", "q one", ["T seven"], ["eight", "nine"], ["7"], ["8", "9"]),
        ("2", "q two", ["eight"], [], ["8"], []),
    ]
    assert plain(config) == right and len(list(read_rows(config, findings))) == 2
    assert findings.lines() == [
        f"data sets read as tevatron-ids (set their format where it is another): 1 (first: {config.path}:1)"
    ]
    assert reading(config) == ["format=tevatron-ids"]
    assert [file.name for file in source_files(config)] == ["texts.jsonl", "train.jsonl"]
    assert read_beir(config).qrels == {"1": {"7": 1}, "2": {"8": 1}} and len(read_beir(config).corpus) == 3
    for kind in ("parquet", "folder"):  # shards of the hub
        folder = tmp_path / kind
        folder.mkdir()
        media = [{"query_image": None, "source": None, "answer": None, **row} for row in TEVATRON]
        rows = [
            {
                **row,
                "query": row.pop("query_text", row.get("query")),
                "query_id": str(row["query_id"]),
                "positive_document_ids": list(map(str, row["positive_document_ids"])),
            }
            for row in media
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
        path = folder if kind == "folder" else folder / "train-00000-of-00001.parquet"
        assert plain(DatasetConfig(path=str(path), source=config.source)) == right
    with pytest.raises(UserError, match=r"train.jsonl has ids and no texts .* set the dataset's source"):
        source_files(DatasetConfig(path=config.path))


@pytest.mark.parametrize(
    ("row", "document", "message"),
    [
        ({"positive_document_ids": ["77"]}, {}, r"train.jsonl:1: positive_document_ids\[0\] names document"),
        ({"positive_document_ids": ["8"]}, {}, "jsonl:1: document '8' is in positive_document_ids and in "),
        ({"positive_document_ids": []}, {}, "train.jsonl:1: positive_document_ids is empty"),
        ({"positive_document_ids": "7"}, {}, "train.jsonl:1: field 'positive_document_ids' must be a list"),
        ({"negative_document_ids": None}, {}, "train.jsonl:1: field 'negative_document_ids' must be a list"),
        ({"query_id": 2}, {}, "train.jsonl:2: query_id '2' is already on line 1 of train.jsonl"),
        ({"query_text": "x"}, {}, "train.jsonl:1: a row has either 'query' or 'query_text'"),
        ({"query_image": "a.png"}, {}, "train.jsonl:1: field 'query_image' is 'a.png': only texts are read"),
        ({"url": "x"}, {}, r"train.jsonl:1: unknown fields \['url'\]"),
        ({}, {"docid": 8}, "texts.jsonl:2: id '8' is already the id of row 1 of texts.jsonl"),
        ({}, {"text": " "}, "texts.jsonl:1: field 'text' is empty or only spaces"),
        ({}, {"title": 5}, "texts.jsonl:1: field 'title' must be a string, got a number"),
        ({}, {"image": {"bytes": "x"}}, "texts.jsonl:1: field 'image' is .*: only texts are read"),
        ({}, {"document_text": "x"}, "texts.jsonl:1: a row has either 'text' or 'document_text'"),
    ],
)  # fmt: skip
def test_faults_of_tevatrons_ids_are_named(row, document, message, tmp_path):
    changed = tevatron(
        tmp_path / "t",
        [{**TEVATRON[0], **row}, TEVATRON[1]],
        [{**TEVATRON_CORPUS[0], **document}, *TEVATRON_CORPUS[1:]],
    )
    with pytest.raises(UserError, match=message):
        plain(changed)


# ------------------------------------------------------------------------------------------ triples

TRIPLES = "1185869\t7\t0\n2\t12\t7\n1185869\t12\t0\n"


def triples(folder: Path, text: str = TRIPLES) -> DatasetConfig:
    config = msmarco(folder)
    path = folder / "qidpidtriples.train.full.2.tsv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return DatasetConfig(path=str(path), split=config.split)


def test_triples_of_ids_are_a_row_a_line(tmp_path):
    config = triples(tmp_path / "m")
    bomb, uranium, bread = "The Manhattan Project.", "Uranium was enriched.", "Bread is baked."
    assert plain(config) == [
        ("", "what was enriched", [uranium], [bomb], ["7"], ["0"]),
        ("", "who baked", [bread], [uranium], ["12"], ["7"]),
        ("", "what was enriched", [bread], [bomb], ["12"], ["0"]),
    ]
    names = ["collection.tsv", "queries.dev.small.tsv.gz", "qidpidtriples.train.full.2.tsv.gz"]
    assert [file.name for file in source_files(config)] == names and reading(config) == [
        "format=msmarco-triples"
    ]
    beir = read_beir(config)
    assert beir.qrels == {"1185869": {"7": 1, "12": 1}, "2": {"12": 1}} and len(beir.corpus) == 3
    assert dict(beir.queries) == {"1185869": "what was enriched", "2": "who baked"}
    assert len(plain(DatasetConfig(path=str(tmp_path / "m"), split="dev.small"))) == 2, (
        "the folder is its qrels"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\t12\n", "expected 3 ids between tabs .*, got 2"),
        ("3\t12\t7\n", "query '3' is not among the 2 queries"),
        ("2\t12\t99\n", r"negative\[0\] names document '99', which is not in the corpus"),
        ("2\t7\t7\n", "document '7' is in positive and in negative"),
        ("2\t \t7\n", r"positive\[0\].id ' ' is empty or has spaces"),
    ],
)
def test_faults_of_triples_are_named(text, message, tmp_path):
    with pytest.raises(UserError, match=rf"qidpidtriples.train.full.2.tsv.gz:4: {message}"):
        plain(triples(tmp_path / "m", TRIPLES + text))


def test_triples_of_texts_have_no_header(tmp_path):
    path, findings = tmp_path / "triples.train.small.tsv.gz", Findings()
    path.write_bytes(gzip.compress(b'a "quoted" query\tp one\tn one\nq two\tp two\tn two\n'))
    config = DatasetConfig(path=str(path))
    assert [(r.query, r.pos, r.neg, r.line) for r in read_rows(config, findings)] == [
        ('a "quoted" query', ["p one"], ["n one"], 1), ("q two", ["p two"], ["n two"], 2)
    ]  # fmt: skip
    assert "data sets read as sentence-transformers" in findings.lines()[0]
    assert reading(config) == ["format=sentence-transformers", "container=triples"]
    for text, message in (
        ("a\tb\tc\nd\te\n", ":2: 2 cells and 3 columns"),
        ("query\tpositive\tnegative\na\tb\tc\n", ":1: line 1 names columns, as in no file of triples"),
        ("a\tb\tb\n", ":1: column 'positive' is also column 'negative'"),
        ("", ":1: the file is empty"),
    ):
        path.write_bytes(gzip.compress(text.encode()))
        with pytest.raises(UserError, match=rf"triples.train.small.tsv.gz{message}"):
            plain(config)


# ------------------------------------------------------------------------------------------ contrastors


def test_contrastors_shards_are_those_that_it_counts(tmp_path):
    records = [{"query": f"q{i}", "document": f"d{i}", "negatives": ["n"]} for i in range(4)]
    for number in range(2):
        part = "".join(json.dumps(r) + "\n" for r in records[2 * number :][:2]).encode()
        (tmp_path / f"shard-0000{number}.jsonl.gz").write_bytes(gzip.compress(part))
    counts = {f"shard-0000{number}.jsonl.gz": 2 for number in range(2)}
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    (tmp_path / "offsets.json.gz").write_bytes(gzip.compress(b"{}"))
    config = DatasetConfig(path=str(tmp_path))
    assert [row.query for row in read_rows(config)] == ["q0", "q1", "q2", "q3"]
    (tmp_path / "counts.json").write_text(json.dumps({**counts, "shard-00001.jsonl.gz": 3}))
    with pytest.raises(
        UserError, match=r"shard-00001.jsonl.gz:2: the file has 2 rows, and counts.json says 3"
    ):
        plain(config)
    (tmp_path / "counts.json").write_text(json.dumps({**counts, "shard-00002.jsonl.gz": 1}))
    with pytest.raises(UserError, match=r"1 files of counts.json are not there: shard-00002.jsonl.gz"):
        plain(config)


@pytest.mark.parametrize("options", [{"ignore": ["title"]}, {"columns": ["text"]}, {"source": "x"}], ids=str)
def test_an_option_that_a_format_would_pass_over_is_refused(tmp_path, options):
    path = msmarco(tmp_path / "m").path
    (name,) = options
    with pytest.raises(
        UserError, match=rf"/m: {name} is set, which does nothing for a dataset of the format msm"
    ):
        source_files(DatasetConfig(path=path, split="dev.small", **options))
    rows = lines(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["p"], "neg": []}])
    with pytest.raises(
        UserError, match=r"rows.jsonl: source is set, which does nothing for rows that have their"
    ):
        source_files(DatasetConfig(path=str(rows), source="x"))
