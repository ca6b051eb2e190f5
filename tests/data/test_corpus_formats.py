"""Formats whose texts are in files of their own: published MS MARCO, and Automodel's JSON of ids."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.readers import read_beir, read_rows, source_files, with_tasks
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
