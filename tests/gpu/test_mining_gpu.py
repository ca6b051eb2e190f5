"""Mining on a device gives the bits of a CPU: the search by every method, and the CUDA top-k alone."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_embed_core.mine.search.blocks import resident
from nemo_embed_core.mine.search.exclude import Exclude
from nemo_embed_core.mine.search.streaming import merge_lists_, streaming_topk_
from nemo_embed_core.mine.search.topk import topk_below

pytestmark = pytest.mark.gpu

spec = importlib.util.spec_from_file_location("mine_csrc", Path(__file__).parents[1] / "mine/test_csrc.py")
csrc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(csrc)


@pytest.mark.parametrize("method", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", ["random", "ties", "broken", "close"])
def test_search_of_memory_maps_and_of_device_memory(method, kind, tmp_path):
    rng = np.random.default_rng(9)
    documents = rng.standard_normal((5000, 256))
    if kind == "ties":
        documents = documents[rng.integers(0, 4, 5000)]
    elif kind == "close":  # a GEMM alone gives another order
        documents = documents[:1] + 0.002 * documents
    documents = (documents / np.linalg.norm(documents, axis=1, keepdims=True)).astype(np.float16)
    if kind == "broken":
        documents[7], documents[9, 3] = np.nan, np.inf
    queries = (documents[rng.integers(0, 5000, 70)] + 0.02 * rng.standard_normal((70, 256))).astype(
        np.float32
    )
    queries[~np.isfinite(queries)] = 0
    ceilings = np.where(rng.random(70) < 0.5, np.inf, 0.9)
    exclude = Exclude.from_lists([sorted(rng.integers(0, 5000, 3).tolist()) for _ in range(70)])
    np.save(tmp_path / "documents.npy", documents)
    mapped = np.load(tmp_path / "documents.npy", mmap_mode="r", allow_pickle=False)
    want = topk_below(queries, documents, ceilings, 20, exclude)
    held = resident(mapped, "cuda")
    assert held.is_cuda and resident(mapped, "cuda", share=0.0) is mapped
    for stored in (mapped, held):
        got = topk_below(
            queries,
            stored,
            ceilings,
            20,
            exclude,
            method=method,
            device="cuda",
            tile_queries=64,
            block_documents=1024,
        )
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("kept", [1, 72, 1024, 2000])
def test_cuda_topk_is_the_cpu_op(dtype, kept):
    rng = np.random.default_rng(kept)
    for kind in ("random", "ties", "rising", "broken"):
        scores = csrc.make_tile(rng, kind, 33, 20011, dtype)
        ceilings = torch.from_numpy(rng.choice([np.inf, 0.5], 33).astype(np.float32))
        results = []
        for device in ("cpu", "cuda"):
            keys = torch.full((33, kept), -torch.inf, device=device)
            ids = torch.full((33, kept), -1, dtype=torch.int64, device=device)
            for first in (10000, 0):
                tile = scores[:, first : first + 10000].to(device)
                streaming_topk_(tile, ceilings.to(device), keys, ids, first)
            results.append((keys.cpu(), ids.cpu()))
        assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][0], results[1][0]), kind


@pytest.mark.parametrize(
    ("kept", "length"), [(1, 40), (72, 256), (136, 1024), (1024, 1024), (1024, 5000), (2000, 700)]
)
@pytest.mark.parametrize("kind", ["random", "ties", "rising", "broken"])
def test_cuda_merge_is_the_cpu_op(kind, kept, length):
    *lists, first_id, indptr, excluded = csrc.make_lists(np.random.default_rng(kept), kind, 333, length, kept)
    for exclusions in ((indptr, excluded), (None, None)):
        results = []
        for device in ("cpu", "cuda"):
            arguments = [x.to(device, copy=True) for x in lists]
            merge_lists_(*arguments, first_id, *(None if x is None else x.to(device) for x in exclusions))
            results.append([x.cpu() for x in arguments[3:]])
        assert csrc.same_bits(*results)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("M", "D"), [(1, 1), (1000, 100), (5000, 4096), (1000, 5000), (40, 16384)])
def test_pair_scores_are_those_of_the_reference(M, D, dtype):
    checks_spec = importlib.util.spec_from_file_location(
        "kernel_checks", Path(__file__).parents[1] / "kernels/checks.py"
    )
    checks = importlib.util.module_from_spec(checks_spec)
    checks_spec.loader.exec_module(checks)
    for q_dtype in ("fp32", dtype):
        checks.run("pair_scores", {"M": M, "D": D, "dtype": dtype, "q_dtype": q_dtype, "device": "cuda"})
