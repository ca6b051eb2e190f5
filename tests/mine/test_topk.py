from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_embed_core.errors import UserError
from nemo_embed_core.mine.search import candidates, engine, gpu_filter
from nemo_embed_core.mine.search.bounds import METHODS, Rounding, pair_bound, split_bound
from nemo_embed_core.mine.search.documents import Documents
from nemo_embed_core.mine.search.engine import SearchStats
from nemo_embed_core.mine.search.exclude import Exclude
from nemo_embed_core.mine.search.streaming import streaming_topk_
from nemo_embed_core.mine.search.topk import merge_topk, topk_below

_spec = importlib.util.spec_from_file_location("mine_reference", Path(__file__).with_name("reference.py"))
assert _spec is not None and _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
brute_force = reference.brute_force


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make_case(kind: str, num_queries: int, num_documents: int, hidden_size: int, seed: int):
    """queries, documents, ceilings: random, and the shapes of data that break searches."""
    rng = np.random.default_rng(seed)
    queries = unit(rng.standard_normal((num_queries, hidden_size)))
    documents = unit(rng.standard_normal((num_documents, hidden_size)))
    if kind == "clustered":
        centres = rng.standard_normal((3, hidden_size))
        documents = unit(centres[rng.integers(0, 3, num_documents)] + 0.01 * documents)
        queries = unit(centres[rng.integers(0, 3, num_queries)] + 0.01 * queries)
    elif kind == "ties":  # a handful of distinct documents, each many times: the k-th is always a tie
        documents = documents[rng.integers(0, min(4, num_documents), num_documents)]
    elif kind == "grid":  # small integers: exact ties between different documents, zeros and negative scores
        queries = rng.integers(-1, 2, (num_queries, hidden_size)).astype(np.float32)
        documents = rng.integers(-1, 2, (num_documents, hidden_size)).astype(np.float32)
    elif kind == "negative":
        documents = unit(-np.abs(documents))
        queries = unit(np.abs(queries))
    elif kind == "broken":  # rows with NaN and infinities, zero rows, one row far longer than the others
        documents[rng.integers(0, num_documents, 2)] = np.nan
        documents[rng.integers(0, num_documents), 0] = np.inf
        documents[rng.integers(0, num_documents), -1] = -np.inf
        documents[rng.integers(0, num_documents)] = 0
        documents[rng.integers(0, num_documents)] *= 1000
        queries[rng.integers(0, num_queries)] = np.nan
    elif kind == "close":  # differences in the last bits of fp32: a GEMM alone gives another order
        documents = (documents[:1] + 1e-7 * rng.standard_normal(documents.shape)).astype(np.float32)
    with np.errstate(all="ignore"):
        positives = np.nan_to_num(
            (queries * documents[rng.integers(0, num_documents, num_queries)]).sum(-1), posinf=1
        )
    threshold = rng.choice([0.5, 0.95, 1.0, 1.05])
    ceilings = np.where(
        rng.random(num_queries) < 0.2, np.inf, positives - (1 - threshold) * np.abs(positives)
    )
    excluded = [
        sorted(set(rng.integers(0, num_documents, rng.integers(0, 4)).tolist())) for _ in range(num_queries)
    ]
    return queries, documents, ceilings, excluded


KINDS = ["random", "clustered", "ties", "grid", "negative", "broken", "close"]


@pytest.mark.parametrize("method", ["bf16", "int8"])
@pytest.mark.parametrize("order", ["as it comes", "ever better"])
@pytest.mark.parametrize("kind", KINDS)
def test_filtered_tiles_are_brute_force(kind, order, method, monkeypatch):
    """The way a GPU takes, here by the references of its kernels: survivors in lists, and rows whose lists
    overflow."""
    monkeypatch.setattr(engine, "FILTERING", {"cpu"})
    monkeypatch.setattr(gpu_filter, "RESCORED_FROM", 64)
    monkeypatch.setattr(gpu_filter, "LIST", 0 if order == "ever better" else 1024)
    monkeypatch.setattr(candidates, "SLACK", {"fp32": 2, "bf16": 4, "int8": 8})
    unfiltered = []

    class Counted(candidates.Candidates):
        def search(self):
            unfiltered.append(self.method)
            return super().search()

    monkeypatch.setattr(engine, "Candidates", Counted)
    for seed in range(3):
        queries, documents, ceilings, excluded = make_case(kind, 9, 333, 48, seed)
        if order == "ever better" and kind != "broken":
            documents = documents[np.argsort(documents @ queries[0], kind="stable")]
        want_scores, want_ids = brute_force(queries, documents, ceilings, 5, excluded)
        scores, ids = topk_below(
            queries, torch.from_numpy(documents), ceilings, 5, Exclude.from_lists(excluded), method=method,
            block_documents=40,
        )  # fmt: skip
        assert np.array_equal(ids.numpy(), want_ids)
        assert np.array_equal(scores.numpy(), want_scores)
    if order == "ever better" and kind == "random":
        assert method in unfiltered, "no list overflowed: the test shows nothing"


@pytest.mark.parametrize("method", ["fp32", "bf16", "int8"])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    num_queries=st.integers(1, 9),
    num_documents=st.sampled_from([1, 3, 17, 64, 333]),
    hidden_size=st.sampled_from([1, 6, 16, 33]),
    k=st.sampled_from([1, 4, 40]),
    blocks=st.sampled_from([(65536, 256, 8192), (3, 2, 7), (4, 4, 100), (1, 1, 64)]),
    seed=st.integers(0, 10**6),
)
def test_topk_is_brute_force(method, kind, num_queries, num_documents, hidden_size, k, blocks, seed):
    queries, documents, ceilings, excluded = make_case(kind, num_queries, num_documents, hidden_size, seed)
    want_scores, want_ids = brute_force(queries, documents, ceilings, k, excluded)
    scores, ids = topk_below(
        queries, documents, ceilings, k, Exclude.from_lists(excluded), method=method,
        block_queries=blocks[0], tile_queries=blocks[1], block_documents=blocks[2],
    )  # fmt: skip
    np.testing.assert_array_equal(ids.numpy(), want_ids)
    np.testing.assert_array_equal(scores.numpy(), want_scores)


@pytest.mark.parametrize("method", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_larger_case_with_few_places_goes_through_every_path(method, kind):
    queries, documents, ceilings, excluded = make_case(kind, 40, 3000, 64, 7)
    want_scores, want_ids = brute_force(queries, documents, ceilings, 10, excluded)
    stats = SearchStats()
    scores, ids = topk_below(
        queries,
        documents,
        ceilings,
        10,
        Exclude.from_lists(excluded),
        method=method,
        block_documents=512,
        stats=stats,
    )
    np.testing.assert_array_equal(ids.numpy(), want_ids)
    np.testing.assert_array_equal(scores.numpy(), want_scores)
    if kind in ("random", "negative") and method == "fp32":
        assert stats.num_certified == 40, stats
    if kind == "ties":  # 750 equal documents and 42 places: no certificate may be given
        assert stats.num_exhaustive > 0, stats


@pytest.mark.parametrize("method", ["fp32", "bf16", "int8"])
def test_answer_is_the_same_bits_for_every_blocking_and_sharding(method):
    queries, documents, ceilings, excluded = make_case("close", 13, 500, 48, 3)
    exclude = Exclude.from_lists(excluded)
    want = topk_below(queries, documents, ceilings, 8, exclude)
    for blocks in [(13, 13, 500), (10, 3, 77), (5, 1, 61), (7, 7, 499)]:
        got = topk_below(
            queries, documents, ceilings, 8, exclude, method=method,
            block_queries=blocks[0], tile_queries=blocks[1], block_documents=blocks[2],
        )  # fmt: skip
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), blocks
    for cuts in [(0, 500), (0, 250, 500), (0, 1, 333, 500)]:
        parts = [
            topk_below(queries, documents[a:b], ceilings, 8, exclude, first_id=a, method=method)
            for a, b in itertools.pairwise(cuts)
        ]
        for order in (parts, parts[::-1]):
            got = merge_topk(order, 8)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), cuts


def test_a_lower_bound_counts_only_what_is_surely_below_the_ceiling():
    """keys are above their scores by at most twice the width: of [1.0, 0.875, 0.75] below 0.9375 two score at
    least 0.625."""
    keys, width = torch.tensor([[1.0, 0.875, 0.75, 0.5]]).expand(2, 4), torch.tensor([0.0625, 0.125])
    ceilings = torch.tensor([0.9375, torch.inf])
    assert candidates.kth_lower_bound(keys, width, ceilings, 2).tolist() == [0.625, 0.625]
    assert candidates.kth_lower_bound(keys, width, ceilings, 4).tolist() == [-torch.inf, 0.25]


def test_nothing_at_or_above_the_ceiling_even_by_one_bit():
    documents = np.ones((5, 1), np.float32)
    documents[3] = np.nextafter(np.float32(1), np.float32(0))
    one = np.float32(1)
    cases = {
        1.0: [3],
        float(documents[3, 0]): [],
        np.inf: [0, 1, 2, 4, 3],
        1.0 + 1e-12: [0, 1, 2, 4, 3],
        -np.inf: [],
    }
    for ceiling, want in cases.items():
        _, ids = topk_below(one.reshape(1, 1), documents, [ceiling], 5)
        assert ids[0].tolist() == want + [-1] * (5 - len(want)), ceiling


@pytest.mark.parametrize("hidden_size", [48, 256])
def test_split_bound_holds_for_every_pair_and_is_within_that_of_the_worst(hidden_size):
    generator = torch.Generator().manual_seed(1)
    queries, documents = (torch.randn(n, hidden_size, generator=generator) for n in (50, 400))
    documents[::3, 5] *= 9  # rows of other lengths and residuals
    encode, rounding = METHODS["int8"](hidden_size, torch.device("cpu")), Rounding("int8", hidden_size)
    q, d = encode(queries), encode(documents)
    fixed, slope = split_bound(q, d, rounding)
    bound, worst = fixed[:, None] + slope[:, None] * d.residual, pair_bound(q, d, rounding)
    seen = (q.values.double() * q.scale.double()[:, None]) @ (d.values.double() * d.scale.double()[:, None]).T
    assert ((seen - queries.double() @ documents.double().T).abs() <= bound).all()
    assert torch.allclose(bound.amax(1), worst, rtol=1e-5) and (bound.mean(1) < 0.9 * worst).all()


def test_excluded_documents_do_not_take_places():
    documents = np.linspace(1, 0.5, 200, dtype=np.float32)[:, None]
    queries = np.ones((2, 1), np.float32)
    exclude = Exclude.from_lists([list(range(150)), []])
    _, ids = topk_below(queries, documents, [np.inf, np.inf], 2, exclude, block_documents=16)
    assert ids.tolist() == [[150, 151], [0, 1]]


def test_excluded_documents_do_not_hide_a_mass_of_ties_below_them():
    documents = np.full((900, 1), 0.5, np.float32)
    documents[100:150] = 0.9
    stats, exclude = SearchStats(), Exclude.from_lists([list(range(149, 99, -1))])
    _, ids = topk_below(
        np.ones((1, 1), np.float32), documents, [np.inf], 4, exclude, block_documents=300, stats=stats
    )
    assert stats.num_exhaustive == 1 and ids.tolist() == [[0, 1, 2, 3]]


def test_a_late_tile_with_nan_beside_a_key_that_enters():
    """Maxima of groups of keys are compared first, columns a tile's width / 32 apart; that of a group with
    NaN is NaN."""
    width = 32 * 128
    tile = torch.full((2, width), 0.1)
    tile[0, 5], tile[0, 5 + 128], tile[0, 5 + 256] = torch.nan, 0.9, torch.nan
    tile[1, 64], tile[1, 65] = 0.7, 0.95
    keys, ids = torch.tensor([[0.8, 0.5], [0.8, 0.5]]), torch.tensor([[9000, 9001], [9000, 9001]])
    streaming_topk_(
        tile, torch.tensor([torch.inf, 0.95]), keys, ids, 200, torch.tensor([0, 0, 1]), torch.tensor([264])
    )
    assert ids.tolist() == [[333, 9000], [9000, 9001]]  # of row 1 one key is excluded and one at its ceiling


def test_scoring_every_candidate_and_scoring_the_possible_ones_agree():
    """What a GPU does with its candidates and what a CPU does; from one array and from blocks of a memory
    map."""
    queries, documents, ceilings, _ = make_case("close", 20, 400, 48, 11)
    state_ids = torch.randint(-1, 400, (20, 60), generator=torch.Generator().manual_seed(0)) + 1000
    state_ids[state_ids == 999] = -1
    state_ids[:, -5:] = -1
    q, d, limits = (torch.from_numpy(np.asarray(x, np.float32)) for x in (queries, documents, ceilings))
    keys = torch.where(state_ids < 0, -torch.inf, (q @ d.T + 1e-3).gather(1, (state_ids - 1000).clamp(min=0)))
    cpu = torch.device("cpu")
    every = Documents(d, 1000, 64, cpu).scores(q, state_ids)
    assert torch.equal(every.isnan(), state_ids < 0)
    stored = Documents(documents, 1000, 64, cpu)
    assert torch.equal(stored.scores(q, state_ids).nan_to_num(7), every.nan_to_num(7))
    for rescore in (False, True):
        error = torch.full((20,), 1e-3)
        possible = candidates.possible_scores(stored, 8, q, error, limits, keys, state_ids, rescore)
        scored = possible.isfinite()
        assert scored.any(1).all() and torch.equal(possible[scored], every[scored])


def test_low_precision_matmul_setting_of_the_process_does_not_change_the_answer():
    queries, documents, ceilings, _ = make_case("close", 5, 300, 32, 1)
    want = topk_below(queries, documents, ceilings, 5)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = topk_below(queries, documents, ceilings, 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got[1], want[1])


def test_tensors_half_precision_and_memory_maps_are_searched_as_stored(tmp_path):
    queries, documents, ceilings, _ = make_case("random", 4, 120, 16, 5)
    half = documents.astype(np.float16)
    np.save(tmp_path / "documents.npy", half)
    want = brute_force(queries, half.astype(np.float32), ceilings, 6)
    mapped = np.load(tmp_path / "documents.npy", mmap_mode="r", allow_pickle=False)

    class Foreign:  # as CuPy's arrays: nothing but the protocol
        def __init__(self, tensor):
            self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__

    for stored in (half, mapped, torch.from_numpy(half), Foreign(torch.from_numpy(half))):
        scores, ids = topk_below(
            torch.from_numpy(queries), stored, torch.from_numpy(ceilings), 6, block_documents=50
        )
        np.testing.assert_array_equal(ids.numpy(), want[1])
        np.testing.assert_array_equal(scores.numpy(), want[0])


def test_wrong_shapes_are_refused_with_both_numbers():
    q, d = np.ones((2, 4), np.float32), np.ones((3, 5), np.float32)
    for arguments, words in [
        ((q, d, [1, 1], 3), ("4 columns", "5")),
        ((q, d[:, :4], [1], 3), ("1 ceilings", "2 queries")),
        ((q, d[:, :4], [1, 1], 0), ("k=0",)),
        ((q, d[:, :4], [1, np.nan], 1), ("query 1", "NaN")),
        ((q * 1e20, d[:, :4] * 1e20, [1, 1], 1), ("overflow", "normalise")),
        ((q.astype(np.float64), d[:, :4], [1, 1], 1), ("queries are float64", "convert", "float32")),
        ((q, torch.ones(3, 4, dtype=torch.int8), [1, 1], 1), ("documents are int8", "convert", "float32")),
    ]:
        with pytest.raises(UserError) as error:
            topk_below(*arguments)
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("first_id", "num_documents"), [(2**32 - 2, 3), (0, 2**31)])
def test_more_documents_than_a_gpu_can_number_are_refused(first_id, num_documents):
    """Before the device is touched, so here too."""
    documents = torch.zeros(1, 4, dtype=torch.float16).expand(num_documents, 4)
    with pytest.raises(UserError, match="use more ranks"):
        topk_below(np.ones((1, 4), np.float32), documents, [np.inf], 1, first_id=first_id, device="cuda")
