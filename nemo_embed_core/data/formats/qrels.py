"""Judgements: BEIR's qrels/{split}.tsv, TREC's four columns, either without a header or with other names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from nemo_embed_core.data.lines import Findings, binary_format, check_id, decode, raw_lines, short

QRELS = "query-id<TAB>corpus-id<TAB>score"
NAMES = {
    "query": {"query-id", "query", "qid", "queryid", "topic", "topic-id"},
    "document": {
        "corpus-id",
        "document-id",
        "doc-id",
        "passage-id",
        "document",
        "doc",
        "docid",
        "docno",
        "did",
        "pid",
    },
    "score": {"score", "relevance", "rel", "label", "grade", "judgement", "judgment"},
}
ITERATION = {"iteration", "iter", "q0", "0"}  # TREC's second column, which means nothing
SCORE = re.compile(r"-?\d{1,9}(\.0+)?", re.ASCII)


class _Columns(NamedTuple):
    """Where the judgement stands in a line."""

    separator: str | None  # None: white space
    width: int
    query: int
    document: int
    score: int


def read_qrels(
    path: Path, findings: Findings
) -> tuple[dict[str, dict[str, int]], dict[tuple[str, str], int]]:
    """(qrels[query id][document id] = score, line of every pair), in file order."""
    qrels: dict[str, dict[str, int]] = {}
    lines: dict[tuple[str, str], int] = {}
    columns: _Columns | None = None
    before = findings.num_met
    for line, raw in raw_lines(path, findings):
        try:
            text = decode(raw).rstrip("\r\n")
            if not text.strip():
                raise ValueError("blank line: remove it")
            if columns is None:
                columns, notes = _columns(text)
                for what in notes:
                    findings.note(what, path, line)
                if not any("no header" in what for what in notes):
                    continue
            cells = text.split(columns.separator)
            if len(cells) != columns.width:
                between = "tab-separated" if columns.separator else "space-separated"
                raise ValueError(f"expected {columns.width} {between} columns as on line 1, got {len(cells)}")
            qid = check_id(cells[columns.query], "query-id")
            doc, score = check_id(cells[columns.document], "corpus-id"), cells[columns.score]
            if not SCORE.fullmatch(score):
                raise ValueError(f"score must be a whole number, got {short(score)}")
            if (qid, doc) in lines:
                raise ValueError(
                    f"pair {short(qid)}, {short(doc)} is already on line {lines[qid, doc]}: keep one"
                )
        except ValueError as error:
            other = binary_format(raw) if line == 1 else None
            findings.bad(path, line, f"not tab-separated text but {other}" if other else str(error))
            if columns is None:
                break  # every other line would be as bad
            continue
        lines[qid, doc] = line
        qrels.setdefault(qid, {})[doc] = int(float(score))
    if not qrels and findings.num_met == before:
        findings.bad(path, 1, f"no judgements: a header line and at least one {QRELS}")
    return qrels, lines


def _columns(text: str) -> tuple[_Columns, list[str]]:
    """What line 1 says about the columns, and what has to be said about that."""
    if text.startswith(("{", "[")):
        raise ValueError(f"JSON: judgements are lines {QRELS}")
    separator = "\t" if "\t" in text else None
    cells = text.split(separator)
    names = [re.sub(r"[\s_]+", "-", cell.strip().strip('"').lower()) for cell in cells]
    at = {role: [i for i, name in enumerate(names) if name in known] for role, known in NAMES.items()}
    ends_in_score = SCORE.fullmatch(cells[-1].strip())
    is_header = (any(at.values()) and not ends_in_score) or (at["query"] and at["document"])
    if is_header:
        if any(len(found) != 1 for found in at.values()) or len(names) > 3 + len(ITERATION & set(names)):
            raise ValueError(f"header {short(text)}: write {QRELS}")
        columns = _Columns(separator, len(cells), *(at[role][0] for role in ("query", "document", "score")))
        if columns[2:] != (0, 1, 2):
            return columns, ["qrels files with other columns than BEIR's, read by their names"]
        if names != ["query-id", "corpus-id", "score"]:
            return columns, ["qrels files with other names than BEIR's in the header, read by them"]
        return columns, []
    if len(cells) == 3 and SCORE.fullmatch(cells[2].strip()):
        return _Columns(separator, 3, 0, 1, 2), [f"qrels files with no header, read as {QRELS}"]
    if len(cells) == 4 and SCORE.fullmatch(cells[3].strip()):
        return _Columns(separator, 4, 0, 2, 3), ["TREC qrels files (4 columns, no header)"]
    if len(cells) == 6:
        raise ValueError("6 columns: a ranking (a TREC run) and not judgements; give the qrels")
    if len(cells) == 1 and "," in text:
        raise ValueError("separated by commas: write tabs")
    raise ValueError(f"line 1 is neither the header {QRELS} nor a judgement: got {short(text)}")
