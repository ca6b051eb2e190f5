"""A step that was left half-way leaves nothing behind: the same step again has the gradients of a run that
never left it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server
from tiny import MODEL, train_config

# precision, in_batch, reshard_after_forward, dp_replicate; FSDP2 keeps fp32, bf16 and half-reduced gradients
# in different places.
CASES = [
    ("fp32", "none", False, 1),
    ("fp32", "positives", True, 1),
    ("bf16", "none", False, 1),
    ("fp32", "none", True, 2),
]


class Left(Exception):
    pass


def leave_everywhere(folder: str) -> list[tuple[str, str, list[str]]]:
    """(case, place, names of the gradients that differ) for every place where a step may be left."""
    import torch.distributed as dist

    from nemo_embed_core.data.packing import load_batch
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.parallel import fsdp
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.step import forward_backward
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    world_size, results = dist.get_world_size(), []
    for precision, in_batch, reshard, replicate in CASES:
        mesh = build_mesh(torch.device("cpu"), world_size, 1, False, replicate)
        options: dict[str, Any] = {
            "precision": precision,
            "loss": {"in_batch": in_batch},
            "data": {"max_tokens": 200},
        }
        options |= {"global_batch_size": 16, "parallel": {"reshard_after_forward": reshard}}
        config = train_config(Path(folder), **options)
        prepared = Prepared(MODEL, load_tokenizer(config.tokenizer))
        trainer = Trainer(config, mesh, prepared, log=lambda message: None)
        batches, _ = load_batch(
            trainer.store, trainer.sampler, 0, mesh.dp_rank, world_size, config.data, 1, 0
        )
        assert len(batches) >= 3, "the places in between are the point"

        def gradients(
            leave_at: int = -1, t: Any = trainer, b: Any = batches, c: Any = config, m: Any = mesh
        ) -> tuple[list, dict]:
            def before(phase: str, i: int) -> None:
                if len(places) == leave_at:
                    raise Left
                places.append(f"{phase} {i}")

            places: list[str] = []
            t.engine.optimizer.zero_grad(set_to_none=True)
            forward_backward(t.engine.model, b, m, c.loss, t.engine.dtype, before)
            return places, {n: p.grad.full_tensor().clone() for n, p in t.engine.model.named_parameters()}

        places, right = gradients()
        for number, place in enumerate(places):
            with pytest.raises(Left):
                gradients(number)
            fsdp.drop_step(trainer.engine.model)
            _, again = gradients()
            wrong = [name for name, grad in right.items() if not torch.equal(again[name], grad)]
            results.append((f"{precision} {in_batch} {reshard=} {replicate=}", place, wrong))
        trainer.close()
    return results


@pytest.mark.dist
def test_the_next_step_has_the_gradients_of_a_run_that_never_left_one(tmp_path: Path, server: Server) -> None:
    train_config(tmp_path)  # writes the data, before two ranks would
    for results in server.results(leave_everywhere, 2, str(tmp_path)):
        assert len({place.split()[0] for _, place, _ in results}) == 4  # embedding, loss, forward, backward
        for case, place, wrong in results:
            assert not wrong, f"{case}: left before {place}, these gradients differ: {wrong}"
