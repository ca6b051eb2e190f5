import numpy as np
import pytest
import torch

from nemo_embed_core.kernels import dropout_linear as module
from nemo_embed_core.kernels.dropout_linear import dropout_linear, dropout_linear_ref, run_key, token_keys


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("T", "I", "layer", "first_column", "rate"),
    [(1, 1, 0, 0, 0.5), (9, 64, 1, 64, 0.1), (17, 300, 127, 3, 0.9), (5, 257, 16, 2**20, 0.3)],
)
def test_kernel_has_the_bits_of_the_reference(passes, T, I, layer, first_column, rate, dtype):
    passes("dropout_linear", T=T, I=I, layer=layer, first_column=first_column, rate=rate, dtype=dtype)


def test_op_is_well_formed(passes):
    passes("opcheck", name="dropout_linear")


def keys(texts: list[list[int]], seed: int = 3, step: int = 5) -> torch.Tensor:
    bounds = torch.tensor([0, *np.cumsum([len(text) for text in texts])], dtype=torch.int32)
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int32)
    positions = torch.tensor([i for text in texts for i in range(len(text))], dtype=torch.int32)
    return token_keys(run_key(seed, step), ids, positions, bounds)


def test_a_token_is_named_by_its_text_and_place_alone():
    """Whatever stands beside it; another id, order or length of the text gives all its tokens others."""
    a, b, c = [5, 6, 7], [7, 6, 5, 5], [9]
    packed, alone = keys([c, a, [], b, a]), keys([a])
    assert torch.equal(packed[1:4], alone) and torch.equal(packed[8:], alone)
    for other in ([6, 5, 7], [5, 6, 8], [5, 6, 7, 0], [5, 6]):
        assert not set(keys([other]).tolist()) & set(alone.tolist())
    for changes in ({"seed": 4}, {"step": 6}):
        assert not set(keys([a], **changes).tolist()) & set(alone.tolist())
    assert len(set(keys([[1] * 512, [2] * 512]).tolist())) == 1024


T, I = 512, 768


def kept(rate: float, layer: int = 1, **of: int) -> torch.Tensor:
    """[T, I] bools of 64 texts of 8 tokens that begin alike."""
    texts = [[1, 2, 3, 4, 5, 6, 7, n] for n in range(64)]
    return module.dropout_ref(torch.ones(T, I), keys(texts, **of), layer, 0, rate) != 0


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.95])
def test_the_rate_is_kept_in_all_in_rows_and_in_columns(rate):
    """Within 5 standard deviations of independent draws, whose variance rows and columns have too."""
    mask = kept(rate).double()
    variance = rate * (1 - rate)
    assert abs(mask.mean() - (1 - rate)) < 5 * (variance / mask.numel()) ** 0.5
    for dim, n, others in ((0, T, I), (1, I, T)):
        spread = (mask.sum(dim) - n * (1 - rate)).square().mean() / (n * variance)
        assert abs(spread - 1) < 5 * ((2 + 1 / (n * variance)) / others) ** 0.5, f"{dim=} {spread=}"


def test_masks_of_neighbours_layers_steps_and_seeds_have_nothing_in_common():
    """Correlation of two masks, within 5 standard deviations of independent draws."""
    rate = 0.3
    mask = kept(rate)
    pairs = {f"{d} tokens": (mask[d:], mask[:-d]) for d in (1, 2, 8, 64)}
    pairs |= {f"{d} columns": (mask[:, d:], mask[:, :-d]) for d in (1, 2, 8, 128)}
    pairs |= {"token and column": (mask[1:, 1:], mask[:-1, :-1])}
    pairs |= {f"layer {n}": (mask, kept(rate, layer=n)) for n in (0, 2, 5, 127)}
    pairs |= {f"step {n}": (mask, kept(rate, step=n)) for n in (4, 6, 5 + 2**16)}
    pairs |= {f"seed {n}": (mask, kept(rate, seed=n)) for n in (2, 4)}
    pairs |= {"seed and step": (mask, kept(rate, seed=5, step=3))}
    for name, (one, other) in pairs.items():
        product = (one.double() - 1 + rate) * (other.double() - 1 + rate)
        assert abs(product.mean() / (rate * (1 - rate))) < 5 / one.numel() ** 0.5, name


def test_gradients_and_what_is_saved():
    """Those of the plain formula; x is saved, to be made again where it can be, and the dropped x is not."""
    x, A = torch.randn(6, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    mask = keys([[1, 2], [3, 4, 5, 6]]), 2, 16, 0.4
    got, want = ([v.clone().requires_grad_() for v in (x, A)] for _ in "12")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = dropout_linear(*got, *mask)
    known = {t.untyped_storage().data_ptr() for t in (*got, mask[0])}
    assert {t.untyped_storage().data_ptr() for t in saved} == known
    plain = dropout_linear_ref(*want, *mask)
    assert torch.equal(h, plain) and not torch.equal(h, torch.nn.functional.linear(x, A))
    for y in (h, plain):
        (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    for a, b in zip(got, want, strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-14 and b.grad.abs().max() > 0


def test_keys_of_other_tokens_say_what_is_wanted():
    with pytest.raises(ValueError, match=r"a key for each of x's 6 tokens, not \[3\]"):
        dropout_linear(torch.zeros(6, 4), torch.zeros(2, 4), keys([[1, 2, 3]]), 0, 0, 0.1)
