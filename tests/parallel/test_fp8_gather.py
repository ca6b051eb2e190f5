"""precision=fp8 over dp_shard ranks: weights are gathered in e4m3, and whatever a run computes has the bits
of one that gathers them in bf16 and quantises them whole."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from forked import Server
from tiny import MODEL, train_config

from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.tokenizer import load_tokenizer

# reshard_after_forward, activation_checkpointing, master_weights, reduce_dtype, in_batch
MODES = [
    (False, "none", "fp32", "fp32", "positives"), (True, "full", "split", "fp32", "none"),
    (False, "selective", "split", "bf16", "none"), (True, "none", "fp32", "bf16", "positives"),
]  # fmt: skip

# (tp_size, sequence_parallel, dp_size, dp_replicate), in these modes
LAYOUTS = {
    2: [((1, False, 2, 1), MODES[:2])],
    3: [((1, False, 3, 1), MODES)],  # shards of 22, 22 and 20 of 64 rows
    4: [((2, True, 2, 1), MODES[:2]), ((2, False, 2, 1), MODES[2:3]), ((1, False, 4, 2), MODES[1:4:2])],
}


def compared(folder: str, layouts: list) -> list[str]:
    """What is not the same, on this rank."""
    import torch.distributed as dist

    from nemo_embed_core.checkpoint.weights import RandomReader, fill
    from nemo_embed_core.data.packing import load_batch
    from nemo_embed_core.data.sampler import Sampler
    from nemo_embed_core.model.spec import parameter_shapes
    from nemo_embed_core.parallel.grad_norm import local_tensor
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.parallel.wire import Counted
    from nemo_embed_core.train import engine as engine_module
    from nemo_embed_core.train.step import embed

    dist.init_process_group("gloo")

    def run(config: Any, mesh: Any, steps: list) -> dict[str, torch.Tensor]:
        engine = engine_module.Engine(config, MODEL, mesh)
        place = (mesh.tp.rank, mesh.tp.size), (mesh.shard_rank, mesh.shard_size)
        fill(engine.model, RandomReader(MODEL, 0), MODEL, *place)
        found: dict[str, torch.Tensor] = {}
        matrices = [p for p in engine.model.model.layers.parameters() if p.ndim > 1]

        def encode(name: str) -> None:
            with torch.no_grad(), engine.encoding():
                found[name] = embed(engine.model, steps[0][0])
                whole = {p.dtype for p in engine.model.model.layers.parameters() if p.ndim > 1}
                found[f"{name}: in one byte"] = torch.tensor(whole == {torch.float8_e4m3fn})

        for i, batches in enumerate(steps):
            with Counted(mesh) as counted:
                losses_B, stats = engine.forward_backward(batches)
            gathered = counted.traffic["dp_shard", "all_gather"].bytes
            found[f"{i}: gathered"] = torch.tensor(gathered)
            norm = engine.clip()
            found |= {f"losses {i}": losses_B, f"stats {i}": stats, f"norm {i}": norm}
            named = list(engine.model.named_parameters())
            found |= {f"gradient {i} of {name}": local_tensor(p.grad).clone() for name, p in named}
            engine.update(3e-2)  # the largest values are others in the next step
            found |= {f"weight {i} of {name}": local_tensor(p.detach()).clone() for name, p in named}
            encode(f"rows {i}")
        if mesh.shard_rank == mesh.shard_size - 1 and mesh.tp.rank == mesh.tp.size - 1:  # in each copy
            local_tensor(matrices[-1].detach())[0, 0] = float("nan")
        encode("rows of a NaN on one rank")
        return found

    wrong = []
    for (tp, sp, dp, replicate), modes in layouts:
        mesh, shards = build_mesh(torch.device("cpu"), dp, tp, sp, replicate), dp // replicate
        for reshard, recompute, masters, reduce_dtype, in_batch in modes:
            config = train_config(
                Path(folder), precision="fp8", activation_checkpointing=recompute, global_batch_size=4 * dp,
                parallel={"tp_size": tp, "sequence_parallel": sp, "dp_replicate": replicate,
                          "reshard_after_forward": reshard, "reduce_dtype": reduce_dtype},
                loss={"in_batch": in_batch}, data={"max_tokens": 130}, optim={"master_weights": masters},
            )  # fmt: skip
            store = open_store(config.data, load_tokenizer(config.tokenizer), log=lambda message: None)
            sampler = Sampler(torch.arange(61).numpy(), config.global_batch_size, 0)
            steps = [load_batch(store, sampler, i, mesh.dp_rank, dp, config.data, tp, 0)[0] for i in range(2)]
            assert all(len(batches) > 1 for batches in steps)
            got = run(config, mesh, steps)
            # Of a rank's matrices in the blocks, padded to equal shards.
            shapes = [s for s in map(tuple, parameter_shapes(MODEL).values()) if len(s) > 1 and s[0] != 512]
            one_byte = sum(-(-rows // shards) * shards * columns for rows, columns in shapes) // tp
            with mock.patch.object(engine_module, "gather_in_fp8", lambda model, group: None):
                want = run(config, mesh, steps)
            case = f"{tp=} {sp=} {dp=} {replicate=} {reshard=} {masters} {reduce_dtype} {in_batch}"
            for name, value in want.items():
                if name.endswith("gathered"):
                    n = len(steps[int(name[0])])
                    gathers = (3 * n - 1 if in_batch == "positives" else 2 * n) if reshard else 1
                    assert value - got.pop(name) == gathers * one_byte, case
                elif name.endswith("in one byte"):
                    assert got.pop(name) == (not reshard) and not value, case
                elif name.endswith("NaN on one rank"):
                    assert got.pop(name).isnan().all() and value.isnan().all(), case
                elif not torch.equal(got.pop(name), value) or not value.isfinite().all():
                    wrong.append(f"{case}: {name}")
            assert not got
    return wrong


@pytest.mark.dist
@pytest.mark.parametrize(
    "world_size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_weights_gathered_in_fp8_give_the_bits_of_those_gathered_in_bf16(
    world_size: int, server: Server, tmp_path: Path
) -> None:
    """Two steps in several micro-batches, encoding after each, and a weight that is NaN."""
    config = train_config(tmp_path)
    open_store(config.data, load_tokenizer(config.tokenizer), log=lambda message: None)
    for wrong in server.results(compared, world_size, str(tmp_path), LAYOUTS[world_size]):
        assert not wrong, "\n".join(wrong)
