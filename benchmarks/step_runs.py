"""The pieces of the step benchmark: training and encoding, ours and each peer, one model after another."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.step_data import (
    PASSAGES,
    SHAPES,
    GlobalBatch,
    Groups,
    describe,
    global_batches,
    pad,
    with_layers,
)
from benchmarks.step_libraries import SentenceTransformers, vllm_embedder
from benchmarks.step_ours import Ours, fill_random
from benchmarks.step_parts import profiled
from benchmarks.step_peers import MakePeer, Peer, gate, plain_torch, transformers_llama
from benchmarks.step_report import Report, Variant, allocated, interleave, release, warm_up
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.data.packing import pack_texts
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.attention import Segments, choose_attention, pick_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.parallel.fp8 import freeze_weights
from nemo_embed_core.parallel.layers import run_in_fp8
from nemo_embed_core.parallel.mesh import FP8_CAPABILITY, Mesh, TensorParallel
from nemo_embed_core.train.metrics import training_flops

NUM_BATCHES = 3  # different global batches, used in turn: shapes change from step to step as in training

# name -> (packages, how it is made). Liger changes transformers for the whole process: last.
PEERS: dict[str, tuple[tuple[str, ...], MakePeer]] = {
    "plain": ((), plain_torch),
    "st-flat": (("transformers", "sentence_transformers"), partial(SentenceTransformers, flatten=True)),
    "hf": (("transformers",), transformers_llama),
    "st": (("transformers", "sentence_transformers"), SentenceTransformers),
    "st-flat-liger": (
        ("transformers", "sentence_transformers", "liger_kernel"),
        partial(SentenceTransformers, flatten=True, liger=True),
    ),
    "st-liger": (
        ("transformers", "sentence_transformers", "liger_kernel"),
        partial(SentenceTransformers, liger=True),
    ),
}
COMPILED = ("plain", "hf")  # are timed compiled, too
# Queries per micro-batch of the peers; flattened ones also take twice the most.
PEER_BATCHES = {"1b": [4, 16], "8b": [4], "tiny": [1, 4]}

# Seconds on an H200, all layers, building and compiling included: reckoned from the rates of 8 layers and not
# measured yet.
ABOUT_S = {
    "train": 35, "train again": 15, "profile": 10, "encode": 12, "st-flat": 15, "hf": 18, "st": 20,
    "plain": 18, "compiled": 60, "st-flat-liger": 20, "st-liger": 25, "encode peer": 34, "vllm": 120,
}  # fmt: skip
OF_8B = {"8b": 1.0, "1b": 0.35, "tiny": 0.1}


@dataclass(frozen=True)
class Settings:
    """Options of ours; tokens of a micro-batch and queries of a step."""

    master_weights: str
    recompute: str
    tokens: int
    queries: int
    fp8: bool = False
    moments: str = "fp32"


def settings_of(shape: str, args: argparse.Namespace) -> list[Settings]:
    """What was asked for; else, of the whole 8B, what fits beside what a step was before split masters."""
    half = args.dtype == torch.bfloat16
    whole = shape == "8b" and with_layers(shape, args.layers) == SHAPES[shape]
    asked = Settings(
        args.master_weights or ("split" if half else "fp32"),
        args.activation_checkpointing or ("selective" if whole else "none"),
        args.tokens,
        args.queries,
        args.precision == "fp8",
        args.moments,
    )
    given = args.master_weights or args.activation_checkpointing or args.sized or args.moments != "fp32"
    return [asked] if given or not (whole and half) else [asked, Settings("fp32", "none", 8192, 14)]


class Bench:
    """What every piece needs; a piece builds its model, times it and lets it go."""

    def __init__(self, args: argparse.Namespace, mesh: Mesh, report: Report):
        self.args, self.mesh, self.report, self.device = args, mesh, report, mesh.device
        self.fine, self.passed = True, dict[str, bool]()  # peers by whether their gate was passed

    @property
    def has_fp8(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.get_device_capability() >= FP8_CAPABILITY

    def about(self, piece: str, shape: str) -> float:
        full = SHAPES[shape].num_hidden_layers
        depth = (self.args.layers or full) / full
        return ABOUT_S[piece] * OF_8B[shape] * max(depth, 0.4) if self.device.type == "cuda" else 0.0

    def piece(self, name: str, seconds: float, run: Callable[[], None]) -> None:
        if not self.report.enough(name, seconds):
            return
        try:
            run()
        except (UserError, AssertionError) as error:  # the other pieces are still worth their time
            self.report.say(f"FAILED: {name}: {error}")
            self.report.append(what="failed", variant=name, error=str(error))
            self.fine = False
        except torch.OutOfMemoryError:
            self.report.not_timed(name, "out of memory")
        release(self.device)

    def peers(self) -> list[str]:
        """Those that are asked for and installed."""
        asked = self.args.peers
        if asked == ["auto"]:
            here = importlib.util.find_spec("transformers") is not None
            asked = [name for name in PEERS if (name == "plain") != here]
        found = []
        for name in (name for name in PEERS if name in asked):
            missing = [package for package in PEERS[name][0] if importlib.util.find_spec(package) is None]
            if missing:
                self.report.not_timed(name, f"{', '.join(missing)} is not installed")
            else:
                found.append(name)
        return found

    def passes_gate(self, name: str) -> bool:
        if name not in self.passed:
            try:
                errors = gate(PEERS[name][1], self.mesh)
            except Exception as error:  # libraries fail in their own ways; such a peer is not timed
                reason = f"{type(error).__name__}: {error}"
                self.report.say(f"gate: ours is NOT the same as {name}: {reason}")
                self.report.append(what="gate", peer=name, error=reason)
                self.passed[name] = self.fine = False
                return False
            figures = ", ".join(f"{what} {value:.1e}" for what, value in errors.items())
            self.report.say(f"gate: same as {name}; largest differences: {figures}")
            self.report.append(what="gate", peer=name, **errors)
            self.passed[name] = True
        return self.passed[name]

    def run(self, shape: str) -> None:
        """Ours first, then the peers; what is asked for of train, profile and encode."""
        train, encode = "train" in self.args.only, "encode" in self.args.only
        if train or "profile" in self.args.only:
            self.train_ours_variants(shape)
        if encode:
            self.encode_ours_variants(shape)
        peers = self.peers() if train or encode else []
        changing = [kind for kind in peers if "liger" in kind]
        if train:
            self.train_peers(shape, [kind for kind in peers if kind not in changing], compiled=False)
        if encode:
            self.encode_peers(shape, peers)
        if train and self.args.compile:
            self.train_peers(shape, [kind for kind in peers if kind in COMPILED], compiled=True)
        if train:
            self.train_peers(shape, changing, compiled=False)
        whole = with_layers(shape, self.args.layers) == SHAPES[shape]
        for what in [what for what in ("train", "encode") if what in self.args.only]:
            self.report.judge(what, shape, whole)

    # ---- training

    def train_ours_variants(self, shape: str) -> None:
        wanted = settings_of(shape, self.args)
        if len(wanted) > 1 and self.has_fp8 and not wanted[0].fp8:
            # The kept fp8 weights take 15 GB of activations: 16,384 tokens would not fit (153 of 149 GB).
            wanted.insert(1, replace(wanted[0], fp8=True, tokens=10240, queries=17))
        for number, settings in enumerate(wanted):
            name = f"train {shape}{', fp8' if settings.fp8 else ''}, {settings.tokens:,} tokens"
            profile = number == 0 and "profile" in self.args.only and self.device.type == "cuda"
            seconds = self.about("train again" if number else "train", shape)
            seconds += self.about("profile", shape) if profile else 0
            self.piece(name, seconds, partial(self.train_ours, shape, settings, profile))

    def train_peers(self, shape: str, kinds: Sequence[str], compiled: bool) -> None:
        for kind in kinds:
            name, seconds = f"train {shape}, {kind}", self.about("compiled" if compiled else kind, shape)
            if self.passes_gate(kind):
                run = partial(self.train_peer, shape, kind, compiled)
                self.piece(f"{name}{' compiled' if compiled else ''}", seconds, run)

    def batches(self, shape: str, tokens: int, queries: int) -> tuple[ModelConfig, Groups, list[GlobalBatch]]:
        model = with_layers(shape, self.args.layers)
        groups = Groups(NUM_BATCHES * queries, 4, model.vocab_size, seed=0)
        return model, groups, global_batches(groups, model, queries, tokens)

    def train_ours(self, shape: str, settings: Settings, profile: bool) -> None:
        model, _, batches = self.batches(shape, settings.tokens, settings.queries)
        start, report = allocated(self.device), self.report
        optim = {"master_weights": settings.master_weights, "moments": settings.moments}
        options = {"checkpointing": settings.recompute, "optim": optim, "fp8": settings.fp8}
        ours = Ours(model, self.mesh, self.args.dtype, **options)
        kind = "ours fp8" if settings.fp8 else "ours"
        label, common = describe(shape, model, sum(p.numel() for p in ours.encoder.parameters()))
        precision = "fp8" if settings.fp8 else str(self.args.dtype).removeprefix("torch.")
        common |= {"queries": settings.queries, "precision": precision}
        counts = sorted({len(batch.micro_batches) for batch in batches})
        positions = sum(len(batch.micro_batches) for batch in batches) * settings.tokens
        details = optim | {
            "max_tokens": settings.tokens,
            "activation_checkpointing": settings.recompute,
            "attention": choose_attention("auto", self.device, self.args.dtype),
            "packing_density": round(sum(batch.num_tokens for batch in batches) / positions, 4),
        }
        variant = Variant(
            f"{kind}, {' masters, '.join(optim.values())} moments, recompute {settings.recompute}, packed "
            f"{settings.tokens:,} x {'-'.join(map(str, counts))}",
            lambda i: ours.step(batches[i % len(batches)]), 1.0, kind, details,
        )  # fmt: skip
        # All batches: Triton compiles anew for token counts that are multiples of 16 and for those that are
        # not. A CPU compiles nothing, and the gate has warmed it up.
        warm_up(variant, self.device, len(batches) if self.device.type == "cuda" else 0, start)
        if "train" in self.args.only:
            self.timed(f"training step, {label}", {"what": "train", **common}, [variant], batches)
        if profile and not variant.error:
            self.profile(variant, batches[0], model, label, common)
        if variant.error:
            report.say(f"lower --layers or --tokens={settings.tokens}")

    def train_peer(self, shape: str, kind: str, compiled: bool) -> None:
        model, groups, batches = self.batches(shape, self.args.tokens, self.args.queries)
        start = allocated(self.device)
        peer = PEERS[kind][1](model, self.device, self.args.dtype)
        fill_random(peer.model, 0, 0.02)
        if compiled:
            peer.compile_layers(True)
        label, common = describe(shape, model, sum(p.numel() for p in peer.model.parameters()))
        common |= {"queries": self.args.queries, "precision": str(self.args.dtype).removeprefix("torch.")}
        sizes = self.args.peer_batches or PEER_BATCHES[shape]
        sizes = [*sizes, 2 * max(sizes)] if peer.kind == "flattened" else sizes
        variants = []
        for size in sorted({min(size, self.args.queries) for size in sizes}):
            variants.append(self.peer_variant(peer, groups, batches, size, compiled))
            runs = 0 if self.device.type == "cpu" else len(batches) if compiled else 1
            reset = partial(peer.model.zero_grad, set_to_none=True)
            warm_up(variants[-1], self.device, runs, start, reset)
        self.timed(f"training step, {label}", {"what": "train", **common}, variants, batches)

    def peer_variant(
        self, peer: Peer, groups: Groups, batches: Sequence[GlobalBatch], size: int, compiled: bool
    ) -> Variant:
        micro_batches = [peer.batches(groups, batch, size) for batch in batches]
        positions = sum(m.num_positions for batch in micro_batches for m in batch)
        name = f"{peer.name}{', compiled' if compiled else ''}, {peer.kind}, {size} at a time"
        return Variant(
            name, lambda i: peer.step(micro_batches[i % len(batches)]),
            sum(batch.num_tokens for batch in batches) / positions, peer.kind,
            {"batch_size": size, "compiled": compiled},
        )  # fmt: skip

    def timed(
        self, title: str, common: dict[str, Any], variants: list[Variant], batches: list[GlobalBatch]
    ) -> None:
        args, runnable = self.args, [v for v in variants if not v.error]
        self.report.table(
            f"{title}; {common['queries']} queries", common, variants,
            interleave(runnable, self.device, args.seconds, args.rounds),
            lambda i: batches[i % len(batches)].num_tokens, lambda i: batches[i % len(batches)].flops,
        )  # fmt: skip

    def profile(
        self, variant: Variant, batch: GlobalBatch, model: ModelConfig, label: str, common: dict[str, Any]
    ) -> None:
        """One step under the profiler, beside its time without."""
        again = replace(variant, run=lambda i: variant.run(0))
        wall = float(np.median(interleave([again], self.device, 0, (5, 5))[again.name]))
        parts = profiled(lambda: variant.run(0))
        gemm = training_flops(model, batch.num_tokens, 0)
        report = self.report
        report.say(f"\nwhat a step is made of, {label}; {wall * 1e3:.1f} ms, {batch.num_tokens:,} tokens")
        for part, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1]):
            rate = {"GEMM": gemm, "attention": batch.flops - gemm}.get(part, 0.0) / max(seconds, 1e-9) / 1e12
            note = f"   {rate:6.0f} TF/s" if rate else ""
            report.say(f"    {part:28}{seconds * 1e3:9.2f} ms{seconds / wall:8.1%}{note}")
            figures = {"seconds": seconds, "share": seconds / wall, "tflops": rate or None}
            report.append(what="profile", part=part, **figures, **common)
        idle = max(0.0, wall - parts.busy)
        report.say(f"    {'no kernel running':28}{idle * 1e3:9.2f} ms{idle / wall:8.1%}   (host, or waiting)")
        report.append(what="profile", part="idle", seconds=idle, share=idle / wall, **common)
        for name, seconds in parts.other:
            report.say(f"    largest in other: {seconds * 1e3:.2f} ms {name[:90]}")

    # ---- encoding: a corpus to unit vectors in host memory

    def encode_ours_variants(self, shape: str) -> None:
        for kind in ["ours"] + (["ours fp8"] if self.has_fp8 or self.args.precision == "fp8" else []):
            run = partial(self.encode_with, shape, kind)
            self.piece(f"encode {shape}, {kind}", self.about("encode", shape), run)

    def encode_peers(self, shape: str, peers: Sequence[str]) -> None:
        for kind in (kind for kind in peers if kind in COMPILED and self.passes_gate(kind)):
            run = partial(self.encode_with, shape, kind)
            self.piece(f"encode {shape}, {kind}", self.about("encode peer", shape), run)
        if importlib.util.find_spec("vllm") is None:
            self.report.not_timed(f"encode {shape}, vllm", "vllm is not installed")
        else:
            run = partial(self.encode_with, shape, "vllm")
            self.piece(f"encode {shape}, vllm", self.about("vllm", shape), run)

    def encode_with(self, shape: str, kind: str) -> None:
        device, dtype, args = self.device, self.args.dtype, self.args
        model = with_layers(shape, args.layers)
        groups = Groups(max(1, round(args.encode_tokens / (PASSAGES[0] * 5))), 4, model.vocab_size, seed=2)
        texts, lengths = groups.documents, groups.document_lengths.astype(np.int64)
        start = allocated(device)
        with torch.device("meta"):
            attention = pick_attention("auto", device, dtype, backward=False)
            encoder = Encoder(model, TensorParallel(), attention)
        encoder.to(dtype).to_empty(device=device).requires_grad_(False)
        fill_random(encoder, seed=0, std=0.02)
        label, common = describe(shape, model, sum(p.numel() for p in encoder.parameters()))
        common |= {"what": "encode", "texts": len(texts), "precision": str(dtype).removeprefix("torch.")}
        if kind == "ours fp8":
            run_in_fp8(encoder)
            freeze_weights(encoder)
        packs = list(pack_texts(texts, 2 * args.tokens))
        out = np.empty((len(texts), model.hidden_size), np.float32)

        @torch.inference_mode()
        def ours(i: int = 0) -> None:
            for indices, batch in packs:
                batch = batch.to(device)
                segments = Segments(batch.cu_seqlens, batch.lengths, batch.max_seqlen)
                rows = encoder(batch.input_ids, batch.position_ids, segments)[: batch.num_sequences]
                out[indices] = rows.float().cpu().numpy()

        if kind.startswith("ours"):
            name = f"{kind}, packed {2 * args.tokens:,}"
            details = {"max_tokens": 2 * args.tokens, "fp8": kind == "ours fp8"}
            variants = [Variant(name, ours, 1.0, kind, details)]
        else:
            ours()
            start = allocated(device)
            variants = self.encoding_peers(kind, encoder, model, texts, lengths)
        truth = out.copy()
        for variant in variants:
            warm_up(variant, device, 1, start)
            if not kind.startswith("ours"):  # of the same weights
                rows, floor = variant.last, 0.98 if dtype == torch.bfloat16 else 0.9999
                cosine = ((truth * rows).sum(1) / np.linalg.norm(rows, axis=1)).min()
                assert cosine > floor, f"ours and {variant.name}: cosine {cosine}"
        flops = training_flops(model, int(lengths.sum()), int(np.square(lengths).sum())) / 3
        self.report.table(
            f"encoding, {label}; {len(texts)} passages, {int(lengths.sum()):,} tokens", common, variants,
            interleave([v for v in variants if not v.error], device, args.seconds, args.rounds),
            lambda i: float(lengths.sum()), lambda i: flops,
        )  # fmt: skip

    def encoding_peers(
        self, kind: str, encoder: nn.Module, model: ModelConfig, texts: list, lengths: np.ndarray
    ) -> list[Variant]:
        """run(i) gives the vectors [texts, D]."""
        device, dtype = self.device, self.args.dtype
        if kind == "vllm":
            with tempfile.TemporaryDirectory() as folder:
                embed = vllm_embedder(encoder, model, Path(folder))
            return [Variant("vLLM, its own batches", lambda i: embed(texts), 1.0, "flattened", {})]
        peer = PEERS[kind][1](model, device, dtype, train=False)
        peer.copy_from(encoder, model)
        variants = []
        in_order, by_length = np.arange(len(texts)), np.argsort(-lengths, kind="stable")
        for order, size, what in ((in_order, 16, "corpus order"), (by_length, 64, "sorted by length")):
            chunks = [order[i : i + size] for i in range(0, len(order), size)]
            padded = [pad([texts[i] for i in chunk]) for chunk in chunks]

            @torch.inference_mode()
            def run(i: int, chunks: Any = chunks, padded: Any = padded) -> np.ndarray:
                rows = np.empty((len(texts), model.hidden_size), np.float32)
                for chunk, (ids, mask) in zip(chunks, padded, strict=True):
                    if device.type == "cuda":
                        ids, mask = (x.pin_memory().to(device, non_blocking=True) for x in (ids, mask))
                    rows[chunk] = peer.embed(ids, mask).cpu().numpy()
                return rows

            name = f"{peer.name}, {size} texts, {what}"
            useful = int(lengths.sum()) / sum(ids.numel() for ids, _ in padded)
            variants.append(Variant(name, run, useful, "padded", {"batch_size": size}))
        return variants
