"""Scores of single queries: written beside a report by an evaluation, read and checked by a comparison.

    report.json               {model: figures, ..., "data": {...}, "per_query": "report.queries-0.jsonl"}
    report.queries-0.jsonl    a line for each query: id, text, language, scores, what was found, judgements

results = load(["runs/a.json", "reports"], say)             # one Result of each model and task
differing = check(results, allow=["prompts"])               # lines; UserError for what may not differ
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.config.evaluate import SETTINGS
from nemo_embed_core.errors import DataError, UserError
from nemo_embed_core.evaluation.rank_statistics import statistic_of
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.files.strict_json import parse, read_object

# Of the scores of its queries, what a task's score is; mteb rounds that of a retrieval task to five digits.
TOLERANCE = 1e-5


def write_rows(output: Path, number: int, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A file beside the report `output` for its model of this number; what the report says of it."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path = output.with_name(f"{output.stem}.queries-{number}.jsonl")
    write_atomically(path, data)
    return {"per_query": path.name, "per_query_sha256": hashlib.sha256(data).hexdigest()}


@dataclass(frozen=True)
class Result:
    """What a report says of one model, with the score of each query in the order of its file.

    entry: the report's.  rows: the file of the queries.  values: [n] of the main score, or predictions of
    gold [n] where the task's statistic is no mean, NaN where it is "none".
    """

    model: str
    report: Path
    entry: Mapping[str, Any]
    rows: Path
    ids: list[str]
    languages: list[str]
    values: np.ndarray
    gold: np.ndarray | None

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.entry["data"]

    @property
    def task(self) -> str:
        return self.facts["name"]

    @property
    def score(self) -> float:
        return self.entry[self.facts["main_score"]]

    @property
    def statistic(self) -> str:
        return self.facts.get("statistic", "mean")

    def setting(self, name: str) -> Any:
        """Of SETTINGS, and what else is shown where it differs; None of words, which have no such thing."""
        if name == "data":
            return [self.facts["digest"], self.facts.get("ignore_identical_ids")]
        if name == "split":
            return self.facts["split"]
        if name == "lengths":
            return [self.entry.get(f"{side}_max_length") for side in ("query", "document")]
        return self.entry.get(name)


# ------------------------------------------------------------------------------------------ reading


def results_in(path: Path) -> list[Result]:
    """Of each model of one report."""
    return [_result(path, model, entry) for model, entry in read_object(path).items()]


def load(paths: Sequence[str], say: Callable[[str], None]) -> list[Result]:
    """One result of each model and task; of a folder all reports in it, other JSON files are said."""
    results: dict[tuple[str, str], Result] = {}
    for path, report in reports_in(paths, say):
        for model, entry in report.items():
            result = _result(path, model, entry)
            if (other := results.setdefault((model, result.task), result)) is not result:
                places = (f"split {r.facts['split']} in {r.report}" for r in (other, result))
                raise UserError(
                    f"{model} has two results of {result.task}: {', '.join(places)}; leave one out, or "
                    "evaluate with another --name"
                )
    found = list(results.values())
    by_model: defaultdict[str, dict[Any, Path]] = defaultdict(dict)
    for result in found:
        by_model[result.model].setdefault(result.entry.get("digest"), result.report)
    for model, digests in by_model.items():
        if len(digests) > 1:
            ways = ", ".join(f"{str(digest)[:12]} in {path}" for digest, path in digests.items())
            raise UserError(f"{model} stands for several weights or precisions: {ways}; evaluate one again")
    if len(by_model) < 2:
        raise UserError(f"{', '.join(paths)}: results of {len(by_model)} model; a comparison needs two")
    return found


def reports_in(paths: Sequence[str], say: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, {model: entry}) of each report; of a folder all that lie in it."""
    for name in paths:
        folder = Path(name)
        files = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
        count = 0
        for path in files:
            report = read_object(path)
            if not report or not all(isinstance(e, dict) and isinstance(e.get("data"), dict)
                                     for e in report.values()):  # fmt: skip
                if not folder.is_dir():
                    raise UserError(f"{path} is no report of launch/evaluate.py --output")
                say(f"{path} is no report and was not read")
                continue
            count += 1
            yield path, report
        if not count:
            raise UserError(f"{folder} has no report of launch/evaluate.py --output")


def _result(path: Path, model: str, entry: Mapping[str, Any]) -> Result:
    if "per_query" not in entry:
        raise UserError(f"{path}: {model} has no scores of single queries; evaluate it again with --output")
    file, metric = path.parent / entry["per_query"], entry["data"]["main_score"]
    data = _bytes(file)
    if hashlib.sha256(data).hexdigest() != entry["per_query_sha256"]:
        raise UserError(f"{file} is not what {path} was written with; evaluate {model} again")
    rows = [row for _, row in _rows(file, data)]
    kind = entry["data"].get("statistic", "mean")
    value = {"mean": metric, "none": None}.get(kind, "predicted")
    result = Result(
        *(model, path, entry, file, [row["id"] for row in rows]),
        languages=[row.get("language") or "" for row in rows],
        values=np.array([np.nan if value is None else row[value] for row in rows]),
        gold=None if kind in ("mean", "none") else np.array([row["gold"] for row in rows]),
    )
    statistic = statistic_of(result.statistic, result.values[None], result.gold)
    own = float(statistic(np.ones((1, len(rows)), np.int64))[0, 0])
    if kind != "none" and not abs(own - result.score) <= TOLERANCE:
        raise UserError(
            f"{path}: {model} has {metric} {result.score}, and its queries the {result.statistic} {own:.6f}"
        )
    return result


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}, the scores of single queries, cannot be read: {error.strerror}") from None


def _rows(file: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            yield number, parse(line)
        except ValueError as error:
            raise DataError(file, number, f"is not valid JSON: {error}") from None


def rows_of(result: Result, wanted: Collection[str]) -> dict[str, dict[str, Any]]:
    """The whole rows of these ids."""
    return {row["id"]: row for _, row in _rows(result.rows, _bytes(result.rows)) if row["id"] in wanted}


# ------------------------------------------------------------------------------------------ checking


def check(results: Sequence[Result], allow: Collection[str]) -> list[str]:
    """Lines of the settings that differ within a task; UserError where they are not allowed to."""
    lines, refused = [], []
    for task in dict.fromkeys(result.task for result in results):
        same = [result for result in results if result.task == task]
        for name in ("type", "main_score"):
            if len(kinds := {result.facts[name] for result in same}) > 1:
                raise UserError(
                    f"{task} has results of {name} {' and '.join(sorted(kinds))}: --name one apart"
                )
        for name in (*SETTINGS, "similarity", "precision"):
            ways: defaultdict[str, list[str]] = defaultdict(list)
            for result in same:
                if (value := result.setting(name)) not in (None, [None, None]):
                    ways[json.dumps(value, ensure_ascii=False)].append(result.model)
            if len(ways) > 1:
                said = "; ".join(f"{', '.join(models)} {value[:200]}" for value, models in ways.items())
                lines.append(f"{task}: {name} differ: {said}")
                if name in SETTINGS and name not in allow:
                    refused.append(name)
    if refused:
        named = " ".join(dict.fromkeys(refused))
        raise UserError(
            "results of other settings say nothing of the models:\n" + "\n".join(lines) + f"\nevaluate again "
            f"with the same, or, where that is what is compared, --allow {named}"
        )
    return lines
