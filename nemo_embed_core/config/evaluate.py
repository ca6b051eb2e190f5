"""Options of launch/evaluate.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

# What must be the same of all models of a task that are compared, but where it is allowed to differ.
SETTINGS = ("data", "split", "lengths", "prompts")
WITH_BM25 = ("retrieval", "reranking")  # of task_type: where documents are ranked for a query


# Of TaskOptions, and of dev sets, what a table of texts has nothing of.
OF_RETRIEVAL = ("source", "min_grade", "on_missing", "ignore_identical_ids", "max_queries")


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """Data of one task and how its texts are encoded."""

    data: str = ""
    """BEIR folder: corpus.jsonl, queries.jsonl, qrels/{split}.tsv (.gz allowed); or a dataset folder, whose
    instructions are then the prompts where no option says others."""
    task_type: Literal[
        "retrieval", "reranking", "sts", "pair_classification", "classification", "clustering", "bitext"
    ] = "retrieval"
    """What is asked of the data, of others than retrieval a table of texts (docs/evaluation.md); the model's
    query prompt stands before all texts but documents."""
    name: str = ""
    """Name of the task in comparisons; "": that of the data's folder or file."""
    split: str = "test"
    """Split of the folder: qrels/{split}.tsv; of retrieval several with commas, "dev,test", each a report."""
    pool: list[str] = field(default_factory=list)
    """Of retrieval, documents that are searched, each a report: lang=en, those of one language; lang=each, of
    every language in turn; lang=all, all. Judgements of others do not count; []: all."""
    source: str = ""
    """Of a dataset folder with ids only: the folder or file that its source_config.json names."""
    min_grade: float | None = None
    """Of a dataset folder of graded pairs: grade from which a document is relevant to its query; null: they
    are refused."""
    on_missing: Literal["error", "allow"] = "error"
    """A judgement of a text that does not exist, an empty text: "error" refuses it, "allow" counts it and
    keeps what mteb keeps."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [pool for pool in self.pool if not re.fullmatch(r"lang=\S+", pool)]:
            raise UserError(f"{self._prefix}pool={wrong[0]} must be lang=LANGUAGE, lang=each or lang=all")
        if (self.pool or len(self.splits) > 1) and self.task_type != "retrieval":
            raise UserError(f"{self._prefix}pool and several splits are of task_type retrieval")
        if self.task_type != "retrieval" and (given := self.given(OF_RETRIEVAL)):
            raise UserError(
                f"{self._prefix}{given[0]} is of task_type retrieval, not of {self.task_type}: remove it"
            )
        for name in ("query_max_length", "document_max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{self._prefix}{name}={value} must be at least 1 token")
        if self.max_queries < 0:
            raise UserError(f"{self._prefix}max_queries={self.max_queries} must not be negative; 0 takes all")

    @property
    def splits(self) -> list[str]:
        return [split.strip() for split in self.split.split(",")]


@dataclass(frozen=True, kw_only=True)
class LocalTask(TaskOptions, section="local"):
    """One of several tasks on data of one's own; what it does not say of prompts and lengths is the run's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"local.name={self.name!r} must be of letters, digits, dots, - and _")
        if not self.data:
            raise UserError(f"local: {self.name}: data is missing: give its file or folder")


# What --compare reads; all others are of an evaluation.
OF_COMPARE = ("compare", "allow", "draws", "plot", "output", "seed")
# Of TaskOptions what every task of a run may have from the run.
ENCODING = ("prompt_name", "task", "document_task", "query_max_length", "document_max_length")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TaskOptions):
    """Quality of models on held-out data, retrieval and other tasks, mteb's own or local ones, by mteb's own
    evaluators, offline; or a comparison of the reports."""

    models: list[str] = field(default_factory=list)
    """Checkpoints, runs, Hugging Face or sentence-transformers folders, or "bm25": --models A B bm25. A@256:
    A with vectors cut to their first 256 columns, normalised again."""
    tasks: list[str] = field(default_factory=list)
    """Several tasks in one run: mteb's by name (STS12), its benchmarks ("MTEB(eng, v2)", NanoBEIR) and names
    of `local`; []: all of `local`, or `data` alone."""
    local: list[LocalTask] = field(default_factory=list)
    """Tasks on data of one's own, beside or in place of `data`; --local.help lists the keys of each."""
    instructions: Literal["auto", "paper", "own"] = "auto"
    """Prompts of mteb's tasks: "paper", the instruction of each task as the published model has it; "own",
    what mteb takes of the model's own prompts; "auto": of models whose queries have "Instruct: ..." the
    paper's. Local tasks: "paper" for sts, pair_classification and bitext; else the model's own."""
    mirror: str = ""
    """Folder with copies of data sets under their names on the hub (mteb/sts12-sts/...), read before the
    cache of the hub; nothing is ever downloaded."""
    output: str = ""
    """JSON report to write, with a file of the scores of each query beside it; of `tasks` and `local` a
    folder, with a report for each; of --compare the comparison, with its tables as Markdown beside it; "":
    only printed tables."""
    results: str = ""
    """Folder for the scores in mteb's own layout too: results/{model}/{revision}/{task}.json, which
    mteb.ResultCache(folder) reads; "": none."""
    seed: int = 0
    """Seed of the sample of queries, and of what base, other_task and --compare draw."""
    training: list[str] = field(default_factory=list)
    """Training data that texts of local tasks are looked for in (exact, near-duplicates, cut): datasets
    (a file or folder, split train, or FOLDER:SPLIT), stores, runs, whose manifest names their data; "own":
    that of each model's own run. []: not looked for."""
    strict: float | None = None
    """Share of the queries of a task that may be in it; above that the evaluation ends before a text is
    encoded, and names the first of them. null: it is only reported."""
    base: str = ""
    """Model that the others are compared with, language by language: a warning where one is worse and its
    interval says so. It is evaluated first, and need not stand in models; "": none."""
    other_task: str = ""
    """Instruction of another type of task: the queries are evaluated under it too, and a warning says where
    the score is higher, its interval above 0, or the same in every query (each model is run twice); "": not
    looked at."""
    compare: list[str] = field(default_factory=list)
    """Reports, or folders of reports, to compare; nothing is evaluated: --compare a.json b.json."""
    allow: list[str] = field(default_factory=list)
    """Of --compare, what may differ between models of one task: any of data, split, lengths, prompts."""
    draws: int = 10_000
    """Draws of a bootstrap, by which base, other_task and --compare have their intervals, and random signs of
    a test of --compare."""
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
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.tasks or self.local:
            if given := self.given(f.name for f in fields(TaskOptions) if f.name not in ENCODING):
                raise UserError(
                    f"{given[0]} is of one task: with tasks or local give it in its entry of local"
                )
            names = [entry.name for entry in self.local]
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"local: two have the name {twice[0]!r}; give each its own")
        if self.is_many and self.output.endswith(".json"):
            raise UserError(f"output={self.output}: each task, split and pool has a report: give a folder")
        if self.strict is not None and not (self.training and 0 <= self.strict <= 1):
            raise UserError(f"strict={self.strict} is a share from 0 to 1 of what --training has: give that")
        if self.compare and (given := self.given(f.name for f in fields(self) if f.name not in OF_COMPARE)):
            raise UserError(
                f"compare reads reports, and {given[0]} is of an evaluation: evaluate models on data first, "
                "then compare without it"
            )
        if unknown := set(self.allow) - set(SETTINGS):
            raise UserError(f"allow={sorted(unknown)[0]} must be one of {', '.join(SETTINGS)}")
        if (self.allow or self.plot) and not self.compare:
            raise UserError("allow and plot belong to --compare")
        if self.draws < 1000:
            raise UserError(
                f"draws={self.draws} must be at least 1,000: fewer leave the intervals' ends to chance"
            )

    @property
    def is_many(self) -> bool:
        """Whether there is a report of each of several tasks, splits or pools, and not one alone."""
        return bool(self.tasks or self.local or self.pool or len(self.splits) > 1)

    def of_local(self, entry: LocalTask) -> LocalTask:
        """With the run's prompts and lengths where it has none of its own."""
        unsaid = {"prompt_name": ""}  # of the others null, as "" is no instruction
        run = {n: getattr(self, n) for n in ENCODING if getattr(entry, n) == unsaid.get(n)}
        return replace(entry, **run)
