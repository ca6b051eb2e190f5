"""Options of launch/train.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_embed_core.config.data import DataConfig
from nemo_embed_core.config.held_out import EvalConfig
from nemo_embed_core.config.lora import LoraConfig
from nemo_embed_core.config.model import ModelConfig
from nemo_embed_core.config.parallel import ParallelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
Recompute = Literal["none", "selective", "full"]


TERMS = ("info_nce", "kl", "margin_mse", "teacher_vectors", "cosent")  # of the loss; each has a weight
TEMPERATURE_RANGE = (0.005, 1.0)  # of one that is learned: the kernels are tested in it


@dataclass(frozen=True, kw_only=True)
class LossConfig(Options, section="loss"):
    """InfoNCE, and terms beside it."""

    temperature: float = 0.02
    """Divisor of the similarities; where it is learned, its first value."""
    temperature_lr: float = 0.0
    """Peak learning rate of the temperature's logarithm, on the schedule of optim.lr; 0: it is not learned.
    CLIP's 5e-4 moves it by at most 0.05 % a step."""
    in_batch: Literal["none", "positives", "all"] = "none"
    """Documents that a query is contrasted with besides its own hard negatives, gathered over the global
    batch: "none" (the paper), "positives" (of other rows), "all" (positives and negatives of other rows)."""
    query_query: bool = False
    """Whether a query is contrasted with the other rows' queries too."""
    document_document: bool = False
    """Whether a query's positive is contrasted with the other rows' documents too: those of in_batch, with
    in_batch "none" their positives."""
    false_negative_margin: float | None = None
    """Candidates whose similarity is more than this above that of the query and its positive are left out, as
    they are likely to be right (0.1 in Qwen3-Embedding); null: none is."""
    info_nce_weight: float = 1.0
    """Weight of the contrastive term in the loss, the sum of all terms by their weights; 0: left out."""
    kl_weight: float = 0.0
    """Weight of the divergence of the model's distribution over a query's own documents, softmax of cosines
    by temperature, from that of a teacher, whose scores the rows have (mining writes them)."""
    kl_temperature: float = 0.02
    """Divisor of the teacher's scores: of cosines as temperature, of a reranker's logits 1."""
    margin_mse_weight: float = 0.0
    """Weight of the squared difference between the model's and the teacher's margins, positive less negative,
    of cosines."""
    teacher_vectors_weight: float = 0.0
    """Weight of 1 less the cosine of a text's vector, projected by a learned matrix to the teacher's width,
    and the teacher's own (data.datasets.teacher_vectors), in the mean over a row's texts."""
    teacher_vectors_lr: float = 1e-3
    """Peak learning rate of that matrix, on the schedule of optim.lr; 0: it stays the identity that it begins
    as."""
    cosent_weight: float = 0.0
    """Weight of CoSENT over the graded pairs of the global batch (data.datasets.grades), which wants the more
    similar of two pairs to have the higher cosine. Graded pairs are in no other term but teacher_vectors."""
    cosent_temperature: float = 0.05
    """Divisor of the differences of cosines in it."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Widths at which vectors are to be of use too, cut to their first columns and normalised again: the loss
    is the sum of that at each of these, of which the model's hidden_size should be one; []: that alone."""
    matryoshka_weights: list[float] = field(default_factory=list)
    """Of each of matryoshka_dims in that sum; []: 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise UserError(f"loss.temperature={self.temperature} must be positive; the paper uses 0.02")
        if not self.temperature_lr >= 0:
            raise UserError(f"loss.temperature_lr={self.temperature_lr} must not be negative; 0: not learned")
        low, high = TEMPERATURE_RANGE
        if self.temperature_lr and not low <= self.temperature <= high:
            raise UserError(
                f"loss.temperature={self.temperature} must lie between {low:g} and {high:g}, where "
                "loss.temperature_lr learns it"
            )
        margin = self.false_negative_margin
        if margin is not None and not 0 <= margin <= 2:
            raise UserError(
                f"loss.false_negative_margin={margin} must lie between 0 and 2, the most that two cosines "
                "differ by; null: no candidate is left out"
            )
        terms = {f"{name}_weight": getattr(self, f"{name}_weight") for name in TERMS}
        if any(weight < 0 for weight in terms.values()) or not any(terms.values()):
            said = ", ".join(f"{name}={weight:g}" for name, weight in terms.items())
            raise UserError(f"loss: {said} must not be negative, and one of them positive")
        if self.temperature_lr and not self.info_nce_weight and not self.kl_weight:
            raise UserError(
                f"loss.temperature_lr={self.temperature_lr} learns a temperature that no term has: "
                "loss.info_nce_weight and loss.kl_weight are 0; set one of them, or temperature_lr to 0"
            )
        if not self.teacher_vectors_lr >= 0:
            raise UserError(
                f"loss.teacher_vectors_lr={self.teacher_vectors_lr} must not be negative; 0: not learned"
            )
        for name in ("kl_temperature", "cosent_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"loss.{name}={getattr(self, name)} must be positive")
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if any(dim < 1 for dim in dims) or len(set(dims)) < len(dims):
            raise UserError(f"loss.matryoshka_dims={dims} must be different widths of at least 1 column")
        if weights and (len(weights) != len(dims) or not all(weight > 0 for weight in weights)):
            raise UserError(
                f"loss.matryoshka_weights={weights} must be positive, one for each of "
                f"matryoshka_dims={dims}; []: 1"
            )

    @property
    def needs_scores(self) -> bool:
        """Of a teacher, in the rows."""
        return self.kl_weight > 0 or self.margin_mse_weight > 0

    @property
    def needs_vectors(self) -> bool:
        """Of a teacher, of every text."""
        return self.teacher_vectors_weight > 0

    @property
    def takes_lone_rows(self) -> bool:
        """Whether a row without negatives of its own has something to learn from."""
        return self.has_in_batch or self.needs_vectors

    @property
    def has_in_batch(self) -> bool:
        """Whether other rows bring candidates, to InfoNCE."""
        others = self.in_batch != "none" or self.query_query or self.document_document
        return self.info_nce_weight > 0 and others

    @property
    def couples_rows(self) -> bool:
        """Whether the loss of a row needs others, so that micro-batches are joined by GradCache."""
        return self.has_in_batch or self.cosent_weight > 0

    def columns(self, num_hard_negatives: int) -> int:
        """Documents of a row that are gathered over the global batch."""
        if not self.has_in_batch:
            return 0
        if self.in_batch == "none":
            return int(self.document_document)
        return 1 + num_hard_negatives if self.in_batch == "all" else 1

    @property
    def has_query_columns(self) -> bool:
        """Whether queries are gathered over the global batch."""
        return self.has_in_batch and self.query_query

    def why_zero(self, num_hard_negatives: int, batch_size: int) -> str:
        """Of a term with a weight that is 0 in every batch: why, and what to change; "": there is none."""
        few = f"data.num_hard_negatives={num_hard_negatives}"
        if self.info_nce_weight and not num_hard_negatives and not (self.has_in_batch and batch_size > 1):
            return (
                f"no negatives: {few}, loss.in_batch={self.in_batch} and global_batch_size={batch_size} "
                "leave the positive alone in the softmax; give hard negatives, set loss.in_batch=positives "
                "with a batch of at least 2, or loss.info_nce_weight=0"
            )
        if self.needs_scores and not num_hard_negatives:
            return (
                f"no negatives: {few} leaves loss.kl_weight and loss.margin_mse_weight the positive alone of "
                "each query's documents; give hard negatives, or set both to 0"
            )
        if self.cosent_weight and batch_size < 2:
            return "loss.cosent_weight compares pairs of a batch: raise global_batch_size=1, or set it to 0"
        return ""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Options, section="optim"):
    """AdamW and its learning rate."""

    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate one step after the last."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from 0; null: a tenth of the steps, at most 100."""
    weight_decay: float = 0.01
    """Weight decay of matrices; norms have none."""
    beta1: float = 0.9
    """Decay of the mean of the gradients, per step."""
    beta2: float = 0.999
    """Decay of the mean of their squares, per step."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    master_weights: Literal["fp32", "split"] = "fp32"
    """How fp32 master weights are kept: "fp32" beside bf16 copies that every step makes (6 bytes a
    parameter), "split" as the bf16 weights that run and 16-bit remainders (4 bytes, the same masters bit for
    bit, whose ties round half away from zero; with precision bf16 alone). A run may change it when it
    resumes."""
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How AdamW keeps its two moments of a matrix: "fp32" (8 bytes a parameter), "bf16" (4) or "8bit" (2, in
    blocks of at most 256 of a row), both rounded at random, right in the mean, and with master_weights split
    alone. Norms keep fp32. A run may change it when it resumes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr > 0 or (self.warmup_steps or 0) < 0 or self.weight_decay < 0 or self.clip_norm < 0:
            raise UserError(
                f"optim: lr={self.lr} must be positive; warmup_steps={self.warmup_steps}, "
                f"weight_decay={self.weight_decay} and clip_norm={self.clip_norm} must not be negative"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(f"optim.min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            betas = f"beta1={self.beta1} and beta2={self.beta2}"
            raise UserError(f"optim: {betas} must lie in [0, 1), eps={self.eps} must be positive")
        if self.moments != "fp32" and self.master_weights != "split":
            raise UserError(
                f"optim.moments={self.moments} needs optim.master_weights=split: torch's AdamW, which "
                "updates fp32 masters, has fp32 moments alone; set that (with precision=bf16), or "
                "optim.moments=fp32"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Options, section="checkpoint"):
    """When the run is saved and how it goes on."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted, but for the best one (eval.metric)."""
    keep_every: int = 0
    """Checkpoints of a step that is a multiple of this are kept for ever; 0: none."""
    resume: str = "none"
    """Checkpoint to continue from: "none", "auto" (newest whole one of output_dir, if any), or a checkpoint
    folder."""
    async_save: bool = True
    """Whether training goes on while a copy in host memory, on each rank as large as its part, is written."""
    allow_changed: list[str] = field(default_factory=list)
    """Continue although these differ from the checkpoint's: seed, global_batch_size, data
    (--checkpoint.allow_changed seed data). The samples of a step are then others, some seen twice, some not
    at all; the manifest records it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or self.keep < 1 or self.keep_every < 0:
            raise UserError(
                f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be at least 1, "
                f"keep_every={self.keep_every} must not be negative"
            )
        if unknown := set(self.allow_changed) - {"seed", "global_batch_size", "data"}:
            raise UserError(
                f"checkpoint.allow_changed has {sorted(unknown)}; it takes seed, global_batch_size and data. "
                "Another model never continues a run: start one with --init_from"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """Contrastive training of a bidirectional encoder: rows of any format in docs/data-formats.md in,
    checkpoints and metrics out."""

    output_dir: str
    """Folder of the run: step-XXXXXXXX/ checkpoints, metrics.jsonl, config.yaml."""
    steps: int | None = None
    """Optimizer steps; 0: only save the initial weights."""
    epochs: int | None = None
    """In place of steps: how often what an epoch draws (data.datasets.weight) is trained on. Rows of the next
    epoch fill the last batch."""
    global_batch_size: int = 128
    """Queries per optimizer step, over all ranks."""
    init_from: str = ""
    """Hugging Face folder of a base model, or a checkpoint or run of ours; "": random weights of the shape
    `model`, which is ignored otherwise."""
    init_layers: list[int] = field(default_factory=list)
    """Layers of init_from that the model begins with, in this order, counted from 0: [0, 2, 4, 6] of eight
    makes a model of four; []: all."""
    init_axes: Literal["own", "principal"] = "own"
    """Axes of the hidden states that the model begins with. principal: all weights are turned so that the
    first columns of a vector hold the most of it that so many can, by the vectors that init_from gives of the
    run's first texts, 4 hidden_size of them: loss.matryoshka_dims then begins from principal components.
    Vectors stay as they are but for the turn and the final norm, whose weights become equal."""
    tokenizer: str = ""
    """Folder with tokenizer.json; "": the one in init_from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    """Seed of the sampler, of LoRA's factors and dropout and, without init_from, of the weights."""
    precision: Literal["auto", "bf16", "fp8", "fp32"] = "auto"
    """Precision of activations and GEMMs, and of the rows that in-batch negatives are scored with (weights,
    moments and sums of the loss are fp32); auto: bf16 on a GPU, fp32 on a CPU; fp8: bf16 with the GEMMs of
    the blocks in fp8, forward and backward, one scale a matrix (GPUs from Ada and Hopper on, emulated on a
    CPU)."""
    activation_checkpointing: Recompute | bool = "none"
    """Activations computed again in backward rather than kept, which changes no number: "selective", outputs
    of norms and SwiGLU, a third of the bytes for little time, or "full", each whole block, nearly all bytes
    for one more forward; true is full, false none."""
    attention: Literal["auto", "flash3", "flash", "varlen3", "varlen", "sdpa", "reference"] = "auto"
    """Implementation of attention: FlashAttention-3 of the module flash_attn_interface (Hopper),
    FlashAttention-2 of flash-attn, FlashAttention-3 and 2 through torch's varlen_attn, torch's sdpa by runs
    of equal lengths; auto: the first of flash3, flash, varlen, sdpa that runs on the device in the precision.
    The run says which one it is."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the ranks; auto: a GPU when torch sees one."""
    on_spike: Literal["warn", "skip", "ignore"] = "warn"
    """A loss of more than spike_zscore standard deviations above the mean of the last 100 steps: "warn" names
    its rows, "skip" also leaves the weights as they are (the step still counts), "ignore" does not look."""
    spike_zscore: float = 6.0
    """Standard deviations from which on a loss is a spike."""
    log_every: int = 1
    """Steps between printed lines; metrics.jsonl has every step."""
    report_to: list[str] = field(default_factory=list)
    """Trackers that get what metrics.jsonl gets: tensorboard (in output_dir/tensorboard), wandb, mlflow,
    trackio. None of them can stop or slow the run; what one loses is counted."""
    tensorboard: bool = False
    """The same as tensorboard in report_to, which older files say so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.activation_checkpointing, bool):  # as files and checkpoints before 1.0 say it
            word = "full" if self.activation_checkpointing else "none"
            object.__setattr__(self, "activation_checkpointing", word)
        layers = self.init_layers
        if layers and not self.init_from:
            raise UserError(f"init_layers={layers} are of init_from: give that, or model.num_hidden_layers")
        if any(layer < 0 for layer in layers) or len(set(layers)) < len(layers):
            raise UserError(f"init_layers={layers} must be different layers, counted from 0")
        if self.init_axes != "own" and not self.init_from:
            raise UserError(f"init_axes={self.init_axes} are those of init_from's vectors: give that")
        if self.lora.rank and (not self.init_from or layers or self.init_axes != "own"):
            why = f"init_layers={layers} leaves some out" if layers else "that is not set"
            if self.init_axes != "own":
                why = f"init_axes={self.init_axes} turns them"
            raise UserError(
                f"lora.rank={self.lora.rank} adapts all layers of a model that is there, init_from, and "
                f"{why}: save the model first (steps=0 without lora) and give that run as init_from"
            )
        if self.lora.rank and self.optim.master_weights == "split":
            raise UserError(
                "lora: adapters are kept in fp32 and what is frozen as it runs, so there is nothing to "
                "split: set optim.master_weights=fp32 and optim.moments=fp32"
            )
        if unknown := [name for name in self.report_to if name not in TRACKERS]:
            raise UserError(f"report_to has {unknown[0]!r}; it takes {', '.join(TRACKERS)}")
        if self.tensorboard and "tensorboard" not in self.report_to:
            object.__setattr__(self, "report_to", [*self.report_to, "tensorboard"])
        if (self.steps is None) == (self.epochs is None):
            both = "" if self.steps is None else f", not steps={self.steps} and epochs={self.epochs}"
            raise UserError(f"give steps or epochs{both}: how long to train")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"epochs={self.epochs} must be at least 1; give steps for a part of an epoch")
        if (self.steps or 0) < 0 or self.global_batch_size < 1 or self.log_every < 1:
            raise UserError(
                f"steps={self.steps} must not be negative, global_batch_size={self.global_batch_size} and "
                f"log_every={self.log_every} must be at least 1"
            )
        warmup_steps = self.optim.warmup_steps
        if self.steps and warmup_steps is not None and warmup_steps >= self.steps:
            raise UserError(
                f"optim.warmup_steps={warmup_steps} is not below steps={self.steps}: the rate would never "
                f"be at optim.lr={self.optim.lr}; lower it, or leave it out for a tenth of the steps"
            )
        mixed = len(self.data.datasets) > 1 and self.data.batches == "mixed" and self.loss.has_in_batch
        for dataset in self.data.datasets if mixed else ():
            if dataset.task_type in ("classification", "clustering"):
                raise UserError(
                    f"data.datasets: {dataset.name or dataset.path}: task_type={dataset.task_type} with "
                    f"loss.in_batch={self.loss.in_batch}: classes of other datasets, which may be right, "
                    "would be its negatives; set data.batches=one_source or loss.in_batch=none, or "
                    "task_type=retrieval if its documents can be told from any others"
                )
        if not self.spike_zscore > 0:
            raise UserError(
                f"spike_zscore={self.spike_zscore} must be positive; on_spike=ignore switches the check off"
            )
        if why := self.loss.why_zero(self.data.num_hard_negatives, self.global_batch_size):
            raise UserError(f"{why}: the term would be 0 in every step")

    @property
    def num_steps(self) -> int:
        """steps, once they are known: of `epochs` when the rows are counted (train/run_state.py)."""
        assert self.steps is not None, "the rows of an epoch are not counted yet"
        return self.steps
