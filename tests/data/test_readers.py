"""Bad rows end with `path:line: what is wrong`; good ones come through unchanged; planted reader bugs are
caught."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data import containers, lines
from nemo_embed_core.data.formats import ours
from nemo_embed_core.data.formats import row as data_row
from nemo_embed_core.data.readers import Row, read_beir, read_passages, read_rows, source_files
from nemo_embed_core.data.texts import TextsById
from nemo_embed_core.errors import DataError, UserError


def rows_of(path, **options) -> list[Row]:
    return list(read_rows(DatasetConfig(path=str(path), **options)))


GOOD = b'{"query": "q", "pos": ["p"], "neg": ["n1", "n2"]}\n'


# ------------------------------------------------------------------------------------------ JSONL, good


def test_rows_come_through_unchanged(tmp_path):
    text = 'two \u2028 lines, é, 日本, "quotes", a tab\t and {"json": 1}'
    rows = [
        {"query": text, "pos": [" p ", text + "!"], "neg": []},
        {
            "query": "q",
            "pos": ["p"],
            "neg": ["n", "m"],
            "pos_scores": [0.5],
            "neg_scores": [1, 2],
            "id": 7,
            "lang": "de",
        }
        | {"pos_ids": ["d1"], "neg_ids": [2, None]},
        {"id": "x", "query": "q", "neg": ["n"], "pos": ["p"], "group": 3},
    ]
    data = "".join(json.dumps(row, ensure_ascii=i > 0) + "\n" for i, row in enumerate(rows)).encode()
    plain, zipped, bom, crlf = (
        tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "bom.jsonl", "crlf.jsonl")
    )
    plain.write_bytes(data)
    zipped.write_bytes(gzip.compress(data))
    bom.write_bytes(b"\xef\xbb\xbf" + data.removesuffix(b"\n"))  # and no newline after the last row
    crlf.write_bytes(data.replace(b"\n", b"\r\n"))
    for path in (plain, zipped, bom, crlf):
        got = rows_of(path)
        assert [(r.query, r.pos, r.neg) for r in got] == [(r["query"], r["pos"], r["neg"]) for r in rows]
        assert [(r.path, r.line) for r in got] == [(str(path), n) for n in (1, 2, 3)]
        assert [(r.id, r.group, r.lang, list(r.pos_ids), list(r.neg_ids)) for r in got] == [
            ("", "", "", [], []), ("7", "", "de", ["d1"], ["2", ""]), ("x", "3", "", [], []),
        ]  # fmt: skip
        assert source_files(DatasetConfig(path=str(path))) == [path]


def test_rows_are_streamed(tmp_path):
    """The first row arrives before the last is read: a broken end does not hide a good beginning."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b"broken\n")
    rows = read_rows(DatasetConfig(path=str(path)))
    assert next(rows).query == "q"
    with pytest.raises(DataError, match=r":2: "):
        next(rows)


# ------------------------------------------------------------------------------------------ JSONL, bad


def row(**changes) -> bytes:
    """GOOD with fields changed; a field set to None is taken out."""
    fields = {"query": "q", "pos": ["p"], "neg": ["n1", "n2"], **changes}
    return json.dumps({k: v for k, v in fields.items() if v is not None}).encode() + b"\n"


BAD_ROWS = {
    "empty file": (b"", 1, "the file is empty"),
    "blank line": (GOOD + b"\n" + GOOD, 2, "blank line: remove it"),
    "blank last line": (GOOD + b"  \n", 2, "blank line"),
    "not json": (b"query pos\n", 1, "not JSON: Expecting value (character 1)"),
    "two objects on a line": (GOOD[:-1] + GOOD, 1, "not JSON: Extra data"),
    "truncated last line": (GOOD + GOOD[:30], 2, "no newline: is the file truncated?"),
    "python literals": (b"{'query': 'q'}\n", 1, "not JSON: Expecting property name"),
    "a list": (GOOD + b'["q", ["p"], []]\n', 2, "must be an object"),
    "null": (b"null\n", 1, "must be an object like {\"...\": ...}, got null"),
    "latin-1": (GOOD + GOOD.replace(b"n1", b"n\xe9"), 2, "not UTF-8: byte 0xe9 at byte 40"),
    "utf-16": (GOOD.decode().encode("utf-16"), 1, "UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8"),
    "bom on line 2": (GOOD + b"\xef\xbb\xbf" + GOOD, 2, "not JSON"),
    "lone surrogate in query": (row(query="x\ud83d"), 1, "field 'query' has a lone surrogate at character 2"),
    "lone surrogate in neg": (row(neg=["n", "\udc00"]), 1, "field 'neg[1]' has a lone surrogate"),
    "duplicate key": (b'{"query": "a", "query": "b", "pos": ["p"], "neg": []}\n', 1, "duplicate key 'query'"),
    "NaN score": (row(neg_scores=[1.0, float("nan")]), 1, "NaN is not JSON"),
    "infinite score": (b'{"query": "q", "pos": ["p"], "neg": [], "pos_scores": [1e999]}\n', 1, "pos_scores[0] must be a finite"),
    "nested too deep": (b'{"query": ' + b"[" * 100_000 + b"\n", 1, "nested too deep"),
    "endless number": (b'{"query": ' + b"9" * 5000 + b"}\n", 1, "digit"),
    "query missing": (row(query=None), 1, "field 'query' is missing"),
    "query empty": (row(query=""), 1, "field 'query' is empty"),
    "query whitespace": (row(query=" \n\u3000"), 1, "field 'query' is empty or only spaces"),
    "query a list": (row(query=["q"]), 1, "field 'query' must be a string, got a list"),
    "query a number": (row(query=3), 1, "field 'query' must be a string, got a number (int)"),
    "query a bool": (row(query=True), 1, "got a boolean"),
    "pos missing": (row(pos=None), 1, "field 'pos' is missing"),
    "pos empty": (row(pos=[]), 1, "field 'pos' is empty"),
    "pos a string": (row(pos="p"), 1, "field 'pos' must be a list of strings, got a string"),
    "pos holds null": (b'{"query": "q", "pos": [null], "neg": []}\n', 1, "field 'pos[0]' must be a string, got null"),
    "pos holds an object": (row(pos=[{"text": "p"}]), 1, "field 'pos[0]' must be a string, got an object"),
    "pos holds an empty text": (row(pos=["p", ""]), 1, "field 'pos[1]' is empty"),
    "neg missing": (row(neg=None), 1, 'field \'neg\' is missing: write "neg": []'),
    "neg null": (b'{"query": "q", "pos": ["p"], "neg": null}\n', 1, "field 'neg' must be a list of strings, got null"),
    "neg whitespace": (row(neg=["n", "\t"]), 1, "field 'neg[1]' is empty"),
    "positive among negatives": (row(neg=["n", "p"]), 1, "pos[0] is also neg[1]: remove it from 'neg'"),
    "unknown field": (row(negs=["n"]), 1, "unknown fields ['negs']: remove them"),
    "prompt a number": (row() + row(prompt=7), 2, "field 'prompt' must be a string"),
    "too few scores": (row(neg_scores=[0.1]), 1, "'neg_scores' must be a list of 2 numbers (one per text), got 1 entries"),
    "lang a number": (row(lang=7), 1, "field 'lang' must be a string"),
    "scores a string": (row(pos_scores="0.1"), 1, "'pos_scores' must be a list of 1 numbers"),
    "score a bool": (row(pos_scores=[True]), 1, "pos_scores[0] must be a finite number, got True"),
    "duplicate id": (row(id=1) + row(id="2") + row(id="1"), 3, "id '1' is already the id of line 1"),
    "score too large": (row(pos_scores=[10**400]), 1, "pos_scores[0] must be a finite number, got 1000"),
    "group null": (b'{"query": "q", "pos": ["p"], "neg": [], "group": null}\n', 1, "group must be a string or an integer, got null"),
    "too few document ids": (row(neg_ids=["d1"]), 1, "field 'neg_ids' must be a list of 2 ids (one per text), got 1 entries"),
    "document id a float": (row(pos_ids=[1.5]), 1, "pos_ids[0] must be a string or an integer"),
    "of another tool": (b'{"left": "a", "right": "p"}\n', 1, "not a training row: it has ['left', 'right'] and no query, pos, neg"),
    "a label": (row(label="x"), 1, "unknown fields ['label']: remove them"),
    "id a float": (row(id=1.5), 1, "id must be a string or an integer"),
    "not gzip": (GOOD, 1, "not a whole gzip file"),
    "truncated gzip": (gzip.compress(GOOD * 500)[:-20], 500, "the gzip stream ends early"),
    "gzip with a flipped bit": (gzip.compress(GOOD)[:-5] + b"\x00" + gzip.compress(GOOD)[-4:], 2, "not a whole gzip file: CRC"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row(tmp_path, name):
    data, line, fragment = BAD_ROWS[name]
    path = tmp_path / ("d.jsonl.gz" if "gzip" in name else "d.jsonl")
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    message = str(caught.value)
    if name == "truncated gzip":  # how many rows come out before the end depends on zlib
        line = int(message.removeprefix(f"{path}:").split(":")[0])
        assert 1 <= line <= 501
    assert message.startswith(f"{path}:{line}: "), message
    assert fragment in message
    assert len(message) < 400 + len(str(path)) and "\n" not in message


def test_a_line_too_long_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b'{"query": "' + b"a" * 10_000_000))  # a small gzip bomb
    with pytest.raises(DataError, match=r":2: the line is longer than 1000 bytes"):
        rows_of(path)


def test_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.jsonl does not exist; .* holds: train\.jsonl\.gz"):
        rows_of(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        rows_of(tmp_path / "no" / "train.jsonl")


# ------------------------------------------------------------------------------------------ BEIR

CORPUS = (
    '{"_id": "d1", "title": "Title", "text": "one"}\n'
    '{"_id": 2, "text": "two", "url": "x", "metadata": {"a": [1]}}\n'
    '{"_id": "d3", "title": "", "text": "three"}\n'
    '{"_id": "d4", "title": "Only a title", "text": ""}\n'
)
QUERIES = '{"_id": "q1", "text": "first", "lang": "en"}\n{"_id": "q2", "text": "second"}\n{"_id": "q3", "text": "of another split"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq2\td1\t1\nq1\t2\t2\nq2\td3\t0\nq1\td4\t1\n"


def beir(folder: Path, corpus=CORPUS, queries=QUERIES, qrels=QRELS, split="train", gz=False) -> Path:
    (folder / "qrels").mkdir(exist_ok=True)
    files = {"corpus.jsonl": corpus, "queries.jsonl": queries, f"qrels/{split}.tsv": qrels}
    for name, content in files.items():
        if content is not None:
            data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
            (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(data) if gz else data)
    return folder


@pytest.mark.parametrize("gz", [False, True])
def test_beir_split(tmp_path, gz):
    folder = beir(tmp_path, gz=gz)
    got = read_beir(DatasetConfig(path=str(folder), split="train"))
    assert got.corpus == {"d1": "Title one", "2": "two", "d3": "three", "d4": "Only a title"}
    assert got.queries == {"q2": "second", "q1": "first"}
    assert got.qrels == {"q2": {"d1": 1, "d3": 0}, "q1": {"2": 2, "d4": 1}}
    rows = rows_of(folder)
    assert [row[:10] for row in rows] == [
        ("second", ["Title one"], ["three"], rows[0].path, 2, "", "q2", "", ["d1"], ["d3"]),
        ("first", ["two", "Only a title"], [], rows[0].path, 3, "en", "q1", "", ["2", "d4"], []),
    ]
    assert got.languages == {"q1": "en"} and Path(rows[0].path).name.startswith("train.tsv")
    assert [f.name.removesuffix(".gz") for f in source_files(DatasetConfig(path=str(folder)))] == [
        "corpus.jsonl", "queries.jsonl", "train.tsv",
    ]  # fmt: skip


H = "query-id\tcorpus-id\tscore\n"
BAD_BEIR = {
    "duplicate document": ({"corpus": CORPUS + '{"_id": "2", "text": "x"}\n'}, "corpus.jsonl:5", "_id '2' is already the _id of line 2"),
    "duplicate query": ({"queries": QUERIES + '{"_id": "q1", "text": "x"}\n'}, "queries.jsonl:4", "already the _id of line 1"),
    "id missing": ({"corpus": '{"id": "d1", "text": "x"}\n'}, "corpus.jsonl:1", "field '_id' is missing"),
    "id null": ({"corpus": '{"_id": null, "text": "x"}\n'}, "corpus.jsonl:1", "_id must be a string or an integer, got null"),
    "id a float": ({"corpus": '{"_id": 1.0, "text": "x"}\n'}, "corpus.jsonl:1", "_id must be a string or an integer"),
    "id with a tab": ({"corpus": '{"_id": "a\\tb", "text": "x"}\n'}, "corpus.jsonl:1", "tab or newline inside"),
    "text missing": ({"corpus": '{"_id": "d1", "contents": "x"}\n'}, "corpus.jsonl:1", "field 'text' is missing"),
    "text null": ({"corpus": '{"_id": "d1", "text": null}\n'}, "corpus.jsonl:1", "field 'text' must be a string, got null"),
    "empty passage": ({"corpus": '{"_id": "d1", "title": " ", "text": ""}\n'}, "corpus.jsonl:1", "field 'text' is empty"),
    "surrogate in the title": ({"corpus": '{"_id": "d1", "title": "\\ud83d", "text": "x"}\n'}, "corpus.jsonl:1", "lone surrogate"),
    "empty query": ({"queries": '{"_id": "q1", "text": " "}\n'}, "queries.jsonl:1", "field 'text' is empty"),
    "empty corpus": ({"corpus": ""}, "corpus.jsonl:1", "the file is empty"),
    "empty qrels": ({"qrels": ""}, "train.tsv:1", "the file is empty"),
    "only a header": ({"qrels": H}, "train.tsv:1", "no judgements"),
    "header of other names": ({"qrels": "a\tb\tc\nq1\td1\t1\n"}, "train.tsv:1", "line 1 is neither the header query-id<TAB>corpus-id<TAB>score nor a judgement"),
    "header twice the same": ({"qrels": "query-id\tqid\tscore\nq1\td1\t1\n"}, "train.tsv:1", "header 'query-id\\tqid\\tscore': write"),
    "header of 4 columns": ({"qrels": "query-id\tcorpus-id\tscore\turl\nq1\td1\t1\tx\n"}, "train.tsv:1", ": write query-id<TAB>corpus-id<TAB>score"),
    "a TREC run": ({"qrels": "q1 Q0 d1 1 14.3 bm25\n"}, "train.tsv:1", "6 columns: a ranking (a TREC run)"),
    "commas": ({"qrels": "query-id,corpus-id,score\nq1,d1,1\n"}, "train.tsv:1", "separated by commas: write tabs"),
    "other columns below": ({"qrels": "q1 0 d1 1\nq1 d4 1\n"}, "train.tsv:2", "expected 4 space-separated columns as on line 1, got 3"),
    "quoted": ({"qrels": H + 'q1\t"d1"\t1\n'}, "train.tsv:2", "document '\"d1\"' is not in corpus.jsonl (4 documents); 1 of 1 judgements dangle: it is there without the quotes"),
    "TREC qrels": ({"qrels": H + "q1\t0\td1\t1\n"}, "train.tsv:2", "expected 3 tab-separated columns as on line 1, got 4"),
    "spaces for tabs": ({"qrels": H + "q1 d1 1\n"}, "train.tsv:2", "expected 3 tab-separated columns"),
    "blank line": ({"qrels": H + "q1\td1\t1\n\n"}, "train.tsv:3", "blank line"),
    "score a float": ({"qrels": H + "q1\td1\t0.5\n"}, "train.tsv:2", "score must be a whole number, got '0.5'"),
    "pair twice": ({"qrels": H + "q1\td1\t1\nq1\td3\t1\nq1\td1\t0\n"}, "train.tsv:4", "pair 'q1', 'd1' is already on line 2"),
    "dangling document": ({"qrels": H + "q1\td1\t1\nq1\tD2\t1\nq2\tD9\t1\n"}, "train.tsv:3", "document 'D2' is not in corpus.jsonl (4 documents); 2 of 3"),
    "dangling query": ({"qrels": H + "Q\td1\t1\n"}, "train.tsv:2", "query 'Q' is not in queries.jsonl (3 queries); 1 of 1"),
    "qrels not UTF-8": ({"qrels": H.encode() + b"q\xe9\td1\t1\n"}, "train.tsv:2", "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("reader", ["rows", "beir"])
@pytest.mark.parametrize("name", BAD_BEIR)
def test_bad_beir(tmp_path, name, reader):
    changes, where, fragment = BAD_BEIR[name]
    folder = beir(tmp_path, **changes)
    with pytest.raises(DataError) as caught:
        rows_of(folder) if reader == "rows" else read_beir(DatasetConfig(path=str(folder), split="train"))
    assert str(caught.value).startswith(str(folder)) and f"{where}: " in str(caught.value), str(caught.value)
    assert fragment in str(caught.value)


def test_a_training_query_without_positive_is_an_error(tmp_path):
    folder = beir(tmp_path, qrels=H + "q1\td1\t1\nq2\td1\t0\n")
    with pytest.raises(DataError, match=r"train\.tsv:3: query 'q2' has no document with a score above 0"):
        rows_of(folder)
    assert read_beir(DatasetConfig(path=str(folder), split="train")).qrels["q2"] == {"d1": 0}, (
        "an evaluation may have such a query"
    )


def test_missing_parts_of_a_beir_folder(tmp_path):
    folder = beir(tmp_path, split="dev")
    with pytest.raises(UserError, match=r"train\.tsv .*does not exist; splits there: dev; set split to one"):
        rows_of(folder)
    with pytest.raises(UserError, match="not a plain name"):
        rows_of(folder, split="../dev")
    (folder / "corpus.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"both corpus\.jsonl and corpus\.jsonl\.gz: remove one"):
        rows_of(folder, split="dev")
    (folder / "corpus.jsonl.gz").unlink()
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"corpus\.jsonl \(or \.gz\) does not exist; the folder holds: qrels, queries\.jsonl"
    ):
        rows_of(folder, split="dev")
    with pytest.raises(UserError, match="is not a folder"):
        read_beir(DatasetConfig(path=str(tmp_path / "nowhere"), split="test"))


def test_ids_that_stand_twice_are_said_by_lines_without_a_search_for_each(tmp_path, monkeypatch):
    (tmp_path / "qrels").mkdir()
    texts = [json.dumps({"_id": f"d{i}", "text": f"text {i}"}) for i in (0, 1, 2, 1, 3, 0, 3)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(texts) + "\n")
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    (tmp_path / "qrels/train.tsv").write_text("q\td0\t1\n")
    passes, real = [], TextsById.__iter__
    monkeypatch.setattr(TextsById, "__iter__", lambda self: passes.append(1) or real(self))
    with pytest.raises(UserError) as error:
        list(read_rows(DatasetConfig(path=str(tmp_path))))
    said = [f"_id 'd{i}' is already the _id of line {line}:" for i, line in ((1, 2), (0, 1), (3, 5))]
    for line, what in zip((4, 6, 7), said, strict=True):
        assert f"corpus.jsonl:{line}: {what}" in str(error.value)
    assert len(passes) == 1, "not once for each"


def test_passages_of_a_candidate_pool(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text(CORPUS)
    assert list(read_passages(path)) == ["Title one", "two", "three", "Only a title"]
    path.write_text('{"text": "fine"}\n{"txt": "x"}\n')
    with pytest.raises(DataError, match=r"pool\.jsonl:2: field 'text' is missing"):
        list(read_passages(path))


# ------------------------------------------------------------------------------------------ fuzz
#  A valid row with ONE thing broken: rows made at random never get past the first check and let planted bugs
# live.

GOOD_LINES = [
    json.dumps(
        {"query": f"q {i} \u2028 é", "pos": [f"p{i}"], "neg": ["n1", "n2"]}, ensure_ascii=False
    ).encode()
    for i in range(3)
]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["", " ", "\ud83d", "\x00", "x" * 3000])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda c: (
        st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(["query", "pos", "x"]), c, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def nearly_good_lines(draw) -> bytes:
    fields = {"query": "q", "pos": ["p"], "neg": ["n1", "n2"]}
    how = draw(
        st.sampled_from(["field", "element", "drop", "extra", "empty list", "surrogate", "blank", "nothing"])
    )
    if how == "field":
        fields[draw(st.sampled_from(["query", "pos", "neg"]))] = draw(values)
    elif how == "element":
        texts = fields[draw(st.sampled_from(["pos", "neg"]))]
        texts[draw(st.integers(0, len(texts) - 1))] = draw(scalars)
    elif how == "drop":
        del fields[draw(st.sampled_from(["query", "pos", "neg"]))]
    elif how == "extra":
        fields[draw(st.sampled_from(["prompt", "k" * 2000, "é"]))] = draw(values)
    elif how == "empty list":
        fields[draw(st.sampled_from(["pos", "neg"]))] = []
    elif how == "surrogate":
        fields["query"] = "q\ud83d"
    elif how == "blank":
        return draw(st.sampled_from([b"", b"  ", b"\t"]))
    line = json.dumps(fields, ensure_ascii=how == "surrogate" or draw(st.booleans())).encode(
        "utf-8", "surrogatepass"
    )
    if draw(st.integers(0, 5)) == 0:
        line = line.replace(b'"p"', b'"p\xe9"')  # a latin-1 byte inside a string
    return line


nasty_lines = st.sampled_from(
    [
        b"null",
        b"[" * 100_000,
        b'{"query":' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        GOOD_LINES[0][:-3],
        b"\x1f\x8b\x08\x00",
    ]
)
broken_lines = st.one_of(nearly_good_lines(), nearly_good_lines(), nearly_good_lines(), nasty_lines)


@st.composite
def files(draw) -> bytes:
    lines = draw(st.lists(st.sampled_from(GOOD_LINES), max_size=2)) + draw(st.lists(broken_lines, max_size=2))
    data = b"\n".join(lines) + b"\n" * draw(st.integers(0, 1))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):  # bit flips and truncation
        if data:
            at = draw(st.integers(0, len(data) - 1))
            data = data[:at] if draw(st.booleans()) else data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
    return data


def fuzz(path: Path, examples: int, **options) -> dict[str, int]:
    """Every file is either read exactly as json.loads reads its lines, all of them clean, or refused by path
    and line."""
    seen = {"accepted": 0, "refused": 0}

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck), **options)  # fmt: skip
    @given(files())
    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            rows = rows_of(path)
        except DataError as error:
            message = str(error)
            assert re.match(re.escape(str(path)) + r":\d+: .{4,}", message), message
            assert len(message) < 400 + len(str(path)), len(message)
            assert not data or any(
                line not in GOOD_LINES for line in data.removesuffix(b"\n").split(b"\n")
            ), message
            seen["refused"] += 1
            return
        truth = [json.loads(line.decode("utf-8")) for line in data.removesuffix(b"\n").split(b"\n")]
        assert [[row.query, row.pos, row.neg] for row in rows] == [
            [t["query"], t["pos"], t["neg"]] for t in truth
        ]
        for row in rows:
            assert row.pos and not set(row.pos) & set(row.neg)
            for text in (row.query, *row.pos, *row.neg):
                assert isinstance(text, str) and text.strip() and text.encode("utf-8")
        seen["accepted"] += 1

    check()
    return seen


def test_fuzz_accepts_clean_rows_or_names_path_and_line(tmp_path):
    seen = fuzz(tmp_path / "d.jsonl", 300)
    assert seen["accepted"] > 30 and seen["refused"] > 100, seen


def _skipping(path, findings, wanted):
    """A reader that drops what it cannot read."""
    for line, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(raw)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line, row


PLANTED = {
    "blank texts accepted": (ours, "check_text", lambda value, field: str(value)),
    "blank texts of lists accepted": (data_row, "check_text", lambda value, field: str(value)),
    "surrogates accepted": (lines, "check_unicode", lambda value, field: None),
    "bad bytes replaced": (lines, "decode", lambda raw: raw.decode("utf-8", "replace")),
    "a string taken for a list": (ours, "text_list", lambda value, field: list(value or ["x"])),
    "empty pos accepted": (ours, "text_list", lambda value, field: [*value] or [""]),
    "error path that fails": (lines, "type_name", lambda value: {int: "a number", str: "a string"}[type(value)]),
    "whole values in messages": (data_row, "short", repr),
    "lines split at U+2028": (
        lines, "raw_lines",
        lambda path, _: enumerate(
            (s.encode() for s in path.read_bytes().decode("utf-8", "replace").splitlines()), 1
        ),
    ),
    "bad rows skipped": (containers.READERS, "jsonl", _skipping),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_fuzz_catches_planted_bugs(tmp_path, monkeypatch, name):
    place, part, fault = PLANTED[name]
    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, part, fault)
    # Several at once.
    wrong = (AssertionError, UnicodeError, LookupError, TypeError, json.JSONDecodeError, ExceptionGroup)
    with pytest.raises(wrong):
        fuzz(tmp_path / "d.jsonl", 300, phases=[Phase.generate])
