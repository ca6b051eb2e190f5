"""Small files as they occur outside, with what is right: read as meant and said, or refused by line with what
to change."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data import lines, readers
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.readers import (
    Findings,
    check_sources,
    read_beir,
    read_documents,
    read_rows,
    reading,
)
from nemo_embed_core.errors import DataError, UserError

Q1 = '{"query": "q one", "pos": ["p one"], "neg": ["n one"]}\n'
ROW1 = ("q one", ["p one"], ["n one"])


def texts_row(query: str = "q", pos: str = "p", neg: str = "n") -> str:
    return json.dumps({"query": query, "pos": [pos], "neg": [neg]}, ensure_ascii=False) + "\n"


def one(query: str = "q", pos: str = "p", neg: str = "n") -> list[tuple[str, list[str], list[str]]]:
    return [(query, [pos], [neg])]


NOISE = "queries without content (zero-width, control or replacement characters only): 1 (first: "
# content -> rows read, or (line, fragments of the message)
JSONL = {
    "blank last line": (Q1 + "\n", (2, "blank line: remove it")),
    "blank middle": (Q1 + "\n" + Q1, (2, "blank line: remove it")),
    "byte order mark": (b"\xef\xbb\xbf" + Q1.encode(), [ROW1]),
    "comment line": ("// made by x\n" + Q1, (1, "not JSON: Expecting value")),
    "carriage returns only": (Q1.replace("\n", "\r") * 2, (1, r"lines end in \r alone: convert it with tr")),
    "carriage returns too": (Q1.replace("\n", "\r\n") * 2, [ROW1, ROW1]),
    "duplicate rows": (Q1 * 3, [ROW1] * 3),
    "empty": ("", (1, "the file is empty")),
    "extra columns": ('{"query": "q", "pos": ["p"], "neg": [], "source": "nq", "type": "x"}\n', (1, "unknown fields ['source']: remove them")),
    "gzip named jsonl": (gzip.compress(Q1.encode()), (1, "gzip data: rename it to .jsonl.gz")),
    "zeros after .gz": (gzip.compress(Q1.encode()) + bytes(512), [ROW1]),
    "two members .gz": (gzip.compress(Q1.encode()) * 2, [ROW1, ROW1]),
    "truncated .gz": (gzip.compress(Q1.encode())[:-4], (2, "the gzip stream ends early")),
    "plain named .gz": (Q1, (1, "not a whole gzip file", "rename it")),
    "id twice": ('{"query": "q", "pos": ["p"], "neg": [], "id": 1}\n{"query": "q2", "pos": ["p"], "neg": [], "id": "1"}\n', (2, "id '1' is already the id of line 1")),
    "latin-1": ('{"query": "café", "pos": ["p"], "neg": []}\n'.encode("latin-1"), (1, "not UTF-8: byte 0xe9 at byte 15", "iconv -f ISO-8859-1")),
    "utf-16": (Q1.encode("utf-16"), (1, "UTF-16 text: convert it with iconv -f UTF-16")),
    "utf-16 without a mark": (Q1.encode("utf-16-le"), (1, "UTF-16 text: convert it")),
    "utf-16 big endian": (Q1.encode("utf-16-be"), (1, "UTF-16 text: convert it")),
    "lone surrogate": ('{"query": "x\\ud83d", "pos": ["p"], "neg": ["n"]}\n', (1, "lone surrogate at character 2")),
    "surrogate pair": ('{"query": "x\\ud83d\\ude00", "pos": ["p"], "neg": ["n"]}\n', one("x\U0001f600")),
    "NaN score": ('{"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": [NaN]}\n', (1, "NaN is not JSON")),
    "no-break spaces only": (texts_row("\xa0\u2003"), (1, "field 'query' is empty or only spaces")),
    "empty negative": (texts_row(neg=""), (1, "field 'neg[0]' is empty")),
    "null negative": ('{"query": "q", "pos": ["p"], "neg": [null]}\n', (1, "field 'neg[0]' must be a string, got null")),
    "neg missing": ('{"query": "q", "pos": ["p"]}\n', (1, 'field \'neg\' is missing: write "neg": []')),
    "neg null": ('{"query": "q", "pos": ["p"], "neg": null}\n', (1, "must be a list of strings, got null")),
    "pos an object": ('{"query": "q", "pos": [{"text": "p"}], "neg": []}\n', (1, "field 'pos[0]' must be a string, got an object")),
    "pos a string": ('{"query": "q", "pos": "put it in water", "neg": ["n"]}\n', (1, "field 'pos' must be a list of strings, got a string")),
    "no last newline": (Q1[:-1], [ROW1]),
    "number as text": ('{"query": 42, "pos": ["p"], "neg": []}\n', (1, "field 'query' must be a string, got a number (int)")),
    "nul inside": ('{"query": "a\\u0000b", "pos": ["p"], "neg": ["n"]}\n', one("a\x00b")),
    "raw control character": ('{"query": "a\tb", "pos": ["p"], "neg": ["n"]}\n', (1, "not JSON: Invalid control character")),
    "words that are no values": (texts_row("null", "NaN", "None"), one("null", "NaN", "None")),
    "nul only": ('{"query": "\\u0000", "pos": ["p"], "neg": ["n"]}\n', one("\x00"), NOISE),
    "byte order mark as text": (texts_row("\ufeff"), one("\ufeff"), NOISE),
    "replacement characters only": (texts_row("\ufffd\ufffd\ufffd"), one("\ufffd\ufffd\ufffd"), NOISE),
    "zero-width positive": (texts_row(pos="\u200b\u200d"), one(pos="\u200b\u200d"), NOISE.replace("queries", "positives")),
    "soft hyphen negative": (texts_row(neg="\xad"), one(neg="\xad"), NOISE.replace("queries", "negatives")),
    "several in one row": ('{"query": "q", "pos": ["p"], "neg": ["\\u200b", "n", "\\ufeff\\u00ad"]}\n', [("q", ["p"], ["\u200b", "n", "\ufeff\xad"])], NOISE.replace("queries", "negatives").replace(": 1 (", ": 2 (")),
    "content after much noise": (texts_row("\u200b" * 70 + "x"), one("\u200b" * 70 + "x")),
    "differ by case": (texts_row("q", "The answer", "the answer"), one("q", "The answer", "the answer")),
    "positive is negative": ('{"query": "q", "pos": ["p"], "neg": ["n", "p"]}\n', (1, "pos[0] is also neg[1]: remove it")),
    "query is positive": (texts_row("same", "same"), one("same", "same")),
    "query is negative": (texts_row("same", "other", "same"), one("same", "other", "same")),
    "JSON array": ('[\n {"query": "q", "pos": ["p"], "neg": []}\n]\n', (1, "a JSON array: write one object a line")),
    "JSON array on one line": ('[{"query": "q", "pos": ["p"], "neg": []}]\n', (1, "a JSON array: write one object a line")),
    "pretty object": ('{\n "query": "q"\n}\n', (1, "one JSON object over several lines")),
    "prompt behind rows without": (Q1 + '{"query": "q", "pos": ["p"], "neg": [], "prompt": "x"}\n', [ROW1, ("q", ["p"], [])]),
    "type behind rows without": (Q1 + '{"query": "q", "pos": ["p"], "neg": [], "type": "x"}\n', (2, "unknown fields ['type']", "the dataset's format flagembedding")),
    "label": ('{"query": "q", "pos": ["p"], "neg": [], "label": "x"}\n', (1, "unknown fields ['label']", "a class label is called group")),
    "score": ('{"query": "q", "pos": ["p"], "neg": [], "score": 0.5}\n', (1, "unknown fields ['score']", "pos_scores and neg_scores")),
    "query a list": ('{"query": ["i", "q"], "pos": [["", "p"]], "neg": []}\n', (1, "field 'query' must be a string, got a list")),
    "graded pairs": ('{"sentence1": "a", "sentence2": "b", "score": 2.5}\n', (1, "a graded pair (grade 2.5)", "min_grade")),
    "a corpus": ('{"_id": "d1", "text": "a"}\n', (1, "not a training row: it has ['_id', 'text']", "of a BEIR folder give the folder")),
    "surrogate in lang": ('{"query": "q", "pos": ["p"], "neg": [], "lang": "\\ud83d"}\n', (1, "field 'lang' has a lone surrogate")),
    "labelled texts": ('{"text": "a", "label": "b"}\n', (1, "all rows have the label 'b'")),
    "of another tool": ('{"title": "a", "body": "b"}\n', (1, "not a training row: it has ['body', 'title'] and no query, pos, neg", "write rows like")),
    "AutoModel": ('{"corpus": [{"path": "c"}], "data": []}\n', (1, "not a training row")),
    "MS MARCO": ("1185869\twhat is x\t7067032\tpassage\n", (1, "not JSON lines but tab-separated columns (TSV)", '{"query": "...", "pos": ["..."], "neg": []}')),
    "CSV": ("anchor,positive,negative\r\nq,p,n\r\n", (1, "not JSON lines but comma-separated columns (CSV)")),
    "Parquet": (b"PAR1\x15\x04\n\xff", (1, "not JSON lines but a Parquet file")),
    "Arrow stream": (b"\xff\xff\xff\xff\xa8\x01\n", (1, "not JSON lines but an Arrow stream")),
    "Arrow file": (b"ARROW1\0\0\xff", (1, "an Arrow file")),
    "zip": (b"PK\x03\x04\x14\0", (1, "a zip archive or an Excel sheet")),
    "zstd": (b"\x28\xb5\x2f\xfd\0", (1, "Zstandard data: rename it to .jsonl.zst")),
    "tar": (b"train.jsonl".ljust(257, b"\0") + b"ustar\0", (1, "a tar archive")),
    "pickle": (b"\x80\x04\x95\n", (1, "a pickle, which is never opened")),
    "LFS pointer": ("version https://git-lfs.github.com/spec/v1\n", (1, "fetch the file with git lfs pull")),
    "error page": ("<!DOCTYPE html>\n", (1, "HTML or XML")),
}  # fmt: skip


@pytest.mark.parametrize("name", JSONL)
def test_jsonl(tmp_path: Path, name: str) -> None:
    content, right, *said = JSONL[name]
    path = tmp_path / ("d.jsonl.gz" if ".gz" in name else "d.jsonl")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config, findings = DatasetConfig(path=str(path)), Findings()
    rows = [(row.query, row.pos, row.neg) for row in read_rows(config, findings)]
    if isinstance(right, list):
        assert rows == right and findings.named == []
        assert findings.lines() == [f"{text}{path}:1)" for text in said]
        assert [(row.query, row.pos, row.neg) for row in read_rows(config)] == right
        return
    line, *fragments = right
    with pytest.raises(DataError) as caught:
        list(read_rows(config))
    assert findings.named == [str(caught.value)], "strict or not, the first bad line is the same"
    assert findings.named[0].startswith(f"{path}:{line}: ") and "\n" not in findings.named[0]
    for fragment in fragments:
        assert fragment in findings.named[0], findings.named[0]


# ------------------------------------------------------------------------------------------ BEIR folders

H = "query-id\tcorpus-id\tscore\n"
CORPUS = '{"_id": "d1", "title": "T1", "text": "first text"}\n{"_id": "d2", "title": "", "text": "second text"}\n{"_id": "d3", "text": "third"}\n'
QUERIES = '{"_id": "q1", "text": "query one"}\n{"_id": "q2", "text": "query two"}\n'
QRELS = H + "q1\td1\t1\nq2\td2\t1\n"
OK = {"q1": {"d1": 1}, "q2": {"d2": 1}}
GONE = H + "q1\td1\t1\nq2\tGONE\t1\n"
EMPTY = CORPUS + '{"_id": "d4", "title": "", "text": ""}\n'
COLUMNS = "qrels files with other columns than BEIR's, read by their names: 1"
OTHER_NAMES = "qrels files with other names than BEIR's in the header, read by them: 1"
NO_HEADER = "qrels files with no header, read as query-id<TAB>corpus-id<TAB>score: 1"
TREC = "TREC qrels files (4 columns, no header): 1"

# (changed files, qrels as read, what is said) or (changed files, file:line, fragments)
BEIR = {
    "ok": ({}, OK, []),
    "title null": ({"corpus": CORPUS.replace('"T1"', "null")}, OK, ["documents with a null title, read as without: 1 (first: {}/corpus.jsonl:1)"]),
    "text null": ({"corpus": CORPUS.replace('"first text"', "null")}, OK, ["documents with a null text, read as empty: 1 (first: {}/corpus.jsonl:1)"]),
    "text null, no title": ({"corpus": CORPUS.replace('"second text"', "null")}, "corpus.jsonl:2", ["field 'text' must be a string, got null", "on_missing"]),
    "title only": ({"corpus": CORPUS + '{"_id": "d4", "title": "only title", "text": ""}\n'}, OK, []),
    "empty document": ({"corpus": EMPTY}, "corpus.jsonl:4", ["field 'text' is empty", "set on_missing to allow"]),
    "empty query": ({"queries": QUERIES.replace("query two", " ")}, "queries.jsonl:2", ["field 'text' is empty"]),
    "document missing": ({"qrels": GONE}, "test.tsv:3", ["document 'GONE' is not in corpus.jsonl (3 documents); 1 of 2 judgements dangle", "set on_missing to allow"]),
    "query missing": ({"qrels": H + "q1\td1\t1\nQX\td2\t1\n"}, "test.tsv:3", ["query 'QX' is not in queries.jsonl (2 queries); 1 of 2"]),
    "no header": ({"qrels": "q1\td1\t1\nq2\td2\t1\n"}, OK, [NO_HEADER]),
    "no header, spaces": ({"qrels": "q1 d1 1\nq2  d2 1\n"}, OK, [NO_HEADER]),
    "no header, float scores": ({"qrels": "q1\td1\t1.0\nq2\td2\t1.0\n"}, OK, [NO_HEADER]),
    "TREC, spaces": ({"qrels": "q1 0 d1 1\nq2 0 d2 1\n"}, OK, [TREC]),
    "TREC, tabs": ({"qrels": "q1\t0\td1\t1\nq2\tQ0\td2\t1\n"}, OK, [TREC]),
    "TREC, carriage returns": ({"qrels": "q1 0 d1 1\r\nq2 0 d2 1\r\n"}, OK, [TREC]),
    "header in another order": ({"qrels": "score\tquery-id\tcorpus-id\n1\tq1\td1\n1\tq2\td2\n"}, OK, [COLUMNS]),
    "header of TREC's columns": ({"qrels": "qid\titer\tdocid\trel\nq1\t0\td1\t1\nq2\t0\td2\t1\n"}, OK, [COLUMNS]),
    "header with underscores": ({"qrels": QRELS.replace("-id", "_id")}, OK, []),
    "header of other names": ({"qrels": QRELS.replace(H, "query_id\tdoc_id\trelevance\n")}, OK, [OTHER_NAMES]),
    "header of other names, spaces": ({"qrels": QRELS.replace(H, "qid docid rel\n").replace("\t", " ")}, OK, [OTHER_NAMES]),
    "header of names with spaces": ({"qrels": QRELS.replace(H, "Query ID\tDoc ID\tLabel\n")}, OK, [OTHER_NAMES]),
    "header without a name for the score": ({"qrels": QRELS.replace(H, "query_id\tdoc_id\t1\n")}, "test.tsv:1", ["header 'query_id\\tdoc_id\\t1': write query-id<TAB>corpus-id<TAB>score"]),
    "header quoted": ({"qrels": QRELS.replace(H, '"query-id"\t"corpus-id"\t"score"\n')}, OK, []),
    "header with spaces": ({"qrels": QRELS.replace("\t", " ")}, OK, []),
    "score first, no header": ({"qrels": "1\tq1\td1\n"}, "test.tsv:1", ["line 1 is neither the header", "nor a judgement"]),
    "header of 2 columns": ({"qrels": "query-id\tcorpus-id\nq1\td1\n"}, "test.tsv:1", ["write query-id<TAB>corpus-id<TAB>score"]),
    "commas": ({"qrels": QRELS.replace("\t", ",")}, "test.tsv:1", ["separated by commas: write tabs"]),
    "quoted": ({"qrels": H + '"q1"\td1\t1\n'}, "test.tsv:2", ["query '\"q1\"' is not in queries.jsonl", "it is there without the quotes: remove them"]),
    "carriage returns": ({"qrels": QRELS.replace("\n", "\r\n")}, OK, []),
    "byte order mark": ({"qrels": "\ufeff" + QRELS}, OK, []),
    "blank end": ({"qrels": QRELS + "\n"}, "test.tsv:4", ["blank line: remove it"]),
    "pair twice": ({"qrels": H + "q1\td1\t1\nq1\td1\t1\nq2\td2\t1\n"}, "test.tsv:3", ["pair 'q1', 'd1' is already on line 2: keep one"]),
    "float score": ({"qrels": H + "q1\td1\t1.0\nq2\td2\t1.0\n"}, OK, []),
    "JSON judgements": ({"qrels": '{"query-id": "q1", "corpus-id": "d1", "score": 1}\n'}, "test.tsv:1", ["JSON: judgements are lines query-id<TAB>corpus-id<TAB>score"]),
    "UTF-16 judgements": ({"qrels": "q\0001\000\t\000d\0001\000\t\0001\000\n\000"}, "test.tsv:1", ["not tab-separated text but UTF-16 text"]),
    "Parquet judgements": ({"qrels": "PAR1\x15\x04\n"}, "test.tsv:1", ["not tab-separated text but a Parquet file"]),
    "surrogate in lang": ({"queries": QUERIES.replace("}", ', "lang": "\\ud83d"}', 1)}, "queries.jsonl:1", ["field 'lang' has a lone surrogate"]),
    "half a score": ({"qrels": H + "q1\td1\t0.5\n"}, "test.tsv:2", ["score must be a whole number, got '0.5'"]),
    "graded": ({"qrels": H + "q1\td1\t3\nq1\td2\t1\nq2\td2\t2\n"}, {"q1": {"d1": 3, "d2": 1}, "q2": {"d2": 2}}, []),
    "judged irrelevant": ({"qrels": H + "q1\td1\t1\nq1\td2\t0\nq2\td2\t2\nq2\td3\t-1\n"}, {"q1": {"d1": 1, "d2": 0}, "q2": {"d2": 2, "d3": -1}}, []),
    "only a header": ({"qrels": H}, "test.tsv:1", ["no judgements"]),
    "other ids": ({"qrels": H + "x1\td1\t1\nx2\td2\t1\n"}, "test.tsv:2", ["2 of 2 judgements dangle"]),
    "document id twice": ({"corpus": CORPUS + '{"_id": "d1", "text": "again"}\n'}, "corpus.jsonl:4", ["_id 'd1' is already the _id of line 1"]),
    "document text twice": ({"corpus": CORPUS + '{"_id": "d9", "text": "third"}\n'}, OK, []),
    "id for _id": ({"corpus": CORPUS.replace('"_id": "d2"', '"id": "d2"')}, "corpus.jsonl:2", ["field '_id' is missing: rename id to _id"]),
    "id a float": ({"corpus": CORPUS.replace('"d2"', "2.0")}, "corpus.jsonl:2", ["_id must be a string or an integer, got a number (float)"]),
    "ids are numbers": ({name: text.replace('"d2"', "2").replace("d2", "2") for name, text in (("corpus", CORPUS), ("qrels", QRELS))}, {"q1": {"d1": 1}, "q2": {"2": 1}}, []),
    "space inside an id": ({name: text.replace("d2", "d 2") for name, text in (("corpus", CORPUS), ("qrels", QRELS))}, {"q1": {"d1": 1}, "q2": {"d 2": 1}}, []),
    "space after an id": ({name: text.replace("d2", "d2 ") for name, text in (("corpus", CORPUS), ("qrels", QRELS))}, "corpus.jsonl:2", ["_id 'd2 ' is empty or has spaces around it"]),
    "text missing": ({"corpus": CORPUS.replace('"text": "third"', '"title": "t"')}, "corpus.jsonl:3", ["field 'text' is missing"]),
    "nested metadata": ({"queries": QUERIES.replace("}", ', "metadata": {"a": []}}')}, OK, []),
    "unjudged queries": ({"queries": QUERIES + '{"_id": "q3", "text": "never judged"}\n'}, OK, []),
    "query is a document": ({"corpus": CORPUS + '{"_id": "q1", "text": "query one"}\n'}, OK, []),
    "a corpus of CSV": ({"corpus": "id,text\nd1,x\n"}, "corpus.jsonl:1", ["not JSON lines but comma-separated columns", '{"_id": "...", "text": "..."}']),
    "zero-width document": ({"corpus": CORPUS.replace("third", "\u200b")}, OK, ["documents without content (zero-width, control or replacement characters only): 1"]),
}  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    names = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.tsv"}
    for name, content in ({"corpus": CORPUS, "queries": QUERIES, "qrels": QRELS} | files).items():
        (folder / names[name]).write_text(content, encoding="utf-8", newline="")
    return folder


@pytest.mark.parametrize("name", BEIR)
def test_beir(tmp_path: Path, name: str) -> None:
    changes, right, said = BEIR[name]
    folder = write(tmp_path / "beir", changes)
    config = DatasetConfig(path=str(folder), split="test")
    if isinstance(right, str):
        for read in (
            lambda: read_beir(DatasetConfig(path=str(folder), split="test")),
            lambda: list(read_rows(config)),
            lambda: check_sources([config]),
        ):
            with pytest.raises(DataError) as caught:
                read()
            found = [line for line in str(caught.value).splitlines() if f"{right}: " in line]
            assert len(found) == 1 and all(fragment in found[0] for fragment in said), str(caught.value)
            assert len(str(caught.value).splitlines()) in (1, 3), (
                "one fault (in two files) does not bring others after it"
            )
        return
    findings = Findings()
    beir = read_beir(DatasetConfig(path=str(folder), split="test"), findings)
    assert beir.qrels == right and findings.named == []
    truth = {q["_id"]: q["text"] for q in map(json.loads, changes.get("queries", QUERIES).splitlines())}
    assert beir.queries == {qid: truth[qid] for qid in right}
    documents = [json.loads(line) for line in changes.get("corpus", CORPUS).splitlines()]
    truth = {str(d["_id"]): " ".join(filter(None, (d.get("title"), d["text"]))) for d in documents}
    assert beir.corpus == truth
    for what, line in zip(said, findings.lines(), strict=True):
        assert line.startswith(what.format(folder)), line
    for row in read_rows(config):
        relevant = [doc for doc, score in right[row.id].items() if score > 0]
        others = [doc for doc, score in right[row.id].items() if score <= 0]
        assert (row.pos_ids, row.neg_ids) == (relevant, others)
        assert (row.pos, row.neg) == ([truth[doc] for doc in relevant], [truth[doc] for doc in others])


def test_what_on_missing_allows(tmp_path: Path) -> None:
    """Evaluation keeps what mteb keeps (empty texts, judgements nothing can satisfy); rows are left out; all
    is counted."""
    corpus = EMPTY + '{"_id": "d5", "text": null}\n{"_id": "d6", "text": "first text", "title": "T1"}\n'
    queries = QUERIES + "".join(
        f'{{"_id": "{q}", "text": "{t}"}}\n' for q, t in [("q3", " "), ("q4", "four"), ("q5", "five")]
    )
    qrels = (
        H
        + "q1\td1\t1\nq1\tGONE\t1\nq1\td3\t0\nq1\td6\t0\nq2\td4\t1\nq2\td2\t2\n"
        + "QX\td1\t1\nq3\td1\t1\nq4\td5\t1\nq5\td1\t0\n"
    )
    folder = write(tmp_path / "beir", {"corpus": corpus, "queries": queries, "qrels": qrels})
    findings = Findings()
    beir = read_beir(DatasetConfig(path=str(folder), split="test", on_missing="allow"), findings)
    assert findings.named == []
    assert beir.qrels == {
        "q1": {"d1": 1, "GONE": 1, "d3": 0, "d6": 0}, "q2": {"d4": 1, "d2": 2},
        "q3": {"d1": 1}, "q4": {"d5": 1}, "q5": {"d1": 0},
    }  # fmt: skip
    assert (beir.corpus["d4"], beir.corpus["d5"], beir.queries["q3"], len(beir.corpus)) == ("", "", "", 6)
    assert findings.counts == {
        "queries that are empty": 1,
        "documents with a null text, read as empty": 1,
        "documents that are empty": 2,
        "judgements of documents that are not in corpus.jsonl, kept, as nothing can find them": 1,
        "judgements of queries that are not in queries.jsonl, left out": 1,
    }
    config = DatasetConfig(path=str(folder), split="test", on_missing="allow")
    rows = list(read_rows(config))
    assert [(row.id, row.pos, row.neg, row.line) for row in rows] == [
        ("q1", ["T1 first text"], ["third"], 2),
        ("q2", ["second text"], [], 6),
    ]
    counts = check_sources([config]).counts
    assert (
        counts.items()
        >= {
            "judgements of documents that are not in corpus.jsonl, left out": 1,
            "judgements of empty documents, left out": 2,
            "rows left out, as their query is empty": 1,
            "rows left out, as their query has no document with a score above 0": 2,
            "documents judged irrelevant with the text of a relevant one, left out": 1,
        }.items()
    )
    with pytest.raises(
        DataError, match=r"test\.tsv:2: query 'x' is not .* 1 of 1 judgements dangle: do queries and qrels"
    ):
        read_beir(
            DatasetConfig(
                path=str(write(tmp_path / "none", {"qrels": H + "x\td1\t1\n"})),
                split="test",
                on_missing="allow",
            )
        )
    quoted = write(tmp_path / "quoted", {"qrels": H + 'q1\td1\t1\nq2\t"d2"\t1\n'})
    with pytest.raises(
        DataError, match=r"test\.tsv:3: .* it is there without the quotes"
    ):  # a mistake that nobody means
        read_beir(DatasetConfig(path=str(quoted), split="test", on_missing="allow"))
    with pytest.raises(DataError, match=r"test\.tsv:1: no row is left"):
        nothing = write(tmp_path / "nothing", {"qrels": H + "q1\td1\t0\nq2\tGONE\t1\n"})
        list(read_rows(DatasetConfig(path=str(nothing), split="test", on_missing="allow")))


def test_candidate_pools(tmp_path: Path) -> None:
    path, findings = tmp_path / "pool.jsonl", Findings()
    path.write_text(EMPTY + '{"text": "no id", "title": null}\n{"text": 3}\n')
    got = list(read_documents(path, "allow", findings))
    assert got == [("d1", "T1 first text"), ("d2", "second text"), ("d3", "third"), ("", "no id")]
    assert findings.named == [f"{path}:6: field 'text' must be a string, got a number (int)"]
    assert list(findings.counts.values()) == [1, 1]
    with pytest.raises(DataError, match=r"pool\.jsonl:4: field 'text' is empty"):
        list(read_documents(path))


# ---------------------------------------------------------------------------------------- all of them at once


def test_all_bad_lines_of_all_sources_are_named_at_once(tmp_path: Path, monkeypatch) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(Q1 * 3)
    bad.write_text(Q1 + "\n" + "".join(f'{{"query": {i}}}\n' for i in range(30)) + Q1)
    folder = write(tmp_path / "beir", {"corpus": CORPUS + "{}\n[]\n", "qrels": GONE})
    sources = [DatasetConfig(path=str(path), split="test") for path in (good, bad, folder)]
    with pytest.raises(DataError) as caught:
        check_sources(sources)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == [f"{bad}:{i}" for i in range(2, 22)]
    assert lines[-1] == "33 bad lines in all"
    with pytest.raises(DataError) as caught:
        check_sources(sources[2:])
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        f"{folder}/corpus.jsonl:4", f"{folder}/corpus.jsonl:5", "2 bad lines in all",
    ]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"later\.jsonl does not exist"):
        patch.setattr(readers, "read_rows", None)  # said before a line is read
        check_sources([*sources, DatasetConfig(path=str(tmp_path / "later.jsonl"))])
    assert check_sources(sources[:1]).lines() == []
    nulls = CORPUS.replace('"T1"', "null").replace('"title": ""', '"title": null')
    twice = write(tmp_path / "twice", {"corpus": nulls.replace('"_id": "d2"', '"id": "d2"') + "{}\n" * 8})
    (twice / "qrels" / "dev.tsv").write_text(QRELS)
    splits = [DatasetConfig(path=str(twice), split=split) for split in ("test", "dev", "test")]
    with pytest.raises(DataError, match=r"\n9 bad lines in all$"):  # of one corpus, which is read three times
        check_sources(splits)
    (twice / "corpus.jsonl").write_text(nulls)
    assert list(check_sources(splits).counts.values()) == [2]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_reading_says_how_far_it_is(tmp_path: Path, monkeypatch, name: str) -> None:
    path, log, clock = tmp_path / name, [], iter(range(0, 10_000, 8))
    rng = random.Random(0)  # what does not compress: gzip reads ahead
    data = "".join(texts_row(rng.randbytes(200).hex()) for _ in range(4096)).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    monkeypatch.setattr(lines.time, "monotonic", lambda: next(clock))  # eight seconds at every look
    check_sources([DatasetConfig(path=str(path))], log.append)
    said = [
        re.fullmatch(rf"reading {path}: ([\d,]+) lines, (\d+)%, (\d+) s left of this file", line)
        for line in log
    ]
    assert [found and found[1] for found in said] == ["1,024", "3,072"], (
        log
    )  # 16 and 16 seconds after what was said before
    assert [abs(int(found[2]) - share) < 12 for found, share in zip(said, (25, 75), strict=True)] == [
        True,
        True,
    ], log
    assert 5 <= int(said[0][3]) <= 40 and 5 <= int(said[1][3]) <= 20, log


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    def says(path: object, *fragments: str) -> None:
        with pytest.raises(UserError) as caught:
            list(read_rows(DatasetConfig(path=str(path), split="test")))
        assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)

    def folder(*names: str) -> Path:
        made = tmp_path / names[0].replace("/", "-")
        for name in names:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text("x")
        return made

    says(folder("data-00000-of-00001.arrow", "state.json"), "arrow:1: not a whole Arrow file")
    says(folder("dataset_dict.json", "train/state.json"), "dataset_dict.json is not valid JSON")
    says(folder("train.parquet", "README.md"), "train.parquet:1: not a whole Parquet file")
    says(folder("a.jsonl", "b.csv"), "has files of several kinds (a.jsonl, b.csv)")
    says(folder("config.json", "model.safetensors"), "but a model")
    says(
        folder("corpus-00000-of-00001.parquet", "queries.jsonl", "qrels/test.tsv"),
        "corpus.jsonl (or .gz) does not exist",
        "Parquet is not read",
    )
    says(
        folder("corpus.jsonl", "queries.jsonl", "qrels/test.jsonl"),
        "qrels/test.tsv (or .gz) does not exist",
        "holds: test.jsonl; judgements are read from {split}.tsv",
    )
    says("BeIR/fiqa", "does not exist", "hf://BeIR/fiqa", "hf download BeIR/fiqa --repo-type dataset")
    says("mteb/banking77", "hf download mteb/banking77")
    says("https://example.com/train.jsonl", "is an address", "download it first")
    says("s3://bucket/b.jsonl", "is an address")
    says("nowhere/train.jsonl", "does not exist; nor does its folder")
    (tmp_path / "void").mkdir()
    says(tmp_path / "void", "it holds: nothing")


def test_preparing_names_all_bad_lines_says_what_it_met_and_keeps_stores_apart(
    tmp_path: Path, tokenizer
) -> None:
    folder, log = write(tmp_path / "beir", {"qrels": "q1 0 d1 1\nq2 0 d2 1\nq2 0 GONE 1\n"}), []

    def store(on_missing: str = "allow"):
        sources = [DatasetConfig(path=str(folder), split="test", on_missing=on_missing)]
        return open_store(
            DataConfig(datasets=sources, cache_dir=str(tmp_path / "stores")), tokenizer, log.append
        )

    first = store()
    assert log[:2] == [
        f"TREC qrels files (4 columns, no header): 1 (first: {folder}/qrels/test.tsv:1)",
        f"judgements of documents that are not in corpus.jsonl, left out: 1 "
        f"(first: {folder}/qrels/test.tsv:3)",
    ]
    (folder / "corpus.jsonl").write_text(CORPUS + '{"_id": "GONE", "text": "back"}\n')
    with_text = store("error")
    assert with_text.digest != store("allow").digest, "the option decides the rows, so it is in the digest"
    assert store("allow").num_documents == with_text.num_documents == first.num_documents + 1
    (folder / "corpus.jsonl").write_text(CORPUS.replace("_id", "id") + "{}\n")
    with pytest.raises(DataError) as caught:
        store()
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        *(f"{folder}/corpus.jsonl:{i}" for i in (1, 2, 3, 4)), "4 bad lines in all",
    ]  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    rows.write_text(Q1)
    assert reading(DatasetConfig(path=str(rows))) == [], "rows of a file: the digest is what it was before"
    irrelevant = write(tmp_path / "irrelevant", {"qrels": QRELS + "q1\td3\t0\n"})
    assert reading(DatasetConfig(path=str(irrelevant), split="test")) == ["judged irrelevant: neg"]
