"""Options of launch/pipeline.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_embed_core.config.mine import check_threshold
from nemo_embed_core.config.synthesize import GenerateConfig, SelfPairsConfig, SynthesizeConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

Method = Literal["auto", "full", "lora", "layers"]
OF_DOCUMENTS = ("document-question", "document-keywords")  # tasks of models whose rows name documents


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Options):
    """A folder of documents to a model that is proven on documents that it has not seen: pairs, mined
    negatives, training, an export, scores beside its base's and BM25's, checks, one page. A command that was
    killed goes on when it is given again; what did not change is not done again."""

    documents: str
    """Folder of documents: Markdown, HTML, reStructuredText, plain text (a PDF's too), Python, also .gz."""
    output: str
    """Folder of all that it makes: steps/ with a folder for each stage, model (a link to the export),
    report.html and report.json."""
    base: str = ""
    """Model to begin with: a Hugging Face folder of a base model, or a checkpoint or run of ours."""
    task: str = SynthesizeConfig.task
    """Instruction of the queries that documents give themselves."""
    licence: str = ""
    """Licence of the documents, which the datasets' metadata then has."""
    max_documents: int = 0
    """Files that are read at most, a sample by their paths and the seed; 0: all."""
    max_rows: int = 0
    """Rows that are trained on at most, of each dataset, a sample; 0: all."""
    max_queries: int = 1000
    """Held-out queries that are evaluated at most, a sample; 0: all."""
    method: Method = "auto"
    """What is trained: "full", all weights; "lora", adapters; "layers", all weights of the base's first
    layers; "auto": the first of them that fits this machine, by what nemo-embed plan computes."""
    layers: int = 0
    """Of method=layers: how many; 0: as many as fit."""
    lora_rank: int = 16
    """Of method=lora: rows of A and columns of B."""
    memory_gb: float = 0.0
    """GB (10^9 bytes) that a rank of training may need; 0: those of the GPU, without one nine tenths of the
    machine's, shared by its ranks."""
    epochs: int = 1
    """How often the rows are trained on."""
    steps: int | None = None
    """In place of epochs: optimizer steps."""
    global_batch_size: int = 128
    """Queries of a step, over all ranks."""
    lr: float | None = None
    """Peak learning rate; null: 1e-5 x (4096 / hidden_size)^2, of adapters ten times that, both at most
    1e-3."""
    num_negatives: int = 2
    """Hard negatives of a query, mined with the base; other rows' documents are negatives too."""
    threshold: float = 0.95
    """Hard negatives score below threshold x the positive's score, both by the base."""
    query_max_length: int = 64
    """Tokens of a query, instruction included."""
    document_max_length: int | None = None
    """Tokens of a document; null: 512 on a GPU, else 128."""
    train: str = ""
    """YAML of further options of launch/train.py, over those that the pipeline chooses."""
    formats: list[str] = field(default_factory=lambda: ["native"])
    """Formats to export (merge --format), the first of which is evaluated: native, compat, onnx, gguf."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of training and encoding; auto: bf16 on a GPU, fp32 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of all stages; auto: a GPU when torch sees one."""
    ranks: int = 0
    """Data-parallel ranks that mine and train, under torchrun; 0: one for each GPU, without one a single
    process."""
    seed: int = 0
    """Decides every draw: what is held out, sampled, taken out of documents, and the order of the rows."""
    dry_run: bool = False
    """Whether the stages are only listed: the command of each, which are done, and what the rest costs."""
    self_pairs: SelfPairsConfig = field(default_factory=SelfPairsConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_documents", 0), ("max_rows", 0), ("max_queries", 0), ("layers", 0),
                            ("lora_rank", 1), ("epochs", 1), ("global_batch_size", 2), ("num_negatives", 1),
                            ("ranks", 0)):  # fmt: skip
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name}={value} must be at least {least}")
        check_threshold(self.threshold)
        if self.memory_gb < 0 or not (self.lr is None or self.lr > 0):
            raise UserError(f"memory_gb={self.memory_gb} must not be negative, lr={self.lr} must be positive")
        if self.steps is not None and (self.steps < 1 or self.epochs > 1):
            raise UserError(f"steps={self.steps} must be at least 1, and in place of epochs={self.epochs}")
        if self.layers and self.method != "layers":
            raise UserError(f"layers={self.layers} is of method=layers, not of {self.method}: add that")
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise UserError(f"formats={self.formats} must be at least one, and none twice")
        if not self.self_pairs.held_out > 0:
            raise UserError("self_pairs.held_out=0 leaves nothing to prove the model on: 0.1 is usual")
        if self.generate.journal:
            raise UserError("generate.journal is the pipeline's own, output/answers: leave it out")
        if strange := sorted(set(self.generate.tasks) - set(OF_DOCUMENTS)):
            raise UserError(
                f"generate.tasks has {strange[0]}, which is not about the documents: the pipeline takes "
                f"{' and '.join(OF_DOCUMENTS)}; launch/synthesize.py and launch/train.py take the others"
            )
