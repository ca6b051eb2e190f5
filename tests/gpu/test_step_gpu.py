"""The training step on a GPU, with its own attention and kernels: the same model as the padded one, and it
learns."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no installed package

from benchmarks import step_libraries, step_peers
from benchmarks.ceilings import kernel_times
from benchmarks.step_data import Groups, global_batches
from benchmarks.step_ours import Ours
from benchmarks.step_parts import PARTS, profiled
from nemo_embed_core.config import ModelConfig, ParallelConfig
from nemo_embed_core.kernels import mean_pool
from nemo_embed_core.model import attention
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.metrics import step_totals
from nemo_embed_core.train.prefetch import Upload

pytestmark = pytest.mark.gpu

# The heads of the 1B and of the 8B.
SMALL = {
    64: ModelConfig(vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
                    num_attention_heads=8, num_key_value_heads=2),
    128: ModelConfig(vocab_size=1024, hidden_size=1024, intermediate_size=2048, num_hidden_layers=2,
                     num_attention_heads=8, num_key_value_heads=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    with distributed(ParallelConfig(), "cuda") as mesh:
        yield mesh


@pytest.mark.parametrize("head_dim", sorted(SMALL))
def test_packed_equals_padded_in_fp32_and_bf16(mesh, head_dim, monkeypatch):
    monkeypatch.setattr(step_peers, "GATE_SHAPE", SMALL[head_dim])
    step_peers.gate(step_peers.plain_torch, mesh)


@pytest.mark.parametrize("backend", ["varlen", "flash", "flash3", "varlen3"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_of_grouped_heads_has_the_reference_gradients(backend, head_dim):
    """bf16: no further from fp64 than twice the plain attention in bf16, outputs and the gradients of q, k
    and v."""
    if lacks := attention.why_not(backend, torch.device("cuda"), torch.bfloat16):
        pytest.skip(lacks)
    torch.manual_seed(0)
    lengths = [1, 70, 129, 300]
    segments = attention.Segments(
        torch.tensor([0, 1, 71, 200, 500], device="cuda", dtype=torch.int32), lengths, 300
    )
    shapes = [(500, 8, head_dim), (500, 2, head_dim), (500, 2, head_dim)]
    values = [torch.randn(s, device="cuda").bfloat16() for s in shapes]
    weights = torch.randn(500, 8, head_dim, device="cuda").bfloat16()

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in values]
        out = function(*leaves, segments)
        out.backward(weights.to(dtype))
        return [out.detach(), *(x.grad for x in leaves)]

    truth = run(attention.reference_attention, torch.float64)
    plain = run(attention.reference_attention, torch.bfloat16)
    ours = run(attention.pick_attention(backend, torch.device("cuda"), torch.bfloat16), torch.bfloat16)
    if backend == "varlen3":
        torch.nn.attention.restore_flash_attention_impl()
    for name, exact, theirs, mine in zip(("out", "dq", "dk", "dv"), truth, plain, ours, strict=True):
        assert (mine - exact).norm() <= 2 * (theirs - exact).norm(), name


def test_packed_equals_hugging_face(mesh):
    pytest.importorskip("transformers")
    step_peers.gate(step_peers.transformers_llama, mesh)


@pytest.mark.parametrize("flatten", [False, True])
def test_packed_equals_sentence_transformers(mesh, flatten):
    pytest.importorskip("sentence_transformers")
    step_peers.gate(partial(step_libraries.SentenceTransformers, flatten=flatten), mesh)


@pytest.mark.parametrize("head_dim", sorted(SMALL))
def test_bf16_steps_lower_the_loss_as_fp32_steps_do(mesh, head_dim):
    groups = Groups(8, 4, SMALL[head_dim].vocab_size, seed=0)
    (batch,) = global_batches(groups, SMALL[head_dim], num_queries=8, max_tokens=2048)
    curves = {}
    for dtype, masters in ((torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "split")):
        ours = Ours(SMALL[head_dim], mesh, dtype, master_weights=masters)
        ours.lr = 1e-6
        curves[dtype, masters] = torch.tensor([ours.step(batch) for _ in range(10)])
    full = curves[torch.float32, "fp32"]
    assert all(curve[-1] < 0.7 * curve[0] for curve in curves.values()), curves
    half = curves[torch.bfloat16, "fp32"]
    assert ((half - full).abs() / full[0]).max() < 0.1, curves


@pytest.mark.parametrize("masters", ["fp32", "split"])
def test_nothing_waits_for_the_device_before_adamw_is_launched(mesh, masters):
    """Nor does the copy of a batch, which has the values of the host's."""
    groups = Groups(16, 4, SMALL[128].vocab_size, seed=0)
    ours = Ours(SMALL[128], mesh, torch.bfloat16, master_weights=masters)
    upload = Upload(mesh.device)
    hosts = [b.micro_batches for b in global_batches(groups, SMALL[128], num_queries=4, max_tokens=2048)]

    def launch(number):
        batches = upload(hosts[number])
        losses_B, stats = ours.engine.forward_backward(batches)
        norm = ours.engine.clip()
        finite, read = step_totals(
            losses_B, stats, norm, ours.engine.config.loss, batches, mesh, stop=False, save_failed=False
        )
        ours.engine.update(ours.lr, finite)
        return batches, read

    for number in (0, 1):
        launch(number)[1]()  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        (batches, read), (more, _) = launch(2), launch(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert read()["rows"] == 4
    for host, there in zip([*hosts[2], *hosts[3]], [*batches, *more], strict=True):
        for name, value in vars(host).items():
            if isinstance(value, torch.Tensor):
                other = getattr(there, name)
                assert other.is_cuda and other.dtype == value.dtype and torch.equal(other.cpu(), value), name


def test_a_step_is_profiled_into_its_parts(mesh):
    groups = Groups(8, 4, SMALL[128].vocab_size, seed=0)
    (batch,) = global_batches(groups, SMALL[128], num_queries=8, max_tokens=2048)
    ours = Ours(SMALL[128], mesh, torch.bfloat16)
    ours.step(batch)
    parts = profiled(lambda: ours.step(batch))
    missing = [part for part in PARTS if part != "other" and not parts.seconds[part]]
    assert not missing, (missing, parts)
    assert parts.seconds["other"] < 0.2 * sum(parts.seconds.values()), parts.other


def test_the_compiled_peer_gives_the_eager_losses(mesh):
    groups = Groups(8, 4, SMALL[64].vocab_size, seed=0)
    (batch,) = global_batches(groups, SMALL[64], num_queries=8, max_tokens=2048)
    peer, padded = step_peers.plain_torch(SMALL[64], mesh.device, torch.float32), batch.padded(groups, 4)
    eager = peer.backward(padded)
    peer.compile_layers(True)
    torch.testing.assert_close(peer.backward(padded), eager, rtol=1e-3, atol=1e-3)
    peer.compile_layers(False)


def test_the_benchmark_names_what_a_call_spends_on_the_card():
    x_TD, cu_seqlens = torch.randn(4096, 256, device="cuda"), torch.tensor([0, 100, 4096], device="cuda")
    times = kernel_times(lambda: [mean_pool.mean_pool_kernel(x_TD, cu_seqlens) for _ in range(2)], calls=2)
    assert {"_chunk_sum_kernel", "_combine_kernel"} <= set(times)
    assert not [name for name in times if "<" in name]
    assert list(times.values()) == sorted(times.values(), reverse=True)
    assert 0 < sum(times.values()) < 1e4
