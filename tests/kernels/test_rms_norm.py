import pytest
import torch

from nemo_embed_core.kernels.rms_norm import rms_norm, rms_norm_ref


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("T", "D", "residual"), [(1, 64, True), (17, 100, True), (5, 100, False), (2, 4096, True)]
)
def test_kernel_within_budget(passes, T, D, residual, dtype):
    passes("rms_norm", T=T, D=D, residual=residual, dtype=dtype)


def test_backward_programs_sum_their_rows(passes):
    passes("rms_norm", T=23, D=64, residual=True, constants={"_BACKWARD_PROGRAMS": 7})


def test_more_partial_sums_than_are_added_at_a_time(passes):
    """As beyond 128 programs of the backward, and in more blocks of columns than one."""
    passes(
        "rms_norm", T=53, D=40, residual=True, constants={"_BACKWARD_PROGRAMS": 37, "_SUM_ROWS": [16, 16, 1]}
    )


def test_ops_are_well_formed_and_keep_gradients_under_compile(passes):
    passes("opcheck", name="rms_norm")
    passes("compiled_gradients", name="rms_norm")


@pytest.mark.parametrize("residual", [False, True])
def test_reference_gradcheck(residual):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,), (3, 5))]
    assert torch.autograd.gradcheck(
        lambda x, w, y: rms_norm_ref(x, w, 1e-5, y if residual else None)[:2], inputs
    )


def test_half_precision_is_llama_rms_norm_bit_for_bit():
    x, weight = torch.randn(7, 64).bfloat16(), torch.randn(64).bfloat16()
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(torch.bfloat16)
    y, hidden, _ = rms_norm(x, weight, 1e-5)
    assert torch.equal(y, expected) and hidden is x


def test_wrong_shapes_say_what_is_wanted():
    with pytest.raises(ValueError, match=r"\[3, 8\].*\[4\]"):
        rms_norm(torch.zeros(3, 8), torch.zeros(4), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(torch.zeros(3, 8), torch.zeros(8), 1e-5, torch.zeros(2, 8))
