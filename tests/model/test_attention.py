"""Backends agree with the plain one, and a text's embedding does not depend on its neighbours."""

import pytest
import torch
from tiny import MODEL

from nemo_embed_core.checkpoint.weights import RandomReader, fill
from nemo_embed_core.data.packing import pack_texts
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.attention import Segments, pick_attention, reference_attention, sdpa_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.parallel.mesh import TensorParallel


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
