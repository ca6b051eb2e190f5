"""F2LLM: columns query, passage, negative_1, ..., negative_n."""

from __future__ import annotations

import re
from typing import Any

from nemo_embed_core.data.formats.row import Row, check_disjoint, check_known
from nemo_embed_core.data.lines import check_text, short

NAME = "f2llm"
EXAMPLE = '{"query": "...", "passage": "...", "negative_1": "..."}'
OPTIONAL: tuple[str, ...] = ()
_NEGATIVE = re.compile(r"negative_[1-9]\d*", re.ASCII)


def sniff(fields: dict[str, Any]) -> bool:
    return {"query", "passage"} <= fields.keys() and "score" not in fields


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    names = sorted((name for name in fields if _NEGATIVE.fullmatch(name)), key=lambda name: int(name[9:]))
    required = ("query", "passage")
    check_known(fields, (*required, *(names or ["negative_1"])), required=required, example=EXAMPLE)
    if names and names[-1] != f"negative_{len(names)}":
        raise ValueError(f"columns {short(names)} are not numbered from 1 to {len(names)}")
    query, pos = check_text(fields["query"], "query"), [check_text(fields["passage"], "passage")]
    neg = [check_text(fields[name], name) for name in names]
    check_disjoint(pos, neg, lambda side, i: "passage" if side == "pos" else names[i])
    return Row(query, pos, neg, path, line)
