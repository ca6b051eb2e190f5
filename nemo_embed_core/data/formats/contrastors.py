"""contrastors: columns query, document and, for triplets, negatives (a list); metadata has the objective."""

from __future__ import annotations

from typing import Any

from nemo_embed_core.data.formats.row import Row, check_disjoint, check_known, text_list
from nemo_embed_core.data.lines import check_text, short, type_name

NAME = "contrastors"
EXAMPLE = '{"query": "...", "document": "...", "negatives": ["..."]}'
OPTIONAL = ("negatives", "metadata")
OBJECTIVES = {"self": [], "paired": [["query", "document"]], "triplet": [["query", "document", "negatives"]]}


def sniff(fields: dict[str, Any]) -> bool:
    return {"query", "document"} <= fields.keys() and "score" not in fields


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    required = ("query", "document")
    check_known(fields, (*required, *OPTIONAL), required=required, example=EXAMPLE)
    query, pos = check_text(fields["query"], "query"), [check_text(fields["document"], "document")]
    neg = text_list(fields.get("negatives", []), "negatives")
    _check_objective(fields.get("metadata", {}))
    check_disjoint(pos, neg, lambda side, i: "document" if side == "pos" else f"negatives[{i}]")
    return Row(query, pos, neg, path, line)


def _check_objective(metadata: Any) -> None:
    """Another one than these columns would mean other positives."""
    if not isinstance(metadata, dict):
        raise ValueError(f"field 'metadata' must be an object, got {type_name(metadata)}")
    objective = metadata.get("objective", {})
    if not isinstance(objective, dict):
        raise ValueError(f"metadata.objective must be an object, got {type_name(objective)}")
    for name, columns in objective.items():
        if columns and columns != OBJECTIVES.get(name):
            raise ValueError(
                f"metadata.objective {name} is of {short(columns)}: read are the columns query, document and "
                "negatives; name metadata in ignore where they are meant"
            )
