import pytest
import torch

from nemo_embed_core.kernels.mean_pool import mean_pool, mean_pool_ref, segment_sum, segment_sum_ref

RAGGED = [
    1,
    1,
    21,
    0,
    34,
    1,
    6,
]  # one-token and empty sequences; borders of 16-token chunks in them, between and on them
CHUNKS = {"_CHUNK": 16, "_SCATTER_CHUNK": 16}  # tokens: so that few already make several chunks


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("normalize", [False, True])
def test_kernel_within_budget(passes, normalize, dtype):
    passes("mean_pool", lengths=RAGGED, D=100, normalize=normalize, dtype=dtype, constants=CHUNKS)


@pytest.mark.parametrize(
    ("lengths", "D", "padding"),
    [([1], 64, 0), ([65], 300, 0), ([2, 3], 4096, 1), ([16, 16], 64, 0), ([1] * 17, 64, 0)],
)
def test_kernel_over_awkward_shapes(passes, lengths, D, padding):
    passes("mean_pool", lengths=lengths, D=D, padding=padding, normalize=True, constants=CHUNKS)
    passes("mean_pool", lengths=lengths, D=D, padding=padding, normalize=False, cu_dtype="int64")


@pytest.mark.parametrize("normalize", [False, True])
def test_more_sequences_than_ends_are_compared_at_a_time(passes, normalize):
    """As beyond 1,024 sequences and 1,024 columns, with chunks of the many-token size."""
    small = CHUNKS | {"_ENDS": 8, "_MANY_TOKENS": 32, "_CHUNK_OF_MANY": 8, "_SCATTER_CHUNK": 8}
    small |= {"_COLUMNS_FORWARD": [4, 32, 1, 3], "_COLUMNS_BACKWARD": [4, 32, 1, 1]}
    # 21: three blocks of ends; the last one takes three blocks of partial sums.
    lengths = [1, 3, 0, 5] * 5 + [70]
    passes("mean_pool", lengths=lengths, D=70, normalize=normalize, constants=small)
    passes("segment_sum", lengths=lengths, D=70, shards=[3], constants=small)


@pytest.mark.parametrize("normalize", [False, True])
def test_partial_sums_of_long_sequences_are_added_by_many_programs(passes, normalize):
    """As above a mean length of 2,048, with more partial sums than one block of the sum takes."""
    small = CHUNKS | {"_LONG": 8, "_COMBINE_LONG": [2, 32, 1]}
    passes("mean_pool", lengths=[70, 0], D=100, padding=0, normalize=normalize, constants=small)
    passes("mean_pool", lengths=[90, 40, 1], D=70, normalize=normalize, constants=small)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_segment_sum_of_every_shard_of_tokens(passes, dtype):
    passes("segment_sum", lengths=RAGGED, D=64, shards=[1, 2, 4], dtype=dtype, constants=CHUNKS)


def test_ops_are_well_formed_and_keep_gradients_under_compile(passes):
    passes("opcheck", name="mean_pool")
    passes("compiled_gradients", name="mean_pool")


def test_reference_gradcheck():
    cu_seqlens = torch.tensor([0, 1, 4, 4, 6])
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_sum_ref(x, cu_seqlens, 1), (x,))
    for normalize in (False, True):
        assert torch.autograd.gradcheck(lambda x: mean_pool_ref(x, cu_seqlens, normalize), (x,))  # noqa: B023


def test_equals_a_loop_over_sequences():
    x, cu_seqlens = torch.randn(10, 16), torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    expected = torch.stack([x[a:b].mean(0) for a, b in ((0, 3), (3, 4), (4, 9))])
    torch.testing.assert_close(mean_pool(x, cu_seqlens), expected)
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(mean_pool(x, cu_seqlens, True), expected, rtol=1e-5, atol=1e-6)


def test_shards_add_up_to_the_whole():
    x, cu_seqlens = torch.randn(12, 8), torch.tensor([0, 5, 6, 11])
    parts = [
        segment_sum(piece, cu_seqlens, offset) for offset, piece in zip((0, 4, 8), x.split(4), strict=True)
    ]
    torch.testing.assert_close(sum(parts) / cu_seqlens.diff()[:, None], mean_pool(x, cu_seqlens))


def test_half_precision_is_summed_in_fp32():
    x = torch.full((4096, 8), 1.0, dtype=torch.bfloat16)
    x[0] = 1024.0
    assert segment_sum(x, torch.tensor([0, 4096])).dtype == torch.float32
    assert (segment_sum(x, torch.tensor([0, 4096])) == 5119).all()


def test_wrong_shapes_say_what_is_wanted():
    with pytest.raises(ValueError, match="integer cu_seqlens"):
        mean_pool(torch.zeros(3, 8), torch.zeros(2))
