"""The tasks of a run, by their names, before any data is read.

plans = plans_of(config)                          # one, or of config.tasks and config.local
usage, overridden = plans[0].asked(subject)       # how a model encodes the task's texts
task = plans[0].open()                            # its data, read and checked
entry = task.evaluate(encoding, usage)
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.config.evaluate import WITH_BM25, TaskOptions
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.data.readers import with_tasks
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.encoding import Encoding
from nemo_embed_core.evaluation.instructions import instruction_of_type
from nemo_embed_core.evaluation.labelled import Labelled, without_sides
from nemo_embed_core.evaluation.models import Subject
from nemo_embed_core.evaluation.named import named_plans
from nemo_embed_core.evaluation.retrieval import mteb_imported
from nemo_embed_core.evaluation.retrieval_task import Retrieval, dataset_of


class Task(Protocol):
    """columns: of the table, title -> figure, the main score first.  parts: what reports say of the data, one
    for each report.  Figures of each part have "per_query", a row for each query."""

    columns: Mapping[str, str]
    parts: list[dict[str, Any]]

    def evaluate(self, encoder: Encoding, usage: Usage) -> list[dict[str, Any]]: ...
    def bm25(self) -> list[dict[str, Any]]: ...


class One:
    """A task of one part."""

    def __init__(self, task: Labelled):
        self.task, self.columns, self.parts = task, task.columns, [task.facts]

    @property
    def texts(self) -> list[Mapping[str, Mapping[str, str]]]:
        return [self.task.texts]

    def evaluate(self, encoder: Encoding, usage: Usage) -> list[dict[str, Any]]:
        return [self.task.evaluate(encoder, usage)]

    def bm25(self) -> list[dict[str, Any]]:
        return [self.task.bm25()]


class Plan(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def restriction(self) -> str: ...  # which of the task's data it takes
    def check(self, models: list[str]) -> None: ...  # UserError for what it cannot score
    def asked(self, subject: Subject) -> tuple[Usage, dict[str, Any]]: ...  # and the options that changed it
    def open(self) -> Task: ...


@dataclass(frozen=True)
class LocalPlan:
    """A task on data of one's own."""

    options: TaskOptions
    seed: int
    instructions: str

    @classmethod
    def of(cls, options: TaskOptions, config: EvaluateConfig) -> LocalPlan:
        """With the instructions that the data itself has, where no option says any."""
        if options.task_type == "retrieval" and not options.prompt_name:
            own = with_tasks(dataset_of(options))
            task = options.task if options.task is not None else own.task or None
            other = options.document_task
            other = other if other is not None else own.document_task or None
            options = replace(options, task=task, document_task=other)
        return cls(options, config.seed, config.instructions)

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def restriction(self) -> str:
        return f"{self.options.data} of local"

    def check(self, models: list[str]) -> None:
        if "bm25" in models and self.options.task_type not in WITH_BM25:
            kind = self.options.task_type
            raise UserError(f"bm25 ranks documents for queries: task_type={kind} has none")

    def asked(self, subject: Subject) -> tuple[Usage, dict[str, Any]]:
        usage, overridden = subject.usage(self.options)
        if self.options.task_type in WITH_BM25:
            return usage, overridden
        task = instruction_of_type(self.options.task_type) if self.instructions == "paper" else ""
        if task and not self.options.prompt_name and self.options.task is None:
            usage = replace(usage, prompts={"query": Prompts(query_prompt(task))})
            overridden = {**overridden, "task": task}
        return without_sides(usage), overridden

    def open(self) -> Task:
        if self.options.task_type == "retrieval":
            return Retrieval(self.options, self.seed)
        return One(Labelled(self.options))


def plans_of(config: EvaluateConfig) -> list[Plan]:
    """In the order of config.tasks; without any the local ones. UserError for a name of neither."""
    if not (config.tasks or config.local):
        return [LocalPlan.of(config, config)]
    local = {entry.name: entry for entry in config.local}
    plans: list[Plan] = []
    for name in config.tasks or local:
        if name in local:
            plans.append(LocalPlan.of(config.of_local(local[name]), config))
        elif found := named_plans(name, config):
            plans += found
        else:
            raise UserError(f"tasks: {name!r} is no task or benchmark of mteb{near(name, local)}")
    once: dict[str, Plan] = {}
    for plan in plans:  # benchmarks overlap
        first = once.setdefault(plan.name, plan)
        if first.restriction != plan.restriction:
            raise UserError(
                f"tasks: {plan.name} is asked for twice, with {first.restriction[:200]} and with "
                f"{plan.restriction[:200]}, and a run has one report of it: give each a run of its own"
            )
    return list(once.values())


def near(name: str, local: Mapping[str, Any]) -> str:
    """What may have been meant."""
    with mteb_imported():
        import mteb

        benchmarks = [benchmark.name for benchmark in mteb.get_benchmarks()]
        known = [*local, *benchmarks, *(task.metadata.name for task in mteb.get_tasks())]
    found = difflib.get_close_matches(name, known, n=1)
    return f", nor a name in local; did you mean {found[0]!r}?" if found else ", nor a name in local"
