"""Documents, a base and options of a pipeline of toys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import WORDS, write_hf
from toy_steps import Forked, Reloads

from nemo_embed_core.config import PipelineConfig

HELD_OUT, NUMBER = 0.3, 30


def write_documents(folder: Path, number: int = NUMBER) -> Path:
    """guide-I.md: a title and three sections of prose over a dozen words, with markup that a page escapes."""
    rng = np.random.default_rng(7)
    folder.mkdir(exist_ok=True)
    for i in range(number):
        first, second = rng.choice(WORDS, 2, replace=False)
        sections = []
        for j in range(3):
            prose = " ".join(
                f"The {first} of {i} {word} moves the {second} <b>{j}</b> & turns quiet."
                for word in rng.choice(WORDS, 4)
            )
            sections.append(f"## The {rng.choice(WORDS)} and the {first} {i} {j}\n\n{prose}\n")
        (folder / f"guide-{i}.md").write_text(f"# About {first} and {second} {i}\n\n" + "\n".join(sections))
    return folder


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of PipelineConfig; documents and base are written where they are not there."""
    if not (folder / "docs").exists():
        write_documents(folder / "docs")
        write_hf(folder / "base", torch.float32)
    return {
        "documents": str(folder / "docs"), "base": str(folder / "base"), "output": str(folder / "out"),
        "task": "find it", "global_batch_size": 8, "steps": 3, "lr": 1e-3, "query_max_length": 96,
        "document_max_length": 64, "num_negatives": 1, "device": "cpu", "memory_gb": 64.0, "seed": 3,
        "method": "full", "self_pairs": {"held_out": HELD_OUT}, **changes,
    }  # fmt: skip


def config(folder: Path, **changes: Any) -> PipelineConfig:
    return PipelineConfig.from_dict(options(folder, **changes))


def piped(given: dict[str, Any]) -> None:
    """The pipeline, its stages and their reloads as forks, where everything fits. At the top level, so that
    a server of forks finds it."""
    from nemo_embed_core.errors import user_errors
    from nemo_embed_core.export import consumers
    from nemo_embed_core.pipeline.run import run
    from nemo_embed_core.plan import plan
    from nemo_embed_core.steps import runner

    plan.peak_of = lambda *_: 0  # seconds for each call; test_method.py has it
    runner._start = Forked  # type: ignore[assignment]
    consumers.subprocess = Reloads  # type: ignore[assignment]
    with user_errors():
        run(PipelineConfig.from_dict(given))


def preload(server: Any) -> None:
    names = ("AutoModel", "AutoTokenizer", "LlamaModel")
    server.preload(*(f"transformers:{name}" for name in names), "sentence_transformers:SentenceTransformer")
    server.preload("nemo_embed_core.evaluation.run", "nemo_embed_core.mine.run", "mteb", "datasketch")
    server.preload(
        "nemo_embed_core.pipeline.page", "nemo_embed_core.plan.plan", "nemo_embed_core.merge.merge"
    )
