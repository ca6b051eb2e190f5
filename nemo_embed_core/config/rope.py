"""How the positions of a model were stretched."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

RopeType = Literal["llama3", "linear", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Options, section="rope_scaling"):
    """`rope_scaling` of a config.json; which fields count depends on rope_type."""

    rope_type: RopeType = "llama3"
    """llama3: long wavelengths are stretched (Llama 3.1); linear: all are; yarn: long ones, and attention is
    sharpened (arXiv:2309.00071)."""
    factor: float = 8.0
    """Wavelengths longer than the low-frequency bound are stretched by this factor; linear: all."""
    low_freq_factor: float = 1.0
    """llama3: the low-frequency bound is original_max_position_embeddings / low_freq_factor, in tokens."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor tokens are kept; between,
    a blend."""
    original_max_position_embeddings: int = 8192
    """Longest text, in tokens, before the wavelengths were stretched."""
    beta_fast: float = 32.0
    """yarn: wavelengths of which that text has more turns are kept."""
    beta_slow: float = 1.0
    """yarn: wavelengths of which that text has fewer turns are stretched; between, a blend."""
    truncate: bool = True
    """yarn: the blend begins and ends at whole channels."""
    attention_factor: float | None = None
    """yarn: of q and of k; null: by mscale, or where these are null 0.1 ln(factor) + 1."""
    mscale: float | None = None
    """yarn: (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1) is the attention_factor."""
    mscale_all_dim: float | None = None
    """yarn: as above."""
    llama_4_scaling_beta: float | None = None
    """yarn of Ministral 3: b in 1 + b ln(1 + floor(position / original_max_position_embeddings)), a factor
    of q."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("rope_type", "truncate") or (value is None and f.default is None):
                continue
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise UserError(f"rope_scaling.{f.name}={value!r} must be a positive number")
        if self.llama_4_scaling_beta is not None and self.rope_type != "yarn":
            raise UserError(
                f"rope_scaling.llama_4_scaling_beta={self.llama_4_scaling_beta} is of rope_type=yarn, not "
                f"{self.rope_type}"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise UserError(
                    f"rope_scaling.{low}={getattr(self, low)} must be below {high}={getattr(self, high)}"
                )

    @property
    def magnitude(self) -> float:
        """Factor of cos and sin, and so of q and of k."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        log = 0.1 * math.log(max(self.factor, 1.0))
        if self.mscale is not None and self.mscale_all_dim is not None:
            return (self.mscale * log + 1) / (self.mscale_all_dim * log + 1)
        return log + 1
