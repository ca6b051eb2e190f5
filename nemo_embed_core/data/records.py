"""How bytes become records {field: value}: the container is told by the name, the format by the fields.

    source = find("data/*.parquet")               # its files, in order, and what they are
    for record in records(source, findings, wanted="..."): record.path, record.line, record.fields

.jsonl, .json (a list, {"data": [...]} or lines), .csv, .tsv, .parquet, .arrow, text also as .gz and .zst;
folders and globs of shards of one kind, folders that the datasets library saved, two files whose lines belong
together ("a.en,a.de"), hf://user/name. One row, block of lines or row group is in memory. Nothing is cast: a null is None and a cell of a CSV file a string.
"""

from __future__ import annotations

import codecs
import csv
import glob
import json
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from nemo_embed_core.data.lines import (
    MAX_LINE,
    Findings,
    binary_format,
    check_file,
    decode,
    json_lines,
    need_pyarrow,
    open_bytes,
    raw_lines,
    short,
    type_name,
    unreadable,
)
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.strict_json import parse, raw_decode, read_object

BATCH = 256  # rows of a columnar file that are Python objects at once
SPLITS = ("train", "test", "dev", "validation", "valid", "val", "eval")
_SHARD = re.compile(r"(.+?)[-_.](\d{3,})-of-(\d{3,})(?:[-_.].*)?")
_PASSED_OVER = re.compile(
    r"[._].*|.*\.(md|txt|ya?ml|py|lock|crc|png|pdf)|LICEN[CS]E|dataset_infos?\.json|state\.json"
)


class Record(NamedTuple):
    path: Path
    line: int  # from 1; of a columnar file the row
    fields: dict[str, Any]


class Source(NamedTuple):
    """files: in reading order; kind: of them all. left_out: of other splits."""

    path: str
    files: list[Path]
    kind: str
    left_out: tuple[Path, ...] = ()
    split: str = ""  # of the hub

    @property
    def is_columnar(self) -> bool:
        """A field that a row does not have is null there."""
        return self.kind in ("parquet", "arrow", "hf")

    @property
    def is_text(self) -> bool:
        """Every value is a string, numbers too."""
        return self.kind in ("csv", "tsv")


def find(path: str, split: str = "train") -> Source:
    """UserError where nothing is there, and where it is unclear which files are meant."""
    if path.startswith("hf:"):
        return Source(path, [], "hf", split=split)
    here = Path(path)
    if here.is_dir():
        return _folder(here, split)
    if not here.exists() and glob.has_magic(path):
        files = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
        if not files:
            raise UserError(f"no file matches {path}")
        return _shards(path, files, "")
    if not here.exists() and path.count(",") == 1:
        files = [Path(name.strip()) for name in path.split(",")]
        for file in files:
            check_file(file)
        return Source(path, files, "aligned")
    check_file(here)
    return Source(path, [here], kind_of(here))


def has_rows(folder: Path) -> bool:
    """Whether it holds files whose names say that they are data."""
    return any(_ending(p) in READERS and p.name != "config.json" for p in folder.iterdir())


def _ending(path: Path) -> str:
    name = path.name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    return name.rpartition(".")[2]


def kind_of(path: Path) -> str:
    """jsonl, json, csv, tsv, parquet or arrow; a file of any other name is read as lines of JSON."""
    return kind if (kind := _ending(path)) in READERS else "jsonl"


def _folder(folder: Path, split: str) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or split not in splits:
            raise UserError(f"{folder} has the splits {splits}: set the dataset's split to one of them")
        return _folder(folder / split, split)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        data: Any = read_object(folder / "state.json").get("_data_files")
        entries = data if isinstance(data, list) else []
        names = [str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
        if not names or not all(Path(name).name == name for name in names):
            raise UserError(f"{folder / 'state.json'} does not list the data set's files: save it again")
        for name in names:
            check_file(folder / name)
        return Source(str(folder), [folder / name for name in names], "arrow")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not _PASSED_OVER.fullmatch(p.name))
    return _shards(str(folder), files, split)


def _shards(path: str, files: list[Path], split: str) -> Source:
    """files of one kind; with a split, of those named after splits the ones of this."""
    kinds = Counter(kind_of(file) for file in files)
    if len(kinds) > 1 or not all(_ending(file) in READERS for file in files):
        names = ", ".join(file.name for file in files[:10])
        raise UserError(f"{path} has files of several kinds ({names}): give one kind, as {path}/*.jsonl")
    of_split: dict[str, list[Path]] = {}
    shards: dict[tuple[str, str], set[int]] = {}
    for file in files:
        stem = re.sub(r"(\.\w+?)(\.(gz|zst))?$", "", file.name)
        if found := _SHARD.fullmatch(stem):
            stem = found[1]
            shards.setdefault((str(file.parent / stem), found[3]), set()).add(int(found[2]))
        of_split.setdefault(stem, []).append(file)
    left_out: tuple[Path, ...] = ()
    if split and len(of_split) > 1 and any(name in SPLITS for name in of_split):
        if split not in of_split:
            have = ", ".join(sorted(of_split))
            raise UserError(
                f"{path} has files of {have}: set the dataset's split to one of them, or give files"
            )
        left_out = tuple(file for name, group in of_split.items() if name != split for file in group)
        files = of_split[split]
    for (stem, count), numbers in shards.items():
        if len(numbers) != int(count) and any(str(file).startswith(stem) for file in files):
            first = min(numbers | set(range(int(count))), key=lambda i: (i in numbers, i))
            raise UserError(f"{stem}: {len(numbers)} of {int(count)} shards are there, number {first} is not")
    return Source(path, files, kinds.most_common(1)[0][0], left_out)


def records(source: Source, findings: Findings, wanted: str) -> Iterator[Record]:
    """wanted: a row as an example for messages. What cannot be read is `bad` in findings."""
    if source.left_out:
        names = ", ".join(file.name for file in source.left_out[:3])
        findings.note(
            f"files of other splits, left out ({names})", source.left_out[0], 1, len(source.left_out)
        )
    if source.kind == "hf":
        yield from _hub(source, findings)
    elif source.kind == "aligned":
        yield from _aligned(source, findings)
    else:
        yield from _of_files(source, findings, wanted)


def _of_files(source: Source, findings: Findings, wanted: str) -> Iterator[Record]:
    for file in source.files:
        for line, fields in READERS[source.kind](file, findings, wanted):
            yield Record(file, line, fields)


# ------------------------------------------------------------------------------------------ JSON

Fields = Iterator[tuple[int, dict[str, Any]]]


def _json(path: Path, findings: Findings, wanted: str) -> Fields:
    """A .json file: lines, or one list or object with the list under "data"."""
    check_file(path)
    try:
        with open_bytes(path) as file:
            head = file.read(4096)
    except (EOFError, OSError, zlib.error) as error:
        findings.bad(path, 1, unreadable(path, error))
        return
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first = text.split(b"\n", 1)[0]
    is_whole = text.startswith(b"[") or bool(re.match(rb'\{\s*("data"|"corpus")\s*:|\{\s*$', first))
    if not is_whole:
        yield from json_lines(path, findings, wanted)
        return
    for line, name, value in json_items(path, findings):
        if name != "data":
            message = f'field {short(name)} beside the list "data": remove it, or write one row a line'
            findings.bad(path, line, message)
        elif isinstance(value, dict):
            yield line, value
        else:
            findings.bad(path, line, f'a row must be an object like {{"...": ...}}, got {type_name(value)}')


def json_items(path: Path, findings: Findings) -> Iterator[tuple[int, str, Any]]:
    """(line, "data", item) of a list, and of the list "data" of an object, whose other fields come as
    (line, name, value). One item is in memory at a time."""
    text = _Text(path)
    try:
        if text.peek() == "[":
            yield from text.items()
        else:
            text.take("{")
            while text.peek() != "}":
                line, name = text.line, text.value()
                text.take(":")
                if name == "data" and text.peek() == "[":
                    yield from text.items()
                else:
                    yield line, str(name), text.value()
                if text.peek() != "}":
                    text.take(",")
            text.take("}")
        if text.peek():
            raise ValueError("more text behind the end of the list")
    except RecursionError:
        findings.bad(path, text.line, "JSON nested too deep")
    except json.JSONDecodeError as error:
        findings.bad(path, text.line, f"not JSON: {error.msg} (in what begins on this line)")
    except ValueError as error:
        findings.bad(path, text.line, f"{error}; what follows is not read")
    except (EOFError, OSError, zlib.error) as error:
        findings.bad(path, text.line, unreadable(path, error))
    finally:
        text.file.close()


class _Text:
    """A JSON file as a window that moves over it; line: of the place where it stands."""

    def __init__(self, path: Path):
        self.file, self.window, self.at, self.line, self.is_end = open_bytes(path), "", 0, 1, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self._go_to(_white(self.window, self.at))
            if self.at < len(self.window) or self.is_end:
                return self.window[self.at : self.at + 1]
            self._read()

    def take(self, wanted: str) -> None:
        if self.peek() != wanted:
            raise ValueError(
                f"not JSON: {wanted!r} expected, got {short(self.peek() or 'the end of the file')}"
            )
        self.at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = raw_decode(self.window, self.at)
                if end < len(self.window) or self.is_end:  # else a number may go on
                    self._go_to(end)
                    return value
            except json.JSONDecodeError:
                if self.is_end or len(self.window) - self.at > MAX_LINE:
                    raise
            self._read()

    def items(self) -> Iterator[tuple[int, str, Any]]:
        self.take("[")
        while self.peek() != "]":
            line = self.line
            yield line, "data", self.value()
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def _go_to(self, end: int) -> None:
        self.line += self.window.count("\n", self.at, end)
        self.at = end

    def _read(self) -> None:
        raw = self.file.read(1 << 20)
        try:
            new = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x}") from None
        self.window, self.at, self.is_end = self.window[self.at :] + new, 0, not raw


def _white(text: str, at: int) -> int:
    """Where the white space ends that begins here."""
    found = _WHITE.match(text, at)
    return found.end() if found else at


_WHITE = re.compile(r"[ \t\r\n]+")


# ------------------------------------------------------------------------------------------ CSV and TSV


def _separated(delimiter: str) -> Callable[[Path, Findings, str], Fields]:
    """The first line names the columns. CSV has quotes; a tab-separated cell stands between tabs, as it is."""

    def read(path: Path, findings: Findings, wanted: str) -> Fields:
        line, start = 0, 1

        def lines() -> Iterator[str]:
            nonlocal line
            for line, raw in raw_lines(path, findings):
                if line == 1 and (other := binary_format(raw)):
                    raise ValueError(f"not text but {other}")
                yield decode(raw)

        csv.field_size_limit(MAX_LINE)
        cells = csv.reader(lines(), strict=True)
        if delimiter == "\t":
            cells = csv.reader(lines(), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        names: list[str] | None = None
        before = findings.num_met
        while True:
            start = line + 1
            try:
                row = next(cells, None)
            except (csv.Error, ValueError) as error:  # where the next row begins is a guess
                findings.bad(path, start, str(error))
                return
            if row is None:
                break
            if names is None:
                names = row
                if problem := _header_problem(names):
                    findings.bad(path, 1, problem)
                    return
                continue
            if len(row) != len(names):
                what = (
                    "blank line: remove it" if not any(row) else f"{len(row)} cells and {len(names)} columns"
                )
                findings.bad(path, start, what)
                continue
            yield start, dict(zip(names, row, strict=True))
        if names is not None and line == 1 and findings.num_met == before:
            findings.bad(path, 1, f"no rows: line 1 names the columns ({short(names)}) and nothing follows")

    return read


def _header_problem(names: list[str]) -> str:
    if not all(name.strip() for name in names):
        return f"line 1 names the columns, and not all have a name: {short(names)}"
    twice = [name for name, count in Counter(names).items() if count > 1]
    return f"column {short(twice[0])} stands twice: rename one" if twice else ""


# ------------------------------------------------------------------------------------------ columns


def _parquet(path: Path, findings: Findings, wanted: str) -> Fields:
    pyarrow = need_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batches(
                path, findings, file.schema_arrow, file.metadata.num_rows, file.iter_batches(BATCH)
            )
    except (pyarrow.ArrowException, OSError) as error:
        findings.bad(path, 1, f"not a whole Parquet file: {_one_line(error)}; copy it again")


def _arrow(path: Path, findings: Findings, wanted: str) -> Fields:
    pyarrow = need_pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(mapped)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = batches = pyarrow.ipc.open_stream(mapped)
            yield from _batches(path, findings, reader.schema, 0, batches)
    except (pyarrow.ArrowException, OSError) as error:
        findings.bad(path, 1, f"not a whole Arrow file: {_one_line(error)}; copy it again")


def _batches(path: Path, findings: Findings, schema: Any, num_rows: int, batches: Any) -> Fields:
    if problem := _header_problem(list(schema.names)):
        findings.bad(path, 1, problem.replace("line 1 names the columns, and", "columns:"))
        return
    line, start, classes = 0, time.monotonic(), _class_names(schema)
    for batch in batches:
        for at in range(0, batch.num_rows, BATCH):
            for fields in batch.slice(at, BATCH).to_pylist():
                line += 1
                for column, names in classes.items():
                    if isinstance(number := fields[column], int) and 0 <= number < len(names):
                        fields[column] = names[number]
                yield line, fields
            if num_rows:
                findings.progress(path, line, line / num_rows, start)
    if not line:
        findings.bad(path, 1, "the file has no rows")


def _class_names(schema: Any) -> dict[str, list[str]]:
    """{column: names} of the columns whose numbers the datasets library calls ClassLabel."""
    try:
        features = parse((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {name: f["names"] for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: names for name, names in found.items() if isinstance(names, list) and name in schema.names}


# ------------------------------------------------------------------------------------------ others


def _aligned(source: Source, findings: Findings) -> Iterator[Record]:
    """{"sentence1", "sentence2"} of line i of either file."""
    one, two = source.files
    line = 0
    for a, b in zip_longest(raw_lines(one, findings), raw_lines(two, findings)):
        if a is None or b is None:
            shorter, longer = (one, two) if a is None else (two, one)
            message = (
                f"{shorter} has {line} lines and this file more: line i of one belongs to line i of the other"
            )
            findings.bad(longer, line + 1, message)
            return
        line, texts = a[0], []
        for file, (_, raw) in ((one, a), (two, b)):
            try:
                if line == 1 and (other := binary_format(raw)):
                    raise ValueError(f"not lines of text but {other}")
                texts.append(decode(raw).rstrip("\r\n"))
                if not texts[-1].strip():
                    raise ValueError(
                        "blank line: remove it, and the line that belongs to it in the other file"
                    )
            except ValueError as error:
                findings.bad(file, line, str(error))
                break
        else:
            yield Record(one, line, {"sentence1": texts[0], "sentence2": texts[1]})


_HUB = re.compile(r"hf:/{1,2}(?:datasets/)?([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?(?::([\w.-]+))?")


class Hub(NamedTuple):
    """hf://user/name[/subset][@revision][:split]"""

    name: str
    subset: str | None
    revision: str | None
    split: str


def hub_address(source: Source) -> Hub:
    found = _HUB.fullmatch(source.path)
    if not found:
        raise UserError(f"{source.path}: write hf://user/name[/subset][@revision][:split]")
    return Hub(found[1], found[2], found[3], found[4] or source.split)


def hub_commit(source: Source) -> str:
    """The commit of the data set on the hub, which is what a store was made of."""
    hub = hub_address(source)
    if re.fullmatch(r"[0-9a-f]{40}", hub.revision or ""):
        return str(hub.revision)
    try:
        import huggingface_hub

        return str(huggingface_hub.HfApi().dataset_info(hub.name, revision=hub.revision).sha)
    except Exception as error:  # of the network, the library, the hub
        fix = "name the commit, @ and 40 letters, or check the name and the network"
        raise UserError(f"{source.path}: its commit is not known ({_one_line(error)}): {fix}") from None


def _hub(source: Source, findings: Findings) -> Iterator[Record]:
    """Rows as the datasets library streams them; the files stay where they are."""
    hub, line = hub_address(source), 0
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source.path} needs the datasets library: pip install datasets") from None
    try:
        commit = hub_commit(source)
        rows = datasets.load_dataset(hub.name, hub.subset, split=hub.split, revision=commit, streaming=True)
        for line, fields in enumerate(rows, 1):
            yield Record(Path(source.path), line, dict(fields))
    except UserError:
        raise
    except Exception as error:  # of the network, the library, the hub's files
        raise UserError(f"{source.path} cannot be read behind row {line}: {_one_line(error)}") from None
    if not line:
        findings.bad(Path(source.path), 1, "the data set has no rows")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


READERS: dict[str, Callable[[Path, Findings, str], Fields]] = {
    "jsonl": json_lines,
    "json": _json,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "parquet": _parquet,
    "arrow": _arrow,
}
