"""What the kernels must satisfy, as functions: run by Triton's interpreter on the CPU and by the compiler on
a GPU.

Every check takes the module under test, so that mutated copies go through exactly the same checks, and
compares outputs and all gradients with the plain-torch reference in float64 under an error budget: no worse
than twice what plain torch loses in the same dtype, plus an ulp. Uninitialised memory is NaN while the
launchers run, so an element that no program wrote shows.

The interpreter is set up when triton is imported, hence in a server of forks of its own (conftest.py). Known
limits of it: bf16 dots are garbage and bf16 casts truncate, so it checks fp32 and fp16; bf16 is for the GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN (and the largest integers)."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cuBLAS and its workspace
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def outputs_and_gradients(function: Callable, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The function's outputs, and the gradients of sum(output * fixed noise) in every input; the inputs stay
    as they are."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    noise = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(y.shape, generator=noise, dtype=torch.float64).to(y.device, y.dtype) for y in outputs
    ]
    torch.autograd.backward(outputs, cotangents)
    for name, x in inputs.items():
        assert torch.equal(leaves[name].detach().nan_to_num(7), x.nan_to_num(7)), f"{name} was written to"
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"d({name})": x.grad for name, x in leaves.items() if x.grad is not None}


def check(
    kernel: Callable,
    reference: Callable,
    inputs: dict[str, torch.Tensor],
    slack: float = 1.0,
    relative: dict[str, float] | None = None,
    **absolute: float,
):
    """Row by row (a vector over D is one row, every other vector's element is one): twice what plain torch
    loses in that row, or on average over all rows, and `slack` ulps of the row's largest value (fp16, bf16:
    one). So a fault in a few rows, or in small ones, has nowhere to hide. absolute and relative (to the row):
    more, for an input's gradient or for an output (output_0)."""
    truth = outputs_and_gradients(reference, {name: x.double() for name, x in inputs.items()})
    plain = outputs_and_gradients(reference, inputs)
    with poisoned_memory():
        ours = outputs_and_gradients(kernel, inputs)
    assert ours.keys() == truth.keys(), f"{ours.keys()} {truth.keys()}"
    for name, exact in truth.items():
        assert ours[name].dtype == plain[name].dtype and ours[name].shape == exact.shape, (
            f"{name}: {ours[name].dtype}"
        )
        # -inf is a right answer (no column is left for a row): it must stand in the same places.
        finite = exact.isfinite()
        assert torch.equal(ours[name].isfinite(), finite), (
            f"{name}: NaN or inf in {(~ours[name].isfinite()).sum()} places"
        )
        if not finite.any():
            continue
        key = name.replace(" ", "_") if name.startswith("output") else name[2:-1]

        whole, differences = (
            key.endswith("_D"),
            (ours[name].double() - exact, plain[name].double() - exact, exact),
        )
        kept = [torch.where(finite, x, 0.0).abs() for x in differences]
        error, lost, largest = (
            x.max() if whole else x.flatten(0, -2).amax(1) if x.dim() > 1 else x for x in kept
        )
        typical = (
            (lost / largest.clamp(min=torch.finfo(torch.float64).tiny))[largest > 0].mean().nan_to_num(0.0)
        )
        info = torch.finfo(ours[name].dtype)
        ulps = slack if ours[name].dtype == torch.float32 else 1.0
        budget = (
            2 * torch.maximum(lost, typical * largest)
            + (ulps * info.eps + (relative or {}).get(key, 0.0)) * largest
        )
        budget += absolute.get(key, 0.0) + (
            info.smallest_normal if info.bits == 32 else info.smallest_normal * info.eps
        )  # underflow
        if (error > budget).any():
            worst = int((error / budget).argmax())
            raise AssertionError(
                f"{name}, row {worst} of {error.numel()}: error {error.flatten()[worst]:.2e} is above "
                f"the budget "
                f"{budget.flatten()[worst]:.2e} (plain torch {lost.flatten()[worst]:.2e})"
            )


def check_twice(kernel: Callable, inputs: dict[str, torch.Tensor]) -> None:
    """Same input, same bits: on a GPU, where programs run in any order; the interpreter has one order."""
    if all(x.device.type == "cpu" for x in inputs.values()):
        return
    first, second = outputs_and_gradients(kernel, inputs), outputs_and_gradients(kernel, inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between two runs"


def noise(*shape: int, dtype: str, device: str, unit: bool = False) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return (F.normalize(x, dim=-1) if unit else x).to(device, DTYPES[dtype])


# ------------------------------------------------------------------------------------- the glue between GEMMs


def amax_of(x: torch.Tensor, amax: torch.Tensor) -> None:
    """Exactly the largest size of the values that were written, NaN where there is one."""
    want = x.detach().double().abs().max().float()
    assert amax.dtype == torch.float32 and amax.shape == () and not amax.requires_grad
    assert torch.equal(amax, want) or (amax.isnan() and want.isnan()), f"amax: {amax} {want}"


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.nan_to_num(7), y.nan_to_num(7)) and torch.equal(x.isnan(), y.isnan())


def rms_norm(module, T, D, residual, dtype="fp32", device="cpu"):
    inputs = {
        "x_TD": noise(T, D, dtype=dtype, device=device),
        "weight_D": noise(D, dtype=dtype, device=device),
    }
    inputs["x_TD"][0] *= 1e-3  # a row where eps counts
    if residual:
        inputs["residual_TD"] = noise(T, D, dtype=dtype, device=device)

    def both(function):
        return lambda **x: function(eps=1e-5, **x)[:2]

    def no_hidden(function):
        return lambda **x: function(eps=1e-5, **x)[0]

    for wrap in (both, no_hidden):
        check(wrap(module.rms_norm_kernel), wrap(module.rms_norm_ref), inputs, slack=2)
    check_twice(both(module.rms_norm_kernel), inputs)
    for spoil in (None, float("inf"), -float("nan")):
        if spoil is not None:
            inputs["weight_D"][D - 1] = spoil
        for function in (module.rms_norm_kernel, module.rms_norm_ref):
            with poisoned_memory():
                *plain, none = function(eps=1e-5, **inputs)
                *noted, amax = function(eps=1e-5, amax=True, **inputs)
            assert none is None and all(map(same, plain, noted)), "amax changes the outputs"
            amax_of(noted[0], amax)


def swiglu(module, T, num_blocks, width, dtype="fp32", device="cpu"):
    inputs = {"gate_up_TE": 4 * noise(T, 2 * num_blocks * width, dtype=dtype, device=device)}
    check(
        lambda **x: module.swiglu_kernel(num_blocks=num_blocks, **x)[0],
        lambda **x: module.swiglu_ref(num_blocks=num_blocks, **x)[0],
        inputs,
        slack=2,
    )
    (x,) = inputs.values()
    # The largest gradient is any, an up's, none; the last columns are gate and up of the last channel.
    for back, spoil in ((0, None), (1 + width, 50.0), (1, -float("inf")), (1 + width, float("nan"))):
        if spoil is not None:
            x[-1, -back] = spoil
        for function in (module.swiglu_kernel, module.swiglu_ref):
            plain, noted = x.clone().requires_grad_(), x.clone().requires_grad_()
            beside = torch.zeros((), device=device, requires_grad=True)
            with poisoned_memory():
                (one, none), (other, amax) = function(plain, num_blocks), function(noted, num_blocks, beside)
                for out in (one, other):
                    out.backward(torch.linspace(-3, 2, out.numel(), device=device).view_as(out).to(out.dtype))
            assert none is None and same(one, other) and same(plain.grad, noted.grad), "amax changes results"
            amax_of(other, amax)
            amax_of(noted.grad, beside.grad)


def dropout_linear(module, T, I, layer, first_column, rate, dtype="fp32", device="cpu"):
    """The mask and what it leaves to the bit, NaN where the kernel wrote nothing, and the gradients of the
    product."""
    x = noise(T, I, dtype=dtype, device=device)
    ids, bounds = torch.arange(T, device=device) % 7, torch.tensor([0, T // 2, T], dtype=torch.int32)
    positions = torch.cat([torch.arange(T // 2), torch.arange(T - T // 2)]).to(device)
    keys = module.token_keys(module.run_key(3, 5), ids, positions, bounds.to(device))
    mask = keys, layer, first_column, rate
    with poisoned_memory():
        ours = module.dropout_kernel(x, *mask)
    want = module.dropout_ref(x, *mask)
    assert ours.dtype == want.dtype and torch.equal(ours, want), (
        f"{(ours != want).sum()} of {x.numel()} values differ"
    )
    inputs = {"x_TI": x, "A_RI": noise(4, I, dtype=dtype, device=device)}
    both = (
        lambda x_TI, A_RI, function=function: function(x_TI, A_RI, *mask)
        for function in (module.dropout_linear_kernel, module.dropout_linear_ref)
    )
    check(*both, inputs, slack=2)


def split_rope(module, T, num_heads, num_kv_heads, head_dim, dtype="fp32", device="cpu"):
    angle = torch.rand(T, head_dim // 2, dtype=torch.float64) * 6.3
    cos, sin = angle.cos().float().to(device), angle.sin().float().to(device)
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    inputs = {"qkv_TE": noise(T, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)}
    check(
        lambda **x: module.split_rope_kernel(cos_TR=cos, sin_TR=sin, **sizes, **x),
        lambda **x: module.split_rope_ref(cos_TR=cos, sin_TR=sin, **sizes, **x),
        inputs,
    )


# ------------------------------------------------------------------------------------------ the optimizer


def adamw(module, sizes, grad="fp32", factor=0.37, steps=3, scale=1.0, device="cpu"):
    """Some steps on several parameters beside AdamW's formula in fp64, written again here: no value loses
    more than its roundings to fp32. factor 0: no bit changes, whatever the gradients are. scale: of the
    gradients."""
    options = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
    masters = [torch.randn(n, dtype=torch.float64).mul(0.02).float() for n in sizes]
    for master in masters:
        edges = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.00390625, -1.00390625, 1.01171875, 3e38, -3e38])
        master[: len(edges)] = edges[: len(master)]  # 1 + 2^-8 and 1 + 3 * 2^-8 lie between two bf16
    moments = [(torch.randn(n).mul(1e-3), torch.rand(n).mul(1e-4)) for n in sizes]
    masters, moments = (
        [m.to(device) for m in masters],
        [tuple(m.to(device) for m in pair) for pair in moments],
    )
    halves = [module.split_master(m) for m in masters]
    ours = [[h.clone() for h in pair] for pair in halves], [[m.clone() for m in pair] for pair in moments]
    truth = [[x.double() for x in (m, *pair)] for m, pair in zip(masters, moments, strict=True)]
    scales = [[x.abs() for x in values] for values in truth]  # sums of magnitudes: what an ulp is of
    for step in range(3, 3 + steps):
        grads = [(scale * noise(n, dtype="fp32", device=device)).to(DTYPES[grad]) for n in sizes]
        for (w, m, v), (w_size, m_size, v_size), g in zip(truth, scales, grads, strict=True):
            g = g.double() * torch.tensor(factor).double().item()
            if factor:
                w *= 1 - options["lr"] * options["weight_decay"]
                m += (1 - options["beta1"]) * (g - m)
                v += (1 - options["beta2"]) * (g * g - v)
                denominator = (v / (1 - options["beta2"] ** step)).sqrt() + options["eps"]
                w -= options["lr"] / (1 - options["beta1"] ** step) * m / denominator
                m_size += (1 - options["beta1"]) * g.abs()
                v_size += (1 - options["beta2"]) * g * g
                w_size += 8 * options["lr"] / (1 - options["beta1"] ** step) * m_size / denominator
        if not factor:
            grads[0][0], grads[-1][-1] = float("nan"), float("inf")
        args = [pair[0] for pair in ours[0]], [pair[1] for pair in ours[0]], grads
        args += [pair[0] for pair in ours[1]], [pair[1] for pair in ours[1]]
        module.adamw_kernel(*args, torch.tensor(factor, device=device), [], [], step=step, **options)
    for i, ((weight, remainder), pair) in enumerate(zip(*ours, strict=True)):
        master = module.join_master(weight, remainder)
        again = module.split_master(master)
        assert torch.equal(again[0].view(torch.int16), weight.view(torch.int16)), (
            f"parameter {i}: its halves overlap"
        )
        assert torch.equal(again[1], remainder), f"parameter {i}: its halves overlap"
        for name, x, exact, size in zip(
            ("master", "exp_avg", "exp_avg_sq"), (master, *pair), truth[i], scales[i], strict=True
        ):
            error, budget = (x.double() - exact).abs(), 2.0**-23 * (2 * steps + 2) * size + 1e-44
            if not factor:
                budget = 0 * budget
            worst = int((error - budget).nan_to_num(float("inf")).argmax())
            assert bool((error <= budget).all()), (
                f"{name} {worst} of parameter {i}: {x[worst]:.9e}, exactly {exact[worst]:.9e}: "
                f"error {error[worst]:.2e} is "
                f"above the budget {budget[worst]:.2e}"
            )


def value_of_code(codes, bases, block):
    """fp64: the exponent counts eighths, as kernels/adamw.py says, here without a bit of a float."""
    eighths = codes.long().abs() + bases.long().repeat_interleave(block, -1)
    sizes = 2.0 ** (eighths // 8 - 127).double() * (1 + (eighths % 8) / 8.0)
    return torch.where(codes == 0, 0.0, sizes * codes.long().sign())


def adamw_moments(
    module, moments, shape=(37, 60), block=20, cut=20, scale=1.0, factor=0.37, steps=6, device="cpu"
):
    """Updates with moments in bf16 or in codes, of a matrix whole and in three parts. Each stored moment is a
    neighbour of what the formula in fp64 makes of those before, and right in the mean; the parts have the
    bits of the whole, and another key makes others. Some elements are 0 for ever."""
    options = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
    (R, C), types = shape, {"bf16": (torch.bfloat16,) * 2, "8bit": (torch.int8, torch.uint8)}[moments]
    halves = [h.to(device) for h in module.split_master(torch.randn(R, C))]
    kept = [torch.zeros(R, C, dtype=t, device=device) for t in types]
    bases = [torch.zeros(R, C // block, dtype=torch.int16, device=device) for _ in types]
    bases = bases if moments == "8bit" else []
    whole, parts = [*halves, *kept, *bases], []
    for rows, columns in (
        (slice(0, 5), slice(0, cut)),
        (slice(5, R), slice(0, cut)),
        (slice(0, R), slice(cut, C)),
    ):
        narrow = slice(columns.start // block, columns.stop // block)
        cuts = [(rows, columns)] * 4 + [(rows, narrow)] * len(bases)
        parts.append((rows, columns, cuts, [x[at].clone() for x, at in zip(whole, cuts, strict=True)]))
    other, errors = [x.clone() for x in whole], {}

    def read(tensors):
        if moments == "bf16":
            return [x.double() for x in tensors[2:4]]
        return [value_of_code(x, b, block) for x, b in zip(tensors[2:4], tensors[4:], strict=True)]

    def step_of(tensors, grad, place, step):
        w, r, m, v, *b = tensors
        at = torch.tensor(factor, device=device)
        module.adamw_kernel([w], [r], [grad], [m], [v], at, b, place, step=step, **options)

    spread = torch.randn(R, C, device=device).mul(3).exp() * scale  # of the gradients' sizes
    spread[:, 5:9] = 1e-5 * spread[:, :block].amax(1, keepdim=True)  # about as small as a code can be
    spread[1], spread[:, 3] = 0, 0
    for step in range(1, 1 + steps):
        grad = torch.randn(R, C, device=device) * spread
        before = read(whole)
        step_of(whole, grad, [77 + step, 0, C], step)
        step_of(other, grad, [78 + step, 0, C], step)
        for rows, columns, cuts, mine in parts:
            step_of(mine, grad[rows, columns], [77 + step, rows.start * C + columns.start, C], step)
            for x, y, at in zip(whole, mine, cuts, strict=True):
                assert torch.equal(x[at].view(y.dtype), y), (
                    f"step {step}: a part has other bits than the whole"
                )
        g = grad.double() * torch.tensor(factor).double().item()
        exact = [before[0] * 0.8 + 0.2 * g, before[1] * 0.95 + 0.05 * g * g]
        sizes = [before[0].abs() * 0.8 + 0.2 * g.abs(), exact[1]]  # what an ulp is of
        for i, (x, got) in enumerate(zip(exact, read(whole), strict=True)):
            name, bits = ("exp_avg", "exp_avg_sq")[i], {"bf16": 7, "8bit": 3}[moments]
            gap = 2.0 ** (x.abs().clamp(min=1e-300).log2().floor() - bits)
            least = torch.zeros_like(x)
            if moments == "8bit":
                top = (127, 255)[i]
                largest = whole[2 + i].view(R, -1, block).long().abs().amax(-1)
                some = x.view(R, -1, block).abs().amax(-1) > 2.0**-50
                assert torch.equal(largest == top, some), (
                    f"{name}: the largest of a block has not the code {top}"
                )
                one = torch.ones_like(whole[2 + i])
                least = value_of_code(one, whole[4 + i], block)
                gap = torch.where(x.abs() < least, least, gap)
                if i:  # the smallest ones are lifted
                    assert bool(((got > 0) == (x > 0)).all()), "exp_avg_sq lost its place above 0"
                    gap = torch.where(x < least, torch.inf, gap)
            error = (got - x) / gap
            slack = 1e-4 + 2.0**-21 * sizes[i] / gap
            assert bool((error.abs() <= 1 + slack).all()), (
                f"{name} is off by {error.abs().max():.3f} of a gap"
            )
            assert bool((got[x == 0] == 0).all()), f"{name}: 0 moved"
            for part in ("small", "all others"):
                those = (x != 0) & (gap < torch.inf) & ((x.abs() < least) == (part == "small"))
                errors.setdefault((name, part), []).append((error * x.sign())[those])
    for (name, part), found in errors.items():
        all_steps = torch.cat(found)
        mean = all_steps.sum().item() / max(1, len(all_steps))
        assert abs(mean) <= 5 * 0.5 / max(1, len(all_steps)) ** 0.5, (
            f"{name}, {part}: rounded by {mean:.4f} of a gap in the mean"
        )
    assert not torch.equal(other[2], whole[2]), "another key makes the same bits"


# ------------------------------------------------------------------------------------------ pooling


def segment_sum(module, lengths, D, shards=(1,), padding=3, dtype="fp32", device="cpu"):
    """`shards`: into how many pieces of tokens the batch is cut, as sequence parallelism does; `padding`:
    tokens behind."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    num_tokens = int(cu_seqlens[-1]) + padding
    x_TD = noise(num_tokens, D, dtype=dtype, device=device)
    for num_shards in shards:
        offset = 0
        for piece_TD in x_TD.chunk(num_shards):

            def run(function, offset=offset):
                return lambda x_TD: function(x_TD, cu_seqlens, offset)

            check(run(module.segment_sum_kernel), run(module.segment_sum_ref), {"x_TD": piece_TD}, slack=4)
            offset += piece_TD.shape[0]


def mean_pool(module, lengths, D, normalize, padding=3, dtype="fp32", device="cpu", cu_dtype="int32"):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, getattr(torch, cu_dtype))
    inputs = {"x_TD": 1 + noise(int(cu_seqlens[-1]) + padding, D, dtype=dtype, device=device)}

    def run(function):
        return lambda **x: function(cu_seqlens=cu_seqlens, normalize=normalize, **x)

    check(run(module.mean_pool_kernel), run(module.mean_pool_ref), inputs, slack=4)
    check_twice(run(module.mean_pool_kernel), inputs)


# --------------------------------------------------------------------------------------- the contrastive loss


def info_nce_hard(module, B, M, D, temperature=0.05, normalize=False, dtype="fp32", device="cpu"):
    q_BD = noise(B, D, dtype=dtype, device=device, unit=True)
    docs_BMD = noise(B, M, D, dtype=dtype, device=device, unit=True)
    # Some positives nearer to their query: losses small and large.
    docs_BMD[::2, 0] += (0.3 * q_BD[::2]).to(q_BD.dtype)
    if normalize:
        q_BD, docs_BMD = q_BD * 3, docs_BMD * torch.rand(B, M, 1, device=device).add(0.5).to(q_BD.dtype)
    mask_BM = torch.rand(B, M).to(device) > 0.3
    mask_BM[:, 0] = True
    if B > 2:
        mask_BM[0] = False  # nothing at all
        mask_BM[1, 0] = False  # negatives without a positive
        mask_BM[2, 1:] = False  # a positive without negatives: loss 0
    docs_BMD[~mask_BM] = float("nan")  # what is missing is never used
    inputs = {"q_BD": q_BD, "docs_BMD": docs_BMD, "temperature": torch.tensor(temperature, device=device)}

    def run(function):
        return lambda **x: function(mask_BM=mask_BM, normalize=normalize, **x)

    # Of d(temperature): fp32 scores, divided twice by it and summed over the rows.
    rounding = 2e-6 * B / temperature**2
    budgets = {"slack": score_ulps(temperature), "temperature": rounding, "output_0": 2.0**-23}
    # softmax - 1 of a positive that is nearly all of it: what is left is rounded to an ulp of 1.
    budgets |= dict.fromkeys(("q_BD", "docs_BMD"), 2.0**-23 / temperature)
    check(run(module.info_nce_hard_kernel), run(module.info_nce_hard_ref), inputs, **budgets)
    results = outputs_and_gradients(run(module.info_nce_hard_kernel), inputs)
    lost_rows = ~mask_BM[:, 0]
    for name in ("output 0", "d(q_BD)", "d(docs_BMD)"):
        assert (results[name][lost_rows] == 0).all(), f"{name} of a row without a positive"
    assert (results["d(docs_BMD)"][~mask_BM] == 0).all(), "gradient of a missing document"


def score_ulps(temperature: float) -> float:
    """Of every row: a score of up to 1 / temperature is off by half an ulp of it, and its exponential by as
    much of itself."""
    return 8 + 1 / temperature


def lost_on_tensor_cores(q: torch.Tensor, temperature: float) -> float:
    """What a score of unit rows in half precision may lose beyond plain torch, which `check` lets multiply in
    fp32 units: those round, and Hopper's tensor cores truncate the sum after every 16 columns, by half an ulp
    of at most 1 on average."""
    if not q.is_cuda or q.dtype == torch.float32:
        return 0.0
    return q.shape[1] / 16 * 2.0**-24 / temperature


def info_nce_in_batch(
    module,
    B,
    P,
    D,
    temperature=0.05,
    ids=False,
    valid=False,
    own=0,
    extra=False,
    known=0,
    limits=False,
    dtype="fp32",
    device="cpu",
):
    q_BD = noise(B, D, dtype=dtype, device=device, unit=True)
    docs_PD = noise(P, D, dtype=dtype, device=device, unit=True)
    labels_B = torch.randint(0, P, (B,)).to(device)
    docs_PD[labels_B[::2]] += (0.3 * q_BD[::2]).to(q_BD.dtype)  # some positives nearer to their query
    if B > 2:
        labels_B[0] = -1
    options = {"labels_B": labels_B}
    inputs = {"q_BD": q_BD, "docs_PD": docs_PD, "temperature": torch.tensor(temperature, device=device)}
    if ids:  # every document about three times, with ids that do not fit 32 bits
        options["doc_ids_P"] = torch.randint(0, P // 3 + 1, (P,)).to(device) * 2**40 - 2**41
    # Some of them the row's own positive, twice, or no column's id; for a share of the rows none at all.
    if known:
        options["known_ids_BJ"] = options["doc_ids_P"][torch.randint(0, P, (B, known))]
        options["known_ids_BJ"][torch.rand(B, known) > 0.7] = -2
        options["known_ids_BJ"][::3] = -2
    if limits:  # a few of the columns are above, of the last row all, which leaves it the positive
        options["limits_B"] = torch.linspace(0.05, 0.35, B, dtype=torch.float32).to(device)
        options["limits_B"][-1] = -9.0
    if valid:
        options["valid_P"] = (torch.rand(P) > 0.2).to(device)
    if own:
        inputs["own_docs_BKD"] = noise(B, own, D, dtype=dtype, device=device, unit=True)
        options["own_mask_BK"] = (torch.rand(B, own) > 0.4).to(device)
        options["own_mask_BK"][-1] = False
    if extra:
        inputs["extra_lse_B"] = torch.randn(B, device=device)

    def run(function):
        return lambda **x: function(**options, **x)

    rounding = 2e-6 * B / temperature**2
    lost = 2 * lost_on_tensor_cores(q_BD, temperature)  # by the logsumexp and by the positive's score
    # The gradient of extra_lse is a share of the row's sum: what the logsumexp loses, it loses of its value.
    budgets = {"relative": {"extra_lse_B": lost}, "temperature": rounding, "slack": score_ulps(temperature)}
    budgets["output_0"] = lost + 2.0**-23 / temperature  # the loss is the difference of two scores
    check(run(module.info_nce_in_batch_kernel), run(module.info_nce_in_batch_ref), inputs, **budgets)
    check_twice(run(module.info_nce_in_batch_kernel), inputs)
    results = outputs_and_gradients(run(module.info_nce_in_batch_kernel), inputs)
    lost_rows = labels_B < 0
    if valid:
        lost_rows |= ~options["valid_P"][labels_B.clamp(min=0)]
        assert (results["d(docs_PD)"][~options["valid_P"]] == 0).all(), "gradient of a missing passage"
    for name in ("output 0", "d(q_BD)"):
        assert (results[name][lost_rows] == 0).all(), f"{name} of a row without a positive"


def in_batch_logsumexp(
    module, B, P, D, temperature=0.05, ids=False, valid=False, known=0, limits=False, dtype="fp32",
    device="cpu",
):  # fmt: skip
    inputs = {
        "rows_BD": noise(B, D, dtype=dtype, device=device, unit=True),
        "docs_PD": noise(P, D, dtype=dtype, device=device, unit=True),
        "temperature": torch.tensor(temperature, device=device),
    }
    options = {}
    if ids:
        options["doc_ids_P"] = torch.randint(0, P // 3 + 1, (P,)).to(device)
        options["row_ids_B"] = torch.randint(0, P // 3 + 3, (B,)).to(device)  # some that no column has
        if P == 1:
            options["doc_ids_P"][0] = options["row_ids_B"][0]  # a row with no column left: -inf, gradient 0
    if known:
        options["known_ids_BJ"] = options["doc_ids_P"][torch.randint(0, P, (B, known))]
    if limits:  # of the last row no column is left
        options["limits_B"] = torch.linspace(0.1, -2.0, B, dtype=torch.float32).to(device)
    if valid:
        options["valid_P"] = (torch.rand(P) > 0.2).to(device)

    def run(function):
        return lambda **x: function(**options, **x)

    rounding = 2e-6 * B / temperature**2
    lost = lost_on_tensor_cores(inputs["rows_BD"], temperature)
    budgets = {"temperature": rounding, "output_0": lost, "slack": score_ulps(temperature)}
    check(run(module.in_batch_logsumexp_kernel), run(module.in_batch_logsumexp_ref), inputs, **budgets)


def joined_empty_terms(module, B, D=64, dtype="fp32", device="cpu"):
    """The loss joined with two terms that no column is left for, because all rows have one document."""
    ids = torch.full((B,), 4, device=device)
    inputs = {
        "q_BD": noise(B, D, dtype=dtype, device=device, unit=True),
        "docs_PD": noise(B, D, dtype=dtype, device=device, unit=True),
        "temperature": torch.tensor(0.05, device=device),
    }

    def run(loss, logsumexp):
        def joined(q_BD, docs_PD, temperature):
            terms = [logsumexp(rows, rows, temperature, ids, ids) for rows in (docs_PD, q_BD)]
            extra = torch.logaddexp(*terms)
            return loss(q_BD, docs_PD, torch.arange(B, device=device), temperature, ids, extra_lse_B=extra)

        return joined

    kernel = run(module.info_nce_in_batch_kernel, module.in_batch_logsumexp_kernel)
    check(
        kernel,
        run(module.info_nce_in_batch_ref, module.in_batch_logsumexp_ref),
        inputs,
        slack=score_ulps(0.05),
    )


# ------------------------------------------------------------------------------------------ running them

KERNEL_FILE = {"segment_sum": "mean_pool", "split_rope": "rope", "info_nce_hard": "info_nce"}
KERNEL_FILE |= {"adamw_moments": "adamw"}
KERNEL_FILE |= dict.fromkeys(("info_nce_in_batch", "in_batch_logsumexp", "joined_empty_terms"), "info_nce")


def quantize_rows(module, N, D, values="int8", dtype="fp32", device="cpu"):
    """Values within a step where rounding ties, and squares of exactly what was stored; broken rows and zeros
    too."""
    stored = {"int8": torch.int8, **DTYPES}[values]
    x = noise(N, D, dtype=dtype, device=device)
    if N > 2:
        x[0], x[1, D // 2], x[2, 0] = 0, float("nan"), -float("inf")
    before = x.clone()
    with poisoned_memory():
        got, scale, square, error = module.quantize_rows_kernel(x, stored)
    want, want_scale, _, _ = module.quantize_rows_ref(x, stored)
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7)) and got.dtype == stored and got.shape == x.shape
    assert torch.equal(scale.isnan(), ~x.isfinite().all(1)) and torch.equal(scale.isnan(), want_scale.isnan())
    scale, want_scale = scale.nan_to_num(1.0), want_scale.nan_to_num(1.0)
    assert torch.allclose(scale, want_scale, rtol=1e-6, atol=0)
    whole = x.isfinite().all(1)[:, None]
    assert values == "int8" or torch.equal(got.isfinite(), x.isfinite()), (
        "NaN and infinity stay, and come from nowhere"
    )
    exact, got, want = (torch.where(whole, rows.double(), 0) for rows in (x, got, want))
    step = 1.0 if values == "int8" else torch.finfo(stored).eps * want.abs()
    assert bool(((got - want).abs() <= step).all()), "values"
    lost = exact - got * scale.double()[:, None]
    limit = 0.5001 * scale.double()[:, None] if values == "int8" else 1.001 * step
    assert bool((lost.abs() <= limit).all()), "a value is further than half a step from what it stands for"
    for name, ours, truth in (
        ("square", square, exact.square().sum(1)),
        ("error", error, lost.square().sum(1)),
    ):
        assert torch.allclose(ours.double(), truth, rtol=1e-4, atol=1e-30), f"{name}: {ours} {truth}"
    with poisoned_memory():
        alone = module.square_rows_kernel(x)
    assert torch.allclose(alone.double(), exact.square().sum(1), rtol=1e-4, atol=1e-30), (
        f"square_rows: {alone} {square}"
    )


def fp8(module, R, C, to="e4m3", dtype="fp32", amax=None, device="cpu"):
    """The largest |x|, a NaN's too; the values, transposed and padded too, and the scale. amax: of numbers
    that the scaled type holds exactly, as the interpreter rounds to it wrongly; None: any, on a GPU."""
    to = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[to]
    x = 3 * noise(R, C, dtype=dtype, device=device)
    if amax is not None:
        x = (x.float().to(to).float() * (amax / torch.finfo(to).max)).to(DTYPES[dtype])
    largest = torch.tensor(0.0 if amax is None else amax, device=device)
    for spoil in (None, -float("inf"), -float("nan")):
        if spoil is not None:
            x[R // 2, C - 1] = spoil
        with poisoned_memory():
            found = module.amax_kernel(x)
        want = x.double().abs().max().float()
        assert found.dtype == torch.float32 and found.shape == ()
        assert torch.equal(found, want) or (found.isnan() and want.isnan()), f"amax: {found} {want}"
        if amax is None or spoil is not None:
            largest = found
        with poisoned_memory():
            got = module.quantize_kernel(x, largest, to, True, True)
        scale = largest / torch.finfo(to).max
        assert torch.equal(got.scale, scale) or (got.scale.isnan() and scale.isnan()), f"scale: {got.scale}"
        if spoil is not None:
            assert not got.scale.isfinite()
            continue
        exact = (x.float() * (torch.finfo(to).max / largest)).to(to)
        padded = torch.zeros(C, -(-R // 16) * 16, device=device)
        padded[:, :R] = exact.float().t()
        assert got.rows.dtype == got.columns.dtype == to and got.columns.shape == padded.shape
        assert torch.equal(got.rows.float(), exact.float()), "rows"
        assert torch.equal(got.columns.float(), padded), "columns"
        for rows, columns in ((True, False), (False, True)):
            with poisoned_memory():
                one = module.quantize_kernel(x, largest, to, rows, columns)
            for wanted, mine, both in ((rows, one.rows, got.rows), (columns, one.columns, got.columns)):
                assert torch.equal(mine.float(), both.float()) if wanted else not mine.numel()


def rotate_quantize(module, N, D, dtype="fp32", device="cpu", scale=1.0):
    """Within half a step of the exact rotation, which is orthogonal, and what was lost is known:
    rotation_error is a bound."""
    x = scale * noise(N, D, dtype=dtype, device=device)
    x[-1] = x[-1, 0]  # of one sign, or one entry after the rotation
    if N > 4:
        x[0], x[1, D // 2], x[2, 0] = 0, float("nan"), -float("inf")
        x[3] = torch.where(torch.arange(D, device=device) == 5, x[3], 0)
    signs = (torch.randint(0, 2, (D,), device=device) * 2 - 1).float()
    with poisoned_memory():
        values, scale, square, error = module.rotate_quantize_kernel(x, signs)
    assert values.dtype == torch.int8 and values.shape == x.shape
    whole = x.isfinite().all(1)
    assert torch.equal(scale.isnan(), ~whole) and (square[~whole] == 0).all() and (error[~whole] == 0).all()
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < D:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    exact = torch.where(whole[:, None], x.double(), 0) * signs @ matrix.T / (module.SHRINK * D**0.5)
    stored = values.double() * scale.double().nan_to_num(1.0)[:, None]
    norm, allowed = exact.norm(dim=1), module.rotation_error(D, x.dtype) * exact.norm(dim=1)
    lost = exact - stored
    assert bool((lost.abs() <= (0.5001 * scale.double().nan_to_num(1.0) + allowed)[:, None]).all()), (
        "half a step"
    )
    largest = values.abs().amax(1)
    assert torch.equal(largest[norm > 1e-20], torch.full_like(largest, 127)[norm > 1e-20]), (
        "the largest is not 127"
    )
    for name, ours, truth in (("square", square, norm), ("error", error, lost.norm(dim=1))):
        difference = (ours.double().sqrt() - truth).abs()
        underflow = (D * module.UNDERFLOW) ** 0.5
        assert bool((difference <= allowed + 1e-4 * truth + underflow).all()), f"{name}: {ours} {truth}"
    want_values, want_scale, want_square, _ = module.rotate_quantize_ref(x, signs)
    assert bool(((want_values.int() - values.int()).abs() <= 1).all())
    assert torch.allclose(want_scale, scale, rtol=1e-3, equal_nan=True)
    assert torch.allclose(want_square, square, rtol=1e-3, atol=D * module.UNDERFLOW)


def pair_scores(module, M, D, dtype="fp32", q_dtype="fp32", device="cpu"):
    """Bit for bit: the order of summation is part of the contract, and so is that a zero is +0."""
    q, d = noise(5, D, dtype=q_dtype, device=device), noise(9, D, dtype=dtype, device=device)
    q[0], d[0] = -0.0, d[0].abs()
    d[3, D // 2] = float("nan")
    d[4, D // 2] = float("inf")
    d[5] *= 2.0**-14  # subnormals of fp16
    # Numbers of all sizes that cancel: what is left is what rounding lost, another number in any other order.
    left, right = torch.randperm(D, device=device)[: D // 2 * 2].view(2, -1)
    for side in (q[1:], d[6:]):
        side *= 2.0 ** torch.randint(-12, 13, (D,), device=device)
        side[:, right] = side[:, left]
    d[6:, right] *= -1
    rows, ids = torch.randint(0, 5, (M,), device=device).sort()[0], torch.randint(-1, 9, (M,), device=device)
    if M > 9:
        rows[4], rows[-1] = rows[-1].item(), rows[0].item()  # neighbours of different queries
        ids[:10] = torch.arange(-1, 9, device=device)
    with poisoned_memory():
        got = module.pair_scores_kernel(q, rows, d, ids)
    want = module.pair_scores_ref(q, rows, d, ids)
    assert torch.equal(got.isnan(), want.isnan()), f"{got} {want}"
    got, want = got.nan_to_num(7), want.nan_to_num(7)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32)), f"{got} {want}"
    nothing = module.pair_scores_kernel(q, rows, d[:0], torch.full_like(ids, -1))
    assert nothing.isnan().all(), "without documents every pair is a missing one"


def filter_scores(module, Q, N, D, length=64, values="int8", scaled=True, device="cpu"):
    """Exactly the reference's entries: small integers and scales that are powers of two, so no product or sum
    is rounded."""
    dtype = torch.int8 if values == "int8" else DTYPES[values]
    if device == "cpu":  # a program takes milliseconds in the interpreter; two blocks of queries side by side
        module._TILE = {1: (16, 64, 32, 4, 2, 2), 2: (16, 64, 32, 4, 2, 2)}
    queries, documents = (torch.randint(-9, 10, (n, D)).to(dtype).to(device) for n in (Q, N))
    scales = [2.0 ** torch.randint(-2, 2, (n,)).float().to(device) for n in (Q, N)]
    options = dict(zip(("query_scale_Q", "document_scale_N"), scales, strict=True)) if scaled else {}
    options["add_Q"] = torch.randint(-3, 4, (Q,)).float().to(device)
    if scaled:
        options["document_scale_N"][0] = float("nan")  # a broken row
        for name, n in (("slope_Q", Q), ("spread_N", N)):
            options[name] = torch.randint(0, 4, (n,)).float().to(device)
    keys = queries.double() @ documents.double().T
    spread = keys.std(correction=0)
    floor = spread * 2 * torch.rand(Q, device=device).double()
    limit = floor + spread * torch.rand(Q, device=device).double()
    floor[0], limit[0] = torch.finfo(torch.float32).min, float("inf")  # everything: more than the list holds
    if Q > 1:
        floor[1] = limit[1]  # nothing
    arguments = (queries, documents, floor.round().float(), limit.round().float(), length)
    with poisoned_memory():
        got_keys, got_columns, got_counts = module.filter_scores_kernel(*arguments, **options)
    want_keys, want_columns, want_counts = module.filter_scores_ref(*arguments, **options)
    assert torch.equal(got_counts, want_counts), f"counts {got_counts} {want_counts}"
    assert length + 1 >= N or int(got_counts[0]) > length, "no list overflowed"  # one column is broken
    for row, count in enumerate(got_counts.tolist()):
        stored = min(count, length)
        columns, order = got_columns[row, :stored].sort()
        entries = dict(zip(columns.tolist(), got_keys[row, :stored][order].tolist(), strict=True))
        assert len(entries) == stored, f"row {row}: a column twice"
        if count <= length:
            assert entries == dict(
                zip(want_columns[row, :stored].tolist(), want_keys[row, :stored].tolist(), strict=True)
            )


def load(name: str, mutation: tuple[str, str] | None = None) -> ModuleType:
    """A fresh copy of nemo_embed_core.kernels.<name> and of the kernel files that it imports, with `mutation`
    (old text, new text) applied to the sources that have the old text.

    The custom ops of a copy get a namespace of their own: registering a name twice would change the real ops.
    """
    load.copies += 1
    folder = Path(tempfile.mkdtemp(prefix="kernels_"))  # stays: Triton reads a kernel's source from its file
    mutated: list[str] = []
    module = _copy(name, folder, f"copy{load.copies}_of_", mutation, mutated)
    # Not an assertion: that is how a check says that it caught the bug.
    if mutation is not None and not mutated:
        raise LookupError(f"{name}.py has changed: nothing to mutate at {mutation[0]!r}")
    return module


load.copies = 0


def _copy(
    name: str, folder: Path, prefix: str, mutation: tuple[str, str] | None, mutated: list[str]
) -> ModuleType:
    if prefix + name in sys.modules:
        return sys.modules[prefix + name]
    spec = importlib.util.find_spec(f"nemo_embed_core.kernels.{name}")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    if mutation is not None and mutation[0] in source:
        mutated.append(name)
        source = source.replace(*mutation)
    for imported in re.findall(r"^from nemo_embed_core\.kernels\.(\w+) import", source, re.MULTILINE):
        _copy(imported, folder, prefix, mutation, mutated)
    source = source.replace("from nemo_embed_core.kernels.", f"from {prefix}")
    source = source.replace('"nemo_embed_core::', f'"{prefix}{name}::')
    path = folder / f"{prefix}{name}.py"
    path.write_text(source)
    copy_spec = importlib.util.spec_from_file_location(prefix + name, path)
    assert copy_spec is not None and copy_spec.loader is not None
    module = importlib.util.module_from_spec(copy_spec)
    sys.modules[prefix + name] = module
    copy_spec.loader.exec_module(module)
    return module


def run(
    name: str, arguments: dict, mutation: tuple[str, str] | None = None, constants: dict | None = None
) -> None:
    """`constants` of the kernel files are made smaller, so that a small shape goes through every loop more
    than once."""
    torch.manual_seed(0)
    module = load(KERNEL_FILE.get(name, name), mutation)
    copies = [
        m for key, m in sys.modules.items() if key.startswith(module.__name__.split("_of_")[0] + "_of_")
    ]
    for constant, value in (constants or {}).items():
        owners = [m for m in copies if hasattr(m, constant)]
        assert owners, f"{module.__name__} has no {constant}"
        for owner in owners:
            if isinstance(getattr(owner, constant), dict):  # by element size; JSON's keys are strings
                value = {int(key): value for key, value in value.items()}
            setattr(owner, constant, tuple(value) if isinstance(value, list) else value)
    globals()[name](module, **arguments)


def opcheck(name: str) -> None:
    """torch.library.opcheck (schema, fake tensors, autograd registration, AOT dispatch) of every op of a
    file."""
    module = importlib.import_module(f"nemo_embed_core.kernels.{name}")
    for operator, arguments in operator_samples(module, name):
        torch.library.opcheck(operator, arguments)


def operator_samples(module: ModuleType, name: str) -> Iterator[tuple[Callable, tuple]]:
    def x(*shape: int) -> torch.Tensor:
        return torch.randn(shape).requires_grad_()

    def operator_of(custom_op):
        return custom_op._opoverload

    if name == "rms_norm":
        yield operator_of(module._rms_norm_fwd), (x(3, 16), x(16), None, 1e-5, False)
        yield operator_of(module._rms_norm_fwd), (x(3, 16), x(16), x(3, 16), 1e-5, True)
    elif name == "swiglu":
        for beside in (None, x()):
            yield operator_of(module._swiglu_fwd), (x(3, 32), 2, beside)
    elif name == "dropout_linear":
        yield operator_of(module.dropout_kernel), (x(3, 16).detach(), torch.arange(3), 2, 5, 0.3)
    elif name == "rope":
        yield operator_of(module.split_rope_kernel), (x(3, 64), torch.rand(3, 4), torch.rand(3, 4), 4, 2, 8)
    elif name == "quantize_rows":
        yield operator_of(module.quantize_rows_kernel), (x(3, 16).detach(), torch.int8)
        yield operator_of(module.quantize_rows_kernel), (x(3, 16).detach(), torch.bfloat16)
        yield operator_of(module.square_rows_kernel), (x(3, 16).detach(),)
    elif name == "fp8":
        yield operator_of(module.amax_kernel), (x(3, 16).detach(),)
        for layouts in ((True, True), (True, False), (False, True)):
            yield operator_of(module._quantize), (x(3, 16).detach(), torch.tensor(9.0), module.E5M2, *layouts)
    elif name == "adamw":
        scalars = (3, 0.01, 0.8, 0.95, 1e-6, 0.1)
        halves = [module.split_master(torch.randn(n)) for n in (5, 3)]
        moments = [[torch.rand(n) for n in (5, 3)] for _ in range(3)]
        lists = [list(h) for h in zip(*halves, strict=True)] + moments
        yield operator_of(module.adamw_kernel), (*lists, torch.tensor(0.5), [], [], *scalars)
        halves = [[h] for h in module.split_master(torch.randn(2, 6))]
        codes = [[torch.zeros(2, 6, dtype=dtype)] for dtype in (torch.int8, torch.uint8)]
        bases = [torch.zeros(2, 3, dtype=torch.int16) for _ in codes]
        lists = [*halves, [torch.rand(2, 6)], *codes]
        yield operator_of(module.adamw_kernel), (*lists, torch.tensor(0.5), bases, [1, 0, 6], *scalars)
    elif name == "filter_scores":
        rows, vector = torch.randint(-9, 10, (4, 32), dtype=torch.int8), torch.ones(4)
        yield (
            operator_of(module.filter_scores_kernel),
            (rows, rows, -1e9 * vector, 1e9 * vector, 4, vector, vector, None, vector, vector),
        )  # all of the lists is written
    elif name == "rotate_quantize":
        yield operator_of(module.rotate_quantize_kernel), (x(3, 256).detach(), torch.ones(256))
    elif name == "pair_scores":
        ids = torch.tensor([1, 1, 0])
        yield operator_of(module.pair_scores_kernel), (x(3, 16).detach(), ids, x(2, 16).detach(), ids)
    elif name == "mean_pool":
        cu_seqlens = torch.tensor([0, 2, 3])
        yield operator_of(module.segment_sum_kernel), (x(3, 16), cu_seqlens, 0)
        yield operator_of(module._mean_pool_fwd), (x(3, 16), cu_seqlens, True)
        yield operator_of(module._mean_pool_fwd), (x(3, 16), cu_seqlens, False)
    elif name == "info_nce_own":
        temperature, mask = torch.tensor(0.1, requires_grad=True), torch.ones(3, 2, dtype=torch.bool)
        yield operator_of(module._own_fwd), (x(3, 16), x(3, 2, 16), mask, temperature, 0.0, True, True)
        yield operator_of(module._own_fwd), (x(3, 16), x(3, 2, 16), mask, None, 4.0, True, False)
    else:
        temperature = torch.tensor(0.1, requires_grad=True)
        yield (
            operator_of(module.columns_fwd),
            (x(3, 16), x(5, 16), temperature, 0.0, torch.tensor([0, 1, 4]), None, None, None, None),
        )
        groups = torch.arange(5, dtype=torch.int32)
        ids = groups[:3], groups
        yield operator_of(module.columns_fwd), (x(3, 16), x(5, 16), None, 0.1, None, *ids, None, None)
        known = torch.tensor([[1, 4], [-2, 0], [3, 3]], dtype=torch.int32)
        yield (
            operator_of(module.columns_fwd),
            (x(3, 16), x(5, 16), None, 0.1, None, *ids, known, torch.tensor([0.1, 2.0, -9.0])),
        )


def weighted_squares(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A scalar of them all. Not the plain sum of squares: that of unit rows is constant."""
    return sum(
        (y * y * torch.linspace(0.5, 1.5, y.numel(), device=y.device).view(y.shape)).sum() for y in outputs
    )


def compiled_gradients(name: str) -> None:
    """torch.compile (aot_eager) gives the gradients of eager mode: an op whose backward is lost would give
    zeros."""
    module = importlib.import_module(f"nemo_embed_core.kernels.{name}")
    for operator, arguments in operator_samples(module, name):
        results = []
        torch._dynamo.reset()
        for function in (operator, torch.compile(operator, backend="aot_eager", fullgraph=True)):
            leaves = [
                a.detach().clone().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a
                for a in arguments
            ]
            outputs = function(*leaves)
            outputs = [
                y
                for y in (outputs if isinstance(outputs, tuple) else (outputs,))
                if y.requires_grad and y.numel()
            ]
            weighted_squares(outputs).backward()
            results.append([a.grad for a in leaves if torch.is_tensor(a) and a.requires_grad])
        for eager, compiled in zip(*results, strict=True):
            assert eager.abs().max() > 0 and torch.allclose(eager, compiled), f"{name}: {eager} {compiled}"


def benchmark_rehearsal(folder: str) -> None:
    """benchmarks.kernels from end to end, with stand-ins for the device: every line but the stopwatch's own
    runs here."""
    from unittest import mock

    from benchmarks import ceilings, kernels

    def times(calls, repeats):
        for call in calls.values():
            call()
        return {name: [1.0 + index] * repeats for index, name in enumerate(calls)}

    device = mock.MagicMock(name="NVIDIA stand-in", multi_processor_count=132)
    device.name = "stand-in"
    cuda = {
        "is_available": lambda: True,
        "get_device_properties": lambda index: device,
        "synchronize": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 2**20,
        "reset_peak_memory_stats": lambda: None,
        "mem_get_info": lambda: (2**40, 2**40),
        "empty_cache": lambda: None,
    }
    real_cases = dict(kernels.KERNELS)
    on_cpu = {
        name: lambda dtype, device, case=case, **shape: case(dtype, "cpu", **shape)
        for name, case in real_cases.items()
    }
    tiny = {
        "T": 2,
        "width": 32,
        "blocks": 1,
        "H": 2,
        "G": 1,
        "A": 16,
        "B": 2,
        "P": 3,
        "K": 1,
        "D": 16,
        "normalize": 1,
        "rank": 2,
    }
    shapes = {
        name: [{k: tiny.get(k, v) for k, v in shape.items()}] for name, shape in kernels.GATE["cpu"].items()
    }
    shapes["mean_pool"][0]["T"] = 60
    patches = [mock.patch.object(torch.cuda, name, function) for name, function in cuda.items()]
    patches += [
        mock.patch.object(ceilings, "RESULTS", Path(folder)),
        mock.patch.object(kernels, "L2_BYTES", 1),  # one set of inputs
        mock.patch.object(kernels, "KERNELS", on_cpu),
        mock.patch.object(kernels, "SHAPES", shapes),
        mock.patch.object(kernels, "GATE", {"cuda": kernels.GATE["cpu"]}),
        mock.patch.object(kernels, "copy_bandwidth", lambda: 4000.0),
        mock.patch.object(kernels, "matmul_rates", lambda *_: {"bf16": 700.0}),
        mock.patch.object(kernels, "interleaved_times", times),
        mock.patch.object(kernels, "copy_milliseconds", lambda size, num_sets, repeats: 1.0),
        mock.patch.object(kernels, "kernel_times", lambda call, calls: {"stand-in": 1.0}),
        mock.patch.object(kernels, "run_gates", lambda names, device: {name: [] for name in names}),
        mock.patch.object(kernels, "gate", lambda case: []),
    ]
    for patch in patches:
        patch.start()
    try:
        kernels.main(["--no-compile", "--minutes", "60"])
    finally:
        for patch in patches:
            patch.stop()
    (results,) = Path(folder).glob("kernels-*.jsonl")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    ours = [line for line in lines if line["variant"] == "ours"]
    assert {line["kernel"] for line in ours} == set(real_cases)
    assert all(line["rate"] > 0 and line["share"] > 0 and line["gpu"] == "stand-in" for line in ours)
    assert {line["variant"] for line in lines if line["kernel"] == "mean_pool"} >= {
        "eager",
        "padded",
        "segment_reduce",
    }


def training_scores_what_is_timed() -> None:
    """The dtypes of the rows that the loss gets in a step of a bf16 run, and those that benchmarks.kernels
    times."""
    from unittest import mock

    from benchmarks import kernels
    from nemo_embed_core.checkpoint.weights import RandomReader, fill
    from nemo_embed_core.config import ModelConfig, ParallelConfig, TrainConfig
    from nemo_embed_core.data.shapes import Shape
    from nemo_embed_core.loss import contrastive
    from nemo_embed_core.parallel.mesh import distributed
    from nemo_embed_core.train.engine import Engine

    shapes = {"info_nce_hard": {"B": 2, "K": 1, "D": 16}, "info_nce_in_batch": {"B": 2, "P": 3, "D": 16}}
    shapes["info_nce_in_batch"]["ids"] = 1
    model = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    with distributed(ParallelConfig(), "cpu") as mesh:
        for in_batch, used in (("none", 0), ("positives", 1), ("all", 1)):
            name, given = list(shapes)[used], []
            config = TrainConfig.from_dict(
                {"output_dir": "", "steps": 1, "precision": "bf16", "loss": {"in_batch": in_batch}}
            )
            engine = Engine(config, model, mesh)
            fill(engine.model, RandomReader(model, 0), model)
            real = getattr(contrastive, name)

            def seen(*args, real=real, given=given, **options):
                given += [x.dtype for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
                return real(*args, **options)

            with mock.patch.object(contrastive, name, seen):
                engine.forward_backward([Shape((5, 9, 4, 7), 2, 2).tensors(config.loss)] * 2)
            timed = {x.dtype for x in kernels.timed_case(name, "cpu", shapes[name]).inputs().values()}
            scored = {dtype for dtype in given if dtype.is_floating_point}
            assert scored == timed and len(timed) == 1, f"{in_batch}: scored {scored}, timed {timed}"


def error_of(
    check: str, arguments: dict, mutation: tuple[str, str] | None, constants: dict | None
) -> str | None:
    try:
        if check in ("opcheck", "compiled_gradients", "benchmark_rehearsal", "training_scores_what_is_timed"):
            globals()[check](**arguments)
        else:
            run(check, arguments, mutation, constants)
    except AssertionError as failure:
        return f"AssertionError: {failure}\n{traceback.format_exc()}"
    except Exception:  # whatever it is, the test that asked shows it
        return traceback.format_exc()
    return None
