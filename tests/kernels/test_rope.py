import pytest
import torch

from nemo_embed_core.kernels.rope import split_rope, split_rope_ref


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("T", "num_heads", "num_kv_heads", "head_dim"),
    [(1, 4, 2, 64), (13, 6, 2, 100), (5, 32, 8, 128), (9, 2, 2, 32)],
)
def test_kernel_within_budget(passes, T, num_heads, num_kv_heads, head_dim, dtype):
    passes("split_rope", T=T, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)


def test_ops_are_well_formed_and_keep_gradients_under_compile(passes):
    passes("opcheck", name="rope")
    passes("compiled_gradients", name="rope")


def tables(num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(num_tokens)[:, None] / 10_000 ** (torch.arange(head_dim // 2) / (head_dim // 2))
    return angle.cos(), angle.sin()


def test_reference_gradcheck():
    qkv = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda qkv: split_rope_ref(qkv, *tables(3, 8), 4, 2, 8), (qkv,))


def test_equals_hugging_face_on_separate_projections():
    num_tokens, num_heads, num_kv_heads, head_dim = 7, 6, 2, 8
    q, k, v = (torch.randn(num_tokens, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads))
    blocks = [
        torch.cat([q[:, 3 * g : 3 * g + 3], k[:, g : g + 1], v[:, g : g + 1]], 1) for g in range(num_kv_heads)
    ]
    cos, sin = tables(num_tokens, head_dim)
    ours = split_rope(torch.cat(blocks, 1).flatten(1), cos, sin, num_heads, num_kv_heads, head_dim)

    def rotate_half(x):
        return torch.cat([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], -1)

    cos, sin = (torch.cat([x, x], -1)[:, None] for x in (cos, sin))
    for mine, expected in zip(
        ours, (q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v), strict=True
    ):
        torch.testing.assert_close(mine, expected)
        assert mine.is_contiguous()


def test_wrong_shapes_say_what_is_wanted():
    cos, sin = tables(3, 8)
    with pytest.raises(ValueError, match=r"\[T, 64\]"):
        split_rope(torch.zeros(3, 60), cos, sin, 4, 2, 8)
    with pytest.raises(ValueError, match="one row per token"):
        split_rope(torch.zeros(2, 64), cos, sin, 4, 2, 8)
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        split_rope(torch.zeros(3, 80), cos, sin, 4, 3, 8)
