"""Mined rows as they are written: JSON lines with their texts, or a dataset folder that names them by id."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.dataset import METADATA, Metadata, is_dataset, read_metadata
from nemo_embed_core.data.dataset_writer import write_dataset, write_rows_of_ids
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.prepare import instruction
from nemo_embed_core.data.readers import read_rows
from nemo_embed_core.files.durable import sha256_file
from nemo_embed_core.files.strict_json import parse

FIELDS = ("lang", "id", "group", "pos_scores", "neg_scores")


class FolderWriter:
    """Rows into a dataset folder. data: what is mined; a dataset folder's corpus is shared. by_ids: rows name
    its documents and have no texts of them."""

    def __init__(self, data: str, name: str, prompt: str, document_prompt: str, by_ids: bool = False):
        """UserError for a prompt that such a folder cannot hold."""
        about, self.shared = Metadata(corpus_id=name, source=Path(data).name), None
        if is_dataset(data) and not (about := read_metadata(Path(data))).ids_only:
            self.shared = Path(data)
        self.by_ids = by_ids
        self.metadata = replace(
            about,
            query_instruction=instruction(prompt),
            passage_instruction=instruction(document_prompt),
            ids_only=False,
        )

    def __call__(self, output: Path, rows: Iterator[dict[str, Any]]) -> None:
        """A folder that is there is one of the same run, killed behind it: it is written again."""
        if output.exists():
            shutil.rmtree(output)
        if self.by_ids and self.shared is not None:
            write_rows_of_ids(output, _rows(output, rows), replace(self.metadata, made_of=""), self.shared)
        else:
            write_dataset(output, _rows(output, rows), self.metadata, shared=self.shared)


def _rows(output: Path, rows: Iterator[dict[str, Any]]) -> Iterator[Row]:
    for i, row in enumerate(rows):
        pos_ids, neg_ids = ([key or "" for key in row.get(f"{side}_ids", ())] for side in ("pos", "neg"))
        more: dict[str, Any] = {name: row[name] for name in FIELDS if name in row}
        texts = (row["query"], row.get("pos", []), row.get("neg", []))
        yield Row(*texts, str(output), i + 1, pos_ids=pos_ids, neg_ids=neg_ids, **more)


def read_mined(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of either."""
    if not path.is_dir():
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                yield parse(line)
        return
    for row in read_rows(DatasetConfig(path=str(path)), graded=True):
        fields = ("query", "pos", "neg", "pos_scores", "neg_scores", "pos_ids", "neg_ids", "id")
        yield {field: getattr(row, field) for field in fields}


def digest_of(path: Path) -> str:
    """sha256 of the mined rows; a folder's metadata has those of its files."""
    return sha256_file(path / METADATA if path.is_dir() else path)
