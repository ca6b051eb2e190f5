"""Search over vectors in files: time, its floor, memory, faiss-cpu's IVF-PQ beside it, and the law for GPUs.

    python -m benchmarks.beyond_memory                                   1,000,000 x 256, 2,048 queries
    python -m benchmarks.beyond_memory --N 10000000 --method int8        what docs/benchmarks.md shows

Makes fp16 vectors in a temporary folder (N x D x 2 bytes of disk, in files of --rows_a_file), drops them
from the page cache, and searches them in a process of its own, whose private memory the kernel limits to
--memory_gib. The peak is the kernel's (VmHWM: all resident pages, those of files too). The floor is the
larger of two: all bytes at the rate of a cold read, all products at the rate of the GEMM alone, both measured
in the same process.
Before anything is printed, --checked queries are compared with numpy's fp64 products of all documents.
faiss-cpu's IVF-PQ takes part where it is installed, in a process of its own too: trained on a sample, filled
in blocks, asked with each --nprobe; recall is the share of our exact ids.

The law is a prediction from the newest figures of a GPU in benchmarks/results; nothing of it is measured
here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import ceilings
from nemo_embed_core.mine.search import int8_cpu
from nemo_embed_core.mine.search.buffers import ScoredBuffer
from nemo_embed_core.mine.search.engine import SearchStats
from nemo_embed_core.mine.search.stored import StoredRows
from nemo_embed_core.mine.search.topk import pick_method, queries_at_once, topk_below

BLOCK, CENTRES = 50_000, 3_000
GEMM_S = 3.0  # of measuring the GEMM's rate, before and after the search
PARTS: dict[str, tuple[Any, str]] = {
    "quantising documents": (int8_cpu.Quantiser, "documents"),
    "int8 products": (torch, "_int_mm"),
    "fp32 scores of survivors": (int8_cpu, "sampled_scores"),
    "exact scores, into the k best": (ScoredBuffer, "add"),
}
# The law's machine and goal: 1e9 documents of 4,096 columns, 1e6 queries, 8 GPUs, 15 minutes.
LAW = {"N": 10**9, "D": 4096, "Q": 10**6, "k": 40}
GPUS, GOAL_S, GPU_MEMORY = 8, 900, 141e9
DISK_GB_S, BUS_GB_S = 5.0, 50.0  # assumed, of each GPU: one PCIe 4 NVMe, a PCIe 5 x16 slot


def made_blocks(num_documents: int, hidden_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, unit rows fp16): clusters and a decaying spectrum, as in benchmarks.mining; seeded."""
    spectrum = torch.arange(1, hidden_size + 1).float() ** -0.3
    centres = torch.randn(CENTRES, hidden_size, generator=torch.Generator().manual_seed(0)) * spectrum
    for start in range(0, num_documents, BLOCK):
        generator = torch.Generator().manual_seed(1 + start)
        n = min(BLOCK, num_documents - start)
        rows = torch.randn(n, hidden_size, generator=generator).mul_(spectrum)
        near = torch.randint(0, CENTRES, (n,), generator=generator)
        rows.add_(centres[near], alpha=0.8)
        yield start, torch.nn.functional.normalize(rows).half()


def write_data(folder: Path, options: argparse.Namespace) -> None:
    """documents-*.npy, and queries.npy: as many documents with noise, normalised, fp32."""
    spectrum = torch.arange(1, options.D + 1).float() ** -0.3
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randint(0, options.N, (options.Q,), generator=generator)
    queries = torch.nn.functional.normalize(torch.randn(options.Q, options.D, generator=generator) * spectrum)
    file = None
    for start, rows in made_blocks(options.N, options.D):
        here = (chosen >= start) & (chosen < start + len(rows))
        queries[here] = torch.nn.functional.normalize(
            rows[chosen[here] - start].float() + 0.8 * queries[here]
        )
        while len(rows):
            at = start % options.rows_a_file
            if file is None:
                shape = (min(options.rows_a_file, options.N - start), options.D)
                file = (folder / f"documents-{start // options.rows_a_file:05d}.npy").open("wb")
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            part = rows[: options.rows_a_file - at]
            file.write(part.numpy().data)
            start, rows = start + len(part), rows[len(part) :]
            if start % options.rows_a_file == 0 or start == options.N:
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.close()
                file = None
    np.save(folder / "queries.npy", queries.numpy())


def documents_of(folder: Path) -> StoredRows:
    return StoredRows.open(sorted(folder.glob("documents-*.npy")))


def peak_bytes() -> int:
    """The most resident memory of this process so far, pages of files too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# ------------------------------------------------------------------------------------------ ours


@contextlib.contextmanager
def add_times(sums: dict[str, float]) -> Iterator[None]:
    """Calls of PARTS add their seconds to sums."""

    def timed(real: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*arguments, **more)
            finally:
                sums[part] += time.perf_counter() - began

        return call

    with contextlib.ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            sums[part] = 0.0
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part)))
        yield


def disk_rate(folder: Path, most: int = 1 << 30) -> float:
    """Bytes per second of a cold read of the first files, and nothing else."""
    documents = documents_of(folder)
    size = 4096
    rows = documents.part(0, min(len(documents), most // (2 * documents.shape[1])))
    began = time.perf_counter()
    for _ in rows.blocks(size, torch.device("cpu")):
        pass
    return rows.bytes_read / (time.perf_counter() - began)


def gemm_rate(method: str, hidden_size: int) -> tuple[float, float]:
    """Operations per second of the clock, and of the processor, of the search's own GEMM on its own tiles."""
    call: Callable[[], object]
    rows, columns = 1024, 4096
    if method == "int8":
        a = torch.ones(rows, hidden_size, dtype=torch.int8)
        b, out = torch.ones(hidden_size, columns, dtype=torch.int8), torch.empty(rows, columns).int()
        call = lambda: torch._int_mm(a, b, out=out)  # noqa: E731
    else:
        x, y = torch.ones(rows, hidden_size), torch.ones(columns, hidden_size)
        call = lambda: int8_cpu.linear(x, y)  # noqa: E731
    call()
    clock, processor, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - clock < GEMM_S:
        call()
        count += 1
    operations = 2.0 * count * rows * columns * hidden_size
    return operations / (time.perf_counter() - clock), operations / (time.process_time() - processor)


def search_here(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Figures; the answer goes to ids.npy and scores.npy in the folder."""
    limit = int(options.memory_gib * 2**30)
    queries, documents, stats = np.load(folder / "queries.npy"), documents_of(folder), SearchStats()
    parts: dict[str, float] = {}
    disk = disk_rate(folder)
    method = options.method if options.method != "auto" else pick_method(torch.device("cpu"), len(queries))
    gemm = gemm_rate(method, options.D)
    idle = peak_bytes()
    clock, processor = time.perf_counter(), time.process_time()
    block = queries_at_once(options.k, options.D, torch.device("cpu"), limit)
    with add_times(parts):
        scores, ids = topk_below(
            queries, documents, np.full(len(queries), np.inf), options.k, method=method, stats=stats,
            block_queries=block,
        )  # fmt: skip
    seconds, processor_s = time.perf_counter() - clock, time.process_time() - processor
    np.save(folder / "ids.npy", ids.numpy())
    np.save(folder / "scores.npy", scores.numpy())
    parts["waiting for the disk"] = documents.seconds_waited
    parts["everything else"] = seconds - sum(parts.values())
    later = gemm_rate(method, options.D)
    gemm = tuple(max(pair) for pair in zip(gemm, later, strict=True))
    size, operations = len(documents) * options.D * 2, 2 * len(queries) * len(documents) * options.D
    return {
        "method": method, "seconds": seconds, "processor_s": processor_s, "parts": parts,
        "queries_at_once": block, "passes": documents.bytes_read / size, "bytes_read": documents.bytes_read,
        "certified": stats.num_certified, "exhaustive": stats.num_exhaustive, "operations": operations,
        "disk_bytes_s": disk, "gemm_ops_s": gemm[0], "gemm_ops_processor_s": gemm[1],
        "floor_disk_s": documents.bytes_read / disk, "floor_gemm_s": operations / gemm[0],
        "floor_gemm_processor_s": operations / gemm[1],
        "peak_bytes": peak_bytes(), "idle_bytes": idle, "threads": torch.get_num_threads(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ faiss


def faiss_here(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """IVF-PQ on the same files: seconds of training, filling, searching; recall of our ids; peak memory."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    documents, queries = documents_of(folder), np.load(folder / "queries.npy")
    exact = np.load(folder / "ids.npy")
    num_lists = 1 << round(np.log2(options.N) / 2)  # the power of two at sqrt(N)
    code_bytes = options.pq_bytes or options.D // 4
    sample = min(options.N, 40 * num_lists)
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(options.D), options.D, num_lists, code_bytes, 8, faiss.METRIC_INNER_PRODUCT
    )
    cpu = torch.device("cpu")
    began = time.perf_counter()
    # Rows are drawn by a seed and not clustered in order, so that the first are a sample.
    rows = [block.float().numpy() for _, block in documents.part(0, sample).blocks(4096, cpu)]
    index.train(np.concatenate(rows))
    del rows
    train_s, began = time.perf_counter() - began, time.perf_counter()
    for _, block in documents.blocks(65536, cpu):
        index.add(block.float().numpy())
    add_s, found = time.perf_counter() - began, []
    for nprobe in options.nprobe:
        index.nprobe = min(nprobe, num_lists)
        began = time.perf_counter()
        ids = index.search(queries, options.k)[1]
        seconds = time.perf_counter() - began
        recall = np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, ids, strict=True)])
        found.append({"nprobe": index.nprobe, "seconds": seconds, "recall": float(recall)})
    return {
        "version": faiss.__version__, "lists": num_lists, "code_bytes": code_bytes, "sample": sample,
        "train_s": train_s, "add_s": add_s, "searches": found, "peak_bytes": peak_bytes(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ both, and the law


def check(folder: Path, options: argparse.Namespace) -> None:
    """The first queries against fp64 products of all documents; SystemExit where an answer differs."""
    count, k = min(options.checked, options.Q), options.k
    queries = np.load(folder / "queries.npy")[:count].astype(np.float64)
    scores, ids = np.full((count, 0), 0.0), np.full((count, 0), 0)
    for path in sorted(folder.glob("documents-*.npy")):
        rows = np.load(path, mmap_mode="r")
        first = int(path.stem.split("-")[1]) * options.rows_a_file
        for start in range(0, len(rows), BLOCK):
            exact = queries @ rows[start : start + BLOCK].astype(np.float64).T
            new_ids = np.broadcast_to(np.arange(exact.shape[1]) + first + start, exact.shape)
            scores, ids = np.hstack([scores, exact]), np.hstack([ids, new_ids])
            order = np.lexsort((ids, -scores.astype(np.float32)), axis=1)[:, : k + 1]
            scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    got_scores, got_ids = np.load(folder / "scores.npy")[:count], np.load(folder / "ids.npy")[:count]
    gaps = -np.diff(scores, prepend=np.inf, append=-np.inf)
    is_apart = np.minimum(gaps[:, :k], gaps[:, 1 : k + 1]) > 1e-7  # nearer ones may round to one fp32
    wrong = (got_ids != ids[:, :k]) & is_apart | (np.abs(got_scores - scores[:, :k]) > 1e-7)
    if wrong.any():
        raise SystemExit(
            f"{wrong.any(1).sum()} of {count} answers are not those of fp64, hence nothing is printed"
        )


def law(ops_a_second: float, measured_at: str) -> dict[str, Any]:
    """What GPUS machines' worth of one H200 each would take for LAW: a prediction."""
    N, D, Q, k = LAW.values()
    at_once = queries_at_once(k, D, torch.device("cuda"), int(GPU_MEMORY))
    passes = -(-Q // at_once)
    operations, size = 2.0 * N * D * Q / GPUS, 2.0 * N * D / GPUS * passes
    parts = {
        "products_s": operations / ops_a_second,
        "disk_s": size / DISK_GB_S / 1e9,
        "bus_s": size / BUS_GB_S / 1e9,
    }
    return {
        "shape": LAW, "gpus": GPUS, "goal_s": GOAL_S, "measured_at": measured_at,
        "ops_a_second": ops_a_second, "queries_at_once": at_once, "passes": passes,
        "bytes_a_gpu": size, "disk_gb_s": DISK_GB_S,
        "bus_gb_s": BUS_GB_S, **parts, "predicted_s": max(parts.values()),
        "needed_ops_s": operations / GOAL_S,
    }  # fmt: skip


def laws() -> Iterator[dict[str, Any]]:
    """By each rate of a whole search that benchmarks/results has of a GPU, its documents in its memory."""
    for path in sorted(ceilings.RESULTS.glob("mining-*.jsonl"))[-1:]:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if row["what"] == "topk" and row["variant"].startswith("ours") and row["shape"]["D"] == LAW["D"]:
                shape = row["shape"]
                operations = 2 * shape["Q"] * shape["N"] * shape["D"]
                what = f"{row['variant'].removeprefix('ours ')} on a {row['gpu']} ({path.name})"
                yield law(operations / row["seconds"], what)


def in_a_process(part: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What the part prints last, of a Python of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.beyond_memory",
        *arguments,
        "--part",
        part,
        "--folder",
        str(folder),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def show(ours: dict[str, Any], options: argparse.Namespace) -> None:
    gib = 2**30
    certified = f"{ours['certified']:,} of {options.Q:,} queries certified exact in {ours['passes']:.0f} pass"
    seconds = f"{ours['seconds']:.1f} s, {ours['processor_s']:.1f} s of a processor"
    print(f"ours, {ours['method']}, {ours['threads']} threads: {seconds}; {certified}")
    for name, seconds in ours["parts"].items():
        print(f"  {name:32}{seconds:9.1f} s")
    print(
        f"  floor: {ours['floor_disk_s']:.1f} s for {ours['bytes_read'] / 1e9:.2f} GB at "
        f"{ours['disk_bytes_s'] / 1e9:.2f} GB/s; {ours['floor_gemm_s']:.1f} s for the products at "
        f"{ours['gemm_ops_s'] / 1e9:,.0f} GOP/s "
        f"({ours['floor_gemm_processor_s']:.1f} s of a processor)"
    )
    print(
        f"  peak {ours['peak_bytes'] / gib:.2f} GiB resident ({ours['idle_bytes'] / gib:.2f} before the "
        f"search) of {options.memory_gib:g} GiB allowed; the documents have "
        f"{options.N * options.D * 2 / gib:.2f} GiB",
        flush=True,
    )


def show_faiss(peer: dict[str, Any]) -> None:
    built = f"trained on {peer['sample']:,} in {peer['train_s']:.1f} s, filled in {peer['add_s']:.1f} s"
    kind = f"IVF{peer['lists']},PQ{peer['code_bytes']}"
    print(f"faiss-cpu {peer['version']} {kind}: {built}; peak {peer['peak_bytes'] / 2**30:.2f} GiB")
    for row in peer["searches"]:
        print(f"  nprobe {row['nprobe']:5}: {row['seconds']:9.2f} s, recall {row['recall']:.4f}")


def show_law(figures: dict[str, Any]) -> None:
    tera = {name: figures[name] / 1e12 for name in ("ops_a_second", "needed_ops_s")}
    print(
        f"predicted, not measured: {LAW} on {GPUS} GPUs, each at {tera['ops_a_second']:,.0f} TOP/s "
        f"({figures['measured_at']}): {figures['predicted_s']:,.0f} s\n"
        f"  products {figures['products_s']:,.0f} s; disk {figures['disk_s']:,.0f} s at {DISK_GB_S:g} GB/s "
        f"and bus {figures['bus_s']:,.0f} s at {BUS_GB_S:g} GB/s a GPU, beside them; passes "
        f"{figures['passes']}, of {figures['queries_at_once']:,} queries at most; the goal, {GOAL_S} s, "
        f"takes {tera['needed_ops_s']:,.0f} TOP/s"
    )


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--N", type=int, default=1_000_000, help="documents")
    parser.add_argument("--D", type=int, default=256, help="columns")
    parser.add_argument("--Q", type=int, default=2048, help="queries")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument(
        "--method",
        default="auto",
        help="fp32, int8, or auto, which a busy machine may mislead (default auto)",
    )
    parser.add_argument("--rows_a_file", type=int, default=1_000_000)
    parser.add_argument(
        "--memory_gib", type=float, default=4.0, help="private memory that the search may take"
    )
    parser.add_argument(
        "--checked", type=int, default=4, help="queries compared with fp64 over all documents"
    )
    parser.add_argument("--nprobe", type=int, nargs="*", default=[1, 4, 16, 64, 256], help="of faiss")
    parser.add_argument("--pq_bytes", type=int, default=0, help="of a document in faiss; 0: D / 4")
    parser.add_argument(
        "--folder", default="", help="an empty or new folder for the vectors; default: temporary"
    )
    parser.add_argument("--part", choices=["search", "faiss"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parsed(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if options.part:
        run = {"search": search_here, "faiss": faiss_here}[options.part]
        if options.part == "search":
            limit = int(options.memory_gib * 2**30)
            resource.setrlimit(
                resource.RLIMIT_DATA, (limit, limit)
            )  # of private memory; a mapped file is none
        print(json.dumps(run(Path(options.folder), options)))
        return
    results = ceilings.ResultsFile("beyond_memory", device="cpu")
    shape = {name: vars(options)[name] for name in "QNDk"}
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        folder, size = Path(name), options.N * options.D * 2
        free = shutil.disk_usage(folder).free
        if size + (1 << 30) > free:
            raise SystemExit(
                f"{folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB of vectors do not fit"
            )
        load = round(os.getloadavg()[0], 1)
        print(f"{results.run['gpu']}, load {load} before the start; {shape}; to {results.path}", flush=True)
        began = time.perf_counter()
        write_data(folder, options)
        print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - began:.1f} s", flush=True)
        ours = in_a_process("search", folder, arguments)
        check(folder, options)
        results.append(what="search", variant="ours", shape=shape, load=load, checked=options.checked, **ours)
        show(ours, options)
        if importlib.util.find_spec("faiss"):
            peer = in_a_process("faiss", folder, arguments)
            results.append(what="search", variant="faiss-cpu IVF-PQ", shape=shape, **peer)
            show_faiss(peer)
        else:
            print("faiss-cpu IVF-PQ: not installed, hence not compared (pip install faiss-cpu)")
    for figures in laws():
        results.append(what="law", **figures)
        show_law(figures)


if __name__ == "__main__":
    main()
