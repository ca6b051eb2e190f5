"""mteb's own tasks and benchmarks by name, from data sets that are on this machine.

    plans = named_plans("MTEB(eng, v2)", config)       # one of each task; [] for a name that mteb has not
    plans[0].open().evaluate(encoding, usage)

A data set is read from config.mirror, else from the cache of the hub; nothing is downloaded. Tasks keep state
(random draws, data): each model gets a fresh copy, so that the order of models decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.hub_data import is_cached, mirrored, parts_of
from nemo_embed_core.evaluation.instructions import is_instructed, own_prompt, paper_instruction
from nemo_embed_core.evaluation.models import Subject
from nemo_embed_core.evaluation.named_task import NamedTask
from nemo_embed_core.evaluation.retrieval import mteb_imported

NAMED_SHOWN = 3  # tasks without data that an error names with their way


@dataclass(frozen=True)
class NamedPlan:
    """One task of mteb, as its benchmark restricts it to splits and languages."""

    task: Any
    config: EvaluateConfig

    @property
    def name(self) -> str:
        return self.task.metadata.name

    @property
    def restriction(self) -> str:
        each = [f"splits {', '.join(sorted(part.eval_splits))} of {', '.join(sorted(part.hf_subsets))}"
                for part in parts_of(self.task)]  # fmt: skip
        return "; ".join(each)

    @cached_property
    def is_search(self) -> bool:
        """Whether its texts are queries and documents."""
        from mteb.abstasks import AbsTaskRetrieval

        return all(isinstance(part, AbsTaskRetrieval) for part in parts_of(self.task))

    def check(self, models: list[str]) -> None:
        if "bm25" in models and not self.is_search:
            raise UserError(f"bm25 ranks documents for queries: {self.name} has none")
        if self.task.metadata.modalities != ["text"]:
            raise UserError(
                f"{self.name} is of {', '.join(self.task.metadata.modalities)}, not of text alone"
            )

    def asked(self, subject: Subject) -> tuple[Usage, dict[str, Any]]:
        """With a pair of prompts for each part of the task, by its name."""
        usage, overridden = subject.usage(self.config)
        given = any(getattr(self.config, name) for name in ("prompt_name", "task", "document_task"))
        given = given or "" in (self.config.task, self.config.document_task)
        which = self.config.instructions
        if which == "auto":
            which = "paper" if is_instructed(subject.source.usage) else "own"
        prompts = {}
        for part in parts_of(self.task):
            sides = ("query", "document") if self.is_search else (None, None)
            if given:
                found = usage.default if self.is_search else Prompts(usage.default.query, usage.default.query)
            elif which == "paper":
                found = Prompts(*(query_prompt(paper_instruction(part.metadata, side)) for side in sides))
            else:
                found = Prompts(*(own_prompt(subject.source.usage, part.metadata, side) for side in sides))
            prompts[part.metadata.name] = found
        document = usage.document_max_length if self.is_search else usage.query_max_length
        if self.config.instructions != "auto" and not given:
            overridden = {**overridden, "instructions": which}
        return replace(usage, prompts=prompts, document_max_length=document), overridden

    def missing(self) -> list[str]:
        """Data sets of it, as "NAME at REVISION", that are neither in the mirror nor in the hub's cache."""
        sets = (part.metadata.dataset for part in parts_of(self.task))
        return [
            f"{one['path']} at {one['revision']}"
            for one in sets
            if mirrored(one["path"], self.config.mirror) is None and not is_cached(one["path"])
        ]

    def open(self) -> NamedTask:
        return NamedTask(self.task, self.config.mirror)


def named_plans(name: str, config: EvaluateConfig) -> list[NamedPlan]:
    with mteb_imported():
        import mteb

        try:
            tasks = [mteb.get_task(name)]
        except KeyError:  # to ask for a benchmark makes every task of all of them: seconds
            try:
                tasks = list(mteb.get_benchmark(name).tasks)
            except KeyError:
                return []
    return [NamedPlan(task, config) for task in tasks]


def check_data(plans: Sequence[Any], mirror: str) -> None:
    """UserError with all tasks whose data sets are not on this machine."""
    found = {
        plan.name: missing for plan in plans if isinstance(plan, NamedPlan) if (missing := plan.missing())
    }
    if not found:
        return
    shown = [f"{name}: {', '.join(missing)}" for name, missing in found.items()]
    more = [f"and {len(found) - NAMED_SHOWN} more"] if len(found) > NAMED_SHOWN else []
    where = f"{mirror} or " if mirror else ""
    raise UserError(
        f"{len(found)} of {len(plans)} tasks have no data in {where}the cache of the hub, and nothing is "
        "downloaded:\n"
        + "\n".join([*shown[:NAMED_SHOWN], *more])
        + "\nWhere there is a network, `hf download "
        "NAME --revision REVISION --repo-type dataset --local-dir MIRROR/NAME` brings one into the folder of "
        "--mirror; or leave these tasks out"
    )
