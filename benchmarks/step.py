"""A training step, encoding, and what a step is made of, at Llama shapes, beside padded peers in one process.

    python -m benchmarks.step                         both shapes, everything; meant for 3 minutes on one H200
    python -m benchmarks.step --shape 8b --layers 4 --only train,profile
    python -m benchmarks.step --shape tiny --device cpu      what a machine without a GPU runs by itself

Ours is the code that trains: packed micro-batches, train/engine.py, clipping, AdamW with fp32 masters, kept
as --master-weights says. The peers get the same groups (a query, its positive, its hard negatives) and the
same loss, as it is commonly written: queries and passages as two forwards, padded to the longest of the
micro-batch, SDPA, fused AdamW with weights and moments in bf16 (fewer bytes than ours: the comparison is
against the cheaper optimizer). Before anything is timed, losses, embeddings and gradients of both are
compared.

Only *useful* tokens count, never padding. MFU is train/metrics.py: training_flops of the useful tokens (6 P T
+ full attention, no embedding, no recomputation) over the datasheet's dense bf16 peak; encoding counts a
third of it. Needs torch, triton and numpy; the Hugging Face peer is used when transformers is importable,
else the same model below.

    T packed tokens · N padded sequences · L longest of them · B queries · M = 1 + K passages of a query · D
    hidden_size H query heads · G KV heads · A head_dim
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from benchmarks.ceilings import ResultsFile, matmul_rates
from nemo_embed_core.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from nemo_embed_core.data.packing import MicroBatch, load_batch, pack_texts
from nemo_embed_core.data.sampler import Sampler, choose_documents
from nemo_embed_core.errors import UserError
from nemo_embed_core.kernels import info_nce_columns, info_nce_own, mean_pool, rms_norm, rope, swiglu
from nemo_embed_core.model.attention import Segments, pick_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.parallel import fsdp
from nemo_embed_core.parallel.grad_norm import local_tensor
from nemo_embed_core.parallel.mesh import Mesh, TensorParallel, distributed, pick_device
from nemo_embed_core.train.engine import Engine
from nemo_embed_core.train.metrics import ToHost, device_peak_flops, training_flops
from nemo_embed_core.train.step import embed

SHAPES = {
    # Llama-3.2-1B, head_dim 64.
    "1b": ModelConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
    "8b": ModelConfig(),  # Llama-3.1-8B
    # 28 M parameters, 9 M of them in GEMMs, as small encoders divide them: what a CPU can step through.
    "tiny": ModelConfig(
        vocab_size=49152, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2,
    ),
}  # fmt: skip
# Layers of the training step by default. All 32 of the 8B need 135 GB for weights, moments and fp32 gradients
# alone.
TRAIN_LAYERS = {"8b": 8}
# Queries per micro-batch of the peers. 1 is the published recipe's; it is too slow to repeat for every shape.
PEER_BATCHES = {"1b": [4, 16], "8b": [1, 4, 16], "tiny": [1, 4]}

# Lengths in tokens: (mean, 95th percentile) of a lognormal, cut at MAX_LENGTH. Package descriptions in the
# Llama-3.1 tokenizer (mean 105, median 81, p95 249, p99 418) and titles as queries.
PASSAGES, QUERIES, MAX_LENGTH = (105.0, 249.0), (14.0, 26.0), 512

# What ours should reach: factor over the best peer of the run, and (8b, bf16, one H200) a rate. The MFU of
# the step is that of 15,500 useful tokens/s with all 32 layers.
GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("train", "8b"): {"ratio_to_best_peer": 3.0, "mfu": 0.66},
    ("train", "1b"): {"ratio_to_best_peer": 3.0},
    ("train", "tiny"): {"ratio_to_best_peer": 2.5},
    ("encode", "8b"): {"ratio_to_best_peer": 4.0, "tokens_per_s": 45_000},
    ("encode", "1b"): {"ratio_to_best_peer": 4.0},
}

TEMPERATURE = 0.02
NUM_BATCHES = 3  # different global batches, used in turn: shapes change from step to step as in training


# ------------------------------------------------------------------------------------------ data


def draw_lengths(rng: np.random.Generator, n: int, mean: float, p95: float, longest: int) -> np.ndarray:
    """int32 [n], lognormal with this mean and 95th percentile, cut to [2, longest]."""
    # p95 / mean = exp(1.645 s - s^2 / 2): the smaller root in s.
    s = 1.645 - math.sqrt(1.645**2 - 2 * math.log(p95 / mean))
    return np.clip(np.rint(rng.lognormal(math.log(mean) - s * s / 2, s, n)), 2, longest).astype(np.int32)


class Groups:
    """What data/packing.py and data/sampler.py read of a Store: rows of a query, a positive and K hard
    negatives.

    Token ids fall off steeply with their rank, as words do: the backward of the embedding depends on repeated
    ids.
    """

    def __init__(
        self, num_rows: int, num_hard_negatives: int, vocab_size: int, seed: int, longest: int = MAX_LENGTH
    ):
        rng, M = np.random.default_rng(seed), 1 + num_hard_negatives
        self.query_lengths = draw_lengths(rng, num_rows, *QUERIES, longest)
        self.document_lengths = draw_lengths(rng, num_rows * M, *PASSAGES, longest)

        def texts(lengths: np.ndarray) -> list[np.ndarray]:
            ids = (vocab_size * rng.random(int(lengths.sum())) ** 3).astype(np.int32)
            return np.split(ids, np.cumsum(lengths)[:-1])

        self.queries, self.documents = texts(self.query_lengths), texts(self.document_lengths)
        rows = np.arange(num_rows, dtype=np.int64)
        self.positive_ids, self.positive_offsets = rows * M, np.arange(num_rows + 1)
        self.negative_ids = (rows[:, None] * M + np.arange(1, M)).ravel()
        self.negative_offsets = np.arange(num_rows + 1) * (M - 1)
        self.same_as = np.arange(num_rows * M)  # no two documents are the same
        # Each row has a query of its own and knows its own positive alone.
        self.row_groups, self.known_offsets, self.known_ids = rows, self.positive_offsets, self.positive_ids

    def __len__(self) -> int:
        return len(self.queries)

    def query_tokens(self, row: int) -> np.ndarray:
        return self.queries[row]

    def document_tokens(self, doc_id: int) -> np.ndarray:
        return self.documents[doc_id]


def pad(sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """ids [N, L] int64 and mask [N, L] bool: right-padded to the longest, in multiples of 8."""
    longest = -(-max(len(s) for s in sequences) // 8) * 8
    ids, mask = (
        torch.zeros(len(sequences), longest, dtype=torch.int64),
        torch.zeros(len(sequences), longest).bool(),
    )
    for i, s in enumerate(sequences):
        ids[i, : len(s)], mask[i, : len(s)] = torch.from_numpy(s.astype(np.int64)), True
    return ids, mask


@dataclass(frozen=True)
class Padded:
    """A micro-batch as the peers take it."""

    query_ids: Tensor  # [B, L]
    query_mask: Tensor
    document_ids: Tensor  # [B * M, L], the positive of a query first
    document_mask: Tensor

    def to(self, device: torch.device) -> Padded:
        if device.type == "cpu":
            return self
        return Padded(*(t.pin_memory().to(device, non_blocking=True) for t in vars(self).values()))

    @property
    def num_positions(self) -> int:
        return self.query_ids.numel() + self.document_ids.numel()


@dataclass(frozen=True)
class GlobalBatch:
    """The same groups packed for us and as (row, its documents) for the peers."""

    micro_batches: list[MicroBatch]
    rows: np.ndarray  # [B]
    documents: np.ndarray  # [B, M]
    num_tokens: int
    flops: float

    def padded(self, groups: Groups, batch_size: int) -> list[Padded]:
        out = []
        for i in range(0, len(self.rows), batch_size):
            queries = [groups.query_tokens(row) for row in self.rows[i : i + batch_size]]
            documents = [groups.document_tokens(d) for d in self.documents[i : i + batch_size].ravel()]
            out.append(Padded(*pad(queries), *pad(documents)))
        return out


def global_batches(
    groups: Groups, model: ModelConfig, num_queries: int, max_tokens: int
) -> list[GlobalBatch]:
    """Steps 0, 1, ... of a run over `groups`, made by the training code's own sampler and packing."""
    K = len(groups.negative_ids) // len(groups)
    config = DataConfig(num_hard_negatives=K, max_tokens=max_tokens)
    sampler = Sampler(len(groups), num_queries, seed=0)
    out = []
    for step in range(len(groups) // num_queries):
        micro_batches, num_tokens = load_batch(groups, sampler, step, 0, 1, config)  # type: ignore[arg-type]
        rows = sampler.rows(step)
        documents = choose_documents(groups, rows, sampler.epochs(step), K, 0)  # type: ignore[arg-type]
        squares = sum(int(np.square(np.asarray(b.lengths, np.int64)).sum()) for b in micro_batches)
        flops = training_flops(model, num_tokens, squares)
        out.append(GlobalBatch(micro_batches, rows, documents, num_tokens, flops))
    return out


# ------------------------------------------------------------------------------------------ ours


@torch.no_grad()
def fill_random(encoder: nn.Module, seed: int, std: float) -> None:
    """On the device, in place: matrices normal(0, std), norms uniform in [0.5, 1.5] so that an ignored one
    shows."""
    weights = [local_tensor(p.detach()) for p in encoder.parameters()]
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    for w in weights:
        if w.ndim == 1:
            w.uniform_(0.5, 1.5, generator=generator)
        else:
            w.normal_(0, std, generator=generator)


class Ours:
    """train/engine.py with random weights, and the finite check of the trainer."""

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        std: float = 0.02,
        checkpointing: str = "none",
        master_weights: str = "fp32",
    ):
        options = {"activation_checkpointing": checkpointing, "loss": {"temperature": TEMPERATURE}}
        options["optim"] = {"master_weights": master_weights}
        config = TrainConfig.from_dict({"output_dir": "", "steps": 1, **options})
        self.mesh, self.engine, self.lr = mesh, Engine(config, model, mesh, dtype), config.optim.lr
        self.encoder = self.engine.model
        fill_random(self.encoder, 0, std)

    def backward(self, batch: GlobalBatch) -> Tensor:
        """loss [B] in the order of the micro-batches; gradients are left on the parameters."""
        return self.engine.forward_backward(batch.micro_batches)[0]

    def step(self, batch: GlobalBatch) -> float:
        losses_B = self.backward(batch)
        norm = self.engine.clip()
        # As the trainer: the device refuses a step that is not finite, and the host asks after the launch.
        loss = losses_B.mean()
        read = ToHost(torch.stack([loss, norm]))
        self.engine.update(self.lr, loss.isfinite())
        return read.tolist()[0]

    @torch.no_grad()
    def groups(self, batch: GlobalBatch) -> tuple[Tensor, np.ndarray]:
        """Embeddings [B, 1 + M, D] of query and passages, and the row of each."""
        out = []
        for micro_batch in batch.micro_batches:
            micro_batch = micro_batch.to(self.mesh.device)
            rows = embed(self.encoder, micro_batch)
            index = torch.cat([micro_batch.query_index[:, None], micro_batch.document_index], 1)
            out.append(rows[index])
        return torch.cat(out), np.concatenate([b.rows for b in batch.micro_batches])


@torch.no_grad()
def peer_weights(
    encoder: nn.Module, model: ModelConfig, value: Callable[[Tensor], Tensor] = torch.detach
) -> Iterator[tuple[str, Tensor]]:
    """(name in Hugging Face's LlamaModel, value(our parameter) cut out of the fused matrices)."""
    G, A, D = model.num_key_value_heads, model.head_dim, model.hidden_size
    R = model.num_attention_heads // G
    for full_name, p in encoder.named_parameters():
        name, w = fsdp.plain_name(full_name).removeprefix("model."), local_tensor(value(p))
        if name.endswith("qkv_proj.weight"):
            blocks = w.view(G, R + 2, A, D)
            for part, rows in (
                ("q_proj", blocks[:, :R]),
                ("k_proj", blocks[:, R]),
                ("v_proj", blocks[:, R + 1]),
            ):
                yield name.replace("qkv_proj", part), rows.reshape(-1, D)
        elif name.endswith("gate_up_proj.weight"):
            blocks = w.view(model.mlp_blocks, 2, -1, D)
            for i, part in enumerate(("gate_proj", "up_proj")):
                yield name.replace("gate_up_proj", part), blocks[:, i].reshape(-1, D)
        else:
            yield name, w


# ------------------------------------------------------------------------------------------ peers


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


def hf_llama(model: ModelConfig) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = {k: v for k, v in asdict(model).items() if k not in ("rope_theta", "rope_scaling")}
    rope_parameters = {"rope_type": "default", "rope_theta": model.rope_theta}
    return LlamaModel(
        LlamaConfig(
            **sizes,
            rope_parameters=rope_parameters,
            is_causal=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )


PEERS: dict[str, tuple[str, Callable[[ModelConfig], nn.Module]]] = {
    "hf": ("transformers LlamaModel", hf_llama),
    "plain": ("plain torch Llama", PaddedLlama),
}


class Peer:
    """Two padded forwards, masked mean, F.cross_entropy, clip_grad_norm_, fused AdamW, all in `dtype`."""

    def __init__(
        self, kind: str, model: ModelConfig, device: torch.device, dtype: torch.dtype, train: bool = True
    ):
        self.name, build = PEERS[kind]
        self.device, before = device, torch.get_default_dtype()
        self.compiled_forwards: list[Callable[..., Any]] = []
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

    def backward(self, batches: Sequence[Padded]) -> Tensor:
        """loss [B]"""
        rows, losses = sum(len(batch.query_ids) for batch in batches), []
        for batch in batches:
            q_BD, d_BMD = self.groups(batch)
            logits = torch.einsum("bd,bmd->bm", q_BD, d_BMD) / TEMPERATURE
            losses_B = F.cross_entropy(
                logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="none"
            )
            (losses_B.sum() / rows).backward()
            losses.append(losses_B.detach())
        return torch.cat(losses)

    def step(self, batches: Sequence[Padded]) -> float:
        assert self.optimizer is not None
        losses_B = self.backward(batches)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        loss, _ = torch.stack([losses_B.mean(), norm]).tolist()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


# ------------------------------------------------------------------------------- correctness, before any time

GATE_SHAPE = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def gate(kind: str, mesh: Mesh) -> dict[str, float]:
    """Ours against the peer with the same weights on the same groups; AssertionError when they are not the
    same model.

    fp32: losses and embeddings to 1e-4, all gradients to 1e-3 of their norm. bf16, for which a GPU has other
    attention kernels: our embeddings may be at most twice as far from the fp32 ones as the peer's.
    """
    groups = Groups(6, 4, GATE_SHAPE.vocab_size, seed=1, longest=70)
    (batch,) = global_batches(groups, GATE_SHAPE, num_queries=6, max_tokens=800)
    assert len(batch.micro_batches) > 1, "the gate must accumulate over micro-batches"
    padded = batch.padded(groups, 4)

    def peer_embeddings(peer: Peer) -> Tensor:
        with torch.no_grad():
            return torch.cat([torch.cat([q[:, None], d], 1) for q, d in map(peer.groups, padded)])

    ours, peer = (
        Ours(GATE_SHAPE, mesh, torch.float32, std=0.1),
        Peer(kind, GATE_SHAPE, mesh.device, torch.float32),
    )
    peer.copy_from(ours.encoder, GATE_SHAPE)
    mine, rows = ours.groups(batch)
    order = torch.from_numpy(np.argsort(rows)).to(mesh.device)
    peer_order = torch.from_numpy(np.argsort(batch.rows)).to(mesh.device)
    truth = peer_embeddings(peer)[peer_order]
    errors = {"embeddings": (mine[order] - truth).abs().max().item()}
    my_losses, peer_losses = ours.backward(batch)[order], peer.backward(padded)[peer_order]
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
        Peer(kind, GATE_SHAPE, mesh.device, torch.bfloat16),
    )
    half_peer.copy_from(ours.encoder, GATE_SHAPE)
    errors["bf16"] = (half.groups(batch)[0][order] - truth).norm().item() / len(truth) ** 0.5
    errors["bf16 of the peer"] = (peer_embeddings(half_peer)[peer_order] - truth).norm().item() / len(
        truth
    ) ** 0.5
    assert errors["bf16"] < 2 * errors["bf16 of the peer"], errors
    return errors


# ------------------------------------------------------------------------------------------ measuring


@dataclass
class Variant:
    """Something timed: `run(i)` does the i-th batch of work."""

    name: str
    run: Callable[[int], object]
    useful: float  # share of the positions that are tokens
    details: dict[str, Any]
    peak_bytes: int | None = None
    error: str = ""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def warm_up(
    variant: Variant,
    device: torch.device,
    runs: int,
    resident: int,
    on_error: Callable[[], None] | None = None,
) -> None:
    """Compiles, fills caches and finds the peak memory above `resident`; what does not run says why in
    `error`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for i in range(runs):
            variant.run(i)
        synchronize(device)
        if device.type == "cuda":
            variant.peak_bytes = torch.cuda.max_memory_allocated(device) - resident
    except torch.OutOfMemoryError:
        variant.error = "out of memory"
    except Exception as error:  # torch.compile fails in many ways; the reason is part of the result
        if not variant.details.get("compiled"):
            raise
        variant.error = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if variant.error:  # outside the handlers: their traceback holds the activations
        if on_error is not None:
            on_error()
        release(device)


def interleave(
    variants: Sequence[Variant], device: torch.device, seconds: float, rounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Seconds per run of each variant, taken in turn; a variant stops at its share of `seconds` after
    rounds[0] runs."""
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    share = seconds / max(1, len(variants))
    for i in range(rounds[1]):
        for variant in variants:
            taken = times[variant.name]
            if len(taken) == i and (i < rounds[0] or sum(taken) < share):
                synchronize(device)
                began = time.perf_counter()
                variant.run(i)
                synchronize(device)
                taken.append(time.perf_counter() - began)
    return times


# ------------------------------------------------------------------------------------- what a step is made of


# kernels/*.py by the names of their Triton kernels
OWN_PARTS = {
    kernel.__name__: part
    for part, modules in {
        "norms, RoPE, SwiGLU": (rms_norm, rope, swiglu),
        "pooling and loss": (mean_pool, info_nce_own, info_nce_columns),
    }.items()
    for module in modules
    for kernel in vars(module).values()
    if isinstance(kernel, triton.runtime.KernelInterface)
}
# Others by a part of the name, the first line that has it: attention kernels are built with cutlass, as GEMMs
# are; FSDP's copies and the gradient norm are multi_tensor_apply kernels, as Adam is.
OTHER_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("optimizer", ("FusedAdam", "_adamw_kernel")),
    ("GEMM", ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitKreduce")),
    (
        "copies (FSDP, casts, host)",
        ("chunk_cat", "split_with_sizes", "nccl", "copy", "Copy", "Memcpy", "CatArray"),
    ),
    ("clipping", ("multi_tensor_apply", "lpnorm", "LpNorm")),
    (
        "embedding",
        ("embedding", "index", "gather", "cub::", "compute_grad_weight", "segment", "sum_and_scatter"),
    ),
)
PARTS = [*dict.fromkeys(OWN_PARTS.values()), *(part for part, _ in OTHER_PARTS), "other"]


def part_of(kernel: str) -> str:
    if kernel in OWN_PARTS:
        return OWN_PARTS[kernel]
    return next((part for part, names in OTHER_PARTS if any(name in kernel for name in names)), "other")


@dataclass(frozen=True)
class Composition:
    seconds: dict[str, float]  # of kernels, by part
    busy: float  # some kernel or copy runs: at most the sum, FSDP copies run beside
    other: list[tuple[str, float]]  # the largest kernels in "other"


def composition(trace: dict[str, Any]) -> Composition:
    """Of a Chrome trace of torch.profiler; annotations span kernels and are left out."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in kinds]
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    other: dict[str, float] = {}
    busy, end = 0.0, -math.inf
    for event in sorted(events, key=lambda e: e["ts"]):
        part, duration = part_of(event["name"]), event["dur"] / 1e6
        seconds[part] += duration
        if part == "other":
            other[event["name"]] = other.get(event["name"], 0.0) + duration
        busy += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"])) / 1e6
        end = max(end, event["ts"] + event["dur"])
    return Composition(seconds, busy, sorted(other.items(), key=lambda item: -item[1])[:3])


def profiled(run: Callable[[], object]) -> Composition:
    """Of one call on the GPU. Only the GPU is traced: tracing the host would slow the launches down."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return composition(json.loads(path.read_text()))


# ------------------------------------------------------------------------------------------ the benchmark


class CpuResults(ResultsFile):
    """Where there is no GPU: the same lines, into the file that was asked for, if any."""

    def __init__(self, path: Path | None):
        cpu = next(
            (
                line
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            ":",
        )
        self.run = {
            "benchmark": "step",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "gpu": None,
            "cpu": f"{cpu.split(':')[1].strip()}, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
        }
        self.path = path or Path(os.devnull)


def report_variants(
    results: ResultsFile,
    title: str,
    common: dict[str, Any],
    variants: Sequence[Variant],
    times: dict[str, list[float]],
    tokens: Callable[[int], float],
    flops: Callable[[int], float],
    ceilings: dict[str, float],
) -> None:
    """Medians over the runs of each variant; `ceilings` has the FLOP/s of the datasheet and of a GEMM of this
    run, if known."""
    figures: dict[str, dict[str, Any]] = {}
    for variant in variants:
        row: dict[str, Any] = {"useful": round(variant.useful, 4), **variant.details}
        if variant.error:
            row["error"] = variant.error
        else:
            runs = np.array([(s, tokens(i) / s, flops(i) / s) for i, s in enumerate(times[variant.name])])
            row["seconds"], row["tokens_per_s"], row["flops_per_s"] = np.median(runs, axis=0).tolist()
            row["all_seconds"] = times[variant.name]
            row |= {name: row["flops_per_s"] / ceiling for name, ceiling in ceilings.items()}
            row["peak_gb"] = None if variant.peak_bytes is None else variant.peak_bytes / 1e9
        figures[variant.name] = row
    ours, *peers = (row for row in figures.values() if "error" not in row)
    if peers:
        ours["ratio_to_best_peer"] = ours["tokens_per_s"] / max(row["tokens_per_s"] for row in peers)
    columns = {"mfu": "MFU", "of_gemm": "of GEMM"}
    shown = [name for name in columns if name in ours]
    print(f"\n{title}")
    heads = "".join(f"{columns[name]:>9}" for name in shown)
    print(
        f"{'':54}{'seconds':>9}{'tok/s':>9}{'TF/s':>8}{heads}"
        f"{'useful':>8}{'peak GB':>9}{'ours is':>9}{'runs':>6}"
    )
    for name, row in figures.items():
        if "error" in row:
            print(f"{name:54}  {row['error']}")
        else:
            line = (
                f"{name:54}{row['seconds']:9.3f}{row['tokens_per_s']:9,.0f}{row['flops_per_s'] / 1e12:8.3g}"
            )
            line += "".join(f"{row[column]:9.1%}" for column in shown) + f"{row['useful']:8.3f}"
            line += f"{'-':>9}" if row["peak_gb"] is None else f"{row['peak_gb']:9.1f}"
            print(f"{line}{ours['tokens_per_s'] / row['tokens_per_s']:8.2f}x{len(row['all_seconds']):6}")
        results.append(variant=name, **common, **row)
    for name, goal in GOALS.get((common["what"], common["shape"]), {}).items():
        whole = common["layers"] == SHAPES[common["shape"]].num_hidden_layers
        if name in ours and (whole or name != "tokens_per_s"):
            verdict = "met" if ours[name] >= goal else "MISSED"
            print(f"goal: {name} of ours at least {goal:,g}: {ours[name]:,.4g}, {verdict}")
    sys.stdout.flush()


def describe(shape: str, model: ModelConfig, parameters: int) -> tuple[str, dict[str, Any]]:
    full = SHAPES[shape]
    gemm = training_flops(model, 1, 0) / 6
    label = f"{shape}: {model.num_hidden_layers} layers"
    if model.num_hidden_layers != full.num_hidden_layers:
        label += (
            f" of {full.num_hidden_layers} and {model.vocab_size:,} of {full.vocab_size:,} embedding rows"
        )
    label += (
        f", hidden {model.hidden_size}, {parameters / 1e6:,.0f} M parameters ({gemm / 1e6:,.0f} M in GEMMs)"
    )
    return label, {"shape": shape, "layers": model.num_hidden_layers, "vocab_size": model.vocab_size}


def with_layers(shape: str, layers: int) -> ModelConfig:
    """The shape with fewer layers and as small a share of its vocabulary: GEMMs and optimizer keep their
    ratio."""
    full = SHAPES[shape]
    if not layers or layers == full.num_hidden_layers:
        return full
    rows = -(-full.vocab_size * layers // full.num_hidden_layers // 64) * 64
    return replace(full, num_hidden_layers=layers, vocab_size=rows)


def run_training(shape: str, args: argparse.Namespace, mesh: Mesh, kind: str, results: ResultsFile) -> None:
    """The training step beside the peers', and what ours is made of."""
    device, dtype = mesh.device, args.dtype
    model = with_layers(shape, args.layers or TRAIN_LAYERS.get(shape, 0))
    groups = Groups(NUM_BATCHES * args.queries, 4, model.vocab_size, seed=0)
    batches = global_batches(groups, model, args.queries, args.tokens)
    start = allocated(device)
    ours = Ours(
        model, mesh, dtype, checkpointing=args.activation_checkpointing, master_weights=args.master_weights
    )
    label, common = describe(shape, model, sum(p.numel() for p in ours.encoder.parameters()))
    common |= {"queries": args.queries, "precision": str(dtype).removeprefix("torch.")}
    common["activation_checkpointing"] = args.activation_checkpointing
    common["master_weights"] = args.master_weights
    if args.activation_checkpointing != "none":
        label += f", {args.activation_checkpointing} recomputation"
    if args.master_weights != "fp32":
        label += f", {args.master_weights} masters"
    counts = [len(batch.micro_batches) for batch in batches]
    density = sum(batch.num_tokens for batch in batches) / (sum(counts) * args.tokens)
    packed = Variant(
        f"ours, packed {args.tokens:,}, {'-'.join(map(str, sorted({min(counts), max(counts)})))} "
        f"micro-batches",
        lambda i: ours.step(batches[i % len(batches)]),
        1.0,
        {"max_tokens": args.tokens, "packing_density": round(density, 4)},
    )
    # All batches: Triton compiles anew for token counts that are multiples of 16 and for those that are not.
    # A CPU compiles nothing, and the gate has warmed it up.
    warm_up(packed, device, len(batches) if device.type == "cuda" else 0, start)
    if packed.error:
        raise UserError(f"training, {label}: {packed.error}; lower --layers or --tokens={args.tokens}")
    if "train" in args.only:
        variants = [packed]
        if kind != "none":
            variants += training_peers(kind, shape, model, ours.encoder, groups, batches, args, device)
        tokens = float(np.mean([batch.num_tokens for batch in batches]))
        report_variants(
            results,
            f"training step, {label}; {args.queries} queries of {tokens / args.queries:.0f} useful tokens "
            f"with passages",
            {"what": "train", **common},
            variants,
            interleave([v for v in variants if not v.error], device, args.seconds, args.rounds),
            lambda i: batches[i % len(batches)].num_tokens,
            lambda i: batches[i % len(batches)].flops,
            args.ceilings,
        )
        del variants  # and the peer with them
        release(device)
    if "profile" in args.only and device.type == "cuda":
        run_profile(packed, batches[0], model, label, common, results)


def training_peers(
    kind: str,
    shape: str,
    model: ModelConfig,
    encoder: nn.Module,
    groups: Groups,
    batches: Sequence[GlobalBatch],
    args: argparse.Namespace,
    device: torch.device,
) -> list[Variant]:
    """Warmed up; one peer model, eager at several micro-batches, then compiled at the best of them."""
    resident = allocated(device)
    peer = Peer(kind, model, device, args.dtype)
    peer.copy_from(encoder, model)
    reset = partial(peer.model.zero_grad, set_to_none=True)
    variants = []
    for size in sorted({min(size, args.queries) for size in args.peer_batches or PEER_BATCHES[shape]}):
        variants.append(peer_variant(peer, groups, batches, size, compiled=False))
        runs = 0 if device.type == "cpu" else 1 if size == 1 else len(batches)
        warm_up(variants[-1], device, runs, resident, reset)
    runnable = [v for v in variants if not v.error]
    if args.compile and runnable:
        seconds = interleave(runnable, device, 0, (1, 1))
        best = min(runnable, key=lambda v: seconds[v.name][0]).details["batch_size"]
        variants.append(peer_variant(peer, groups, batches, best, compiled=True))
        warm_up(variants[-1], device, len(batches), resident, reset)
    return variants


def peer_variant(
    peer: Peer, groups: Groups, batches: Sequence[GlobalBatch], batch_size: int, compiled: bool
) -> Variant:
    padded = [batch.padded(groups, batch_size) for batch in batches]
    positions = sum(micro_batch.num_positions for batch in padded for micro_batch in batch)
    name = f"{peer.name}, padded, {batch_size} quer{'y' if batch_size == 1 else 'ies'} at a time"

    def run(i: int) -> float:
        # The eager and the compiled variant share the weights; switching costs microseconds.
        if ("forward" in vars(peer.model.layers[0])) != compiled:  # type: ignore[index]
            peer.compile_layers(compiled)
        return peer.step(padded[i % len(padded)])

    return Variant(
        name.replace("padded", "compiled, padded") if compiled else name,
        run,
        sum(batch.num_tokens for batch in batches) / positions,
        {"batch_size": batch_size, "compiled": compiled},
    )


def run_profile(
    packed: Variant,
    batch: GlobalBatch,
    model: ModelConfig,
    label: str,
    common: dict[str, Any],
    results: ResultsFile,
) -> None:
    """One step under the profiler, beside its time without."""
    again = replace(packed, run=lambda i: packed.run(0))
    wall = float(np.median(interleave([again], torch.device("cuda"), 0, (5, 5))[again.name]))
    parts = profiled(lambda: packed.run(0))
    gemm = training_flops(model, batch.num_tokens, 0)
    print(f"\nwhat a step is made of, {label}; {wall * 1e3:.1f} ms, {batch.num_tokens:,} tokens")
    for part, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1]):
        rate = {"GEMM": gemm, "attention": batch.flops - gemm}.get(part, 0.0) / max(seconds, 1e-9) / 1e12
        note = f"   {rate:6.0f} TF/s" if rate else ""
        print(f"    {part:28}{seconds * 1e3:9.2f} ms{seconds / wall:8.1%}{note}")
        row = {
            "what": "profile",
            "part": part,
            "seconds": seconds,
            "share": seconds / wall,
            "tflops": rate or None,
        }
        results.append(**row, **common)
    idle = max(0.0, wall - parts.busy)
    print(f"    {'no kernel running':28}{idle * 1e3:9.2f} ms{idle / wall:8.1%}   (host too slow, or waiting)")
    results.append(what="profile", part="idle", seconds=idle, share=idle / wall, **common)
    for name, seconds in parts.other:
        print(f"    largest in other: {seconds * 1e3:.2f} ms {name[:90]}")


def run_encoding(shape: str, args: argparse.Namespace, mesh: Mesh, kind: str, results: ResultsFile) -> None:
    """Forward only: a corpus to unit vectors in host memory, at full depth unless --layers says otherwise."""
    device, dtype = mesh.device, args.dtype
    model = with_layers(shape, args.layers)
    groups = Groups(max(1, round(args.encode_tokens / (PASSAGES[0] * 5))), 4, model.vocab_size, seed=2)
    texts, lengths = groups.documents, groups.document_lengths.astype(np.int64)
    out: dict[str, np.ndarray] = {}  # [texts, D]
    start = allocated(device)
    with torch.device("meta"):
        encoder = Encoder(model, TensorParallel(), pick_attention("auto", device, dtype, backward=False))
    encoder.to(dtype).to_empty(device=device).requires_grad_(False)
    fill_random(encoder, seed=0, std=0.02)
    label, common = describe(shape, model, sum(p.numel() for p in encoder.parameters()))
    common |= {"texts": len(texts), "precision": str(dtype).removeprefix("torch.")}
    packs = list(pack_texts(texts, 2 * args.tokens))

    @torch.inference_mode()
    def run_ours(i: int) -> None:
        out["ours"] = np.empty((len(texts), model.hidden_size), np.float32)
        for indices, batch in packs:
            batch = batch.to(device)
            segments = Segments(batch.cu_seqlens, batch.lengths, batch.max_seqlen)
            rows = encoder(batch.input_ids, batch.position_ids, segments)[: batch.num_sequences]
            out["ours"][indices] = rows.float().cpu().numpy()

    variants = [Variant(f"ours, packed {2 * args.tokens:,}", run_ours, 1.0, {"max_tokens": 2 * args.tokens})]
    warm_up(variants[0], device, 1, start)
    if variants[0].error:
        raise UserError(f"encoding, {label}: {variants[0].error}; lower --layers or --tokens={args.tokens}")
    resident = allocated(device)
    if kind != "none":
        peer = Peer(kind, model, device, dtype, train=False)
        peer.copy_from(encoder, model)
        in_order, by_length = np.arange(len(texts)), np.argsort(-lengths, kind="stable")
        for order, size, what in ((in_order, 16, "corpus order"), (by_length, 64, "sorted by length")):
            chunks = [order[i : i + size] for i in range(0, len(order), size)]
            padded = [pad([texts[i] for i in chunk]) for chunk in chunks]

            @torch.inference_mode()
            def run_peer(i: int, chunks: Any = chunks, padded: Any = padded, what: str = what) -> None:
                out[what] = np.empty((len(texts), model.hidden_size), np.float32)
                for chunk, (ids, mask) in zip(chunks, padded, strict=True):
                    if device.type == "cuda":
                        ids, mask = (x.pin_memory().to(device, non_blocking=True) for x in (ids, mask))
                    out[what][chunk] = peer.embed(ids, mask).cpu().numpy()

            useful = int(lengths.sum()) / sum(ids.numel() for ids, _ in padded)
            variants.append(
                Variant(f"{peer.name}, {size} texts, {what}", run_peer, useful, {"batch_size": size})
            )
            warm_up(variants[-1], device, 1, resident)
    for what in [name for name in out if name != "ours"]:
        # The same weights in the same precision, at the shape that is timed; rows are unit vectors.
        cosine = float((out["ours"] * out[what]).sum(1).min())
        assert cosine > (0.98 if dtype == torch.bfloat16 else 0.9999), (
            f"ours and {what}: cosine {cosine} at {label}"
        )
    times = interleave([v for v in variants if not v.error], device, args.seconds, args.rounds)
    flops = training_flops(model, int(lengths.sum()), int(np.square(lengths).sum())) / 3
    report_variants(
        results,
        f"encoding, {label}; {len(texts)} passages, {int(lengths.sum()):,} tokens",
        {"what": "encode", **common},
        variants,
        times,
        lambda i: float(lengths.sum()),
        lambda i: flops,
        args.ceilings,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", default="", help="of 1b, 8b, tiny, with commas; default: 8b,1b on a GPU, tiny on a CPU"
    )
    parser.add_argument(
        "--only", default="", help="of train, encode, profile; default: all on a GPU, train on a CPU"
    )
    parser.add_argument("--layers", type=int, default=0, help="default: all, and 8 of the 8b when training")
    parser.add_argument("--queries", type=int, default=0, help="per optimizer step; default: 28, 4 on a CPU")
    parser.add_argument("--tokens", type=int, default=0, help="of our micro-batch; "
    "encoding packs twice as many; "
                        "default: 16384, 8192 on a CPU")  # fmt: skip
    parser.add_argument("--encode-tokens", type=int, default=0, help="default: 65536, 4096 on a CPU")
    parser.add_argument(
        "--peer", default="auto", choices=["auto", *PEERS, "none"], help="auto: hf when importable"
    )
    parser.add_argument(
        "--peer-batches", type=_numbers, default=[], help="queries per micro-batch, as 1,4,16"
    )
    parser.add_argument(
        "--activation-checkpointing", default="none", choices=["none", "selective", "full"], help="of ours"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="skip the compiled peer")
    parser.add_argument("--seconds", type=float, default=0, help="per comparison; default: 8, 20 on a CPU")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument(
        "--master-weights", default="fp32", choices=["fp32", "split"],
        help="optim.master_weights of ours; split: the bf16 weights and 16-bit remainders, bf16 alone",
    )  # fmt: skip
    parser.add_argument(
        "--output", default="", help="JSON lines of a run on a CPU; on a GPU they go to benchmarks/results/"
    )
    args = parser.parse_args(argv)
    cuda = pick_device(args.device).type == "cuda"
    args.shape = (args.shape or ("8b,1b" if cuda else "tiny")).split(",")
    args.only = (args.only or ("train,profile,encode" if cuda else "train")).split(",")
    for given, known, name in (
        (args.shape, SHAPES, "--shape"),
        (args.only, ("train", "encode", "profile"), "--only"),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    args.tokens = args.tokens or (16384 if cuda else 8192)
    args.queries = args.queries or (28 if cuda else 4)  # 28: one full micro-batch of 16384
    args.encode_tokens = args.encode_tokens or (65536 if cuda else 4096)
    args.seconds = args.seconds or (8 if cuda else 20)
    args.rounds = (2, 20) if cuda else (1, 5)
    args.compile = args.compile and cuda
    half = args.precision == "bf16" or (args.precision == "auto" and cuda)
    if args.master_weights == "split" and not half:
        parser.error("--master-weights split keeps bf16 weights: give --precision bf16 too")
    args.dtype = torch.bfloat16 if half else torch.float32
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def passes_gate(kind: str, mesh: Mesh, results: ResultsFile) -> bool:
    try:
        errors = gate(kind, mesh)
    except (
        Exception
    ) as error:  # an old transformers fails in its own ways; nothing is timed against a peer that fails here
        reason = f"{type(error).__name__}: {error}"
        print(f"gate: ours is NOT the same as {PEERS[kind][0]}: {reason}", flush=True)
        results.append(what="gate", peer=kind, error=reason)
        return False
    figures = ", ".join(f"{what} {value:.1e}" for what, value in errors.items())
    print(f"gate: same as {PEERS[kind][0]}; largest differences: {figures}", flush=True)
    results.append(what="gate", peer=kind, **errors)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    began, args = time.monotonic(), parse(argv)
    device = pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    args.ceilings = {}
    results: ResultsFile
    if device.type == "cuda":
        results = ResultsFile("step")
        gemm = matmul_rates(8192, 8192, 8192, ["bf16"])["bf16"]
        assert isinstance(gemm, float), gemm
        results.append(what="gemm", shape=[8192, 8192, 8192], tflops=gemm)
        if args.dtype == torch.bfloat16:
            args.ceilings["of_gemm"] = gemm * 1e12
            if peak := device_peak_flops(device):
                args.ceilings["mfu"] = peak
        print(
            f"{results.run['gpu']}: bf16 GEMM of 8192^3 at {gemm:.0f} TFLOP/s; to {results.path}", flush=True
        )
    else:
        results = CpuResults(Path(args.output) if args.output else None)
        threads, load, cpu = (results.run[key] for key in ("threads", "load", "cpu"))
        print("no CUDA device is used: the correctness gate, and a tiny model on the CPU")
        print(f"{cpu}; {threads} threads, load before the start {load}", flush=True)
    with distributed(ParallelConfig(), device.type) as mesh:
        if not passes_gate("plain", mesh, results):
            print("nothing is timed")
            return 1
        kind, fine = args.peer, True
        if kind == "auto":
            kind = "hf" if importlib.util.find_spec("transformers") else "plain"
        if kind == "hf" and not passes_gate("hf", mesh, results):
            kind, fine = "plain", False
        for shape in args.shape:
            for run, what in ((run_training, {"train", "profile"}), (run_encoding, {"encode"})):
                if not what & set(args.only):
                    continue
                try:
                    run(shape, args, mesh, kind, results)
                except (UserError, AssertionError) as error:  # the other shapes are still worth their time
                    print(f"FAILED: {error}", flush=True)
                    results.append(what="failed", shape=shape, error=str(error))
                    fine = False
                release(device)
    print(f"\n{time.monotonic() - began:.0f} s in all")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
