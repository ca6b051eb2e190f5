"""A teacher's vectors on their way from a mining into batches: each belongs to its text, or is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_mining import FakeEmbedder, mine

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.packing import build_micro_batch
from nemo_embed_core.data.readers import read_rows
from nemo_embed_core.data.store import TEXT_KEYS, Store
from nemo_embed_core.data.teacher_vectors import TeacherVectors, teacher_width, vectors_of
from nemo_embed_core.data.vectors import Vectors, write_keys
from nemo_embed_core.errors import UserError


def write_rows(path: Path, of: str) -> list[dict[str, Any]]:
    """Ten rows; a query twice, with another instruction, a document of several rows, "shared" ones of all
    files."""
    rows = [
        {"query": f"{of} {i}", "pos": [f"right {of} {i}", "shared pos"][: 1 + i % 2],
         "neg": [f"wrong {of} {j}" for j in range(i % 4)] + ["shared neg"] * (i % 3 == 0)}
        for i in range(8)
    ]  # fmt: skip
    rows.append({"query": "shared query", "pos": [f"right {of}"], "neg": ["wrong"]})
    rows.append(
        {"query": "shared query", "pos": [f"right {of}"], "neg": ["wrong"], "prompt": "as asked: {text}"}
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def mined(folder: Path, of: str, digest: str = "fake", width: int = 32, task: str = "") -> DatasetConfig:
    """A data set of what was mined of it, and the folder of its vectors."""
    write_rows(folder / f"{of}.jsonl", of)
    given = read_rows(DatasetConfig(path=str(folder / f"{of}.jsonl")))
    embedder = FakeEmbedder(width, digest)
    mine(given, folder / f"{of}-mined.jsonl", embedder, num_negatives=3, prompt=task)
    return DatasetConfig(
        path=str(folder / f"{of}-mined.jsonl"), task=task + "{text}",
        teacher_vectors=str(folder / f"{of}-mined.jsonl.work"),
    )  # fmt: skip


def open_(folder: Path, tokenizer: Any, *datasets: DatasetConfig) -> Store:
    data = DataConfig(datasets=list(datasets), cache_dir=str(folder / "cache"), num_hard_negatives=3)
    return open_store(data, tokenizer, log=lambda line: None)


def test_every_text_of_a_batch_has_the_vector_that_the_mining_of_its_dataset_gave_it(
    tmp_path: Path, tokenizer: Any
) -> None:
    """By the text: the same query of two datasets, and with two instructions, has its own."""
    tasks = {"one": "first: ", "two": "second: "}
    datasets = [mined(tmp_path, of, task=task) for of, task in tasks.items()]
    store = open_(tmp_path, tokenizer, *datasets)
    teacher = TeacherVectors(store, datasets)
    teacher.check()
    assert (teacher.width, teacher.models) == (32, ["fake"])
    rows = np.random.default_rng(0).permutation(len(store))
    assert len(rows) == 20
    ids = np.full((len(rows), 4), -1, np.int64)
    texts: dict[int, str] = {}
    wanted = np.zeros((len(rows), 5, 32))
    lines = [json.loads(line) for d in datasets for line in Path(d.path).read_text().splitlines()]
    for i, row in enumerate(rows.tolist()):
        line, embedder = lines[row], FakeEmbedder()
        prompt = line.get("prompt", tasks["one" if row < 10 else "two"]).removesuffix("{text}")
        wanted[i, 0] = embedder.vector(prompt + line["query"])
        own = [*zip(store.positives(row)[:1], line["pos"], strict=False)]
        own += [*zip(store.negatives(row), line["neg"], strict=True)][i % 2 :]  # and not always the first
        for place, (doc_id, text) in enumerate(own):
            ids[i, place], wanted[i, 1 + place] = doc_id, embedder.vector(text)
            assert texts.setdefault(int(doc_id), text) == text
    found = teacher.of(rows, ids)
    assert found.dtype == np.float16 and (ids < 0).any()
    np.testing.assert_array_equal(found, wanted.astype(np.float32).astype(np.float16))
    vectors = build_micro_batch(store, rows, ids, vectors=teacher).teacher_vectors
    assert vectors is not None and np.array_equal(vectors.numpy(), found)
    assert build_micro_batch(store, rows, ids).teacher_vectors is None


def test_a_dataset_folder_is_found_by_its_texts_too(tmp_path: Path, tokenizer: Any) -> None:
    from nemo_embed_core.data.prepare import write_datasets

    dataset = mined(tmp_path, "one")
    lines = Path(dataset.path).read_text().splitlines(keepends=True)
    Path(dataset.path).write_text("".join(lines[:-1]))  # a folder has one instruction for all queries
    data = DataConfig(datasets=[dataset], cache_dir=str(tmp_path / "cache"), num_hard_negatives=3)
    (folder,) = write_datasets(data, str(tmp_path / "folder"), lambda line: None).datasets
    store = open_(tmp_path, tokenizer, folder)
    teacher = TeacherVectors(store, [replace(folder, teacher_vectors=dataset.teacher_vectors)])
    teacher.check()
    (query,) = teacher.of(np.array([3]), np.zeros((1, 0), np.int64))[0]
    np.testing.assert_array_equal(query, FakeEmbedder().vector("one 3").astype(np.float32).astype(np.float16))


def test_a_text_without_a_vector_is_named_by_its_row(tmp_path: Path, tokenizer: Any) -> None:
    one, two = (mined(tmp_path, of) for of in ("one", "two"))
    both = [one, replace(two, teacher_vectors=one.teacher_vectors)]  # whose own has all of them
    store = open_(tmp_path, tokenizer, one, two)
    with pytest.raises(
        UserError,
        match=r"one-mined.jsonl.work has no vector of 8 of 10 queries; the first is of .*two-mined.jsonl:1: ",
    ):
        TeacherVectors(store, both).check()
    lines = [json.loads(line) for line in Path(one.path).read_text().splitlines()]
    lines[4]["neg"].append("a text that came later")
    lines[4]["neg_scores"].append(0.0)
    Path(one.path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        UserError, match=r"no vector of 1 of \d+ documents; the first is of .*one-mined.jsonl:5: "
    ):
        TeacherVectors(open_(tmp_path, tokenizer, one), [one]).check()
    with pytest.raises(
        UserError, match=r"data.datasets has 1 and the store .* was made of 2: name all of them"
    ):
        TeacherVectors(store, [one])


def test_what_is_no_teacher_is_refused_by_name(tmp_path: Path, tokenizer: Any) -> None:
    one = mined(tmp_path, "one")
    with pytest.raises(
        UserError, match=r"data.datasets: .*one-mined.jsonl names none: set its teacher_vectors"
    ):
        vectors_of([one, replace(one, teacher_vectors="")])
    with pytest.raises(
        UserError, match=r"cache holds no vectors of queries: give the folder .*<output>.work"
    ):
        vectors_of([replace(one, teacher_vectors=str(tmp_path / "cache"))])
    for of, options, says in (
        ("wide", {"width": 40}, r"of other columns, 32 and 40: one projection has one teacher"),
        ("other", {"digest": "another"}, r"of other models, \['fake'\] and \['another'\]"),
    ):
        with pytest.raises(UserError, match=says):
            vectors_of([one, mined(tmp_path, of, **options)])
    store = open_(tmp_path, tokenizer, one)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    for name in TEXT_KEYS:
        del manifest["files"][name]
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"built before stores kept keys of texts.* delete that folder"):
        TeacherVectors(Store(store.folder), [one])


def test_keys_belong_to_their_shards_or_are_refused(tmp_path: Path) -> None:
    work = Path(mined(tmp_path, "one").teacher_vectors)
    keys = {path.name: path.read_bytes() for path in (work / "keys").iterdir()}
    assert keys.keys() == {f"{s}.{e}" for s in ("queries", "documents") for e in ("keys", "rows", "json")}
    write_keys(work, queries=())  # which are there, and not read again
    assert keys == {path.name: path.read_bytes() for path in (work / "keys").iterdir()}
    (work / "keys/queries.rows").write_bytes(keys["queries.rows"][:-8])
    with pytest.raises(UserError, match=r"queries.rows has .* bytes instead of .*: delete .*keys"):
        Vectors(work)
    (work / "keys/queries.rows").write_bytes(keys["queries.rows"])
    sidecar = work / "documents/00000.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "texts": "others"}))
    with pytest.raises(
        UserError, match=r"keys/documents.*, which say whose .* are of other shards: delete the output"
    ):
        Vectors(work)
    (work / "keys/queries.json").unlink()
    with pytest.raises(UserError, match=r"keys/queries.*are not there: delete the output"):
        Vectors(work)


def test_the_width_is_asked_for_where_the_loss_does(tmp_path: Path) -> None:
    from tiny import train_config

    dataset = mined(tmp_path, "one", width=24)
    config = train_config(tmp_path, data={"datasets": [dataset]})
    assert teacher_width(config) == 0
    assert teacher_width(replace(config, loss=replace(config.loss, teacher_vectors_weight=1.0))) == 24
