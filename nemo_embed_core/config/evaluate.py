"""Options of launch/evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

# What must be the same of all models of a task that are compared, but where it is allowed to differ.
SETTINGS = ("data", "split", "lengths", "prompts")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Options):
    """Quality of models on held-out data, retrieval or another task, by mteb's own evaluators, offline; or a
    comparison of the reports."""

    data: str = ""
    """BEIR folder: corpus.jsonl, queries.jsonl, qrels/{split}.tsv (.gz allowed); or a dataset folder, whose
    instructions are then the prompts where no option says others."""
    models: list[str] = field(default_factory=list)
    """Checkpoints, runs, Hugging Face or sentence-transformers folders, or "bm25": --models A B bm25. A@256:
    A with vectors cut to their first 256 columns, normalised again."""
    task_type: Literal[
        "retrieval", "reranking", "sts", "pair_classification", "classification", "clustering", "bitext"
    ] = "retrieval"
    """What is asked of the data, of others than retrieval a table of texts (docs/evaluation.md); the model's
    query prompt stands before all texts but documents."""
    name: str = ""
    """Name of the task in comparisons; "": that of the data's folder."""
    split: str = "test"
    """Split of the folder: qrels/{split}.tsv."""
    source: str = ""
    """Of a dataset folder with ids only: the folder or file that its source_config.json names."""
    min_grade: float | None = None
    """Of a dataset folder of graded pairs: grade from which a document is relevant to its query; null: they
    are refused."""
    on_missing: Literal["error", "allow"] = "error"
    """A judgement of a text that does not exist, an empty text: "error" refuses it, "allow" counts it and
    keeps what mteb keeps."""
    output: str = ""
    """JSON report to write, with a file of the scores of each query beside it; of --compare the comparison,
    with its tables as Markdown beside it; "": only printed tables."""
    prompt_name: str = ""
    """Prompt of a model with prompts for several tasks; "": its default."""
    task: str | None = None
    """Instruction of the queries: "Instruct: {task}\\nQuery: {text}"; "": none; null: the model's own
    prompt."""
    document_task: str | None = None
    """Instruction of the documents; "": none; null: the model's own prompt."""
    query_max_length: int | None = None
    """Tokens of a query; null: the model's own."""
    document_max_length: int | None = None
    """Tokens of a document; null: the model's own."""
    ignore_identical_ids: bool = False
    """Whether a document with the query's own id counts as not found: mteb sets it for ArguAna, Quora, FiQA
    and others."""
    max_queries: int = 0
    """Queries of the split to sample; 0: all."""
    seed: int = 0
    """Seed of that sample, and of what --compare draws."""
    compare: list[str] = field(default_factory=list)
    """Reports, or folders of reports, to compare; nothing is evaluated: --compare a.json b.json."""
    allow: list[str] = field(default_factory=list)
    """Of --compare, what may differ between models of one task: any of data, split, lengths, prompts."""
    draws: int = 10_000
    """Of --compare, draws of a bootstrap, and random signs of a test."""
    plot: str = ""
    """Of --compare, PNG to write: intervals and, where queries have languages, a heat map (matplotlib)."""
    max_tokens: int = 16384
    """Packed tokens of one encoder batch."""
    precision: Literal["auto", "bf16", "fp8", "fp32"] = "auto"
    """Precision of the encoder; auto: bf16 on a GPU, fp32 on a CPU; fp8: bf16 with the products of the blocks
    in fp8 (our own encoder; GPUs from Ada and Hopper on, emulated on a CPU)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the encoder; auto: a GPU when torch sees one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("query_max_length", "document_max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1 token")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.max_queries < 0:
            raise UserError(f"max_queries={self.max_queries} must not be negative; 0 takes all")
        if self.compare and (self.data or self.models):
            raise UserError("compare reads reports: evaluate models on data first, then compare without them")
        if unknown := set(self.allow) - set(SETTINGS):
            raise UserError(f"allow={sorted(unknown)[0]} must be one of {', '.join(SETTINGS)}")
        if (self.allow or self.plot) and not self.compare:
            raise UserError("allow and plot belong to --compare")
        if self.draws < 1000:
            raise UserError(
                f"draws={self.draws} must be at least 1,000: fewer leave the intervals' ends to chance"
            )
