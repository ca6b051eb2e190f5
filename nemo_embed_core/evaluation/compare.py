"""Results of several models on the same queries, compared so that a difference stands beside its error.

report = compare(["a.json", "reports"], allow=["prompts"])       # what --compare writes as JSON

    M models · T tasks · n queries of a task · B draws

Two questions have two answers. Over queries: would it be the same with other queries of these tasks? Over
tasks: would it be the same on other tasks like these? The second resamples whole tasks by their scores, which
have the error of their queries in them; to draw queries inside drawn tasks again would count it twice.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.borda import borda_points, ranks
from nemo_embed_core.evaluation.overlap import words
from nemo_embed_core.evaluation.rank_statistics import closeness, statistic_of
from nemo_embed_core.evaluation.results import Result, check, load, rows_of
from nemo_embed_core.evaluation.statistics import (
    LEVEL,
    Statistic,
    bootstrap,
    bootstrap_p,
    counts,
    holm,
    interval,
    mean_of,
    sign_flip,
)

# Of fewer tasks no signs of differences make a p below 0.05; of fewer than the second, intervals over tasks
# hold 0.92 in place of 0.95 (python -m benchmarks.intervals).
MIN_TASKS, MIN_TASKS_OF_INTERVAL = 6, 10
EXAMPLES = 5  # queries of a task with the largest gains, and with the largest losses
Log = Callable[[str], None]


def compare(paths: Sequence[str], say: Log = lambda _: None, **options: Any) -> dict[str, Any]:
    """Means, Borda ranks, differences with intervals and p, and what differs most, of reports or folders.

    options: allow, draws and seed of EvaluateConfig.
    """
    config = EvaluateConfig(compare=[str(path) for path in paths], **options)
    return compared(config, say)


def compared(config: EvaluateConfig, say: Log) -> dict[str, Any]:
    results = load(config.compare, say)
    notes = check(results, config.allow)
    models = list(dict.fromkeys(result.model for result in results))
    names = dict.fromkeys(result.task for result in results)
    tasks = [Task.of(name, models, results, config) for name in names]
    for task in tasks:
        if len(lost := [f"{model} {n}" for model, n in task.unpaired.items() if n]):
            notes.append(
                f"{task.name}: only the {task.units} queries that all have; without: {', '.join(lost)}"
            )
        shares = {model: result.entry.get("overlap") for model, result in task.results.items()}
        if any(shares.values()):
            said = "; ".join(f"{model} {words(found)}" for model, found in shares.items())
            notes.append(f"{task.name}: of its texts in the training data: {said}")
    if len(tasks) < MIN_TASKS_OF_INTERVAL:
        least = f"a p needs {MIN_TASKS}, an interval {MIN_TASKS_OF_INTERVAL}"
        few = f"{len(tasks)} tasks say little of other tasks ({least})"
        notes.append(f"{few}; rank intervals hold for these tasks more than for others")
    drawing = (config.draws, config.seed)
    pairs = [pair(tasks, a, b, *drawing) for a, b in itertools.combinations(range(len(models)), 2)]
    _correct(pairs)
    for entry in pairs:
        entry |= {side: models[entry[side]] for side in ("a", "b")}
    return {
        "models": models,
        "settings": {"draws": config.draws, "seed": config.seed, "level": LEVEL, "notes": notes},
        "tasks": {task.name: task.described() for task in tasks},
        "overall": overall(tasks, models, *drawing),
        "pairs": pairs,
        "leave_one_task_out": leave_one_out(tasks, models),
        "differ_most": [
            examples(task, models[0], other) for other in models[1:] for task in tasks
            if task.has_units and models[0] in task.models and other in task.models
        ],
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Task:
    """A task as all models have it.

    results: by model.  values_Mn: of the queries that all have, NaN of a model that did not run it; where the
    statistic is no mean, predictions of gold_n.
    unpaired: queries of each model that not all have, which --allow data may leave.
    """

    name: str
    all_models: list[str]
    results: dict[str, Result]
    ids: list[str]
    languages: list[str]
    values_Mn: np.ndarray
    gold_n: np.ndarray | None
    unpaired: dict[str, int]
    draws: int
    seed: int

    @classmethod
    def of(cls, name: str, models: list[str], results: Sequence[Result], config: EvaluateConfig) -> Task:
        own = {result.model: result for result in results if result.task == name}
        first = next(iter(own.values()))
        shared = set.intersection(*(set(result.ids) for result in own.values()))
        ids = [i for i in first.ids if i in shared]
        if len(ids) < (1 if first.statistic == "none" else 2):  # mteb's tasks of one subset have one
            raise UserError(f"{name}: {len(ids)} queries are in all results; intervals need at least two")
        values_Mn, gold_n = np.full((len(models), len(ids)), np.nan), None
        for model, result in own.items():
            place = {i: at for at, i in enumerate(result.ids)}
            values_Mn[models.index(model)] = result.values[[place[i] for i in ids]]
            if result.gold is not None:
                gold_n = result.gold[[place[i] for i in ids]]
        spoken = dict(zip(first.ids, first.languages, strict=True))
        unpaired = {model: len(result.ids) - len(ids) for model, result in own.items()}
        languages = [spoken[i] for i in ids]
        return cls(name, models, own, ids, languages, values_Mn, gold_n, unpaired, config.draws, config.seed)

    @property
    def models(self) -> list[str]:
        return [model for model in self.all_models if model in self.results]

    @property
    def units(self) -> int:
        return len(self.ids)

    @cached_property
    def kind(self) -> str:
        return next(iter(self.results.values())).statistic

    @property
    def has_units(self) -> bool:
        """Whether queries have scores: a task without has no intervals, and is the same in every draw."""
        return self.kind != "none"

    @cached_property
    def type(self) -> str:
        return next(iter(self.results.values())).facts["type"]

    @cached_property
    def scores_M(self) -> np.ndarray:
        """As reported, where all queries are compared."""
        own = self.scores_of(slice(None))
        for model, result in self.results.items():
            if not any(self.unpaired.values()):
                own[self.all_models.index(model)] = result.score
        return own

    def key(self, *more: str) -> list[int]:
        """A seed of its own, so that a task has the same draws whatever stands beside it."""
        return [self.seed, *(zlib.crc32(text.encode()) for text in (self.name, *more))]

    @cached_property
    def draws_BM(self) -> np.ndarray:
        if not self.has_units:
            return np.broadcast_to(self.scores_M, (self.draws, len(self.scores_M)))
        return bootstrap(self.statistic(slice(None)), self.units, self.draws, self.key())

    def statistic(self, part: Any) -> Statistic:
        """Of some of the queries."""
        return statistic_of(
            self.kind, self.values_Mn[:, part], None if self.gold_n is None else self.gold_n[part]
        )

    def scores_of(self, part: Any) -> np.ndarray:
        """[M]: of some of the queries."""
        return self.statistic(part)(np.ones((1, self.values_Mn[:, part].shape[1]), np.int64))[0]

    @cached_property
    def closeness_Mn(self) -> np.ndarray:
        """Of each query, greater for better."""
        return self.values_Mn if self.gold_n is None else closeness(self.values_Mn, self.gold_n)

    def difference(self, a: int, b: int) -> dict[str, Any]:
        """Of model b minus a: positive where b is better."""
        if not self.has_units:
            return {**_bounded(self.scores_M[b] - self.scores_M[a], np.nan, np.nan), "p": None}
        low, high = interval(self.draws_BM[:, b] - self.draws_BM[:, a], self.units)
        if self.gold_n is None:
            p = sign_flip(self.values_Mn[b] - self.values_Mn[a], self.draws, self.key("signs"))
        else:
            p = bootstrap_p(self.draws_BM[:, b] - self.draws_BM[:, a])
        return {**_bounded(self.scores_M[b] - self.scores_M[a], low, high), "p": p}

    def described(self) -> dict[str, Any]:
        result = next(iter(self.results.values()))
        spoken = sorted(set(self.languages) - {""})
        return {
            "type": self.type,
            "main_score": result.facts["main_score"],
            "split": result.facts["split"],
            "queries": self.units,
            "scores": self._scores(self.units, self.draws_BM, self.scores_M),
            "languages": {language: self._language(language) for language in spoken},
        }

    def _scores(self, units: int, draws_BM: np.ndarray, scores_M: np.ndarray) -> dict[str, Any]:
        low, high = interval(draws_BM, units) if self.has_units else [np.full(len(scores_M), np.nan)] * 2
        places = {model: self.all_models.index(model) for model in self.models}
        return {model: _bounded(scores_M[i], low[i], high[i]) for model, i in places.items()}

    def _language(self, language: str) -> dict[str, Any]:
        """Scores of its queries alone, and differences from the first model; one query has no interval."""
        part = [i for i, spoken in enumerate(self.languages) if spoken == language]
        units, scores_M = len(part), self.scores_of(part)
        if units == 1:
            alone = {m: {"score": _number(scores_M[self.all_models.index(m)])} for m in self.models}
            return {"queries": 1, "scores": alone, "differences": {}}
        draws_BM = bootstrap(self.statistic(part), units, self.draws, self.key(language))
        first, *others = (self.all_models.index(model) for model in self.models)
        differences = {}
        for other in others:
            low, high = interval(draws_BM[:, other] - draws_BM[:, first], units)
            differences[self.all_models[other]] = _bounded(scores_M[other] - scores_M[first], low, high)
        scores = self._scores(units, draws_BM, scores_M)
        return {"queries": units, "scores": scores, "differences": differences}


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _bounded(score: Any, low: Any, high: Any) -> dict[str, Any]:
    return {"score": _number(score), "low": _number(low), "high": _number(high)}


# ------------------------------------------------------------------------------------------ over tasks


def type_means(types: Sequence[str], scores_TM: np.ndarray) -> dict[str, np.ndarray]:
    """{type: [M]}: means over its tasks; NaN for a model that did not run one, as on mteb's leaderboard."""
    return {
        kind: np.mean([row for row, own in zip(scores_TM, types, strict=True) if own == kind], axis=0)
        for kind in dict.fromkeys(types)
    }


def overall(tasks: Sequence[Task], models: Sequence[str], draws: int, seed: int) -> dict[str, Any]:
    """{model: mean over tasks and over task types, null where a task is missing; Borda points and rank}.

    Intervals of means are over queries, those of ranks over tasks and the queries in them.
    """
    types = [task.type for task in tasks]
    scores_TM = np.array([task.scores_M for task in tasks])
    draws_BTM = np.stack([task.draws_BM for task in tasks], axis=1)
    by_type = type_means(types, scores_TM)
    type_draws = type_means(types, draws_BTM.transpose(1, 0, 2))
    smallest = min((task.units for task in tasks if task.has_units), default=0)
    means = {
        "mean": (scores_TM.mean(0), draws_BTM.mean(1)),
        "mean_of_types": (
            np.mean(list(by_type.values()), axis=0),
            np.mean(list(type_draws.values()), axis=0),
        ),
    }
    points_M = borda_points(scores_TM).sum(0)
    rank_M = ranks(points_M)
    drawn_BT = np.concatenate(list(counts(len(tasks), draws, [seed])))
    points_BM = np.einsum(
        "bt,btm->bm", drawn_BT, np.stack([borda_points(task.draws_BM) for task in tasks], 1)
    )
    tail = (1 - LEVEL) / 2
    lowest, highest = np.quantile(ranks(points_BM), [tail, 1 - tail], axis=0, method="inverted_cdf")
    found = {}
    for i, model in enumerate(models):
        entry: dict[str, Any] = {}
        for name, (score_M, score_draws) in means.items():
            low, high = interval(score_draws[:, i], smallest) if smallest else (np.nan, np.nan)
            entry[name] = _bounded(score_M[i], low, high)
        entry["types"] = {kind: _number(mean_M[i]) for kind, mean_M in by_type.items()}
        span = {"low": int(lowest[i]), "high": int(highest[i])}
        entry["borda"] = {"points": float(points_M[i]), "rank": int(rank_M[i]), **span}
        found[model] = entry
    return found


def pair(tasks: Sequence[Task], a: int, b: int, draws: int, seed: int) -> dict[str, Any]:
    """Model b minus model a on the tasks that both have: each task, and the mean over them.

    over_queries: these tasks, other queries.  over_tasks: other tasks, null where there are too few.
    """
    both = [task for task in tasks if not np.isnan(task.scores_M[[a, b]]).any()]
    entry: dict[str, Any] = {"a": a, "b": b, "tasks": {task.name: task.difference(a, b) for task in both}}
    if not both:
        return {**entry, "difference": None, "over_queries": None, "over_tasks": None}
    differences_T = np.array([task.scores_M[b] - task.scores_M[a] for task in both])
    draws_B = np.mean([task.draws_BM[:, b] - task.draws_BM[:, a] for task in both], axis=0)
    smallest = min((task.units for task in both if task.has_units), default=0)
    low, high = interval(draws_B, smallest) if smallest else (np.nan, np.nan)
    if all(task.kind == "mean" for task in both):
        # The mean over tasks is a sum over queries, each with its share.
        shares = np.concatenate([(task.values_Mn[b] - task.values_Mn[a]) / task.units for task in both])
        p = sign_flip(shares, draws, [seed, 1])
    else:
        p = bootstrap_p(draws_B)
    over_queries = {"low": float(low), "high": float(high), "p": p} if smallest else None
    over_tasks = None
    if len(both) >= MIN_TASKS:
        over_tasks = {"low": None, "high": None, "p": sign_flip(differences_T, draws, [seed, 2])}
    if over_tasks and len(both) >= MIN_TASKS_OF_INTERVAL:
        means = bootstrap(mean_of(differences_T[None]), len(both), draws, [seed])[:, 0]
        low, high = interval(means, len(both))
        over_tasks |= {"low": float(low), "high": float(high)}
    difference = float(differences_T.mean())
    return {**entry, "difference": difference, "over_queries": over_queries, "over_tasks": over_tasks}


def _correct(pairs: Sequence[dict[str, Any]]) -> None:
    """p_holm beside p, in three families: all pairs on all tasks; means over queries; means over tasks."""
    families = [
        [found for entry in pairs for found in entry["tasks"].values()],
        *([entry[over] for entry in pairs if entry[over]] for over in ("over_queries", "over_tasks")),
    ]
    for family in families:
        family = [found for found in family if found["p"] is not None or found.setdefault("p_holm")]
        for found, p in zip(family, holm([found["p"] for found in family]), strict=True):
            found["p_holm"] = p


def leave_one_out(tasks: Sequence[Task], models: Sequence[str]) -> dict[str, Any]:
    """{task that is left out: mean and Borda rank of each model on the others, and who then changes rank}."""
    scores_TM = np.array([task.scores_M for task in tasks])
    points_TM = borda_points(scores_TM)
    rank_M = ranks(points_TM.sum(0))
    found = {}
    for t, task in enumerate(tasks if len(tasks) > 1 else ()):
        left = ranks(points_TM.sum(0) - points_TM[t])
        means = np.delete(scores_TM, t, axis=0).mean(0)
        found[task.name] = {
            "ranks": {model: int(rank) for model, rank in zip(models, left, strict=True)},
            "means": {model: _number(mean) for model, mean in zip(models, means, strict=True)},
            "changed": [model for model, old, new in zip(models, rank_M, left, strict=True) if old != new],
        }
    return found


# ------------------------------------------------------------------------------------------ to read


def examples(task: Task, a: str, b: str) -> dict[str, Any]:
    """The queries where b loses and gains most against a, with what both found and what is relevant."""
    values = {model: task.closeness_Mn[task.all_models.index(model)] for model in (a, b)}
    gained_n = values[b] - values[a]
    losses = [i for i in np.argsort(gained_n, kind="stable")[:EXAMPLES] if gained_n[i] < 0]
    gains = [i for i in np.argsort(-gained_n, kind="stable")[:EXAMPLES] if gained_n[i] > 0]
    wanted = {task.ids[i] for i in (*losses, *gains)}
    rows = {model: rows_of(task.results[model], wanted) for model in (a, b)}

    def shown(i: int) -> dict[str, Any]:
        first, second = (rows[model][task.ids[i]] for model in (a, b))
        sides: Mapping[str, Any] = {
            model: {"score": float(values[model][i]), "found": rows[model][task.ids[i]].get("found", [])[:3]}
            for model in (a, b)
        }
        kept = {name: first.get(name) for name in ("id", "language", "text", "other", "gold", "judged")}
        return {**kept, "models": sides, "texts": {**first["texts"], **second["texts"]}}

    return {
        **{"task": task.name, "a": a, "b": b},
        "better": int((gained_n > 0).sum()),
        "worse": int((gained_n < 0).sum()),
        "losses": [shown(i) for i in losses],
        "gains": [shown(i) for i in gains],
    }
