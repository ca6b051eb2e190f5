"""activation_checkpointing: the same bits of every gradient, and the bytes that it gives back."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server
from tiny import MODEL, amax_read_again, train_config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_embed_core.config import ModelConfig
from nemo_embed_core.data.tokenizer import load_tokenizer

LAYOUTS = {
    1: [(1, False, 1)],
    2: [(2, True, 1), (2, False, 1), (1, False, 2)],
}  # tp_size, sequence_parallel, dp_size
MODES = ["none", "selective", "full"]


class Made(TorchDispatchMode):
    """Every memory that an operation within made, each once; `alive()`: bytes that somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, *outside: torch.Tensor) -> int:
        """Without the memory of `outside`: weights, whose views are saved, and outputs."""
        known = {tensor.untyped_storage()._cdata for tensor in outside}
        return sum(n for key, (ref, n) in self.made.items() if key not in known and not ref.expired())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("selective, kilobytes", [(False, 139.4), (True, 94.3)])
def test_saved_bytes_of_a_token_and_layer_at_the_8b_shape(
    monkeypatch: pytest.MonkeyPatch, selective: bool, kilobytes: float, fp8: bool
) -> None:
    """bf16 on the path of a GPU: of meta tensors, kernels and FlashAttention say what they would make. fp8
    saves what bf16 does, and four largest values."""
    from nemo_embed_core.kernels import rms_norm, rope, swiglu
    from nemo_embed_core.model import llama
    from nemo_embed_core.model.attention import Segments, varlen_attention
    from nemo_embed_core.parallel import layers
    from nemo_embed_core.parallel.mesh import TensorParallel

    monkeypatch.setattr(layers, "rms_norm", rms_norm.rms_norm_kernel)
    monkeypatch.setattr(llama, "split_rope", rope.split_rope_kernel)
    monkeypatch.setattr(llama, "swiglu", swiglu.swiglu_kernel)
    model, T = ModelConfig(), 4096
    D, F, H, A = model.hidden_size, model.intermediate_size, model.num_attention_heads, model.head_dim
    E = (H + 2 * model.num_key_value_heads) * A
    with torch.device("meta"):
        block = llama.LlamaBlock(model, TensorParallel(), varlen_attention, selective).to(torch.bfloat16)
        x, residual = torch.empty(2, T, D, dtype=torch.bfloat16).requires_grad_().unbind()
        cos, sin = torch.empty(2, T, A // 2).unbind()
        segments = Segments(torch.empty(33, dtype=torch.int32), [128] * 32, 128)
    if fp8:
        layers.run_in_fp8(block)
    with Made() as made:
        y, _hidden = block(x, residual, cos, sin, segments)
    # Two sums of the residual stream, q k v, attention's output and log-sum-exp, gate and up; 1 / RMS twice.
    saved = 2 * (2 * D + E + H * A + 2 * F) + 4 * H + 2 * 4
    if not selective:
        saved += 2 * (2 * D + F)
    assert (
        made.alive(y, *block.parameters()) == saved * T + 16 + 16 * fp8
    )  # the seed of a dropout that is not used
    assert round(saved / 1000, 1) == kilobytes


def settled(read: Callable[[], int]) -> int:
    """gloo's threads let go of a collective's memory a moment after the collective is done."""
    value, unchanged = read(), 0
    while unchanged < 10:
        time.sleep(0.02)
        before, value = value, read()
        unchanged = unchanged + 1 if value == before else 0
    return value


def gradients_and_bytes(world_size: int, folder: str, in_batch: str, precision: str) -> list[dict]:
    import torch.distributed as dist

    from nemo_embed_core.data.packing import load_batch
    from nemo_embed_core.parallel import fsdp
    from nemo_embed_core.parallel.fp8 import weights_kept
    from nemo_embed_core.parallel.grad_norm import sync_replicated_grads
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.step import embed
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    results = []
    for tp, sp, dp in LAYOUTS[world_size]:
        mesh, of_mode = build_mesh(torch.device("cpu"), dp, tp, sp), {}
        for mode in MODES:
            config = train_config(
                Path(folder), loss={"in_batch": in_batch}, data={"max_tokens": 200},
                activation_checkpointing=mode, precision=precision,
                parallel={"reshard_after_forward": True}, output_dir=f"{folder}/{tp}-{sp}-{mode}",
            )  # fmt: skip
            trainer = Trainer(
                config, mesh, Prepared(MODEL, load_tokenizer(config.tokenizer)), lambda message: None
            )
            engine = trainer.engine
            batches, _ = load_batch(
                trainer.store, trainer.sampler, 0, mesh.dp_rank, dp, config.data, tp, config.seed
            )

            def step(engine=engine, batches=batches, mesh=mesh) -> dict[str, torch.Tensor]:
                losses_B, _ = engine.forward_backward(batches)
                sync_replicated_grads(engine.model, mesh)
                named = engine.model.named_parameters()
                return {"loss": losses_B, **{fsdp.plain_name(n): p.grad.full_tensor() for n, p in named}}

            tensors = step()
            if precision == "fp8":
                with amax_read_again() as taken_along:
                    again = step()
                assert all(torch.equal(again[name], value) for name, value in tensors.items())
                # Of each block inputs of qkv, gate_up and down, and the gradient of gate_up.
                n, forwards = len(batches), 2 * len(batches) - 1 if in_batch != "none" else len(batches)
                forwards += n if mode == "full" else 0
                assert sum(taken_along) == MODEL.num_hidden_layers * (3 * forwards + n)
            with weights_kept(engine.model), Made() as made:
                rows = embed(engine.model, batches[0])
            of_mode[mode] = (tensors, settled(lambda made=made, rows=rows: made.alive(rows)))
        T = batches[0].input_ids.numel()
        norms, swiglu = 2 * T * MODEL.hidden_size / (tp if sp else 1), T * MODEL.intermediate_size / tp
        freed = (4 if precision == "fp32" else 2) * MODEL.num_hidden_layers * (norms + swiglu)
        results.append({"modes": of_mode, "freed": freed, "micro_batches": len(batches)})
    return results


@pytest.mark.dist
@pytest.mark.parametrize(
    "world_size, in_batch, precision",
    [
        (1, "positives", "fp32"),
        (2, "none", "fp32"),
        (1, "positives", "fp8"),
        pytest.param(2, "none", "fp8", marks=pytest.mark.slow),
    ],
)
def test_recomputation_gives_the_same_bits_and_frees_its_bytes(
    tmp_path: Path, server: Server, world_size: int, in_batch: str, precision: str
) -> None:
    """Several micro-batches, weights gathered again in backward."""
    train_config(tmp_path)
    arguments = world_size, str(tmp_path), in_batch, precision
    for of_rank in server.results(gradients_and_bytes, world_size, *arguments):
        for layout, got in zip(LAYOUTS[world_size], of_rank, strict=True):
            assert got["micro_batches"] > 1
            (want, kept), *others = (got["modes"][mode] for mode in MODES)
            assert all(value.abs().max() > 0 for value in want.values())
            for tensors, _ in others:
                assert all(torch.equal(tensors[name], value) for name, value in want.items()), layout
            selective, full = (alive for _, alive in others)
            freed = kept - selective
            # In bf16 the reference of the norm keeps what its weight's gradient needs.
            is_as_said = freed == got["freed"] if precision == "fp32" else 0 < freed <= got["freed"]
            assert freed > 0 and is_as_said, f"{layout}: {kept=} {selective=}"
            assert full < selective
