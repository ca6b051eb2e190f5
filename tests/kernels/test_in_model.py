"""The Triton kernels inside a training step: loss and every gradient equal the reference path's, alone and
under tp x sp.

On a CPU the model takes the references; here the same model runs once with them and once with the kernels'
launchers in Triton's interpreter (fp32: its bf16 is not to be trusted).
"""

from pathlib import Path

import pytest
import torch
from forked import Server
from tiny import MODEL, amax_read_again, train_config

from nemo_embed_core.data.tokenizer import load_tokenizer


def both_paths(folder: str, in_batch: str) -> dict:
    import torch.distributed as dist

    from nemo_embed_core.data.packing import load_batch
    from nemo_embed_core.kernels import info_nce, mean_pool, rms_norm, rope, swiglu
    from nemo_embed_core.loss import contrastive
    from nemo_embed_core.model import llama, pooling
    from nemo_embed_core.parallel import fsdp, layers
    from nemo_embed_core.parallel.grad_norm import sync_replicated_grads
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.step import forward_backward
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    loss = {"in_batch": in_batch, "temperature": 0.05}
    data = {"document_max_length": 8, "num_hard_negatives": 1}  # the interpreter takes milliseconds a program
    config = train_config(
        Path(folder), loss=loss, data=data, global_batch_size=2, output_dir=f"{folder}/{in_batch}"
    )
    world_size = dist.get_world_size()
    mesh = build_mesh(torch.device("cpu"), 1, world_size, True)
    trainer = Trainer(config, mesh, Prepared(MODEL, load_tokenizer(config.tokenizer)), lambda message: None)
    batches, _ = load_batch(trainer.store, trainer.sampler, 0, 0, 1, config.data, world_size, config.seed)

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        trainer.engine.optimizer.zero_grad(set_to_none=True)
        losses_B, _ = forward_backward(trainer.engine.model, batches, mesh, config.loss, trainer.engine.dtype)
        sync_replicated_grads(trainer.engine.model, mesh)
        grads = {
            fsdp.plain_name(n): p.grad.full_tensor().clone()
            for n, p in trainer.engine.model.named_parameters()
        }
        return losses_B, grads

    reference = step()
    calls = dict.fromkeys(("rms_norm", "split_rope", "swiglu", "pool", "loss"), 0)

    def counted(name: str, kernel):
        def run(*args, **kwargs):
            calls[name] += 1
            return kernel(*args, **kwargs)

        return run

    layers.rms_norm = counted("rms_norm", rms_norm.rms_norm_kernel)
    llama.split_rope = counted("split_rope", rope.split_rope_kernel)
    llama.swiglu = counted("swiglu", swiglu.swiglu_kernel)
    pooling.mean_pool = counted("pool", mean_pool.mean_pool_kernel)
    pooling.segment_sum = counted("pool", mean_pool.segment_sum_kernel)
    contrastive.info_nce_hard = counted("loss", info_nce.info_nce_hard_kernel)
    contrastive.info_nce_in_batch = counted("loss", info_nce.info_nce_in_batch_kernel)
    return {"reference": reference, "kernels": step(), "calls": calls}


@pytest.mark.dist
@pytest.mark.parametrize("world_size, in_batch", [(1, "positives"), (2, "none")])
def test_a_step_with_kernels_equals_the_reference_step(
    tmp_path: Path, interpreter: Server, world_size: int, in_batch: str
) -> None:
    train_config(tmp_path)
    for got in interpreter.results(both_paths, world_size, str(tmp_path), in_batch):
        assert all(got["calls"].values()), f"a kernel was not used: {got['calls']}"
        (want_loss, want), (loss, grads) = got["reference"], got["kernels"]
        assert (loss - want_loss).abs().max() <= 1e-5 * want_loss.abs().max()
        for name, grad in want.items():
            error = (grads[name] - grad).abs().max() / grad.abs().max()
            assert error <= 1e-5, f"gradient of {name} is off by {error:.1e}"


def fp8_block() -> list[list[torch.Tensor]]:
    """Outputs of a block of 11 tokens and all gradients: largest values taken along, and read again."""
    from nemo_embed_core.kernels import rms_norm, swiglu
    from nemo_embed_core.model import llama
    from nemo_embed_core.model.attention import Segments, reference_attention
    from nemo_embed_core.parallel import layers
    from nemo_embed_core.parallel.mesh import TensorParallel

    layers.rms_norm, llama.swiglu = rms_norm.rms_norm_kernel, swiglu.swiglu_kernel
    torch.manual_seed(0)
    block = llama.LlamaBlock(MODEL, TensorParallel(), reference_attention)
    layers.run_in_fp8(block)
    for p in block.parameters():
        torch.nn.init.normal_(p, 0.5, 0.3)
    block.bfloat16()
    inputs = torch.randn(2, 11, MODEL.hidden_size).bfloat16()
    cos, sin = llama.rope_table(llama.rope_inv_freq(MODEL), torch.arange(11), torch.float32)
    segments = Segments(torch.tensor([0, 4, 11], dtype=torch.int32), [4, 7], 7)

    def step() -> list[torch.Tensor]:
        block.zero_grad(set_to_none=True)
        x = inputs.clone().requires_grad_()
        outputs = block(*x.unbind(), cos, sin, segments)
        torch.autograd.backward(outputs, [inputs[1], inputs[0]])
        return [y.detach() for y in outputs] + [x.grad, *(p.grad for p in block.parameters())]

    taken_along = step()
    with amax_read_again() as found:
        read_again = step()
    assert sum(found) == 4, "of qkv, gate_up and down, and of the gradient of gate_up"
    return [taken_along, read_again]


def test_an_fp8_block_is_the_same_whoever_takes_the_largest_values(interpreter: Server) -> None:
    """Norms and SwiGLU run as kernels; their bf16 is the interpreter's, both times."""
    outcome = interpreter.call(fp8_block)
    assert outcome.code == 0, outcome.output
    for x, y in zip(*outcome.result, strict=True):
        assert torch.equal(x, y) and x.abs().max() > 0
