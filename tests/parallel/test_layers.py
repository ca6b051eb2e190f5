"""Each sharded layer against its plain nn twin: output, dX and dW; and the collectives' conjugate pairs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import Server

from nemo_embed_core.parallel.collectives import (
    copy_to_tp,
    gather_tokens,
    reduce_from_tp,
    reduce_scatter_tokens,
)
from nemo_embed_core.parallel.layers import (
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from nemo_embed_core.parallel.mesh import build_mesh

T, D, E, V = 12, 8, 16, 20


def _inputs() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "x": randn(T, D), "wide": randn(T, E), "w_column": randn(E, D), "w_row": randn(D, E),
        "table": randn(V, D), "norm": randn(D), "dy_column": randn(T, E), "dy_row": randn(T, D),
        "ids": torch.arange(T) * 7 % V,
    }  # fmt: skip


def check_layers() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_default_dtype(torch.float64)
    i = _inputs()
    for sequence_parallel in (False, True):
        tp = build_mesh(torch.device("cpu"), 1, world_size, sequence_parallel).tp

        def tokens(x: torch.Tensor, split: bool = sequence_parallel) -> torch.Tensor:
            return x.chunk(world_size)[rank] if split else x

        def run(layer: Any, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
            with torch.no_grad():
                layer.weight._local_tensor.copy_(weight)
            leaf = x.clone().requires_grad_(x.is_floating_point())
            y = layer(leaf)
            y = y[0] if isinstance(y, tuple) else y
            y.backward(dy)
            return [y.detach(), leaf.grad, layer.weight.grad._local_tensor]

        def same(got: list, want: list) -> None:
            for a, b in zip(got, want, strict=True):
                assert (a is None and b is None) or (a - b).abs().max() < 1e-12

        rows = [E // world_size * rank, E // world_size * (rank + 1)]
        # Column: x replicated or token-sharded, y feature-sharded.
        x, w = i["x"].clone().requires_grad_(), i["w_column"].clone().requires_grad_()
        y = F.linear(x, w)
        y.backward(i["dy_column"])
        got = run(
            ColumnParallelLinear(D, E, tp), w[slice(*rows)], tokens(i["x"]), i["dy_column"][:, slice(*rows)]
        )
        same(got, [y[:, slice(*rows)], tokens(x.grad), w.grad[slice(*rows)]])
        # Row: x feature-sharded, y summed and replicated or token-sharded.
        x, w = i["wide"].clone().requires_grad_(), i["w_row"].clone().requires_grad_()
        y = F.linear(x, w)
        y.backward(i["dy_row"])
        got = run(
            RowParallelLinear(E, D, tp), w[:, slice(*rows)], i["wide"][:, slice(*rows)], tokens(i["dy_row"])
        )
        same(got, [tokens(y), x.grad[:, slice(*rows)], w.grad[:, slice(*rows)]])
        # Vocabulary.
        table = i["table"].clone().requires_grad_()
        y = F.embedding(i["ids"], table)
        y.backward(i["dy_row"])
        part = slice(V // world_size * rank, V // world_size * (rank + 1))
        got = run(VocabParallelEmbedding(V, D, tp), table[part], i["ids"], tokens(i["dy_row"]))
        same(got, [tokens(y), None, table.grad[part]])
        # Norm: the weight's gradient covers this rank's tokens; the sum over ranks is the whole.
        x, w = i["x"].clone().requires_grad_(), i["norm"].clone().requires_grad_()
        y = F.rms_norm(x, (D,), w, 1e-5)
        y.backward(i["dy_row"])
        got = run(RMSNorm(D, 1e-5, tp), w, tokens(i["x"]), tokens(i["dy_row"]))
        if sequence_parallel:
            dist.all_reduce(got[2])
        same(got, [tokens(y), tokens(x.grad), w.grad])

    group = dist.group.WORLD
    mine = i["x"].chunk(world_size)[rank]
    # <collective(x), dy> == <x, backward(dy)> summed over ranks: the definition of a conjugate pair.
    for name, forward, x, dy, sharded in (
        ("gather", gather_tokens, mine, i["dy_row"] * (rank + 1), True),
        ("scatter", reduce_scatter_tokens, i["x"] * (rank + 1), mine * 2, True),
        ("copy", copy_to_tp, i["x"], i["dy_row"] * (rank + 1), False),
        ("reduce", reduce_from_tp, i["x"] * (rank + 1), i["dy_row"], False),
    ):
        leaf = x.clone().requires_grad_()
        y = forward(leaf, group)
        y.backward(dy)
        sides = torch.stack([(y.detach() * dy).sum(), (leaf.detach() * leaf.grad).sum()])
        dist.all_reduce(sides)
        if not sharded:  # a replicated side is counted on one rank only
            sides[0 if name == "reduce" else 1] /= world_size
        assert abs(sides[0] - sides[1]) < 1e-9, f"{name}: {sides.tolist()}"


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_layers_equal_their_plain_twins(world_size: int, server: Server) -> None:
    server.results(check_layers, world_size)
