"""Folders of documents into pairs: what is a query of what, and which split it is in."""

import errno
import gzip
import io
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemo_embed_core.config import DatasetConfig, SelfPairsConfig, SynthesizeConfig
from nemo_embed_core.data.dataset import read_metadata
from nemo_embed_core.data.readers import read_rows
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import sha256_folder
from nemo_embed_core.synthesize import write_self_pairs

BODY = "The {0} machine stands in hall {1}. It was built by the people of {0} in a long winter. "
GUIDE = f"""# Machines of the north

{BODY.format("weaving", 1)}

## Repair

{BODY.format("boring", 2)}Who repairs the boring machine? Its smith comes on Mondays with tools.

{BODY.format("rolling", 3)}

## How are the machines driven today

{BODY.format("driving", 4)}
"""
PYTHON = '''def f():
    """Turn the spindle once around its axis.

    The spindle is turned by the motor that stands behind it, and nothing else moves then.
    """
'''


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return folder


def run(
    folder: Path, out: Path, held_out: float = 0.0, **options: object
) -> tuple[dict[str, dict[str, int]], str]:
    config = SynthesizeConfig(
        documents=str(folder), output=str(out), self_pairs=SelfPairsConfig(held_out=held_out, **options)  # type: ignore[arg-type]
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as printed:
        return write_self_pairs(config), printed.getvalue()


def rows(folder: Path) -> dict[str, list[str]]:
    return {row.query: list(row.pos) for row in read_rows(DatasetConfig(path=str(folder)))}


def test_titles_headings_summaries_questions_and_sentences_are_taken_out(tmp_path: Path) -> None:
    counts, _ = run(
        write(tmp_path / "in", guide_md=GUIDE, code_py=PYTHON), tmp_path / "out", max_chars=220, min_chars=20
    )
    found = rows(tmp_path / "out/train")
    first, boring, rolling, driving = (
        next(texts for texts in found.values() if re.search(rf"{word} (in a|machine st)", "".join(texts)))
        for word in ("weaving", "boring", "rolling", "driving")
    )  # fmt: skip
    assert found["Machines of the north"] == first
    assert found["Machines of the north: Repair"] == [*boring, *rolling]
    assert found["Who repairs the boring machine?"] == boring and "Who repairs" not in boring[0]
    assert found["How are the machines driven today"] == driving
    (spindle,) = found["Turn the spindle once around its axis."]
    assert spindle.startswith("The spindle is turned")
    taken = {query for query in found if query.endswith(".") and not query.startswith("Turn")}
    assert len(taken) == 4 and all(query not in text for query in taken for text in found[query])
    assert all(query + " " in GUIDE.replace("\n", " ") for query in taken)  # the authors' own words
    assert counts["train"]["title"] == 1 and counts["train"]["queries"] == len(found) == 9
    assert counts["train"]["documents"] == 5  # a chunk is one document for all of its queries
    about = read_metadata(tmp_path / "out/train")
    assert about.query_instruction.endswith("that it is about\nQuery:") and about.source == "self-pairs of in"


@pytest.mark.parametrize("way", ["title", "heading", "summary", "question", "sentence"])
def test_only_the_ways_that_are_asked_for(tmp_path: Path, way: str) -> None:
    counts, _ = run(write(tmp_path / "in", guide_md=GUIDE, code_py=PYTHON), tmp_path / "out", ways=[way])
    assert counts["train"][way] == counts["train"]["queries"] > 0
    texts = pq.read_table(tmp_path / "out/train/corpus.parquet")["text"].to_pylist()
    assert any("Who repairs" in text for text in texts) == (way != "question")


def test_held_out_documents_are_whole_and_no_text_is_in_both_splits(tmp_path: Path) -> None:
    files = {f"m{i}_md": f"# Machine number {i}\n\n{BODY.format(f'kind {i}', i)}\n" for i in range(60)}
    text = (
        "This machine is bought from the house of the north and paid for in silver and in wool, as all are."
    )
    # One heading over texts of their own, and headings of their own over one text: in c2 and h3 for training,
    # in the others held out.
    files |= {f"c{i}_md": f"# Common words of the house\n\n{BODY.format(f'sort {i}', i)}" for i in (1, 2, 3)}
    files |= {f"h{i}_md": f"# The title of {i} alone\n\n{text}\n\n## End {i}" for i in (1, 2, 3)}
    counts, _ = run(write(tmp_path / "in", **files), tmp_path / "out", held_out=0.4)
    train, test = rows(tmp_path / "out/train"), rows(tmp_path / "out/test")
    ids = {
        name: {
            key.partition("#")[0]
            for key in pq.read_table(tmp_path / f"out/{name}/corpus.parquet")["id"].to_pylist()
        }
        for name in ("train", "test")
    }
    assert len(ids["train"] | ids["test"]) == 65 and not ids["train"] & ids["test"]
    assert 10 < len(ids["test"]) < 40
    assert (
        "Common words of the house" in train
        and [text] in train.values()
        and counts["test"]["in train too"] == 3
    )
    assert not train.keys() & test.keys()
    assert not {text for texts in train.values() for text in texts} & {
        text for ts in test.values() for text in ts
    }
    # A document more moves no other one into another split.
    write(tmp_path / "in", more_md=GUIDE)
    run(tmp_path / "in", tmp_path / "again", held_out=0.4)
    assert {q for q in rows(tmp_path / "again/test") if q.startswith("Machine number")} == {
        q for q in test if q.startswith("Machine number")
    }


def test_a_sentence_of_a_script_without_spaces_is_a_query(tmp_path: Path) -> None:
    found = ["獾住在森林里的地下洞穴中。", "它们在夜间出来寻找食物和水。", "冬天的时候它们很少离开洞穴。"]
    run(write(tmp_path / "in", a_md="".join(found)), tmp_path / "out", ways=["sentence"], min_chars=20)
    (query,) = rows(tmp_path / "out/train")
    assert query in found


def test_a_heading_of_many_chunks_tells_nothing_and_is_left_out(tmp_path: Path) -> None:
    files = {
        f"m{i}_rst": f"Parameters of it\n==================\n\n{BODY.format(f'kind {i}', i)}\n"
        for i in range(5)
    }
    counts, _ = run(write(tmp_path / "in", **files), tmp_path / "out", min_chars=20)
    assert counts["train"]["too general"] == 1 and "Parameters of it" not in rows(tmp_path / "out/train")
    files.pop("m4_rst")
    run(write(tmp_path / "four", **files), tmp_path / "of4", min_chars=20)
    assert len(rows(tmp_path / "of4/train")["Parameters of it"]) == 4  # one row with all of them


def locked(scandir: Any) -> Any:
    """For root as well, who may read every folder."""

    def without(path: Any) -> Any:
        if str(path).endswith("/locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    return without


def test_what_is_not_read_is_counted_by_reason_and_the_same_bytes_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(
        tmp_path / "in", a_md=GUIDE, b_md_gz=GUIDE.replace("  ", " ").upper(), sub__c_txt="  \n", d_png="x",
        e_txt="a\0b", f_py="def (", _hidden_md=GUIDE,
    )  # fmt: skip
    (folder / "g.txt").write_bytes(b"\xff\xfe")
    (folder / "h.txt.gz").write_bytes(gzip.compress(GUIDE.encode())[:40])
    Path(os.fsdecode(bytes(folder) + b"/caf\xe9.md")).write_text(GUIDE.replace("machine", "engine"))
    (folder / "i.txt").symlink_to("nothing")
    (folder / "j.txt").symlink_to("/proc/self/mem")  # opens, and cannot be read
    os.mkfifo(folder / "k.txt")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", locked(os.scandir))
    _, said = run(folder, tmp_path / "one")
    for reason in ("a copy of an earlier document (first: b.md.gz)", "no content (first: sub/c.txt)",
                   "another suffix (.png 1)", "binary (first: e.txt)", "not UTF-8 (first: g.txt)",
                   "damaged gzip (first: h.txt.gz)",
                   "cannot be read (No such file or directory) (first: i.txt)",
                   "cannot be read (Input/output error) (first: j.txt)", "no ordinary file (first: k.txt)",
                   "a folder that cannot be read (Permission denied) (first: locked)",
                   "a link to a folder, which is not followed (first: sub/up)",
                   "hidden, as their names begin with a dot (first: .hidden.md)",
                   "not Python that this interpreter reads: SyntaxError (first: f.py)"):  # fmt: skip
        assert f"in: 1 files left out: {reason}\n" in said, (reason, said)
    ids = pq.read_table(tmp_path / "one/train/corpus.parquet")["id"].to_pylist()
    assert {key.partition("#")[0] for key in ids} == {"a.md", r"caf\xe9.md"}
    run(folder, tmp_path / "two")
    assert sha256_folder(tmp_path / "one") == sha256_folder(tmp_path / "two")


@pytest.mark.parametrize(
    "held_out, files, says",
    [
        (0.0, {"a_png": "x"}, "holds no document that can be read"),
        (0.0, {"a_txt": "only this"}, "the 1 files for train in .* give no pair of title, heading"),
        (0.001, {"a_md": GUIDE}, "the 0 files for test in .* raise self_pairs.held_out, or set it to 0"),
    ],
)
def test_a_folder_without_pairs_is_refused_and_leaves_nothing(
    tmp_path: Path, held_out: float, files: dict[str, str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        run(write(tmp_path / "in", **files), tmp_path / "out", held_out=held_out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_sample_of_the_files_is_one_of_both_splits_and_keeps_its_files(tmp_path: Path) -> None:
    for i in range(60):
        write(tmp_path / "in", **{f"a{i}_md": f"# Title of number {i}\n\n{BODY.format(i, i)}"})
    (tmp_path / "in/not.csv").write_text("x")

    def files(most: int, seed: int = 0) -> tuple[set[str], set[str]]:
        out = tmp_path / f"out-{most}-{seed}"
        how = {"max_documents": most, "seed": seed, "self_pairs": {"held_out": 0.4}}
        config = SynthesizeConfig.from_dict({"documents": str(tmp_path / "in"), "output": str(out), **how})
        said: list[str] = []
        write_self_pairs(config, said.append)
        assert (f"{tmp_path}/in: {most} of 60 files are read: max_documents={most}" in said) == (most < 60)
        ids = [pq.read_table(out / side / "corpus.parquet")["id"].to_pylist() for side in ("train", "test")]
        return tuple({key.split("#")[0] for key in side} for side in ids)  # type: ignore[return-value]

    whole, some, fewer = files(60), files(30), files(20)
    assert len(some[0] | some[1]) == 30 and len(fewer[0] | fewer[1]) == 20
    for side in (0, 1):
        assert fewer[side] < some[side] < whole[side]  # what is held out stays so
    assert 6 <= len(some[1]) <= 18
    assert files(30, seed=1)[0] != some[0]


def test_a_digest_of_documents_is_of_what_is_read(tmp_path: Path) -> None:
    from nemo_embed_core.synthesize.documents import digest_of_documents

    folder = write(tmp_path / "in", a_md=GUIDE, sub__b_txt=BODY.format("other", 7))
    before = digest_of_documents(folder)
    (folder / "other.csv").write_text("1,2")
    (folder / ".hidden.md").write_text("# Hidden")
    (folder / "loop").symlink_to(folder)
    assert digest_of_documents(folder) == before
    (folder / "sub/b.txt").rename(folder / "sub/c.txt")
    renamed = digest_of_documents(folder)
    (folder / "a.md").write_text(GUIDE + "\n\nMore.\n")
    assert len({before, renamed, digest_of_documents(folder)}) == 3
    for wrong, says in ((tmp_path / "gone", "is no folder"), (tmp_path / "empty", "holds no document")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=says):
            digest_of_documents(wrong)
