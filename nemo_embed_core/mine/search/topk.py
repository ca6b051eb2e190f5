"""Exact top-k of documents below each query's own ceiling, in bounded memory.

    scores, ids = topk_below(queries, documents, ceilings, k)

The score of a pair is a function of its two rows alone (kernels/pair_scores.py: fp64, one fixed order of
summation, rounded to fp32), never of the block a GEMM happened to compute it in. So the answer is the same
bits for every block size, order of blocks, number of ranks, device, and for the int8 path. A GEMM only finds
candidates (candidates.py); rows whose answer is not certified are searched again (engine.py).
"""

# Q queries · N documents · D hidden_size · k asked for · C candidates kept (k + slack)

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.errors import UserError
from nemo_embed_core.files.page_cache import available_memory
from nemo_embed_core.mine.search.blocks import fp32_rows, slices
from nemo_embed_core.mine.search.bounds import METHODS, linear
from nemo_embed_core.mine.search.candidates import SLACK_ON_GPU
from nemo_embed_core.mine.search.documents import Documents
from nemo_embed_core.mine.search.engine import Engine, SearchStats
from nemo_embed_core.mine.search.exclude import Exclude
from nemo_embed_core.mine.search.gpu_filter import LIST
from nemo_embed_core.mine.search.stored import StoredRows, beyond_memory
from nemo_embed_core.mine.search.streaming import MAX_ID, best_first

BLOCK_QUERIES = 65536
MANY_QUERIES = 512  # on a CPU; fewer are searched faster in fp32
_DTYPES = ("float16", "bfloat16", "float32")  # others would be rounded by each method in its own way


def topk_below(
    queries: Any,
    documents: Any,
    ceilings: Any,
    k: int,
    exclude: Exclude | None = None,
    *,
    first_id: int = 0,
    method: str = "fp32",
    block_queries: int = 0,
    tile_queries: int = 0,
    block_documents: int = 0,
    device: torch.device | str = "cpu",
    stats: SearchStats | None = None,
) -> tuple[Tensor, Tensor]:
    """s = queries @ documents.T; s[excluded, s >= ceilings[:, None] or not finite] = -inf; s.topk(k).

    queries [Q, D], documents [N, D]: numpy arrays, memory maps, tensors, what has __dlpack__ (CuPy, JAX), or
    anything with .shape, [a:b] and [ids]; float16, bfloat16 or float32, any norm. StoredRows are files that
    need not fit into memory, one pass over them for every block_queries (0: as many as fit, else 65,536);
    memory maps whose files take more than half of what is available are read as such. ceilings [Q]: kept
    scores are strictly below; +inf keeps all. method: how candidates are found, "fp32", "bf16", "int8" or
    "auto" (`pick_method`); never what is found. exclude: ids never returned, per query.  first_id: id of
    documents[0] when they are one rank's shard. Returns scores [Q, k] fp32, best first, ties by lower
    id, and ids [Q, k] int64, on CPU; -inf and -1 where fewer than k qualify. Memory: block_queries x
    (C x 12 bytes + a row) + block_documents rows + tile_queries x block_documents x 9 bytes (0: 1,024 x 2,048
    on a CPU, 4,096 x 32,768 on a GPU), whatever N is; docs/mining.md has int8 and what a GPU adds.
    """
    queries, documents = (
        torch.from_dlpack(x) if not isinstance(x, np.ndarray | Tensor) and hasattr(x, "__dlpack__") else x
        for x in (queries, documents)
    )
    device, num_queries = torch.device(device), len(ceilings)
    _check(queries, documents, num_queries, k, exclude)
    documents = beyond_memory(documents)
    if not block_queries:
        is_stored = isinstance(documents, StoredRows)
        block_queries = queries_at_once(k, documents.shape[1], device) if is_stored else BLOCK_QUERIES
    # On a GPU ids share a 64-bit word with their key, and a rank's own places are int32.
    num_documents = documents.shape[0]
    if device.type == "cuda" and (first_id + num_documents > MAX_ID or num_documents >= 2**31):
        limits = f"a GPU searches ids up to {MAX_ID:,} and fewer than 2^31 of them"
        found = f"{num_documents:,} documents from id {first_id:,} on"
        raise UserError(f"{found}: {limits}; use more ranks, or device=cpu")
    if method == "auto":
        method = pick_method(device, min(num_queries, block_queries))
    if method not in METHODS:
        raise UserError(f"method={method!r} is none of auto, {', '.join(METHODS)}")
    if method == "int8" and device.type == "cpu" and not _int8_is_exact():
        why = "as oneDNN's do when ONEDNN_MAX_CPU_ISA takes VNNI away"
        raise UserError(f"int8 products saturate here, {why}; unset it or choose fp32")
    tile_queries = tile_queries or (4096 if device.type == "cuda" else 1024)
    if not block_documents:
        block_documents = 32768 if device.type == "cuda" else (4096 if method == "int8" else 2048)
    # A name that says which one, to compare and to cache by.
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stats = stats if stats is not None else SearchStats()
    stats.method, stats.num_queries = method, num_queries
    scores = torch.full((num_queries, k), -torch.inf)
    ids = torch.full((num_queries, k), -1, dtype=torch.int64)
    if documents.shape[0] == 0 or num_queries == 0:
        return scores, ids
    engine = Engine(Documents(documents, first_id, block_documents, device), k, method, tile_queries, stats)
    ceilings_Q = _round_up_fp32(ceilings)
    with ieee_fp32_matmul(), torch.inference_mode():
        for rows in slices(num_queries, block_queries):
            excluded = None if exclude is None else exclude.take(np.arange(rows.start, rows.stop)).ascending()
            top = engine.search(fp32_rows(queries, rows, device), ceilings_Q[rows], excluded)
            scores[rows], ids[rows] = top
    return scores, ids


def queries_at_once(k: int, hidden_size: int, device: torch.device, memory: int = 0) -> int:
    """How many queries one pass over documents beyond memory takes: the most in half of `memory` bytes (0:
    what the device has free), since each pass costs all bytes of the corpus."""
    a_query = 16 * k + 5 * hidden_size + 256  # scores, ids and the order of both; fp32 and int8 rows
    if device.type == "cuda":
        kept = k + SLACK_ON_GPU["int8"]
        a_query += 12 * kept + 12 * (LIST + kept) + 2 * hidden_size  # candidates of the first block; lists
        memory = memory or torch.cuda.mem_get_info(device)[0]
    return max(1, (memory or available_memory()) // 2 // a_query)


def _check(queries: Any, documents: Any, num_ceilings: int, k: int, exclude: Exclude | None) -> None:
    num_queries, hidden_size = queries.shape
    if k < 1:
        raise UserError(f"k={k} must be at least 1")
    if documents.shape[1] != hidden_size:
        both = f"queries have {hidden_size} columns and documents {documents.shape[1]}"
        raise UserError(f"{both}: they come from different models")
    if num_ceilings != num_queries:
        raise UserError(f"{num_ceilings} ceilings for {num_queries} queries: give one per query")
    if exclude is not None and len(exclude.indptr) != num_queries + 1:
        found = len(exclude.indptr)
        raise UserError(f"exclude.indptr has {found} entries for {num_queries} queries: give Q + 1")
    for name, rows in (("queries", queries), ("documents", documents)):
        if (dtype := str(getattr(rows, "dtype", "float32")).removeprefix("torch.")) not in _DTYPES:
            raise UserError(f"{name} are {dtype}: convert them to one of {', '.join(_DTYPES)}")


def pick_method(device: torch.device, num_queries: int) -> str:
    """The fastest way to find candidates here: bf16 tensor cores on a GPU; int8 on a CPU that multiplies it
    (VNNI), where so many queries win back that every document is rotated and quantised."""
    if device.type == "cuda":
        return "bf16"
    return "int8" if num_queries >= MANY_QUERIES and _int8_is_exact() and _int8_is_fast() else "fp32"


@functools.cache
def _int8_is_exact() -> bool:
    """Whether this CPU's int8 GEMM keeps the largest sums: without VNNI 16 bits may hold two products."""
    a = torch.full((64, 256), 127, dtype=torch.int8)
    largest = 256 * 127**2
    return all(bool((torch._int_mm(a, sign * a.T) == sign * largest).all()) for sign in (1, -1))


@functools.cache
def _int8_is_fast() -> bool:
    """Whether this CPU's int8 GEMM takes less than half the time of fp32: candidates are scored twice."""
    a, b = torch.ones(512, 512), torch.ones(2048, 512)
    a8, b8 = a.to(torch.int8), b.to(torch.int8)

    def best_of_five(run: Callable[[], Tensor]) -> float:  # one alone may be that of a busy machine
        run()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return min(times)

    return 2 * best_of_five(lambda: torch._int_mm(a8, b8.T)) < best_of_five(lambda: linear(a, b))


def merge_topk(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The top k of the union of (scores [Q, k], ids [Q, k]) of disjoint documents, ties by lower id."""
    return best_first(torch.cat([s for s, _ in parts], 1), torch.cat([i for _, i in parts], 1), k)


def _round_up_fp32(values: Any) -> Tensor:
    """The smallest fp32 not below each value: fp32 s < value exactly when s < round_up(value). Not NaN."""
    exact = np.asarray(values.cpu() if isinstance(values, Tensor) else values, np.float64)
    if np.isnan(exact).any():
        row = int(np.isnan(exact).nonzero()[0][0])
        raise UserError(f"the ceiling of query {row} is NaN: its positive's score is not a number")
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return torch.from_numpy(rounded.astype(np.float32))


@contextlib.contextmanager
def ieee_fp32_matmul() -> Iterator[None]:
    """fp32 GEMMs in fp32: "high" or "medium" precision (TF32, bf16) would break the error bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
