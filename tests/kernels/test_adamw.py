import itertools

import pytest
import torch

from nemo_embed_core.kernels.adamw import adamw, from_fp32_, join_master, random_bits, split_master, to_fp32

OPTIONS = {"lr": 2e-3, "beta1": 0.85, "beta2": 0.97, "eps": 1e-7, "weight_decay": 0.05}


@pytest.mark.parametrize("grad", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("sizes", "scale"), [((1, 123), 1.0), ((1024, 3000), 1e-3), ((257,), 1e4)])
def test_kernel_within_budget(passes, sizes, scale, grad):
    passes("adamw", sizes=sizes, scale=scale, grad=grad)


@pytest.mark.parametrize(
    ("moments", "sizes"),
    [
        ("bf16", {"scale": 1e-3}),
        ("8bit", {}),
        ("8bit", {"shape": (9, 512), "block": 256, "cut": 256, "factor": 3.0}),
    ],
)
def test_rounded_moments_are_neighbours_right_in_the_mean_and_the_same_in_every_cut(passes, moments, sizes):
    passes("adamw_moments", moments=moments, **sizes)


def test_factor_0_changes_no_bit_whatever_the_gradients_are(passes):
    passes("adamw", sizes=(123, 7), factor=0.0)


def test_op_is_well_formed(passes):
    passes("opcheck", name="adamw")


def test_every_fp32_is_its_two_halves_and_the_weight_is_the_nearest_bf16():
    # Every exponent and sign, with all mantissas around the ties of even and odd weights and at both ends.
    near = torch.tensor(
        [0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x18001, 0, 1, 0x7F8000, 0x7FFFFF, 0x3FFFF]
    )
    bits = (torch.arange(512)[:, None] << 23) + near
    bits = bits[(bits & 0x7F800000 != 0x7F800000) | (bits & 0x7FFFFF == 0)]  # no NaN
    master = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    weight, remainder = split_master(master)
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert torch.equal(join_master(weight, remainder).view(torch.int32), master.view(torch.int32))
    nearest, finite = master.bfloat16(), master.bfloat16().isfinite()
    tie = (bits & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie].view(torch.int16), nearest[~tie].view(torch.int16))
    up = (weight.double().abs() - master.double().abs())[tie & finite]
    down = (nearest.double() - master.double()).abs()[tie & finite]
    assert bool((up == down).all()), "a tie goes away from zero"


def test_two_hundred_steps_are_those_of_torch_on_fp32_masters_bit_for_bit():
    torch.manual_seed(0)
    masters = [torch.randn(301, 7) * 0.02, 1 + torch.randn(130) * 0.1]
    masters[0].view(-1)[:200] *= 1e-38  # subnormal ones too
    plain = [torch.nn.Parameter(m.clone()) for m in masters]
    groups = [{"params": plain[:1], "weight_decay": 0.05}, {"params": plain[1:], "weight_decay": 0.0}]
    betas = OPTIONS["beta1"], OPTIONS["beta2"]
    peer = torch.optim.AdamW(groups, lr=OPTIONS["lr"], betas=betas, eps=OPTIONS["eps"], fused=True)
    halves = [split_master(m) for m in masters]
    moments = [(torch.zeros_like(m), torch.zeros_like(m)) for m in masters]
    for step in range(1, 201):
        grads = [torch.randn_like(m) * 1e-3 for m in masters]
        factor = torch.rand(()) + 0.5
        for p, g in zip(plain, grads, strict=True):
            p.grad = g * factor
        peer.step()
        for i, decay in enumerate((0.05, 0.0)):
            state = [[x] for x in (*halves[i], grads[i], *moments[i])]
            adamw(*state, factor, step=step, **(OPTIONS | {"weight_decay": decay}))
    for i, p in enumerate(plain):
        assert not torch.equal(p, masters[i])
        assert torch.equal(join_master(*halves[i]).view(torch.int32), p.detach().view(torch.int32))
        for ours, name in zip(moments[i], ("exp_avg", "exp_avg_sq"), strict=True):
            assert torch.equal(ours, peer.state[p][name]), name


def test_wrong_input_says_what_is_wanted():
    weight, remainder = split_master(torch.ones(4))
    moments = [[torch.zeros(4)], [torch.zeros(4)]]
    with pytest.raises(ValueError, match=r"in bf16 and int16, .*, not \(torch\.float32"):
        adamw([torch.ones(4)], [remainder], [torch.ones(4)], *moments, torch.ones(()), step=1, **OPTIONS)
    with pytest.raises(ValueError, match=r"one shape, not .*\(5,\)"):
        adamw([weight], [remainder], [torch.ones(5)], *moments, torch.ones(()), step=1, **OPTIONS)
    halves = [[x.view(2, 2).T] for x in (weight, remainder)]
    moments = [[m[0].view(2, 2)] for m in moments]
    with pytest.raises(ValueError, match="contiguous"):
        adamw(*halves, [torch.ones(2, 2)], *moments, torch.ones(()), step=1, **OPTIONS)
    halves = [[x] for x in split_master(torch.ones(2, 6))]
    codes = [[torch.zeros(2, 6, dtype=dtype)] for dtype in (torch.int8, torch.uint8)]
    with pytest.raises(ValueError, match=r"three places .* not 0 places and 0 bases of 1 parameters"):
        adamw(*halves, [torch.ones(2, 6)], *codes, torch.ones(()), step=1, **OPTIONS)
    bases = [torch.zeros(2, 4, dtype=torch.int16)] * 2
    with pytest.raises(ValueError, match=r"whole blocks, not .*2, 4.* of .*2, 6"):
        adamw(*halves, [torch.ones(2, 6)], *codes, torch.ones(()), bases, [1, 0, 6], step=1, **OPTIONS)


def kept_in(
    dtype: torch.dtype, shape: tuple[int, int], block: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where a moment goes: it, and the bases of its blocks."""
    base = torch.zeros(shape[0], shape[1] // block, dtype=torch.int16) if dtype.itemsize == 1 else None
    return torch.zeros(shape, dtype=dtype), base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.uint8])
def test_what_is_kept_goes_through_fp32_to_the_same_bits(dtype):
    """So a checkpoint in fp32 is exact: blocks of every size of number, random codes of all kinds in them."""
    torch.manual_seed(1)
    shape, block = (600, 96), 24
    values = torch.randn(shape) * 10.0 ** torch.empty(600, 1).uniform_(-44, 37)
    values *= 2.0 ** -(torch.rand(shape) * 36).round()
    values[3:9] = 0
    values[:, 90:] = 0
    values = values.abs() if dtype == torch.uint8 else values
    kept, base = kept_in(dtype, shape, block)
    for random in (None, torch.randint(2**32, shape)):
        from_fp32_(values, kept, base, random)
        if base is not None:
            codes = kept.long().abs()
            assert len(codes.unique()) == (256 if dtype == torch.uint8 else 128)
            largest = [x.reshape(600, -1, block).abs().amax(-1) for x in (codes, values)]
            assert bool((largest[0] == codes.max())[largest[1] > 2.0**-50].all())
        again, base_again = kept_in(dtype, shape, block)
        from_fp32_(to_fp32(kept, base), again, base_again)
        assert torch.equal(again.view(torch.int8), kept.view(torch.int8))
        assert base is None or torch.equal(base, base_again)


@pytest.mark.parametrize("moments", [(torch.bfloat16, torch.bfloat16), (torch.int8, torch.uint8)])
def test_exp_avg_sq_follows_by_thousandths_at_random_and_stands_still_to_nearest(moments):
    """Gradients become half as large: of the mean of their squares a quarter should be left, in the mean."""
    shape, steps, options = (32, 128), 700, OPTIONS | {"beta1": 0.9, "beta2": 0.999}
    torch.manual_seed(2)
    grad = torch.randn(shape).sign() * 0.5
    exact = 1.0 * 0.999**steps + 0.25 * (1 - 0.999**steps)
    left = {}
    for rounding in ("random", "nearest"):
        weight, remainder = split_master(torch.zeros(shape))
        (m, m_base), (v, v_base) = (kept_in(dtype, shape, 64) for dtype in moments)
        from_fp32_(torch.ones(shape), v, v_base)
        bases = [] if m_base is None else [m_base, v_base]
        for step in range(1, steps + 1 if rounding == "random" else 200):
            if rounding == "random":
                place = [step * 40503 % 2**31, 0, 128]
                adamw(
                    [weight],
                    [remainder],
                    [grad],
                    [m],
                    [v],
                    torch.ones(()),
                    bases,
                    place,
                    step=step,
                    **options,
                )
            else:
                from_fp32_(0.999 * to_fp32(v, v_base) + 0.001 * grad**2, v, v_base)
        left[rounding] = to_fp32(v, v_base).mean().item()
    assert abs(left["random"] / exact - 1) < 0.01, (left, exact)
    assert left["nearest"] > 0.9, left


def test_random_bits_are_fair_and_depend_on_the_key_and_the_place_in_the_whole_alone():
    shape, cpu = torch.Size((300, 512)), torch.device("cpu")
    whole = random_bits(123456, 0, 512, shape, cpu)
    for bits in (*whole, *random_bits(123457, 0, 512, shape, cpu)):
        assert bits.min() >= 0 and bits.max() < 2**32
        ones = torch.stack([(bits >> i & 1).double().mean() for i in range(32)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / bits.numel() ** 0.5
        assert len(bits.unique()) > 0.999 * bits.numel()
    others = [*random_bits(123457, 0, 512, shape, cpu), *random_bits(123456, 512, 512, shape, cpu)]
    for a, b in itertools.combinations([*whole, *others], 2):
        together = torch.corrcoef(torch.stack([a, b]).double().flatten(1))[0, 1]
        assert abs(together) < 5 / a.numel() ** 0.5
    part = random_bits(123456, 7 * 512 + 128, 512, torch.Size((20, 256)), cpu)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[7:27, 128:384], b)
