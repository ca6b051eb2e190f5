"""csrc without a GPU: compiled for sm_90a where nvcc is found; run on the host, thread by thread, in shuffled
orders."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_embed_core.mine.search.streaming import CSRC, MAX_KEPT, STEP, THREADS, merge_lists_, streaming_topk_

HERE = Path(__file__).parent
NVCC = shutil.which("nvcc") or next((p for p in ["/usr/local/cuda/bin/nvcc"] if Path(p).exists()), None)
GXX = shutil.which("g++")
# Undefined behaviour and bad indices end the test.
SANITIZED = ("-fsanitize=undefined", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas")
ARGUMENTS = (
    *("scores", "stride", "num_columns", "row_scale", "col_scale", "row_add", "ceilings", "exclude_indptr"),
    *("exclude_ids", "first_id", "state_keys", "state_ids", "kept"),
)
MERGE_ARGUMENTS = ("list_keys", "list_columns", "length", "counts", *ARGUMENTS[-6:])


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("capacity", MAX_KEPT)
def test_sources_compile_for_sm_90a_without_spills(tmp_path, capacity):
    sources = sorted(CSRC.glob("*.cu"))
    assert sources
    for source in sources:
        command = [
            NVCC,
            "-O3",
            "-std=c++17",
            "-gencode",
            "arch=compute_90a,code=sm_90a",
            "-Xptxas",
            "-v",
            "-cubin",
        ]
        command += [f"-DTOPK_CAPACITY={capacity}", "-o", str(tmp_path / "out.cubin"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        print(done.stderr)
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
        assert len(registers) == 4 and spills == [0] * 8, done.stderr
        assert max(registers) * THREADS * 7 <= 65536, f"{registers}: fewer than 7 blocks fit a multiprocessor"


def test_header_and_launcher_agree_on_the_launch():
    defines = dict(re.findall(r"#define (TOPK_\w+) (\d+)\b", (CSRC / "topk.h").read_text()))
    assert int(defines["TOPK_THREADS"]) == THREADS
    assert int(defines["TOPK_THREADS"]) * int(defines["TOPK_ITEMS"]) == STEP
    assert all(most == capacity - STEP for capacity, most in MAX_KEPT.items())
    entry = (CSRC / "topk.cu").read_text().replace("\\\n", " ")
    for name, arguments in (("name", ARGUMENTS), ("merge_lists", MERGE_ARGUMENTS)):
        names = re.search(rf"__launch_bounds__\(.*?\) {name}\((.*?)\)\s*\{{", entry, re.S)
        assert names is not None
        assert tuple(a.split()[-1] for a in names.group(1).split(",")) == arguments


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"), CSRC, *SANITIZED)


@pytest.fixture(scope="module")
def host_of_4096(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"), CSRC, *SANITIZED, "-DTOPK_CAPACITY=4096")


@pytest.fixture(scope="module")
def host_without_a_barrier(tmp_path_factory):
    """The kernels without the barrier after their appends."""
    folder = tmp_path_factory.mktemp("planted")
    source = (CSRC / "topk_kernels.cuh").read_text()
    planted = source.replace(
        "        __syncthreads();\n        const int filled = count;", "        const int filled = count;"
    )
    assert planted != source
    (folder / "topk_kernels.cuh").write_text(planted)
    shutil.copy(CSRC / "topk.h", folder)
    return build(folder, folder, "-w")


def build(folder, include, *flags):
    if GXX is None:
        pytest.skip("no g++ on this machine")
    # -ffp-contract=off: __fmul_rn and __fadd_rn are never fused.
    command = [GXX, "-O1", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", *flags]
    command += [f"-I{include}", f"-I{HERE}", "-o", str(folder / "topk.so"), str(HERE / "host_topk.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "topk.so"))
    library.host_topk.restype = library.host_merge.restype = ctypes.c_bool
    return library


def pointer(x):
    assert x is None or x.stride(-1) == 1
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def on_host(
    host,
    order,
    threads,
    scores,
    ceilings,
    keys,
    ids,
    first_id,
    indptr,
    excluded,
    row_scale,
    col_scale,
    row_add,
):
    kind = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2}[scores.dtype]
    return host.host_topk(
        len(scores), threads, order, kind, pointer(scores), ctypes.c_longlong(scores.stride(0)),
        ctypes.c_longlong(scores.shape[1]), pointer(row_scale), pointer(col_scale), pointer(row_add),
        pointer(ceilings), pointer(indptr), pointer(excluded), ctypes.c_longlong(first_id), pointer(keys),
        pointer(ids), keys.shape[1],
    )  # fmt: skip


def merge_on_host(
    host, order, threads, keys, columns, counts, state_keys, state_ids, first_id, indptr, excluded
):
    return host.host_merge(
        len(keys), threads, order, pointer(keys), pointer(columns), ctypes.c_longlong(keys.shape[1]),
        pointer(counts), pointer(indptr), pointer(excluded), ctypes.c_longlong(first_id), pointer(state_keys),
        pointer(state_ids), state_keys.shape[1],
    )  # fmt: skip


def make_tile(rng, kind, rows, columns, dtype):
    if dtype == torch.int32:
        return torch.from_numpy(rng.integers(-(10**6), 10**6, (rows, columns), dtype=np.int32))
    if kind == "ties":
        scores = rng.integers(-2, 3, (rows, columns)) * np.float32(0.25)
        scores[rng.random(scores.shape) < 0.2] = -0.0
    elif kind == "rising":  # every column beats all before it: the buffer is compacted as often as it can be
        scores = np.sort(rng.standard_normal((rows, columns)), 1)
    else:
        scores = rng.standard_normal((rows, columns))
    scores = scores.astype(np.float32)
    if kind == "broken":
        for value in (np.nan, np.inf, -np.inf):
            scores[rng.random(scores.shape) < 0.1] = value
    return torch.from_numpy(scores).to(dtype)


CASES = [
    # kind, rows, kept, columns of each tile, threads, scales
    ("random", 3, 5, (700, 1, 64), 32, False),
    ("random", 2, 72, (3000,), 128, False),
    ("ties", 3, 40, (130, 257, 1100), 32, False),
    ("ties", 1, 1, (40, 13), 32, False),
    ("rising", 2, 7, (4100,), 64, False),
    ("rising", 1, 1024, (2500, 900), 128, False),
    ("broken", 3, 9, (50, 900), 32, False),
    ("broken", 2, 64, (20,), 32, False),
    ("random", 3, 16, (300, 800), 32, True),
    ("ties", 2, 33, (600, 31), 64, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}-{c[2]}-{i}" for i, c in enumerate(CASES)])
def test_kernel_on_the_host_is_the_cpu_op_bit_for_bit_in_every_order_of_threads(host, case, dtype):
    kind, rows, kept, tiles, threads, scaled = case
    rng = np.random.default_rng(len(kind) + kept)
    ceilings = torch.from_numpy(rng.choice([np.inf, 0.5, 0.25, 1.0], rows).astype(np.float32))
    if dtype == torch.int32 and not scaled:
        ceilings = ceilings * 10**6
    lists = [sorted(rng.choice(sum(tiles), rng.integers(0, 9), replace=False).tolist()) for _ in range(rows)]
    indptr = torch.tensor([0, *np.cumsum([len(x) for x in lists])])
    excluded = torch.tensor([i for x in lists for i in x], dtype=torch.int64)
    work = []
    for tile in np.argsort(rng.random(len(tiles))):  # tiles in any order
        n = tiles[tile]
        scores = make_tile(rng, kind, rows, n + 3, dtype)[:, :n]  # rows further apart than they are long
        row_scale, col_scale, row_add = (
            torch.from_numpy(rng.random(x).astype(np.float32) * s) if scaled else None
            for x, s in ((rows, 1), (n, 1e-5 if dtype == torch.int32 else 1), (rows, 0.1))
        )
        work.append((scores, sum(tiles[:tile]), row_scale, col_scale, row_add))

    def state():
        return torch.full((rows, kept), -torch.inf), torch.full((rows, kept), -1, dtype=torch.int64)

    want_keys, want_ids = state()
    for scores, first_id, *scales in work:
        streaming_topk_(scores, ceilings, want_keys, want_ids, first_id, indptr, excluded, *scales)
    for order in (0, 1, 7):
        keys, ids = state()
        for scores, first_id, *scales in work:
            assert on_host(
                host, order, threads, scores, ceilings, keys, ids, first_id, indptr, excluded, *scales
            )
        assert torch.equal(ids, want_ids), f"{order=}"
        assert torch.equal(keys, want_keys), f"{order=}"
    if kind != "broken":
        assert (want_ids[:, 0] >= 0).all()


def test_host_shim_notices_a_missing_barrier(host_without_a_barrier):
    """The negative control: the kernel without the barrier after its appends answers differently for some
    order."""
    scores = make_tile(np.random.default_rng(0), "rising", 2, 4100, torch.float32)
    ceilings = torch.full((2,), torch.inf)
    want = torch.full((2, 7), -torch.inf), torch.full((2, 7), -1, dtype=torch.int64)
    streaming_topk_(scores, ceilings, *want)
    wrong = 0
    for order in (0, 1, 7):
        keys, ids = torch.full((2, 7), -torch.inf), torch.full((2, 7), -1, dtype=torch.int64)
        ended = on_host(
            host_without_a_barrier, order, 64, scores, ceilings, keys, ids, 0, None, None, None, None, None
        )
        wrong += not ended or not torch.equal(ids, want[1])
    assert wrong > 0


def test_tiles_in_any_order_give_the_sorted_list_of_all():
    """Against plain sorting: ties of the last place go to the lower id also when it comes later."""
    rng = np.random.default_rng(0)
    scores = make_tile(rng, "ties", 4, 400, torch.float32)
    ceilings = torch.tensor([torch.inf, 0.5, 0.25, -0.25])
    want = [
        sorted((-s, j) for j, s in enumerate(row) if s < c)[:30]
        for row, c in zip(scores, ceilings, strict=True)
    ]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        keys, ids = torch.full((4, 30), -torch.inf), torch.full((4, 30), -1, dtype=torch.int64)
        for tile in order:
            streaming_topk_(scores[:, 100 * tile : 100 * tile + 100], ceilings, keys, ids, 100 * tile)
        assert ids.tolist() == [[j for _, j in row] for row in want], order


def make_lists(rng, kind, rows, length, kept, first_id=3000):
    """Arguments of merge_lists_: full, short, empty and overflowing lists; a state with places taken, some or
    none free.

    Behind the count of a list lie keys that would win; the state of an empty list is no state, and must stay
    as it is.
    """
    width = 2 * length + 1
    keys = make_tile(rng, kind, rows, length, torch.float32)
    columns = torch.from_numpy(
        np.stack([rng.permutation(width)[:length] for _ in range(rows)]).astype(np.int32)
    )
    counts = torch.from_numpy(rng.integers(1, length + 1, rows).astype(np.int32))
    counts[::4] = length
    counts[1::4] = length + 5
    counts[rows // 2] = 0
    keys[torch.arange(length) >= counts[:, None]] = 1e30
    outside = np.concatenate([np.arange(first_id), np.arange(first_id + width, first_id + width + 3000)])
    state_keys, state_ids = (
        torch.full((rows, kept), -torch.inf),
        torch.full((rows, kept), -1, dtype=torch.int64),
    )
    for row in range(rows):
        taken = int(rng.choice([0, kept // 2, kept]))
        if taken:
            before = make_tile(rng, "ties" if kind == "ties" else "random", 1, taken, torch.float32)[
                0
            ].tolist()
            ids = rng.choice(outside, taken, replace=False).tolist()
            best = sorted(zip(before, ids, strict=True), key=lambda x: (-x[0], x[1]))
            state_keys[row, :taken] = torch.tensor([k for k, _ in best]) + 0.0
            state_ids[row, :taken] = torch.tensor([i for _, i in best])
    state_keys[rows // 2], state_ids[rows // 2] = torch.nan, -7
    documents = columns.long() + first_id
    excluded = [sorted({*rng.choice(documents[r], length // 3).tolist(), 0, 10**6}) for r in range(rows)]
    excluded[0] = []
    indptr = torch.tensor([0, *np.cumsum([len(x) for x in excluded])])
    return (
        keys,
        columns,
        counts,
        state_keys,
        state_ids,
        first_id,
        indptr,
        torch.tensor([i for x in excluded for i in x]),
    )


def merged(keys, columns, counts, state_keys, state_ids, first_id, indptr, excluded):
    """What merge_lists_ has to answer, one entry after the other."""
    want_keys, want_ids = state_keys.clone(), state_ids.clone()
    for row, count in enumerate(counts.tolist()):
        if count == 0:
            continue
        out = set() if indptr is None else set(excluded[indptr[row] : indptr[row + 1]].tolist())
        found = [
            (k, i) for k, i in zip(state_keys[row].tolist(), state_ids[row].tolist(), strict=True) if i >= 0
        ]
        for key, column in zip(keys[row, :count].tolist(), columns[row, :count].tolist(), strict=True):
            if math.isfinite(key) and first_id + column not in out:
                found.append((key + 0.0, first_id + column))
        best = sorted(found, key=lambda x: (-x[0], x[1]))[: state_keys.shape[1]]
        free = state_keys.shape[1] - len(best)
        want_keys[row] = torch.tensor([k for k, _ in best] + [-math.inf] * free)
        want_ids[row] = torch.tensor([i for _, i in best] + [-1] * free)
    return want_keys, want_ids


def same_bits(got, want):
    return torch.equal(got[1], want[1]) and torch.equal(got[0].view(torch.int32), want[0].view(torch.int32))


MERGES = [
    # rows, kept, places of a list, threads
    (9, 1, 13, 32),
    (9, 72, 40, 32),
    (6, 72, 1024, 128),
    (5, 72, 3000, 32),
    (4, 1024, 1024, 128),
    (4, 1024, 2500, 128),
    (4, 2000, 1500, 128),
]


@pytest.mark.parametrize("kind", ["random", "ties", "rising", "broken"])
@pytest.mark.parametrize("case", MERGES, ids=["-".join(map(str, c[1:3])) for c in MERGES])
def test_merged_lists_are_the_sorted_lists_on_a_cpu_and_in_every_order_of_threads(
    host, host_of_4096, case, kind
):
    rows, kept, length, threads = case
    library = host if kept <= MAX_KEPT[2048] else host_of_4096
    lists = make_lists(np.random.default_rng(kept + length), kind, rows, length, kept)
    keys, columns, counts, state_keys, state_ids, first_id, *exclusions = lists
    for excluded in (exclusions, [None, None]):
        want = merged(*lists[:6], *excluded)
        got = state_keys.clone(), state_ids.clone()
        merge_lists_(keys, columns, counts, *got, first_id, *excluded)
        assert same_bits(got, want)
        for order in (0, 1, 7):
            got = state_keys.clone(), state_ids.clone()
            assert merge_on_host(library, order, threads, keys, columns, counts, *got, first_id, *excluded)
            assert same_bits(got, want), f"{order=}"


def test_merging_what_beats_the_state_is_the_streaming_topk_of_the_whole_tile():
    """A GEMM that keeps the keys not below the last place, in any order, loses nothing."""
    rng = np.random.default_rng(5)
    want = torch.full((6, 20), -torch.inf), torch.full((6, 20), -1, dtype=torch.int64)
    got = want[0].clone(), want[1].clone()
    for first in (400, 0, 800):
        tile, limit = make_tile(rng, "ties", 6, 400, torch.float32), torch.tensor([torch.inf, 0.5, 0.25] * 2)
        columns = torch.from_numpy(rng.permutation(400))
        shuffled = tile[:, columns]
        enters = (shuffled >= got[0][:, -1:]) & (shuffled < limit[:, None])
        order = enters.int().argsort(dim=1, descending=True, stable=True)
        merge_lists_(
            shuffled.gather(1, order), columns[order].int(), enters.sum(1, dtype=torch.int32), *got, first
        )
        streaming_topk_(tile, limit, *want, first)
        assert same_bits(got, want)


def test_merging_notices_a_missing_barrier(host_without_a_barrier):
    keys = make_tile(np.random.default_rng(0), "rising", 2, 4100, torch.float32)
    columns, counts = (
        torch.arange(4100, dtype=torch.int32).repeat(2, 1),
        torch.full((2,), 4100, dtype=torch.int32),
    )
    empty = torch.full((2, 7), -torch.inf), torch.full((2, 7), -1, dtype=torch.int64)
    want = merged(keys, columns, counts, *empty, 0, None, None)
    wrong = 0
    for order in (0, 1, 7):
        got = empty[0].clone(), empty[1].clone()
        ended = merge_on_host(host_without_a_barrier, order, 64, keys, columns, counts, *got, 0, None, None)
        wrong += not ended or not same_bits(got, want)
    assert wrong > 0


def test_lists_of_other_types_or_shapes_are_refused():
    lists = make_lists(np.random.default_rng(0), "random", 2, 5, 3)[:5]
    for place, wrong in (
        (0, lists[0].double()),
        (1, lists[1].long()),
        (2, lists[2].long()),
        (2, lists[2][:1]),
    ):
        with pytest.raises(AssertionError):
            merge_lists_(*lists[:place], wrong, *lists[place + 1 :])


def test_merging_is_an_op_that_torch_can_trace():
    lists = make_lists(np.random.default_rng(0), "random", 3, 5, 4)
    torch.library.opcheck(torch.ops.nemo_embed_core.merge_lists.default, lists)
