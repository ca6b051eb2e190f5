"""precision=fp8 in training: tensor-parallel ranks multiply what one process would multiply, and weights are
quantised once a step, from those of the step. A step beside the truth: test_bf16.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server
from tiny import MODEL, train_config

from nemo_embed_core.data.tokenizer import load_tokenizer

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
T, D, E = 22, 32, 64  # T: no multiple of 16


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values in fp64 that x has in fp8."""
    factor = torch.finfo(dtype).max / x.abs().max().float()
    return (x.float() * factor).to(dtype).double() / factor.double()


def exact_linear(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y, dx and dw of whole matrices, in fp64 of fp8 values."""
    x8, w8, dy8 = rounded(x, E4M3), rounded(w, E4M3), rounded(dy, E5M2)
    return [x8 @ w8.T, dy8 @ w8, dy8.T @ x8]


def layers_of_two_ranks() -> list[tuple[str, float]]:
    """(what, error relative to the norm) of this rank's parts."""
    import torch.distributed as dist

    from nemo_embed_core.parallel.layers import ColumnParallelLinear, RowParallelLinear, run_in_fp8
    from nemo_embed_core.parallel.mesh import build_mesh

    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    torch.manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        """Its largest value is on rank 1, whichever way it is cut."""
        x = torch.randn(rows, columns)
        x[rows // 2 :] *= 3
        x[:, columns // 2 :] *= 5
        return x.bfloat16()

    def half(x: torch.Tensor, dim: int | None) -> torch.Tensor:
        return x if dim is None else x.chunk(2, dim)[rank]

    for sp in (False, True):
        tp = build_mesh(torch.device("cpu"), 1, 2, sp).tp
        tokens = 0 if sp else None
        # kind, K, O, how x, w, dy, y, dx and dw are cut
        for kind, K, out, *cuts in (
            (ColumnParallelLinear, D, E, tokens, 0, 1, 1, tokens, 0),
            (RowParallelLinear, E, D, 1, 1, tokens, tokens, 1, 1),
        ):
            x, w, dy = random(T, K), random(out, K), random(T, out)
            layer = kind(K, out, tp)
            run_in_fp8(layer)
            of_x, of_w, of_dy, *of_results = cuts
            layer.weight = torch.nn.Parameter(half(w, of_w).contiguous())
            leaf = half(x, of_x).clone().requires_grad_()
            y = layer(leaf)
            y.backward(half(dy, of_dy))
            got = [y.detach(), leaf.grad, layer.weight.grad]
            for what, mine, want, cut in zip(
                ("y", "dx", "dw"), got, exact_linear(x, w, dy), of_results, strict=True
            ):
                assert mine.dtype == torch.bfloat16
                part = half(want, cut)
                error = ((mine.double() - part).norm() / part.norm()).item()
                found.append((f"{kind.__name__} {sp=} {what}", error))
            leaf = half(x, of_x).clone()
            if rank == 1 and (of_x is not None or not sp):
                leaf[0, 0] = float("nan")
            if of_x is not None:
                assert layer(leaf).isnan().all(), "the other rank's NaN"
    return found


@pytest.mark.dist
def test_layers_of_two_ranks_multiply_what_one_would(server: Server) -> None:
    """Roundings to bf16 are 1e-3 to 2e-3 of the norm; values of another scale would be off by 2e-2."""
    for of_rank in server.results(layers_of_two_ranks, 2):
        assert len(of_rank) == 12
        for what, error in of_rank:
            assert error < 4e-3, f"{what}: {error:.1e}"


def steps_and_counts(folder: str) -> dict[bool, tuple]:
    """reshard_after_forward -> losses of three steps, quantised weights and micro-batches of each, weights at
    the end."""
    import torch.distributed as dist

    from nemo_embed_core.data.packing import load_batch
    from nemo_embed_core.parallel import fp8
    from nemo_embed_core.parallel.grad_norm import local_tensor
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.engine import Engine
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    quantize, count = fp8.quantize, 0

    def counted(x: torch.Tensor, *args: Any, rows: bool = True, columns: bool = False) -> Any:
        nonlocal count
        count += rows and columns and args[-1] == E4M3
        return quantize(x, *args, rows=rows, columns=columns)

    fp8.quantize, results = counted, {}
    for reshard in (False, True):
        config = train_config(
            Path(folder), precision="fp8", loss={"in_batch": "positives"}, data={"max_tokens": 120},
            optim={"lr": 1e-3}, parallel={"reshard_after_forward": reshard}, output_dir=f"{folder}/{reshard}",
        )  # fmt: skip
        mesh = build_mesh(torch.device("cpu"), 1, 1, False)
        prepared = Prepared(MODEL, load_tokenizer(config.tokenizer))
        trainer = Trainer(config, mesh, prepared, lambda message: None)
        losses, counts = [], []
        for step in range(3):
            batches, _ = load_batch(trainer.store, trainer.sampler, step, 0, 1, config.data, 1, config.seed)
            count = 0
            losses.append(trainer.engine.forward_backward(batches)[0])
            counts.append((count, len(batches)))
            trainer.engine.clip()
            trainer.engine.update(1e-3)
        # Another engine, which has quantised nothing before, of the weights that there are now.
        fresh, trained = Engine(config, MODEL, mesh), trainer.engine
        for mine, other in zip(fresh.model.parameters(), trained.model.parameters(), strict=True):
            local_tensor(mine.detach()).copy_(local_tensor(other.detach()))
        for engine in (fresh, trained):
            engine.forward_backward(batches)
        for mine, other in zip(fresh.model.parameters(), trained.model.parameters(), strict=True):
            assert torch.equal(local_tensor(mine.grad), local_tensor(other.grad)), (
                "weights of an earlier step"
            )
        kept = [layer.fp8.made for layer in trainer.engine.model.modules() if hasattr(layer, "fp8")]
        assert len(kept) == 8 and kept == [None] * 8, "weights outlive the step"
        weights = [p.detach().full_tensor() for p in trainer.engine.model.parameters()]
        results[reshard] = torch.cat(losses), counts, weights
    return results


@pytest.mark.dist
def test_weights_are_quantised_once_a_step_and_are_those_of_the_step(server: Server, tmp_path: Path) -> None:
    train_config(tmp_path)
    (results,) = server.results(steps_and_counts, 1, str(tmp_path))
    (losses, counts, weights), (other_losses, other_counts, other_weights) = results[False], results[True]
    matrices = 4 * MODEL.num_hidden_layers
    for (count, n), (other, m) in zip(counts, other_counts, strict=True):
        assert n == m > 1
        assert count == matrices, f"{count} of {matrices} weights"
        # Where nothing whole outlives a block: in each of 2 n - 1 forwards and n backwards.
        assert other == matrices * (3 * n - 1)
    assert torch.equal(losses, other_losses)
    assert all(map(torch.equal, weights, other_weights))
