"""The formats of an export: the same tensors for different readers. No torch import: the launcher lists them.

A new one of the same tensors is an entry here, its model_type in model/spec.py and the code that it brings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nemo_embed_core.config import ModelConfig
from nemo_embed_core.errors import UserError

Format = Literal["native", "compat"]


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """How a folder of this format differs from the others."""

    model_type: str = ""  # of its code; "": the model's own (model/spec.py)
    readers: str  # the least that reads it, for --help
    transformers_4: bool = False  # whether its tokenizer must load there too
    # Copied beside the weights as it is, never imported by this package; users trust it by trust_remote_code.
    code: Path | None = None
    auto_map: Mapping[str, str] = field(default_factory=dict)  # transformers' class -> MODULE.CLASS of `code`
    requirements: tuple[str, ...]  # lines of the model card


FORMATS: Mapping[Format, ExportFormat] = {
    "native": ExportFormat(
        readers="transformers >= 5.2",
        requirements=(
            "It needs transformers >= 5.2: older versions ignore `is_causal: false` in config.json, "
            "run the model with a causal",
            "mask and return other vectors without an error.",
        ),
    ),
    "compat": ExportFormat(
        model_type="llama_bidirec",
        readers=">= 4.51",
        transformers_4=True,
        code=Path(__file__).with_name("remote") / "modeling_llama_bidirec.py",
        auto_map={
            "AutoConfig": "modeling_llama_bidirec.LlamaBidirectionalConfig",
            "AutoModel": "modeling_llama_bidirec.LlamaBidirectionalModel",
        },
        requirements=(
            "It needs transformers >= 4.51 and `trust_remote_code=True`, which runs the fifty lines of",
            "`modeling_llama_bidirec.py` in this folder: transformers before 5.2 has no Llama without a "
            "causal mask.",
        ),
    ),
}


def check_format(format: Format, model: ModelConfig) -> None:
    """UserError for a model that the format's code does not compute."""
    if FORMATS[format].code is not None and (model.model_type != "llama" or model.is_causal):
        causal = "causal " if model.is_causal else ""
        raise UserError(
            f"format={format} brings the code of a bidirectional Llama, and this is a "
            f"{causal}{model.model_type}: use format=native"
        )
