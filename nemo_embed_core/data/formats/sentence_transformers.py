"""sentence-transformers: columns (anchor, positive), (anchor, positive, negative) or (anchor, positive,
negative_1, ..., negative_n), optionally with the scores of positive and negatives.

The library takes columns by their order and only label, labels, score and scores by name. So does this
reader where the dataset names the format; negatives have to be called so, as the library takes a column of
ids that was left over for texts. Sniffed are the names of the library's own data sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_embed_core.data.formats.row import Row, check_disjoint, check_scores
from nemo_embed_core.data.formats.writing import write_parquet
from nemo_embed_core.data.lines import check_text, short

NAME = "sentence-transformers"
EXAMPLE = '{"anchor": "...", "positive": "...", "negative": "..."}'
LABELS = ("label", "labels", "score", "scores")
OPTIONAL: tuple[str, ...] = ()
COLUMNS = True  # by their order
SUFFIX = ".parquet"
ANCHORS = {"anchor", "query", "question", "sentence", "text", "premise"}
_NEGATIVE = re.compile(r"negative(_\d+)?")


def sniff(fields: dict[str, Any]) -> bool:
    if "score" in fields and not isinstance(fields["score"], list):
        return False  # an STS table
    texts = [name for name in fields if name not in LABELS]
    by_role = len(texts) > 1 and texts[0] in ANCHORS and texts[1] == "positive"
    pair = len(texts) == 2 and tuple(texts) in {
        ("query", "answer"),
        ("question", "answer"),
        ("anchor", "answer"),
    }
    nli = tuple(texts) in {("premise", "hypothesis"), ("sentence1", "sentence2")} and "label" in fields
    return by_role or pair or nli


def row(fields: dict[str, Any], path: str, line: int) -> Row:
    names = [name for name in fields if name not in LABELS]
    labels = [name for name in LABELS if name in fields]
    if len(labels) > 1:
        raise ValueError(f"fields {short(labels)}: the library takes one label; name the others in ignore")
    if len(names) < 2:
        raise ValueError(
            f"text columns {short(names)}: at least two are needed, the anchor and its positive; a text with "
            "a class is the format labels"
        )
    if odd := [name for name in names[2:] if not _NEGATIVE.fullmatch(name)]:
        raise ValueError(
            f"columns {short(odd)}: the library would take each for a negative; name it negative or "
            "negative_1, remove it, or name it in the dataset's ignore"
        )
    texts = [check_text(fields[name], name) for name in names]
    pos, neg = texts[1:2], texts[2:]
    if labels and not isinstance(fields[labels[0]], list):
        raise ValueError(
            f"column {labels[0]!r} makes it a pair with a label ({short(fields[labels[0]])}), and the "
            "contrastive loss needs pairs that belong together: set the dataset's format to sts and "
            "min_grade to the label from which pairs do, or make triplets of them"
        )
    scores = check_scores(fields[labels[0]], labels[0], len(texts) - 1) if labels else []
    check_disjoint(pos, neg, lambda side, i: f"column {names[i + (1 if side == 'pos' else 2)]!r}")
    return Row(texts[0], pos, neg, path, line, pos_scores=scores[:1], neg_scores=scores[1:])


def write(path: Path, rows: Iterable[dict[str, Any]], num_negatives: int, digest: str) -> None:
    """Columns query, positive, negative_1 .. negative_n, scores, as its own mine_hard_negatives writes them;
    some losses learn from `scores`."""

    def tuples() -> Iterable[dict[str, Any]]:
        for row in rows:
            for positive, score in zip(row["pos"], row["pos_scores"], strict=True):
                yield {
                    "query": row["query"],
                    "positive": positive,
                    **{f"negative_{j + 1}": row["neg"][j] for j in range(num_negatives)},
                    "scores": [score, *row["neg_scores"][:num_negatives]],
                }

    write_parquet(path, tuples())
