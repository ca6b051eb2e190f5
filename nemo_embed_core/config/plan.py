"""Options of launch/plan.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Options, section="cluster"):
    """The machines."""

    gpu: Literal["L4", "A100-80GB", "H100", "H200"] = "H100"
    """Kind of the GPUs (SXM), whose facts are in nemo_embed_core/plan/hardware.py."""
    per_node: int = 8
    """GPUs of a node."""
    nodes: int = 1
    """Nodes."""
    node_link: float = 0.0
    """GB/s that a GPU reaches to another one of its node, in one direction; 0: what is known of the kind."""
    network_link: float = 45.0
    """GB/s that a GPU reaches to another node, in one direction: 45 of a 400 Gbit/s card for each GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_node < 1 or self.nodes < 1 or self.node_link < 0 or not self.network_link > 0:
            raise UserError(
                f"cluster: per_node={self.per_node} and nodes={self.nodes} must be at least 1, "
                f"node_link={self.node_link} must not be negative, "
                f"network_link={self.network_link} must be positive"
            )

    @property
    def world_size(self) -> int:
        return self.per_node * self.nodes


@dataclass(frozen=True, kw_only=True)
class LengthsConfig(Options, section="lengths"):
    """How long the texts are, where there is no store to look it up: lognormal, cut to the maximal
    lengths."""

    query_mean: float = 14.0
    """Mean tokens of a query."""
    query_p95: float = 26.0
    """Tokens that 95 % of the queries do not exceed; the mean itself: all have as many."""
    document_mean: float = 105.0
    """Mean tokens of a document."""
    document_p95: float = 249.0
    """Tokens that 95 % of the documents do not exceed; the mean itself: all have as many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in ("query", "document"):
            mean, p95 = getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_p95")
            # exp(1.645^2 / 2): beyond, no lognormal has such a 95th percentile.
            if not 2 <= mean <= p95 <= 3.8 * mean:
                raise UserError(
                    f"lengths.{kind}_mean={mean} must be at least 2 and {kind}_p95={p95} between it and "
                    f"3.8 times it"
                )


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Options):
    """What a training run would need and take on a cluster that need not be there: memory, wire, hours,
    layouts."""

    train: list[str] | str
    """YAML of the run, as --config of launch/train.py takes it, several in its order (--train A B); init_from
    may be missing: `model` is then its shape."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    lengths: LengthsConfig = field(default_factory=LengthsConfig)
    store: str = ""
    """Folder of a token store (data.cache_dir/DIGEST), whose real lengths count; "": those of `lengths`."""
    tp_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Tensor-parallel sizes to try; those that do not divide the KV heads or a node are left out."""
    max_tokens: list[int] = field(default_factory=lambda: [8192, 16384, 32768])
    """Tokens of a micro-batch to try, besides the file's."""
    top: int = 5
    """Layouts to print, best first."""
    output: str = ""
    """JSON file with everything that is printed, of all layouts; "": none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1 or not self.tp_sizes or min([*self.tp_sizes, *self.max_tokens], default=1) < 1:
            raise UserError(
                f"top={self.top}, tp_sizes={self.tp_sizes} and max_tokens={self.max_tokens} must "
                f"be at least 1"
            )

    @property
    def files(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else list(self.train)
