import pytest
import torch

from nemo_embed_core.kernels.quantize_rows import quantize_rows


@pytest.mark.parametrize(("values", "dtype"), [("int8", "fp32"), ("int8", "fp16"), ("fp16", "fp32")])
@pytest.mark.parametrize(("N", "D"), [(1, 64), (123, 100), (257, 33), (3, 4096), (2, 9000)])
def test_kernel_values_and_what_they_lost(passes, N, D, values, dtype):
    passes("quantize_rows", N=N, D=D, values=values, dtype=dtype)


def test_more_rows_than_a_program_holds(passes):
    passes("quantize_rows", N=23, D=33, constants={"_CONFIG": [256, 1]})


def test_op_is_well_formed(passes):
    passes("opcheck", name="quantize_rows")


def test_int8_is_within_half_a_step_and_the_largest_is_127():
    x = torch.randn(50, 77, generator=torch.Generator().manual_seed(0))
    values, scale, square, error = quantize_rows(x, torch.int8)
    assert values.abs().amax(1).eq(127).all()
    lost = x.double() - values.double() * scale.double()[:, None]
    assert bool((lost.abs() <= scale.double()[:, None] * (0.5 + 1e-5)).all())
    torch.testing.assert_close(error.double(), lost.square().sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(square.double(), x.double().square().sum(1), rtol=1e-5, atol=0)


def test_wrong_input_says_what_is_wanted():
    with pytest.raises(ValueError, match=r"wants \[N, D\]"):
        quantize_rows(torch.zeros(3), torch.int8)
    with pytest.raises(ValueError, match=r"torch\.float16"):
        quantize_rows(torch.zeros(3, 4), torch.float16)
