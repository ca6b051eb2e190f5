"""A sample of `make fuzz`; what it compares with is right, as whole data is read as golden.py has it; and a
reader with a bug is found."""

import random
from pathlib import Path

import fuzz
import pytest
from golden import FOLDERS

from nemo_embed_core.data import containers, lines, records
from nemo_embed_core.data.formats import dataset, labels, ours, row, sts
from nemo_embed_core.data.readers import read_rows


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_a_sample_of_every_format(tmp_path: Path, name: str) -> None:
    seen = fuzz.run(name, 30, 1, tmp_path)
    assert min(seen["read"], seen["refused"]) >= 2, seen


@pytest.mark.parametrize("name", FOLDERS)
def test_whole_folders_are_read_as_they_are_meant(tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.setattr(fuzz.Case, "_break", lambda self, files, rng: None)
    case = fuzz.Case(name, random.Random(0), tmp_path)
    assert [(r.query, r.pos, r.neg) for r in read_rows(case.config)] == case.truth
    assert fuzz.judge(case) == "read"


def _replaced(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _cut(value, field: str) -> str:
    return lines.check_text(value, field)[:-1]


def _any(value, field: str) -> str:
    return row.check_string(value, field, "")


def _without_the_last(read):
    def shorter(*arguments):
        yield from list(read(*arguments))[:-1]

    return shorter


# name -> (format, module or class, its attribute, what a bug would make of it)
PLANTED = {
    "bytes that are not UTF-8 are replaced": ("aligned", records, "decode", _replaced),
    "a lone surrogate is text": ("ours", lines, "check_unicode", lambda value, field: None),
    "a bad row is passed over": ("f2llm", lines.Findings, "bad", lambda *_, **__: None),
    "a positive may be a negative": ("ours", ours, "check_disjoint", lambda *_: None),
    "texts are cut": ("dataset", dataset, "check_text", _cut),
    "spaces are a text": ("ours", ours, "check_text", _any),
    "an id may stand twice": ("dataset", dataset, "exact_key", lambda key: random.randbytes(16)),
    "any number is finite": ("sts", sts, "check_number", lambda value, field: float(value)),
    "the last record is lost": ("bitext", records, "READERS", {
        kind: _without_the_last(read) for kind, read in containers.READERS.items()
    }),
    "a reason is of Python": ("labels", labels, "check_text", lambda value, field: value.strip()),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(tmp_path: Path, monkeypatch, name: str) -> None:
    one, *bug = PLANTED[name]
    monkeypatch.setattr(*bug)
    with pytest.raises(AssertionError, match=f"^{one}, number"):
        fuzz.run(one, 300, 2, tmp_path)
