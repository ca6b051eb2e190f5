"""Training data: files, instructions, lengths, micro-batches; and the launcher that only prepares them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options


class Lengths(NamedTuple):
    """Tokens at which texts are cut, special tokens and instruction included."""

    query: int
    document: int


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Options):
    """How the rows of a dataset are read, for training and for mining."""

    format: str = ""
    """Format of its rows (docs/data-formats.md); "": told by the fields of the first row, and logged."""
    ignore: list[str] = field(default_factory=list)
    """Fields of its rows that are not read; any other field that the format does not know is an error."""
    columns: list[str] = field(default_factory=list)
    """All columns that are read, in the order in which a format counts them: query first, as [de, en] of a
    bitext table; []: as they stand."""
    min_grade: float | None = None
    """Graded pairs (an STS table): grade, on the table's own scale, from which a pair belongs together; the
    others are left out, counted. null: they are refused, as the contrastive loss has no use for a grade."""
    source: str = ""
    """Where the texts of documents are: of rows of ids (tevatron-ids) the file or folder of their corpus; of
    a dataset folder with ids only the one that its source_config.json names."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(RowsConfig, section="data.datasets"):
    """One dataset and the instructions of its texts."""

    path: str
    """A file of rows (JSON lines, JSON, CSV, TSV, Parquet, Arrow; text also .gz or .zst), a folder or glob of
    them, or a BEIR folder."""
    task: str = ""
    """Instruction of the queries: "Instruct: {task}\\nQuery: {text}"; one that ends in {text} is the whole
    prompt ("query: {text}"); "": a dataset folder's own, else the query as it is ("{text}": always)."""
    document_task: str = ""
    """Instruction of the documents, for symmetric tasks only (STS, bitext); "": a dataset folder's own, else
    none."""
    split: str = "train"
    """Split of a BEIR folder, qrels/{split}.tsv, and of a folder with files of several splits."""
    on_missing: Literal["error", "allow"] = "error"
    """In a BEIR folder, a judgement of a text that does not exist, an empty text, a query without a relevant
    document: "error" refuses it, "allow" leaves it out of training and mining, counted; evaluation keeps what
    mteb keeps."""
    task_type: Literal["", "retrieval", "classification", "clustering", "sts", "bitext", "nli"] = ""
    """Kind of its rows; "": a dataset folder's own, else retrieval. sts, bitext: of files of rows the task
    stands before documents too, where document_task says nothing else. classification, clustering: beside
    other datasets loss.in_batch needs data.batches=one_source, as a class of another dataset may be right."""
    grades: bool = False
    """Whether its rows are graded pairs (an STS table) that keep their grade, for loss.cosent_weight: a batch
    is of such rows or of others (data.batches one_source beside other datasets)."""
    teacher_vectors: str = ""
    """Folder with a teacher's vectors of its queries and documents, for loss.teacher_vectors_weight: what
    mining keeps beside its output, <output>.work; "": none."""
    name: str = ""
    """Its name in reports, metrics and prompts; "": that of its file or folder."""
    cap: int | None = None
    """Rows that are drawn at most: a sample that depends on the seed of the run; null: all."""
    weight: float = 1.0
    """How often each row is drawn in an epoch. Of n rows an epoch draws n x weight, rounded half up, and goes
    on where the one before stopped: at 2.5 each row comes twice or three times, at 0.1 every ten epochs
    once."""
    query_max_length: int | None = None
    """Tokens of its queries, special tokens and instruction included; null: data.query_max_length."""
    document_max_length: int | None = None
    """Tokens of its documents, likewise; null: data.document_max_length. A text that two datasets cut at
    different lengths is two documents, each encoded as its own rows have it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"data.datasets: {self.path}"
        for name in ("query_max_length", "document_max_length"):
            if (length := getattr(self, name)) is not None and length < 2:
                raise UserError(f"{where}: {name}={length} must be at least 2 tokens; null: as data.{name}")
        if not re.fullmatch(r"[\w.-]*", self.name):
            raise UserError(f"{where}: name={self.name!r} must be of letters, digits, dots, - and _")
        if self.grades and self.min_grade is not None:
            raise UserError(f"{where}: grades keeps all pairs, min_grade={self.min_grade:g} some: set one")
        if self.cap is not None and self.cap < 1:
            raise UserError(f"{where}: cap={self.cap} must be at least 1 row; leave the dataset out for none")
        if not self.weight > 0:
            raise UserError(f"{where}: weight={self.weight:g} must be positive; leave the dataset out for 0")


def dataset_names(paths: Iterable[str], given: Iterable[str] = ()) -> list[str]:
    """A name for each dataset's file or folder, with a number where two have the same; given: the names that
    they have already, or ""."""
    paths = list(paths)
    names = list(given) or [""] * len(paths)
    for i, path in enumerate(paths):
        if names[i]:
            continue
        own = Path(path).name
        own = Path(path).resolve().name if own in ("", "..") else own  # of "." and ".."
        stem = re.sub(r"(\.(jsonl?|csv|tsv|parquet|arrow))?(\.(gz|zst))?$", "", own)
        stem = re.sub(r"[^\w.-]+", "_", stem)  # of a glob
        count = 1
        while (name := stem if count == 1 else f"{stem}-{count}") in names:
            count += 1
        names[i] = name
    return names


def names_of(datasets: Sequence[DatasetConfig]) -> list[str]:
    return dataset_names((d.path for d in datasets), (d.name for d in datasets))


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options, section="data"):
    """Texts, their lengths, and how they are packed."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    """Datasets to draw from; --data.datasets.help lists the keys of each."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights by the datasets' names, in place of their own: runs over one list of datasets, and one store,
    that differ in their mix (--data.weights.paq 0.5)."""
    cache_dir: str = "data-cache"
    """Folder of the tokenised stores, one for each digest of data, tokenizer and lengths."""
    query_max_length: int = 512
    """Tokens of a query, special tokens and instruction included; a dataset may have its own."""
    document_max_length: int = 512
    """Tokens of a document, special tokens and instruction included; a dataset may have its own."""
    num_hard_negatives: int = 4
    """Hard negatives per query; masked when a row has fewer."""
    negatives: Literal["sample", "first", "rotate"] = "sample"
    """Which of a row's negatives, where it has more: "sample", drawn anew each time that the row is drawn;
    "first", always those that come first (mining writes the best first); "rotate", the next ones each time,
    so that all have their turn."""
    batches: Literal["mixed", "one_source"] = "mixed"
    """Rows of a global batch: "mixed", of all datasets in one order; "one_source", of one dataset, so that
    in-batch negatives (loss.in_batch) come from it alone. A dataset has draws / global_batch_size batches an
    epoch, rounded up over the epochs so far, in random order."""
    max_tokens: int = 8192
    """Packed tokens of one micro-batch."""
    on_long_row: Literal["error", "drop", "truncate"] = "error"
    """Rows whose query, longest positive and longest num_hard_negatives negatives have more than max_tokens
    tokens: "error" names them before the first step, "drop" leaves them out, "truncate" shortens their
    longest documents. Counted either way."""
    on_bad: Literal["error", "drop"] = "error"
    """Rows that cannot be read as their format says: "error" names the first 20 before anything is done,
    "drop" leaves them out, counted and listed (dropped.txt of the store). Damaged files and corpora stay an
    error."""
    store: str = ""
    """A store that is there: its digest, or the beginning, in cache_dir, or its folder; `datasets` are then
    not read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("query_max_length", "document_max_length", "max_tokens"):
            if getattr(self, name) < 2:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least 2 tokens")
        names = [dataset.name for dataset in self.datasets if dataset.name]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"data.datasets: two have the name {twice[0]!r}; give each its own")
        if self.num_hard_negatives < 0:
            raise UserError(f"data.num_hard_negatives={self.num_hard_negatives} must not be negative")
        if self.weights and self.datasets:  # a store alone brings them later
            names = names_of(self.datasets)
            if unknown := sorted(self.weights.keys() - set(names)):
                raise UserError(
                    f"data.weights has {', '.join(unknown)}, which no dataset is called; there are: "
                    f"{', '.join(names)}"
                )
            own = zip(names, self.datasets, strict=True)
            mixed = [replace(d, weight=self.weights.get(name, d.weight)) for name, d in own]
            object.__setattr__(self, "datasets", mixed)

    def lengths(self, dataset: DatasetConfig) -> Lengths:
        """At which the texts of one of the datasets are cut: its own, else those of all."""
        query, document = dataset.query_max_length, dataset.document_max_length
        return Lengths(
            self.query_max_length if query is None else query,
            self.document_max_length if document is None else document,
        )

    def all_lengths(self) -> list[Lengths]:
        """Of each dataset; without any those of all."""
        every = Lengths(self.query_max_length, self.document_max_length)
        return [self.lengths(dataset) for dataset in self.datasets] or [every]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Options):
    """Tokenise datasets once into a memory-mapped store (training does it itself when there is none), or
    write them as dataset folders."""

    tokenizer: str = ""
    """Folder with tokenizer.json; "": nothing is tokenised, `dataset` is written."""
    dataset: str = ""
    """Dataset folder to write the data to, documents once and rows of ids; of several datasets a folder with
    one for each. With a tokenizer the store is then made of it."""
    inspect: bool = False
    """Print what is in the data: counts, lengths, copies, packing, samples (docs/preparing.md has all)."""
    output: str = ""
    """Report of --inspect as a JSON file, and beside it as a page, .html; "": only the printed tables."""
    against: list[str] = field(default_factory=list)
    """Evaluation sets whose texts --inspect looks for in the data: BEIR folders, split test, or FOLDER:SPLIT,
    and dataset folders."""
    check: bool = False
    """Whether all is read and checked, and nothing is tokenised or written."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.tokenizer or self.dataset or self.check):
            raise UserError(
                "give --tokenizer FOLDER to tokenise, --dataset OUT for dataset folders, both, or --check"
            )
        if (self.output or self.against) and not self.inspect:
            raise UserError("--output and --against are of --inspect true: add that")
        if self.output and not self.output.endswith(".json"):
            raise UserError(f"output={self.output} must end in .json: the page stands beside it, in .html")
        if self.inspect and not self.tokenizer:
            raise UserError("--inspect true counts tokens: give --tokenizer FOLDER")
        if self.inspect and not self.data.datasets:
            raise UserError("--inspect true reads the texts: give data.datasets, a store alone has none")
