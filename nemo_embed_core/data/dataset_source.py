"""Texts of a dataset folder that has ids only: query q_i and document d_i are number i of a public data set.

source_config.json says which: {"loader_config": "mteb" | "column", "source_repo", "subset", "split",
"query_column", "document_column", "revision"?}. It has to be on this machine, as the dataset's `source`: for
"mteb" a folder with corpus and queries ({"_id", "title"?, "text"}), for "column" a file or folder of rows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nemo_embed_core.data.lines import Findings, check_text, short
from nemo_embed_core.data.records import find, records
from nemo_embed_core.data.texts import Texts
from nemo_embed_core.errors import UserError
from nemo_embed_core.files.strict_json import read_object

SOURCE_CONFIG = "source_config.json"
LETTER, COLUMN = {"corpus": "d", "queries": "q"}, {"corpus": "document_column", "queries": "query_column"}
KNOWN = ("loader_config", "source_repo", "subset", "split", "query_column", "document_column", "revision")


class SourceTexts:
    """at("d_7") is text 7 of the source; they stand on disk."""

    def __init__(self, folder: Path, side: str, where: str):
        self.folder, self.side, self.where, self.texts = folder, side, where, Texts()
        self._seen = bytearray()  # by number

    def at(self, key: str) -> str:
        letter = LETTER[self.side]
        match = re.fullmatch(rf"{letter}_(\d{{1,12}})", key)
        if match is None:
            raise ValueError(f"id {short(key)}: in a folder of ids only it is {letter}_ and a number")
        number = int(match[1])
        if number >= len(self.texts):
            raise ValueError(
                f"id {key} is beyond the {len(self.texts):,} {self.side} texts of {self.where}: another "
                "revision, split or subset?"
            )
        self._seen.extend(bytes(max(0, number + 1 - len(self._seen))))
        self._seen[number] = 1
        return self.texts[number]

    def check_count(self, findings: Findings) -> None:
        """Ids without a gap name the whole source: it has as many texts. One with gaps is a part of it."""
        named = len(self._seen)
        if sum(self._seen) == named != len(self.texts):
            findings.bad(
                self.folder / SOURCE_CONFIG,
                1,
                f"{self.where} has {len(self.texts):,} {self.side} texts and the folder names {named:,}: "
                "another revision, split or subset? Texts are joined by their number",
            )


def source_config(folder: Path) -> dict[str, str]:
    path = folder / SOURCE_CONFIG
    value = read_object(path)
    for name, entry in value.items():
        if name not in KNOWN:
            raise UserError(f"{path}: unknown field {short(name)} (known: {', '.join(KNOWN)})")
        if not (entry is None or isinstance(entry, str)):
            raise UserError(f"{path}: {name} must be a string, got {short(entry)}")
    config = {name: value.get(name) or "" for name in KNOWN}
    wanted = ("query_column", "document_column") if config["loader_config"] == "column" else ()
    if config["loader_config"] not in ("mteb", "column"):
        raise UserError(f'{path}: loader_config is {short(config["loader_config"])}, not "mteb" or "column"')
    if missing := [name for name in ("source_repo", *wanted) if not config[name]]:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    return config


def source_files(folder: Path, source: str) -> list[Path]:
    """Of both sides, each once."""
    config = source_config(folder)
    found = [file for side in LETTER for file in _find(folder, config, side, source).files]
    return list(dict.fromkeys(found))


def _find(folder: Path, config: dict[str, str], side: str, source: str) -> Any:
    if not source:
        of = f"{config['subset']} of " if config["subset"] else ""
        at = f" at revision {config['revision']}" if config["revision"] else ""
        pin = f" --revision {config['revision']}" if config["revision"] else ""
        split = f", split {config['split']}" if config["split"] else ""
        raise UserError(
            f"{folder} has ids only: its texts are {of}{config['source_repo']}{split}{at}. Download it (hf "
            f"download {config['source_repo']} --repo-type dataset{pin} --local-dir DIR) and set the "
            "dataset's source to DIR"
        )
    _check_revision(folder, config, Path(source))
    split = config["split"] or "train"
    if config["loader_config"] == "column":
        inner = Path(source) / config["subset"]
        return find(str(inner if config["subset"] and inner.is_dir() else source), split)
    for name in (side, f"{side}.parquet", f"{side}.jsonl", f"{side}.jsonl.gz"):
        if (Path(source) / name).exists():
            return find(str(Path(source) / name), split)
    if any(Path(source).glob(f"{side}-*.parquet")):
        return find(str(Path(source) / f"{side}-*.parquet"), split)
    raise UserError(
        f"{source} has no {side}, {side}.parquet or {side}.jsonl, as {folder} needs of an mteb source"
    )


def _check_revision(folder: Path, config: dict[str, str], source: Path) -> None:
    """Of a snapshot of the hub's cache, or a folder that `hf download` filled; of others nothing says it."""
    names = source.absolute().parts
    known = {names[i + 1] for i, name in enumerate(names[:-1]) if name == "snapshots"}
    for file in sorted((source / ".cache/huggingface/download").rglob("*.metadata")):
        known.add(file.read_text().split("\n", 1)[0].strip())
    if config["revision"] and known and known != {config["revision"]}:
        raise UserError(
            f"{source} is revision {', '.join(sorted(known))} of {config['source_repo']}, and "
            f"{folder / SOURCE_CONFIG} needs {config['revision']}: texts are joined by their number"
        )


def source_texts(folder: Path, side: str, source: str, findings: Findings) -> SourceTexts:
    """All texts of "corpus" or "queries" in the source's order; wrong ones are `bad` in findings."""
    config = source_config(folder)
    found = SourceTexts(folder, side, source)
    is_mteb = config["loader_config"] == "mteb"
    column = "text" if is_mteb else config[COLUMN[side]]
    for path, line, fields in records(
        _find(folder, config, side, source), findings, f'{{"{column}": "..."}}'
    ):
        try:
            if column not in fields:
                raise ValueError(f"there is no column {column!r}, which {folder / SOURCE_CONFIG} names")
            text = check_text(fields[column], column)
            title = fields.get("title") if is_mteb and side == "corpus" else None
            found.texts.append(f"{title} {text}" if isinstance(title, str) and title.strip() else text)
        except ValueError as error:
            findings.bad(path, line, str(error))
    return found
