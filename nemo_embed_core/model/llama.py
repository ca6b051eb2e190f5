"""A bidirectional Llama, and its relatives by the facts of model/spec.py, on flat packed tokens, written for
tensor and sequence parallelism.

Reads top to bottom: RoPE table, attention, MLP, block, model, initialisation. Equal to Hugging Face's
LlamaModel and its like, with `config.is_causal = False` and without (tests/model: test_hf, test_families).

    T packed tokens (T / tp_size in norms and residuals under sequence parallelism) · D hidden_size H query
    heads · G KV heads · R = H / G · A head_dim · F intermediate_size · M MLP blocks (config.mlp_blocks) a tp
    rank holds H/tp, G/tp, M/tp; where tp does not divide M or the vocabulary, zeros stand behind the last
    ones

Global row order of the fused weights, so that a plain Shard(0) gives whole groups to every tp rank:
    qkv_proj      per KV group g: [R query heads of g | k_g | v_g]
    gate_up_proj  per block of F/M channels: [gate rows | up rows]; M = G where G divides F
[q; k; v] or [gate; up] stacking would need a permutation that depends on tp_size and breaks resharding.
"""

from __future__ import annotations

import math
import zlib
from functools import partial

import torch
from torch import Tensor, nn

from nemo_embed_core.config import ModelConfig
from nemo_embed_core.kernels.dropout_linear import token_keys
from nemo_embed_core.kernels.rope import split_rope
from nemo_embed_core.kernels.swiglu import swiglu
from nemo_embed_core.model.attention import Attention, Segments
from nemo_embed_core.model.spec import family_of
from nemo_embed_core.parallel.layers import (
    Again,
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from nemo_embed_core.parallel.layout import tp_chunk
from nemo_embed_core.parallel.mesh import TensorParallel


def rope_inv_freq(config: ModelConfig) -> Tensor:
    """[A/2] fp64 rotation per position; rope_scaling divides that of long wavelengths or of all."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    inv_freq = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    if scaling.rope_type == "llama3":
        wavelength = 2 * math.pi / inv_freq
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # 0: low frequency, scaled; 1: high frequency, kept; linear between.
        keep = ((scaling.original_max_position_embeddings / wavelength - low) / (high - low)).clamp(0, 1)
    else:

        def channel(turns: float) -> float:
            """Pairs of channels below this one turn more often over a text of the original length."""
            length = scaling.original_max_position_embeddings / (2 * math.pi * turns)
            return config.head_dim * math.log(length) / (2 * math.log(config.rope_theta))

        first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.head_dim - 1)
        last += 0.001 * (first == last)
        keep = 1 - ((torch.arange(len(inv_freq), dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    return (1 - keep) * inv_freq / scaling.factor + keep * inv_freq


def query_scale(config: ModelConfig, position_ids_T: Tensor, longest: int) -> Tensor | None:
    """[T, 1, 1] factor of q by its position (Ministral 3); None where it is 1 at every position."""
    scaling = config.rope_scaling
    if scaling is None or scaling.llama_4_scaling_beta is None:
        return None
    if longest <= scaling.original_max_position_embeddings:
        return None
    times = position_ids_T.double() // scaling.original_max_position_embeddings
    return (1 + scaling.llama_4_scaling_beta * (1 + times).log())[:, None, None]


def rope_table(
    inv_freq: Tensor, position_ids_T: Tensor, dtype: torch.dtype, magnitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """magnitude x cos, sin [T, A/2] in fp32 (fp64 for fp64 models) of position x inv_freq."""
    angles = position_ids_T[:, None].to(inv_freq.dtype) * inv_freq
    return (magnitude * angles.cos()).to(dtype), (magnitude * angles.sin()).to(dtype)


class LlamaAttention(nn.Module):
    def __init__(self, config: ModelConfig, tp: TensorParallel, attention: Attention):
        super().__init__()
        self.num_heads = config.num_attention_heads // tp.size
        self.num_kv_heads = config.num_key_value_heads // tp.size
        self.head_dim = config.head_dim
        self.attention = partial(attention, causal=True) if config.is_causal else attention
        family = family_of(config)
        qkv_rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, qkv_rows, tp, bias=family.qkv_bias)
        norms = [
            RMSNorm(config.head_dim, config.rms_norm_eps, tp, of_heads=True) if family.qk_norm else None
            for _ in "qk"
        ]
        self.q_norm, self.k_norm = norms
        self.o_proj = RowParallelLinear(config.num_attention_heads * config.head_dim, config.hidden_size, tp)

    def forward(
        self,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        segments: Segments,
        again: Again = None,
        amax: Tensor | None = None,
        q_scale: Tensor | None = None,
        token_keys_T: Tensor | None = None,
    ) -> Tensor:
        qkv = self.qkv_proj(x_TD, again, amax, token_keys_T)  # [T, (H + 2G) / tp * A]
        if self.q_norm is not None and self.k_norm is not None:
            qkv = self._with_normed_heads(qkv, self.q_norm, self.k_norm)
        q_THA, k_TGA, v_TGA = split_rope(qkv, cos, sin, self.num_heads, self.num_kv_heads, self.head_dim)
        q_THA = q_THA if q_scale is None else q_THA * q_scale.to(q_THA.dtype)
        out_TD = self.attention(q_THA, k_TGA, v_TGA, segments).flatten(1)
        return self.o_proj(out_TD, token_keys_T=token_keys_T)

    def _with_normed_heads(self, qkv_TE: Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> Tensor:
        """Each head of q and of k through its RMSNorm (Qwen3)."""
        T, G, A = qkv_TE.shape[0], self.num_kv_heads, self.head_dim
        q, k, v = qkv_TE.view(T, G, -1, A).split([self.num_heads // G, 1, 1], 2)
        q = q_norm(q.reshape(-1, A))[0].view(T, G, -1, A)
        k = k_norm(k.reshape(-1, A))[0].view(T, G, 1, A)
        return torch.cat([q, k, v], 2).view(T, -1)


class LlamaMLP(nn.Module):
    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.num_blocks = tp_chunk(config.mlp_blocks, tp.size)
        F, width = config.intermediate_size, config.intermediate_size // config.mlp_blocks
        self.gate_up_proj = ColumnParallelLinear(config.hidden_size, 2 * F, tp, unit=2 * width)
        self.down_proj = RowParallelLinear(F, config.hidden_size, tp, unit=width)

    def forward(
        self,
        x_TD: Tensor,
        again: Again = None,
        amax: Tensor | None = None,
        token_keys_T: Tensor | None = None,
    ) -> Tensor:
        gate_up, beside = self.gate_up_proj.with_beside(x_TD, again, amax, token_keys_T)  # [T, 2 F / tp]
        kept = gate_up.detach()
        remake = None if again is None else lambda: swiglu(kept, self.num_blocks)[0]
        x_TF, amax = swiglu(gate_up, self.num_blocks, beside)
        return self.down_proj(x_TF, remake, amax, token_keys_T)


class LlamaBlock(nn.Module):
    """selective: outputs of norms and SwiGLU are made again in backward and not saved. Of a token are then
    saved, with H A = D and E = (H + 2 G) A qkv columns, 3 D + E + 2 F numbers instead of 5 D + E + 3 F:
    residual sums and outputs of GEMMs and attention."""

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, attention: Attention, selective: bool = False
    ):
        super().__init__()
        self.selective = selective
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)
        self.self_attn = LlamaAttention(config, tp, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)
        self.mlp = LlamaMLP(config, tp)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        segments: Segments,
        q_scale: Tensor | None = None,
        token_keys_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) -> (x, residual): the addition of x waits for the next norm, where it is fused."""
        is_fp8 = self.self_attn.qkv_proj.fp8 is not None
        x_TD, residual_TD, amax = self.input_layernorm(x_TD, residual_TD, is_fp8)
        again = self._again(self.input_layernorm, residual_TD)
        x_TD = self.self_attn(x_TD, cos, sin, segments, again, amax, q_scale, token_keys_T)
        x_TD, residual_TD, amax = self.post_attention_layernorm(x_TD, residual_TD, is_fp8)
        again = self._again(self.post_attention_layernorm, residual_TD)
        return self.mlp(x_TD, again, amax, token_keys_T), residual_TD

    def _again(self, norm: RMSNorm, sum_TD: Tensor) -> Again:
        """The output of the norm once more, from the sum that its own backward needs too."""
        kept = sum_TD.detach()
        return (lambda: norm(kept)[0]) if self.selective else None


class Llama(nn.Module):
    """input_ids [T], position_ids [T], segments -> hidden states after the final norm."""

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, attention: Attention, selective: bool = False
    ):
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleList(
            LlamaBlock(config, tp, attention, selective) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)
        self.inv_freq: Tensor | None = None  # made on first use: built on the meta device it would stay there
        self.dropout_key: int | None = None  # run_key of the step, where LoRA has dropout

    def forward(self, input_ids_T: Tensor, position_ids_T: Tensor, segments: Segments) -> Tensor:
        x_TD = self.embed_tokens(input_ids_T)
        if self.inv_freq is None or self.inv_freq.device != x_TD.device:
            self.inv_freq = rope_inv_freq(self.config).to(x_TD.device)
        # The angles are made in fp64: a position of 100,000 in fp32 is off by up to 0.004 rad.
        wide, scaling = torch.promote_types(x_TD.dtype, torch.float32), self.config.rope_scaling
        cos, sin = rope_table(self.inv_freq, position_ids_T, wide, scaling.magnitude if scaling else 1.0)
        q_scale = query_scale(self.config, position_ids_T, segments.max_seqlen)
        token_keys_T = None
        if self.training and self.dropout_key is not None:
            token_keys_T = token_keys(self.dropout_key, input_ids_T, position_ids_T, segments.cu_seqlens)
        residual_TD = None
        for layer in self.layers:
            x_TD, residual_TD = layer(x_TD, residual_TD, cos, sin, segments, q_scale, token_keys_T)
        return self.norm(x_TD, residual_TD)[0]


def initial_weight(name: str, shape: torch.Size | tuple[int, ...], seed: int, std: float) -> Tensor:
    """The whole fp32 tensor of random weights: a function of (seed, name) only, so every layout starts from
    the same.

    Norms are ones, biases zeros, matrices normal(0, std) as in Hugging Face's Llama.
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.randn(shape, generator=generator) * std
