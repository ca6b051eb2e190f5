from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.readers import read_rows, reading
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine import formats
from nemo_embed_core.mine.formats import FORMATS, convert, convert_all
from nemo_embed_core.mine.output import read_mined

ROWS = [
    {
        "query": "a",
        "pos": ["p1", "p2"],
        "neg": ["n1", "n2"],
        "pos_scores": [0.9, 0.8],
        "neg_scores": [0.5, 0.4],
    },
    {"query": "b", "pos": ["p3"], "neg": ["n1"], "pos_scores": [0.7], "neg_scores": [0.6]},
    {"query": "c", "pos": ["n2"], "neg": [], "pos_scores": [0.1], "neg_scores": []},
]


@pytest.fixture
def mined(tmp_path):
    path = tmp_path / "mined.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_flagembedding_reads_every_written_row_under_all_its_options(mined, tmp_path):
    """The examples that FlagEmbedding 1.4's two datasets make (abc/finetune/embedder/AbsDataset.py, followed
    here)."""
    counts = convert(mined, tmp_path / "out.jsonl", "flagembedding", prompt="P ", document_prompt="D ")
    assert counts == {"rows": 2, "left_out": 1}, "a row without negatives is a ZeroDivisionError there"

    def example(row, group_size, instruction, same_dataset):
        query = row["query"]
        if instruction is not None or same_dataset:
            query = "{}{}".format(row.get("prompt", instruction), query)
        indices = list(range(len(row["neg"])))
        if len(indices) < group_size - 1:
            indices *= math.ceil((group_size - 1) / len(indices))
        assert len(row["pos"]) == len(row["pos_scores"]) and len(row["neg"]) == len(row["neg_scores"])
        return query, [row["pos"][0], *(row["neg"][i] for i in indices[: group_size - 1])]

    for instruction, same_dataset in (
        (None, False),
        ("Represent this: ", False),
        (None, True),
        ("Represent this: ", True),
    ):
        examples = [example(row, 4, instruction, same_dataset) for row in lines_of(tmp_path / "out.jsonl")]
        assert examples == [
            ("P a", ["D p1", "D n1", "D n2", "D n1"]),
            ("P b", ["D p3", "D n1", "D n1", "D n1"]),
        ]


def test_our_readers_read_what_is_written_for_others(mined, tmp_path):
    names = {"flagembedding": ".jsonl", "tevatron": ".jsonl", "sentence-transformers": ".parquet"}
    for form, suffix in names.items():
        path = tmp_path / f"out{suffix}"
        convert(mined, path, form, num_negatives=1, prompt="P ", document_prompt="D ")
        config = DatasetConfig(path=str(path), task="not for flagembedding")
        got = [(row.query, row.pos, row.neg, row.prompt) for row in read_rows(config)]
        right = [("P a", ["D p1", "D p2"], ["D n1", "D n2"]), ("P b", ["D p3"], ["D n1"])]
        if form == "sentence-transformers":
            right = [("P a", ["D p1"], ["D n1"]), ("P a", ["D p2"], ["D n1"]), ("P b", ["D p3"], ["D n1"])]
        own = "" if form == "flagembedding" else None  # the prompt stands in the text already
        assert got == [(*row, own) for row in right], form
        assert reading(config)[0] == f"format={form}"


def test_tevatron_reads_the_texts_as_they_are(mined, tmp_path):
    """The examples of Tevatron 2 (retriever/dataset.py) and 0.1 (datasets/preprocessor.py), followed here."""
    counts = convert(mined, tmp_path / "out.jsonl", "tevatron", prompt="P ", document_prompt="D ")
    assert counts == {"rows": 2, "left_out": 1}

    def text_of(passage):
        return passage["title"] + " " + passage["text"] if "title" in passage else passage["text"]

    rows = lines_of(tmp_path / "out.jsonl")
    assert [row["query"] for row in rows] == ["P a", "P b"]
    assert [[text_of(p) for p in row["positive_passages"]] for row in rows] == [["D p1", "D p2"], ["D p3"]]
    assert [[text_of(p) for p in row["negative_passages"]] for row in rows] == [["D n1", "D n2"], ["D n1"]]
    assert [[p["score"] for p in row["negative_passages"]] for row in rows] == [[0.5, 0.4], [0.6]]
    first, second = (row["negative_passages"][0]["docid"] for row in rows)
    assert first == second and first != rows[0]["negative_passages"][1]["docid"], "one docid for one text"
    assert rows[0]["query_id"] != rows[1]["query_id"]


def test_ids_of_the_rows_and_of_their_documents_are_kept(tmp_path):
    rows = [{**ROWS[0], "id": "r7", "pos_ids": ["d1", "d2"], "neg_ids": ["d3", "d4"]}, ROWS[1]]
    (tmp_path / "mined.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(tmp_path / "mined.jsonl", tmp_path / "out.jsonl", "tevatron")
    first, second = lines_of(tmp_path / "out.jsonl")
    assert first["query_id"] == "r7" and second["query_id"] == "q1"
    assert [p["docid"] for p in first["positive_passages"] + first["negative_passages"]] == [
        "d1",
        "d2",
        "d3",
        "d4",
    ]
    convert(tmp_path / "mined.jsonl", tmp_path / "out.json", "automodel")
    assert [row["question_id"] for row in json.loads((tmp_path / "out.json").read_text())["data"]] == [
        "r7",
        "q1",
    ]


@pytest.mark.parametrize("form", ["tevatron", "automodel"])
def test_odd_rows_are_read_back_from_what_is_written_for_others(tmp_path, form):
    """Ids of some rows, of which one is the name that another would get, of some documents, and a positive
    that stands twice."""
    odd = {"pos": ["p1", "p1", "p2"], "pos_scores": [0.9, 0.9, 0.8]}
    rows = [{**ROWS[0], **odd, "id": "q1", "neg_ids": [None, "d4"]}, ROWS[1]]
    (tmp_path / "mined.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(tmp_path / "mined.jsonl", path := tmp_path / f"out{FORMATS[form].SUFFIX}", form)
    first, second = read_rows(DatasetConfig(path=str(path)))
    assert first.id == "q1" and second.id not in ("q1", "") and [*dict.fromkeys(first.pos)] == ["p1", "p2"]
    assert dict(zip(first.pos, first.pos_scores, strict=True)) == {"p1": 0.9, "p2": 0.8}
    assert first.neg == ROWS[0]["neg"] and all(first.neg_ids)
    rows = [ROWS[1], rows[0] | {"id": "q0"}]
    (tmp_path / "mined.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="id 'q0' is the id of another row, maybe of one without: make ids"):
        convert(tmp_path / "mined.jsonl", tmp_path / "no.json", form)


def test_sentence_transformers_rows_are_whole_tuples_one_per_positive(mined, tmp_path):
    counts = convert(mined, tmp_path / "out.parquet", "sentence-transformers", num_negatives=2, prompt="P ")
    assert counts == {"rows": 1, "left_out": 2}
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [r["positive"] for r in table] == ["p1", "p2"]
    assert [r["scores"] for r in table] == [[0.9, 0.5, 0.4], [0.8, 0.5, 0.4]]
    assert all((r["query"], r["negative_1"], r["negative_2"]) == ("P a", "n1", "n2") for r in table)


@pytest.mark.parametrize("loss_name", ["MultipleNegativesRankingLoss", "DistillKLDivLoss"])
def test_two_steps_in_sentence_transformers(mined, tmp_path, loss_name):
    """Its collator and its losses: one that learns from texts alone, and one from the scores too."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    convert(mined, tmp_path / "out.parquet", "sentence-transformers", num_negatives=2)
    words = {word: i for i, word in enumerate(("?", "a", "b", "n1", "n2", "p1", "p2"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    # What its Trainer does with a batch: columns that are not labels are texts, in their order
    # (Trainer.collect_features).
    batch = SentenceTransformerDataCollator(model.preprocess)(
        pq.read_table(tmp_path / "out.parquet").to_pylist()
    )
    torch.testing.assert_close(batch["label"], torch.tensor([[0.9, 0.5, 0.4], [0.8, 0.5, 0.4]]))
    columns = ("query", "positive", "negative_1", "negative_2")
    features = [
        {key.removeprefix(f"{c}_"): value for key, value in batch.items() if key.startswith(f"{c}_")}
        for c in columns
    ]
    assert sum(len(part) for part in features) == len(batch) - 1, (
        "every other column is one of the four texts"
    )
    loss_of = getattr(losses, loss_name)(model)
    optimizer, values = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(2):
        loss = loss_of(features, batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[1] < values[0]


def test_automodel_ids_lead_to_the_texts(mined, tmp_path):
    """What its load_datasets and TextQADataset make of it (components/datasets/llm/retrieval_dataset.py,
    followed here)."""
    from datasets import load_dataset

    counts = convert(mined, tmp_path / "out.json", "automodel", prompt="Q: ", document_prompt="D ")
    assert counts == {"rows": 2, "left_out": 1}
    whole = json.loads((tmp_path / "out.json").read_text())
    corpus = tmp_path / whole["corpus"][0]["path"]
    # Not the metadata beside it.
    loaded = load_dataset(str(corpus), cache_dir=str(tmp_path / "cache"))["train"]
    texts = dict(zip(loaded["id"], loaded["text"], strict=True))
    metadata = json.loads((corpus / "merlin_metadata.json").read_text())
    assert metadata["class"] == "TextQADataset" and metadata["corpus_id"] == whole["data"][0]["corpus_id"]
    for row, want in zip(whole["data"], ROWS[:2], strict=True):
        assert isinstance(row["question_id"], str) and row["pos_doc"] and row["neg_doc"]
        for use_dataset_instruction in (False, True):
            instruction = metadata["query_instruction"] if use_dataset_instruction else ""
            question = f"{instruction} {row['question']}" if instruction else row["question"]
            assert question == "Q: " + want["query"]
        assert metadata["passage_instruction"] == ""
        assert [texts[d["id"]] for d in row["pos_doc"]] == ["D " + text for text in want["pos"]]
        assert [texts[d["id"]] for d in row["neg_doc"]] == ["D " + text for text in want["neg"]]
        assert [d["score"] for d in row["pos_doc"] + row["neg_doc"]] == want["pos_scores"] + want[
            "neg_scores"
        ]
    assert len(texts) == len(loaded) == 5 and not list(tmp_path.glob(".*")), (
        "every text once, and nothing left behind"
    )


def test_automodel_trains_on_files_of_one_name_together(tmp_path):
    """It refuses two folders under one corpus_id, and takes documents of one id for one document, whatever
    their corpus."""
    found = []
    for name, row in ("a", ROWS[0]), ("b", {**ROWS[1], "pos_ids": ["d1"], "neg_ids": ["d2"]}):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mined.jsonl").write_text(json.dumps(row) + "\n")
        convert(tmp_path / name / "mined.jsonl", tmp_path / name / "out.json", "automodel")
        found.append(json.loads((tmp_path / name / "out.json").read_text())["data"][0])
    first, second = found
    assert first["corpus_id"] != second["corpus_id"]
    assert first["neg_doc"][0]["id"] == second["neg_doc"][0]["id"] != second["pos_doc"][0]["id"], "n1 is n1"
    assert second["pos_doc"][0]["id"] not in [d["id"] for d in first["pos_doc"] + first["neg_doc"]], (
        "p3 is new"
    )


def test_one_format_that_cannot_be_written_does_not_end_the_others(mined, tmp_path, monkeypatch):
    (tmp_path / "mined.jsonl.tevatron.jsonl").mkdir()  # a folder is in the way
    said, read = [], []
    monkeypatch.setattr(formats, "read_mined", lambda path: read.append(path) or read_mined(path))
    failed = convert_all(mined, list(FORMATS), said.append, num_negatives=3)
    assert len(read) == 1 + len(FORMATS) - 1, "counted once, and written but the one that cannot be"
    assert sorted(failed) == [f"{mined}.sentence-transformers.parquet", f"{mined}.tevatron.jsonl"]
    assert "none of 3 rows has the 3 negatives that sentence-transformers needs; the most is 2" in " ".join(
        said
    )
    assert f"wrote {mined}.flagembedding.jsonl: 2 rows, 1 left out (too few negatives)" in said
    assert len(lines_of(tmp_path / "mined.jsonl.flagembedding.jsonl")) == 2
    assert len(json.loads((tmp_path / "mined.jsonl.automodel.json").read_text())["data"]) == 2


@pytest.mark.parametrize("form", FORMATS)
def test_large_files_pass_in_groups_and_come_out_the_same(tmp_path, monkeypatch, form):
    rows = [
        {
            "query": f"q {i}",
            "pos": [f"p {i}"],
            "neg": [f"n {i % 7}", f"n {i}"],
            "pos_scores": [0.5],
            "neg_scores": [0.4, 0.3],
        }
        for i in range(40)
    ]
    (tmp_path / "mined.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def content(name):
        convert(tmp_path / "mined.jsonl", tmp_path / name / "out", form, num_negatives=2)
        found = {}
        for path in sorted((tmp_path / name).rglob("*")):
            if path.is_file():
                is_parquet = path.name == "train.parquet" or form == "sentence-transformers"
                found[path.name] = pq.read_table(path).to_pylist() if is_parquet else path.read_text()
        return found

    for name in ("whole", "grouped", "long"):
        (tmp_path / name).mkdir()
    whole = content("whole")
    monkeypatch.setattr("nemo_embed_core.data.formats.writing.ROWS_PER_GROUP", 7)
    assert content("grouped") == whole and whole
    monkeypatch.setattr("nemo_embed_core.data.formats.writing.CHARACTERS_PER_GROUP", 50)
    assert content("long") == whole


def test_format_that_would_be_empty_or_is_unknown_is_refused(mined, tmp_path):
    with pytest.raises(UserError, match="none of 3 rows has the 9 negatives"):
        convert(mined, tmp_path / "x", "sentence-transformers", num_negatives=9)
    with pytest.raises(UserError, match="tevatron"):
        convert(mined, tmp_path / "x", "parquet")
