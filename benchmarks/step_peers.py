"""What the step benchmark compares with: Llamas as Hugging Face and plain torch have them, padded, and the
gate that says whether a peer is the same model as ours.

The peers get the same groups (a query, its positive, its hard negatives) and the same loss, as it is commonly
written: queries and passages as two forwards, padded to the longest of the micro-batch, SDPA, fused AdamW
with weights and moments in bf16 (fewer bytes than ours: the comparison is against the cheaper optimizer).
Other libraries: step_libraries.py.

T packed tokens · N padded sequences · L longest of them · B queries · M = 1 + K passages of a query · D
hidden_size H query heads · G KV heads · A head_dim
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step_data import TEMPERATURE, GlobalBatch, Groups, Padded, global_batches
from benchmarks.step_ours import Ours, peer_weights
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.parallel.mesh import Mesh


class PaddedLayer(nn.Module):
    """LlamaDecoderLayer without a mask other than the padding's."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        D, F_, A = model.hidden_size, model.intermediate_size, model.head_dim
        self.head_dim, self.repeats = A, model.num_attention_heads // model.num_key_value_heads
        q, kv = model.num_attention_heads * A, model.num_key_value_heads * A

        def linears(**sizes: tuple[int, int]) -> nn.ModuleDict:
            return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

        self.input_layernorm = nn.RMSNorm(D, model.rms_norm_eps)
        self.self_attn = linears(q_proj=(D, q), k_proj=(D, kv), v_proj=(D, kv), o_proj=(q, D))
        self.post_attention_layernorm = nn.RMSNorm(D, model.rms_norm_eps)
        self.mlp = linears(gate_proj=(D, F_), up_proj=(D, F_), down_proj=(F_, D))

    def forward(self, x_NLD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        h, attn, mlp = self.input_layernorm(x_NLD), self.self_attn, self.mlp
        q, k, v = (
            attn[n](h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (
            x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin
            for x in (q, k)
        )
        # Not enable_gqa: with a mask it excludes the fused kernels.
        k, v = (x.repeat_interleave(self.repeats, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x_NLD = x_NLD + attn["o_proj"](out)
        h = self.post_attention_layernorm(x_NLD)
        return x_NLD + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))


class PaddedLlama(nn.Module):
    """Hugging Face's LlamaModel with is_causal=False, for machines without transformers; the same parameter
    names."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(PaddedLayer(model) for _ in range(model.num_hidden_layers))
        self.norm = nn.RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.inv_freq = model.rope_theta ** (
            -torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x_NLD = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.float64)
        angles = (positions[:, None] * self.inv_freq.to(input_ids.device)).repeat(1, 2)
        cos, sin = angles.cos().to(x_NLD.dtype), angles.sin().to(x_NLD.dtype)
        for layer in self.layers:
            x_NLD = layer(x_NLD, cos, sin, attention_mask[:, None, None])
        return self.norm(x_NLD)


def hf_llama(model: ModelConfig, attention: str = "sdpa") -> nn.Module:
    """attention: by a name that transformers knows."""
    from transformers import LlamaConfig, LlamaModel

    ours = ("rope_theta", "rope_scaling", "model_type", "is_causal", "pooling")
    sizes = {k: v for k, v in asdict(model).items() if k not in ours}
    rope_parameters = {"rope_type": "default", "rope_theta": model.rope_theta}
    return LlamaModel(
        LlamaConfig(
            **sizes,
            rope_parameters=rope_parameters,
            is_causal=False,
            use_cache=False,
            attn_implementation=attention,
        )
    )


class Peer:
    """Two padded forwards, masked mean, F.cross_entropy, clip_grad_norm_, fused AdamW, all in `dtype`."""

    kind = "padded"

    def __init__(
        self,
        name: str,
        build: Callable[[ModelConfig], nn.Module],
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        train: bool = True,
    ):
        self.name, self.device = name, device
        self.compiled_forwards: list[Callable[..., Any]] = []
        before = torch.get_default_dtype()
        # Not .to(dtype) afterwards: that would round Hugging Face's inv_freq buffer.
        torch.set_default_dtype(dtype)
        try:
            with device:
                self.model = build(model)
        finally:
            torch.set_default_dtype(before)
        self.model.requires_grad_(train)
        self.optimizer = (
            torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
            if train
            else None
        )

    @torch.no_grad()
    def copy_from(self, encoder: nn.Module, model: ModelConfig) -> None:
        mine = dict(self.model.named_parameters())
        for name, w in peer_weights(encoder, model):
            mine.pop(name).copy_(w)
        assert not mine, f"{list(mine)} of the peer got no value"

    def compile_layers(self, compiled: bool) -> None:
        """torch.compile of the block, once for all layers, for shapes that change; or back to eager."""
        layers = list(self.model.layers)  # type: ignore[arg-type]
        if compiled and not self.compiled_forwards:
            torch._dynamo.reset()  # a limited number of compilations per function is kept
            self.compiled_forwards = [torch.compile(layer.forward, dynamic=True) for layer in layers]
        for i, layer in enumerate(layers):
            layer.__dict__.pop("forward", None)
            if compiled:
                layer.forward = self.compiled_forwards[i]

    def batches(self, groups: Groups, batch: GlobalBatch, batch_size: int) -> list[Any]:
        """Micro-batches of batch_size queries, on the host; each has num_rows and num_positions."""
        return batch.padded(groups, batch_size)

    def embed(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """[N, D] unit rows, fp32."""
        hidden = self.model(input_ids=ids_NL, attention_mask=mask_NL)
        hidden_NLD = hidden if isinstance(hidden, Tensor) else hidden.last_hidden_state
        sums_ND = hidden_NLD.masked_fill(~mask_NL[..., None], 0).sum(1, dtype=torch.float32)
        return F.normalize(sums_ND / mask_NL.sum(1, keepdim=True), dim=-1)

    def groups(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """q [B, D] and its passages [B, M, D]."""
        batch = batch.to(self.device)
        q_BD = self.embed(batch.query_ids, batch.query_mask)
        return q_BD, self.embed(batch.document_ids, batch.document_mask).unflatten(0, (len(q_BD), -1))

    def backward(self, batches: Sequence[Any]) -> Tensor:
        """loss [B]"""
        rows, losses = sum(batch.num_rows for batch in batches), []
        for batch in batches:
            q_BD, d_BMD = self.groups(batch)
            logits = torch.einsum("bd,bmd->bm", q_BD, d_BMD).float() / TEMPERATURE
            losses_B = F.cross_entropy(
                logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="none"
            )
            (losses_B.sum() / rows).backward()
            losses.append(losses_B.detach())
        return torch.cat(losses)

    def step(self, batches: Sequence[Any]) -> float:
        assert self.optimizer is not None
        losses_B = self.backward(batches)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        loss, _ = torch.stack([losses_B.mean(), norm]).tolist()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


MakePeer = Callable[..., Peer]  # (model, device, dtype, train=True)


def plain_torch(*args: Any, **options: Any) -> Peer:
    return Peer("plain torch Llama", PaddedLlama, *args, **options)


def transformers_llama(*args: Any, **options: Any) -> Peer:
    return Peer("transformers LlamaModel", hf_llama, *args, **options)


# ------------------------------------------------------------------------------- correctness, before any time

GATE_SHAPE = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def gate(make: MakePeer, mesh: Mesh) -> dict[str, float]:
    """Ours against the peer with the same weights on the same groups; AssertionError when they are not the
    same model.

    fp32: losses and embeddings to 1e-4, all gradients to 1e-3 of their norm. bf16, for which a GPU has other
    attention kernels: our embeddings may be at most twice as far from the fp32 ones as the peer's.
    """
    groups = Groups(6, 4, GATE_SHAPE.vocab_size, seed=1, longest=70)
    (batch,) = global_batches(groups, GATE_SHAPE, num_queries=6, max_tokens=800)
    assert len(batch.micro_batches) > 1, "the gate must accumulate over micro-batches"

    def peer_embeddings(peer: Peer) -> Tensor:
        with torch.no_grad():
            rows = map(peer.groups, peer.batches(groups, batch, 4))
            return torch.cat([torch.cat([q[:, None], d], 1) for q, d in rows]).float()

    ours, peer = (
        Ours(GATE_SHAPE, mesh, torch.float32, std=0.1),
        make(GATE_SHAPE, mesh.device, torch.float32),
    )
    peer.copy_from(ours.encoder, GATE_SHAPE)
    mine, rows = ours.groups(batch)
    order = torch.from_numpy(np.argsort(rows)).to(mesh.device)
    peer_order = torch.from_numpy(np.argsort(batch.rows)).to(mesh.device)
    truth = peer_embeddings(peer)[peer_order]
    errors = {"embeddings": (mine[order] - truth).abs().max().item()}
    my_losses, peer_losses = (
        ours.backward(batch)[order],
        peer.backward(peer.batches(groups, batch, 4))[peer_order],
    )
    errors["losses"] = (my_losses - peer_losses).abs().max().item()
    grads = {name: p.grad for name, p in peer.model.named_parameters() if p.grad is not None}
    difference = norm = 0.0
    for name, grad in peer_weights(ours.encoder, GATE_SHAPE, lambda p: p.grad):  # type: ignore[arg-type, return-value]
        difference += (grad - grads[name]).double().square().sum().item()
        norm += grads[name].double().square().sum().item()
    errors["gradients"] = math.sqrt(difference / norm)
    assert errors["embeddings"] < 1e-4 and errors["losses"] < 1e-4 and errors["gradients"] < 1e-3, errors
    half, half_peer = (
        Ours(GATE_SHAPE, mesh, torch.bfloat16, std=0.1),
        make(GATE_SHAPE, mesh.device, torch.bfloat16),
    )
    half_peer.copy_from(ours.encoder, GATE_SHAPE)
    errors["bf16"] = (half.groups(batch)[0][order] - truth).norm().item() / len(truth) ** 0.5
    errors["bf16 of the peer"] = (peer_embeddings(half_peer)[peer_order] - truth).norm().item() / len(
        truth
    ) ** 0.5
    assert errors["bf16"] < 2 * errors["bf16 of the peer"], errors
    return errors
