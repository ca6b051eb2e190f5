"""Options of LoRA (model/lora.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # the linear layers of a block


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Options, section="lora"):
    """Low-rank adapters in place of full training: W + alpha / rank B A with W as in init_from, which stays
    as it is; weights and optimizer state of A [rank, in] and B [out, rank] alone are kept and saved
    (docs/training.md)."""

    rank: int = 0
    """Rows of A and columns of B; 0: no adapters, all weights are trained."""
    alpha: float = 32.0
    """B A is added alpha / rank times."""
    dropout: float = 0.0
    """In training, this share of the values that go into A, 0.0 to below 1.0, is 0 and the others are divided
    by 1 - dropout; which ones follows from seed, step and text, not from the layout."""
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    """Linear layers of every block that get adapters: qkv_proj (q, k and v, which share an A), o_proj,
    gate_up_proj (both share an A), down_proj."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0 or not self.alpha > 0:
            raise UserError(f"lora.rank={self.rank} must not be negative, lora.alpha={self.alpha} positive")
        if not 0 <= self.dropout < 1 or (self.dropout and not self.rank):
            raise UserError(
                f"lora.dropout={self.dropout} must be 0 or more and below 1, and 0 where there are no "
                f"adapters (lora.rank={self.rank})"
            )
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise UserError(f"lora.targets has {unknown[0]!r}; it takes {', '.join(TARGETS)}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(f"lora.targets={self.targets} must be one or more different layers")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
