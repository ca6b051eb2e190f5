"""Exact top-k on the same embeddings in one run: ours, torch matmul + topk, and faiss-cpu flat where it is installed.

    python -m benchmarks.mining --Q 1024 --N 100000 --D 1024 --k 40
    python -m benchmarks.mining --Q 16384 --N 2000000 --D 4096 --k 40 --device cuda      (one H200)

Ids are compared before any time is reported. Ours includes everything it does to the raw rows (norms, rotation,
quantisation, scoring of candidates); faiss is charged for its search only, not for `index.add`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemo_embed_core.mine.topk import SearchStats, topk_below


def make_data(num_queries: int, num_documents: int, hidden_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Clustered unit rows with a decaying spectrum; a query is a document with noise: scores like those of text."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(n: int) -> Tensor:
        return torch.randn(n, hidden_size, generator=generator, device=device) * spectrum

    spectrum = torch.arange(1, hidden_size + 1, device=device).float() ** -0.3
    centres = randn(3000)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    documents = torch.empty(num_documents, hidden_size, device=device, dtype=dtype)
    for start in range(0, num_documents, 50000):
        n = min(50000, num_documents - start)
        near = torch.randint(0, 3000, (n,), generator=generator, device=device)
        documents[start : start + n] = torch.nn.functional.normalize(0.8 * centres[near] + randn(n))
    chosen = torch.randint(0, num_documents, (num_queries,), generator=generator, device=device)
    noise = 0.8 * torch.nn.functional.normalize(randn(num_queries))
    return torch.nn.functional.normalize(documents[chosen].float() + noise), documents


def torch_topk(queries: Tensor, documents: Tensor, ceilings: Tensor, k: int) -> Tensor:
    """What one writes by hand: fp32 (bf16 on a GPU) matmul of 256 queries with everything, mask, topk."""
    out = []
    for start in range(0, len(queries), 256):
        rows = slice(start, start + 256)
        scores = queries[rows].to(documents.dtype) @ documents.T
        scores = torch.where(scores < ceilings[rows, None], scores, -torch.inf)
        out.append(scores.topk(k, dim=1).indices)
    return torch.cat(out)


def matmul_alone(queries: Tensor, documents: Tensor) -> None:
    rows = queries.to(documents.dtype)
    for start in range(0, len(queries), 4096):
        for first in range(0, len(documents), 65536):
            rows[start : start + 4096] @ documents[first : first + 65536].T


def timed(run: Callable[[], object], repeats: int, device: str) -> tuple[float, object]:
    times, result = [], None
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(np.median(times)), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--Q", type=int, default=1024)
    parser.add_argument("--N", type=int, default=100_000)
    parser.add_argument("--D", type=int, default=1024)
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--methods", nargs="*", default=None, help="fp32, bf16, int8; default: those that pay here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="", help="JSON file")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))

    queries, documents = make_data(args.Q, args.N, args.D, args.device)
    no_ceiling = torch.full((args.Q,), torch.inf, device=args.device)
    methods = args.methods or (["fp32"] if args.device == "cpu" else ["bf16", "int8"])
    operations = 2 * args.Q * args.N * args.D
    rows: dict[str, dict[str, object]] = {}
    answers: dict[str, np.ndarray] = {}
    for method in methods:
        stats = SearchStats()

        def search(method: str = method, stats: SearchStats = stats) -> Tensor:
            tiles = {} if args.device == "cpu" else {"tile_queries": 4096, "block_documents": 32768}
            return topk_below(
                queries, documents, no_ceiling.cpu(), args.k, method=method, device=args.device, stats=stats, **tiles
            )[1]

        search()
        certified = stats.num_certified / args.Q
        seconds, ids = timed(search, args.repeats, args.device)
        answers[f"ours {method}"] = np.asarray(ids)
        rows[f"ours {method}"] = {"seconds": seconds, "certified_share": certified, "exhaustive": stats.num_exhaustive}
    timed(lambda: torch_topk(queries[:256], documents, no_ceiling, args.k), 1, args.device)
    seconds, ids = timed(lambda: torch_topk(queries, documents, no_ceiling, args.k), args.repeats, args.device)
    answers["torch matmul + topk"], rows["torch matmul + topk"] = ids.cpu().numpy(), {"seconds": seconds}
    seconds, _ = timed(lambda: matmul_alone(queries, documents), args.repeats, args.device)
    rows["matmul alone"] = {"seconds": seconds}
    if args.device == "cpu" and importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(args.D)
        index.add(documents.numpy())
        seconds, found = timed(lambda: index.search(queries.numpy(), args.k), args.repeats, args.device)
        answers["faiss-cpu flat"], rows["faiss-cpu flat"] = found[1], {"seconds": seconds}

    best = f"ours {methods[0]}"
    for name, ids in answers.items():
        # In the order of the scores: peers break ties, and differences below the rounding of their GEMM, as they come.
        same = np.mean(
            [len(set(a) & set(b)) / args.k for a, b in zip(ids.tolist(), answers[best].tolist(), strict=True)]
        )
        rows[name]["ids_in_common"] = float(same)
    for method in methods[1:]:
        assert np.array_equal(answers[f"ours {method}"], answers[best]), f"ours {method} and {best} differ"
    print(f"Q={args.Q:,} N={args.N:,} D={args.D:,} k={args.k}, {args.device}, {torch.get_num_threads()} threads")
    print(f"{'':24}{'seconds':>9}{'GFLOP/s':>10}{'x ' + best:>14}  ids in common")
    for name, row in rows.items():
        ratio = float(row["seconds"]) / float(rows[best]["seconds"])  # type: ignore[arg-type]
        row["gflops"] = operations / float(row["seconds"]) / 1e9  # type: ignore[arg-type]
        common = f"{row['ids_in_common']:.6f}" if "ids_in_common" in row else ""
        print(f"{name:24}{row['seconds']:9.3f}{row['gflops']:10.1f}{ratio:14.2f}  {common}")
    if args.output:
        name = torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name()
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "device": name,
            "torch": torch.__version__,
            **vars(args),
            "rows": rows,
        }
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return "unknown CPU"


if __name__ == "__main__":
    main()
