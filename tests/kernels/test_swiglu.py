import pytest
import torch

from nemo_embed_core.kernels.swiglu import swiglu, swiglu_ref


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("T", "num_blocks", "width"), [(1, 1, 64), (9, 5, 64), (9, 3, 100), (17, 2, 257), (123, 1, 16)]
)
def test_kernel_within_budget(passes, T, num_blocks, width, dtype):
    passes("swiglu", T=T, num_blocks=num_blocks, width=width, dtype=dtype)


def test_ops_are_well_formed_and_keep_gradients_under_compile(passes):
    passes("opcheck", name="swiglu")
    passes("compiled_gradients", name="swiglu")


def test_reference_gradcheck():
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: swiglu_ref(x, 2)[0], (x,))


def test_blocks_are_gate_then_up():
    gate, up = torch.randn(5, 6), torch.randn(5, 6)
    columns = torch.cat([gate[:, :2], up[:, :2], gate[:, 2:4], up[:, 2:4], gate[:, 4:], up[:, 4:]], 1)
    assert torch.equal(swiglu(columns, 3)[0], torch.nn.functional.silu(gate) * up)


def test_wrong_shapes_say_what_is_wanted():
    with pytest.raises(ValueError, match=r"multiple of 2 \* num_blocks=6"):
        swiglu(torch.zeros(2, 16), 3)
