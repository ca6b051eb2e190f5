import pytest
import torch

from nemo_embed_core.kernels.adamw import adamw, join_master, split_master

OPTIONS = {"lr": 2e-3, "beta1": 0.85, "beta2": 0.97, "eps": 1e-7, "weight_decay": 0.05}


@pytest.mark.parametrize("grad", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("sizes", "scale"), [((1, 123), 1.0), ((1024, 3000), 1e-3), ((257,), 1e4)])
def test_kernel_within_budget(passes, sizes, scale, grad):
    passes("adamw", sizes=sizes, scale=scale, grad=grad)


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
    with pytest.raises(ValueError, match=r"bf16, int16, fp32, fp32, not \(torch\.float32"):
        adamw([torch.ones(4)], [remainder], [torch.ones(4)], *moments, torch.ones(()), step=1, **OPTIONS)
    with pytest.raises(ValueError, match=r"one shape, not .*\(5,\)"):
        adamw([weight], [remainder], [torch.ones(5)], *moments, torch.ones(()), step=1, **OPTIONS)
    halves = [[x.view(2, 2).T] for x in (weight, remainder)]
    moments = [[m[0].view(2, 2)] for m in moments]
    with pytest.raises(ValueError, match="contiguous"):
        adamw(*halves, [torch.ones(2, 2)], *moments, torch.ones(()), step=1, **OPTIONS)
