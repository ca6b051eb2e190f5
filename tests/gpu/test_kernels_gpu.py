"""The kernels as they run in training: compiled, in bf16, at model shapes. The checks are those of
tests/kernels/checks.py."""

import importlib.util
from pathlib import Path

import pytest
import torch

from nemo_embed_core.kernels import fp8, info_nce, mean_pool, rms_norm

pytestmark = pytest.mark.gpu

spec = importlib.util.spec_from_file_location(
    "kernel_checks", Path(__file__).parents[1] / "kernels/checks.py"
)
checks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checks)

DTYPES = pytest.mark.parametrize("dtype", ["bf16", "fp32"])  # compiling is most of the time here


@DTYPES
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("T", "D"), [(123, 100), (1025, 2048), (4097, 4096)])
def test_rms_norm_within_budget(T, D, residual, dtype):
    checks.run("rms_norm", {"T": T, "D": D, "residual": residual, "dtype": dtype, "device": "cuda"})


@DTYPES
@pytest.mark.parametrize(("T", "num_blocks", "width"), [(1, 3, 100), (1025, 8, 1024), (513, 8, 1792)])
def test_swiglu_within_budget(T, num_blocks, width, dtype):
    checks.run("swiglu", {"T": T, "num_blocks": num_blocks, "width": width, "dtype": dtype, "device": "cuda"})


@DTYPES
@pytest.mark.parametrize(("T", "I", "rate"), [(1, 100, 0.5), (1025, 4096, 0.1), (513, 14336, 0.9)])
def test_dropout_linear_has_the_bits_of_the_reference(T, I, rate, dtype):
    place = {"layer": 1, "first_column": 3 * I, "rate": rate}
    checks.run("dropout_linear", {"T": T, "I": I, **place, "dtype": dtype, "device": "cuda"})


@DTYPES
@pytest.mark.parametrize(
    ("T", "num_heads", "num_kv_heads", "head_dim"), [(1, 6, 2, 100), (1025, 32, 8, 128), (513, 32, 8, 64)]
)
def test_split_rope_within_budget(T, num_heads, num_kv_heads, head_dim, dtype):
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    checks.run("split_rope", {"T": T, **sizes, "dtype": dtype, "device": "cuda"})


@DTYPES
@pytest.mark.parametrize(("sizes", "factor"), [((1, 1023, 4096 * 1024), 0.37), ((123, 2048), 0.0)])
def test_adamw_within_budget_and_a_refused_step_changes_nothing(sizes, factor, dtype):
    checks.run("adamw", {"sizes": sizes, "factor": factor, "grad": dtype, "device": "cuda"})


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
@pytest.mark.parametrize(("shape", "block", "cut"), [((37, 60), 20, 20), ((513, 4096), 256, 1792)])
def test_rounded_moments_of_adamw_are_neighbours_and_the_same_in_every_cut(shape, block, cut, moments):
    sizes = {"shape": shape, "block": block, "cut": cut}
    checks.run("adamw_moments", {"moments": moments, **sizes, "device": "cuda"})


@DTYPES
@pytest.mark.parametrize("values", ["int8", "bf16"])
@pytest.mark.parametrize(("N", "D"), [(1, 100), (1025, 1024), (513, 4096), (33, 9000)])
def test_quantize_rows_and_what_they_lost(N, D, values, dtype):
    checks.run("quantize_rows", {"N": N, "D": D, "values": values, "dtype": dtype, "device": "cuda"})


@DTYPES
@pytest.mark.parametrize("to", ["e4m3", "e5m2"])
@pytest.mark.parametrize(("R", "C"), [(1, 16), (4097, 4096), (513, 14336), (123, 100)])
def test_fp8_largest_value_and_both_layouts(R, C, to, dtype):
    checks.run("fp8", {"R": R, "C": C, "to": to, "dtype": dtype, "device": "cuda"})


@pytest.mark.parametrize("to", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize(("M", "K", "N"), [(17, 16, 32), (1000, 4096, 6144), (4096, 14336, 4096)])
def test_fp8_product_is_that_of_its_formula(M, K, N, to):
    """The formula is what runs on a CPU; only the order of sums differs, and what fast sums may lose."""
    x, w = (torch.randn(rows, K, device="cuda").bfloat16() for rows in (M, N))
    x8, w8 = fp8.quantize(x, fp8.amax(x), to), fp8.quantize(w, fp8.amax(w), fp8.E4M3)
    scale = (x8.scale * w8.scale).double()
    exact = x8.rows.double() @ w8.rows.double().T * scale
    size = x8.rows.double().abs() @ w8.rows.double().abs().T * scale
    for fast, lost in ((False, 1e-6), (True, 2**-13)):
        got = fp8.scaled_mm(x8.rows, x8.scale, w8.rows, w8.scale, fast=fast).double()
        assert bool(((got - exact).abs() <= 2**-8 * exact.abs() + lost * size).all()), f"{fast=}"


@pytest.mark.parametrize("values", ["int8", "bf16", "fp16"])
@pytest.mark.parametrize(("Q", "N", "D"), [(1, 1, 32), (300, 1001, 4096), (128, 256, 384)])
def test_filter_scores_appends_what_the_reference_keeps(Q, N, D, values):
    for scaled in (True, False):
        checks.run(
            "filter_scores", {"Q": Q, "N": N, "D": D, "values": values, "scaled": scaled, "device": "cuda"}
        )


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("N", "D"),
    [(1, 256), (1025, 256), (33, 512), (1025, 1024), (257, 2048), (513, 4096), (65, 8192), (33, 16384)],
)
def test_rotate_quantize_is_within_its_bound_of_the_exact_rotation(N, D, dtype):
    if D == 16384 and dtype == "fp32":
        pytest.skip("does not fit registers: mining rotates such rows by torch")
    checks.run("rotate_quantize", {"N": N, "D": D, "dtype": dtype, "device": "cuda"})


@DTYPES
@pytest.mark.parametrize("scale", [1e-15, 1e4])
def test_rotate_quantize_of_short_and_long_rows(scale, dtype):
    checks.run("rotate_quantize", {"N": 99, "D": 4096, "scale": scale, "dtype": dtype, "device": "cuda"})


@DTYPES
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("lengths", "D"), [([1, 0, 129, 64, 1, 300], 100), ([14, 105, 249] * 40, 4096), ([1, 32_768, 1], 2048)]
)
def test_mean_pool_within_budget(lengths, D, normalize, dtype):
    arguments = {"lengths": lengths, "D": D, "normalize": normalize, "dtype": dtype, "device": "cuda"}
    checks.run("mean_pool", arguments)


@DTYPES
def test_segment_sum_of_every_shard_of_tokens(dtype):
    arguments = {
        "lengths": [1, 500, 0, 77, 1, 1024],
        "D": 2048,
        "shards": [1, 2, 8],
        "dtype": dtype,
        "device": "cuda",
    }
    checks.run("segment_sum", arguments)


@DTYPES
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("B", "M", "D"), [(123, 5, 4096), (257, 9, 100), (33, 2, 2048)])
def test_hard_info_nce_within_budget(B, M, D, normalize, dtype):
    checks.run(
        "info_nce_hard", {"B": B, "M": M, "D": D, "normalize": normalize, "dtype": dtype, "device": "cuda"}
    )


@DTYPES
@pytest.mark.parametrize("extras", [{}, {"ids": True, "valid": True, "own": 4, "extra": True}])
@pytest.mark.parametrize(("B", "P", "D"), [(16, 777, 100), (64, 1025, 2048), (129, 3001, 4096)])
def test_in_batch_info_nce_within_budget(B, P, D, extras, dtype):
    checks.run("info_nce_in_batch", {"B": B, "P": P, "D": D, **extras, "dtype": dtype, "device": "cuda"})


@DTYPES
def test_in_batch_info_nce_in_several_chunks(dtype):
    arguments = {"B": 300, "P": 5000, "D": 512, "ids": True, "dtype": dtype, "device": "cuda"}
    checks.run("info_nce_in_batch", arguments, constants={"_WORKSPACE": 300 * 4 * 1024})


@DTYPES
def test_shapes_beyond_one_group_block_or_chunk(dtype):
    """Every loop of a kernel a second time, with the constants that production has."""
    where = {"dtype": dtype, "device": "cuda"}
    everything = {"ids": True, "valid": True, "own": 4, "extra": True}
    # 9 row blocks: two groups.
    checks.run("info_nce_in_batch", {"B": 1100, "P": 2300, "D": 128, **everything, **where})
    checks.run("in_batch_logsumexp", {"B": 1100, "P": 2300, "D": 128, "ids": True, **where})
    checks.run("info_nce_hard", {"B": 1030, "M": 17, "D": 64, "normalize": True, **where})
    # Two blocks of columns.
    checks.run("info_nce_hard", {"B": 9, "M": 17, "D": 4200, "normalize": True, **where})
    many = {
        "lengths": [3, 0, 30, 1] * 600,
        "D": 1100,
        **where,
    }  # 2,400 sequences, 20,400 tokens; 2,200 columns of blocks
    for normalize in (False, True):
        checks.run("mean_pool", {**many, "normalize": normalize})
        long = {"lengths": [9000, 40_000], "D": 100, "normalize": normalize, **where}
        checks.run("mean_pool", long)  # more than 64 partial sums a sequence
    checks.run("segment_sum", {**many, "shards": [2]})
    checks.run(
        "rms_norm", {"T": 2000, "D": 520, "residual": True, **where}
    )  # 264 programs: three blocks of partial sums
    checks.run(
        "filter_scores",
        {"Q": 4500, "N": 600, "D": 64, **({"values": dtype} if dtype == "bf16" else {}), "device": "cuda"},
    )
    checks.run("quantize_rows", {"N": 5000, "D": 64, **where})
    checks.run("rotate_quantize", {"N": 5000, "D": 256, **where})
    checks.run("swiglu", {"T": 4100, "num_blocks": 3, "width": 600, **where})
    checks.run("split_rope", {"T": 4100, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64, **where})


@DTYPES
@pytest.mark.parametrize("temperature", [0.005, 1.0])
def test_info_nce_at_extreme_temperatures(temperature, dtype):
    arguments = {"temperature": temperature, "dtype": dtype, "device": "cuda"}
    checks.run("info_nce_hard", {"B": 64, "M": 5, "D": 512, **arguments})
    checks.run("info_nce_in_batch", {"B": 64, "P": 777, "D": 512, **arguments})
    checks.run("in_batch_logsumexp", {"B": 64, "P": 777, "D": 512, "ids": True, "valid": True, **arguments})


def test_public_functions_take_the_kernels():
    x, weight = (
        torch.randn(5, 64, device="cuda", dtype=torch.bfloat16),
        torch.ones(64, device="cuda", dtype=torch.bfloat16),
    )
    y, hidden, _ = rms_norm.rms_norm(x, weight, 1e-5, x.requires_grad_())
    assert "nemo_embed_core_rms_norm_forward" in type(y.grad_fn).__name__ and hidden.grad_fn is y.grad_fn
    pooled = mean_pool.mean_pool(x, torch.tensor([0, 5], device="cuda"), normalize=True)
    assert "mean_pool_forward" in type(pooled.grad_fn).__name__
    assert rms_norm.rms_norm(x.double(), weight.double(), 1e-5)[0].dtype == torch.float64


def test_rows_past_two_to_the_31_elements():
    """Offsets are 64-bit: the last row lies behind element 2**31."""
    num_rows, hidden_size = 2**31 // 4096 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 12 * num_rows * hidden_size:
        pytest.skip("needs about 26 GB of free GPU memory")
    x = torch.zeros(num_rows, hidden_size, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(hidden_size, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(hidden_size, device="cuda", dtype=torch.bfloat16)
    y, _, amax = rms_norm.rms_norm(x, weight, 1e-5, amax=True)
    assert torch.equal(amax, y[-1].abs().max().float())
    assert torch.equal(y[-1:], rms_norm.rms_norm_ref(x[-1:], weight, 1e-5)[0])
    cu_seqlens = torch.tensor([0, num_rows - 1, num_rows], device="cuda")
    torch.testing.assert_close(mean_pool.mean_pool(x, cu_seqlens)[1], x[-1].float())


def test_a_million_negatives_in_five_gigabytes():
    """No [B, P] anywhere: 8192 queries against 2**20 passages of 1024 dimensions, whose logits alone would be
    17 GB in bf16."""
    num_rows, num_columns, hidden_size = 8192, 2**20, 1024
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    docs = torch.nn.functional.normalize(
        torch.randn(num_columns, hidden_size, device="cuda").bfloat16(), dim=-1
    )
    q = docs[:num_rows].clone().requires_grad_()
    docs.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    loss = info_nce.info_nce_in_batch(q, docs, torch.arange(num_rows, device="cuda"), 0.05)
    loss.mean().backward()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{peak / 1e9:.2f} GB at the peak, inputs and gradients included")
    assert peak < 5e9
    rows = q[:4].detach().double()
    exact = torch.logsumexp(rows @ docs.detach().double().T / 0.05, 1) - rows.square().sum(1) / 0.05
    assert (loss[:4] - exact).abs().max() < 1e-3 and q.grad.isfinite().all() and docs.grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["rms_norm", "swiglu", "rope", "mean_pool", "info_nce_own", "info_nce_columns"]
)
def test_compiled_gradients_equal_eager(name):
    """torch 2.11 gives zero gradients for autograd functions that fill buffers; custom ops must not be hit by
    it."""
    module = importlib.import_module(f"nemo_embed_core.kernels.{name}")
    for operator, arguments in checks.operator_samples(module, name):
        results = []
        for backend in (None, "aot_eager", "inductor"):
            torch._dynamo.reset()
            function = (
                operator if backend is None else torch.compile(operator, backend=backend, fullgraph=True)
            )
            leaves = [
                a.detach().cuda().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a
                for a in arguments
            ]
            outputs = function(*leaves)
            outputs = [
                y
                for y in (outputs if isinstance(outputs, tuple) else (outputs,))
                if y.requires_grad and y.numel()
            ]
            checks.weighted_squares(outputs).backward()
            results.append([a.grad for a in leaves if torch.is_tensor(a) and a.requires_grad])
        for eager, *compiled in zip(*results, strict=True):
            for gradient in compiled:
                torch.testing.assert_close(gradient, eager)
                assert gradient.abs().max() > 0
