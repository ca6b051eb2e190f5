"""Our Triton kernels beside eager torch, torch.compile and the installed peers, as shares of what the card
can do.

    python -m benchmarks.kernels [--kernel rms_norm swiglu ...] [--shapes T=4096,D=4096 ...] [--minutes 30
    --tune-compile]

For every kernel and shape: first the correctness gate (ours against float64, outputs and all gradients, no
worse than twice plain torch in the same dtype), and no timing of a kernel that fails it; then ours and the
peers in turn in one process, over buffers that exceed the L2 cache, median of 20 and more; "a copy of it"
moves as many bytes by torch.copy_, which takes longer than the bytes of a large copy would where they are
few. Peers (Liger, flash-attn, apex, cut-cross-entropy, Inf-CL) take part when they can be imported. GB/s
count the bytes that the operation cannot avoid, not those that an implementation moves, and are given as a
share of a copy measured in this run; TFLOP/s likewise, of a bf16 GEMM. Without a CUDA device only the gate
runs, through Triton's interpreter, on small shapes. Needs torch, triton and numpy; draws a roofline if
matplotlib can be imported.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the next lines do

from benchmarks.ceilings import (
    ResultsFile,
    copy_bandwidth,
    interleaved_times,
    kernel_lines,
    kernel_times,
    matmul_rates,
)
from nemo_embed_core.kernels import dropout_linear as dropped
from nemo_embed_core.kernels import fp8, info_nce, mean_pool, rms_norm, rope, swiglu
from nemo_embed_core.loss.contrastive import scored_dtype
from nemo_embed_core.model import attention
from nemo_embed_core.parallel.mesh import DTYPES

Tensors = dict[str, torch.Tensor]
L2_BYTES = 60 * 2**20
TEMPERATURE = 0.02

# kernel -> what the goals are: share of the ceiling (forward and backward together), and factors over peers
GOALS: dict[str, dict[str, float]] = {
    "rms_norm": {"ceiling": 0.90, "liger": 1.15},
    "swiglu": {"ceiling": 0.90, "liger": 1.15},
    "rope": {"ceiling": 0.90, "liger": 1.15},
    "mean_pool": {"ceiling": 0.85, "padded": 8.0, "segment_reduce": 3.0},
    "info_nce_hard": {"ceiling": 0.85, "eager": 8.0, "compile": 2.5},
    "info_nce_in_batch": {"ceiling": 0.80, "inf_cl": 8.0, "cce": 1.5},
}


@dataclass
class Variant:
    run: Callable[..., object]
    inputs: Callable[[Tensors], Tensors] = dict  # from the inputs of ours, where its layout is another one
    comparable: bool = True  # entry by entry with ours


@dataclass
class Case:
    kernel: str
    shape: dict[str, int]
    inputs: Callable[[], Tensors]  # new random inputs, all of which want gradients
    ours: Callable[..., object]
    reference: Callable[..., object]  # for the gate
    bytes: tuple[float, float]  # that have to be read and written, forward and backward
    flops: tuple[float, float]
    compute_bound: bool = False
    # What tensor cores may lose of output 0, beyond plain torch in fp32 units, in the gate.
    truncated: float = 0.0
    eager: Callable[..., object] | None = None  # what users write, where that is not the reference
    peers: dict[str, Variant] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # peer -> why it does not take part
    in_turn: bool = True  # False: a variant changes the process for the others, so one after the other

    def peer(
        self, name: str, module: str, make: Callable[[Any], Callable[..., object]], comparable: bool = True
    ) -> None:
        try:
            self.peers[name] = Variant(make(importlib.import_module(module)), comparable=comparable)
        except (
            ImportError,
            AttributeError,
        ) as error:  # apex on PyPI is another package: imports, but has no such names
            self.missing[name] = str(error)


def random(*shape: int, dtype: torch.dtype, device: str, unit: bool = False) -> torch.Tensor:
    x = torch.randn(shape, device=device)
    return (F.normalize(x, dim=-1) if unit else x).to(dtype)


def rms_norm_case(dtype: torch.dtype, device: str, T: int, D: int, amax: int = 0) -> Case:
    """amax: with the largest output, beside the pass of its own that it replaces."""

    def inputs() -> Tensors:
        x = {name: random(T, D, dtype=dtype, device=device) for name in ("x_TD", "residual_TD")}
        return x | {"weight_D": random(D, dtype=dtype, device=device)}

    moved = 4 * T * D * dtype.itemsize  # x, residual -> y, hidden;  dy, dhidden, hidden -> dx
    case = Case(
        "rms_norm",
        {"T": T, "D": D},
        inputs,
        ours=lambda **x: rms_norm.rms_norm_kernel(eps=1e-5, amax=bool(amax), **x)[:2],
        reference=lambda **x: rms_norm.rms_norm_ref(eps=1e-5, amax=bool(amax), **x)[:2],
        bytes=(moved, moved),
        flops=(5 * T * D, 11 * T * D),
    )

    def amax_pass(**x):
        y_TD, hidden_TD, _ = rms_norm.rms_norm_kernel(eps=1e-5, **x)
        return y_TD, hidden_TD, fp8.amax_kernel(y_TD.detach())

    if amax:
        case.shape["amax"] = 1
        case.peers["amax_pass"] = Variant(lambda **x: amax_pass(**x)[:2])
        return case

    def liger(module):
        apply = module.LigerFusedAddRMSNormFunction.apply
        return lambda x_TD, residual_TD, weight_D: apply(
            x_TD, residual_TD, weight_D, 1e-5, 0.0, "llama", False
        )

    def flash_attn(module):
        norm = module.rms_norm_fn
        return lambda x_TD, residual_TD, weight_D: norm(
            x_TD, weight_D, None, residual=residual_TD, eps=1e-5, prenorm=True
        )

    def apex(module):
        norm = module.fused_rms_norm_affine

        def run(x_TD, residual_TD, weight_D):
            hidden_TD = x_TD + residual_TD
            return norm(hidden_TD, weight_D, (D,), 1e-5), hidden_TD

        return run

    case.peer("liger", "liger_kernel.ops.fused_add_rms_norm", liger)
    case.peer("flash_attn", "flash_attn.ops.triton.layer_norm", flash_attn)
    case.peer("apex", "apex.normalization.fused_layer_norm", apex)
    return case


class PassOfItsOwn(torch.autograd.Function):
    """x; its gradient is read once more for the largest value, which becomes that of `beside`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], fp8.amax_kernel(grads[0])


def swiglu_case(dtype: torch.dtype, device: str, T: int, width: int, blocks: int, amax: int = 0) -> Case:
    """width: of the whole output, all blocks together. amax: with the largest output and gradient, beside the
    passes of their own that they replace."""

    def inputs() -> Tensors:
        x = {"gate_up_TE": random(T, 2 * width, dtype=dtype, device=device)}
        return x | ({"beside": torch.zeros((), device=device)} if amax else {})

    case = Case(
        "swiglu",
        {"T": T, "width": width, "blocks": blocks},
        inputs,
        ours=lambda **x: swiglu.swiglu_kernel(num_blocks=blocks, **x)[0],
        reference=lambda **x: swiglu.swiglu_ref(num_blocks=blocks, **x)[0],
        bytes=(3 * T * width * dtype.itemsize, 5 * T * width * dtype.itemsize),
        flops=(6 * T * width, 14 * T * width),
    )

    def amax_pass(gate_up_TE, beside):
        gate_up_TE = PassOfItsOwn.apply(gate_up_TE, beside)
        out_TF, _ = swiglu.swiglu_kernel(gate_up_TE, blocks)
        fp8.amax_kernel(out_TF.detach())
        return out_TF

    if amax:
        case.shape["amax"] = 1
        case.peers["amax_pass"] = Variant(amax_pass)
        return case

    def liger(module):
        # Its kernel for one buffer with all gates before all ups: as many bytes, other columns.
        return lambda gate_up_TE: module.LigerFusedGateUpSiLUMulFunction.apply(gate_up_TE)

    case.peer("liger", "liger_kernel.ops.swiglu", liger, comparable=False)
    return case


def rope_case(dtype: torch.dtype, device: str, T: int, H: int, G: int, A: int) -> Case:
    columns = (H + 2 * G) * A
    angle = torch.rand(T, A // 2, device=device) * 2 * math.pi
    cos_TR, sin_TR = angle.cos(), angle.sin()
    moved = T * (2 * columns * dtype.itemsize + 2 * (A // 2) * 4)
    case = Case(
        "rope",
        {"T": T, "H": H, "G": G, "A": A},
        lambda: {"qkv_TE": random(T, columns, dtype=dtype, device=device)},
        ours=lambda qkv_TE: rope.split_rope_kernel(qkv_TE, cos_TR, sin_TR, H, G, A),
        reference=lambda qkv_TE: rope.split_rope_ref(qkv_TE, cos_TR, sin_TR, H, G, A),
        bytes=(moved, moved),
        flops=(3 * T * (H + G) * A, 3 * T * (H + G) * A),
    )

    def liger(module):
        apply = module.LigerRopeFunction.apply
        cos, sin = (torch.cat([table, table], -1)[None].to(dtype) for table in (cos_TR, sin_TR))

        def run(qkv_TE):
            q, k, v = qkv_TE.view(T, G, H // G + 2, A).split([H // G, 1, 1], 2)
            # The copies that its layout needs.
            q, k = (x.reshape(1, T, -1, A).transpose(1, 2) for x in (q, k))
            q, k = apply(q, k, cos, sin)
            return *(x.transpose(1, 2).reshape(T, -1, A) for x in (q, k)), v.squeeze(2).contiguous()

        return run

    case.peer("liger", "liger_kernel.ops.rope", liger)
    return case


def dropout_linear_case(dtype: torch.dtype, device: str, T: int, D: int, rank: int) -> Case:
    """Beside torch's own dropout, whose mask is saved and another one in each layout, and none at all."""
    bounds = torch.tensor([0, T // 3, T], device=device)
    ids, positions = torch.arange(T, device=device), torch.arange(T, device=device)
    place = dropped.token_keys(dropped.run_key(0, 1), ids, positions, bounds), 3, 0, 0.1

    def inputs() -> Tensors:
        shapes = {"x_TI": (T, D), "A_RI": (rank, D)}
        return {name: random(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    case = Case(
        "dropout_linear",
        {"T": T, "D": D, "rank": rank},
        inputs,
        ours=lambda x_TI, A_RI: dropped.dropout_linear_kernel(x_TI, A_RI, *place),
        reference=lambda x_TI, A_RI: dropped.dropout_linear_ref(x_TI, A_RI, *place),
        bytes=(T * D * dtype.itemsize, 2 * T * D * dtype.itemsize),  # x;  x -> dx
        flops=(2 * T * D * rank, 4 * T * D * rank),
        eager=lambda x_TI, A_RI: F.linear(F.dropout(x_TI, place[-1]), A_RI),
    )
    case.peers["no_dropout"] = Variant(lambda x_TI, A_RI: F.linear(x_TI, A_RI), comparable=False)
    return case


def document_lengths(num_tokens: int) -> list[int]:
    """Lengths of a corpus of short documents: lognormal, median 81, mean about 105; a query of about 14 to
    every five."""
    generator = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(int(generator.integers(5, 24)))
        lengths += [int(n) for n in np.clip(generator.lognormal(math.log(81), 0.72, 5), 4, 512)]
    while sum(lengths) - lengths[-1] >= num_tokens:
        lengths.pop()
    lengths[-1] -= sum(lengths) - num_tokens
    return lengths


def mean_pool_case(
    dtype: torch.dtype, device: str, T: int, D: int, one_sequence: int, normalize: int
) -> Case:
    """normalize: with the L2 normalisation; one_sequence: a single sequence instead of short documents."""
    lengths = [T] if one_sequence else document_lengths(T)
    num_sequences, longest = len(lengths), max(lengths)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    lengths_N = cu_seqlens.diff().long()

    def inputs() -> Tensors:
        return {"x_TD": random(T, D, dtype=dtype, device=device)}

    pooled = num_sequences * D * 4
    case = Case(
        "mean_pool",
        {"T": T, "D": D, "one_sequence": one_sequence, "normalize": normalize},
        inputs,
        ours=lambda **x: mean_pool.mean_pool_kernel(cu_seqlens=cu_seqlens, normalize=bool(normalize), **x),
        reference=lambda **x: mean_pool.mean_pool_ref(cu_seqlens=cu_seqlens, normalize=bool(normalize), **x),
        bytes=(T * D * dtype.itemsize + pooled,) * 2,
        flops=(T * D,) * 2,
    )

    def finish(mean_ND: torch.Tensor) -> torch.Tensor:
        return F.normalize(mean_ND, dim=-1) if normalize else mean_ND

    def segment_reduce(x_TD):
        return finish(torch.segment_reduce(x_TD.float(), "mean", lengths=lengths_N, axis=0))

    case.peers["segment_reduce"] = Variant(segment_reduce)
    if num_sequences > 1:
        mask = (torch.arange(longest, device=device) < lengths_N[:, None])[..., None]

        def padded(x_TD):  # [N, longest, D], as a padded model's hidden state
            return finish((x_TD.float() * mask).sum(1) / lengths_N[:, None])

        def padded_inputs(x: Tensors) -> Tensors:
            return x | {"x_TD": random(num_sequences, longest, D, dtype=dtype, device=device)}

        case.peers["padded"] = Variant(padded, padded_inputs, comparable=False)
    return case


def attention_case(dtype: torch.dtype, device: str, T: int, H: int, G: int, A: int) -> Case:
    """Every backend that runs here, on packed short documents; ours is the one that "auto" chooses."""
    lengths = sorted(document_lengths(T))  # as packing sorts them
    num_sequences, longest = len(lengths), max(lengths)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    segments = attention.Segments(ends.to(torch.int32), lengths, longest)
    lengths_N = ends.diff()
    mask_NL = torch.arange(longest, device=device) < lengths_N[:, None]
    place_T = mask_NL.flatten().nonzero().squeeze(1)  # of a token among the padded positions

    def inputs() -> Tensors:
        heads = {"q_THA": H, "k_TGA": G, "v_TGA": G}
        return {name: random(T, n, A, dtype=dtype, device=device) for name, n in heads.items()}

    def padded(q_THA, k_TGA, v_TGA):
        def pad(x):
            x = x.repeat_interleave(H // x.shape[1], 1)
            rows = x.new_zeros(num_sequences * longest, H, A).index_copy(0, place_T, x)
            return rows.view(num_sequences, longest, H, A).transpose(1, 2)

        q, k, v = (pad(x) for x in (q_THA, k_TGA, v_TGA))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_NL[:, None, None])
        return out.transpose(1, 2).flatten(0, 1)[place_T]

    def backend(name: str) -> Callable[..., object]:
        function = attention.pick_attention(name, torch.device(device), dtype)

        def run(q_THA, k_TGA, v_TGA):
            if name != "varlen3" and "varlen3" in case.peers:
                torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
            return function(q_THA, k_TGA, v_TGA, segments)

        return run

    chosen = attention.choose_attention("auto", torch.device(device), dtype)
    squares = sum(n * n for n in lengths)
    moved = T * (2 * H + 2 * G) * A * dtype.itemsize  # q, k, v -> out;  dout, q, k, v, out -> dq, dk, dv
    case = Case(
        "attention",
        {"T": T, "H": H, "G": G, "A": A},
        inputs,
        ours=backend(chosen),
        reference=lambda **x: attention.reference_attention(segments=segments, **x),
        eager=padded,
        bytes=(moved, 2 * moved),
        flops=(4 * H * A * squares, 8 * H * A * squares),  # useful ones, without scores computed again
        compute_bound=True,
    )
    for name, lacks in attention.backends(torch.device(device), dtype).items():
        if name == chosen:
            case.missing[name] = "is ours, the first that runs here"
        elif lacks:
            case.missing[name] = lacks
        else:
            case.peers[name] = Variant(backend(name))
    case.in_turn = "varlen3" not in case.peers
    return case


def info_nce_hard_case(dtype: torch.dtype, device: str, B: int, K: int, D: int) -> Case:
    mask_BM = torch.rand(B, 1 + K, device=device) > 0.1
    mask_BM[:, 0] = True
    labels_B = torch.zeros(B, dtype=torch.int64, device=device)

    def inputs() -> Tensors:
        q_BD = random(B, D, dtype=dtype, device=device, unit=True)
        return {"q_BD": q_BD, "docs_BMD": random(B, 1 + K, D, dtype=dtype, device=device, unit=True)}

    def eager(
        q_BD, docs_BMD
    ):  # scores in the model's dtype, as recipes compute them: ours is more exact, and still the peer
        scores_BM = torch.bmm(docs_BMD, q_BD[..., None]).squeeze(-1).float() / TEMPERATURE
        return F.cross_entropy(scores_BM.masked_fill(~mask_BM, -math.inf), labels_B, reduction="none")

    read = B * (2 + K) * D * dtype.itemsize
    return Case(
        "info_nce_hard",
        {"B": B, "K": K, "D": D},
        inputs,
        ours=lambda **x: info_nce.info_nce_hard_kernel(mask_BM=mask_BM, temperature=TEMPERATURE, **x),
        reference=lambda **x: info_nce.info_nce_hard_ref(mask_BM=mask_BM, temperature=TEMPERATURE, **x),
        eager=eager,
        bytes=(read, 2 * read),
        flops=(2 * B * (1 + K) * D, 3 * B * (1 + K) * D),
    )


def info_nce_in_batch_case(dtype: torch.dtype, device: str, B: int, P: int, D: int, ids: int) -> Case:
    """ids: with the mask of same-document false negatives, which the other libraries do not have."""
    labels_B = torch.arange(B, device=device) % P
    doc_ids_P = torch.randint(0, max(1, 9 * P // 10), (P,), device=device) if ids else None
    options: dict[str, Any] = {"labels_B": labels_B, "temperature": TEMPERATURE, "doc_ids_P": doc_ids_P}

    def inputs() -> Tensors:
        docs_PD = random(P, D, dtype=dtype, device=device, unit=True)
        # A cosine of 0.2 to the positive: losses near 1, not of 1e-12 where every library's fp32 is only
        # rounding.
        near_BD = docs_PD[labels_B].float() + 5 * random(B, D, dtype=torch.float32, device=device, unit=True)
        return {"q_BD": F.normalize(near_BD, dim=-1).to(dtype), "docs_PD": docs_PD}

    def eager(q_BD, docs_PD):
        scores_BP = (q_BD @ docs_PD.T).float() / TEMPERATURE
        if doc_ids_P is not None:
            others = doc_ids_P[labels_B, None] == doc_ids_P
            others[torch.arange(B, device=device), labels_B] = False
            scores_BP = scores_BP.masked_fill(others, -math.inf)
        return F.cross_entropy(scores_BP, labels_B, reduction="none")

    read = (B + P) * D * dtype.itemsize
    case = Case(
        "info_nce_in_batch",
        {"B": B, "P": P, "D": D, "ids": ids},
        inputs,
        ours=lambda **x: info_nce.info_nce_in_batch_kernel(**options, **x),
        reference=lambda **x: info_nce.info_nce_in_batch_ref(**options, **x),
        eager=eager,
        bytes=(read, 2 * read),
        flops=(
            2 * B * P * D,
            6 * B * P * D,
        ),  # with the scores computed again in the backward: nothing of [B, P] is kept
        compute_bound=True,
        # Hopper's tensor cores truncate a sum after every 16 columns: half an ulp of a cosine below 0.5 on
        # average, in the logsumexp and in the positive's score.
        truncated=2 * D / 16 * 2.0**-26 / TEMPERATURE if device == "cuda" and dtype != torch.float32 else 0.0,
    )

    def cce(module, **options):
        loss = module.linear_cross_entropy
        return lambda q_BD, docs_PD: loss(
            (q_BD / TEMPERATURE).to(dtype), docs_PD, labels_B, reduction="none", **options
        )

    def inf_cl(module):
        loss = module.cal_flash_loss
        return lambda q_BD, docs_PD: loss(q_BD, docs_PD, labels_B, scale=1 / TEMPERATURE)

    if not ids:
        # On the same work: all gradients. By default it leaves out blocks whose probabilities are small.
        case.peer("cce", "cut_cross_entropy", lambda module: cce(module, filter_eps=None))
        case.peer("cce_filtered", "cut_cross_entropy", cce)
        if B * P <= 2**29:  # seconds a call beyond
            case.peer("inf_cl", "inf_cl", inf_cl)
    return case


KERNELS: dict[str, Callable[..., Case]] = {
    "attention": attention_case,
    "dropout_linear": dropout_linear_case,
    "info_nce_hard": info_nce_hard_case,
    "info_nce_in_batch": info_nce_in_batch_case,
    "mean_pool": mean_pool_case,
    "rms_norm": rms_norm_case,
    "rope": rope_case,
    "swiglu": swiglu_case,
}
# The 8B and 1B models at 16k packed tokens; the losses at the sizes of their goals. The first one of each is
# the goal's.
SHAPES: dict[str, list[dict[str, int]]] = {
    "attention": [{"T": 16384, "H": 32, "G": 8, "A": 128}, {"T": 16384, "H": 32, "G": 8, "A": 64}],
    "dropout_linear": [{"T": 16384, "D": 4096, "rank": 16}, {"T": 16384, "D": 14336, "rank": 16}],
    "rms_norm": [
        {"T": 16384, "D": 4096},
        {"T": 16384, "D": 2048},
        {"T": 2048, "D": 4096},
        {"T": 16384, "D": 4096, "amax": 1},
    ],
    "swiglu": [
        {"T": 16384, "width": 14336, "blocks": 8},
        {"T": 16384, "width": 8192, "blocks": 8},
        {"T": 16384, "width": 14336, "blocks": 8, "amax": 1},
    ],
    "rope": [{"T": 16384, "H": 32, "G": 8, "A": 128}, {"T": 16384, "H": 32, "G": 8, "A": 64}],
    "mean_pool": [
        {"T": 16384, "D": 4096, "one_sequence": 0, "normalize": 1},
        {"T": 65536, "D": 4096, "one_sequence": 0, "normalize": 1},
        {"T": 16384, "D": 4096, "one_sequence": 0, "normalize": 0},
        {"T": 32768, "D": 4096, "one_sequence": 1, "normalize": 1},
        {"T": 16384, "D": 2048, "one_sequence": 0, "normalize": 1},
    ],
    "info_nce_hard": [
        {"B": 2048, "K": 4, "D": 4096},
        {"B": 16384, "K": 4, "D": 4096},
        {"B": 128, "K": 4, "D": 4096},
    ],
    "info_nce_in_batch": [
        {"B": 8192, "P": 40960, "D": 4096, "ids": 0},
        {"B": 8192, "P": 40960, "D": 4096, "ids": 1},
        {"B": 2048, "P": 10240, "D": 2048, "ids": 0},
        {"B": 32768, "P": 32768, "D": 4096, "ids": 0},
    ],
}


def timed_dtype(kernel: str) -> str:
    """Of a kernel's inputs in a bf16 run, by name: losses get the rows that training scores."""
    in_batch = {"info_nce_hard": False, "info_nce_in_batch": True}.get(kernel)
    dtype = torch.bfloat16 if in_batch is None else scored_dtype(in_batch, torch.bfloat16)
    return next(name for name, known in DTYPES.items() if known == dtype)


def timed_case(kernel: str, device: str, shape: dict[str, int]) -> Case:
    return KERNELS[kernel](DTYPES[timed_dtype(kernel)], device, **shape)


# Shapes of the gate: nothing divides anything. On the CPU one program takes milliseconds, so few of them.
GATE: dict[str, dict[str, dict[str, int]]] = {
    "cuda": {
        "attention": {"T": 1025, "H": 32, "G": 8, "A": 128},
        "dropout_linear": {"T": 1025, "D": 4096, "rank": 16},
        "rms_norm": {"T": 1025, "D": 4096, "amax": 1},
        "swiglu": {"T": 513, "width": 8 * 1792, "blocks": 8, "amax": 1},
        "rope": {"T": 1025, "H": 32, "G": 8, "A": 128},
        "mean_pool": {"T": 2049, "D": 4096, "one_sequence": 0, "normalize": 1},
        "info_nce_hard": {"B": 129, "K": 4, "D": 4096},
        "info_nce_in_batch": {"B": 257, "P": 3001, "D": 4096, "ids": 0},
    },
    "cpu": {
        "attention": {"T": 129, "H": 6, "G": 2, "A": 32},
        "dropout_linear": {"T": 9, "D": 100, "rank": 3},
        "rms_norm": {"T": 9, "D": 100, "amax": 1},
        "swiglu": {"T": 9, "width": 3 * 40, "blocks": 3, "amax": 1},
        "rope": {"T": 9, "H": 6, "G": 2, "A": 32},
        "mean_pool": {"T": 129, "D": 100, "one_sequence": 0, "normalize": 1},
        "info_nce_hard": {"B": 9, "K": 4, "D": 100},
        "info_nce_in_batch": {"B": 17, "P": 129, "D": 100, "ids": 1},
    },
}


# ------------------------------------------------------------------------------------------ the gate


def run_once(function: Callable[..., object], inputs: Tensors) -> dict[str, torch.Tensor]:
    """The outputs, and the gradients of sum(output * noise) in every input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = as_list(function(**leaves))
    generator = torch.Generator().manual_seed(1)
    noise = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for y in outputs
    ]
    torch.autograd.backward(outputs, noise)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    for name, x in leaves.items():
        assert x.grad is not None, f"no gradient in {name}"
        results[f"d({name})"] = x.grad
    return results


def as_list(outputs: Any) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def gate(case: Case) -> list[str]:
    """What is wrong with ours; and peers that fail or are off are taken out, with the reason."""
    torch.manual_seed(0)
    inputs = case.inputs()
    truth = run_once(case.reference, {name: x.double() for name, x in inputs.items()})
    plain, ours = run_once(case.reference, inputs), run_once(case.ours, inputs)
    faults = []
    for name, exact in truth.items():
        error, lost = ((x[name].double() - exact).abs().max().item() for x in (ours, plain))
        ulp = torch.finfo(ours[name].dtype).eps * exact.abs().max().item()
        budget = 2 * lost + (8 if ours[name].dtype == torch.float32 else 1) * ulp
        budget += case.truncated if name == "output 0" else 0.0
        if not error <= budget:  # NaN too
            faults.append(f"{name}: error {error:.2e} is above the budget {budget:.2e}")
    for name, peer in list(case.peers.items()):
        try:
            theirs = run_once(peer.run, peer.inputs(inputs))["output 0"]
            if not peer.comparable:
                continue
            error = ((theirs.double() - truth["output 0"]).abs().max() / truth["output 0"].abs().max()).item()
            if not error <= 0.1:
                raise RuntimeError(f"its output is off by {error:.0%} of the largest value")
        except Exception as error:  # a peer's failure is reported, and does not keep ours from being measured
            del case.peers[name]
            case.missing[name] = first_line(error)
    return faults


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def run_gates(kernels: list[str], device: str) -> dict[str, list[str]]:
    """-> faults by kernel, empty for those that may be measured"""
    all_faults: dict[str, list[str]] = {}
    for kernel in kernels:
        faults = []
        for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float16, torch.float32):
            case = KERNELS[kernel](dtype, device, **GATE[device][kernel])
            case.peers.clear()
            faults += [f"{dtype}: {fault}" for fault in gate(case)]
        print(f"gate {kernel:18s} {'passed' if not faults else 'FAILED: ' + '; '.join(faults)}", flush=True)
        all_faults[kernel] = faults
    return all_faults


# ------------------------------------------------------------------------------------------ timing


def variants(case: Case, compile_mode: str | None) -> dict[str, Variant]:
    eager = case.eager or case.reference
    compiled = {}
    if compile_mode is not None:
        compiled["compile"] = Variant(torch.compile(eager, dynamic=False, mode=compile_mode))
    return {"ours": Variant(case.ours), "eager": Variant(eager)} | compiled | case.peers


@dataclass
class Calls:
    """Forward, and backward through graphs that are built at its first call, over all sets of inputs."""

    function: Callable[..., object]
    leaves: list[Tensors]
    gradients: list[torch.Tensor] = field(default_factory=list)
    graphs: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=list)

    def forward(self) -> object:
        return [self.function(**x) for x in self.leaves]

    def backward(self) -> object:
        if not self.graphs:
            for x in self.leaves:
                outputs = [y for y in as_list(self.function(**x)) if y.requires_grad]
                self.graphs.append((outputs, list(x.values())))
            self.gradients = [torch.randn_like(y) for y in self.graphs[0][0]]
        return [torch.autograd.grad(ys, xs, self.gradients, retain_graph=True) for ys, xs in self.graphs]


def peak_memory(calls: Calls) -> float:
    """MiB above the inputs, of one forward and backward."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one = Calls(calls.function, calls.leaves[:1])
    one.backward()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_milliseconds(size: float, num_sets: int, repeats: int) -> float:
    """A copy of so many bytes: what is left of a large copy's bandwidth where a launch and its ramp are part
    of the time."""
    pairs = [
        [torch.empty(int(size), dtype=torch.uint8, device="cuda") for _ in range(2)] for _ in range(num_sets)
    ]
    for source, _ in pairs:
        source.random_()
    times = interleaved_times({"copy": lambda: [target.copy_(source) for source, target in pairs]}, repeats)[
        "copy"
    ]
    return statistics.median(times) / num_sets


def measure(case: Case, repeats: int, compile_mode: str | None) -> dict[str, dict[str, Any]]:
    """-> variant -> median milliseconds of forward and backward, peak memory of one of each; or why there are
    none. Of ours also the microseconds of every kernel."""
    torch.manual_seed(0)
    sets = [case.inputs()]
    num_sets = max(1, min(16, math.ceil(3 * L2_BYTES / sum(x.nbytes for x in sets[0].values()))))
    sets += [case.inputs() for _ in range(num_sets - 1)]
    figures: dict[str, dict[str, Any]] = {}
    all_calls: dict[str, Calls] = {}
    for name, variant in variants(case, compile_mode).items():
        try:
            prepared = [variant.inputs(inputs) for inputs in sets]
            calls = Calls(
                variant.run, [{k: x.detach().requires_grad_() for k, x in xs.items()} for xs in prepared]
            )
            figures[name] = {"peak_mib": peak_memory(calls)}
            all_calls[name] = calls
        except (
            Exception
        ) as error:  # out of memory, or a peer that does not take this shape: said in the table
            if name == "ours":
                raise
            figures[name] = {"error": first_line(error)}
            torch.cuda.empty_cache()
    if not case.compute_bound:
        figures["ours"]["copy_ms"] = [
            copy_milliseconds(amount / 2, num_sets, repeats) for amount in case.bytes
        ]
    # In turn as far as all their graphs fit side by side, else one after the other.
    needed = num_sets * 2**20 * sum(figures[name]["peak_mib"] for name in all_calls)
    together = case.in_turn and needed < 0.5 * torch.cuda.mem_get_info()[0]
    for group in [list(all_calls)] if together else [[name] for name in all_calls]:
        forward = interleaved_times({name: all_calls[name].forward for name in group}, repeats)
        backward = interleaved_times({name: all_calls[name].backward for name in group}, repeats)
        for name in group:
            figures[name]["forward_ms"] = statistics.median(forward[name]) / num_sets
            figures[name]["backward_ms"] = statistics.median(backward[name]) / num_sets
            if name == "ours":
                passes = {"forward": all_calls[name].forward, "backward": all_calls[name].backward}
                figures[name]["kernels_us"] = {
                    way: kernel_times(call, num_sets) for way, call in passes.items()
                }
            del all_calls[name]
        gc.collect()
        torch.cuda.empty_cache()
    return figures


def report(
    case: Case, figures: dict[str, dict[str, Any]], ceilings: dict[str, float], results: ResultsFile
) -> None:
    shape = " ".join(f"{name}={value}" for name, value in case.shape.items())
    unit, ceiling = ("TFLOP/s", ceilings["tflops"]) if case.compute_bound else ("GB/s", ceilings["gb_per_s"])
    work = [
        x / (1e9 if case.compute_bound else 1e6) for x in (case.flops if case.compute_bound else case.bytes)
    ]
    dtype = timed_dtype(case.kernel)
    print(f"\n{case.kernel}  {shape}  {dtype}  (ceiling {ceiling:.0f} {unit})")
    print(
        f"  {'':14s} {'forward ms':>15s} {'backward ms':>17s} {unit:>8s} {'share':>6s} "
        f"{'ours is faster':>15s} {'peak MiB':>9s}"
    )
    for name, figure in figures.items():
        if "error" in figure:
            print(f"  {name:14s} {figure['error']}")
        else:
            milliseconds = [figure["forward_ms"], figure["backward_ms"]]
            shares = [amount / time / ceiling for amount, time in zip(work, milliseconds, strict=True)]
            figure["rate"] = sum(work) / sum(milliseconds)
            figure["share"] = figure["rate"] / ceiling
            figure["ours_is_faster_by"] = sum(milliseconds) / (
                figures["ours"]["forward_ms"] + figures["ours"]["backward_ms"]
            )
            print(
                f"  {name:14s} {milliseconds[0]:8.3f} ({shares[0]:4.0%}) {milliseconds[1]:10.3f} "
                f"({shares[1]:4.0%}) "
                f"{figure['rate']:8.0f} {figure['share']:6.1%} {figure['ours_is_faster_by']:14.2f}x "
                f"{figure['peak_mib']:9.0f}"
            )
        results.append(
            kernel=case.kernel,
            shape=case.shape,
            dtype=dtype,
            variant=name,
            unit=unit,
            ceiling=ceiling,
            **figure,
        )
    if not case.compute_bound:
        forward, backward = copies = figures["ours"]["copy_ms"]
        of_copy = sum(copies) / (figures["ours"]["forward_ms"] + figures["ours"]["backward_ms"])
        print(
            f"  {'a copy of it':14s} {forward:8.3f} {backward:17.3f}         ours has {of_copy:.1%} "
            f"of its speed"
        )
    for way, times in figures["ours"]["kernels_us"].items():
        print(f"  ours, {way}: {kernel_lines(times)}")
    for name, reason in case.missing.items():
        print(f"  {name:14s} not timed: {reason}")
        results.append(kernel=case.kernel, shape=case.shape, dtype=dtype, variant=name, error=reason)
    sys.stdout.flush()


def judge(kernel: str, figures: dict) -> list[str]:
    """The goals of a kernel, at its first shape, against what was measured."""
    lines = []
    for against, goal in GOALS.get(kernel, {}).items():
        if against == "ceiling":
            value, text = figures["ours"].get("share"), f"at least {goal:.0%} of the ceiling"
        else:
            value, text = figures.get(against, {}).get("ours_is_faster_by"), f"at least {goal:g} x {against}"
        verdict = "not measured" if value is None else ("met" if value >= goal else "MISSED")
        shown = "" if value is None else (f"{value:.1%}" if against == "ceiling" else f"{value:.2f} x")
        lines.append(f"{kernel:18s} {text:32s} {shown:>10s}  {verdict}")
    return lines


def draw_roofline(path: Path, points: list[tuple[str, float, float]], ceilings: dict[str, float]) -> None:
    """points: (label, FLOP per byte, TFLOP/s)"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    intensity = np.logspace(-2, 5, 200)
    roof = np.minimum(ceilings["tflops"], intensity * ceilings["gb_per_s"] / 1e3)
    axes.loglog(
        intensity,
        roof,
        color="black",
        label=f"copy {ceilings['gb_per_s']:.0f} GB/s, GEMM {ceilings['tflops']:.0f} TFLOP/s",
    )
    for label, x, y in points:
        axes.plot([x], [y], "o")
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, -10), fontsize=7)
    axes.set_xlabel("FLOP per byte that has to move")
    axes.set_ylabel("TFLOP/s")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def roofline_point(case: Case, figure: dict[str, Any]) -> tuple[str, float, float]:
    label = f"{case.kernel} {' '.join(f'{k}{v}' for k, v in case.shape.items())}"
    tflops = sum(case.flops) / (figure["forward_ms"] + figure["backward_ms"]) / 1e9
    return label, sum(case.flops) / sum(case.bytes), tflops


def parse_shape(text: str) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like T=4096,D=4096") from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernel", nargs="+", choices=list(KERNELS), default=list(KERNELS), help="default: all"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, help="for one --kernel, instead of its own: T=4096,D=4096"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timings per figure, at least 20 (default)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--tune-compile", action="store_true", help="max-autotune torch.compile: a minute for every case"
    )
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="start no further case after this long (default 3)"
    )
    options = parser.parse_args(arguments)
    if options.shapes:
        if len(options.kernel) != 1:
            parser.error("--shapes belongs to one kernel: name it with --kernel")
        wanted = list(SHAPES[options.kernel[0]][0])
        for shape in options.shapes:
            if list(shape) != wanted:
                parser.error(
                    f"--shapes of {options.kernel[0]} are {','.join(f'{name}=...' for name in wanted)}"
                )
    if options.repeats < 20:
        parser.error("--repeats below 20 gives a median that is not worth writing down")
    compile_mode = "max-autotune-no-cudagraphs" if options.tune_compile else "default"
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print(
            "no CUDA device on this machine: the correctness gate only, in Triton's interpreter (fp16, fp32)"
        )
        # Numpy's, of lanes that are masked.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    faults = run_gates(options.kernel, device)
    failed = [kernel for kernel, found in faults.items() if found]
    if device == "cuda":
        results = ResultsFile("kernels")
        ceilings = {"gb_per_s": copy_bandwidth()}
        square = matmul_rates(8192, 8192, 8192, ["bf16"])["bf16"]
        assert isinstance(square, float), square
        ceilings["tflops"] = square
        print(
            f"{results.run['gpu']}: copy {ceilings['gb_per_s']:.0f} GB/s, bf16 GEMM {square:.0f} TFLOP/s; "
            f"to {results.path}"
        )
        goals, points = [], []
        shapes = {
            kernel: options.shapes or SHAPES[kernel] for kernel in options.kernel if kernel not in failed
        }
        # The first shape of every kernel, on which the goals are, before the second of any.
        cases = sorted(
            ((index, kernel) for kernel in shapes for index in range(len(shapes[kernel]))), key=lambda x: x[0]
        )
        for index, kernel in cases:
            shape = shapes[kernel][index]
            if time.monotonic() - started > 60 * options.minutes:
                print(f"{kernel} {shape}: left out, {options.minutes:g} minutes are over (--minutes)")
                continue
            torch._dynamo.reset()  # a limited number of compilations per function is kept
            checked = timed_case(kernel, device, GATE[device][kernel])
            gate(checked)  # of the peers: those that fail are taken out
            case = timed_case(kernel, device, shape)
            case.missing |= checked.missing
            case.peers = {name: peer for name, peer in case.peers.items() if name not in checked.missing}
            figures = measure(case, options.repeats, None if options.no_compile else compile_mode)
            report(case, figures, ceilings, results)
            points.append(roofline_point(case, figures["ours"]))
            if index == 0 and not options.shapes:
                goals += judge(kernel, figures)
        if goals:
            print("\ngoals\n" + "\n".join(goals))
        try:
            draw_roofline(results.path.with_suffix(".png"), points, ceilings)
        except ImportError:
            print("matplotlib is not installed: no roofline drawn")
    if failed:
        raise SystemExit(f"correctness gate failed, hence not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
