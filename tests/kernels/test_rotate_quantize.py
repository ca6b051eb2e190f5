import pytest
import torch

from nemo_embed_core.kernels.rotate_quantize import rotate_quantize


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("N", "D"), [(1, 256), (17, 256), (21, 512), (6, 1024), (5, 4096), (5, 8192)])
def test_kernel_is_within_its_bound_of_the_exact_rotation(passes, N, D, dtype):
    passes("rotate_quantize", N=N, D=D, dtype=dtype)


@pytest.mark.parametrize("scale", [1e-15, 1e4])
def test_short_and_long_rows(passes, scale):
    passes("rotate_quantize", N=9, D=512, scale=scale, constants={"_ROWS": 4})


def test_op_is_well_formed(passes):
    passes("opcheck", name="rotate_quantize")


def test_wrong_shapes_say_what_is_wanted():
    for columns, signs in ((384, 384), (128, 128), (256, 128)):
        with pytest.raises(ValueError, match="power of two from 256"):
            rotate_quantize(torch.zeros(2, columns), torch.ones(signs))
