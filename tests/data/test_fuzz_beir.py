"""BEIR folders written in every published way are read as meant; with one thing broken they are refused by
path and line.

The truth is made before it is written, so nothing here parses anything.
"""

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data import lines
from nemo_embed_core.data.formats import beir, qrels
from nemo_embed_core.data.readers import Findings, read_beir, read_rows
from nemo_embed_core.errors import DataError

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=12
).map(lambda text: f"t{text}.")
ids = st.sampled_from(["1", "2", "a-b", "D_3", "é", "007", "x.y", "日本"])
LAYOUTS = ("header", "no header", "TREC", "TREC tabs", "spaces", "order", "quoted header")


def qrels_lines(layout: str, judged: list[tuple[str, str, int]]) -> list[str]:
    """The judgements as somebody published them."""
    between = " " if layout in ("TREC", "spaces") else "\t"
    head = {
        "header": "query-id\tcorpus-id\tscore", "spaces": "query-id corpus-id score",
        "order": "score\tcorpus-id\tquery-id", "quoted header": '"query-id"\t"corpus-id"\t"score"',
    }  # fmt: skip
    rows = []
    for query, document, score in judged:
        cells = [query, document, str(score)]
        if layout.startswith("TREC"):
            cells.insert(1, "0")
        rows.append(between.join(cells[::-1] if layout == "order" else cells))
    return [head[layout], *rows] if layout in head else rows


@st.composite
def folders(draw) -> tuple[dict[str, bytes], dict, dict, dict, str]:
    """(files, documents, queries, qrels, what is broken: "" or the file)."""
    documents = draw(
        st.dictionaries(ids, st.tuples(st.sampled_from([None, "", "A title"]), texts), min_size=1, max_size=4)
    )
    queries = draw(st.dictionaries(ids, texts, min_size=1, max_size=3))
    pairs = st.tuples(st.sampled_from(sorted(queries)), st.sampled_from(sorted(documents)))
    judged = draw(st.dictionaries(pairs, st.integers(-1, 3), min_size=1, max_size=5))
    ascii_only = draw(st.booleans())

    def objects(side: dict[str, dict]) -> list[str]:
        return [
            json.dumps({"_id": int(k) if k in "12" else k, **v}, ensure_ascii=ascii_only)
            for k, v in side.items()
        ]

    files = {
        "corpus.jsonl": objects(
            {k: {"title": title, "text": text} for k, (title, text) in documents.items()}
        ),
        "queries.jsonl": objects({k: {"text": text} for k, text in queries.items()}),
        "qrels/test.tsv": qrels_lines(
            draw(st.sampled_from(LAYOUTS)), [(q, d, s) for (q, d), s in judged.items()]
        ),
    }
    broken = draw(st.sampled_from(["", "", *files]))
    if broken:
        where = files[broken]
        at = draw(st.integers(0, len(where) - 1))
        where[at] = draw(st.sampled_from([
            "", where[at][:-1], where[at] + where[at], where[at].replace('": "t', '": "t\ud800'), "null",
            "[]", "{}", where[at] + ",x", where[at].replace("_id", "id"),
            where[at].replace('"text": "', '"text": ["'), "x" * 300, "PAR1", where[at] + "\t9",
        ]))  # fmt: skip
    end = draw(st.sampled_from(["\n", "\r\n"]))
    mark = draw(st.sampled_from(["", "\ufeff"]))
    data = {
        n: (mark + "".join(line + end for line in rows)).encode("utf-8", "surrogatepass")
        for n, rows in files.items()
    }
    truth = {k: f"{title} {text}" if title else text for k, (title, text) in documents.items()}
    qrels: dict[str, dict[str, int]] = {}
    for (query, document), score in judged.items():
        qrels.setdefault(query, {})[document] = score
    return data, truth, queries, qrels, broken


def fuzz(folder: Path, examples: int, **options) -> dict[str, int]:
    seen = {"read": 0, "refused": 0, "broken": 0}
    (folder / "qrels").mkdir(parents=True, exist_ok=True)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck), **options)  # fmt: skip
    @given(folders())
    def check(made) -> None:
        files, documents, queries, qrels, broken = made
        for name, data in files.items():
            (folder / name).write_bytes(data)
        seen["broken"] += bool(broken)
        findings = Findings()
        got = read_beir(DatasetConfig(path=str(folder), split="test"), findings)
        if findings.num_bad:
            assert broken, findings.named
            for message in findings.named:
                assert re.match(
                    re.escape(str(folder)) + r"/(corpus|queries)\.jsonl:\d+: .{4,}|.*test\.tsv:\d+: .{4,}",
                    message,
                )
                assert len(message) < 400 + len(str(folder)) and "\n" not in message
            with pytest.raises(DataError):
                read_beir(DatasetConfig(path=str(folder), split="test"))
            seen["refused"] += 1
            return
        seen["read"] += 1
        for text in (*got.corpus.values(), *got.queries.values()):
            assert text.strip() and text.encode("utf-8") and "\ufffd" not in text
        if broken:  # a line was changed into another right one, as an id that is one character shorter
            assert got.corpus.keys() == documents.keys() or broken == "corpus.jsonl"
            return
        assert (got.corpus, got.queries, got.qrels) == (documents, {q: queries[q] for q in qrels}, qrels)
        rows = list(read_rows(DatasetConfig(path=str(folder), split="test", on_missing="allow"), Findings()))
        for row in rows:
            pos = [documents[d] for d, score in qrels[row.id].items() if score > 0]
            neg = [
                documents[d] for d, score in qrels[row.id].items() if score <= 0 and documents[d] not in pos
            ]
            assert (row.query, row.pos, row.neg) == (queries[row.id], pos, neg)
        assert [row.id for row in rows] == [q for q in qrels if any(score > 0 for score in qrels[q].values())]

    check()
    return seen


def test_folders_are_read_as_meant_or_refused_by_path_and_line(tmp_path: Path) -> None:
    seen = fuzz(tmp_path, 300)
    assert seen["read"] > 100 and seen["refused"] > 60, seen


PLANTED = {
    "titles dropped": (beir, "document_text", lambda row, *_: str(row.get("text"))),
    "header order ignored": (
        qrels,
        "_Columns",
        lambda separator, width, *_: _columns_in_order(separator, width),
    ),
    "first judgement taken for a header": (qrels, "SCORE", re.compile("never")),
    "numbers are other ids": (
        beir,
        "check_id",
        lambda value, field: str(value) if isinstance(value, str) else f"n{value}",
    ),
    "bad bytes replaced": (lines, "decode", lambda raw: raw.decode("utf-8", "replace")),
    "carriage returns kept": (qrels, "decode", lambda raw: raw.decode().rstrip("\n").replace("\r", "_")),
}


def _columns_in_order(separator, width):
    from collections import namedtuple

    return namedtuple("Columns", "separator width query document score")(separator, width, 0, 1, 2)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_caught(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(*PLANTED[name])
    with pytest.raises((AssertionError, UnicodeError, ExceptionGroup)):
        fuzz(tmp_path, 300, phases=[Phase.generate])
