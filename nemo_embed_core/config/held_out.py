"""Options of the section eval of launch/train.py: what a run is measured by while it trains."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nemo_embed_core.config.data import dataset_names
from nemo_embed_core.config.evaluate import OF_RETRIEVAL
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

# Of each kind of dev set, the figure that is its main one.
MAIN = {"retrieval": "ndcg_at_10", "sts": "spearman"}


@dataclass(frozen=True, kw_only=True)
class EvalDatasetConfig(Options, section="eval.datasets"):
    """Held-out data of one task, read as launch/evaluate.py reads it."""

    path: str
    """A BEIR or dataset folder; of sts a file or folder of rows sentence1, sentence2, score."""
    task_type: Literal["retrieval", "sts"] = "retrieval"
    """retrieval: nDCG@10 over the whole corpus, and the loss; sts: Spearman's correlation."""
    name: str = ""
    """Its name in metrics; "": that of its file or folder."""
    split: str = "dev"
    """Split of a folder, as qrels/{split}.tsv. A run that is chosen by its test split has no test."""
    prompt_name: str = ""
    """Dataset of data.datasets whose prompts its texts get; "": its own instructions, else those of the
    largest dataset, as everything that uses the checkpoint does."""
    task: str | None = None
    """Instruction of the queries, of sts of all texts; "": none; null: prompt_name says it."""
    document_task: str | None = None
    """Instruction of the documents, likewise."""
    source: str = ""
    """Of a dataset folder with ids only: the folder or file that its source_config.json names."""
    min_grade: float | None = None
    """Of a dataset folder of graded pairs: grade from which a document is relevant to its query."""
    on_missing: Literal["error", "allow"] = "error"
    """A judgement of a text that does not exist, an empty text: "error" refuses it, "allow" keeps what mteb
    keeps."""
    ignore_identical_ids: bool = False
    """Whether a document with the query's own id counts as not found: mteb sets it for ArguAna, Quora, FiQA
    and others."""
    max_queries: int = 0
    """Queries to sample; 0: all."""
    max_documents: int = 0
    """Documents to sample beside those that the queries judge, up to this number of both; 0: the whole
    corpus. The figure is then that of the sample, and higher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"eval.datasets: {self.path}"
        if not re.fullmatch(r"[\w.-]*", self.name):
            raise UserError(f"{where}: name={self.name!r} must be of letters, digits, dots, - and _")
        for name in ("max_queries", "max_documents"):
            if getattr(self, name) < 0:
                raise UserError(f"{where}: {name}={getattr(self, name)} must not be negative; 0 takes all")
        of_retrieval = ("document_task", "max_documents", *OF_RETRIEVAL)
        if self.task_type == "sts" and (given := self.given(of_retrieval)):
            raise UserError(f"{where}: {given[0]} is of task_type retrieval, not of sts: remove it")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Options, section="eval"):
    """Held-out data by which the weights are scored while they train, and the best checkpoint kept."""

    datasets: list[EvalDatasetConfig] = field(default_factory=list)
    """Dev sets; --eval.datasets.help lists the keys of each; none: no evaluation."""
    every: int = 500
    """Steps between evaluations; a run is also evaluated before its first step and after its last."""
    max_share: float = 0.1
    """Largest share of the time between the first step and the last that evaluations may take: one that would
    exceed it is left out, and said; 1: none is, whatever it costs."""
    metric: str = "mean"
    """Figure by which the best checkpoint is kept: "mean" (of the main figures of all dev sets), or one of a
    dev set: NAME/ndcg_at_10, NAME/spearman, or NAME/loss, of which the least is the best."""
    seed: int = 0
    """Seed of samples of queries and documents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UserError(f"eval.every={self.every} must be at least 1 step")
        if not 0 < self.max_share <= 1:
            raise UserError(f"eval.max_share={self.max_share:g} must be above 0 and at most 1")
        given = [dataset.name for dataset in self.datasets if dataset.name]
        if twice := [name for name in given if given.count(name) > 1]:
            raise UserError(f"eval.datasets: two have the name {twice[0]!r}; give each its own")
        names = self.names()
        figures = [f"{n}/{MAIN[d.task_type]}" for n, d in zip(names, self.datasets, strict=True)]
        figures += [f"{n}/loss" for n, d in zip(names, self.datasets, strict=True)
                    if d.task_type == "retrieval"]  # fmt: skip
        if self.datasets and self.metric not in ("mean", *figures):
            raise UserError(f"eval.metric={self.metric!r} is none of mean, {', '.join(figures)}")

    def names(self) -> list[str]:
        return dataset_names(
            (str(Path(dataset.path)) for dataset in self.datasets), (d.name for d in self.datasets)
        )
