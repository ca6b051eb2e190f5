"""csrc without a GPU: compiled for sm_90a where nvcc is found; run on the host, thread by thread, in shuffled orders."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_embed_core.mine.streaming import CSRC, MAX_KEPT, STEP, THREADS, streaming_topk_

HERE = Path(__file__).parent
NVCC = shutil.which("nvcc") or next((p for p in ["/usr/local/cuda/bin/nvcc"] if Path(p).exists()), None)
GXX = shutil.which("g++")
ARGUMENTS = (
    *("scores", "stride", "num_columns", "row_scale", "col_scale", "row_add", "ceilings", "exclude_indptr"),
    *("exclude_ids", "first_id", "state_keys", "state_ids", "kept"),
)


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("capacity", MAX_KEPT)
def test_sources_compile_for_sm_90a_without_spills(tmp_path, capacity):
    sources = sorted(CSRC.glob("*.cu"))
    assert sources
    for source in sources:
        command = [NVCC, "-O3", "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin"]
        command += [f"-DTOPK_CAPACITY={capacity}", "-o", str(tmp_path / "out.cubin"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        print(done.stderr)
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
        assert len(registers) == 3 and spills == [0] * 6, done.stderr
        assert max(registers) * THREADS * 7 <= 65536, f"{registers}: fewer than 7 blocks fit a multiprocessor"


def test_header_and_launcher_agree_on_the_launch():
    defines = dict(re.findall(r"#define (TOPK_\w+) (\d+)\b", (CSRC / "topk.h").read_text()))
    assert int(defines["TOPK_THREADS"]) == THREADS
    assert int(defines["TOPK_THREADS"]) * int(defines["TOPK_ITEMS"]) == STEP
    assert all(most == capacity - STEP for capacity, most in MAX_KEPT.items())
    entry = (CSRC / "topk.cu").read_text().replace("\\\n", " ")
    names = re.search(r"name\((.*?)\)\s*\{", entry.split("__launch_bounds__")[1], re.S)
    assert names is not None
    assert tuple(a.split()[-1] for a in names.group(1).split(",")) == ARGUMENTS


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if GXX is None:
        pytest.skip("no g++ on this machine")
    library = tmp_path_factory.mktemp("host") / "topk.so"
    # -ffp-contract=off: __fmul_rn and __fadd_rn are never fused. Undefined behaviour and bad indices end the test.
    command = [GXX, "-O1", "-std=c++20", "-ffp-contract=off", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    command += ["-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{CSRC}", f"-I{HERE}", "-o", str(library)]
    done = subprocess.run([*command, str(HERE / "host_topk.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load(library)


def load(library):
    function = ctypes.CDLL(str(library)).host_topk
    function.restype = ctypes.c_bool
    return function


def on_host(
    host, order, threads, scores, ceilings, keys, ids, first_id, indptr, excluded, row_scale, col_scale, row_add
):
    kind = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2}[scores.dtype]

    def pointer(x):
        assert x is None or x.stride(-1) == 1
        return ctypes.c_void_p(None if x is None else x.data_ptr())

    return host(
        len(scores), threads, order, kind, pointer(scores), ctypes.c_longlong(scores.stride(0)),
        ctypes.c_longlong(scores.shape[1]), pointer(row_scale), pointer(col_scale), pointer(row_add), pointer(ceilings),
        pointer(indptr), pointer(excluded), ctypes.c_longlong(first_id), pointer(keys), pointer(ids), keys.shape[1],
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
            assert on_host(host, order, threads, scores, ceilings, keys, ids, first_id, indptr, excluded, *scales)
        assert torch.equal(ids, want_ids), f"{order=}"
        assert torch.equal(keys, want_keys), f"{order=}"
    if kind != "broken":
        assert (want_ids[:, 0] >= 0).all()


def test_host_shim_notices_a_missing_barrier(tmp_path):
    """The negative control: the kernel without the barrier after its appends answers differently for some order."""
    if GXX is None:
        pytest.skip("no g++ on this machine")
    source = (CSRC / "topk_kernels.cuh").read_text()
    planted = source.replace(
        "        __syncthreads();\n        const int filled = count;", "        const int filled = count;"
    )
    assert planted != source
    (tmp_path / "topk_kernels.cuh").write_text(planted)
    shutil.copy(CSRC / "topk.h", tmp_path)
    command = [GXX, "-O1", "-std=c++20", "-w", "-shared", "-fPIC", f"-I{tmp_path}", f"-I{HERE}"]
    library = tmp_path / "planted.so"
    done = subprocess.run([*command, "-o", str(library), str(HERE / "host_topk.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planted_topk = load(library)
    scores = make_tile(np.random.default_rng(0), "rising", 2, 4100, torch.float32)
    ceilings = torch.full((2,), torch.inf)
    want = torch.full((2, 7), -torch.inf), torch.full((2, 7), -1, dtype=torch.int64)
    streaming_topk_(scores, ceilings, *want)
    wrong = 0
    for order in (0, 1, 7):
        keys, ids = torch.full((2, 7), -torch.inf), torch.full((2, 7), -1, dtype=torch.int64)
        ended = on_host(planted_topk, order, 64, scores, ceilings, keys, ids, 0, None, None, None, None, None)
        wrong += not ended or not torch.equal(ids, want[1])
    assert wrong > 0


def test_tiles_in_any_order_give_the_sorted_list_of_all():
    """Against plain sorting: ties of the last place go to the lower id also when it comes later."""
    rng = np.random.default_rng(0)
    scores = make_tile(rng, "ties", 4, 400, torch.float32)
    ceilings = torch.tensor([torch.inf, 0.5, 0.25, -0.25])
    want = [sorted((-s, j) for j, s in enumerate(row) if s < c)[:30] for row, c in zip(scores, ceilings, strict=True)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        keys, ids = torch.full((4, 30), -torch.inf), torch.full((4, 30), -1, dtype=torch.int64)
        for tile in order:
            streaming_topk_(scores[:, 100 * tile : 100 * tile + 100], ceilings, keys, ids, 100 * tile)
        assert ids.tolist() == [[j for _, j in row] for row in want], order
