"""JSONL rows {"query": str, "pos": [str, ...], "neg": [str, ...]}, and candidate pools {"text": str}."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.lines import (
    NOISE,
    Findings,
    check_id,
    check_text,
    check_unicode,
    is_noise,
    json_lines,
    short,
    type_name,
)

EXAMPLE = '{"query": "...", "pos": ["..."], "neg": []}'
REQUIRED = ("query", "pos", "neg")
OPTIONAL = ("pos_scores", "neg_scores", "id", "lang", "group", "pos_ids", "neg_ids")
ALLOWED = frozenset(REQUIRED + OPTIONAL)
HINTS = {
    "_id": "of a BEIR folder give the folder",
    "prompt": "set the instruction with the dataset's task option",
    "label": "a class label is called group",
    "score": "scores are pos_scores and neg_scores, one for each text",
}


def jsonl_rows(path: Path, findings: Findings) -> Iterator[Row]:
    ids: dict[str, int] = {}
    for line, row in json_lines(path, findings, EXAMPLE):
        try:
            result = _row(row, str(path), line)
            if result.id:
                if first := ids.get(result.id):
                    raise ValueError(
                        f"id {short(result.id)} is already the id of line {first}: make ids unique"
                    )
                ids[result.id] = line
        except ValueError as error:
            findings.bad(path, line, str(error))
            continue
        if any(not text[0].isalnum() and is_noise(text) for text in (result.query, *result.pos, *result.neg)):
            sides = {"queries": [result.query], "positives": result.pos, "negatives": result.neg}
            for name, texts in sides.items():
                if count := sum(map(is_noise, texts)):
                    findings.note(f"{name} {NOISE}", path, line, count)
        yield result


def _row(row: dict[str, Any], path: str, line: int) -> Row:
    unknown = sorted(row.keys() - ALLOWED)
    missing = [field for field in REQUIRED if field not in row]
    hint = "".join(f"; {HINTS[field]}" for field in unknown if field in HINTS)
    if unknown and missing:
        raise ValueError(
            f"not a training row: it has {short(unknown)} and no {', '.join(missing)}; write rows like "
            f"{EXAMPLE}{hint}"
        )
    if unknown:
        raise ValueError(
            f"unknown fields {short(unknown)}: remove them (allowed: {', '.join(REQUIRED + OPTIONAL)}){hint}"
        )
    if "query" not in row:
        raise ValueError("field 'query' is missing")
    query = check_text(row["query"], "query")
    pos, neg = _texts(row, "pos"), _texts(row, "neg")
    if not pos:
        raise ValueError("field 'pos' is empty: every query needs at least one positive text")
    both = set(pos).intersection(neg)
    if both:
        text = next(text for text in pos if text in both)
        raise ValueError(
            f"pos[{pos.index(text)}] is also neg[{neg.index(text)}]: remove it from 'neg' (the loss would "
            "push the positive away)"
        )
    for scores, texts in (("pos_scores", pos), ("neg_scores", neg)):
        if scores in row:
            _check_scores(row[scores], scores, len(texts))
    lang = row.get("lang", "")
    if not isinstance(lang, str):
        raise ValueError(f"field 'lang' must be a string such as \"de\", got {type_name(lang)}")
    check_unicode(lang, "lang")
    key, group = (check_id(row[field], field) if field in row else "" for field in ("id", "group"))
    pos_ids, neg_ids = _document_ids(row, "pos_ids", len(pos)), _document_ids(row, "neg_ids", len(neg))
    return Row(query, pos, neg, path, line, lang, key, group, pos_ids, neg_ids)


def _texts(row: dict[str, Any], field: str) -> list[str]:
    if field not in row:
        fix = 'write "neg": [] when there are none' if field == "neg" else 'add "pos": ["..."]'
        raise ValueError(f"field {field!r} is missing: {fix}")
    value = _list(row[field], field, "strings")
    return [check_text(text, f"{field}[{i}]") for i, text in enumerate(value)]


def _document_ids(row: dict[str, Any], field: str, count: int) -> list[str]:
    if field not in row:
        return []
    value = _list(row[field], field, "ids", count)
    return ["" if key is None else check_id(key, f"{field}[{i}]") for i, key in enumerate(value)]


def _check_scores(value: Any, field: str, count: int) -> None:
    for i, score in enumerate(_list(value, field, "numbers", count)):
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or not abs(score) <= sys.float_info.max:
            raise ValueError(f"{field}[{i}] must be a finite number, got {short(score)}")


def _list(value: Any, field: str, what: str, count: int | None = None) -> list[Any]:
    if not isinstance(value, list) or count not in (None, len(value)):
        got = f"{len(value)} entries" if isinstance(value, list) else type_name(value)
        want = f"a list of {what}" if count is None else f"a list of {count} {what} (one per text)"
        raise ValueError(f"field {field!r} must be {want}, got {got}")
    return value
