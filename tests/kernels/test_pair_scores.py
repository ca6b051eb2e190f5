import numpy as np
import pytest
import torch

from nemo_embed_core.kernels.pair_scores import pair_scores


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("M", "D"), [(1, 1), (7, 2), (123, 3), (17, 100), (5, 4096), (3, 5000)])
def test_kernel_gives_the_bits_of_the_reference(passes, M, D, dtype):
    passes("pair_scores", M=M, D=D, dtype=dtype)


@pytest.mark.parametrize("config", [(4, 2), (8, 4), (1, 1), (256, 16)])
@pytest.mark.parametrize("D", [1, 30, 64, 100])
def test_the_bits_do_not_depend_on_how_a_row_is_cut(passes, D, config):
    passes("pair_scores", M=23, D=D, dtype="fp16", q_dtype="fp16", constants={"_CONFIG": config})


def test_the_reference_takes_the_pairs_in_parts(passes):
    """As beyond 2**19 / D pairs: the parts of the CPU's path share their memory."""
    passes("pair_scores", M=53, D=30, constants={"_CHUNK": 30 * 8})


def test_op_is_well_formed(passes):
    passes("opcheck", name="pair_scores")


def test_a_score_is_the_rounded_exact_dot_product_whatever_the_batch():
    generator = torch.Generator().manual_seed(0)
    for hidden_size in (1, 2, 3, 64, 1000):
        q, d = (torch.randn(50, hidden_size, generator=generator) for _ in range(2))
        rows, ids = torch.arange(50), torch.arange(49, -1, -1)
        exact = (
            (q.numpy().astype(np.longdouble) * d.flip(0).numpy().astype(np.longdouble))
            .sum(-1)
            .astype(np.float32)
        )
        got = pair_scores(q, rows, d, ids)
        np.testing.assert_array_equal(got.numpy(), exact)
        assert torch.equal(
            torch.cat([pair_scores(q, rows[i : i + 1], d, ids[i : i + 1]) for i in range(50)]), got
        )


def test_wrong_shapes_say_what_is_wanted():
    with pytest.raises(ValueError, match=r"as many columns"):
        pair_scores(torch.zeros(2, 3), torch.zeros(1).long(), torch.zeros(2, 4), torch.zeros(1).long())
