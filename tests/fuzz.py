"""`make fuzz`: data of every format with one thing broken, a thousand times each. What is read is clean and
whole; what is refused names path, line and reason; nothing else happens.

    python tests/fuzz.py [--rows 1000] [--only NAME ...] [--seed 0]

The truth is golden.py's; what a file holds is found again from its bytes, without a line of the readers: the
strings of JSON by one expression, cells by splitting, columns by pyarrow. Judged are, of rows that are read:
texts of valid Unicode with content, each whole in the file (or a title, a space and a text); at least one
positive and none among the negatives; scores and ids as many as texts; ids once; a place that exists. As many
rows as records where nothing is said; no record between others that is neither read nor refused; those that
are whole as golden.py has them. Of refusals: path, line, reason, one line of at most 600 characters.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import io
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from golden import FOLDERS, GOLDEN

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.readers import Findings, read_beir, read_rows, reading, source_files
from nemo_embed_core.errors import UserError

NAMES = (*GOLDEN, *FOLDERS)
COLUMNS = {"sentence-transformers", "sts", "bitext"}  # every row has those of the first
CONTAINERS = ("jsonl",) * 6 + (
    "json", "data.json", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "stream.arrow", "csv", "tsv", "csv.gz",
)  # fmt: skip
DEEP = "a list in a list in a list .."  # becomes one, where it is written as JSON
ODD = [
    None, True, False, 0, 7, -1, 2.5, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\u3000", "\t",
    "a\nb", "\ud83d", "\ufeff", "\u200b", "x" * 3000, [], {}, ["x"], {"text": "x"}, {"id": "a"}, [None], [[]],
    [""], DEEP,
]  # fmt: skip
File = list[dict[str, Any]] | list[str] | dict[str, Any]


# ------------------------------------------------------------------------------------------ one thing broken


def mutated(rng: random.Random, record: dict[str, Any]) -> dict[str, Any]:
    """The record with one thing broken, at any depth."""
    record = copy.deepcopy(record)
    place: Any = record
    while True:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys) if keys else None
        inner = place[key] if key is not None else None
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            place = inner
            continue
        how = rng.choice(["value", "value", "drop", "extra", "rename", "copy"])
        if key is None or (how == "extra" and isinstance(place, dict)):
            record[rng.choice(["extra", "id", "score", "label", "é", "title", "prompt"])] = rng.choice(ODD)
        elif how == "drop":
            del place[key]
        elif how == "rename" and isinstance(place, dict):
            place[rng.choice([f"{key}s", str(key).upper(), f" {key}"])] = place.pop(key)
        elif how == "copy":
            place[key] = copy.deepcopy(rng.choice([*record.values(), *texts_of(record)]))
        else:
            place[key] = rng.choice(ODD)
        return record


def texts_of(value: Any) -> list[str]:
    """The strings in it, but for the keys of objects."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for one in inner for text in texts_of(one)]


def broken_line(rng: random.Random, line: str) -> str:
    cells = line.split("\t")
    at = rng.randrange(len(cells))
    cells[at] = rng.choice(
        ["", " ", "zz", "a", "1", "-1", "1.5", "\u200b", f"{cells[at]} ", f'"{cells[at]}"', "\ud800"]
    )
    changed = "\t".join(cells)
    return rng.choice([
        changed, changed, changed, "", line + "\t", line + "\tx", line.replace("\t", " "),
        line.replace("\t", ",", 1), "x" * 300, "{}", "PAR1", line[:-1], cells[-1],
        "\t".join(reversed(line.split("\t"))),
    ])  # fmt: skip


def broken_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    how = rng.randrange(15)
    if how == 0:
        return data[:at]  # cut short
    if how in (1, 12, 13, 14):
        return (
            data[:at]
            + rng.choice([b"\xff", b"\xc3", b"\x00", b"\r", b"\n", b"\xef\xbb\xbf", b"\xed\xa0\x80"])
            + data[at:]
        )
    if how == 2:
        return data.replace(b"\n", b"\r\n")
    if how == 3:
        return data.replace(b"\n", b"\r")
    if how == 4:
        return b"\xef\xbb\xbf" + data
    if how == 5:
        return data.decode("utf-8", "replace").encode("utf-16")
    if how == 6:
        return re.sub(rb'\{"(\w+)"', rb'{"\1": "again", "\1"', data, count=1)  # a key twice
    if how == 7:
        return data + rng.choice([b"\n", b"\n\n", b"x", b"{}\n", b"\x1a"])
    if how == 8:
        return rng.choice([b"", b"\n", b"PAR1", b"<html>\n", b"\x80\x04", gzip.compress(data)])
    if how == 9:
        return data[:at] + data[at + 1 :]
    if how == 10:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data.removesuffix(b"\n")


def broken_table(rng: random.Random, table: Any) -> Any:
    """A column of another type, of nulls, twice, renamed or gone."""
    at = rng.randrange(table.num_columns)
    name, n = table.column_names[at], table.num_rows
    how = rng.randrange(6)
    if how == 0:
        return table.remove_column(at) if table.num_columns > 1 else table.append_column("x", table.column(0))
    if how == 1:
        return table.append_column(name, table.column(at))
    if how == 2:
        return table.rename_columns([f"{c}s" if i == at else c for i, c in enumerate(table.column_names)])
    if how == 3:
        return table.slice(0, 0)
    values = rng.choice([
        pyarrow.nulls(n, pyarrow.string()), pyarrow.array([1.5] * n), pyarrow.array([b"\xff"] * n),
        pyarrow.array([[1]] * n), pyarrow.array([True] * n),
        pyarrow.array([b"\xff\xfe"] * n, pyarrow.binary()).view(pyarrow.string()),
        pyarrow.array([2**62] * n, pyarrow.timestamp("us")), pyarrow.array(["x"] * n).dictionary_encode(),
    ])  # fmt: skip
    return table.set_column(at, name, values)


# ------------------------------------------------------------------------------------------ written


def as_bytes(name: str, content: File, rng: random.Random | None = None) -> bytes:
    """A file of this name; rng: of a columnar one, a column of it is broken."""
    is_ascii = len(repr(content)) % 2 > 0  # now so, now so
    kind = re.sub(r"\.(gz|zst)$", "", name).rpartition(".")[2]
    if kind in ("parquet", "arrow"):
        table = pyarrow.Table.from_pylist(content)
        table, out = broken_table(rng, table) if rng else table, io.BytesIO()
        if kind == "parquet":
            pyarrow.parquet.write_table(table, out)
        else:
            new = pyarrow.ipc.new_stream if "stream" in name else pyarrow.ipc.new_file
            with new(out, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return out.getvalue()
    if kind == "csv":
        text = io.StringIO()
        csv_writer = csv.DictWriter(
            text, list(dict.fromkeys(k for r in content for k in r)), lineterminator="\n"
        )
        csv_writer.writeheader()
        csv_writer.writerows(content)
        lines = text.getvalue()
    elif content and isinstance(content, list) and isinstance(content[0], str):
        lines = "".join(f"{line}\n" for line in content)
    elif kind == "tsv":
        names = list(dict.fromkeys(k for r in content for k in r))
        cells = [names, *([str(r.get(name, "")) for name in names] for r in content)]
        lines = "".join("\t".join(row) + "\n" for row in cells)
    elif kind == "json":
        whole = {"data": content} if ".data." in name else content
        lines = json.dumps(whole, indent=1, ensure_ascii=is_ascii) + "\n"
    else:
        lines = "".join(json.dumps(record, ensure_ascii=is_ascii) + "\n" for record in content)
    deep = "[" * 20_000 + "]" * 20_000
    data = lines.replace(json.dumps(DEEP), deep).encode("utf-8", "surrogatepass")
    if name.endswith(".gz"):
        return gzip.compress(data)
    return pyarrow.compress(data, codec="zstd", asbytes=True) if name.endswith(".zst") else data


def can_write(name: str, content: File) -> bool:
    """Whether there is such a table."""
    try:
        return bool(as_bytes(name, content))
    except (pyarrow.ArrowException, OverflowError, ValueError, TypeError, AttributeError, csv.Error):
        return False


class Case:
    """One broken data set on disk. at: the record or line that is broken, of the file `file`; None: bytes or
    columns of it."""

    def __init__(self, name: str, rng: random.Random, folder: Path):
        self.name, self.folder, self.at = name, folder, None
        self.options: dict[str, Any] = {"format": name} if name in GOLDEN and rng.random() < 0.5 else {}
        if name in GOLDEN:
            good = [record for record, _ in GOLDEN[name]]
            if name != "labels":  # of one shape, as the columns of a table are
                first = rng.choice(good)
                good = [first, *(record for record in good if tuple(record) == tuple(first))]
                good = [
                    {**r, **{k: f"{r[k]}{i}" for k in ("id", "query_id", "question_id") if k in r}}
                    for i, r in enumerate(good)
                ]
            container = rng.choice(CONTAINERS)
            if container[0] in "ct" and not all(isinstance(v, str) for r in good for v in r.values()):
                container = "jsonl"
            container = container if can_write(f"d.{container}", good) else "jsonl"
            self.path, files = f"d.{container}", {f"d.{container}": good}
            self.truth = None
        else:
            self.path, options, golden, self.truth = FOLDERS[name]
            files = copy.deepcopy(golden)
            self.options |= options
        self.file = rng.choice(list(files))
        self._break(files, rng)
        self.files = {}
        for file, content in files.items():
            data = content if isinstance(content, bytes) else as_bytes(file, content)
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
            self.files[file] = data

    def _break(self, files: dict[str, Any], rng: random.Random) -> None:
        content = files[self.file]
        how = rng.random()
        if how < 0.2 or (isinstance(content, dict) and how < 0.4):
            files[self.file] = broken_bytes(rng, as_bytes(self.file, content))
            return
        is_table = self.file.endswith((".parquet", ".arrow"))
        if is_table and how < 0.6:
            files[self.file] = as_bytes(self.file, content, rng)
            return
        if isinstance(content, dict):
            if "data" in content and rng.random() < 0.8:
                content = content["data"]
            else:
                files[self.file] = mutated(rng, content)
                return
        at = rng.randrange(len(content))
        whole = content[at]
        is_twice = rng.random() < 0.1
        if is_twice:
            content.append(copy.deepcopy(whole))
        if not is_twice or rng.random() < 0.5:
            content[at] = broken_line(rng, whole) if isinstance(whole, str) else mutated(rng, whole)
        self.at = None if is_twice else at
        if rng.random() < 0.002 and isinstance(whole, dict):
            whole = content[at] = {**whole, next(iter(whole)): "x" * (17 << 20)}
        if not can_write(self.file, files[self.file]):
            content[at] = whole  # no such table can be written
            files[self.file] = as_bytes(self.file, files[self.file], rng) if is_table else files[self.file]
            self.at = None

    @property
    def config(self) -> DatasetConfig:
        path = ",".join(str(self.folder / part) for part in self.path.split(","))
        options = {k: str(self.folder / v) if k == "source" else v for k, v in self.options.items()}
        return DatasetConfig(path=path.rstrip("/"), **options)


# ------------------------------------------------------------------------------------------ what a file holds


def unpacked(name: str, data: bytes) -> bytes:
    """As much as can be decompressed."""
    if name.endswith(".gz"):
        found, stream = list[bytes](), zlib.decompressobj(31)
        for at in range(len(data)):
            try:
                found.append(stream.decompress(data[at : at + 1]))
            except zlib.error:
                break
        return b"".join(found)
    if name.endswith(".zst"):
        try:
            return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
        except OSError:
            return b""
    return data


def holds(name: str, data: bytes) -> tuple[set[str] | None, int | None]:
    """(its strings, its records); None: what cannot be said."""
    kind = re.sub(r"\.(gz|zst)$", "", name).rpartition(".")[2]
    if kind in ("parquet", "arrow"):
        try:
            if kind == "parquet":
                table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
            else:
                is_file = data[:6] == b"ARROW1"
                table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(data).read_all()
            table.validate(full=True)  # else damaged offsets are followed
            return set(texts_of(table.to_pylist())), table.num_rows
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError):
            return None, None
    text = unpacked(name, data).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = text.split("\n")[: None if text and not text.endswith("\n") else -1]
    if kind == "csv":
        try:
            rows = list(csv.reader(io.StringIO(text, newline="")))
        except csv.Error:
            return None, None
        return {cell for row in rows for cell in row}, len(rows) - 1
    if kind in ("tsv", "en", "de"):
        lines = [line.removesuffix("\r") for line in lines]
        has_header = kind == "tsv" and name.startswith("d.")
        return {cell for line in lines for cell in (line, *line.split("\t"))}, len(lines) - has_header
    strings = set()
    pieces = [text] if kind == "json" else lines
    for literal in (
        found for piece in pieces for found in re.findall(r'"(?:[^"\\]|\\.)*"', piece, re.DOTALL)
    ):
        try:
            strings.add(json.loads(literal, strict=False))
        except ValueError:
            strings.add(literal[1:-1])
    numbers = set(re.findall(r"(?<![\w.])-?\d+(?![\w.])", text))  # labels, ids
    count = None
    if kind != "json":
        count = len(lines)
    else:
        try:
            value = json.loads(text)
            count = len(value["data"] if isinstance(value, dict) else value)
        except (ValueError, KeyError, TypeError, RecursionError):
            count = None
    return strings | numbers, count


# ------------------------------------------------------------------------------------------ judged


def judge(case: Case) -> str:
    """ "read" or "refused"; AssertionError says what is wrong with it."""
    config, findings, rows = case.config, Findings(), []
    refused = ""
    for look in (reading, source_files):
        try:
            look(config)
        except UserError as error:
            refused = str(error)
    try:
        rows = list(read_rows(config, findings, graded=True))
    except UserError as error:
        refused = str(error)
    for message in findings.named:
        check_message(case, message)
    try:
        again = list(read_rows(case.config, graded=True))
        assert not (findings.num_bad or refused), f"read by itself, refused with findings: {findings.named}"
        assert again == rows, "another time other rows"
    except UserError as error:
        assert findings.num_bad or refused, f"refused by itself alone: {error}"
    if case.name in FOLDERS and case.name not in ("triples", "aligned"):
        whole = Findings()
        try:
            texts = read_beir(config, whole)
            assert findings.num_bad or refused or not whole.num_bad, whole.named
            assert all(text.strip() and text.encode() for text in texts.corpus.values())
        except UserError as error:
            assert refused or findings.num_bad, f"only an evaluation refuses it: {error}"
    if refused:
        assert str(case.folder) in refused and len(refused) < 1000 + 3 * len(str(case.folder)), refused
    told = {name: holds(name, data) for name, data in case.files.items()}
    check_rows(case, rows, told, bool(findings.num_bad or refused))
    check_whole(case, rows, findings, refused, told)
    return "refused" if findings.num_bad or refused else "read"


def check_message(case: Case, message: str) -> None:
    found = re.fullmatch(r"(/.+?):(\d+): (\S.{7,})", message)
    assert found and len(message) < 600 + len(str(case.folder)), f"no path, line and reason: {message!r}"
    name = str(Path(found[1]).relative_to(case.folder))
    assert name in case.files, f"{name} is no file: {message}"
    num_lines = unpacked(name, case.files[name]).count(b"\n") + case.files[name].count(b"\r") + 2
    assert 1 <= int(found[2]) <= max(num_lines, 10), f"no such line: {message}"
    assert not re.search(r"KeyError|TypeError|Traceback|object at 0x|NoneType", found[3]), message


def check_rows(case: Case, rows: list[Any], told: dict[str, Any], is_refused: bool) -> None:
    known: set[str] = set()
    for strings, _ in told.values():
        if strings is None:
            assert is_refused, "what cannot be read at all was read without a word"
            return
        known |= strings

    def is_there(text: str) -> bool:
        splits = (m.start() for m in re.finditer(" ", text))
        return text in known or any(text[:at] in known and text[at + 1 :] in known for at in splits)

    ids = [row.id for row in rows if row.id]
    assert len(ids) == len(set(ids)), f"an id twice: {ids}"
    for row in rows:
        assert row.pos and not set(row.pos) & set(row.neg), row
        for text in (row.query, *row.pos, *row.neg):
            assert isinstance(text, str) and text.strip() and text.encode("utf-8"), row
            assert is_there(text), f"{text[:80]!r} stands nowhere in the files"
        for side in ("pos", "neg"):
            texts, scores, keys = (getattr(row, f"{side}{what}") for what in ("", "_scores", "_ids"))
            assert len(scores) in (0, len(texts)) and all(math.isfinite(score) for score in scores), row
            assert len(keys) in (0, len(texts)) and all(isinstance(key, str) for key in keys), row
        assert row.grade is None or math.isfinite(row.grade), row
        assert all(isinstance(field, str) for field in (row.id, row.lang, row.group)), row
        place = str(Path(row.path).relative_to(case.folder))
        is_table = place.endswith((".parquet", ".arrow"))
        count = told[place][1] if is_table else unpacked(place, case.files[place]).count(b"\n") + 1
        assert 1 <= row.line <= count, row


def check_whole(case: Case, rows: list[Any], findings: Findings, refused: str, told: dict[str, Any]) -> None:
    """Nothing is lost, and what was not broken is as it was."""
    main = case.path.split(",")[0]
    of_rows = {"dataset": "queries.parquet"}.get(case.name, main)
    count = told[of_rows][1] if of_rows in told else None
    is_clean = not findings.num_bad and not refused
    if is_clean and count is not None:
        assert len(rows) == count, f"{len(rows)} of {count} records were read, and nothing was said"
    is_lines = of_rows.endswith(".jsonl") and of_rows in case.files and not refused
    if is_lines and case.name in GOLDEN and count is not None:
        met = {row.line for row in rows}
        bad = {
            int(re.match(r".+?:(\d+): ", m)[1])
            for m in findings.named
            if m.startswith(str(case.folder / main))
        }
        missing = set(range(1, count + 1)) - met - bad
        assert not missing or min(missing) > max(bad), f"lines {sorted(missing)} are neither read nor refused"
    if case.at is None or not is_lines or case.file != of_rows or case.at == 0:
        return
    if case.name == "labels":  # its rows know the names of each other's classes
        return
    where = {int(re.match(r".+?:(\d+): ", m)[1]) for m in findings.named}
    assert where <= {case.at + 1}, f"line {case.at + 1} is broken: {findings.named}"
    others = {row.line for row in rows} - {case.at + 1}
    assert len(others) == count - 1, f"line {case.at + 1} is broken, others were not read: {findings.named}"
    if case.truth is not None:
        plain = {row.line: (row.query, row.pos, row.neg) for row in rows}
        assert all(plain[line] == case.truth[line - 1] for line in others), rows


def run(name: str, count: int, seed: int, folder: Path) -> Counter[str]:
    """{"read", "refused"}: how many; AssertionError names the case that is wrong."""
    seen: Counter[str] = Counter()
    for i in range(count):
        where = folder / f"{i}"
        where.mkdir(parents=True)
        case = Case(name, random.Random(f"{seed} {name} {i}"), where)
        try:
            seen[judge(case)] += 1
        except Exception as error:
            about = f"{name}, number {i} of seed {seed} ({case.file}, {case.options}), in {where}"
            raise AssertionError(f"{about}: {type(error).__name__}: {str(error)[:1500]}") from error
        shutil.rmtree(where)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1000, help="of each format (default 1000)")
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    for name in options.only:
        folder, began = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-")), time.perf_counter()
        try:
            seen = run(name, options.rows, options.seed, folder)
            said = f"{seen['read']:5,} read, {seen['refused']:5,} refused"
            shutil.rmtree(folder)
        except AssertionError as error:
            failed, said = failed + 1, f"WRONG: {error}"
        print(f"{name:22} {said}, {time.perf_counter() - began:.1f} s", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
