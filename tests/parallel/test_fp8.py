"""fp8 products of tensor-parallel ranks: what is multiplied is what one process would multiply."""

import pytest
import torch
from forked import Server

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
