"""tevatron with texts: {"query_id", "query", "positive_passages": [{"docid", "title", "text"}, ...],
"negative_passages": [...], "answers"?}.

A document is title + " " + text where it has a title. answers are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_embed_core.data.formats.row import (
    Row,
    check_disjoint,
    check_known,
    check_list,
    check_number,
    check_string,
)
from nemo_embed_core.data.formats.writing import RowIds, document_id, write_lines
from nemo_embed_core.data.lines import check_id, check_text, type_name

NAME = "tevatron"
EXAMPLE = '{"query_id": "1", "query": "...", "positive_passages": [{"docid": "7", "text": "..."}], ...}'
OPTIONAL = ("answers",)
SUFFIX = ".jsonl"
REQUIRED = ("query_id", "query", "positive_passages", "negative_passages")


def sniff(fields: dict[str, Any]) -> bool:
    return {"query", "positive_passages"} <= fields.keys()


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    check_known(fields, (*REQUIRED, *OPTIONAL), required=REQUIRED, example=EXAMPLE)
    query = check_text(fields["query"], "query")
    pos, pos_ids, pos_scores = _passages(fields["positive_passages"], "positive_passages")
    neg, neg_ids, neg_scores = _passages(fields["negative_passages"], "negative_passages")
    if not pos:
        raise ValueError("field 'positive_passages' is empty: every query needs at least one")
    check_disjoint(pos, neg, lambda side, i: f"{'positive' if side == 'pos' else 'negative'}_passages[{i}]")
    key = check_id(fields["query_id"], "query_id")
    row = Row(query, pos, neg, path, line, id=key, pos_ids=pos_ids, neg_ids=neg_ids)
    return row._replace(pos_scores=pos_scores, neg_scores=neg_scores)


def _passages(value: Any, field: str) -> tuple[list[str], list[str], list[float]]:
    """(texts, ids, scores); no ids where none has one, no scores where one has none."""
    texts, ids, scores = [], [], []
    for i, passage in enumerate(check_list(value, field, "objects")):
        name = f"{field}[{i}]"
        if not isinstance(passage, dict):
            raise ValueError(
                f'{name} must be an object {{"docid", "title", "text"}}, got {type_name(passage)}'
            )
        check_known(passage, ("docid", "title", "text", "score"))
        if passage.get("score") is not None:
            scores.append(check_number(passage["score"], f"{name}.score"))
        if "text" not in passage:
            raise ValueError(f"{name} has no field 'text': rows of ids need their corpus")
        title, text = passage.get("title"), passage["text"]
        title = "" if title is None else check_string(title, f"{name}.title", '"Plants"')
        if title.strip():
            text = f"{title} {check_string(text, f'{name}.text', 'a sentence')}"
        texts.append(check_text(text, f"{name}.text"))
        ids.append("" if passage.get("docid") is None else check_id(passage["docid"], f"{name}.docid"))
    return texts, ids if any(ids) else [], scores if len(scores) == len(texts) else []


def write(path: Path, rows: Iterable[dict[str, Any]], num_negatives: int, digest: str) -> None:
    def passages(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        known = row.get(f"{kind}_ids") or [None] * len(row[kind])
        ids = [key or document_id(text) for key, text in zip(known, row[kind], strict=True)]
        # No "title", not even an empty one: the peer would put a space behind it, in front of the text.
        triples = zip(ids, row[kind], row[f"{kind}_scores"], strict=True)
        return [{"docid": key, "text": text, "score": score} for key, text, score in triples]

    names = RowIds()

    def lines() -> Iterable[dict[str, Any]]:
        for i, row in enumerate(rows):
            texts = {"positive_passages": passages(row, "pos"), "negative_passages": passages(row, "neg")}
            yield {"query_id": names.of(i, row.get("id", "")), "query": row["query"], **texts}

    write_lines(path, lines())
