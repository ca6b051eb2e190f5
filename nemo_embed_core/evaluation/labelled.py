"""Tables of graded or labelled texts, through mteb's own task classes and evaluators, offline.

    reranking            query, positive, negative      MAP of each query's own candidates
    sts                  sentence1, sentence2, score    Spearman's correlation of similarities with the grades
    pair_classification  sentence1, sentence2, label    average precision of the pairs with label 1
    classification       text, label                    accuracy of mteb's ten regressions of 8 texts a label
    clustering           text, label                    v-measure of k-means, mean of mteb's ten draws
    bitext               two columns of translations    F1 of the nearest text, in both directions

As in mteb each text is encoded by itself and compared by the model's own similarity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.config.evaluate import TaskOptions
from nemo_embed_core.data.lines import Findings, check_text
from nemo_embed_core.data.records import find, records
from nemo_embed_core.encoders.protocol import TextEncoder
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.encoding import Encoding, say
from nemo_embed_core.evaluation.mteb_tasks import (
    Bm25Search,
    Vectors,
    bitext,
    classification,
    clustering,
    pair_classification,
    reranking,
    sts,
)
from nemo_embed_core.evaluation.retrieval import mteb_imported

Row = dict[str, Any]
SHOWN = ("text", "other", "gold")  # beside the score of a row


class Kind(NamedTuple):
    """run: (vectors, rows, training rows) -> (figures, a score or prediction of each row).

    statistic: how the scores of rows become the main one, the first of columns: "mean", a statistic of
    predictions against `gold`, or "none" where rows have no scores.
    """

    type: str  # mteb's word
    run: Callable[[Any, list[Row], list[Row]], tuple[dict[str, float], list[float]]]
    columns: Mapping[str, str]
    statistic: str
    example: str


KINDS = {
    "reranking": Kind(
        *("Reranking", reranking),
        {"MAP": "map_at_1000", "nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10"},
        *("mean", '{"query": "...", "positive": ["..."], "negative": ["...", "..."]}'),
    ),
    "sts": Kind(
        *("STS", sts, {"spearman": "spearman", "pearson": "pearson"}, "spearman"),
        '{"sentence1": "...", "sentence2": "...", "score": 4.2}',
    ),
    "pair_classification": Kind(
        *("PairClassification", pair_classification),
        {"AP": "similarity_ap", "F1": "similarity_f1", "accuracy": "similarity_accuracy"},
        *("average_precision", '{"sentence1": "...", "sentence2": "...", "label": 1}'),
    ),
    "classification": Kind(
        *("Classification", classification),
        {"accuracy": "accuracy", "F1": "f1", "kNN accuracy": "knn_accuracy"},
        *("mean", '{"text": "...", "label": "card arrival"}'),
    ),
    "clustering": Kind(
        *("Clustering", clustering, {"v-measure": "v_measure", "AMI": "ami"}, "none"),
        '{"text": "...", "label": "card arrival"}',
    ),
    "bitext": Kind(
        *("BitextMining", bitext, {"F1": "f1", "F1 forth": "f1_forth", "F1 back": "f1_back"}, "mean"),
        '{"en": "...", "de": "..."}',
    ),
}


class Labelled:
    """A task of one of KINDS, with the names of `Retrieval`."""

    def __init__(self, config: TaskOptions):
        self.kind = KINDS[config.task_type]
        self.columns = self.kind.columns
        findings = Findings(log=say)
        self.rows = read(config, config.split, findings)
        self.train = read(config, "train", findings) if config.task_type == "classification" else []
        findings.raise_bad()
        if self.train and (config.split == "train" or Path(config.data).is_file()):
            raise UserError(
                f"{config.data}: classification needs a folder with files of train and of {config.split}"
            )
        if len(self.rows) < 2:
            raise UserError(
                f"{config.data}: {len(self.rows)} rows of split {config.split}; two are the least"
            )
        check_gold(config, self.rows, self.train)
        say(f"{len(self.rows)} rows of split {config.split} of {config.data}")
        found = dict(findings.counts)
        if self.train and (strangers := untrained(self.rows, self.train)):
            found["texts with a label that no row of train has, which cannot be right"] = len(strangers)
            say(
                f"{len(strangers)} of {len(self.rows)} texts have a label that no row of train has, and "
                f"cannot be right (first: {strangers[0]['id']}, label {strangers[0]['gold']!r})"
            )
        for line in findings.lines():
            say(line)
        digest = hashlib.sha256(json.dumps([self.rows, self.train]).encode()).hexdigest()
        self.facts = {
            "name": config.name or Path(config.data).resolve().stem,
            "type": self.kind.type,
            "main_score": next(iter(self.columns.values())),
            "statistic": self.kind.statistic,
            **{"digest": digest, "path": config.data, "split": config.split},
            **{"queries": len(self.rows), "train": len(self.train), "found": found},
        }
        with mteb_imported():
            pass  # seconds in the table are of encoding and scoring, not of imports

    @property
    def texts(self) -> dict[str, dict[str, str]]:
        """Of the split, as those of a retrieval task; "documents": the other sentence, or the candidates."""
        found: dict[str, dict[str, str]] = {"queries": {}, "documents": {}}
        for row in self.rows:
            found["queries"][row["id"]] = row["text"]
            others = [*row.get("positive", ()), *row.get("negative", ())]
            for i, text in enumerate(others or filter(None, [row.get("other")])):
                found["documents"][f"{row['id']}.{i}"] = text
        return {side: texts for side, texts in found.items() if texts}

    def evaluate(self, encoder: TextEncoder | Encoding, usage: Usage) -> dict[str, Any]:
        vectors = Vectors(encoder, usage)
        return {**self._scored(vectors), "truncated": vectors.truncated}

    def bm25(self) -> dict[str, Any]:
        """By the words of each query in its candidates, whose words are weighed by those of all queries."""
        return self._scored(Bm25Search())

    def _scored(self, model: Vectors | Bm25Search) -> dict[str, Any]:
        with mteb_imported():
            figures, scores = self.kind.run(model, self.rows, self.train)
        figures = {name: float(value) for name, value in figures.items()}
        if bad := [name for name, value in figures.items() if not np.isfinite(value)]:
            raise UserError(
                f"{self.facts['path']}: {bad[0]} is not a number: all similarities of the model are the same"
            )
        name = self.facts["main_score"] if self.kind.statistic == "mean" else "predicted"
        own = [{}] * len(self.rows) if self.kind.statistic == "none" else [{name: score} for score in scores]
        rows = [
            {"id": row["id"], **score, **{key: row[key] for key in row if key in SHOWN}, "texts": {}}
            for row, score in zip(self.rows, own, strict=True)
        ]
        return {**figures, "per_query": rows}


def check_gold(config: TaskOptions, rows: list[Row], train: list[Row]) -> None:
    """UserError for labels or grades that leave nothing to tell apart: any model would have the same score,
    or none."""
    of = f"{config.data}: {len(rows)} rows of split {config.split}"
    num = len({row.get("gold") for row in rows})
    if config.task_type == "sts" and num == 1:
        raise UserError(f"{of} with one grade have no order; give others")
    if config.task_type == "pair_classification" and num == 1:
        raise UserError(f"{of} all have the label {rows[0]['gold']:g}; give pairs with 0 and with 1")
    if config.task_type == "clustering" and num in (1, len(rows)):
        have = "one label" if num == 1 else "as many labels"
        raise UserError(f"{of} have {have}: nothing is to be grouped; give texts of several labels")
    if config.task_type == "classification" and len({row["gold"] for row in train}) == 1:
        label = train[0]["gold"]
        raise UserError(
            f"{config.data}: {len(train)} rows of split train all have the label {label!r}; give others too"
        )


def untrained(rows: list[Row], train: list[Row]) -> list[Row]:
    """Of a classification, with labels that it cannot know."""
    known = {row["gold"] for row in train}
    return [row for row in rows if row["gold"] not in known]


def without_sides(usage: Usage) -> Usage:
    """The query's prompt and length for all texts: of tasks whose texts are not queries and documents."""
    prompts = {"query": Prompts(usage.default.query, usage.default.query)}
    return replace(usage, prompts=prompts, document_max_length=usage.query_max_length)


def read(config: TaskOptions, split: str, findings: Findings) -> list[Row]:
    """{"id", "text", "other" of pairs, "gold" where there is one} of each row of a split; what is wrong is
    `bad` in findings."""
    kind, rows = KINDS[config.task_type], list[Row]()
    for record in records(find(config.data, split), findings, kind.example):
        try:
            fields = _fields(config.task_type, record.fields, kind.example)
        except ValueError as error:
            findings.bad(record.path, record.line, str(error))
        else:
            rows.append({"id": f"{record.path.name}:{record.line}", **fields})
    return rows


def _candidates(fields: Mapping[str, Any], example: str) -> Row:
    if missing := {"query", "positive", "negative"} - fields.keys():
        raise ValueError(f"field {sorted(missing)[0]!r} is missing: give {example}")
    row: Row = {"text": check_text(fields["query"], "query")}
    for name in ("positive", "negative"):
        texts = [fields[name]] if isinstance(fields[name], str) else fields[name]
        if not isinstance(texts, list) or not texts:
            raise ValueError(f"field {name!r} must be texts, at least one: give {example}")
        row[name] = [check_text(text, name) for text in texts]
    candidates = [*row["positive"], *row["negative"]]
    if len(set(candidates)) < len(candidates):
        raise ValueError("a candidate stands twice: keep one")
    return {**row, "other": row["positive"][0]}


def _fields(task_type: str, fields: Mapping[str, Any], example: str) -> Row:
    if task_type == "reranking":
        return _candidates(fields, example)
    wanted = {"sts": "score", "bitext": None}.get(task_type, "label")
    pair: tuple[str, ...] = ("sentence1", "sentence2")
    if wanted is None and not set(pair) <= fields.keys():
        pair = tuple(fields)[:2] if len(fields) == 2 else pair
    of_one = task_type in ("classification", "clustering")
    texts = ("text",) if of_one else pair
    if missing := [name for name in (*texts, wanted) if name and name not in fields]:
        raise ValueError(f"field {missing[0]!r} is missing: give {example}")
    row = dict(zip(("text", "other"), (check_text(fields[name], name) for name in texts), strict=False))
    if wanted is None:
        return row
    gold = fields[wanted]
    if of_one:
        if isinstance(gold, bool) or not isinstance(gold, str | int):
            raise ValueError(f"field 'label' must be a string or an integer, got {gold!r}")
        return {**row, "gold": str(gold)}
    try:
        number = float(gold)
    except (TypeError, ValueError):
        raise ValueError(f"field {wanted!r} must be a number, got {gold!r}") from None
    if task_type == "pair_classification" and number not in (0, 1):
        raise ValueError(f"field 'label' must be 0 or 1, got {gold!r}")
    if not np.isfinite(number):
        raise ValueError(f"field {wanted!r} must be a number, got {gold!r}")
    return {**row, "gold": number}
