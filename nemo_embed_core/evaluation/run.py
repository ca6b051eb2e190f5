"""Models side by side on held-out data, each with its own prompts, lengths and similarity.

report = evaluate(["runs/stage1", "exports/merged", "bm25"], "data/wiki", split="test")
report["bm25"]["ndcg_at_10"]
reports = run(EvaluateConfig(models=["exports/merged"], tasks=["STS12", "NanoBEIR"]))   # {task: report}
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.data.texts import Kept, texts_in
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation import mteb_results
from nemo_embed_core.evaluation.beside import Sample, besides_of, under
from nemo_embed_core.evaluation.encoding import Encoding, say
from nemo_embed_core.evaluation.models import Subject, cut_by
from nemo_embed_core.evaluation.named import check_data
from nemo_embed_core.evaluation.results import write_rows
from nemo_embed_core.evaluation.table import Report, Table, line_of
from nemo_embed_core.evaluation.tasks import Plan, Task, plans_of
from nemo_embed_core.files.durable import probe_file, write_atomically
from nemo_embed_core.parallel.layout import rank_from_env
from nemo_embed_core.parallel.mesh import pick_device, pick_precision

SAID_BYTES = 64 << 20  # of texts in TMPDIR


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
    writes. Texts of local data stand beside the report; without one in TMPDIR, which is said where they are
    many.
    """
    with texts_in(config.output or config.results or None) as kept:
        return _run(config, kept)


def _run(config: EvaluateConfig, kept: Kept) -> dict[str, Report]:
    if config.base:  # first: the others are compared with it
        models = [config.base, *(name for name in config.models if name != config.base)]
        config = replace(config, models=models)
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
    if kept.folder is None and kept.num_bytes >= SAID_BYTES:
        say(f"{kept.said()} until the end; with --output beside the report")
    besides = [besides_of(config, task) for task in tasks]
    table = Table(config, tasks)
    reports: dict[str, Report] = {}
    for number, name in enumerate(config.models):
        encoding = None
        if name != "bm25":
            encoder = encoder or subjects[name].load(config)
            encoding = Encoding(encoder)
        for plan, task, beside in zip(plans, tasks, besides, strict=True):
            sample = Sample()
            others: Sequence[dict[str, Any] | None] = [None] * len(task.parts)
            if encoding is not None and config.other_task:
                usage = cut_by(plan.asked(subjects[name])[0], encoding.encoder)
                others = task.evaluate(encoding, under(usage, config.other_task))
            start = time.perf_counter()  # of the score alone
            if encoding is None:
                entries, about = task.bm25(), dict[str, Any]()
            else:
                encoding.sample = sample
                entries, about = _scored(task, plan, subjects[name], encoding, config)
                encoding.sample = None
            seconds = round(time.perf_counter() - start, 1)
            folder = subjects[name].source.folder if name in subjects else None
            for facts, entry, own, other in zip(task.parts, entries, beside, others, strict=True):
                own.add(name, folder, entry, sample, other)
                entry["seconds"] = seconds
                table.row(name, task, facts, entry)
                if about:
                    entry |= about
                    table.note(line_of(entry))
                for line in own.lines(entry):
                    say(f"{'':{table.width}}  {line}")
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
    if subject.onnx:
        precision = Path(subject.onnx).stem  # which file says it: model_int8
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
