"""Every option of every launcher: a tree of frozen dataclasses, read from YAML and the command line.

    config = load_config(TrainConfig)       # --config x.yaml --optim.lr 1e-6 --loss.temperature=0.05

No torch import here: arguments are parsed and refused in a tenth of a second, before anything heavy is loaded.
Modules receive values (`hidden_size=...`), never the tree.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from nemo_embed_core import __version__
from nemo_embed_core.errors import DataError, UserError, failpoint, run_rank, user_errors

__all__ = ["DataError", "failpoint", "run_rank", "user_errors"]


def code_version() -> str:
    """nemo_embed_core 1.2.3, and the commit in a git checkout."""
    root = Path(__file__).resolve().parents[1]
    version = f"nemo_embed_core {__version__}"
    if not (root / ".git").exists() or shutil.which("git") is None:
        return version

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "HEAD")
    return f"{version}, commit {commit}{' with changes' if git('status', '--porcelain') else ''}" if commit else version


# ------------------------------------------------------------------------------------------ model


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """`rope_scaling` of a Llama-3.1 config.json: rope_type "llama3"."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192  # tokens

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise UserError(f"rope_scaling.{f.name}={value!r} must be a positive number")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"rope_scaling.low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama, under the names of Hugging Face's LlamaConfig."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 0  # 0: hidden_size // num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 131072  # tokens; recorded, not enforced (RoPE has no table here)
    initializer_range: float = 0.02  # standard deviation of random weights

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # a config.json or manifest may hold anything
            value, kind = getattr(self, f.name), {"int": (int,), "float": (int, float)}.get(str(f.type))
            if kind and (type(value) not in kind or not abs(value) < float("inf")):
                raise UserError(f"model.{f.name}={value!r} must be a finite number of type {f.type}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("num_hidden_layers", "head_dim", "initializer_range"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}={getattr(self, name)} must not be negative")
        for name in ("rms_norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; every KV head serves the same number of query heads"
            )
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"model.hidden_size={self.hidden_size} is not a multiple of "
                    f"num_attention_heads={self.num_attention_heads}; change one or set model.head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs of channels")

    @property
    def mlp_blocks(self) -> int:
        """Blocks of [gate rows | up rows] in the fused weight, as checkpoints store it: a function of the shape alone.

        One per KV head where those divide intermediate_size: tensor parallelism, which divides them too, then cuts between
        blocks. Elsewhere (Llama-2-13B: 13824 and 40) blocks of at most 64 channels, of which every rank takes equally many; the
        last ranks' may be padding.
        """
        if self.intermediate_size % self.num_key_value_heads == 0:
            return self.num_key_value_heads
        largest = max(1, min(64, self.intermediate_size // self.num_key_value_heads))
        return self.intermediate_size // next(n for n in range(largest, 0, -1) if self.intermediate_size % n == 0)


# ------------------------------------------------------------------------------------------ training


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tp_size: int = 1  # tensor-parallel ranks; must divide the KV heads
    sequence_parallel: bool = True  # with tp_size > 1: norms and residuals hold T / tp_size tokens
    dp_size: int = 0  # data-parallel ranks; 0: world size / tp_size
    reshard_after_forward: bool = False  # True: free gathered weights after each block (ZeRO-3), saves memory
    timeout_s: int = 600  # seconds without progress after which the ranks end the job and name the one that is behind

    def __post_init__(self) -> None:
        if self.tp_size < 1 or self.dp_size < 0:
            raise UserError(f"parallel.tp_size={self.tp_size} must be >= 1 and dp_size={self.dp_size} >= 0")
        if self.timeout_s < 1:
            raise UserError(f"parallel.timeout_s={self.timeout_s} must be at least 1 second")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    path: str  # a .jsonl or .jsonl.gz file of {"query", "pos", "neg"} rows, or a BEIR folder
    task: str = ""  # instruction of the queries: "Instruct: {task}\nQuery: {text}"; "": the query as it is
    document_task: str = ""  # the same for documents; only symmetric tasks (STS, bitext) set it
    split: str = "train"  # of a BEIR folder: qrels/{split}.tsv
    # Of a BEIR folder: a judgement of a text that does not exist, an empty text, a query without a relevant document.
    # "allow" leaves them out of training and mining, and counts them; evaluation keeps what mteb keeps.
    on_missing: Literal["error", "allow"] = "error"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    datasets: list[DatasetConfig] = field(default_factory=list)
    cache_dir: str = "data-cache"  # tokenised stores, one folder per digest of data + tokenizer + lengths
    query_max_length: int = 512  # tokens, special tokens and instruction included
    document_max_length: int = 512  # tokens
    num_hard_negatives: int = 4  # per query; sampled anew each epoch when a row has more, masked when it has fewer
    max_tokens: int = 8192  # packed tokens of one micro-batch
    # Rows whose query, longest positive and longest num_hard_negatives negatives have more than max_tokens: "error" names
    # them before the first step, "drop" leaves them out, "truncate" shortens their longest documents. Counted either way.
    on_long_row: Literal["error", "drop", "truncate"] = "error"
    # A store that is there: its digest (or the beginning) in cache_dir, or its folder; the files of `datasets` are not looked at.
    store: str = ""

    def __post_init__(self) -> None:
        for name in ("query_max_length", "document_max_length", "max_tokens"):
            if getattr(self, name) < 2:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least 2 tokens")
        if self.num_hard_negatives < 0:
            raise UserError(f"data.num_hard_negatives={self.num_hard_negatives} must not be negative")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    temperature: float = 0.02
    # What a query is contrasted with besides its own hard negatives, gathered over the global batch:
    # "none" (the paper), "positives" (other rows' positives), "all" (other rows' positives and negatives).
    in_batch: Literal["none", "positives", "all"] = "none"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"loss.temperature={self.temperature} must be positive; the paper uses 0.02")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 1e-5  # peak
    min_lr: float = 0.0  # one step after the last
    warmup_steps: int | None = None  # linear from 0; None: a tenth of the steps, at most 100
    weight_decay: float = 0.01  # on matrices; never on norms
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        if not self.lr > 0 or (self.warmup_steps or 0) < 0 or self.weight_decay < 0 or self.clip_norm < 0:
            raise UserError(
                f"optim: lr={self.lr} must be positive; warmup_steps={self.warmup_steps}, "
                f"weight_decay={self.weight_decay} and clip_norm={self.clip_norm} must not be negative"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(f"optim.min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise UserError(
                f"optim: beta1={self.beta1} and beta2={self.beta2} must lie in [0, 1), eps={self.eps} must be positive"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 500  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints kept; older ones are deleted
    keep_every: int = 0  # and those of a step that is a multiple of this, for ever; 0: none
    resume: str = "none"  # "none", "auto" (newest whole checkpoint of output_dir, if any) or a checkpoint folder
    # Copy to host memory (of each rank, as large as its part of a checkpoint), go on training and write meanwhile.
    async_save: bool = True
    # Continue although these differ from the checkpoint's: seed, global_batch_size, data (--checkpoint.allow_changed seed
    # data). The samples of a step are then others: some are seen twice, some not at all. The manifest records it.
    allow_changed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1 or self.keep_every < 0:
            raise UserError(
                f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be at least 1, "
                f"keep_every={self.keep_every} must not be negative"
            )
        if unknown := set(self.allow_changed) - {"seed", "global_batch_size", "data"}:
            raise UserError(
                f"checkpoint.allow_changed has {sorted(unknown)}; it takes seed, global_batch_size and data. Another model "
                "never continues a run: start one with --init_from"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Contrastive training of a bidirectional Llama: JSONL or BEIR in, sharded checkpoints and metrics out."""

    output_dir: str  # step-XXXXXXXX/ checkpoints, metrics.jsonl, config.yaml
    steps: int  # optimizer steps; 0: only save the initial weights
    global_batch_size: int = 128  # queries per optimizer step, over all ranks
    init_from: str = (
        ""  # Hugging Face Llama folder, or a checkpoint or run of ours; "": random weights of shape `model`
    )
    tokenizer: str = ""  # folder with tokenizer.json; "": the one in init_from
    model: ModelConfig = field(default_factory=ModelConfig)  # ignored when init_from is set: the shape is read there
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0  # of the sampler and, without init_from, of the weights
    # Of activations and GEMMs; weights, moments and the loss are fp32. auto: bf16 on a GPU, fp32 on a CPU.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    activation_checkpointing: bool = False  # recompute each block in backward
    attention: Literal["auto", "flash", "varlen", "sdpa", "reference"] = "auto"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    # A loss of more than spike_zscore standard deviations above the mean of the last 100 steps: "warn" names its rows,
    # "skip" also leaves the weights as they are (the step still counts), "ignore" does not look.
    on_spike: Literal["warn", "skip", "ignore"] = "warn"
    spike_zscore: float = 6.0
    log_every: int = 1  # steps between printed lines; metrics.jsonl has every step
    tensorboard: bool = False  # also write TensorBoard events to output_dir/tensorboard

    def __post_init__(self) -> None:
        if self.steps < 0 or self.global_batch_size < 1 or self.log_every < 1:
            raise UserError(
                f"steps={self.steps} must not be negative, global_batch_size={self.global_batch_size} and "
                f"log_every={self.log_every} must be at least 1"
            )
        if self.steps and self.optim.warmup_steps is not None and self.optim.warmup_steps >= self.steps:
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps} is not below steps={self.steps}: the rate would never be at "
                f"optim.lr={self.optim.lr}; lower it, or leave it out for a tenth of the steps"
            )
        if not self.spike_zscore > 0:
            raise UserError(
                f"spike_zscore={self.spike_zscore} must be positive; on_spike=ignore switches the check off"
            )
        if self.data.num_hard_negatives == 0 and self.loss.in_batch == "none":
            raise UserError(
                "no negatives: data.num_hard_negatives=0 and loss.in_batch=none leave the positive alone in the softmax "
                "and the loss is 0; set loss.in_batch=positives or give hard negatives"
            )
        if self.global_batch_size == 1 and self.data.num_hard_negatives == 0:
            raise UserError(
                "no negatives: global_batch_size=1 and data.num_hard_negatives=0 leave the positive alone in the softmax"
            )


# ------------------------------------------------------------------------------------------ the other launchers


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenise datasets once into a memory-mapped store (training does it by itself when the store is missing)."""

    tokenizer: str  # folder with tokenizer.json
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class MineDatasetConfig:
    path: str  # as in training
    task: str | None = None  # instruction of the queries; "": none; null: the model's own
    document_task: str | None = None  # the same for documents
    split: str = "train"  # of a BEIR folder: qrels/{split}.tsv
    on_missing: Literal["error", "allow"] = "error"  # as in training


@dataclass(frozen=True, kw_only=True)
class MineConfig:
    """Hard negatives: the top passages of each query that score below threshold x its positive."""

    # Whose scores decide, one or several (--model A B): a checkpoint or run of ours, a Hugging Face folder, any
    # sentence-transformers folder, or a folder of precomputed documents.npy and queries.npy.
    model: list[str] | str = field(default_factory=list)
    data: str = ""  # whose queries are mined: a .jsonl[.gz] file of {"query", "pos", "neg"} rows, or a BEIR folder
    split: str = "train"  # of a BEIR folder: qrels/{split}.tsv
    # Of a BEIR folder and of --corpus: judgements of texts that do not exist, and empty texts: "allow" leaves them out, counted.
    on_missing: Literal["error", "allow"] = "error"
    # Instructions of queries and documents; null: the model's own (a checkpoint's: what it was trained with), "": none.
    task: str | None = None
    document_task: str | None = None
    datasets: list[MineDatasetConfig] = field(default_factory=list)  # in place of the five above, as in training
    # JSONL of {"query", "pos", "neg", ...} that launch/train.py reads; of several datasets a folder with one file for each
    output: str = ""
    corpus: str = ""  # JSONL of {"text"} documents to search besides; "": all documents of the data
    pool: Literal["all", "corpus"] = "all"  # corpus: search nothing but --corpus
    # Documents that are not searched, as those of an evaluation: JSONL files of {"text"}, and splits of BEIR folders, whose
    # judged documents are meant (--exclude heldout.jsonl data/nq:test).
    exclude: list[str] = field(default_factory=list)
    keep_negatives: bool = False  # those that the rows have come first, whatever they score (BEIR: judged with score 0)
    write_texts: str = ""  # only write the texts to embed to this folder: documents.jsonl and queries.jsonl
    # Keep scores < threshold x positive's score, in (0, 2) (sentence-transformers: relative_margin = 1 - threshold).
    threshold: float = 0.95
    sweep: list[float] = field(default_factory=list)  # further thresholds to report on: --sweep 0.8 0.9 0.98
    num_negatives: int = 4  # per query, best first
    absolute_margin: float | None = None  # and scores < positive's score - absolute_margin
    max_score: float | None = None  # and scores < max_score
    min_score: float | None = None  # and scores >= min_score
    range_min: int = 0  # leave out the best range_min passages, whatever they score
    range_max: int | None = None  # and everything after the best range_max
    sampling: Literal["top", "random"] = "top"  # of those left: the best, or a sample seeded by `seed` and the row
    seed: int = 0
    # Of several models' lists: what is in all of them, or all that is in one, ordered by the mean of its ranks.
    combine: Literal["intersection", "mean_rank"] = "intersection"
    combine_depth: int = 100  # passages per query of each model's list
    method: Literal["auto", "fp32", "bf16", "int8"] = "auto"  # of the search GEMM; the answer is the same, proven
    # Also write the result as: flagembedding, tevatron, sentence-transformers, automodel (--formats A B).
    formats: list[str] = field(default_factory=list)
    query_max_length: int | None = None  # tokens; null: the model's own, 512 where it says nothing
    document_max_length: int | None = None  # tokens
    similarity: Literal["cosine", "dot"] | None = None  # of two embeddings; null: the model's own
    max_tokens: int = 16384  # packed tokens of one encoder batch
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 on a GPU, fp32 on a CPU
    device: Literal["auto", "cuda", "cpu"] = "auto"
    # Of the stored embeddings, whose scores are compared; null: float16, and float32 for dot products of any length.
    dtype: Literal["float16", "float32"] | None = None
    shard_size: int = 16384  # texts per file of embeddings: a kill costs each rank at most one of them
    block_queries: int = 8192  # queries per file of search results

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), *(("sweep", t) for t in self.sweep)):
            if not 0 < value < 2:
                raise UserError(
                    f"{name}={value} must be in (0, 2); the paper uses 0.95, sentence-transformers' relative_margin is "
                    "1 - threshold, and above 1 passages that beat the positive pass too"
                )
        for name in ("num_negatives", "combine_depth", "shard_size", "block_queries"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if bool(self.data) == bool(self.datasets):
            raise UserError(
                "give --data PATH [--task ...], or datasets: [{path, task}, ...] in a config file, "
                f"{'not both' if self.data else 'one of them'}"
            )
        if self.datasets and (self.task is not None or self.document_task is not None or self.split != "train"):
            raise UserError("--task, --document_task and --split belong to --data; each of `datasets` has its own")
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


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Retrieval quality on a held-out BEIR folder, through mteb's own evaluator, offline."""

    data: str  # BEIR folder: corpus.jsonl, queries.jsonl, qrels/{split}.tsv (.gz allowed)
    # Checkpoints, runs, Hugging Face or sentence-transformers folders, or "bm25": --models A B bm25
    models: list[str] = field(default_factory=list)
    split: str = "test"
    # A judgement of a text that does not exist, an empty text: "allow" counts them and keeps what mteb keeps.
    on_missing: Literal["error", "allow"] = "error"
    output: str = ""  # JSON report; "": only the table
    # Each model's own prompts and lengths are used where these are not given; what is overridden is said.
    prompt_name: str = ""  # of a model with prompts for several tasks; "": its default
    task: str | None = None  # instruction of the queries: "Instruct: {task}\nQuery: {text}"; "": none
    document_task: str | None = None  # the same for documents
    query_max_length: int | None = None  # tokens
    document_max_length: int | None = None  # tokens
    # A document with the query's own id is not counted as found: mteb's flag, which it sets for ArguAna, Quora, FiQA and others.
    ignore_identical_ids: bool = False
    max_queries: int = 0  # a sample of this many queries of the split; 0: all
    seed: int = 0  # of the sample
    max_tokens: int = 16384  # packed tokens of one encoder batch
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 on a GPU, fp32 on a CPU
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def __post_init__(self) -> None:
        for name in ("query_max_length", "document_max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1 token")
        if self.max_queries < 0:
            raise UserError(f"max_queries={self.max_queries} must not be negative; 0 takes all")


# ------------------------------------------------------------------------------------------ reading and writing

C = TypeVar("C")


def load_config(cls: type[C], argv: Sequence[str] | None = None) -> C:
    """The dataclass from `--config file.yaml` and `--a.b value` overrides; fields that are lists take `--models A B C`.

    Unknown keys, wrong types and impossible values end the process with code 2 and one paragraph that names the option.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(description=cls.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; options after it override it")
    parser.add_class_arguments(cls)
    if "model.head_dim" in parser.get_defaults():
        # The default instance has derived 128 = 4096 / 32 from its own sizes; it would stick when those are overridden.
        parser.set_defaults({"model.head_dim": 0})
    options = [name for action in parser._actions for name in action.option_strings]
    argv = sys.argv[1:] if argv is None else list(argv)
    with user_errors():
        _refuse_duplicate_keys(argv)
        try:
            values = parser.parse_args(_join_lists(cls, argv))
        except ArgumentError as error:
            raise UserError(_explain(str(error), options)) from None
        values.pop("config", None)
        return cls(**vars(parser.instantiate(values)))


def _refuse_duplicate_keys(argv: Sequence[str]) -> None:
    """YAML says a repeated key is an error; PyYAML keeps the last one silently."""
    import yaml

    def check(node: yaml.Node | None, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise DataError(
                        path, line, f"key {key.value!r} stands here and on line {seen[key.value]}; keep one"
                    )
                seen[key.value] = key.start_mark.line + 1
                check(value, path)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                check(item, path)

    for option, value in zip(argv, [*argv[1:], ""], strict=True):
        path = value if option == "--config" else option.removeprefix("--config=") if "--config=" in option else ""
        if path and Path(path).is_file():
            try:
                check(yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader), path)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _join_lists(cls: type, argv: list[str]) -> list[str]:
    """`--models A B` -> `--models ["A", "B"]` for the fields of type list[str], `--sweep 1 2` -> `--sweep [1,2]`."""
    lists = {f"--{name}": kind for name, kind in _list_fields(cls)}
    joined: list[str] = []
    while argv:
        joined.append(argv.pop(0))
        if joined[-1] in lists and argv and not argv[0].startswith("["):
            items = []
            while argv and not argv[0].startswith("--"):
                items.append(argv.pop(0))
            joined.append(json.dumps(items) if "str" in lists[joined[-1]] else f"[{','.join(items)}]")
    return joined


def _list_fields(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    for f in dataclasses.fields(cls):
        if str(f.type).startswith(("list[str]", "list[float]")):
            yield prefix + f.name, str(f.type)
        elif isinstance(nested := globals().get(str(f.type)), type) and dataclasses.is_dataclass(nested):
            yield from _list_fields(nested, f"{prefix}{f.name}.")


def _explain(message: str, options: Sequence[str]) -> str:
    """The parser's message on one line, with the nearest option where one is misspelt."""
    message = " ".join(message.split())
    for word in re.findall(r"--?[\w.]+|[\"'][\w.]+[\"']", message):
        name = word.strip("\"'-").split("=")[0]
        if f"--{name}" not in options:
            near = difflib.get_close_matches(f"--{name}", options, n=1, cutoff=0.75)
            if near:
                return f"{message}; did you mean {near[0]}?"
    return message


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def dump_yaml(config: Any, path: Path) -> None:
    """The resolved tree as YAML that `--config` reads back."""
    import yaml

    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
