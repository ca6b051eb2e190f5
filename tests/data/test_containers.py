"""Every container gives the same rows, damage is named by line, and which files of a folder are read."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pytest
from fuzz import as_bytes

from nemo_embed_core.config import DataConfig, DatasetConfig
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.containers import json_items
from nemo_embed_core.data.readers import (
    BadLines,
    Findings,
    Row,
    check_sources,
    files_of,
    read_rows,
    reading,
    source_files,
)
from nemo_embed_core.errors import DataError, UserError


def rows_file(path: Path, records: list[dict]) -> Path:
    path.write_bytes(as_bytes(path.name, records))
    return path


def read(path: object, **options: object) -> list[Row]:
    return list(read_rows(DatasetConfig(path=str(path), **options)))


# ------------------------------------------------------------------------------------------ containers


def as_table(records: list[dict], path: Path) -> Path:
    """The records in the container that the name of `path` says."""
    kind = path.name.split(".")[1]
    if kind in ("csv", "tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(
            text, list(records[0]), delimiter="," if kind == "csv" else "\t", lineterminator="\r\n"
        )
        writer.writeheader()
        writer.writerows(records)
        data = text.getvalue().encode()
    elif kind == "json":
        data = json.dumps({"data": records} if "data" in path.name else records, indent=1).encode()
    elif kind == "jsonl":
        data = as_bytes("d.jsonl", records)
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        table = pa.Table.from_pylist(records)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        else:
            new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
            with new(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return path
    if path.suffix == ".zst":
        data = pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


TABLE = [
    {"anchor": f"q{i}, with a comma", "positive": f'p{i} "quoted" é', "negative": f"n{i}"} for i in range(5)
]
CONTAINERS = {
    "d.jsonl": 1,
    "d.jsonl.zst": 1,
    "d.jsonl.gz": 1,
    "d.json": 0,
    "d.data.json": 0,
    "d.csv": 2,
    "d.csv.gz": 2,
    "d.tsv": 2,
    "d.parquet": 1,
    "d.arrow": 1,
    "d.arrow.stream.arrow": 1,
}  # name -> line of the first row


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    records = [{k: v.replace('"', "'") for k, v in r.items()} for r in TABLE] if "tsv" in name else TABLE
    name = name.replace("d.data.json", "d.json.data.json").replace("d.arrow.stream", "d.arrow.stream")
    path = as_table(records, tmp_path / name)
    got = read(path)
    assert [(row.query, row.pos[0], row.neg[0]) for row in got] == [tuple(r.values()) for r in records]
    first = CONTAINERS.get(name, 0)
    if first:
        assert [row.line for row in got] == list(range(first, first + 5))
    else:  # a list over lines, indented by one: an object of three fields is five lines
        assert [row.line for row in got] == [row.line for row in sorted(got, key=lambda row: row.line)]
        lines = path.read_text().splitlines()
        assert all(lines[row.line - 1].strip() == "{" for row in got)


def test_classes_of_the_datasets_library_have_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "d")
    assert [(row.query, row.pos, row.neg) for row in read(tmp_path / "d")] == [
        ("a", ["yes"], ["no"]),
        ("b", ["no"], ["yes"]),
    ]
    with pytest.raises(UserError, match=r"has the splits \['train', 'test'\]: set the dataset's split"):
        read(tmp_path / "d", split="dev")


def test_shards_are_read_in_order_and_splits_kept_apart(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        count = 2 if split == "train" else 1
        records = [{"query": f"{split}{number}{i}", "pos": ["p"], "neg": []} for i in range(2)]
        rows_file(folder / f"{split}-{number:05}-of-{count:05}.jsonl", records)
    (folder / "README.md").write_text("x")
    findings = Findings()
    got = list(read_rows(DatasetConfig(path=str(folder)), findings))
    assert [(row.query, Path(row.path).name[:11], row.line) for row in got] == [
        ("train00", "train-00000", 1),
        ("train01", "train-00000", 2),
        ("train10", "train-00001", 1),
        ("train11", "train-00001", 2),
    ]
    assert list(findings.counts) == ["files of other splits, left out (test-00000-of-00001.jsonl)"]
    assert [row.query for row in read(folder, split="test")] == ["test00", "test01"]
    assert read(f"{folder}/train-*.jsonl") == got
    assert read(tmp_path) == got, "a folder as it is on the hub"
    with pytest.raises(UserError, match=r"has files of test, train: set the dataset's split"):
        read(folder, split="dev")
    (folder / "train-00000-of-00002.jsonl").unlink()
    with pytest.raises(UserError, match=r"train: 1 of 2 shards are there, number 0 is not"):
        read(folder)
    as_table(TABLE, folder / "x.parquet")
    with pytest.raises(UserError, match=r"files of several kinds"):
        read(folder)
    with pytest.raises(UserError, match=r"no file matches"):
        read(f"{folder}/*.csv")


def test_two_files_whose_lines_belong_together(tmp_path: Path) -> None:
    en, de = tmp_path / "en-de.en", tmp_path / "en-de.de"
    en.write_text("dog\ncat\n"), de.write_text("Hund\nKatze\n")
    assert [(row.query, row.pos, row.path, row.line) for row in read(f"{en},{de}")] == [
        ("dog", ["Hund"], str(en), 1),
        ("cat", ["Katze"], str(en), 2),
    ]
    assert [row.query for row in read(f"{de},{en}")] == ["Hund", "Katze"]
    de.write_text("Hund\nKatze\nMaus\n")
    with pytest.raises(DataError, match=r"en-de\.de:3: .*en-de\.en has 2 lines and this file more"):
        read(f"{en},{de}")
    de.write_text("Hund\n\n")
    with pytest.raises(DataError, match=r"en-de\.de:2: blank line: remove it, and the line that belongs"):
        read(f"{en},{de}")


# content by name -> (line, what the message has)
BROKEN = {
    "semicolons.csv": ("anchor;positive\na;b\n", 1, "columns are separated by ';' here and not by ','"),
    "sep.csv": ("sep=;\nanchor;positive\na;b\n", 1, "columns are separated by ';'"),
    "tabs.csv": ("anchor\tpositive\na\tb\n", 1, "separated by '\\t' here and not by ',': name the file .tsv"),
    "commas.tsv": ("anchor,positive\na,b\n", 1, "separated by ',' here and not by '\\t': name the file .csv"),
    "old_mac.csv": ("anchor,positive\ra,b\r", 1, "lines end in \\r alone: convert"),
    "open.csv": ('anchor,positive\na,"b\nc,d\n', 2, "a quote opens in this row and is not closed"),
    "behind.csv": ('anchor,positive\na,"b" c\n', 2, "a quote inside a quoted cell has to be doubled"),
    "spaces.csv": (
        "anchor, positive\na,b\n",
        1,
        "column ' positive' has spaces around its name: remove them",
    ),
    "case.csv": ("Anchor,positive,NEGATIVE\na,b,c\n", 1, "rename 'Anchor' to anchor, 'NEGATIVE' to negative"),
    "case.jsonl": (
        '{"Query": "q", "passage": "p"}\n',
        1,
        "f2llm has them in lower case: rename 'Query' to query",
    ),
    "some.jsonl": (
        '{"query": "q", "Pos": ["p"], "neg": []}\n',
        1,
        "ours has them in lower case: rename 'Pos' to pos",
    ),
    "comma.json": ('[{"anchor": "a", "positive": "b"},\n]', 2, "not JSON: a comma before ']'"),
    "comma2.json": ('{"data": [{"anchor": "a", "positive": "b"}],\n}', 2, "not JSON: a comma before '}'"),
    "ragged.csv": ("anchor,positive\na,b\nc\n", 3, "1 cells and 2 columns"),
    "blank.csv": ("anchor,positive\na,b\n\n", 3, "blank line: remove it"),
    "twice.csv": ("anchor,anchor\na,b\n", 1, "column 'anchor' stands twice"),
    "unnamed.csv": ("anchor,\na,b\n", 1, "not all have a name"),
    "header.tsv": ("anchor\tpositive\n", 1, "no rows: line 1 names the columns"),
    "headless.tsv": (
        "a dog\tein Hund\na cat\teine Katze\n",
        1,
        "where it is a row already, put a line such as",
    ),
    "quote.csv": ('anchor,positive\n"a"b,c\n', 2, "has to be doubled"),
    "empty.csv": ("", 1, "the file is empty"),
    "latin.csv": (b"anchor,positive\na,b\n" + b"\xe9,x\n", 3, "not UTF-8: byte 0xe9"),
    "multi.csv": ('anchor,positive\n"a\nb",c\nd\n', 4, "1 cells and 2 columns"),
    "broken.json": ('[{"anchor": "a", "positive": "p"},\n {"anchor": }]', 2, "not JSON: Expecting value"),
    "cut.json": ('[{"anchor": "a", "positive": "p"},\n', 2, "not JSON"),
    "two.json": ('[{"anchor": "a", "positive": "p"}] x', 1, "more text behind the end"),
    "item.json": ('[{"anchor": "a", "positive": "p"},\n 3]', 2, "a row must be an object"),
    "meta.json": (
        '{"data": [{"anchor": "a", "positive": "p"}],\n "version": 1}',
        2,
        "field 'version' beside the list",
    ),
    "twice.json": ('[{"anchor": "a",\n "anchor": "b"}]', 1, "duplicate key 'anchor'"),
    "nan.json": ('[{"query": "q", "pos": ["p"], "neg": [], "pos_scores": [NaN]}]', 1, "NaN is not JSON"),
    "none.json": ("[]", 1, "the file has no rows"),
    "no.parquet": ("anchor,positive\n", 1, "not a whole Parquet file"),
    "no.arrow": ("anchor,positive\n", 1, "not a whole Arrow file"),
    "no.jsonl.zst": ("plain text", 1, "not a whole Zstandard file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_by_line(tmp_path: Path, name: str) -> None:
    content, line, reason = BROKEN[name]
    path, findings = tmp_path / name, Findings()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    list(read_rows(DatasetConfig(path=str(path)), findings))
    assert findings.num_bad == 1 and findings.named[0].startswith(f"{path}:{line}: "), findings.named
    assert reason in findings.named[0]


def test_cut_columnar_files_and_nulls_are_refused_by_row(tmp_path: Path) -> None:
    path = as_table(
        [{**r, "negative": None} if i == 3 else r for i, r in enumerate(TABLE)], tmp_path / "d.parquet"
    )
    with pytest.raises(DataError, match=r"d\.parquet:4: field 'negative' must be a string, got null"):
        read(path)
    for name in ("d.parquet", "d.arrow"):
        path = as_table(TABLE, tmp_path / name)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(DataError, match=rf"{re.escape(name)}:1: not a whole (Parquet|Arrow) file"):
            read(path)
    optional = [
        {"query": "q", "pos": ["p"], "neg": [], "lang": "de"},
        {"query": "r", "pos": ["p"], "neg": [], "lang": None},
    ]
    assert [row.lang for row in read(as_table(optional, tmp_path / "o.parquet"))] == ["de", ""]


def test_a_number_across_the_border_of_what_is_read_at_once_is_one(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('{"version": '.ljust((1 << 20) - 1) + '12, "data": [{"query": "q"}]}')
    assert [value for _, _, value in json_items(path, Findings())] == [12, {"query": "q"}]


def test_row_groups_are_read_one_by_one(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"en": [f"{i:04x}" * 8000 for i in range(400)], "de": ["x"] * 400})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=20, compression="none")
    size = table.nbytes
    del table
    before, most = pa.total_allocated_bytes(), 0
    for count, _ in enumerate(read_rows(DatasetConfig(path=str(tmp_path / "d.parquet"))), 1):  # noqa: B007
        most = max(most, pa.total_allocated_bytes() - before)
    assert count == 400 and most < size / 4, (most, size)


def test_a_long_list_is_read_item_by_item(tmp_path: Path) -> None:
    """Items lie across the borders of what is read at once."""
    records = [{"query": f"{i} " + "é" * 700, "pos": ["p" * 500], "neg": []} for i in range(3000)]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size > 3 << 20
    assert [row.query for row in read(path)] == [r["query"] for r in records]


def test_rows_of_the_hub_are_streamed_by_the_datasets_library(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, subset, **options):
        asked.append((name, subset, options))
        return datasets.Dataset.from_list(TABLE).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    commit = "c" * 40
    config = DatasetConfig(path=f"hf://user/name/sub@{commit}:dev")
    got = list(read_rows(config))
    assert [row.query for row in got] == [r["anchor"] for r in TABLE] and got[2].line == 3
    assert asked == [("user/name", "sub", {"split": "dev", "revision": commit, "streaming": True})]
    assert source_files(config) == [] and f"hf=user/name/sub@{commit}:dev" in reading(config)
    with pytest.raises(UserError, match=r"its commit is not known .*: name the commit"):
        list(read_rows(DatasetConfig(path="hf://user/name@main")))
    with pytest.raises(UserError, match=r"write hf://user/name"):
        list(read_rows(DatasetConfig(path="hf://user")))


# ------------------------------------------------------------------------------------------ stores


def test_a_store_of_shards_and_prompts_names_rows_and_resumes(tmp_path: Path, tokenizer, monkeypatch) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        records = [
            {"query": f"q{name}{i}", "pos": [f"p{i}"], "neg": ["n"], "prompt": "Find" * (i % 2)}
            for i in range(3)
        ]
        rows_file(folder / name, records)
    pairs = as_table(TABLE, tmp_path / "d.parquet")
    en, de = tmp_path / "x.en", tmp_path / "x.de"
    en.write_text("dog\n"), de.write_text("Hund\n")
    sources = [DatasetConfig(path=str(path), task="Task") for path in (folder, pairs, f"{en},{de}")]
    config = DataConfig(datasets=sources, cache_dir=str(tmp_path / "cache"))
    log: list[str] = []
    store = open_store(config, tokenizer, log.append)
    where = [store.where(row).removeprefix(f"{tmp_path}/") for row in range(len(store))]
    assert where == [
        *(f"shards/{n}.jsonl:{i}" for n in "ab" for i in (1, 2, 3)),
        *(f"d.parquet:{i}" for i in range(1, 6)),
        "x.en:1",
    ]
    whole = ["qa.jsonl0", "Instruct: Find\nQuery: qa.jsonl1", "Instruct: Task\nQuery: q0, with a comma"]
    for row, right in zip((0, 1, 6), tokenizer.encode(whole, 512), strict=True):
        assert store.query_tokens(row).tolist() == right.tolist()
    assert "data sets read as flagembedding (set their format where it is another): 1" in log[0]
    monkeypatch.setenv("NEMO_EMBED_FAIL", "store.row@4:raise")
    monkeypatch.setattr("nemo_embed_core.data.compile.COMMIT_S", 0.0)
    again = DataConfig(datasets=sources, cache_dir=str(tmp_path / "other"))
    with pytest.raises(RuntimeError, match="injected"):
        open_store(again, tokenizer, log.append)
    monkeypatch.delenv("NEMO_EMBED_FAIL")
    resumed = open_store(again, tokenizer, log.append)
    assert any("going on with" in line for line in log)
    for file in store.folder.iterdir():
        assert file.read_bytes() == (resumed.folder / file.name).read_bytes(), file.name
    (folder / "a.jsonl").write_text(
        (folder / "a.jsonl").read_text().replace('"Find"', f'"{"Find it " * 600}"')
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*data\.query_max_length"):
        open_store(config, tokenizer, log.append)


# ------------------------------------------------------------------------------------------ which files


def test_files_named_after_splits_are_told_by_the_word(tmp_path: Path) -> None:
    for number, (one, other) in enumerate(
        [("train-1", "test-1"), ("train_0", "test_0"), ("nq_train", "nq_test"), ("Train", "Test")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in (one, other):
            rows_file(folder / f"{name}.jsonl", [{"query": name, "pos": ["p"], "neg": []}])
        assert [row.query for row in read(folder)] == [one]
        assert [row.query for row in read(folder, split="test")] == [other]
    (tmp_path / "words").mkdir()
    names = ["latest", "trainer", "contrast"]  # no words of their own
    for name in names:
        rows_file(tmp_path / "words" / f"{name}.jsonl", [{"query": name, "pos": ["p"], "neg": []}])
    assert [row.query for row in read(tmp_path / "words")] == sorted(names)


def test_a_link_that_leads_nowhere_is_no_missing_shard(tmp_path: Path) -> None:
    rows_file(tmp_path / "a.jsonl", [{"query": "q", "pos": ["p"], "neg": []}])
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    for path in (tmp_path, f"{tmp_path}/*.jsonl"):
        with pytest.raises(UserError, match=r"b\.jsonl does not exist"):
            read(path)


def test_shards_without_rows_are_said_and_not_all_may_be(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"anchor": ["a"], "positive": ["p"]})
    parquet.write_table(table.slice(0, 0), tmp_path / "0.parquet")
    parquet.write_table(table, tmp_path / "1.parquet")
    findings = Findings()
    assert [row.query for row in read_rows(DatasetConfig(path=str(tmp_path)), findings)] == ["a"]
    assert findings.counts["files without rows"] == 1
    parquet.write_table(table.slice(0, 0), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"1\.parquet:1: the file has no rows"):
        read(tmp_path)


def test_a_value_that_python_does_not_have_is_a_bad_row(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"a"] * 70 + [b"\xff"] + [b"a"] * 59, pyarrow.binary()).view(pyarrow.string())
    dates = pyarrow.array([0] * 128 + [2**62, 0], pyarrow.timestamp("us"))
    table = pyarrow.table({"anchor": texts, "positive": ["p"] * 130, "at": dates})
    parquet.write_table(table, tmp_path / "x.parquet")
    findings = Findings()
    rows = list(read_rows(DatasetConfig(path=str(tmp_path / "x.parquet"), ignore=["at"]), findings))
    assert [row.line for row in rows] == [line for line in range(1, 131) if line not in (71, 129)]
    with pytest.raises(BadLines) as error:
        findings.raise_bad()
    assert "x.parquet:71: column 'anchor' cannot be read: 'utf-8' codec" in str(error.value)
    assert "x.parquet:129: column 'at' cannot be read" in str(error.value)


def row_file(path: Path) -> Path:
    return rows_file(path, [{"query": path.name, "pos": ["p"], "neg": []}])


def test_rows_that_would_be_read_twice_or_not_at_all_are_refused(tmp_path: Path) -> None:
    row_file(tmp_path / "a.jsonl")
    data = gzip.compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    for path in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(UserError, match=r"has a\.jsonl and a\.jsonl\.gz, whose rows would be read twice"):
            read(path)
    (tmp_path / "a.jsonl.gz").rename(tmp_path / "b.jsonl.gz")
    assert len(read(tmp_path)) == 2
    for name in ("more", "de"):
        (tmp_path / name).mkdir()
        row_file(tmp_path / name / "c.jsonl")
    with pytest.raises(UserError, match=r"has rows in its folders de, more and beside them: give one folder"):
        read(tmp_path)
    for name in ("a.jsonl", "b.jsonl.gz"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"has rows in its folders de, more: .* glob such as .*/\*/\*$"):
        read(tmp_path)
    assert len(read(f"{tmp_path}/*/*")) == 2
    (tmp_path / "de" / "c.jsonl").unlink()
    (tmp_path / "more").rename(tmp_path / "data")
    assert len(read(tmp_path)) == 1, "as on the hub; an empty folder has no rows"


def test_folders_that_a_glob_would_pass_over_and_left_overs_of_other_sets_are_refused(tmp_path: Path) -> None:
    row_file(tmp_path / "a.jsonl")
    (tmp_path / "de").mkdir()
    assert len(read(f"{tmp_path}/*")) == 1, "an empty folder"
    row_file(tmp_path / "de" / "b.jsonl")
    with pytest.raises(UserError, match=rf"/\* matches {tmp_path}/de, a folder whose rows would not be read"):
        read(f"{tmp_path}/*")
    assert len(read(f"{tmp_path}/**")) == 2, "its files are matched, too"
    for number, total in ((0, 1), (0, 2), (1, 2)):
        row_file(tmp_path / "de" / f"train-{number:05d}-of-{total:05d}.jsonl")
    (tmp_path / "de" / "b.jsonl").unlink()
    for path in (tmp_path / "de", f"{tmp_path}/de/*"):
        with pytest.raises(UserError, match=r"de/train has shards of several sets, of 1 and of 2: remove"):
            read(path)
    (tmp_path / "de" / "train-00000-of-00001.jsonl").unlink()
    assert len(read(tmp_path / "de")) == 2
    (tmp_path / "de" / "b.csv").write_text("anchor,positive\na,b\n")
    with pytest.raises(UserError, match=rf"several kinds .* as {tmp_path}/de/\*\.jsonl$"):
        read(f"{tmp_path}/de/*")


def test_a_saved_split_whose_folder_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=rf"{tmp_path}/train does not exist, and dataset_dict\.json names it"):
        read(tmp_path)


def test_an_arrow_stream_that_ends_before_its_mark_or_goes_on_behind_it_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    rows, file = pyarrow.table({"anchor": ["a", "b"], "positive": ["p", "q"]}), tmp_path / "x.arrow"

    def stream(legacy: bool) -> bytes:
        buffer, how = io.BytesIO(), pyarrow.ipc.IpcWriteOptions(use_legacy_format=legacy)
        with pyarrow.ipc.new_stream(buffer, rows.schema, options=how) as writer:
            for _ in range(3):
                writer.write_table(rows)
        return buffer.getvalue()

    whole = stream(False)
    for data in (whole, stream(True)):
        file.write_bytes(data)
        assert len(read(file)) == 6
    size = len(rows.to_batches()[0].serialize())
    for data, message in (
        (whole[:-8], "the Arrow stream has no end mark: the file is truncated"),
        (whole[: -8 - size], "the Arrow stream has no end mark"),  # a whole batch less
        (whole + whole, f"not one Arrow stream: {len(whole)} bytes follow its end"),
    ):
        file.write_bytes(data)
        with pytest.raises(DataError) as error:
            read(file)
        assert message in str(error.value)


def test_a_glob_over_several_splits_is_said(tmp_path: Path) -> None:
    for name in ("nq_dev", "nq_train", "train-2"):
        row_file(tmp_path / f"{name}.jsonl")
    findings = Findings()
    assert len(list(read_rows(DatasetConfig(path=f"{tmp_path}/*.jsonl"), findings))) == 3
    assert list(findings.counts) == ["globs over files of several splits (dev, train), all of which are read"]
    findings = Findings()
    assert len(list(read_rows(DatasetConfig(path=f"{tmp_path}/*train*.jsonl"), findings))) == 2
    assert not findings.counts


def test_all_missing_sources_are_named_at_once(tmp_path: Path) -> None:
    there = row_file(tmp_path / "there.jsonl")
    paths = (tmp_path / "one.jsonl", there, f"{tmp_path}/*.parquet", tmp_path / "two.csv")
    datasets = [DatasetConfig(path=str(path)) for path in paths]
    for ask in (files_of, check_sources):
        with pytest.raises(UserError) as caught:
            ask(datasets)
        lines = str(caught.value).split("\n")
        assert len(lines) == 3 and "one.jsonl does not exist" in lines[0] and "two.csv" in lines[2], lines
    assert files_of(datasets[1:2]) == [[there]]
