"""The helper of all multi-process tests: results in order, and no failure or hang passes for a success."""

import time

import pytest
import torch
import torch.distributed as dist
from forked import Server


def _sum(x: torch.Tensor) -> tuple[int, torch.Tensor, int]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x = x * (rank + 1)
    dist.all_reduce(x)
    return rank, x, torch.get_num_threads()


def _fail_on_rank_1() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("the reason, with its traceback")
    dist.barrier()


def _hang() -> None:
    time.sleep(1000)


@pytest.mark.dist
def test_results_come_back_in_rank_order(server: Server) -> None:
    results = server.results(_sum, 2, torch.arange(3.0))
    assert [(rank, threads) for rank, _, threads in results] == [(0, 1), (1, 1)]
    assert all(torch.equal(x, 3 * torch.arange(3.0)) for _, x, _ in results)


@pytest.mark.dist
def test_an_exception_in_one_rank_fails_with_its_traceback(server: Server) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 of 2(?s:.*)in _fail_on_rank_1(?s:.*)the reason"):
        server.results(_fail_on_rank_1, 2)
    assert time.monotonic() - start < 60  # rank 0 stood in the barrier and was not waited for


@pytest.mark.dist
def test_a_hang_is_ended_and_shown(server: Server) -> None:
    with pytest.raises(AssertionError, match=r"rank 0 of 1(?s:.*)Timeout(?s:.*)in _hang"):
        server.results(_hang, 1, limit_s=3)
