"""Options of launch/mine.py."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from nemo_embed_core.config.data import DatasetConfig, RowsConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options


@dataclass(frozen=True, kw_only=True)
class MineDatasetConfig(RowsConfig, section="datasets"):
    """One dataset whose queries are mined."""

    path: str
    """A file of rows (JSON lines, JSON, CSV, TSV, Parquet, Arrow; text also .gz or .zst), a folder or glob of
    them, or a BEIR folder."""
    task: str | None = None
    """Instruction of the queries; "": none; null: the model's own."""
    document_task: str | None = None
    """Instruction of the documents; "": none; null: the model's own."""
    split: str = "train"
    """Split of a BEIR folder, qrels/{split}.tsv, and of a folder with files of several splits."""
    on_missing: Literal["error", "allow"] = "error"
    """In a BEIR folder, a judgement of a text that does not exist, an empty text: "error" refuses it, "allow"
    leaves it out, counted."""

    def as_data(self) -> DatasetConfig:
        """As the readers of training data take it."""
        names = ("path", "split", "on_missing", *(f.name for f in fields(RowsConfig)))
        return DatasetConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class _Inputs(RowsConfig):
    """Models, data and output, which --help names first."""

    model: list[str] | str = field(default_factory=list)
    """Models whose scores decide, one or several (--model A B): a checkpoint or run of ours, a Hugging Face
    folder, any sentence-transformers folder, or a folder of precomputed documents.npy and queries.npy."""
    data: str = ""
    """Data whose queries are mined: a file, folder or glob of rows, or a BEIR folder."""
    split: str = "train"
    """Split of a BEIR folder, qrels/{split}.tsv, and of a folder with files of several splits."""
    on_missing: Literal["error", "allow"] = "error"
    """In a BEIR folder and in --corpus, a judgement of a text that does not exist, an empty text: "error"
    refuses it, "allow" leaves it out, counted."""
    task: str | None = None
    """Instruction of the queries; "": none; null: the model's own (a checkpoint's: as it was trained)."""
    document_task: str | None = None
    """Instruction of the documents; "": none; null: the model's own."""
    datasets: list[MineDatasetConfig] = field(default_factory=list)
    """Several datasets in place of `data` and its options; --datasets.help lists the keys of each."""
    output: str = ""
    """JSONL to write, of {"query", "pos", "neg", ...} rows that launch/train.py reads; of several datasets a
    folder with one file for each."""
    output_format: Literal["jsonl", "dataset"] = "jsonl"
    """jsonl: rows with their texts; dataset: a dataset folder (of several datasets a folder with one for
    each), whose rows name documents by id. One that is mined from a dataset folder links its corpus files."""
    corpus: str = ""
    """JSONL of {"text"} documents to search besides; "": only the documents of the data."""
    pool: Literal["all", "corpus"] = "all"
    """Documents to search: "all", or "corpus" for nothing but --corpus."""
    exclude: list[str] = field(default_factory=list)
    """Documents that are not searched, as those of an evaluation: JSONL files of {"text"}, and splits of BEIR
    folders, whose judged documents are meant (--exclude heldout.jsonl data/nq:test)."""
    keep_negatives: bool = False
    """Whether the negatives that a row has come first, whatever they score (BEIR: judged with score 0)."""
    write_texts: str = ""
    """Folder to which the texts to embed are written, documents.jsonl and queries.jsonl, and nothing else is
    done."""


@dataclass(frozen=True, kw_only=True)
class Selection(Options):
    """Which documents become negatives; the vocabulary of sentence-transformers' mine_hard_negatives.

    Every given bound must hold; "below" is strict. mine/selection.py applies it.
    """

    num_negatives: int = 4
    """Negatives per query, best first."""
    threshold: float | None = 0.95
    """Negatives score below threshold x the positive's score, in (0, 2) (sentence-transformers:
    relative_margin = 1 - threshold); null: no such bound."""
    absolute_margin: float | None = None
    """Negatives also score below the positive's score - absolute_margin; null: no such bound."""
    max_score: float | None = None
    """Negatives also score below max_score; null: no such bound."""
    min_score: float | None = None
    """Negatives also score at least min_score; null: no such bound."""
    range_min: int = 0
    """Number of best documents to leave out, whatever they score."""
    range_max: int | None = None
    """Number of best documents after which all others are left out; null: none are."""
    sampling: Literal["top", "random"] = "top"
    """Choice among the documents that are left: the best, or a sample that depends on `seed` and the row."""
    seed: int = 0
    """Seed of sampling=random."""
    combine: Literal["intersection", "mean_rank"] = "intersection"
    """Of several models' lists: the documents in all of them, or in any, ordered by the mean of their
    ranks."""
    combine_depth: int = 100
    """Documents per query of each model's list; at least as many as one model's search has to return."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            check_threshold(self.threshold)
        for name in ("num_negatives", "combine_depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.range_min < 0 or (self.range_max is not None and self.range_max <= self.range_min):
            raise UserError(
                f"range_min={self.range_min} must be at least 0 and below range_max={self.range_max}"
            )
        if self.min_score is not None and self.max_score is not None and self.min_score >= self.max_score:
            raise UserError(f"min_score={self.min_score} must be below max_score={self.max_score}")

    @property
    def by_rank(self) -> bool:
        """Ranks count documents above the ceiling too: the search runs without it, bounds come after."""
        return self.range_min > 0 or self.range_max is not None

    @property
    def num_searched(self) -> int:
        """Documents per query that the search has to return."""
        if self.range_max is not None:
            return self.range_max
        # As many times as sentence-transformers looks at.
        spare = 3 if self.sampling == "random" or self.by_rank else 1
        return self.range_min + spare * self.num_negatives


def check_threshold(threshold: float, name: str = "threshold") -> None:
    if not 0 < threshold < 2:
        raise UserError(
            f"{name}={threshold} must be in (0, 2); the paper uses 0.95, sentence-transformers' "
            "relative_margin is 1 - threshold, and above 1 documents that beat the positive pass too"
        )


@dataclass(frozen=True, kw_only=True)
class MineConfig(Selection, _Inputs):
    """Hard negatives: the top documents of each query that score below threshold x its positive."""

    sweep: list[float] = field(default_factory=list)
    """Further thresholds to report on: --sweep 0.8 0.9 0.98."""
    method: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Precision of the search GEMM; the answer is proven to be the same."""
    formats: list[str] = field(default_factory=list)
    """Peers' formats to write the result in too: flagembedding, tevatron, sentence-transformers, automodel
    (--formats A B)."""
    query_max_length: int | None = None
    """Tokens of a query; null: the model's own, 512 where it says nothing."""
    document_max_length: int | None = None
    """Tokens of a document; null: the model's own, 512 where it says nothing."""
    similarity: Literal["cosine", "dot"] | None = None
    """Similarity of two embeddings; null: the model's own."""
    max_tokens: int = 16384
    """Packed tokens of one encoder batch."""
    precision: Literal["auto", "bf16", "fp8", "fp32"] = "auto"
    """Precision of the encoder; auto: bf16 on a GPU, fp32 on a CPU; fp8: bf16 with the blocks' products in
    fp8 (our own encoder; GPUs from Ada and Hopper on, emulated on a CPU)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of encoder and search; auto: a GPU when torch sees one."""
    dtype: Literal["float16", "float32"] | None = None
    """Type of the stored embeddings, whose scores are compared; null: float16, and float32 for dot
    products."""
    shard_size: int = 16384
    """Texts per file of embeddings: a kill costs each rank at most one file."""
    block_queries: int = 8192
    """Queries per file of search results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for threshold in self.sweep:
            check_threshold(threshold, "sweep")
        for name in ("shard_size", "block_queries", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if bool(self.data) == bool(self.datasets):
            raise UserError(
                "give --data PATH [--task ...], or datasets: [{path, task}, ...] in a config file, "
                f"{'not both' if self.data else 'one of them'}"
            )
        own = MineDatasetConfig(path="", on_missing=self.on_missing if self.corpus else "error")
        given = [f.name for f in fields(own) if getattr(self, f.name, "") != getattr(own, f.name)]
        if self.datasets and given:
            raise UserError(
                f"--{' and --'.join(given)}: of --data alone, each of `datasets` has its own {given[0]}"
            )
        for name in ("query_max_length", "document_max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1 token")
        if self.pool == "corpus" and not self.corpus:
            raise UserError("--pool corpus searches nothing but --corpus, which is missing")
        if not self.write_texts:
            for name in ("model", "output"):
                if not getattr(self, name):
                    raise UserError(f"--{name} is missing; only --write_texts does without")

    @property
    def models(self) -> list[str]:
        return [self.model] if isinstance(self.model, str) else list(self.model)
