"""NeMo Automodel with texts: {"query" or "question", "pos_doc", "neg_doc"}, each document a string, {"text"},
or a list of them."""

from __future__ import annotations

from typing import Any

from nemo_embed_core.data.formats.row import Row, check_disjoint, check_known, optional_id
from nemo_embed_core.data.lines import check_id, check_text, type_name

NAME = "automodel"
EXAMPLE = '{"query": "...", "pos_doc": "...", "neg_doc": ["..."]}'
OPTIONAL = ("question_id",)


def sniff(fields: dict[str, Any]) -> bool:
    return "pos_doc" in fields and "corpus_id" not in fields and bool({"query", "question"} & fields.keys())


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    documents = ("pos_doc", "neg_doc")
    check_known(fields, ("query", "question", *documents, *OPTIONAL), required=documents, example=EXAMPLE)
    if ("query" in fields) == ("question" in fields):
        raise ValueError("a row has either 'query' or 'question'")
    name = "query" if "query" in fields else "question"
    query = check_text(fields[name], name)
    pos, pos_ids = _documents(fields["pos_doc"], "pos_doc")
    neg, neg_ids = _documents(fields["neg_doc"], "neg_doc")
    if not pos:
        raise ValueError("field 'pos_doc' is empty: every query needs at least one positive document")
    check_disjoint(pos, neg, lambda side, i: f"{side}_doc[{i}]")
    key = optional_id(fields, "question_id")
    return Row(query, pos, neg, path, line, id=key, pos_ids=pos_ids, neg_ids=neg_ids)


def _documents(value: Any, field: str) -> tuple[list[str], list[str]]:
    texts, ids = [], []
    for i, document in enumerate(value if isinstance(value, list) else [value]):
        name, key = f"{field}[{i}]" if isinstance(value, list) else field, ""
        if isinstance(document, dict):
            check_known(document, ("text", "id"))
            if "text" not in document:
                raise ValueError(
                    f"{name} has an id and no text: rows of ids need their corpus, give its folder"
                )
            key = "" if document.get("id") is None else check_id(document["id"], f"{name}.id")
            document = document["text"]
        elif not isinstance(document, str):
            raise ValueError(f'{name} must be a text or {{"text": "..."}}, got {type_name(document)}')
        texts.append(check_text(document, name))
        ids.append(key)
    return texts, ids if any(ids) else []
