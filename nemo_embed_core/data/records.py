"""How bytes become records {field: value}: the container is told by the name, the format by the fields.

    source = find("data/*.parquet")               # its files, in order, and what they are
    for record in records(source, findings, wanted="..."): record.path, record.line, record.fields

.jsonl, .json (a list, {"data": [...]} or lines), .csv, .tsv, .parquet, .arrow, text also as .gz and .zst;
folders and globs of shards of one kind, folders that the datasets library saved, two files whose lines belong
together ("a.en,a.de"), hf://user/name. One row, block of lines or row group is in memory. Nothing is cast: a
null is None, and a cell of a CSV file a string.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from nemo_embed_core.data.containers import READERS
from nemo_embed_core.data.hub import hub_rows
from nemo_embed_core.data.lines import Findings, binary_format, check_file, decode, raw_lines, short
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.strict_json import read_object

SPLITS = ("train", "test", "dev", "validation", "valid", "val", "eval")
# A word of the name, as the datasets library finds it.
_SPLIT = re.compile(rf"(?<![^-._ \d])({'|'.join(SPLITS)})(?![^-._ \d])", re.IGNORECASE)
_SHARD = re.compile(r"(.+?)[-_.](\d{3,})-of-(\d{3,})(?:[-_.].*)?")
_PASSED_OVER = re.compile(
    r"[._].*|.*\.(md|txt|ya?ml|py|lock|crc|png|pdf)|README|Thumbs\.db|desktop\.ini|LICEN[CS]E"
    r"|dataset_infos?\.json|state\.json|merlin_metadata\.json|counts\.json|offsets\.json\.gz"
)


class Record(NamedTuple):
    path: Path
    line: int  # from 1; of a columnar file the row
    fields: dict[str, Any]


class Source(NamedTuple):
    """files: in reading order; kind: of them all. left_out: of other splits. mixed: the splits of a glob's
    files where they are of several, all of which are read."""

    path: str
    files: list[Path]
    kind: str
    left_out: tuple[Path, ...] = ()
    split: str = ""  # of the hub
    mixed: tuple[str, ...] = ()

    @property
    def is_columnar(self) -> bool:
        """A field that a row does not have is null there."""
        return self.kind in ("parquet", "arrow", "hf")

    @property
    def is_text(self) -> bool:
        """Every value is a string, numbers too."""
        return self.kind in ("csv", "tsv", "triples")


def find(path: str, split: str = "train") -> Source:
    """UserError where nothing is there, and where it is unclear which files are meant."""
    if path.startswith("hf:"):
        return Source(path, [], "hf", split=split)
    here = Path(path)
    if here.is_dir():
        return _folder(here, split)
    if not here.exists() and glob.has_magic(path):
        found = sorted(map(Path, glob.glob(path, recursive=True)))
        files = [file for file in found if not file.is_dir()]
        read = {folder for file in files for folder in file.parents}
        if passed := [one for one in found if one.is_dir() and one not in read and has_rows(one)]:
            what = f"{path} matches {passed[0]}, a folder whose rows would not be read"
            raise UserError(f"{what}: match its files, or name each folder as a dataset")
        if not files:
            raise UserError(f"no file matches {path}")
        for file in files:
            check_file(file)  # a link may lead nowhere
        return _shards(path, files, "")
    if not here.exists() and path.count(",") == 1:
        files = [Path(name.strip()) for name in path.split(",")]
        for file in files:
            check_file(file)
        return Source(path, files, "aligned")
    check_file(here)
    return Source(path, [here], kind_of(here))


def has_rows(folder: Path) -> bool:
    """Whether it, or a folder in it, holds files whose names say that they are data."""
    return _holds_data(folder) or bool(_folders_of_rows(folder))


def _holds_data(folder: Path) -> bool:
    files = [p.name for p in folder.iterdir() if not p.is_dir() and not _PASSED_OVER.fullmatch(p.name)]
    return "config.json" not in files and any(_ending(Path(name)) in READERS for name in files)  # no model's


def _folders_of_rows(folder: Path) -> list[str]:
    """Names of the folders in it that hold data."""
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "_")))
    return [p.name for p in inner if _holds_data(p)]


def first_fields(path: Path) -> dict[str, Any]:
    """Of the first record of a file, or of the first file of a folder or glob; {} where none can be read."""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if not _PASSED_OVER.fullmatch(p.name))
    elif not path.is_file():
        files = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(str(path)) else []
    for file in files:
        if file.is_file() and _ending(file) in READERS:
            return next((fields for _, fields in READERS[kind_of(file)](file, Findings(), "")), {})
    return {}


def _ending(path: Path) -> str:
    name = path.name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    return name.rpartition(".")[2]


def kind_of(path: Path) -> str:
    """jsonl, json, csv, tsv, triples, parquet or arrow; a file of any other name is read as lines of JSON."""
    if re.fullmatch(r"triples\.\w+(\.\w+)*\.tsv(\.gz|\.zst)?", path.name.lower()):
        return "triples"  # as MS MARCO calls them: triples.train.small.tsv
    return kind if (kind := _ending(path)) in READERS else "jsonl"


def _folder(folder: Path, split: str) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or split not in splits:
            raise UserError(f"{folder} has the splits {splits}: set the dataset's split to one of them")
        if not (folder / split).is_dir():
            raise UserError(f"{folder / split} does not exist, and dataset_dict.json names it: copy it again")
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
    own, inner = _holds_data(folder), _folders_of_rows(folder)
    if inner == ["data"] and not own:  # as on the hub
        return _folder(folder / "data", split)
    if inner:
        where = f"its folders {', '.join(inner[:5])}{' and beside them' if own else ''}"
        raise UserError(f"{folder} has rows in {where}: give one folder, or a glob such as {folder}/*/*")
    files = sorted(p for p in folder.iterdir() if not p.is_dir() and not _PASSED_OVER.fullmatch(p.name))
    for file in files:
        check_file(file)  # a link may lead nowhere
    missing = [name for name in _counts(folder) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} files of counts.json are not there: {missing[0]}")
    return _shards(str(folder), files, split)


def _counts(folder: Path) -> dict[str, Any]:
    """{file: rows} of the shards, as contrastors writes it beside them; {} where it does not."""
    path = folder / "counts.json"
    counts = read_object(path) if path.is_file() else {}
    return {Path(name).name: rows for name, rows in counts.items() if _ending(Path(name)) in READERS}


def _shards(path: str, files: list[Path], split: str) -> Source:
    """files of one kind; with a split, of those named after splits the ones of this."""
    kinds = Counter(kind_of(file) for file in files)
    if len(kinds) > 1 or not all(_ending(file) in READERS for file in files):
        names = ", ".join(file.name for file in files[:10])
        most = max(files, key=lambda file: (_ending(file) in READERS, kinds[kind_of(file)]))
        if _ending(most) not in READERS:
            endings = ", ".join(f".{kind}" for kind in READERS if kind != "triples")
            raise UserError(f"{path} has {names}, whose names say no kind: rename them to end in {endings}")
        one = path if Path(path).is_dir() else str(most.parent)
        raise UserError(
            f"{path} has files of several kinds ({names}): give one kind, as {one}/*.{_ending(most)}"
        )
    plain = Counter(re.sub(r"\.(gz|zst)$", "", str(file)) for file in files)
    if twice := [file for file in files if plain[str(file)] > 1]:
        both = " and ".join(file.name for file in files if str(file).startswith(str(twice[0])))
        raise UserError(f"{path} has {both}, whose rows would be read twice: remove one")
    of_split: dict[str, list[Path]] = {}
    shards: dict[tuple[str, str], set[int]] = {}
    for file in files:
        stem = re.sub(r"(\.\w+?)(\.(gz|zst))?$", "", file.name)
        if found := _SHARD.fullmatch(stem):
            stem = found[1]
            shards.setdefault((str(file.parent / stem), found[3]), set()).add(int(found[2]))
        named = {name.lower() for name in _SPLIT.findall(stem)}
        of_split.setdefault(named.pop() if len(named) == 1 else stem, []).append(file)
    left_out: tuple[Path, ...] = ()
    if split and len(of_split) > 1 and any(name in SPLITS for name in of_split):
        if split not in of_split:
            have = ", ".join(sorted(of_split))
            raise UserError(
                f"{path} has files of {have}: set the dataset's split to one of them, or give files"
            )
        left_out = tuple(file for name, group in of_split.items() if name != split for file in group)
        files = of_split[split]
    chosen = [stem for stem, _ in shards if any(str(file).startswith(stem) for file in files)]
    if several := [stem for stem in chosen if chosen.count(stem) > 1]:
        totals = " and ".join(f"of {int(count)}" for stem, count in shards if stem == several[0])
        raise UserError(f"{several[0]} has shards of several sets, {totals}: remove those of all but one")
    for (stem, count), numbers in shards.items():
        if len(numbers) != int(count) and any(str(file).startswith(stem) for file in files):
            first = min(numbers | set(range(int(count))), key=lambda i: (i in numbers, i))
            raise UserError(f"{stem}: {len(numbers)} of {int(count)} shards are there, number {first} is not")
    splits = tuple(sorted(name for name in of_split if name in SPLITS and not split))
    return Source(path, files, kinds.most_common(1)[0][0], left_out, mixed=splits if len(splits) > 1 else ())


def records(source: Source, findings: Findings, wanted: str) -> Iterator[Record]:
    """wanted: a row as an example for messages. What cannot be read is `bad` in findings."""
    if source.left_out:
        names = ", ".join(file.name for file in source.left_out[:3])
        findings.note(
            f"files of other splits, left out ({names})", source.left_out[0], 1, len(source.left_out)
        )
    if source.mixed:
        what = f"globs over files of several splits ({', '.join(source.mixed)}), all of which are read"
        findings.note(what, source.files[0], 1)
    if source.kind == "hf":
        path, line = Path(source.path), 0
        for line, fields in hub_rows(source.path, source.split):
            yield Record(path, line, fields)
        if not line:
            findings.bad(path, 1, "the data set has no rows")
    elif source.kind == "aligned":
        yield from _aligned(source, findings)
    else:
        yield from _of_files(source, findings, wanted)


def _of_files(source: Source, findings: Findings, wanted: str) -> Iterator[Record]:
    num_empty, counts = 0, _counts(Path(source.path))
    for file in source.files:
        before, num_rows = findings.num_met, 0
        for line, fields in READERS[source.kind](file, findings, wanted):
            num_rows += 1
            yield Record(file, line, fields)
        if findings.num_met == before and num_rows != counts.get(file.name, num_rows):
            said = f"counts.json says {short(counts[file.name])}"
            findings.bad(file, max(1, num_rows), f"the file has {num_rows:,} rows, and {said}: copy it again")
        if not num_rows and findings.num_met == before:
            num_empty += 1
            if source.is_columnar and num_empty < len(source.files):  # a writer of shards leaves such
                findings.note("files without rows", file, 1)
            else:
                findings.bad(file, 1, "the file has no rows")


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
                findings.bad(file, line, str(error), row=True)
                break
        else:
            yield Record(one, line, {"sentence1": texts[0], "sentence2": texts[1]})
