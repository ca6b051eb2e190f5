import pytest
import torch

from nemo_embed_core.kernels.fp8 import E4M3, E5M2, MAX, MULTIPLE, amax, quantize, scaled_mm
from nemo_embed_core.model.spec import FP8_MULTIPLE

SMALL = {"_AMAX": [3, 64, 1], "_TILE": [16, 32, 1]}  # several tiles both ways, several turns of a program


@pytest.mark.parametrize(("to", "amax"), [("e4m3", 448 * 2.0**-9), ("e5m2", 57344 * 2.0**-20)])
@pytest.mark.parametrize(("R", "C", "constants"), [(1, 16, None), (37, 80, SMALL), (129, 33, None)])
def test_kernel_largest_value_and_both_layouts(passes, R, C, to, amax, constants):
    passes("fp8", R=R, C=C, to=to, amax=amax, constants=constants)


def test_op_is_well_formed(passes):
    passes("opcheck", name="fp8")


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_value_is_off_by_half_a_step_at_most_and_the_largest_by_nothing(dtype):
    x = torch.randn(50, 77, generator=torch.Generator().manual_seed(0)) * 1e-4
    values, columns, scale = quantize(x, amax(x), dtype, columns=True)
    assert values.float().abs().max() == MAX[dtype] == torch.finfo(dtype).max
    back = values.double() * scale.double()
    step = torch.finfo(dtype).eps / 2 * x.abs().double() + torch.finfo(dtype).tiny * scale.double()
    assert bool(((back - x.double()).abs() <= 1.001 * step).all())
    assert torch.equal(columns[:, :50].float(), values.t().float()) and columns.shape == (77, 64)
    assert not columns[:, 50:].float().any()


@pytest.mark.parametrize("a, b", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
def test_a_product_is_that_of_the_values_and_torchs_own(a, b):
    torch.manual_seed(0)
    x, w = torch.randn(35, 256) * 3e-5, torch.randn(48, 256) * 7e3
    x8, w8 = quantize(x, amax(x), a), quantize(w, amax(w), b)
    got = scaled_mm(x8.rows, x8.scale, w8.rows, w8.scale, fast=False)
    exact = (x8.rows.double() * x8.scale.double()) @ (w8.rows.double() * w8.scale.double()).T
    assert got.dtype == torch.bfloat16
    assert bool(((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * exact.abs().max()).all())
    theirs = torch._scaled_mm(x8.rows, w8.rows.t(), x8.scale, w8.scale, out_dtype=torch.bfloat16)
    assert (got == theirs).double().mean() > 0.99, "sums in another order round to another bf16 seldom"
    lost = (exact - x.double() @ w.double().T).norm() / (x.double() @ w.double().T).norm()
    assert 0.005 < lost < (0.04 if a == b else 0.08)


def test_zeros_stay_zeros_and_the_smallest_numbers_do_not_overflow():
    for x in (torch.zeros(16, 16), torch.full((16, 16), 1e-38), torch.full((16, 16), 3e38)):
        values, _, scale = quantize(x, amax(x), E4M3)
        assert values.float().isfinite().all() and scale > 0
        assert torch.allclose(values.float() * scale, x, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("spoil", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_the_whole_product(spoil):
    """A cast would make 448 of an infinity, and the step would look well."""
    x, w = torch.randn(17, 16), torch.randn(32, 16)
    x[3, 5] = spoil
    for first, second in ((x, w), (w, x)):
        a, b = (quantize(m, amax(m), E4M3) for m in (first, second))
        assert not scaled_mm(a.rows, a.scale, b.rows, b.scale, fast=True).isfinite().any()


def test_wrong_input_says_what_is_wanted():
    with pytest.raises(ValueError, match=r"wants \[R, C\], an fp32 scalar"):
        quantize(torch.ones(3), torch.tensor(1.0), E4M3)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 and torch\.float8"):
        quantize(torch.ones(3, 4), torch.ones((), dtype=torch.bfloat16), E4M3)
    assert MULTIPLE == FP8_MULTIPLE, "the model's sizes are checked by what products take"
