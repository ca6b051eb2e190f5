"""Our own rows: {"query": str, "pos": [str, ...], "neg": [str, ...]}."""

from __future__ import annotations

from typing import Any

from nemo_embed_core.data.formats.row import (
    Row,
    check_disjoint,
    check_known,
    check_list,
    check_scores,
    check_string,
    optional_id,
    text_list,
)
from nemo_embed_core.data.lines import check_id, check_text
from nemo_embed_core.data.prompts import query_prompt

NAME = "ours"
EXAMPLE = '{"query": "...", "pos": ["..."], "neg": []}'
REQUIRED = ("query", "pos", "neg")
OPTIONAL = ("pos_scores", "neg_scores", "id", "lang", "group", "pos_ids", "neg_ids", "prompt")
HINTS = {
    "_id": "of a BEIR folder give the folder",
    "label": "a class label is called group",
    "score": "scores are pos_scores and neg_scores, one for each text",
    "type": "FlagEmbedding's rows are read with the dataset's format flagembedding",
}


def sniff(fields: dict[str, Any]) -> bool:
    # "query" and "pos" as lists and strings are said by row(): no other format has them.
    return {"query", "pos"} <= fields.keys() and not {"prompt", "type"} & fields.keys()


def check_fields(fields: dict[str, Any]) -> None:
    known = (*REQUIRED, *OPTIONAL)
    check_known(fields, known, required=REQUIRED, example=EXAMPLE, hints=HINTS)


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    check_fields(fields)
    query = check_text(fields["query"], "query")
    pos, neg = text_list(fields["pos"], "pos"), text_list(fields["neg"], "neg")
    if not pos:
        raise ValueError("field 'pos' is empty: every query needs at least one positive text")
    check_disjoint(pos, neg)
    pos_scores, neg_scores = (
        check_scores(fields[field], field, len(texts)) if field in fields else []
        for field, texts in (("pos_scores", pos), ("neg_scores", neg))
    )
    lang = check_string(fields.get("lang", ""), "lang", '"de"')
    prompt = check_string(fields["prompt"], "prompt", '"Find answers"') if "prompt" in fields else None
    query_prompt(prompt or "")  # says what is wrong with it
    key, group = optional_id(fields, "id"), optional_id(fields, "group")
    pos_ids, neg_ids = _document_ids(fields, "pos_ids", len(pos)), _document_ids(fields, "neg_ids", len(neg))
    more = (lang, key, group, pos_ids, neg_ids, prompt)
    return Row(query, pos, neg, path, line, *more, pos_scores=pos_scores, neg_scores=neg_scores)


def _document_ids(fields: dict[str, Any], field: str, count: int) -> list[str]:
    if field not in fields:
        return []
    value = check_list(fields[field], field, "ids", count)
    return ["" if key is None else check_id(key, f"{field}[{i}]") for i, key in enumerate(value)]
