"""mteb's own tasks and benchmarks by name, from data sets that are on this machine.

    plans = named_plans("MTEB(eng, v2)", config)       # one of each task; [] for a name that mteb has not
    plans[0].open().evaluate(encoding, usage)

A data set is read from config.mirror, else from the cache of the hub; nothing is downloaded. Tasks keep state
(random draws, data): each model gets a fresh copy, so that the order of models decides nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.checkpoint.source import Prompts, Usage
from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.encoding import Encoding
from nemo_embed_core.evaluation.models import Subject
from nemo_embed_core.evaluation.mteb_tasks import Bm25Search, Vectors
from nemo_embed_core.evaluation.retrieval import mteb_imported

# Both texts of these have one instruction in the paper and its published model, whatever the task says.
SAME_ON_BOTH_SIDES = {
    "STS": "Retrieve semantically similar text",
    "PairClassification": "Retrieve semantically similar text",
    "BitextMining": "Retrieve parallel sentences",
}
NAMED_SHOWN = 3  # tasks without data that an error names with their way


@dataclass(frozen=True)
class NamedPlan:
    """One task of mteb, as its benchmark restricts it to splits and languages."""

    task: Any
    config: EvaluateConfig

    @property
    def name(self) -> str:
        return self.task.metadata.name

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
            tasks = list(mteb.get_benchmark(name).tasks)
        except KeyError:
            try:
                tasks = [mteb.get_task(name)]
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


# ------------------------------------------------------------------------------------------ data sets


def parts_of(task: Any) -> Iterator[Any]:
    """The task itself, or those that it is the mean of (CQADupstack)."""
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    if isinstance(task, AbsTaskAggregate):
        for part in task.metadata.tasks:
            yield from parts_of(part)
    else:
        yield task


def mirrored(path: str, mirror: str) -> Path | None:
    folder = Path(mirror) / path
    return folder if mirror and folder.is_dir() else None


def is_cached(path: str) -> bool:
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = (
        Path(HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}",
        Path(HF_DATASETS_CACHE) / path.replace("/", "___").lower(),
        Path(HF_DATASETS_CACHE) / path.replace("/", "___"),
    )
    return any(folder.is_dir() for folder in folders)


def fresh(task: Any, mirror: str) -> Any:
    """A copy with draws and data of its own, which reads the mirror where that has the data set."""
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    own = copy.deepcopy(task)
    if isinstance(task, AbsTaskAggregate):
        parts = [fresh(part, mirror) for part in task.metadata.tasks]
        own.metadata = task.metadata.model_copy(update={"tasks": parts})
        own.tasks, own.taskname_to_task = parts, {part.metadata.name: part for part in parts}
    elif folder := mirrored(task.metadata.dataset["path"], mirror):
        dataset = {**task.metadata.dataset, "path": str(folder)}
        own.metadata = task.metadata.model_copy(update={"dataset": dataset})
    return own


def load(task: Any) -> None:
    for part in parts_of(task):
        try:
            part.load_data()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            place = part.metadata.dataset["path"]
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{part.metadata.name}: its data set {place} cannot be read here: {reason[:300]}; a whole "
                "copy of it, in the folder of --mirror or in the hub's cache, has all its configurations and "
                "splits"
            ) from error


# ------------------------------------------------------------------------------------------ prompts


def is_instructed(usage: Usage) -> bool:
    """Whether its queries have the paper's prompt with some instruction."""
    query = usage.default.query
    return query.startswith("Instruct: ") and query.endswith("\nQuery: ")


def instruction_of_type(task_type: str) -> str:
    """The paper's for a local task of this type; "" where it depends on the task."""
    words = {"sts": "STS", "pair_classification": "PairClassification", "bitext": "BitextMining"}
    return SAME_ON_BOTH_SIDES.get(words.get(task_type, ""), "")


def paper_instruction(metadata: Any, side: str | None) -> str:
    """As the published model's, which mteb has with its instructions for tasks: documents have none."""
    from mteb.abstasks.abstask import get_abstask_prompt
    from mteb.models.model_implementations.nvidia_models import TASK_PROMPTS

    own = TASK_PROMPTS.get(metadata.name)
    is_search = "Retrieval" in metadata.type or "Reranking" in metadata.type
    if metadata.type in SAME_ON_BOTH_SIDES:
        return SAME_ON_BOTH_SIDES[metadata.type]
    if is_search and side == "document" and not isinstance(own, dict):
        return ""
    own = own or metadata.prompt
    if isinstance(own, dict):
        return own.get(side) or ""
    return own or get_abstask_prompt(metadata.name)


def own_prompt(usage: Usage, metadata: Any, side: str | None) -> str:
    """As mteb chooses among a model's: of the task, else of its type, else of the side; "" without."""
    from mteb.models.abs_encoder import get_prompt_name
    from mteb.types import PromptType

    named = usage.named_prompts()
    name = get_prompt_name(named, metadata, PromptType(side) if side else None)
    return named.get(name, "") if name else ""


# ------------------------------------------------------------------------------------------ scores


class NamedTask:
    """Figures: the main score as mteb's leaderboard has it, the mean over splits and subsets, and each of
    them; "mteb", mteb's own result.

    Single rows have scores where the task has one split and one subset, and ranks documents or correlates.
    """

    columns: Mapping[str, str]
    parts: list[dict[str, Any]]

    def __init__(self, task: Any, mirror: str):
        self.task, self.mirror = task, mirror
        metadata = task.metadata
        self.columns = {metadata.main_score: metadata.main_score}
        parts = list(parts_of(task))
        sets = [[part.metadata.dataset, part.eval_splits, part.hf_subsets] for part in parts]
        self.watched = len(parts) == len(parts[0].eval_splits) == len(parts[0].hf_subsets) == 1
        self.facts: dict[str, Any] = {
            **{"name": metadata.name, "type": metadata.type, "main_score": metadata.main_score},
            "statistic": self._statistic(),
            "digest": hashlib.sha256(json.dumps(sets, sort_keys=True).encode()).hexdigest(),
            "path": ", ".join(part.metadata.dataset["path"] for part in parts),
            "split": ", ".join(dict.fromkeys(split for part in parts for split in part.eval_splits)),
            "subsets": sum(len(part.hf_subsets) for part in parts),
            "mirrored": all(mirrored(part.metadata.dataset["path"], mirror) for part in parts),
        }

        self.parts = [self.facts]

    def _statistic(self) -> str:
        from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS

        main = self.task.metadata.main_score
        if self.watched and isinstance(self.task, AbsTaskRetrieval) and _of_query(main):
            return "mean"
        is_sts = isinstance(self.task, AbsTaskSTS) and main in ("cosine_spearman", "spearman")
        return "spearman" if self.watched and is_sts else "none"

    def evaluate(self, encoder: Encoding, usage: Usage) -> list[dict[str, Any]]:
        from mteb.abstasks import AbsTaskRetrieval

        is_search = any(isinstance(part, AbsTaskRetrieval) for part in parts_of(self.task))
        vectors = Vectors(encoder, usage, keep=not is_search)  # a corpus may be larger than memory
        return [{**self._scored(vectors), "truncated": vectors.truncated}]

    def bm25(self) -> list[dict[str, Any]]:
        return [self._scored(Bm25Search())]

    def _scored(self, model: Vectors | Bm25Search) -> dict[str, Any]:
        with mteb_imported():
            import mteb

            own = fresh(self.task, self.mirror)
            load(own)
            rows = self._watch(own)
            options: dict[str, Any] = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
            encode = {"batch_size": 1024, "show_progress_bar": False}
            found = mteb.evaluate(model, own, encode_kwargs=encode, **options)
        result = found.task_results[0]
        score = float(result.get_score())
        if not np.isfinite(score):
            raise UserError(f"{self.facts['name']}: {self.facts['main_score']} is not a number")
        scores = {
            split: {one["hf_subset"]: float(one["main_score"]) for one in each}
            for split, each in result.scores.items()
        }
        if self.facts["statistic"] == "none":
            rows = [
                {"id": f"{split}/{subset}", "score": value}
                for split, each in scores.items()
                for subset, value in each.items()
            ]
        self.facts["queries"] = len(rows)
        return {self.facts["main_score"]: score, "scores": scores, "per_query": rows, "mteb": result}

    def _watch(self, task: Any) -> list[dict[str, Any]]:
        """Rows that fill when the task is scored."""
        rows: list[dict[str, Any]] = []
        main = self.facts["main_score"]
        if self.facts["statistic"] == "mean":
            score_queries = task.task_specific_scores

            def seen(scores: Any, qrels: Any, *args: Any, **kwargs: Any) -> Any:
                each = {query: scores[query][_of_query(main)] for query in sorted(scores)}
                rows.extend({"id": query, main: value, "texts": {}} for query, value in each.items())
                return score_queries(scores, qrels, *args, **kwargs)

            task.task_specific_scores = seen
        elif self.facts["statistic"] == "spearman":
            score_pairs = task._calculate_scores
            kind = "cosine_scores" if main == "cosine_spearman" else "similarity_scores"

            def seen_pairs(scores: Any, normalized_scores: Any) -> Any:
                pairs = zip(scores[kind], normalized_scores, strict=True)
                rows.extend(
                    {"id": str(i), "predicted": float(predicted), "gold": float(gold), "texts": {}}
                    for i, (predicted, gold) in enumerate(pairs)
                )
                return score_pairs(scores, normalized_scores)

            task._calculate_scores = seen_pairs
        return rows


def _of_query(main_score: str) -> str:
    """Its name in the scores of one query: ndcg_at_10 -> ndcg_cut_10; "" where they have none."""
    name, _, depth = main_score.rpartition("_at_")
    return {"ndcg": f"ndcg_cut_{depth}", "map": f"map_cut_{depth}", "recall": f"recall_{depth}"}.get(name, "")
