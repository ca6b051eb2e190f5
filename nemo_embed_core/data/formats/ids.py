"""What formats share whose rows name documents by id: the corpus, rows without ignored fields, and both as
what an evaluation reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from nemo_embed_core.config import DatasetConfig
from nemo_embed_core.data.documents import Documents
from nemo_embed_core.data.formats.beir import Beir, beir_of
from nemo_embed_core.data.formats.row import Row, positive
from nemo_embed_core.data.lines import Findings, short, type_name
from nemo_embed_core.data.records import Record


def read_corpus(
    records: Iterable[Record],
    id_and_text: Callable[[dict[str, Any]], tuple[str, str]],
    ignore: Sequence[str],
    findings: Findings,
    documents: Documents,
) -> None:
    """Adds them to `documents`. id_and_text(fields): ValueError says what is wrong, which is `bad`."""
    for path, line, fields in records:
        try:
            documents.add(*id_and_text(without(fields, ignore)), path, line)
        except ValueError as error:
            findings.bad(path, line, str(error))


def without(fields: dict[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ignore} if ignore else fields


def entries(value: Any, field: str, prefix: str = "") -> list[dict[str, Any]]:
    """[{"id", "score"?}] of a list of such or of bare ids; prefix: in front of each id."""
    if not isinstance(value, list):
        raise ValueError(f"field {field!r} must be a list of documents, got {type_name(value)}")
    found = []
    for i, entry in enumerate(value):
        entry = entry if isinstance(entry, dict) else {"id": entry}
        if "id" not in entry or not entry.keys() <= {"id", "score"}:
            raise ValueError(f'{field}[{i}] must be {{"id", "score"?}} or an id, got {short(entry)}')
        if prefix and isinstance(entry["id"], str | int) and not isinstance(entry["id"], bool):
            entry = {**entry, "id": f"{prefix}{entry['id']}"}
        found.append(entry)
    return found


def beir_of_ids(
    config: DatasetConfig,
    findings: Findings,
    documents: Documents,
    rows: Callable[[DatasetConfig, Documents, Findings], Iterator[Row]],
) -> Beir:
    """The whole corpus, and the positives of the rows as what is relevant."""
    return beir_of(documents, positive(rows(config, documents, findings), config.min_grade, findings))
