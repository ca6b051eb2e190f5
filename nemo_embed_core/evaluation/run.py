"""Models side by side on held-out data, each with its own prompts, lengths and similarity.

report = evaluate(["runs/stage1", "exports/merged", "bm25"], "data/wiki", split="test")
report["bm25"]["ndcg_at_10"]
reports = run(EvaluateConfig(models=["exports/merged"], tasks=["STS12", "NanoBEIR"]))   # {task: report}
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation import mteb_results
from nemo_embed_core.evaluation.encoding import Encoding, say
from nemo_embed_core.evaluation.models import Subject, cut_by
from nemo_embed_core.evaluation.named import check_data
from nemo_embed_core.evaluation.results import write_rows
from nemo_embed_core.evaluation.tasks import Plan, Task, plans_of
from nemo_embed_core.files.durable import probe_file, write_atomically
from nemo_embed_core.parallel.layout import rank_from_env
from nemo_embed_core.parallel.mesh import pick_device, pick_precision

Report = dict[str, dict[str, Any]]  # {model: figures and how its texts became vectors}


def evaluate(models: Iterable[str | Path], data: str | Path, **options: Any) -> Report:
    """The report of one task; options: the further fields of EvaluateConfig."""
    (report,) = run(
        EvaluateConfig(models=[str(model) for model in models], data=str(data), **options)
    ).values()
    return report


def run(config: EvaluateConfig) -> dict[str, Report]:
    """{task: report}. Each model is loaded once and does all tasks; its line is printed, and the task's
    report written, as soon as a task is done.

    Under torchrun every rank calls it in a process group: texts are encoded on all, and the first prints and
    writes.
    """
    check_names(config)
    subjects = {name: Subject.of(name) for name in config.models if name != "bm25"}
    plans = plans_of(config)
    for plan in plans:
        plan.check(config.models)
    check_data(plans, config.mirror)
    encoder = None
    for subject in reversed(subjects.values()):  # so that what was loaded last is the first that is needed
        del encoder  # before the next one is loaded
        encoder = subject.check(config, [plan.asked(subject)[0] for plan in plans])
    tasks = [plan.open() for plan in plans]
    table = Table(config, tasks)
    reports: dict[str, Report] = {}
    for number, name in enumerate(config.models):
        encoding = None
        if name != "bm25":
            encoder = encoder or subjects[name].load(config)
            encoding = Encoding(encoder)
        for plan, task in zip(plans, tasks, strict=True):
            start = time.perf_counter()
            if encoding is None:
                entries, about = task.bm25(), dict[str, Any]()
            else:
                entries, about = _scored(task, plan, subjects[name], encoding, config)
            seconds = round(time.perf_counter() - start, 1)
            for facts, entry in zip(task.parts, entries, strict=True):
                entry["seconds"] = seconds
                table.row(name, task, facts, entry)
                if about:
                    entry |= about
                    table.note(line_of(entry))
                _write(reports.setdefault(facts["name"], {}), entry, name, number, facts, config)
            table.matrix(task, entries)
        encoder = encoding = None  # before the next one is loaded
    table.close(reports, config.models)
    return reports


def _scored(
    task: Task, plan: Plan, subject: Subject, encoding: Encoding, config: EvaluateConfig
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(figures of each part, what is the same of all: the model and how its texts became vectors)."""
    asked, overridden = plan.asked(subject)
    usage = cut_by(asked, encoding.encoder)
    encoding.reset()
    entries = task.evaluate(encoding, usage)
    precision = pick_precision(config.precision, pick_device(config.device))
    about = {"digest": encoding.digest, "precision": precision, "encoding": encoding.speed}
    return entries, about | described(subject, usage, overridden)


def _write(
    report: Report,
    entry: dict[str, Any],
    model: str,
    number: int,
    facts: dict[str, Any],
    config: EvaluateConfig,
) -> None:
    """After every model of every task: an hour of scores is not lost with the next one."""
    rows, found = entry.pop("per_query"), entry.pop("mteb", None)
    report[model] = {**entry, "data": dict(facts)}
    if rank_from_env() > 0:
        return
    if config.output:
        output = Path(config.output)
        if config.is_many:
            output = output / f"{facts['name']}.json"
        report[model] |= write_rows(output, number, rows)
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_atomically(output, text.encode())
    if config.results:
        mteb_results.write(report[model], found, model, config)


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


def check_names(config: EvaluateConfig) -> None:
    """What can be wrong without opening a folder."""
    if not (config.data or config.tasks or config.local):
        raise UserError(
            "data is missing: give the folder to evaluate on, or --compare REPORT ... or --tasks ..."
        )
    if not config.models:
        raise UserError('no models to evaluate: give checkpoints, runs or folders, or "bm25"')
    if len(set(config.models)) < len(config.models):
        raise UserError(f"models={config.models} names one twice; the report has one entry per name")
    if config.mirror and not Path(config.mirror).is_dir():
        raise UserError(f"mirror={config.mirror} is not a folder: it holds data sets under their hub names")
    if rank_from_env() > 0:
        return  # one probe: another would find its file gone
    if config.output:
        probe_file(Path(config.output) / "report.json" if config.is_many else Path(config.output))
    if config.results:
        probe_file(Path(config.results) / "results" / "probe.json")


def described(subject: Subject, usage: Usage, overridden: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompts": usage.default._asdict(),
        "query_max_length": usage.query_max_length,
        "document_max_length": usage.document_max_length,
        "similarity": usage.similarity,
        "pooling": usage.pooling if subject.is_ours else "of its modules",
        "overridden": overridden,
    }


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
