"""Label tables: text, label and, where the label is a number, label_text.

A row is the text as query, its class's name as the positive, the names of all other classes as negatives,
and the class as group, whose documents are never each other's negatives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from nemo_embed_core.data.formats.row import Row, check_known, check_string, optional_id
from nemo_embed_core.data.lines import check_text, short, type_name

NAME = "labels"
EXAMPLE = '{"text": "...", "label": "card arrival"}'
OPTIONAL = ("label_text", "id", "lang")
MAX_CLASSES = 1000  # every row has the others as negatives

Classes = dict[str, str]  # label -> name


def sniff(fields: dict[str, Any]) -> bool:
    return {"text", "label"} <= fields.keys() and not {"query", "positive", "score"} & fields.keys()


def scan(records: Iterable[dict[str, Any]]) -> Classes:
    """The classes in the order in which they are met; rows that are wrong are row()'s to refuse."""
    classes: Classes = {}
    for fields in records:
        try:
            classes.setdefault(*_class(fields))
        except ValueError:
            continue
        if len(classes) > MAX_CLASSES:
            break
    return classes


def row(fields: dict[str, Any], path: str, line: int, classes: Classes) -> Row:
    check_known(fields, ("text", "label", *OPTIONAL), required=("text", "label"), example=EXAMPLE)
    query = check_text(fields["text"], "text")
    label, name = _class(fields)
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"more than {MAX_CLASSES} classes: is label one? A row has all others as negatives")
    if classes[label] != name:
        raise ValueError(
            f"label {short(label)} is called {short(name)} here and {short(classes[label])} before"
        )
    neg = [other for other in dict.fromkeys(classes.values()) if other != name]
    if not neg:
        raise ValueError(f"all rows have the label {short(name)}: a class needs others to be told from")
    lang = check_string(fields.get("lang", ""), "lang", '"de"')
    return Row(query, [name], neg, path, line, lang, optional_id(fields, "id"), name)


def _class(fields: dict[str, Any]) -> tuple[str, str]:
    label = fields.get("label")
    is_number = isinstance(label, int) and not isinstance(label, bool)
    if not is_number and not isinstance(label, str):
        raise ValueError(f"field 'label' must be a string or an integer, got {type_name(label)}")
    if "label_text" in fields:
        return str(label), _name(fields["label_text"], "label_text")
    if is_number or re.fullmatch(r"\s*-?\d+\s*", str(label)):
        raise ValueError(
            f"label {short(label)} is a number, which names no class: add label_text with its name"
        )
    return str(label), _name(label, "label")


def _name(value: Any, field: str) -> str:
    """Of a class: with spaces around it, it would be another class beside the one without."""
    name = check_text(value, field)
    if name != name.strip():
        raise ValueError(f"field {field!r} {short(name)} has spaces around the class's name: remove them")
    return name
