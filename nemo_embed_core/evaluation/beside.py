"""What stands beside a score: how much of the task is in training data, and alarms.

beside = Beside(config, task.texts, task.facts)          # UserError where more than strict is
entry = task.evaluate(beside.watched(encoder), usage)    # encode_checked shows it the vectors
beside.add(name, folder, entry)                          # "overlap", "spread", "alarms" into the entry
for line in beside.lines(entry): print(line)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.checkpoint.manifest import step_of
from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation import overlap
from nemo_embed_core.evaluation.alarms import (
    FEWEST_ROWS,
    Alarm,
    collapse,
    confusion,
    degradation,
    differences,
    spread,
)
from nemo_embed_core.evaluation.encoding import say
from nemo_embed_core.files.strict_json import parse

SAMPLED = 512  # vectors of a side whose spread is looked at


class Sample:
    """SAMPLED rows of each side at random, each as likely as any other, from one seed."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)
        self._rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # numbers, and rows of the smallest ones

    def __call__(self, side: str, rows_nD: np.ndarray) -> None:
        numbers = self._generator.random(len(rows_nD))
        if side in self._rows:
            before, kept = self._rows[side]
            numbers, rows_nD = np.concatenate([before, numbers]), np.concatenate([kept, rows_nD])
        first = np.argsort(numbers)[:SAMPLED]
        self._rows[side] = numbers[first], rows_nD[first]

    def spreads(self) -> dict[str, dict[str, float]]:
        return {side: spread(rows) for side, (_, rows) in self._rows.items() if len(rows) >= FEWEST_ROWS}


def under(usage: Usage, task: str) -> Usage:
    """With another instruction of the queries, and of documents that are encoded as they are."""
    own, prompt = usage.default, query_prompt(task)
    document = prompt if own.document == own.query and own.document else own.document
    return replace(usage, prompts={"query": Prompts(prompt, document)})


def besides_of(config: EvaluateConfig, task: Any) -> list[Beside]:
    """Of each part of a task. UserError for training data beside a task whose texts mteb keeps."""
    texts = getattr(task, "texts", None)
    if texts is None and config.training:
        raise UserError(
            f"training is looked for in local tasks, and {task.parts[0]['name']} is one of mteb's: give its "
            "texts as a local task, or leave training out"
        )
    return [
        Beside(config, own, facts)
        for own, facts in zip(texts or [{}] * len(task.parts), task.parts, strict=True)
    ]


class Beside:
    """For the models of one task, the base first.  texts: side -> id -> text.  facts: of the report."""

    def __init__(self, config: EvaluateConfig, texts: overlap.Texts, facts: Mapping[str, Any]):
        self._config, self._facts = config, facts
        self._statistic = facts.get("statistic", "mean")
        self._metric = facts["main_score"] if self._statistic == "mean" else "predicted"
        self._base: dict[str, Any] | None = None
        self._overlaps: dict[str, dict[str, Any]] = {}
        given = [name for name in config.training if name != overlap.OWN]
        for model in config.models if config.training else ():
            # "A@256" is A with fewer columns.
            run = re.sub(r"@\d+$", "", model)
            own = [run] if overlap.OWN in config.training and model != "bm25" else []
            if not (names := [*given, *own]):
                continue
            same = (found for found in self._overlaps.values() if found["training"] == names)
            if (found := next(same, None)) is None:
                found = overlap.overlap(texts, names, say)
                for line in overlap.lines(found):
                    say(line)
            self._overlaps[model] = found
            if config.strict is not None:
                overlap.refuse(found, config.strict, facts["name"])

    def add(
        self,
        name: str,
        folder: Path | None,
        entry: dict[str, Any],
        sample: Sample,
        other: Mapping[str, Any] | None = None,
    ) -> None:
        """folder: of the checkpoint.  sample: of its vectors.  other: the entry under config.other_task."""
        found: list[Alarm | None] = []
        if spreads := sample.spreads():
            entry["spread"] = spreads
            found += [collapse(figures, f"the {side} vectors") for side, figures in spreads.items()]
        if folder is not None:
            found += trained_with(folder)
        if entry["per_query"] and self._metric in entry["per_query"][0]:
            if name == self._config.base:
                self._base = dict(entry)  # whose rows the report does not keep
            elif self._base is not None:
                languages = [row.get("language") or "" for row in entry["per_query"]]
                groups = self._compared(self._base, entry, languages)
                entry["base"] = {"model": self._config.base, "groups": groups}
                found.append(degradation(groups, self._config.base))
            if other is not None:
                whole = [""] * len(entry["per_query"])
                entry["other_task"] = {"task": self._config.other_task}
                for one in self._compared(entry, other, whole):
                    entry["other_task"] |= one
                    found.append(confusion(one, self._config.other_task))
        if self._config.training:
            entry["overlap"] = self._overlaps.get(name)
        entry["alarms"] = [alarm._asdict() for alarm in found if alarm is not None]

    def _compared(
        self, base: Mapping[str, Any], entry: Mapping[str, Any], groups: Sequence[str]
    ) -> list[dict[str, Any]]:
        metric, statistic = self._metric, self._statistic
        before, after = ({row["id"]: row for row in one["per_query"]} for one in (base, entry))
        assert before.keys() == after.keys(), "one task has the same rows for all models"
        base_n, model_n = (np.array([rows[i][metric] for i in after]) for rows in (before, after))
        gold_n = None if statistic == "mean" else np.array([row["gold"] for row in after.values()])
        drawing = (self._config.draws, [self._config.seed])
        return differences(base_n, model_n, gold_n, statistic, groups, *drawing)

    def lines(self, entry: Mapping[str, Any]) -> Iterator[str]:
        if self._config.training:
            yield f"in training data: {overlap.words(entry['overlap'])}"
        for alarm in entry["alarms"]:
            yield f"alarm: {alarm['kind']}: {alarm['says']}"


def trained_with(folder: Path) -> list[Alarm | None]:
    """Of a checkpoint, alarms that sounded in its run up to it, from metrics.jsonl beside it."""
    metrics, steps = folder.parent / "metrics.jsonl", dict[str, list[int]]()
    if step_of(folder.name) < 0 or not metrics.is_file():
        return []
    for line in metrics.read_bytes().splitlines():
        try:
            values = parse(line)
        except ValueError:
            break  # the half line of a run that was killed
        for kind in values.get("alarms", ()) if values["step"] <= step_of(folder.name) else ():
            steps.setdefault(kind, []).append(values["step"])
    return [
        Alarm(kind, f"sounded in {len(found)} steps of training, {found[0]} to {found[-1]} ({metrics})")
        for kind, found in steps.items()
    ]
