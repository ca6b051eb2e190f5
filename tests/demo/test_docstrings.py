"""The demo's corpus: what is taken from a source file, that nothing is imported, and that the splits share no
text."""

import json
from pathlib import Path

import pytest

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.readers import read_beir, read_rows
from nemo_embed_core.demo.docstrings import (
    Doc,
    default_roots,
    extract,
    split,
    split_docstring,
    write_demo_data,
)
from nemo_embed_core.errors import UserError

REST = (
    "A passage that is long enough to be kept: it says at length what the function is for and how to call it."
)

SOURCE = f'''
"""A module docstring is not taken: it has no single summary."""
raise SystemExit("imported")          # parsing must not run this

class Box:
    """A box that holds\n    many things.

    {REST}

      indented example
    """

    def open(self):
        """Open the box and look inside.

        {REST} Open.
        """
        def inner():
            """A function inside a function is left out.

            {REST} Inner.
            """

if True:
    try:
        pass
    except ImportError:
        async def late(x):
            r"""Defined in a handler, with a \\d escape.

            {REST} Late.
            """

def copied():
    """Open the box and look inside.

    {REST} Open.
    """

def brief():
    """Too little after the summary line.

    Short.
    """
'''


def _package(folder: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    return folder


def test_rows_of_a_source_file(tmp_path: Path) -> None:
    root = _package(
        tmp_path / "pkg",
        {
            "a/box.py": SOURCE,
            "a/tests/test_box.py": SOURCE.replace("box", "cube"),
            "_vendor/x.py": SOURCE.replace("box", "cube"),
            "broken.py": 'def f(:\n  """x"""',
            "nul.py": '"""\0"""',
        },
    )
    docs = extract([root])
    assert [(doc.id.split(":")[0], doc.id.split(":")[2], doc.query) for doc in docs] == [
        ("pkg/a/box.py", "Box", "A box that holds many things."),
        ("pkg/a/box.py", "Box.open", "Open the box and look inside."),
        ("pkg/a/box.py", "late", "Defined in a handler, with a \\d escape."),
    ]
    assert docs[0].passage == f"{REST}\n\n  indented example"
    assert docs == extract([root])


@pytest.mark.parametrize(
    "docstring, why",
    [
        (f"Too short a line.\n\n{REST}", "19 characters at most"),
        (f"{'Long ' * 51}.\n\n{REST}", "over 250"),
        ("A summary line and nothing else.", "no passage"),
        (f"Parameters\n----------\nx : int, the number\n\n{REST}", "a heading"),
        (f"A summary with a lone surrogate \ud83d.\n\n{REST}", "no UTF-8 form"),
    ],
)
def test_left_out(docstring: str, why: str) -> None:
    assert split_docstring(docstring) is None, why


def test_passage_is_cut_at_2000_characters() -> None:
    pair = split_docstring("A summary of a long text.\n\n" + "word " * 1000)
    assert pair is not None and len(pair[1]) == 1999  # "word " * 400 without the last blank


def _docs(num_groups: int, per_group: int) -> list[Doc]:
    return [
        Doc(f"pkg{g}/sub/m{i % 3}.py:{i}:f", f"Summary {i} of group number {g}.", f"{REST} {g} {i}")
        for g in range(num_groups)
        for i in range(per_group)
    ]


def test_splits_share_no_group_and_no_text() -> None:
    docs = _docs(200, 6)
    first = {name: rows[0] for name, rows in split(docs).items() if rows}
    # The same passage, then the same query, in another split: the row goes, and the one that is trained on
    # stays.
    docs += [
        Doc(first["test"].id + "copy", "Another summary of the passage.", first["train"].passage),
        Doc(first["test"].id + "query", first["dev"].query, f"{REST} another passage"),
        Doc(first["dev"].id + "copy", "A third summary of the passage.", first["train"].passage),
    ]
    splits = split(docs)
    assert sorted(doc.id for doc in splits["dropped"]) == sorted(doc.id for doc in docs[-3:])
    assert sum(map(len, splits.values())) == len(docs)
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert splits[a] and splits[b]
        assert not {doc.group for doc in splits[a]} & {doc.group for doc in splits[b]}
        for field in ("query", "passage"):
            assert not {getattr(doc, field) for doc in splits[a]} & {getattr(doc, field) for doc in splits[b]}


def test_written_data_is_read_by_our_readers(tmp_path: Path) -> None:
    docs = _docs(200, 6)
    twin = split(docs)["train"][0]
    docs.append(Doc(twin.id + "twin", twin.query, f"{REST} second positive"))
    counts = write_demo_data(tmp_path, num_test_queries=60, num_dev_queries=20, seed=1, docs=docs)
    rows = list(read_rows(DatasetConfig(path=str(tmp_path / "train.jsonl"))))
    assert len(rows) == counts["train_queries"] == counts["train_rows"] - 1
    assert next(row.pos for row in rows if row.query == twin.query) == [
        twin.passage,
        f"{REST} second positive",
    ]
    passage_of = {doc.query: doc.passage for doc in docs}
    for name, num_queries in (("test", 60), ("dev", 20)):
        beir = read_beir(DatasetConfig(path=str(tmp_path / name), split="test"))
        assert len(beir.queries) == len(beir.qrels) == num_queries
        assert len(beir.corpus) == counts[f"{name}_rows"]  # small: all of the split is in the corpus
        for query_id, judged in beir.qrels.items():
            assert [beir.corpus[i] for i in judged] == [passage_of[beir.queries[query_id]]]
    again = tmp_path / "again"
    write_demo_data(again, num_test_queries=60, num_dev_queries=20, seed=1, docs=docs)
    for file in ("train.jsonl", "test/corpus.jsonl", "test/queries.jsonl", "test/qrels/test.tsv"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()


def test_corpus_is_filled_with_distractors_up_to_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_embed_core.demo.docstrings.TEST_CORPUS_SIZE", 50)
    counts = write_demo_data(tmp_path, num_test_queries=20, num_dev_queries=10, docs=_docs(200, 6))
    assert counts["test_corpus"] == 50 and counts["test_rows"] > 50


def test_too_few_docstrings_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1000 queries asked for, but .* give \d+ "):
        write_demo_data(tmp_path, num_dev_queries=1, docs=_docs(200, 6))


def test_the_standard_library_alone_gives_rows() -> None:
    roots = [root for root in default_roots() if root.name in ("argparse.py", "logging", "asyncio", "email")]
    assert len(roots) == 4
    docs = extract(roots)
    assert len(docs) > 200 and len({doc.id for doc in docs}) == len(docs)
    assert all(20 <= len(doc.query) <= 250 and 80 <= len(doc.passage) <= 2000 for doc in docs)
    json.dumps([doc.query + doc.passage for doc in docs], ensure_ascii=False).encode()
