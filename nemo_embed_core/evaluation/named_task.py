"""The figures of one of mteb's own tasks, as its leaderboard has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from nemo_embed_core.checkpoint.source import Usage
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.encoding import Encoding
from nemo_embed_core.evaluation.hub_data import fresh, load, mirrored, parts_of
from nemo_embed_core.evaluation.mteb_tasks import Bm25Search, Vectors
from nemo_embed_core.evaluation.retrieval import mteb_imported


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
