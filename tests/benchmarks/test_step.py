"""The step benchmark compares the same work, refuses another model, and adds up what a profile says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package

from benchmarks import step  # noqa: E402
from benchmarks.ceilings import kernel_lines  # noqa: E402
from nemo_embed_core.config import ParallelConfig  # noqa: E402
from nemo_embed_core.parallel.mesh import distributed  # noqa: E402

# Of third parties, a GPU machine needs torch, triton and numpy alone.
NOT_NEEDED = (
    "tokenizers",
    "safetensors",
    "jsonargparse",
    "transformers",
    "sentence_transformers",
    "datasets",
    "mteb",
    "pandas",
    "matplotlib",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_lengths_follow_the_stated_distribution() -> None:
    groups = step.Groups(4000, 4, vocab_size=1000, seed=0)
    passages, queries = groups.document_lengths, groups.query_lengths
    assert abs(passages.mean() - 105) < 2 and abs(np.percentile(passages, 95) - 249) < 6
    assert abs(queries.mean() - 14) < 0.5 and passages.max() == 512 and queries.min() >= 2


def test_peers_get_the_same_tokens_as_ours() -> None:
    groups = step.Groups(8, 4, vocab_size=1000, seed=3)
    batches = step.global_batches(groups, step.SHAPES["tiny"], num_queries=4, max_tokens=2048)
    assert len(batches) == 2
    for batch in batches:
        packed = [ids.tolist() for b in batch.micro_batches for ids in b.input_ids.split(list(b.lengths))]
        padded = []
        for b in batch.padded(groups, 3):
            for ids_NL, mask_NL in ((b.query_ids, b.query_mask), (b.document_ids, b.document_mask)):
                padded += [ids[mask].tolist() for ids, mask in zip(ids_NL, mask_NL, strict=True)]
        assert sorted(packed) == sorted(padded) and len(packed) == 4 * 6
        assert batch.num_tokens == sum(map(len, padded))


def test_fewer_layers_keep_the_share_of_the_embedding() -> None:
    model = step.with_layers("8b", 8)
    assert (model.num_hidden_layers, model.vocab_size, model.hidden_size) == (8, 128256 // 4, 4096)
    assert step.with_layers("8b", 0) == step.SHAPES["8b"] and step.SHAPES["1b"].head_dim == 64


def test_the_gate_passes_and_refuses_a_peer_that_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with distributed(ParallelConfig(), "cpu") as mesh:
        errors = step.gate("plain", mesh)
        assert errors["embeddings"] < 1e-5 and errors["gradients"] < 1e-4
        attention = torch.nn.functional.scaled_dot_product_attention

        def causal(q, k, v, attn_mask):
            past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
            return attention(q, k, v, attn_mask=attn_mask & past)

        shared = step.F
        monkeypatch.setattr(
            step, "F", type("F", (), {**vars(shared), "scaled_dot_product_attention": causal})
        )
        with pytest.raises(AssertionError, match="embeddings"):
            step.gate("plain", mesh)


def test_training_and_encoding_run_and_write_a_line_per_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(step.SHAPES, "tiny", replace(step.GATE_SHAPE, num_hidden_layers=1))
    monkeypatch.setattr(step, "gate", lambda kind, mesh: {"embeddings": 0.0})
    path = tmp_path / "step.jsonl"
    argv = [
        "--device",
        "cpu",
        "--only",
        "train,encode",
        "--queries",
        "2",
        "--peer",
        "plain",
        "--peer-batches",
        "1,2",
        "--encode-tokens",
        "600",
    ]
    assert step.main([*argv, "--seconds", "0.01", "--output", str(path)]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    train, encode = ([line for line in lines if line["what"] == what] for what in ("train", "encode"))
    assert len(train) == 3 and len(encode) == 3 and all(line["tokens_per_s"] > 0 for line in train + encode)
    assert (
        train[0]["useful"] == 1 > train[1]["useful"] > train[2]["useful"]
        and train[0]["ratio_to_best_peer"] > 0
    )
    assert "goal: ratio_to_best_peer" in capsys.readouterr().out


def test_nothing_is_timed_when_the_gate_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind, mesh):
        raise AssertionError("embeddings differ")

    monkeypatch.setattr(step, "gate", broken)
    monkeypatch.setattr(step, "run_training", lambda *args: pytest.fail("timed"))
    assert step.main(["--device", "cpu"]) == 1


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64>(Params)", "GEMM"),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>",
            "attention",
        ),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(AttentionKernel)", "attention"),
        ("_rms_norm_bwd_kernel", "norms, RoPE, SwiGLU"),
        ("_own_fwd_kernel", "pooling and loss"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<LpNormFunctor<float, 2>>", "clipping"),
        ("void at::native::chunk_cat_cuda_kernel<float, c10::BFloat16>", "copies (FSDP, casts, host)"),
        ("void at::native::embedding_backward_feature_kernel<c10::BFloat16>", "embedding"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "other"),
    ],
)
def test_a_kernel_is_counted_where_it_belongs(kernel: str, part: str) -> None:
    assert step.part_of(kernel) == part


def test_time_beside_each_other_is_busy_once_and_annotations_do_not_count() -> None:
    def event(name: str, start: float, duration: float, kind: str = "kernel") -> dict:
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration}

    trace = {
        "traceEvents": [
            event("nvjet_a", 100, 50),
            event("chunk_cat", 120, 60),  # 30 us of it beside the product
            event("mystery", 300, 10),
            event("FSDP::post_backward", 0, 1000, "gpu_user_annotation"),
            event("aten::mm", 0, 1000, "cpu_op"),
            {"ph": "M", "name": "process_name"},
        ]
    }
    parts = step.composition(trace)
    assert parts.busy == pytest.approx(90e-6) and parts.other == [("mystery", pytest.approx(10e-6))]
    assert parts.seconds["GEMM"] == pytest.approx(50e-6) and sum(parts.seconds.values()) == pytest.approx(
        120e-6
    )


def test_needs_no_package_that_a_gpu_machine_may_lack() -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED}, None)); "
        "import benchmarks.step as s; s.parse([])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_kernels_are_listed_longest_first_and_the_rest_is_summed():
    times = {"cub::Sort": 5.25, "_scatter_kernel": 3.0, "a": 1.0, "b": 0.5}
    assert kernel_lines(times, most=2) == "5.2 us cub::Sort, 3.0 us _scatter_kernel, 1.5 us others"
    assert kernel_lines(times).endswith("1.0 us a, 0.5 us b")
