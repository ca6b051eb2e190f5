"""Options of launch/synthesize.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

Way = Literal["title", "heading", "summary", "question", "sentence"]


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
class SynthesizeConfig(Options):
    """Training pairs out of documents, as dataset folders."""

    output: str
    """Folder to write: dataset folders output/train and output/test."""
    documents: str = ""
    """Folder of documents: Markdown, HTML, reStructuredText, plain text (a PDF's too), Python, also .gz."""
    task: str = "Given a title, a question or a statement, retrieve documents that it is about"
    """Instruction of the queries that documents give themselves."""
    licence: str = ""
    """Licence of the documents, which the dataset's metadata then has."""
    seed: int = 0
    """Decides every draw: which documents are held out, which sentences are taken out."""
    self_pairs: SelfPairsConfig = field(default_factory=SelfPairsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.documents:
            raise UserError("documents is missing: give the folder that the documents are in")
