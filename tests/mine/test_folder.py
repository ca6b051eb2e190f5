"""A dataset folder mined on ids gives what its rows with their texts give, on any number of ranks; each reads
its own row groups; no text is held or written."""

from __future__ import annotations

import json
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_mining import FakeEmbedder, lines_of, make_rows, mine, on_ranks

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data import dataset as dataset_module
from nemo_embed_core.data.dataset import read_metadata, read_records
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.lines import Findings
from nemo_embed_core.data.normal_form import exact_key, normal_key
from nemo_embed_core.data.readers import read_beir, read_rows
from nemo_embed_core.data.texts import Texts
from nemo_embed_core.errors import UserError
from nemo_embed_core.mine import corpus as corpus_module
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.folder import is_read_by_ids, read_folder
from nemo_embed_core.mine.keys import Numbers, as_keys, first_of, lists_of
from nemo_embed_core.mine.output import FolderWriter
from nemo_embed_core.mine.pool import Document, Known, exclusions


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


def write(folder: Path, corpus: list[dict], queries: list[dict], group: int = 5, shards: int = 1):
    """A folder by plain pyarrow, in row groups of `group` rows."""
    folder.mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        schema = pa.Table.from_pylist(rows).schema
        for i in range(shards):
            part = rows[i * len(rows) // shards : (i + 1) * len(rows) // shards]
            file = f"{name}.parquet" if shards == 1 else f"{name}-{i:05d}-of-{shards:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(part, schema), folder / file, row_group_size=group)
    metadata = {"class": "TextQADataset", "corpus_id": "toy", "query_instruction": "", "ids_only": False}
    (folder / "dataset_metadata.json").write_text(json.dumps(metadata))
    return DatasetConfig(path=str(folder))


def trapped(folder: Path, count: int = 40, graded: bool = False, **how) -> DatasetConfig:
    """Documents in the order in which rows name them, then others: spellings, equal texts of two ids, texts
    without content; rows with groups, languages and siblings."""
    ids: dict[str, str] = {}

    def entries(texts):
        return [{"id": ids.setdefault(text, f"d{len(ids)}")} for text in dict.fromkeys(texts)]

    queries = []
    for i, (query, pos, neg) in enumerate(make_rows(count)):
        neg = [text for text in neg if text not in pos]
        neg += ["\u200b"] if i == 3 else []
        queries.append(
            {"question_id": f"q{i}", "question": query, "corpus_id": "toy", "pos_doc": entries(pos),
             "neg_doc": entries(neg), "lang": "de" if i % 3 else "en",
             "group": f"g{i % 4}" if i % 5 else None, "grade": i * 7 % 5 / 2 if graded else None}
        )  # fmt: skip
    corpus = [{"id": key, "title": None, "text": text} for text, key in ids.items()]
    some = [row["text"] for row in corpus]
    more = [
        some[0],
        some[5].upper(),
        "\u200b\u200b",
        "\ufeff",
        "w1 w2 extra",
        "W1 w2 EXTRA",
        "held out",
        "Held out.",
        make_rows(40)[2].pos[0],
    ]
    corpus += [{"id": f"x{i}", "title": "", "text": text} for i, text in enumerate(more)]
    corpus += [{"id": f"y{i}", "title": f"w{i}", "text": f"w{i + 1} w{i + 2}"} for i in range(30)]
    return write(folder, corpus, queries, **how)


EXCLUDED = frozenset([normal_key("held out"), normal_key(make_rows(40)[2].pos[0])])
OPTIONS = {"num_negatives": 6, "threshold": 1.2, "sweep": [0.9], "keep_negatives": True}


def report_of(output: Path) -> dict:
    return json.loads(output.with_name(output.name + ".report.json").read_text())


@pytest.mark.parametrize(("excluded", "shards"), [(frozenset(), 1), (EXCLUDED, 3)])
def test_negatives_scores_and_report_are_those_of_the_rows_with_their_texts(tmp_path, excluded, shards):
    config = trapped(tmp_path / "data", shards=shards)
    corpus = read_beir(config).corpus
    known = Known()
    for row in read_rows(config):
        known.add(row.query, row.pos)
    known.add(make_rows(40)[1].query.upper(), ["w1 w2 extra"])  # of another dataset of the run
    documents = [Document(corpus[key], key) for key in corpus]
    texts = {"documents": documents, "known": known, "excluded": excluded}
    mine(read_rows(config), tmp_path / "texts.jsonl", **texts, **OPTIONS)
    said: list[str] = []
    rows = read_folder(config, Ranks(), Findings(), known, excluded)
    mine(rows, tmp_path / "ids.jsonl", log=said.append, **OPTIONS)
    want, got = lines_of(tmp_path / "texts.jsonl"), lines_of(tmp_path / "ids.jsonl")
    assert got == want and sum(map(len, (line["neg"] for line in got))) > 150
    assert got[0]["pos_ids"] == ["d0"] and "x4" in {i for line in got for i in line["neg_ids"]}
    assert all("w1 w2 extra" not in line["neg"] for line in got if line["query"] == make_rows(40)[1].query)
    assert report_of(tmp_path / "ids.jsonl") == report_of(tmp_path / "texts.jsonl")
    report = report_of(tmp_path / "ids.jsonl")
    assert report["duplicates_removed"] > 2 and report["documents_without_content"] == 1
    assert (report["documents_excluded"], report["positives_excluded"]) == ((3, 1) if excluded else (0, 0))
    assert set(report["by_language"]) == {"de", "en"} and report["noise"]["same_query_rows"] == 1
    assert any("without content" in line and "variants" in line for line in said)


@pytest.mark.parametrize("size", [1, 2])
def test_pairs_below_min_grade_are_no_rows_and_no_text_is_kept_for_it(tmp_path, size, monkeypatch):
    config = replace(trapped(tmp_path / "data", graded=True, shards=2), min_grade=1.5)
    assert is_read_by_ids(config, has_more_documents=False)
    met = Findings()
    corpus, found = read_beir(config).corpus, list(read_rows(config, met))
    documents = [Document(corpus[key], key) for key in corpus]
    mine(found, tmp_path / "texts.jsonl", documents=documents, **OPTIONS)
    told: list[list[str]] = []

    def work(ranks):
        findings = Findings()
        rows = read_folder(config, ranks, findings)
        told.append(findings.lines())
        return mine(rows, tmp_path / "ids.jsonl", ranks=ranks, **OPTIONS)

    on_ranks(size, work)
    want, got = lines_of(tmp_path / "texts.jsonl"), lines_of(tmp_path / "ids.jsonl")
    assert got == want and 10 < len(got) < 30 and {line.get("group") for line in got} > {"g1", "g2"}
    # Drawn by the numbers of documents, which are in the order of the corpus or of the rows that are left.
    reports = [report_of(tmp_path / f"{name}.jsonl") for name in ("ids", "texts")]
    assert all(report.pop("random_pair_score_quantiles") for report in reports) and reports[0] == reports[1]
    assert told == [met.lines()] * size and "pairs with a grade below min_grade=1.5, left out: " in told[0][0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_reads_its_own_row_groups_and_the_folder_is_the_same_bytes(tmp_path, size, monkeypatch):
    config = trapped(tmp_path / "data", shards=2)
    read, whole = dict[str, dict[tuple, int]](), dataset_module.parquet_rows

    def spy(path, findings, problem, groups=None, columns=None):
        table = read.setdefault(threading.current_thread().name, {})
        for number in groups if groups is not None else [-1]:
            table[path.name, number] = table.get((path.name, number), 0) + 1
        yield from whole(path, findings, problem, groups, columns)

    monkeypatch.setattr(dataset_module, "parquet_rows", spy)
    parts: list[set] = []

    def work(ranks):
        rows = read_folder(config, ranks, Findings())
        mine_read = read[threading.current_thread().name]
        assert set(mine_read.values()) == {1} and not any(number < 0 for _, number in mine_read)
        parts.append(set(mine_read))
        writer = FolderWriter(config.path, "out", "Instruct: x\nQuery: ", "", by_ids=True)
        more = {"ranks": ranks, "write": writer, "with_texts": False, **OPTIONS}
        return mine(rows, tmp_path / "out", **more)

    reports = on_ranks(size, work)
    assert all(report["queries"] == reports[0]["queries"] for report in reports)
    assert sum(map(len, parts)) == len(set.union(*parts)), "no row group is read by two ranks"
    groups = sum(pq.ParquetFile(file).num_row_groups for file in (tmp_path / "data").glob("*.parquet"))
    assert len(set.union(*parts)) == groups and min(map(len, parts)) >= groups // size - 4
    for file in (tmp_path / "data").glob("corpus*"):
        assert (tmp_path / "out" / file.name).samefile(file)
    found = list(read_rows(DatasetConfig(path=str(tmp_path / "out"))))
    monkeypatch.undo()
    alone = mine(read_folder(config, Ranks(), Findings()), tmp_path / "alone.jsonl", **OPTIONS)
    names = ("id", "query", "lang", "pos", "pos_scores", "neg_scores", "neg", "pos_ids", "neg_ids")
    as_lines = [{name: getattr(row, name) for name in names} for row in found]
    lines = lines_of(tmp_path / "alone.jsonl")
    assert as_lines == [{name: line.get(name, []) for name in names} for line in lines]
    assert [row.group for row in found] == [line.get("group", "") for line in lines]
    assert reports[0] == alone | {key: reports[0][key] for key in ("kept_out", "suspects")}
    assert read_metadata(tmp_path / "out").query_instruction == "Instruct: x\nQuery:"
    if size > 1:
        writer = FolderWriter(config.path, "out", "Instruct: x\nQuery: ", "", by_ids=True)
        rows = read_folder(config, Ranks(), Findings())
        mine(rows, tmp_path / "one" / "out", write=writer, with_texts=False, **OPTIONS)
        for file in (tmp_path / "out").iterdir():
            assert file.read_bytes() == (tmp_path / "one" / "out" / file.name).read_bytes()


def test_no_text_is_held_or_written_and_a_shard_reads_its_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 1 << 20)
    count, length = 600, 50_000  # 30 MB
    rows = [Row(f"query {i}", [f"document {i} ".ljust(length, "x")], [], "rows", i + 1) for i in range(count)]
    data = tmp_path / "data"
    write_dataset(data, rows, dataset_module.Metadata(corpus_id="c"))
    write_dataset(tmp_path / "few", rows[:4], dataset_module.Metadata(corpus_id="c"))
    del rows
    written: list[str] = []
    append = Texts.append
    monkeypatch.setattr(Texts, "append", lambda self, text: written.append(text[:20]) or append(self, text))

    class Ends(FakeEmbedder):
        def encode(self, texts, prompt="", max_length=512):
            return np.stack([self.vector(text[:20]) for text in texts]).astype(np.float32)

    def run(data, output):
        rows = read_folder(DatasetConfig(path=str(data)), Ranks(), Findings())
        writer = FolderWriter(str(data), "out", "", "", by_ids=True)
        more = {"write": writer, "with_texts": False, "threshold": None, "shard_size": 100}
        return mine(rows, output, Ends(), num_negatives=1, **more)

    run(tmp_path / "few", tmp_path / "warm")
    written.clear()
    tracemalloc.start()
    try:
        report = run(data, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report["negatives"] == count and peak < 10e6, f"{peak / 1e6:.1f} MB"
    ids = {row["id"] for _, _, row in read_records(data, "corpus", False, Findings(), None, ["id"])}
    texts = [text for text in written if text not in {key[:20] for key in ids}]
    assert len(texts) < 300, "those of suspects alone: 50 x (1 + 3)"
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("queries*")) < 200_000


BAD = {
    "an id twice": lambda corpus, queries: corpus.append({**corpus[0], "text": "another"}),
    "a question twice": lambda corpus, queries: queries.append({**queries[1]}),
    "an unknown document": lambda corpus, queries: queries[7].update(pos_doc=[{"id": "d99"}]),
    "no positive": lambda corpus, queries: queries[9].update(pos_doc=[]),
    "an empty text": lambda corpus, queries: corpus[6].update(text="  "),
    "graded": lambda corpus, queries: [row.update(grade=3.0) for row in queries],
    "another corpus": lambda corpus, queries: [row.update(corpus_id="c") for row in queries[4:6]],
    "positive and negative": lambda corpus, queries: queries[2].update(neg_doc=queries[2]["pos_doc"]),
    "no rows": lambda corpus, queries: queries.__delitem__(slice(None)),
    "below 2": lambda corpus, queries: [row.update(grade=1.0) for row in queries],
    "below 2, a question twice": lambda corpus, queries: [
        row.update(grade=3.0 - 2 * (i % 2), question_id=f"q{i % 10}") for i, row in enumerate(queries)
    ],
    "below 2, not graded": lambda corpus, queries: [row.update(grade=3.0) for row in queries[:7]],
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_as_the_reader_says_it_by_all_ranks(name, tmp_path):
    corpus = [{"id": f"d{i}", "text": f"text {i}"} for i in range(12)]
    queries = [
        {"question_id": f"q{i}", "question": f"question {i}", "corpus_id": "toy", "grade": None,
         "pos_doc": [{"id": f"d{i}"}], "neg_doc": [{"id": f"d{i + 1}"}]}
        for i in range(11)
    ]  # fmt: skip
    whole = pa.Table.from_pylist(queries).schema
    BAD[name](corpus, queries)
    config = write(tmp_path / "data", corpus, queries or [{**dict.fromkeys(whole.names)}], group=2)
    if not queries:
        pq.write_table(pa.Table.from_pylist([], whole), tmp_path / "data/queries.parquet")
    config = replace(config, min_grade=2.0 if name.startswith("below 2") else None)
    with pytest.raises(UserError) as wanted:
        list(read_rows(config))

    def work(ranks):
        findings = Findings()
        assert read_folder(config, ranks, findings) is None
        with pytest.raises(UserError) as error:
            findings.raise_bad()
        return str(error.value)

    for size in (1, 3):
        assert set(on_ranks(size, work)) == {str(wanted.value)}


def test_notes_are_counted_over_ranks_and_a_file_that_changed_is_refused_by_all(tmp_path):
    corpus = [{"id": f"d{i}", "text": f"text {i // 2}"} for i in range(12)]
    queries = [
        {"question_id": f"q{i}", "question": f"question {i}", "corpus_id": "toy",
         "pos_doc": [{"id": f"d{2 * i}"}], "neg_doc": [{"id": f"d{2 * i + 1}"}, {"id": f"d{2 * i - 1}"}]}
        for i in range(1, 5)
    ]  # fmt: skip
    config = write(tmp_path / "data", corpus, queries, group=1)
    alone = Findings()
    assert len(list(read_rows(config, alone))) == 4
    (line,) = alone.lines()
    assert "negatives with the text of a positive, left out: 4 (first: " in line

    def work(ranks):
        findings = Findings()
        rows = read_folder(config, ranks, findings)
        return findings.lines(), rows.neg.ids.tolist()

    assert set(map(str, on_ranks(3, work))) == {str(([line], [0, 1, 2, 3]))}
    ours = tmp_path / "ours"
    write_dataset(ours, read_rows(config), dataset_module.Metadata(corpus_id="toy"))
    queries_file = ours / "queries.parquet"
    queries_file.write_bytes((tmp_path / "data/queries.parquet").read_bytes())

    def refused(ranks):
        with pytest.raises(UserError, match=r"queries.parquet is not the one that was written"):
            read_folder(DatasetConfig(path=str(ours)), ranks, Findings())

    on_ranks(2, refused)


def test_keys_are_compared_whole_and_lists_are_sets():
    zeros = [bytes(16), b"a" + bytes(15), b"a\0b".ljust(16, b"\0"), bytes(15) + b"a", bytes(16)]
    keys = as_keys(b"".join(zeros))
    assert first_of(keys).tolist() == [0, 1, 2, 3, 0]
    table = Numbers(keys[:3], np.array([7, 8, 9]))
    assert table.of(keys).tolist() == [7, 8, 9, -1, 7] and Numbers(keys[:0]).of(keys).tolist() == [-1] * 5
    random = as_keys(b"".join(exact_key(str(i % 700)) for i in range(2000)))
    assert first_of(random).tolist() == [i % 700 for i in range(2000)]
    lists = lists_of(np.array([2, 0, 2, 2]), np.array([5, 1, 3, 5]), 4)
    assert [lists.of(i).tolist() for i in range(4)] == [[1], [], [3, 5], []]


def test_what_stays_is_the_stated_bytes_a_document_and_a_row(tmp_path):
    def used(num_rows, num_documents):
        path = tmp_path / f"{num_rows}-{num_documents}"
        rows = (Row(f"query {i}", [f"document {i % 1000}"], [], "rows", i + 1) for i in range(num_rows))
        others = (("", f"document {i}") for i in range(num_documents))
        write_dataset(path, rows, dataset_module.Metadata(corpus_id="c"), others)
        tracemalloc.start()
        try:
            table = read_folder(DatasetConfig(path=str(path)), Ranks(), Findings())
            most = tracemalloc.get_traced_memory()[1]
            kept = [table, exclusions(table)]
            assert len(kept[0]) == num_rows
            return tracemalloc.get_traced_memory()[0], most
        finally:
            tracemalloc.stop()

    used(10, 1000)
    few, more_rows, more_documents = used(1000, 1000), used(4000, 1000), used(1000, 4000)
    a_row, a_document = (
        [(y - x) / 3000 for x, y in zip(few, more, strict=True)] for more in (more_rows, more_documents)
    )
    assert a_document[0] < 42 and a_document[1] < 170, a_document
    assert a_row[0] < 140 and a_row[1] < 250, a_row
