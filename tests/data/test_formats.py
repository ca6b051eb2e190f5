"""Rows of every format as its documentation writes them (golden.py), and near misses."""

import json
import random
from pathlib import Path

import pytest
from fuzz import as_bytes
from golden import GOLDEN

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data import rows as row_formats
from nemo_embed_core.data.readers import Findings, Row, read_rows, reading, source_files
from nemo_embed_core.errors import DataError, UserError


def row_of(path: Path, line: int, query: str, pos: list[str], neg: list[str], more: dict) -> Row:
    return Row(query, pos, neg, str(path), line)._replace(**more)


def same(got: Row, right: Row) -> bool:
    return [list(v) if isinstance(v, tuple) else v for v in got] == [
        list(v) if isinstance(v, tuple) else v for v in right
    ]


def jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def rows_of(path: object, **options: object) -> list[Row]:
    return list(read_rows(DatasetConfig(path=str(path), **options), graded=True))


def uniform(records: list[dict]) -> list[list[dict]]:
    """Groups of records with the same fields in the same order."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record), []).append(record)
    return list(groups.values())


# ------------------------------------------------------------------------------------------ rows and fields


@pytest.mark.parametrize("name", GOLDEN)
def test_rows_as_the_peer_documents_them(tmp_path: Path, name: str) -> None:
    tables = [[pair] for pair in GOLDEN[name]] if name != "labels" else [GOLDEN[name]]
    for i, table in enumerate(tables):
        path, findings = jsonl(tmp_path / f"{i}.jsonl", [record for record, _ in table]), Findings()
        got = list(read_rows(DatasetConfig(path=str(path)), findings, graded=True))
        right = [row_of(path, line, *values) for line, (_, values) in enumerate(table, 1)]
        assert len(got) == len(right) and all(map(same, got, right)), (got, right)
        said = [f"data sets read as {name} (set their format where it is another): 1 (first: {path}:1)"]
        assert findings.lines() == (said if name != "ours" else [])
        assert rows_of(path, format=name) == got, "named, and not sniffed"
        assert source_files(DatasetConfig(path=str(path))) == [path]
        if name == "flagembedding":
            path.rename(named := tmp_path / f"{i}_no_in_batch_neg.jsonl")
            list(read_rows(DatasetConfig(path=str(named)), findings))
            said = [line for line in findings.lines() if "used all the same (loss.in_batch): 1" in line]
            assert len(said) == 1
            named.rename(path)
        grouped = ["groups"] if name == "ours" and "group" in table[0][0] else []
        assert reading(DatasetConfig(path=str(path))) == (grouped if name == "ours" else [f"format={name}"])


def test_no_two_formats_take_the_same_record() -> None:
    for name, table in GOLDEN.items():
        for record, _ in table:
            taken = [one.NAME for one in row_formats.FORMATS if one.sniff(record)]
            assert taken == [name], (record, taken)
    rng = random.Random(0)
    fields = sorted(
        {
            (key, json.dumps(value))
            for table in GOLDEN.values()
            for record, _ in table
            for key, value in record.items()
        }
    )
    for _ in range(20_000):  # any mix of their fields: one takes it or none
        record = {key: json.loads(value) for key, value in rng.sample(fields, rng.randint(1, 4))}
        taken = [one.NAME for one in row_formats.FORMATS if one.sniff(record)]
        if len(taken) > 1:
            with pytest.raises(
                ValueError, match=rf"{taken[0]} and {taken[1]}.*: set the dataset's format to one"
            ):
                row_formats._sniffed(record)


def test_a_row_of_two_formats_needs_the_name_of_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"query": "q", "pos": ["p"], "neg": [], "response": "r"}])
    for look in (rows_of, lambda path: reading(DatasetConfig(path=str(path)))):
        with pytest.raises(DataError, match=r"d\.jsonl:1: fields .* are those of ours and ms-swift: set the"):
            look(path)
    assert [row.pos for row in rows_of(path, format="ours", ignore=["response"])] == [["p"]]


# record -> the reason, of what is nearly a row
NEAR = {
    "ours, a string": (
        {"query": "q", "pos": "p", "neg": []},
        "field 'pos' must be a list of strings, got a string",
    ),
    "flagembedding, prompt a list": (
        {"query": "q", "pos": ["p"], "neg": [], "prompt": []},
        "field 'prompt' must be a string",
    ),
    "flagembedding, type null": (
        {"query": "q", "pos": ["p"], "neg": [], "type": None},
        "field 'type' must be a string",
    ),
    "flagembedding, unknown field": (
        {"query": "q", "pos": ["p"], "neg": [], "prompt": "x", "source": "nq"},
        "unknown fields ['source']",
    ),
    "st, an id left over": (
        {"anchor": "a", "positive": "p", "id": "1"},
        "columns ['id']: the library would take each for a negative",
    ),
    "st, a label": (
        {"premise": "a", "hypothesis": "b", "label": 1},
        "set the dataset's format to sts and min_grade",
    ),
    "st, a pair class": (
        {"sentence1": "a", "sentence2": "b", "label": 0},
        "column 'label' makes it a pair with a label (0)",
    ),
    "st, a null": ({"anchor": "a", "positive": None}, "field 'positive' must be a string, got null"),
    "st, too few scores": (
        {"query": "a", "positive": "p", "negative": "n", "scores": [1.0]},
        "must be a list of 2 numbers",
    ),
    "st, a positive again": (
        {"anchor": "a", "positive": "p", "negative_1": "n", "negative_2": "p"},
        "column 'positive' is also column 'negative_2'",
    ),
    "tevatron, ids": (
        {"query_id": "1", "query": "q", "positive_passages": [{"docid": "7"}], "negative_passages": []},
        "positive_passages[0] has no field 'text'",
    ),
    "tevatron, strings": (
        {"query_id": "1", "query": "q", "positive_passages": ["p"], "negative_passages": []},
        "positive_passages[0] must be an object",
    ),
    "tevatron, no negatives": (
        {"query_id": "1", "query": "q", "positive_passages": [{"docid": "7", "text": "p"}]},
        "field 'negative_passages' is missing: write \"negative_passages\": []",
    ),
    "tevatron, empty": (
        {
            "query_id": "1",
            "query": "q",
            "positive_passages": [{"docid": "7", "title": " ", "text": ""}],
            "negative_passages": [],
        },
        "positive_passages[0].text' is empty",
    ),
    "automodel, both": (
        {"query": "q", "question": "q", "pos_doc": "p", "neg_doc": []},
        "either 'query' or 'question'",
    ),
    "automodel, ids": (
        {"question": "q", "pos_doc": [{"id": "1"}], "neg_doc": []},
        "pos_doc[0] has an id and no text",
    ),
    "automodel, a positive again": (
        {"question": "q", "pos_doc": {"text": "p"}, "neg_doc": ["n", "p"]},
        "pos_doc[0] is also neg_doc[1]",
    ),
    "automodel, no positive": (
        {"question": "q", "pos_doc": [], "neg_doc": ["n"]},
        "field 'pos_doc' is empty",
    ),
    "contrastors, another objective": (
        {"query": "q", "document": "p", "metadata": {"objective": {"self": ["document"]}}},
        "metadata.objective self is of ['document']",
    ),
    "contrastors, a string": (
        {"query": "q", "document": "p", "negatives": "n"},
        "field 'negatives' must be a list of strings",
    ),
    "f2llm, a gap": (
        {"query": "q", "passage": "p", "negative_1": "n", "negative_3": "m"},
        "not numbered from 1 to 2",
    ),
    "f2llm, tokenised": (
        {"query": "q", "passage": "p", "query_input_ids": [1]},
        "unknown fields ['query_input_ids']",
    ),
    "ms-swift, a conversation": (
        {
            "messages": [{"role": "user", "content": "q"}] * 2,
            "positive_messages": [[{"role": "user", "content": "p"}]],
        },
        "field 'messages' must be one message, got 2 messages",
    ),
    "ms-swift, a system prompt": (
        {
            "messages": [{"role": "system", "content": "q"}],
            "positive_messages": [[{"role": "user", "content": "p"}]],
        },
        "messages[0].role must be user or assistant",
    ),
    "ms-swift, a label": ({"query": "q", "response": "p", "label": 0.8}, "makes it a graded pair"),
    "sts, a text": (
        {"sentence1": "a", "sentence2": "b", "score": "high"},
        "score must be a finite number, got 'high'",
    ),
    "sts, more columns": ({"sentence1": "a", "sentence2": "b", "score": 1.0, "split": "x"}, "ignore others"),
    "labels, a number": (
        {"text": "a", "label": 3},
        "label 3 is a number, which names no class: add label_text",
    ),
    "labels, only one": ({"text": "a", "label": "x"}, "all rows have the label 'x'"),
    "labels, a space": (
        {"text": "a", "label": "refund "},
        "field 'label' 'refund ' has spaces around the class's name",
    ),
    "f2llm, unknown": (
        {"query": "q", "passage": "p", "negative_1": "n", "url": "x"},
        "unknown fields ['url']: remove them, or name them in the dataset's ignore (known: query, passage, ",
    ),
    "contrastors, unknown and in another case": (
        {"query": "q", "document": "p", "Negatives": ["n"], "url": "x"},
        "ignore (known: query, document, negatives, metadata); 'Negatives' is called negatives",
    ),
    "labels, null": ({"text": "a", "label": None}, "field 'label' must be a string or an integer, got null"),
    "bitext, empty": ({"en": "a", "de": " "}, "field 'de' is empty or only spaces"),
    "bitext, three": ({"translation": {"en": "a", "de": "b", "fr": "c"}}, "bitext has two"),
    "ours, a score that no fp32 holds": (
        {"query": "q", "pos": ["p"], "neg": [], "pos_scores": [3.5e38]},
        "pos_scores[0] must be a finite number, got 3.5e+38; fp32 has room for 3.403e+38",
    ),
    "flagembedding, a prompt with words behind the text": (
        {"query": "q", "pos": ["p"], "neg": [], "prompt": "about {text}, find"},
        "task 'about {text}, find': {text} has to be its end",
    ),
    "none": (
        {"title": "a", "body": "b"},
        "not a training row: it has ['body', 'title'] and no query, pos, neg",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_say_what_to_change(tmp_path: Path, name: str) -> None:
    record, reason = NEAR[name]
    path = jsonl(tmp_path / "d.jsonl", [record])
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert str(caught.value).startswith(f"{path}:1: ") and reason in str(caught.value)


def test_ignored_fields_are_not_read_and_named_formats_take_any_columns(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "d.jsonl",
        [{"title": "a", "body": "b", "url": "x"}, {"body": "d", "url": "y", "title": "c"}],
    )
    options = {"format": "sentence-transformers", "ignore": ["url"]}
    assert [(row.query, row.pos) for row in rows_of(path, **options)] == [("a", ["b"]), ("c", ["d"])]
    config = DatasetConfig(path=str(path), **options)
    assert reading(config) == ["format=sentence-transformers", "ignore=url"]
    with pytest.raises(DataError, match=r"d\.jsonl:1: columns \['url'\]"):
        rows_of(path, format="sentence-transformers")
    with pytest.raises(
        UserError, match=r"format='st' is none of beir, .*flagembedding, sentence-transformers, "
    ):
        rows_of(path, format="st")
    jsonl(path, [{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": "d", "negative": "n"}])
    with pytest.raises(
        DataError, match=r":2: columns .* are not those of the first row .*, \['anchor', 'positive'\]"
    ):
        rows_of(path)


def test_what_is_unknown_and_what_is_missing_is_said_together(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"query": "q", "Passage": "p", "url": "x"}])
    with pytest.raises(DataError) as caught:
        rows_of(path, format="f2llm")
    right = (
        "not a training row: it has ['Passage', 'url'] and no passage; write rows like "
        '{"query": "...", "passage": "...", "negative_1": "..."}; \'Passage\' is called passage'
    )
    assert str(caught.value) == f"{path}:1: {right}"
    with pytest.raises(DataError, match=r":1: field 'passage' is missing$"):
        rows_of(path, format="f2llm", ignore=["url", "Passage"])


def test_translations_are_read_in_one_order_whatever_the_order_of_their_keys(tmp_path: Path) -> None:
    pairs = [{"en": "dog", "de": "Hund"}, {"de": "Katze", "en": "cat"}]
    path = jsonl(tmp_path / "d.jsonl", [{"translation": pair} for pair in pairs])
    there = [("dog", ["Hund"], "en"), ("cat", ["Katze"], "en")]
    back = [(pos[0], [query], "de") for query, pos, _ in there]
    assert [(row.query, row.pos, row.lang) for row in rows_of(path)] == there
    assert [(row.query, row.pos, row.lang) for row in rows_of(path, columns=["de", "en"])] == back
    jsonl(path, [{"translation": pairs[0]}, {"translation": {"en": "cat", "fr": "chat"}}])
    with pytest.raises(DataError, match=r":2: columns \['en', 'fr'\] are not those of the first row"):
        rows_of(path)


def test_columns_are_read_in_the_order_that_the_dataset_says(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"en": "dog", "de": "Hund"}, {"de": "Katze", "en": "cat"}])
    assert [(row.query, row.pos, row.lang) for row in rows_of(path)] == [
        ("dog", ["Hund"], "en"),
        ("cat", ["Katze"], "en"),
    ]
    config = DatasetConfig(path=str(path), columns=["de", "en"])
    assert [(row.query, row.pos, row.lang) for row in read_rows(config)] == [
        ("Hund", ["dog"], "de"),
        ("Katze", ["cat"], "de"),
    ]
    assert reading(config) == ["format=bitext", "columns=de,en"]
    with pytest.raises(DataError, match=r":1: columns \['en', 'de'\] are not those .*, \['de', 'fr'\]"):
        rows_of(path, columns=["de", "fr"])
    ours = jsonl(tmp_path / "o.jsonl", [{"query": "q", "pos": ["p"], "neg": []}])
    with pytest.raises(DataError, match=r":1: the dataset's columns are set, and ours reads fields by their"):
        rows_of(ours, columns=["query", "pos", "neg"])


def test_graded_pairs_need_the_grade_from_which_they_belong_together(tmp_path: Path) -> None:
    records = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i / 2} for i in range(6)]
    path, findings = jsonl(tmp_path / "sts.jsonl", records), Findings()
    with pytest.raises(
        DataError, match=r"sts\.jsonl:1: a graded pair \(grade 0\).*: set the dataset's min_grade"
    ):
        list(read_rows(DatasetConfig(path=str(path))))
    config = DatasetConfig(path=str(path), min_grade=1.5)
    assert [(row.query, row.line) for row in read_rows(config, findings)] == [("a3", 4), ("a4", 5), ("a5", 6)]
    assert findings.counts["pairs with a grade below min_grade=1.5, left out"] == 3
    assert reading(config) == ["format=sts", "min_grade=1.5"]
    table = tmp_path / "sts.csv"
    table.write_bytes(as_bytes(table.name, records))
    assert [row.grade for row in rows_of(table)] == [i / 2 for i in range(6)], (
        "a cell is text, a grade a number"
    )
    table.write_text("sentence1,sentence2,score\na,b,high\n")
    with pytest.raises(DataError, match=r"sts\.csv:2: score must be a finite number, got 'high'"):
        rows_of(table)
    with pytest.raises(DataError, match=r"no row is left: none has a grade of min_grade=9"):
        list(read_rows(DatasetConfig(path=str(path), min_grade=9.0)))
    ours = jsonl(tmp_path / "ours.jsonl", [{"query": "q", "pos": ["p"], "neg": []}])
    with pytest.raises(
        DataError, match=r"ours\.jsonl:1: a row without a grade, and the dataset's min_grade is set"
    ):
        list(read_rows(DatasetConfig(path=str(ours), min_grade=1.0)))
    pairs = jsonl(
        tmp_path / "pairs.jsonl",
        [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "c", "sentence2": "d", "label": 0}],
    )
    got = read_rows(DatasetConfig(path=str(pairs), format="sts", min_grade=1.0))
    assert [row.query for row in got] == ["a"]


def test_columns_are_what_the_datasets_library_reads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for name, table in GOLDEN.items():
        for i, records in enumerate(uniform([record for record, _ in table])):
            if name == "labels" and len(records) < 2:
                continue
            path = jsonl(tmp_path / f"{name}{i}.jsonl", records)
            theirs = datasets.Dataset.from_list(records)
            folder = tmp_path / f"{name}{i}"
            theirs.save_to_disk(folder)
            theirs.to_parquet(tmp_path / f"{name}{i}.parquet")
            right = [row[:3] + row[5:] for row in rows_of(path)]
            for other in (folder, tmp_path / f"{name}{i}.parquet"):
                assert [row[:3] + row[5:] for row in rows_of(other)] == right, (name, other)
