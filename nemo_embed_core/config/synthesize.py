"""Options of launch/synthesize.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

Way = Literal["title", "heading", "summary", "question", "sentence"]
TaskName = Literal[
    "question", "claim", "keywords", "problem", "description", "document-question", "document-keywords",
    "multi-hop", "sentiment", "topic", "intent", "similarity", "translation",
]  # fmt: skip
LanguageName = Literal[
    "English", "German", "French", "Spanish", "Portuguese", "Italian", "Dutch", "Polish", "Russian",
    "Ukrainian", "Chinese", "Japanese", "Korean", "Arabic", "Hindi",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SelfPairsConfig(Options, section="self_pairs"):
    """Chunks of documents, and pairs that are made of them without a model."""

    ways: list[Way] = field(default_factory=lambda: list(get_args(Way)))
    """Queries that are taken: a document's title, a section's heading, a summary (a docstring's first
    paragraph, an abstract), a question, a sentence; each is taken out of its document."""
    held_out: float = 0.1
    """Share of the documents whose pairs are for evaluation (test), whole documents by their paths."""
    min_chars: int = 80
    """Characters that a chunk has at least; shorter ones are left out, counted."""
    max_chars: int = 1500
    """Characters of a chunk at most: it ends where a block of its section or else a sentence ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ways:
            raise UserError(f"self_pairs.ways is empty: give some of {', '.join(get_args(Way))}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"self_pairs.held_out={self.held_out} must be at least 0 and below 1")
        if not 1 <= self.min_chars <= self.max_chars // 2:
            raise UserError(
                f"self_pairs.min_chars={self.min_chars} must be at least 1 and at most half of "
                f"self_pairs.max_chars={self.max_chars}"
            )


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(Options, section="generate.models"):
    """A model that writes."""

    name: str
    """Its name at the endpoint, or the folder of a causal language model on this machine."""
    base_url: str = ""
    """Endpoint of the OpenAI protocol, as http://localhost:8000/v1; "": `name` is a folder, run by
    transformers."""
    key_env: str = ""
    """Environment variable that holds the key; "": the server wants none."""
    weight: float = 1.0
    """Share of the requests that it gets, relative to the others'."""
    licence: str = ""
    """Licence of what it writes, for the dataset's metadata."""
    max_in_flight: int = 16
    """Requests that it has at a time."""
    requests_per_minute: int = 0
    """Requests a minute at most; 0: no limit but the server's own, which is obeyed."""
    tokens_per_minute: int = 0
    """Tokens a minute at most, those that an answer may have counted; 0: no limit."""
    input_price: float = 0.0
    """Price of a million tokens of prompts, in the budget's currency."""
    output_price: float = 0.0
    """Price of a million tokens of answers."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the longest answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0 or self.max_in_flight < 1:
            raise UserError(
                f"generate.models: {self.name}: weight={self.weight:g} must be positive and "
                f"max_in_flight={self.max_in_flight} at least 1"
            )
        for field_name in ("requests_per_minute", "tokens_per_minute", "input_price", "output_price"):
            if (value := getattr(self, field_name)) < 0:
                raise UserError(f"generate.models: {self.name}: {field_name}={value} must not be negative")
        if self.base_url and not self.base_url.startswith(("http://", "https://")):
            raise UserError(
                f"generate.models: {self.name}: base_url={self.base_url} must begin with http(s)://"
            )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Options, section="generate"):
    """What is asked of models, and which of their answers are taken."""

    models: list[GeneratorConfig] = field(default_factory=list)
    """Models that write; []: pairs are made of the documents alone (self_pairs)."""
    requests: int = 1000
    """Requests in all; each gives a row, or none where its answer is not taken."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Tasks and their weights (docs/synthesis.md lists them); {}: all that the documents and languages allow,
    alike."""
    languages: list[LanguageName] = field(default_factory=lambda: ["English"])
    """Languages of the texts, drawn alike; translation is between two of them."""
    temperature: float = 0.8
    """Of the draws of an answer's tokens; 0: the likeliest."""
    max_output_tokens: int = 1500
    """Tokens of an answer at most; one that reaches it is left out."""
    budget: float | None = None
    """What the requests may cost in all, with those that are perhaps paid without an answer; null: no end."""
    timeout_s: float = 120.0
    """Seconds that an answer may take."""
    attempts: int = 6
    """Times that a request is sent before it is given up."""
    backoff_s: float = 1.0
    """Seconds before the second attempt, doubled with each, up to a minute; where the server says
    Retry-After, that."""
    embedder: str = ""
    """Folder of an embedding model, or bm25, that has to find a row's document; "": none."""
    top_k: int = 20
    """Places among which `embedder` has to find it, of all documents of the task."""
    journal: str = ""
    """File of all answers, which several outputs may share, one at a time: none asks for what another one
    has; "": output/journal.jsonl."""
    judge: GeneratorConfig | None = None
    """Model that grades each document for its query from 0 to 5; null: none."""
    judge_grade: int = 3
    """Grade that a positive has to have, and a hard negative must not have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.tasks) - set(get_args(TaskName))):
            raise UserError(
                f"generate.tasks has {', '.join(unknown)}; there are: {', '.join(get_args(TaskName))}"
            )
        if not all(weight > 0 for weight in self.tasks.values()):
            raise UserError("generate.tasks: weights must be positive; leave a task out for 0")
        if not self.languages or len(set(self.languages)) < len(self.languages):
            raise UserError("generate.languages must be at least one, and none twice")
        for name, least in (("requests", 1), ("max_output_tokens", 1), ("attempts", 1), ("top_k", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"generate.{name}={value} must be at least {least}")
        if self.temperature < 0 or self.timeout_s <= 0 or self.backoff_s < 0:
            raise UserError(
                f"generate: temperature={self.temperature} and backoff_s={self.backoff_s} must not be "
                f"negative, timeout_s={self.timeout_s} must be positive"
            )
        if self.budget is not None and self.budget < 0:
            raise UserError(f"generate.budget={self.budget} must not be negative; null: no end")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise UserError(f"generate.models: two are called {max(names, key=names.count)}; give each once")
        if not 1 <= self.judge_grade <= 5:
            raise UserError(f"generate.judge_grade={self.judge_grade} must be 1 to 5")


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig(Options):
    """Training data where there is none, as dataset folders: pairs out of documents themselves, or rows that
    models write."""

    output: str
    """Folder to write: output/train and output/test, of documents; with models output/datasets/TASK, beside
    output/journal.jsonl, which has every answer."""
    documents: str = ""
    """Folder of documents: Markdown, HTML, reStructuredText, plain text (a PDF's too), Python, also .gz. With
    models those that are not held out are seeds: queries are written for their chunks."""
    max_documents: int = 0
    """Files of `documents` that are read at most, a sample by their paths and the seed; 0: all."""
    task: str = "Given a title, a question or a statement, retrieve documents that it is about"
    """Instruction of the queries that documents give themselves."""
    licence: str = ""
    """Licence of the documents, which the dataset's metadata then has."""
    seed: int = 0
    """Decides every draw: which documents are held out, which sentences are taken out, what is asked for."""
    self_pairs: SelfPairsConfig = field(default_factory=SelfPairsConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_documents < 0:
            raise UserError(f"max_documents={self.max_documents} must not be negative; 0 reads all")
        if not self.documents and not self.generate.models:
            raise UserError(
                "documents is missing: give the folder that the documents are in, or generate.models that "
                "write without any"
            )
