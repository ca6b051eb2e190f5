"""FlagEmbedding: {"query", "pos", "neg", "pos_scores"?, "neg_scores"?, "prompt"?, "type"?}.

prompt is the instruction of the row's query, and "" none; type chooses among FlagEmbedding's batches and
prompts and has no meaning here. Rows without either are our own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_embed_core.data.formats import ours
from nemo_embed_core.data.formats.row import Row, check_string
from nemo_embed_core.data.formats.writing import write_lines

NAME = "flagembedding"
EXAMPLE = '{"query": "...", "pos": ["..."], "neg": ["..."], "prompt": "..."}'
OPTIONAL = (*ours.OPTIONAL, "type")
SUFFIX = ".jsonl"


def sniff(fields: dict[str, Any]) -> bool:
    return {"query", "pos"} <= fields.keys() and bool({"prompt", "type"} & fields.keys())


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    if "type" in fields:
        check_string(fields["type"], "type", '"normal"')
    return ours.row({name: value for name, value in fields.items() if name != "type"}, path, line)


def write(path: Path, rows: Iterable[dict[str, Any]], num_negatives: int, digest: str) -> None:
    fields = ("query", "pos", "neg", "pos_scores", "neg_scores")
    # Empty, and not left out: else its query_instruction_for_retrieval comes before our prompt.
    write_lines(path, ({**{field: row[field] for field in fields}, "prompt": ""} for row in rows))
