"""Weighted sums of weights, correctly rounded: to the nearest value of the target dtype, ties to even.

    combine([a, b, c], None, bf16)              nearest bf16 to (a + b + c) / 3
    combine([a, b, c], [0.5, 0.3, 0.2], bf16)   nearest bf16 to 0.5 a + 0.3 b + 0.2 c, c_i as fp64 has them

fp64 sums rounded once are almost that: the fp64 sum has an error of its own, and where the real sum lies
closer than that to the middle between two neighbours of the target, the wrong one may be taken (decimal
weights of bf16 values lie there often). So a sum is trusted where it is exact (the sources' largest and
smallest magnitudes prove it) or where both ends of its error interval round to one value; the rest is summed
again without error (Knuth's two-sum, Veltkamp's splitting; Ogita, Rump and Oishi 2005) and compared with the
middle. Sources: bf16, fp16, fp32, and fp64 of magnitude > 1e-140.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.checkpoint.rounding import round_once

PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}  # significand bits
CHUNK_ELEMENTS = 1 << 17  # of each source, one call of the arithmetic: less costs calls
WIDE_ELEMENTS = 1 << 14  # of each source in fp64 at a time: what is four times as wide leaves the cache
_BF16_TINY, _BF16_HUGE = 127 - 100 << 7, 127 + 120 << 7  # the bits of 2^-100 and 2^120
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class NonFinite(ValueError):
    """A NaN or an infinity: `source` is the index of the block that has it, None: the result overflows."""

    def __init__(self, source: int | None):
        super().__init__(f"NaN or infinite values in source {source}")
        self.source = source


def combine(blocks: Sequence[Tensor], weights: Sequence[float] | None, dtype: torch.dtype) -> Tensor:
    """sum(w * x for w, x in zip(weights, blocks)), or the mean for weights None; correctly rounded to dtype.

    blocks: equally many 1-D values each, of any floats.  NonFinite names the first that is not finite.
    """
    kind = widest([block.dtype for block in blocks])
    return Combiner()(torch.stack([block.to(kind) for block in blocks]), weights, dtype)


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """One that holds the values of all."""
    kinds = set(dtypes)
    return kinds.pop() if len(kinds) == 1 else torch.float64 if torch.float64 in kinds else torch.float32


class Combiner:
    """combine() for one thread that calls it often, on [N, V] of N sources.

    Memory is kept from call to call; taking it anew costs as much as the arithmetic.
    """

    def __init__(self) -> None:
        self._memory: dict[object, Tensor] = {}

    def buffer(self, key: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with any content; the same memory for the same key."""
        size = torch.Size(shape).numel()
        kept = self._memory.get(key)
        if kept is None or kept.numel() < size or kept.dtype != dtype:
            kept = self._memory[key] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)

    def __call__(
        self,
        x_NV: Tensor,
        weights: Sequence[float] | None,
        dtype: torch.dtype,
        visit: Callable[[Tensor, Tensor], object] | None = None,
    ) -> Tensor:
        """[V], valid until the next call. visit(x_NC, out_C) sees both in pieces, while the cache holds them.

        visit gets fp32 and may write to it, also where that is x itself. Columns of a mean of bf16 or fp16
        that fp32 cannot decide are summed again at the end: visit has seen another last place there, maybe.
        """
        N, V = x_NV.shape
        out_V, bound = self.buffer("out", (V,), dtype), 0.0
        again = [np.empty(0, np.int64)]  # columns
        short = weights is None and x_NV.itemsize == 2 and 1 < N <= 64
        for start in range(0, V, CHUNK_ELEMENTS):
            x_NC, out_C = x_NV[:, start : start + CHUNK_ELEMENTS], out_V[start : start + CHUNK_ELEMENTS]
            x32_NC = x_NC
            if x_NC.dtype != torch.float32 and (short or visit):
                x32_NC = self.buffer("fp32", tuple(x_NC.shape), torch.float32).copy_(x_NC)
            if short:
                largest, doubtful = self._short_mean(x_NC, x32_NC, out_C)
                again.append(doubtful + start)
            else:
                largest = self._wide(x_NC, weights, out_C)
            bound = max(bound, largest)
            if visit:
                visit(x32_NC, out_C.float())
        places = torch.from_numpy(np.concatenate(again))
        for part in places.split(CHUNK_ELEMENTS) if len(places) else ():
            out_C = torch.empty(len(part), dtype=dtype)
            self._wide(x_NV[:, part], None, out_C)
            out_V[part] = out_C
        if bound >= torch.finfo(dtype).max / 2 and not bool(out_V.isfinite().all()):
            raise NonFinite(None)
        return out_V

    def _short_mean(self, x_NC: Tensor, x32_NC: Tensor, out_C: Tensor) -> tuple[float, np.ndarray]:
        """round(sum_i x_i / N) of bf16 or fp16 by sums in fp32; returns (max |x|, the columns in doubt).

        In no doubt is a column with  N max_i |x_i| < 2^22 u,  u the unit in the last place of its smallest
        value: every value is a multiple of u, so the sum has at most 24 bits and is exact; its quotient is
        decided as in _wide().
        """
        N, C = x_NC.shape
        bits_NC = self._bits(x_NC)
        high_C = torch.amax(bits_NC, 0, out=self.buffer("high", (C,), torch.int16))
        low_C = torch.amin(bits_NC, 0, out=self.buffer("low", (C,), torch.int16))
        largest = high_C.amax().view(x_NC.dtype).item()
        self._check_finite(x_NC, largest)
        sum_C = torch.add(x32_NC[0], x32_NC[1], out=self.buffer("sum", (C,), torch.float32))
        for x32_C in x32_NC[2:]:
            sum_C += x32_C
        out_C.copy_(sum_C.div_(N))
        precision = PRECISION[x_NC.dtype]
        orders = 22 - precision - (N - 1).bit_length()  # from the smallest to the largest, at most
        high, low = high_C.numpy(), low_C.numpy()
        doubtful = np.subtract(high, low, out=low) > orders << precision - 1
        # Sums of bf16 may overflow fp32, and units of bf16 may be its subnormal numbers.
        if x_NC.dtype == torch.bfloat16:
            doubtful |= (high < _BF16_TINY) | (high > _BF16_HUGE)
        return largest, np.flatnonzero(doubtful)

    def _wide(self, x_NC: Tensor, weights: Sequence[float] | None, out_C: Tensor) -> float:
        """round(sum_i c_i x_i) by sums in fp64, c_i = 1 / N without weights; returns a bound of |sum|.

        A rounding can only go wrong near a midpoint of two neighbours of dtype. It is certain

            exactly          where every x_i is a multiple of `quantum` and the sum is below 2^51 quanta:
                             the sum is exact then, and fl(sum / N) a midpoint only where sum / N is one
            by an interval   where sum - e and sum + e round to one value (_certified), as
                             |fl(sum) - sum| <= N 2^-53 sum_i |c_i| max |x|, of which e is more than twice
        """
        (N, C), dtype = x_NC.shape, out_C.dtype
        largest, quantum = self._magnitudes(x_NC)
        bound = largest if weights is None else sum(map(abs, weights)) * largest
        if N == 1 and weights is None and x_NC.dtype != torch.float64:
            out_C.copy_(x_NC[0])
            return bound
        factors = torch.tensor([1.0] * N if weights is None else weights, dtype=torch.float64)
        total_C = self.buffer("total", (C,), torch.float64)
        for start in range(0, C, WIDE_ELEMENTS):
            x_NW = x_NC[:, start : start + WIDE_ELEMENTS]
            wide_NW = self.buffer("wide", tuple(x_NW.shape), torch.float64).copy_(x_NW)
            torch.mv(wide_NW.T, factors, out=total_C[start : start + WIDE_ELEMENTS])
        if weights is None:
            total_C /= N
        # 2^53 quanta are exact; a factor of 4 is left for the rounding of the quotient.
        if weights is None and N * largest < 2.0**51 * quantum:
            is_normal = quantum / N >= torch.finfo(torch.float32).tiny
            out_C.copy_(round_once(total_C, dtype, self.buffer("bits", (C,), torch.int64), is_normal))
        else:
            error = 2 * (N + 2) * 2.0**-53 * bound
            out_C.copy_(self._certified(x_NC, weights, total_C, error, dtype))
        return bound

    def _bits(self, x_NC: Tensor) -> Tensor:
        """Magnitudes as integers: without its sign bit a float orders like one, at less cost."""
        kind = _INTEGER[x_NC.itemsize]
        out = self.buffer("magnitude", tuple(x_NC.shape), kind)
        return torch.bitwise_and(x_NC.view(kind), torch.iinfo(kind).max, out=out)

    def _check_finite(self, x_NC: Tensor, largest: float) -> None:
        if not math.isfinite(largest):
            raise NonFinite(next(i for i, row in enumerate(x_NC) if not bool(row.isfinite().all())))

    def _magnitudes(self, x_NC: Tensor) -> tuple[float, float]:
        """The largest magnitude, and a power of two of which every value is a multiple."""
        bits = self._bits(x_NC)
        low, high = bits.aminmax()
        largest = high.view(x_NC.dtype).item()
        self._check_finite(x_NC, largest)
        if largest == 0:
            return 0.0, 1.0
        if low == 0:
            low = bits.masked_fill_(bits == 0, torch.iinfo(bits.dtype).max).amin()
        exponent = math.frexp(low.view(x_NC.dtype).item())[1]
        return largest, math.ldexp(1.0, max(exponent - PRECISION[x_NC.dtype], -1074))

    def _certified(
        self, x_NC: Tensor, weights: Sequence[float] | None, total_C: Tensor, error: float, dtype: torch.dtype
    ) -> Tensor:
        """round(total - error) where that is round(total + error); exact() decides the other columns."""
        end_C = self.buffer("end", total_C.shape, torch.float64)
        bits = self.buffer("bits", total_C.shape, torch.int64)
        out = round_once(torch.sub(total_C, error, out=end_C), dtype, bits)
        upper = round_once(torch.add(total_C, error, out=end_C), dtype, bits)
        kind = _INTEGER[dtype.itemsize]  # as integers, so that 0 and -0 differ
        undecided = (out.view(kind) ^ upper.view(kind)).nonzero()[:, 0]
        if undecided.numel():
            out[undecided] = exact(list(x_NC[:, undecided]), weights, dtype)
        return out


def exact(blocks: Sequence[Tensor], weights: Sequence[float] | None, dtype: torch.dtype) -> Tensor:
    """combine() by error-free sums, about twenty times its cost."""
    terms = []  # fp64, each exact
    for i, block in enumerate(blocks):
        values = _split(block) if block.dtype == torch.float64 and weights is not None else [block.double()]
        factors = [1.0] if weights is None else _split(torch.tensor(weights[i], dtype=torch.float64))
        terms += [value * factor for value in values for factor in factors if float(factor) != 0]
    high, low = torch.zeros_like(terms[0]), torch.zeros_like(terms[0])
    lost = torch.zeros_like(high, dtype=torch.bool)
    for term in terms:
        high, error = _two_sum(high, term)
        low, error = _two_sum(low, error)
        lost |= error != 0
    high, low = _two_sum(high, low)  # high + low is the sum, where nothing is lost

    scale = len(blocks) if weights is None else 1
    near = round_once(high / scale, dtype)
    is_odd = (near.view(_INTEGER[dtype.itemsize]) & 1).bool()
    out = near.clone()
    for sign in (1, -1):
        neighbour = torch.nextafter(near, torch.full_like(near, sign * torch.inf))
        middle = (near.double() + neighbour.double()) / 2 * scale  # at most 25 bits and those of scale: exact
        difference, error = _two_sum(high, -middle)
        beyond = (difference + (error + low)) * sign  # near the middle error = 0, so the sign is right
        out = torch.where((beyond > 0) | ((beyond == 0) & is_odd), neighbour, out)
    for i in lost.nonzero()[:, 0].tolist():  # values of more than a hundred binary orders apart
        out[i] = nearest(exact_sum([block[i].item() for block in blocks], weights), dtype)
    return out


def exact_sum(values: Sequence[float], weights: Sequence[float] | None) -> Fraction:
    if weights is None:
        return sum(map(Fraction, values), Fraction()) / len(values)
    return sum((Fraction(w) * Fraction(x) for w, x in zip(weights, values, strict=True)), Fraction())


def nearest(value: Fraction, dtype: torch.dtype) -> Tensor:
    """The value of dtype nearest to a rational number, ties to even; 0-d."""
    near = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    ends = [torch.nextafter(near, torch.tensor(end, dtype=dtype)) for end in (-torch.inf, torch.inf)]
    choices = [x for x in (near, *ends) if x.isfinite()]
    kind = _INTEGER[dtype.itemsize]
    return min(choices, key=lambda x: (abs(Fraction(x.item()) - value), int(x.view(kind)) & 1))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b in fp64 and what its rounding lost, exactly (Knuth)."""
    s = a + b
    part = s - a
    return s, (a - (s - part)) + (b - part)


def _split(x: Tensor) -> list[Tensor]:
    """fp64 as two values of 26 bits, whose products with others of 26 bits are exact (Veltkamp)."""
    scaled = x * float((1 << 27) + 1)
    high = scaled - (scaled - x)
    return [high, x - high]
