"""What a run prints: figures of models and tasks, how texts became vectors, languages, means."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.evaluation.encoding import say
from nemo_embed_core.evaluation.tasks import Task

Report = dict[str, dict[str, Any]]  # {model: figures and how its texts became vectors}


class Table:
    """What is printed: of one task a line for each model, of several a line for each task of each model."""

    def __init__(self, config: EvaluateConfig, tasks: Sequence[Task]):
        self.is_many, self.model, self.notes = config.is_many, "", set[str]()
        self.has_means = bool(config.tasks or config.local)
        parts = [facts["name"] for task in tasks for facts in task.parts]
        names = parts if self.is_many else config.models
        self.width = max(len(name) for name in (*names, "model"))
        if not self.is_many:
            say(f"{'model':{self.width}}  {'  '.join(tasks[0].columns)}  seconds")

    def row(self, model: str, task: Task, facts: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
        if self.is_many:
            if model != self.model:
                say(f"{model}")
                self.model, self.notes = model, set()
            title, metric = next(iter(task.columns.items()))
            name = facts["name"]
            say(f"  {name:{self.width}}  {entry[metric]:7.4f} {title:12}  {entry['seconds']:7.1f} s")
        else:
            figures = [f"{entry[metric]:{len(column)}.4f}" for column, metric in task.columns.items()]
            say(f"{model:{self.width}}  {'  '.join(figures)}  {entry['seconds']:7.1f}")

    def note(self, line: str) -> None:
        """How the texts became vectors; of several tasks once where it is the same."""
        if line not in self.notes:
            say(f"{'':{self.width}}  {line}")
        self.notes.add(line)

    def matrix(self, task: Task, entries: Sequence[Mapping[str, Any]]) -> None:
        """The main score by the languages of queries (rows) and of documents (pools, columns)."""
        parts = list(zip(task.parts, entries, strict=True))
        for split in dict.fromkeys(facts["split"] for facts, _ in parts):
            self._matrix(task, {f.get("pool", ""): entry for f, entry in parts if f["split"] == split}, split)

    def _matrix(self, task: Task, pools: Mapping[str, Mapping[str, Any]], split: str) -> None:
        if len(pools) < 2:
            return
        metric = next(iter(task.columns.values()))
        cells = {pool: entry.get("by_language", {}) for pool, entry in pools.items()}
        languages = sorted({language for by_language in cells.values() for language in by_language})
        heads = [pool.removeprefix("lang=") or "all" for pool in pools]
        say(f"  {metric} of {split}: queries in the language of a row, documents in that of a column")
        say("  " + "".join(f"{head:>8}" for head in ["", *heads]))
        for language in languages:
            found = (by_language.get(language) for by_language in cells.values())
            say(f"  {language:>8}" + "".join(f"{cell[metric]:8.4f}" if cell else f"{'':8}" for cell in found))

    def close(self, reports: Mapping[str, Report], models: Sequence[str]) -> None:
        """Means of the main scores over the tasks, of each model."""
        if not self.has_means or len(reports) < 2:
            return
        for model in models:
            scores = [report[model][report[model]["data"]["main_score"]] for report in reports.values()]
            say(f"mean of {len(scores)} tasks: {sum(scores) / len(scores):.4f} {model}")


def line_of(entry: dict[str, Any]) -> str:
    """How the texts became vectors, on one line of the table."""
    sides = []
    for side in ("query", "document"):
        length, share = entry[f"{side}_max_length"], entry["truncated"][side]
        cut = "an unknown share" if share is None else f"{share:.1%}"
        cut = "whole texts" if length is None else f"{length} tokens, {cut} truncated"
        sides.append(f"{side} {json.dumps(entry['prompts'][side], ensure_ascii=False)} {cut}")
    own = f"; overridden: {', '.join(entry['overridden'])}" if entry["overridden"] else ""
    return f"{'; '.join(sides)}; {entry['similarity']}, {entry['precision']}, {entry['digest'][:12]}{own}"
