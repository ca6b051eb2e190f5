"""The step benchmark compares the same work, refuses another model, and adds up what a profile says."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package

from benchmarks import report, step, step_data, step_libraries, step_parts, step_peers, step_report, step_runs  # noqa: E402
from benchmarks.ceilings import kernel_lines  # noqa: E402
from nemo_embed_core.config import ParallelConfig  # noqa: E402
from nemo_embed_core.model.attention import sdpa_attention  # noqa: E402
from nemo_embed_core.model.encoder import Encoder  # noqa: E402
from nemo_embed_core.parallel.mesh import TensorParallel, distributed  # noqa: E402

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
    groups = step_data.Groups(4000, 4, vocab_size=1000, seed=0)
    passages, queries = groups.document_lengths, groups.query_lengths
    assert abs(passages.mean() - 105) < 2 and abs(np.percentile(passages, 95) - 249) < 6
    assert abs(queries.mean() - 14) < 0.5 and passages.max() == 512 and queries.min() >= 2


def test_peers_get_the_same_tokens_as_ours() -> None:
    groups = step_data.Groups(8, 4, vocab_size=1000, seed=3)
    batches = step_data.global_batches(groups, step_data.SHAPES["tiny"], num_queries=4, max_tokens=2048)
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
    model = step_data.with_layers("8b", 8)
    assert (model.num_hidden_layers, model.vocab_size, model.hidden_size) == (8, 128256 // 4, 4096)
    assert step_data.with_layers("8b", 0) == step_data.SHAPES["8b"] and step_data.SHAPES["1b"].head_dim == 64


def test_the_gate_passes_and_refuses_a_peer_that_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with distributed(ParallelConfig(), "cpu") as mesh:
        errors = step_peers.gate(step_peers.plain_torch, mesh)
        assert errors["embeddings"] < 1e-5 and errors["gradients"] < 1e-4
        attention = torch.nn.functional.scaled_dot_product_attention

        def causal(q, k, v, attn_mask):
            past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
            return attention(q, k, v, attn_mask=attn_mask & past)

        shared = step_peers.F
        monkeypatch.setattr(
            step_peers, "F", type("F", (), {**vars(shared), "scaled_dot_product_attention": causal})
        )
        with pytest.raises(AssertionError, match="embeddings"):
            step_peers.gate(step_peers.plain_torch, mesh)


def test_sentence_transformers_is_the_same_model_merged_and_flattened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = step_libraries.SentenceTransformers
    monkeypatch.setattr(step_peers, "GATE_SHAPE", replace(step_peers.GATE_SHAPE, num_hidden_layers=1))
    with distributed(ParallelConfig(), "cpu") as mesh:
        for flatten in (False, True):
            errors = step_peers.gate(partial(make, flatten=flatten), mesh)
            assert errors["embeddings"] < 1e-5 and errors["gradients"] < 1e-4
        model = step_peers.GATE_SHAPE
        groups = step_data.Groups(6, 4, model.vocab_size, seed=1, longest=70)
        (batch,) = step_data.global_batches(groups, model, num_queries=6, max_tokens=800)
        counts = {}
        for flatten in (False, True):
            peer = make(model, mesh.device, torch.float32, flatten=flatten)
            seen: list[tuple[int, ...]] = []
            peer.model.embed_tokens.register_forward_hook(
                lambda module, args, out, seen=seen: seen.append(tuple(args[0].shape))
            )
            micro_batches = peer.batches(groups, batch, 4)
            for micro_batch in micro_batches:
                peer.groups(micro_batch)
            counts[flatten] = len(seen)
            positions = sum(rows * width for rows, width in seen)
            assert positions == sum(m.num_positions for m in micro_batches), "what the model really gets"
            assert (positions == batch.num_tokens) == flatten
        assert counts == {False: 2 * 2, True: 2 * 6}, "one forward of all documents; one of each column"


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *argv: str) -> list[dict]:
    """A whole run of a model of one block; the gate is not asked, and these packages are not there."""
    real = step_runs.importlib.util.find_spec
    absent = ("liger_kernel", "vllm")
    monkeypatch.setattr(
        step_runs.importlib.util, "find_spec", lambda name, *_: None if name in absent else real(name, *_)
    )
    monkeypatch.setitem(step_data.SHAPES, "tiny", replace(step_peers.GATE_SHAPE, num_hidden_layers=2))
    monkeypatch.setattr(step_runs, "gate", lambda make, mesh: {"embeddings": 0.0})
    path = tmp_path / "step.jsonl"
    given = ["--device", "cpu", "--queries", "2", "--peer-batches", "1,2", "--encode-tokens", "600"]
    assert step.main([*given, "--seconds", "0.01", "--output", str(path), *argv]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_and_encoding_run_and_write_a_line_per_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(tmp_path, monkeypatch, "--only", "train,encode", "--peers", "plain,st-flat,st-liger")
    train, encode = ([line for line in lines if line["what"] == what] for what in ("train", "encode"))
    assert [line["kind"] for line in train] == ["ours", "padded", "padded"] + ["flattened"] * 2
    assert [line["kind"] for line in encode] == ["ours", "padded", "padded"]
    assert all(line["tokens_per_s"] > 0 for line in train + encode) and train[0]["attention"] == "sdpa"
    assert train[0]["useful"] == train[3]["useful"] == 1 > train[1]["useful"] > train[2]["useful"]
    reasons = {line["variant"]: line["error"] for line in lines if line["what"] == "not timed"}
    assert reasons == {
        "st-liger": "liger_kernel is not installed", "encode tiny, vllm": "vllm is not installed"
    }  # fmt: skip
    goals = {line["name"]: line["value"] for line in lines if line["what"] == "goal"}
    assert goals["over_padded"] == train[0]["tokens_per_s"] / max(x["tokens_per_s"] for x in train[1:3])
    out = capsys.readouterr().out
    assert "goal: train tiny, over_padded" in out and "[quick" not in out
    assert not any("quick" in line for line in lines)


def test_fp8_is_of_ours_alone_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--precision", "fp8", "--only", "train,encode", "--peers", "plain"]
    lines = [x for x in run(tmp_path, monkeypatch, *options) if x["what"] in ("train", "encode")]
    of = {(line["what"], line["kind"]): line for line in lines}
    assert of["train", "ours fp8"]["precision"] == "fp8" and of["encode", "ours fp8"]["fp8"]
    assert of["train", "padded"]["precision"] == of["encode", "ours"]["precision"] == "bfloat16"


def test_a_quick_run_says_so_on_every_line_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(tmp_path, monkeypatch, "--layers", "1", "--peers", "st-liger")
    said = "1 layers, not the whole model"
    assert lines and all(line["quick"] == said for line in lines)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 8 and all(line.startswith(f"[quick, {said}] ") for line in printed), printed


def test_what_the_time_is_too_short_for_is_said_and_not_begun(capsys: pytest.CaptureFixture[str]) -> None:
    results = SimpleNamespace(rows=[], append=lambda **row: results.rows.append(row))
    report = step_report.Report(results, budget_s=100)  # type: ignore[arg-type]
    assert report.enough("first", 60) and not report.enough("second", 101) and report.enough("third", 90)
    assert [(row["what"], row["variant"]) for row in results.rows] == [("not timed", "second")]
    assert "second: left out: takes about 101 s, 100 s are left (--minutes)" in capsys.readouterr().out


def test_the_whole_8b_is_timed_with_exact_masters_and_beside_what_was(monkeypatch) -> None:
    settings = partial(step_runs.settings_of, "8b")
    args = step.parse(["--device", "cpu", "--precision", "bf16", "--shape", "8b"])
    args.tokens, args.queries = 16384, 28  # of a GPU
    assert [(s.master_weights, s.recompute, s.tokens, s.queries) for s in settings(args)] == [
        ("split", "selective", 16384, 28), ("fp32", "none", 8192, 14)
    ]  # fmt: skip
    args.layers = 8
    assert [(s.master_weights, s.recompute) for s in settings(args)] == [("split", "none")]
    args.layers, args.master_weights = 0, "fp32"
    assert [(s.master_weights, s.recompute) for s in settings(args)] == [("fp32", "selective")]


def test_ours_has_the_moments_that_were_asked_for() -> None:
    base = ["--device", "cpu", "--precision", "bf16", "--shape", "8b", "--moments", "8bit"]
    (settings,) = step_runs.settings_of("8b", step.parse(base))
    assert (settings.master_weights, settings.moments) == ("split", "8bit")
    with pytest.raises(SystemExit):
        step.parse([*base, "--master-weights", "fp32"])
    optim = {"master_weights": settings.master_weights, "moments": settings.moments}
    model = replace(step_data.SHAPES["tiny"], num_hidden_layers=1, vocab_size=64)
    with distributed(ParallelConfig(), "cpu") as mesh:
        ours = step_runs.Ours(model, mesh, torch.bfloat16, optim=optim)
        groups = step_data.Groups(2, 1, model.vocab_size, seed=0)
        (batch,) = step_data.global_batches(groups, model, 2, 2048)
        ours.step(batch)
        states = ours.engine.optimizer.state.values()
        assert torch.int8 in {state["exp_avg"].dtype for state in states}


def test_vllm_gets_a_folder_with_our_weights_and_both_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that reads the folder with transformers, as vLLM would with its own model."""
    from transformers import LlamaModel

    class LLM:
        def __init__(self, model: str, runner: str, skip_tokenizer_init: bool, **_: Any):
            assert runner == "pooling" and skip_tokenizer_init
            self.llama = LlamaModel.from_pretrained(model, dtype=torch.float32)

        def embed(self, prompts: list, use_tqdm: bool) -> list:
            rows = [
                self.llama(torch.tensor([p["prompt_token_ids"]])).last_hidden_state[0].mean(0)
                for p in prompts
            ]
            vectors = [torch.nn.functional.normalize(row, dim=0).tolist() for row in rows]
            return [SimpleNamespace(outputs=SimpleNamespace(embedding=vector)) for vector in vectors]

    stand_in = ModuleType("vllm")
    stand_in.LLM = LLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    model = step_peers.GATE_SHAPE
    encoder = Encoder(model, TensorParallel(), sdpa_attention).requires_grad_(False)
    step_runs.fill_random(encoder, 0, 0.1)
    texts = [np.arange(1, n, dtype=np.int32) for n in (5, 30, 17)]
    rows = step_libraries.vllm_embedder(encoder, model, tmp_path)(texts)
    peer = step_peers.plain_torch(model, torch.device("cpu"), torch.float32, train=False)
    peer.copy_from(encoder, model)
    assert np.abs(rows - peer.embed(*step_data.pad(texts)).numpy()).max() < 1e-5


def test_the_page_says_quick_and_what_was_not_timed() -> None:
    common = {"what": "train", "shape": "8b", "layers": 8, "quick": "8 layers", "mfu": 0.5, "peak_gb": 45.0}
    rows = [
        {"variant": "ours", "tokens_per_s": 600.0, **common},
        {"variant": "padded", "tokens_per_s": 200.0, **common},
        {"variant": "padded, 16", "error": "out of memory", **common},
        {"what": "not timed", "variant": "st-liger", "error": "liger_kernel is not installed"},
    ]
    lines = report.step(rows)
    assert "| train 8b, 8 layers (quick) | padded | 200 | 50% | 45.0 | 3.00 |" in lines
    assert "- padded, 16: out of memory" in lines and "- st-liger: liger_kernel is not installed" in lines


def test_nothing_is_timed_when_the_gate_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(make, mesh):
        raise AssertionError("embeddings differ")

    monkeypatch.setattr(step_runs, "gate", broken)
    monkeypatch.setattr(step_runs.Bench, "run", lambda *args: pytest.fail("timed"))
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
    assert step_parts.part_of(kernel) == part


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
    parts = step_parts.composition(trace)
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
