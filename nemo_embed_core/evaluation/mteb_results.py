"""Scores in mteb's own layout, for its leaderboard and its tools:

    {folder}/results/{model}/{revision}/{task}.json        scores by split and subset
    {folder}/results/{model}/{revision}/model_meta.json    name, revision, similarity, dimension

    mteb.ResultCache(folder).load_results()

The revision is made of the weights' digest, the precision and the run's options of encoding: results that
differ in one of them never take each other's place. What a task's entry of `local`, or another file of the
model's folder, says of prompts and lengths is not in it: such results do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.config.evaluate import ENCODING
from nemo_embed_core.evaluation.bm25 import REVISION
from nemo_embed_core.evaluation.retrieval import model_meta, mteb_imported, task_metadata

BM25 = "local/bm25"


def name_of(model: str) -> str:
    """The last two folders of its path, as organisation/name."""
    if model == "bm25":
        return BM25
    path = Path(model).resolve()
    return f"{path.parent.name or 'local'}/{path.name}"


def revision_of(entry: Mapping[str, Any], config: EvaluateConfig) -> str:
    """{12 digits of the weights' digest}-{precision}[-{8 of the sha256 of the run's options of encoding}]."""
    if "digest" not in entry:
        return REVISION
    default = EvaluateConfig()
    names = (*ENCODING, "instructions")
    set_by = {n: getattr(config, n) for n in names if getattr(config, n) != getattr(default, n)}
    parts = [entry["digest"][:12], entry["precision"]]
    if set_by:
        parts.append(hashlib.sha256(json.dumps(set_by, sort_keys=True).encode()).hexdigest()[:8])
    return "-".join(parts)


def write(entry: Mapping[str, Any], found: Any, model: str, config: EvaluateConfig) -> None:
    """entry: of the report, of one model on one task.  found: mteb's result, None of a local task."""
    facts = entry["data"]
    with mteb_imported():
        from mteb import ResultCache

        kind = "sparse" if "digest" not in entry else "dense"
        meta = model_meta(revision_of(entry, config), kind).model_copy(
            update={
                "name": name_of(model),
                "similarity_fn_name": entry.get("similarity"),
                "max_tokens": entry.get("document_max_length"),
            }
        )
        result = _local_result(entry, facts) if found is None else found
        cache = ResultCache(config.results)
        cache.save_to_cache(result, meta, encode_kwargs={"prompts": entry.get("prompts", {})})


def _local_result(entry: Mapping[str, Any], facts: Mapping[str, Any]) -> Any:
    """mteb's form of a local task's figures; its data's revision is the digest of the data."""
    from types import SimpleNamespace

    from mteb.results import TaskResult

    figures = {name: value for name, value in entry.items() if isinstance(value, float)}
    figures.pop("seconds", None)
    metadata = task_metadata(facts["type"], facts["main_score"]).model_copy(
        update={
            "name": facts["name"],
            "dataset": {"path": facts["path"], "revision": facts["digest"]},
            "eval_splits": [facts["split"]],
        }
    )
    scores = {facts["split"]: {"default": {**figures, "main_score": entry[facts["main_score"]]}}}
    task: Any = SimpleNamespace(metadata=metadata)
    return TaskResult.from_task_results(task, scores, evaluation_time=entry["seconds"])
