"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_embed_core.config.rope import RopeScaling
from nemo_embed_core.errors import UserError
from nemo_embed_core.options import Options

Pooling = Literal["mean", "last", "cls", "weightedmean"]
ModelType = Literal["llama", "mistral", "ministral3", "qwen2", "qwen3"]
Q_SCALED: ModelType = "ministral3"  # its q has a factor that grows with its position, by llama_4_scaling_beta


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options, section="model"):
    """The shape of a model, under the names of Hugging Face's LlamaConfig, its attention and its pooling."""

    model_type: ModelType = "llama"
    """What its blocks have: qwen2 biases of q, k and v, qwen3 norms of the heads of q and k; SmolLM is a
    llama."""
    vocab_size: int = 128256
    """Tokens in the vocabulary: rows of the embedding."""
    hidden_size: int = 4096
    """Channels of a token between blocks, and of an embedding."""
    intermediate_size: int = 14336
    """Channels inside the MLP."""
    num_hidden_layers: int = 32
    """Blocks."""
    num_attention_heads: int = 32
    """Query heads; a multiple of num_key_value_heads."""
    num_key_value_heads: int = 8
    """Key and value heads."""
    head_dim: int = 0
    """Channels of a head, even; 0: hidden_size / num_attention_heads."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square of the channels before the root is taken."""
    rope_theta: float = 500000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Stretching of rotary wavelengths; null: none."""
    max_position_embeddings: int = 131072
    """Longest text in tokens: recorded, not enforced, since RoPE has no table here."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    is_causal: bool = False
    """Every token sees those before it alone: the baseline of an experiment; with init_from too."""
    pooling: Pooling = "mean"
    """How the hidden states of a text become one vector; with init_from too. mean: of all tokens; last, cls:
    the last or the first token's; weightedmean: of all tokens, the n-th with weight n."""

    def __post_init__(self) -> None:
        super().__post_init__()  # a config.json or manifest may hold anything
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
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise UserError(
                f"model.num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}; "
                "every KV head serves the same number of query heads"
            )
        if self.head_dim == 0:
            if self.hidden_size % heads:
                raise UserError(
                    f"model.hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                    "change one or set model.head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        has_scale = self.rope_scaling is not None and self.rope_scaling.llama_4_scaling_beta is not None
        if has_scale != (self.model_type == Q_SCALED):
            has = "has no" if has_scale else "needs a"
            raise UserError(f"model.model_type={self.model_type} {has} rope_scaling.llama_4_scaling_beta")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs of channels")

    @property
    def mlp_blocks(self) -> int:
        """Blocks of [gate rows | up rows] in the fused weight, as checkpoints store it; the shape decides.

        One per KV head where the heads divide intermediate_size: tensor parallelism, which divides them too,
        then cuts between blocks. Elsewhere (Llama-2-13B: 13824 and 40) blocks of at most 64 channels, of
        which every rank takes equally many; the last ranks' may be padding.
        """
        channels, heads = self.intermediate_size, self.num_key_value_heads
        if channels % heads == 0:
            return heads
        largest = max(1, min(64, channels // heads))
        return channels // next(n for n in range(largest, 0, -1) if channels % n == 0)
