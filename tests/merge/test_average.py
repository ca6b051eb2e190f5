"""Weighted sums against rational arithmetic: not one is rounded to another value than the nearest."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_embed_core.merge import average
from nemo_embed_core.merge.average import NonFinite, combine, exact, exact_sum, nearest, round_once

TARGETS = (torch.bfloat16, torch.float16, torch.float32)
WEIGHTS = {
    "mean of 2": None,
    "mean of 6": None,
    "decimal": [0.5, 0.3, 0.2],
    "dyadic": [0.5, 0.25, 0.25],
    "beyond": [-0.3, 1.3],
}
SIZE = 60


def cases(kind: torch.dtype, num_sources: int, target: torch.dtype) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(num_sources)

    def normal() -> Tensor:
        return torch.randn(SIZE, generator=generator)

    def steps(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (SIZE,), generator=generator)

    sisters = (normal() * 0.02).bfloat16().view(torch.int16)
    cancelling = (normal() * 0.02).to(kind)
    # Exponents from the largest to the subnormal ones of the target; sums then need more than fp64's 53 bits.
    reach = (-24, 14) if torch.float16 in (kind, target) else (-148, 120)
    wild = [(normal().double() * 2.0 ** steps(*reach).double()).to(kind) for _ in range(num_sources)]
    made = {
        "normal": [(normal() * 0.02).to(kind) for _ in range(num_sources)],
        # bf16 values a few units apart: every other mean of two, one in six of six, lies exactly between two
        # neighbours.
        "neighbours": [
            (sisters + steps(-3, 4).short()).view(torch.bfloat16).to(kind) for _ in range(num_sources)
        ],
        "wild": wild,
        # About as far apart as fp32 holds in one sum of bf16 or fp16 values.
        "spread": [
            (sisters.view(torch.bfloat16) * 2.0 ** -steps(0, 16)).to(kind) for _ in range(num_sources)
        ],
        "cancelling": [cancelling * (-1) ** i for i in range(num_sources)],
        "zeros": [(normal() * 0.02).to(kind) * (torch.arange(SIZE) % 3 > 0) for _ in range(num_sources)],
    }
    return {name: values for name, values in made.items() if all(bool(x.isfinite().all()) for x in values)}


def wrong(got: Tensor, blocks: list[Tensor], weights: list[float] | None) -> int:
    rows = zip(*(block.tolist() for block in blocks), strict=True)
    want = torch.stack([nearest(exact_sum(values, weights), got.dtype) for values in rows])
    return int((got != want).sum())


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_sum_is_the_nearest_value(name: str, target: torch.dtype) -> None:
    weights = WEIGHTS[name]
    for kind in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        num_sources = len(weights) if weights else int(name.split()[-1])
        for case, blocks in cases(kind, num_sources, target).items():
            copies = [block.clone() for block in blocks]
            assert wrong(combine(blocks, weights, target), blocks, weights) == 0, (kind, case)
            assert wrong(exact(blocks, weights, target), blocks, weights) == 0, (kind, case)
            assert all(torch.equal(a, b) for a, b in zip(blocks, copies, strict=True)), "a source was changed"


def test_fp64_sums_rounded_once_are_not_always_the_nearest() -> None:
    """Which is why combine() does more: 0.3 and 0.7 put the sum of two bf16 neighbours next to the middle of
    two values."""
    a = torch.arange(128, 256).bfloat16()
    blocks, weights = [a, a + 5], [0.3, 0.7]
    blocks = [block[:100] for block in blocks]
    naive = round_once(blocks[0].double() * weights[0] + blocks[1].double() * weights[1], torch.bfloat16)
    assert wrong(naive, blocks, weights) > 0
    assert wrong(combine(blocks, weights, torch.bfloat16), blocks, weights) == 0


def test_fp32_sums_alone_are_not_always_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 + 2^-7 over four is the middle of two bf16 values; fp32 does not have the 2^-30 that decides."""
    monkeypatch.setattr(average, "CHUNK_ELEMENTS", 3)  # so that the columns lie in several parts
    rows = [[1.0] * 8, [1.0] * 8, [1 + 2**-7] * 8, [2.0**-30, -(2.0**-30)] * 4]
    blocks = [torch.tensor(row).bfloat16() for row in rows]
    assert combine(blocks, None, torch.bfloat16).tolist() == [0.75 + 2**-8, 0.75] * 4
    honest = average.Combiner._short_mean
    nowhere = np.empty(0, np.int64)
    monkeypatch.setattr(average.Combiner, "_short_mean", lambda *args: (honest(*args)[0], nowhere))
    assert wrong(combine(blocks, None, torch.bfloat16), blocks, None) == 4


def test_sums_beyond_two_words_of_fp64_are_decided_in_rationals() -> None:
    """1 + 2^-8 is the middle of two bf16 values; what decides lies 2^-140 below."""
    middle, tiny = torch.tensor([1 + 2**-8] * 2, dtype=torch.float64), torch.tensor([2.0**-140, -(2.0**-140)])
    blocks = [middle, tiny, torch.full((2,), 2.0**-70), torch.full((2,), -(2.0**-70))]
    assert exact(blocks, [1.0] * 4, torch.bfloat16).tolist() == [1 + 2**-7, 1.0]


def test_non_finite_values_and_overflow_are_named() -> None:
    good, bad = torch.ones(1000), torch.ones(1000)
    for value in (math.nan, math.inf, -math.inf):
        bad[17] = value
        with pytest.raises(NonFinite) as error:
            combine([good, bad], None, torch.float32)
        assert error.value.source == 1
    with pytest.raises(NonFinite) as error:
        combine([good * 70000, good * 70000], None, torch.float16)
    assert error.value.source is None
    large = torch.tensor([3e38, -3e38, 1.0]).bfloat16()  # the sum overflows fp32, the mean does not
    assert torch.equal(combine([large] * 3, None, torch.bfloat16), large)


def test_nearest_takes_the_even_of_two() -> None:
    assert nearest(Fraction(257, 256), torch.bfloat16).item() == 1.0
    assert nearest(Fraction(259, 256), torch.bfloat16).item() == 1 + 2**-6
    assert nearest(Fraction(257, 256) + Fraction(1, 2**200), torch.bfloat16).item() == 1 + 2**-7


def test_a_tie_that_a_sum_in_fp32_would_break_the_wrong_way() -> None:
    """1 + 2^-8 + 2^-26 is above the middle of two bf16; the 2^-26 is what is left of two small values of
    other sign."""
    values = [2.0, 2 + 2**-6, 2**-17 * (1 + 2**-7), -(2.0**-17)]
    blocks = [torch.tensor([value], dtype=torch.bfloat16) for value in values]
    assert [block.item() for block in blocks] == values
    assert combine(blocks, None, torch.bfloat16).item() == 1 + 2**-7
