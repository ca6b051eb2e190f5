"""ms-swift: {"messages": [...], "positive_messages": [[...]], "negative_messages": [[...], ...]}, and before
version 3.9 {"query", "response", "rejected_response": [...]}; each list of messages is one text."""

from __future__ import annotations

from typing import Any

from nemo_embed_core.data.formats.row import Row, check_disjoint, check_known, check_list, text_list
from nemo_embed_core.data.lines import check_text, short, type_name

NAME = "ms-swift"
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "..."}], "positive_messages": [[{"role": "user", ...}]], ...}'
)
OPTIONAL = ("negative_messages", "rejected_response")


def sniff(fields: dict[str, Any]) -> bool:
    return {"messages", "positive_messages"} <= fields.keys() or {"query", "response"} <= fields.keys()


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    if "label" in fields:
        raise ValueError(
            "field 'label' makes it a graded pair, and the contrastive loss needs pairs that belong "
            "together: keep those, as rows without label"
        )
    if "messages" in fields:
        pos_field, neg_field = "positive_messages", "negative_messages"
        check_known(fields, ("messages", pos_field, neg_field), required=("messages",), example=EXAMPLE)
        query = _text(fields["messages"], "messages")
        pos, neg = (
            [
                _text(one, f"{field}[{i}]")
                for i, one in enumerate(check_list(fields.get(field, []), field, "lists"))
            ]
            for field in (pos_field, neg_field)
        )
    else:
        pos_field, neg_field = "response", "rejected_response"
        required = ("query", pos_field)
        check_known(fields, (*required, neg_field), required=required, example=EXAMPLE)
        query, pos = check_text(fields["query"], "query"), [check_text(fields[pos_field], pos_field)]
        neg = text_list(fields.get(neg_field, []), neg_field)
    if not pos:
        raise ValueError(
            f"field {pos_field!r} is missing or empty: every query needs at least one positive text"
        )
    check_disjoint(pos, neg, lambda side, i: f"{pos_field if side == 'pos' else neg_field}[{i}]")
    return Row(query, pos, neg, path, line)


def _text(messages: Any, field: str) -> str:
    """The one message of a list; a conversation or a system prompt is no text of ours."""
    found = check_list(messages, field, "messages")
    if len(found) != 1 or not isinstance(found[0], dict):
        got = type_name(found[0]) if len(found) == 1 else f"{len(found)} messages"
        raise ValueError(
            f"field {field!r} must be one message, got {got}: of a system prompt make the dataset's task"
        )
    check_known(found[0], ("role", "content"))
    if found[0].get("role") not in ("user", "assistant"):
        raise ValueError(f"{field}[0].role must be user or assistant, got {short(found[0].get('role'))}")
    return check_text(found[0].get("content"), f"{field}[0].content")
