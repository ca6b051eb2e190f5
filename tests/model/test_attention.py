"""Backends agree with the plain one, and a text's embedding does not depend on its neighbours."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODEL

from nemo_embed_core.checkpoint.weights import RandomReader, fill
from nemo_embed_core.config import TrainConfig
from nemo_embed_core.data.packing import pack_texts
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.attention import (
    Segments,
    backends,
    choose_attention,
    pick_attention,
    reference_attention,
    sdpa_attention,
    why_not,
)
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.parallel.mesh import TensorParallel
from nemo_embed_core.train import preflight


def segments_of(lengths: list[int]) -> Segments:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Segments(ends, lengths, max(lengths))


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [3, 3, 7, 2, 2, 2, 7], [123, 1, 17]])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_sdpa_equals_reference_forward_and_backward(lengths: list[int], kv_heads: int) -> None:
    total = sum(lengths)
    inputs = [torch.randn(total, heads, 16, dtype=torch.float64) for heads in (6, kv_heads, kv_heads)]
    out_grad = torch.randn(total, 6, 16, dtype=torch.float64)
    results = []
    for attention in (reference_attention, sdpa_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attention(*leaves, segments_of(lengths))
        results.append([out, *torch.autograd.grad(out, leaves, out_grad)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_an_embedding_does_not_depend_on_its_neighbours() -> None:
    encoder = Encoder(MODEL, TensorParallel(), sdpa_attention).requires_grad_(False)
    fill(encoder, RandomReader(MODEL, 0), MODEL)
    texts = [torch.randint(0, 512, (n,)).numpy() for n in (5, 1, 40, 5, 17, 40, 9)]

    def embed(max_tokens: int, pad_to_multiple: int, arrays: list) -> torch.Tensor:
        out = torch.full((len(arrays), 64), float("nan"))
        for indices, b in pack_texts(arrays, max_tokens, pad_to_multiple):
            rows = encoder(b.input_ids, b.position_ids, Segments(b.cu_seqlens, b.lengths, b.max_seqlen))
            out[torch.from_numpy(indices)] = rows[: b.num_sequences]
        return out

    alone = torch.cat([embed(40, 1, [t]) for t in texts])
    assert (embed(1000, 1, texts) - alone).abs().max() < 1e-6  # all in one batch
    assert (embed(64, 8, texts) - alone).abs().max() < 1e-6  # several batches, each with a padding sequence


def test_backends_that_cannot_run_here_say_so() -> None:
    with pytest.raises(UserError, match="attention=varlen needs a CUDA device"):
        pick_attention("varlen", torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="attention=flash needs a CUDA device and bf16"):
        pick_attention("flash", torch.device("cuda"), torch.float32)
    assert pick_attention("auto", torch.device("cpu"), torch.float32) is sdpa_attention


# What flash_attn_interface has of it: the arguments of FlashAttention-3, its answer by the definition.
STAND_IN = """
import torch
seen = []
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                           seqused_k=None, softmax_scale=None, causal=True, deterministic=None):
    seen.append({"max": (max_seqlen_q, max_seqlen_k), "causal": causal, "deterministic": deterministic})
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    out = torch.zeros_like(q)
    bounds = cu_seqlens_q.tolist()
    for a, b in zip(bounds, bounds[1:]):
        for i in range(a, b):
            for h in range(q.shape[1]):
                g = h * k.shape[1] // q.shape[1]
                keys = range(a, i + 1 if causal else b)
                p = torch.stack([q[i, h] @ k[j, g] for j in keys]).mul(q.shape[2] ** -0.5).softmax(0)
                out[i, h] = sum(p[n] * v[j, g] for n, j in enumerate(keys))
    return (out, None) if RETURNS_A_TUPLE else out
"""
HOPPER = torch.device("cuda")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """gpu((9, 0), "source of flash_attn_interface"): a GPU of that capability, with the module or without."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(capability: tuple[int, int], source: str | None, config: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for name, text in (("flash_attn_interface", source), ("flash_attn_config", config)):
            if text is not None:
                (tmp_path / f"{name}.py").write_text(text)

    yield make
    for name in ("flash_attn_interface", "flash_attn_config"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("returns_a_tuple", [False, True])
@pytest.mark.parametrize("name", ["auto", "flash3"])
def test_flash_attention_3_is_taken_on_hopper_and_called_as_it_wants(
    gpu, name: str, returns_a_tuple: bool
) -> None:
    gpu((9, 0), f"RETURNS_A_TUPLE = {returns_a_tuple}\n{STAND_IN}")
    assert choose_attention(name, HOPPER, torch.bfloat16) == "flash3"
    attention = pick_attention(name, HOPPER, torch.bfloat16)
    lengths = [3, 1, 7, 3]
    q, k, v = (torch.randn(14, heads, 16, dtype=torch.float64) for heads in (6, 2, 2))
    got = attention(q, k, v, segments_of(lengths))
    assert (got - reference_attention(q, k, v, segments_of(lengths))).abs().max() < 1e-12
    assert sys.modules["flash_attn_interface"].seen == [
        {"max": (7, 7), "causal": False, "deterministic": False}
    ]


@pytest.mark.parametrize(
    "capability, source, name, says",
    [
        ((8, 0), STAND_IN, "flash3", "needs a GPU of compute capability 9.0 (Hopper), not 8.0"),
        ((10, 0), STAND_IN, "varlen3", "needs a GPU of compute capability 9.0 (Hopper), not 10.0"),
        ((9, 0), None, "flash3", "No module named 'flash_attn_interface'"),
        ((9, 0), None, "varlen3", "No module named 'flash_attn_interface'"),
        ((9, 0), "raise ImportError('undefined symbol: _ZN')", "flash3", "undefined symbol: _ZN"),
        ((9, 0), None, "flash", "needs the module flash_attn (No module named 'flash_attn')"),
    ],
)  # fmt: skip
def test_a_backend_that_is_not_there_is_an_error_by_name_and_passed_over_by_auto(
    gpu, capability: tuple[int, int], source: str | None, name: str, says: str
) -> None:
    gpu(capability, source)
    with pytest.raises(UserError) as error:
        pick_attention(name, HOPPER, torch.bfloat16)
    assert f"attention={name} needs" in str(error.value) and says in str(error.value)
    assert choose_attention("auto", HOPPER, torch.bfloat16) == "varlen"
    assert backends(HOPPER, torch.bfloat16)["varlen"] == "" != backends(HOPPER, torch.bfloat16)[name]


@pytest.mark.parametrize("name", ["flash3", "varlen3"])
def test_a_build_without_backward_encodes_and_does_not_train(gpu, name: str) -> None:
    """As every published wheel is built."""
    gpu((9, 0), STAND_IN, "CONFIG = {'build_flags': {'FLASHATTENTION_DISABLE_BACKWARD': True}}")
    with pytest.raises(UserError, match=f"attention={name} needs .* built with its backward"):
        pick_attention(name, HOPPER, torch.bfloat16)
    assert choose_attention("auto", HOPPER, torch.bfloat16) == "varlen"
    assert choose_attention("auto", HOPPER, torch.bfloat16, backward=False) == "flash3"
    gpu((9, 0), STAND_IN, "CONFIG = {'build_flags': {'FLASHATTENTION_DISABLE_BACKWARD': False}}")
    sys.modules.pop("flash_attn_config")
    assert choose_attention("auto", HOPPER, torch.bfloat16) == "flash3"


def test_torchs_varlen_takes_flash_attention_3_when_asked(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the call, once, and only by its own name."""
    gpu((9, 0), STAND_IN)
    calls: list[Any] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", calls.append)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: (calls or [None])[0])

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, enable_gqa=False):
        calls.append((max_q, max_k, enable_gqa))
        return q

    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    q, k = torch.zeros(5, 4, 16), torch.zeros(5, 2, 16)
    pick_attention("varlen", HOPPER, torch.bfloat16)(q, k, k, segments_of([2, 3]))
    assert calls == [(3, 3, True)]
    calls.clear()
    for _ in range(2):
        pick_attention("varlen3", HOPPER, torch.bfloat16)(q, k, k, segments_of([2, 3]))
    assert calls == ["FA3", (3, 3, True), (3, 3, True)]
    monkeypatch.delattr(torch.nn.attention._fa3, "_fa3_flash_attention_backward_impl")
    assert "forward and backward" in why_not("varlen3", HOPPER, torch.bfloat16)


def test_ranks_that_would_choose_otherwise_all_stop(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0), None)
    config, others = TrainConfig(output_dir="", steps=1), [("node1", "varlen")]
    monkeypatch.setattr(preflight, "gather_objects", lambda mine: [*others, mine])
    monkeypatch.setattr(preflight.socket, "gethostname", lambda: "node7")
    said = preflight.agree_on_attention(config, HOPPER, torch.bfloat16)
    assert said.startswith("varlen; flash3 needs the module flash_attn_interface") and "; flash needs" in said
    others[:] = [("node1", "flash3"), ("node1", "flash3")]
    with pytest.raises(UserError, match="attention=auto is flash3 on node node1 and varlen on node node7"):
        preflight.agree_on_attention(config, HOPPER, torch.bfloat16)
    others.clear()
    assert preflight.agree_on_attention(config, torch.device("cpu"), torch.float32) == "sdpa"
