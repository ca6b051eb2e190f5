"""The int8 search of a CPU: its bounds hold, and every way through it ends with the bits of brute force."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.search import int8_cpu, topk
from nemo_embed_core.mine.search.bounds import Rounding, pair_bound
from nemo_embed_core.mine.search.engine import SearchStats
from nemo_embed_core.mine.search.exclude import Exclude
from nemo_embed_core.mine.search.topk import pick_method, topk_below


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_of_every_kind(hidden_size: int) -> list[torch.Tensor]:
    """One after the other: each block's scale is guessed from the one before."""
    unit = torch.nn.functional.normalize(randn(600, hidden_size))
    one_long, outlier, broken = unit.clone(), unit.clone(), unit.clone()
    one_long[3] *= 1000
    outlier[:, 0] += 30
    broken[5, 0], broken[7] = torch.nan, torch.inf
    row = int8_cpu.Rotation(hidden_size)(torch.eye(hidden_size), 1.0)[
        :1
    ]  # all of its length in one entry, once rotated
    return [
        unit,
        one_long,
        unit,
        row.expand(40, -1) * 5,
        1e-6 * unit,
        outlier,
        0 * unit,
        broken,
        unit,
        1e-35 * unit,
        1e8 * unit,
    ]


@pytest.mark.parametrize("hidden_size", [1, 6, 64, 100])
def test_a_product_is_within_the_bound_of_the_dot_product(hidden_size):
    queries = randn(20, hidden_size, seed=1) * torch.logspace(-3, 3, 20)[:, None]
    quantiser = int8_cpu.Quantiser(queries)
    q = quantiser.queries(queries)
    for x in blocks_of_every_kind(hidden_size):
        block = quantiser.documents(x)
        bound = pair_bound(q, block.bounds(), Rounding("int8", hidden_size)).double()
        codes, scale = q.values.double(), q.scale.double()
        got = (codes @ block.codes_Dn.double()) * scale[:, None] * block.scale
        finite = x.isfinite().all(1)
        want = queries.double() @ x[finite].double().T
        assert bool(((got[:, finite] - want).abs() <= bound[:, None]).all())
        assert bool((block.codes_Dn[:, ~finite] == 0).all())
        largest = float(x[finite].double().norm(dim=1).max())
        assert float(block.norm) >= largest
        if largest > 1e-20 and len(x) == 600 and hidden_size > 1:  # not so wide that it says nothing
            assert float(block.residual) < 0.1 * largest


_spec = importlib.util.spec_from_file_location("mine_reference", Path(__file__).with_name("reference.py"))
assert _spec is not None and _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def brute_force(queries, documents, ceilings, k, exclude=None):
    excluded = None if exclude is None else [exclude.of(i).tolist() for i in range(len(queries))]
    arrays = (queries.numpy(), documents.float().numpy(), ceilings.numpy())
    return tuple(map(torch.from_numpy, reference.brute_force(*arrays, k, excluded)))


def search(queries, documents, ceilings, k, exclude=None, **options):
    stats = SearchStats()
    got = topk_below(queries, documents, ceilings, k, exclude, method="int8", stats=stats, **options)
    want = brute_force(queries, documents, ceilings, k, exclude)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    return stats


@pytest.fixture
def counted(monkeypatch):
    """How often each of these was called."""
    counts = {"seed_floor": 0, "score_all": 0, "keep_best": 0}

    def count(owner, name):
        real = getattr(owner, name)

        def call(*arguments):
            counts[name] += 1
            return real(*arguments)

        monkeypatch.setattr(owner, name, call)

    count(int8_cpu.Tile, "seed_floor")
    count(int8_cpu.Tile, "score_all")
    count(int8_cpu.CandidateBuffer, "keep_best")
    return counts


@pytest.mark.parametrize("order", ["as they come", "worst first", "best first"])
def test_documents_in_any_order(counted, order):
    queries, documents = randn(1, 32) + 0.1 * randn(6, 32, seed=2), randn(4000, 32, seed=1)
    if order != "as they come":
        documents = documents[(queries.mean(0) @ documents.T).argsort(descending=order == "best first")]
    stats = search(queries, documents, torch.full((6,), torch.inf), 5, block_documents=256)
    assert stats.num_certified == 6 and counted["seed_floor"] == 1
    assert (counted["keep_best"] > 0) == (order == "worst first")


def test_ceilings_in_the_bulk_leave_floors_unknown_and_rows_crowded(counted):
    queries, documents = randn(300, 32), randn(1500, 32, seed=1)
    ceilings = torch.linspace(-30, 5, 300)  # from below all documents to above most
    stats = search(queries, documents, ceilings, 5, block_documents=256)
    assert counted["score_all"] > 0 and stats.num_exhaustive == 0
    # A block cannot say what the 300th best is.
    search(queries, documents, ceilings, 300, block_documents=256)


def test_a_block_of_excluded_best_documents_seeds_no_floor_with_them():
    queries, documents = randn(4, 16), randn(500, 16, seed=1)
    best = (queries @ documents.T).topk(100, dim=1).indices.sort(dim=1).values
    search(
        queries,
        documents,
        torch.full((4,), torch.inf),
        7,
        Exclude.from_lists(best.tolist()),
        block_documents=100,
    )


def test_nan_infinity_and_zeros_among_documents_and_queries():
    queries, documents = randn(5, 24), randn(700, 24, seed=1)
    queries[1, 3], queries[2] = torch.nan, 0
    documents[:300:7], documents[5, 1], documents[650] = torch.nan, torch.inf, -torch.inf
    documents[20:40] = 0
    search(queries, documents, torch.tensor([torch.inf, 1, 1, 0.5, -torch.inf]), 6, block_documents=100)


@pytest.mark.parametrize("method", ["fp32", "int8"])
def test_rows_so_short_that_their_squares_are_zero(method):
    queries, documents = randn(5, 24), 1e-22 * randn(400, 24, seed=1)
    got = topk_below(queries, documents, np.full(5, np.inf), 6, method=method, block_documents=100)
    assert torch.equal(got[1], brute_force(queries, documents, torch.full((5,), torch.inf), 6)[1])


def test_half_precision_tensors_and_ids_of_a_shard():
    queries, documents = randn(9, 40), randn(900, 40, seed=1).half()
    want = brute_force(queries, documents, torch.full((9,), torch.inf), 4)
    for stored in (documents, documents.numpy()):
        got = topk_below(
            queries, stored, np.full(9, np.inf), 4, first_id=1000, method="int8", block_documents=128
        )
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1] + 1000)


def test_few_rows_need_the_slower_way_at_a_usual_size():
    """Clustered rows of text-like length: the certificate holds for all of them."""
    centres = randn(60, 256)
    documents = torch.nn.functional.normalize(centres.repeat(100, 1) + randn(6000, 256, seed=1))
    queries = torch.nn.functional.normalize(documents[:200] + 0.05 * randn(200, 256, seed=2))
    assert search(queries, documents, torch.full((200,), torch.inf), 10).num_certified == 200


def test_int8_is_picked_where_it_is_fast_and_queries_are_many(monkeypatch):
    cpu = torch.device("cpu")
    for is_fast, few, many in ((True, "fp32", "int8"), (False, "fp32", "fp32")):
        monkeypatch.setattr(topk, "_int8_is_fast", lambda is_fast=is_fast: is_fast)
        monkeypatch.setattr(topk, "_int8_is_exact", lambda: True)
        assert [pick_method(cpu, n) for n in (1, topk.MANY_QUERIES - 1, topk.MANY_QUERIES)] == [
            few,
            few,
            many,
        ]


def test_auto_says_what_it_took():
    x = torch.nn.functional.normalize(randn(topk.MANY_QUERIES, 32))
    for n, want in ((topk.MANY_QUERIES, pick_method(torch.device("cpu"), topk.MANY_QUERIES)), (8, "fp32")):
        stats = SearchStats()
        topk_below(x[:n], x, torch.full((n,), torch.inf), 3, method="auto", stats=stats)
        assert stats.method == want


def test_a_document_with_infinity_does_not_raise_the_floor():
    generator = torch.Generator().manual_seed(0)
    documents = -torch.rand(200, 16, generator=generator) - 0.1
    documents[7] = torch.inf
    queries = torch.rand(5, 16, generator=generator)
    exact = queries.double() @ documents.double().T
    exact[:, 7] = -torch.inf
    _, ids = topk_below(queries, documents, torch.full((5,), torch.inf), 3, method="int8")
    assert torch.equal(ids, exact.topk(3, dim=1).indices)


@pytest.mark.parametrize("method", ["bf16", "int8"])
def test_rows_whose_squares_underflow_are_bounded(method):
    documents = (randn(1, 64) + 1e-4 * randn(3000, 64, seed=1)) * 1e-24
    queries = randn(20, 64, seed=2)
    _, want = topk_below(queries, documents, torch.full((20,), torch.inf), 6, method="fp32")
    _, ids = topk_below(queries, documents, torch.full((20,), torch.inf), 6, method=method)
    assert torch.equal(ids, want)


def test_a_gemm_that_saturates_is_refused_and_never_picked(monkeypatch):
    x = torch.nn.functional.normalize(randn(topk.MANY_QUERIES, 32))
    ceilings = torch.full((len(x),), torch.inf)
    exact = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b, **out: exact(a, b, **out).clamp_(-(2**20), 2**20))
    topk._int8_is_exact.cache_clear()
    with pytest.raises(UserError, match="ONEDNN_MAX_CPU_ISA"):
        topk_below(x, x, ceilings, 3, method="int8")
    assert pick_method(torch.device("cpu"), len(x)) == "fp32"
    topk._int8_is_exact.cache_clear()
