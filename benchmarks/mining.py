"""Exact top-k and mining on the same embeddings in one run: ours, torch, faiss-cpu and sentence-transformers.

    python -m benchmarks.mining --Q 8192 --N 100000 --D 1024 --k 40           what it takes on a CPU
    python -m benchmarks.mining --Q 16384 --N 2000000 --D 4096 --k 40         what it takes on a GPU

Two tables. Top-k: every document, the k best. Mining: the 4 best below 0.95 x the score of the query's
positive, which is never returned. Peers take part where they are installed. Ids are compared before any time
is printed; all take turns, and the median of each is kept. Ours includes everything it does to the raw rows
(norms, rotation, quantisation, scoring of candidates); faiss is charged for its search only, not for
`index.add`. mine_hard_negatives is given a model that looks the embeddings up, so its time is that of its
search and bookkeeping. "prepare rows" is the part of ours before the GEMM.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.ceilings import ResultsFile, commit, cpu_name, kernel_lines, kernel_times
from nemo_embed_core.kernels.pair_scores import pair_scores
from nemo_embed_core.mine.search.bounds import METHODS
from nemo_embed_core.mine.search.engine import SearchStats
from nemo_embed_core.mine.search.exclude import Exclude
from nemo_embed_core.mine.search.int8_cpu import Quantiser
from nemo_embed_core.mine.search.topk import MANY_QUERIES, pick_method, topk_below
from nemo_embed_core.mine.selection import ceiling

NUM_NEGATIVES, THRESHOLD = 4, 0.95


def make_data(
    num_queries: int, num_documents: int, hidden_size: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(queries, documents, the id of each query's positive): clustered unit rows with a decaying spectrum.

    A query is its positive with noise: scores like those of text.
    """
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
    return torch.nn.functional.normalize(documents[chosen].float() + noise), documents, chosen


def torch_topk(queries: Tensor, documents: Tensor, k: int) -> Tensor:
    """What one writes by hand: fp32 (bf16 on a GPU) matmul of 256 queries with everything, topk."""
    return torch.cat(
        [(q.to(documents.dtype) @ documents.T).topk(k, dim=1).indices for q in queries.split(256)]
    )


def torch_mine(queries: Tensor, documents: Tensor, ceilings: Tensor, positives: Tensor) -> Tensor:
    """The same with a mask: -inf at the positive and from the ceiling upwards."""
    found = []
    for q, c, p in zip(queries.split(256), ceilings.split(256), positives.split(256), strict=True):
        scores = q.to(documents.dtype) @ documents.T
        scores.masked_fill_(scores >= c[:, None].to(scores.dtype), -torch.inf).scatter_(
            1, p[:, None], -torch.inf
        )
        found.append(scores.topk(NUM_NEGATIVES, dim=1).indices)
    return torch.cat(found)


def matmul_alone(queries: Tensor, documents: Tensor) -> None:
    """The scores and nothing else, in tiles of the shape that was fastest: an H200 is not faster for any
    smaller one."""
    rows, num_documents = queries.to(documents.dtype), 32768 if documents.is_cuda else 2048
    tile = documents.new_empty(min(len(rows), 16384), num_documents)
    for q in rows.split(16384):
        for d in documents.split(num_documents):
            torch.mm(q, d.T, out=tile[: len(q), : len(d)])


class Lookup:
    """A sentence-transformers model whose texts are row numbers, "q17" and "d4": encoding costs nothing."""

    prompts: ClassVar[dict[str, str]] = {}
    similarity = staticmethod(lambda a, b: torch.as_tensor(a) @ torch.as_tensor(b).T)
    similarity_pairwise = staticmethod(lambda a, b: (torch.as_tensor(a) * torch.as_tensor(b)).sum(1))

    def __init__(self, queries: Tensor, documents: Tensor):
        self.queries, self.documents, self.device = queries.numpy(), documents.numpy(), torch.device("cpu")

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return self.queries[[int(t[1:]) for t in texts]]

    def encode_document(self, texts: list[str], **_: Any) -> np.ndarray:
        return self.documents[[int(t[1:]) for t in texts]]


def sentence_transformers_mine(
    queries: Tensor, documents: Tensor, positives: Tensor
) -> Callable[[], np.ndarray]:
    """util.mine_hard_negatives on the looked-up embeddings -> ids [Q, NUM_NEGATIVES]; -1 where a query has
    too few."""
    from datasets import Dataset, disable_progress_bars
    from sentence_transformers.util import mine_hard_negatives

    disable_progress_bars()
    rows = {"q": [f"q{i}" for i in range(len(queries))], "d": [f"d{i}" for i in positives.tolist()]}
    dataset, corpus = Dataset.from_dict(rows), [f"d{i}" for i in range(len(documents))]
    model: Any = Lookup(queries, documents)

    def run() -> np.ndarray:
        with redirect_stderr(io.StringIO()):  # its progress bars
            mined = mine_hard_negatives(
                dataset, model, corpus=corpus, relative_margin=1 - THRESHOLD, num_negatives=NUM_NEGATIVES,
                output_format="n-tuple", verbose=False,
            )  # fmt: skip
        ids = np.full((len(queries), NUM_NEGATIVES), -1, np.int64)
        columns = [[int(t[1:]) for t in mined[f"negative_{j + 1}"]] for j in range(NUM_NEGATIVES)]
        ids[[int(t[1:]) for t in mined["q"]]] = np.array(columns).T.reshape(-1, NUM_NEGATIVES)
        return ids

    return run


def compare(
    runs: dict[str, Callable[[], Any]], ours: str, repeats: int, device: str
) -> dict[str, dict[str, Any]]:
    """Ids first, then times in turns: {name: {"seconds", "ids_in_common"}}."""
    answers = {name: run() for name, run in runs.items()}
    table: dict[str, dict[str, Any]] = {name: {"times": []} for name in runs}
    want = np.asarray(answers[ours])
    for name, answer in answers.items():
        if answer is not None:
            # As sets: peers break ties, and differences below the rounding of their GEMM, as they come.
            got = answer.cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)
            pairs = [(set(a) - {-1}, set(b) - {-1}) for a, b in zip(want.tolist(), got.tolist(), strict=True)]
            table[name]["ids_in_common"] = sum(len(a & b) for a, b in pairs) / max(
                1, sum(len(a) for a, _ in pairs)
            )
            assert not name.startswith("ours") or np.array_equal(got, want), f"{name} and {ours} differ"
    for _ in range(repeats):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            table[name]["times"].append(time.perf_counter() - began)
    for row in table.values():
        row["seconds"] = float(np.median(row["times"]))
    return table


def show(title: str, table: dict[str, dict[str, Any]], ours: str, operations: float) -> None:
    print(f"\n{title:42}{'seconds':>9}{'GFLOP/s':>10}{'x ' + ours:>14}  ids in common")
    for name, row in table.items():
        common = f"{row['ids_in_common']:.6f}" if "ids_in_common" in row else ""
        rate = ""
        if not name.startswith("prepare"):
            row["gflops"] = operations / row["seconds"] / 1e9
            rate = f"{row['gflops']:.1f}"
        print(
            f"{name:42}{row['seconds']:9.3f}{rate:>10}"
            f"{row['seconds'] / table[ours]['seconds']:14.2f}  {common}"
        )


def break_down(runs: dict[str, Callable[[], Any]], table: dict[str, dict[str, Any]]) -> None:
    """On a GPU: what the kernels of ours take."""
    for name in runs:
        if name.startswith("ours"):
            table[name]["kernels_us"] = kernel_times(runs[name])
            print(f"{name}: {kernel_lines(table[name]['kernels_us'], 12)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--Q", type=int, help="queries")
    parser.add_argument("--N", type=int, help="documents")
    parser.add_argument("--D", type=int, help="columns")
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--methods", nargs="*", help="fp32, bf16, int8; default: those that pay here")
    parser.add_argument("--tile_queries", type=int, default=0, help="0: topk_below's own")
    parser.add_argument("--block_documents", type=int, default=0, help="0: topk_below's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--output", default="", help="JSON file (a GPU's figures also go to benchmarks/results/)"
    )
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = args.device == "cpu"
    args.Q, args.N, args.D = (
        given or usual
        for given, usual in zip(
            (args.Q, args.N, args.D),
            (8192, 100_000, 1024) if on_cpu else (16_384, 2_000_000, 4096),
            strict=True,
        )
    )
    if on_cpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    queries, documents, positives = make_data(args.Q, args.N, args.D, args.device)
    methods = args.methods or (on_a_cpu() if on_cpu else ["bf16", "int8"])
    ours, stats = f"ours {methods[0]}", {method: SearchStats() for method in methods}
    print(
        f"Q={args.Q:,} N={args.N:,} D={args.D:,} k={args.k}, "
        f"{args.device}, {torch.get_num_threads()} threads",
        flush=True,
    )

    def search(
        method: str, k: int, ceilings: np.ndarray, exclude: Exclude | None = None
    ) -> Callable[[], Tensor]:
        stats[method] = SearchStats()
        return lambda: topk_below(
            queries, documents, ceilings, k, exclude, method=method, device=args.device, stats=stats[method],
            tile_queries=args.tile_queries, block_documents=args.block_documents,
        )[1]  # fmt: skip

    def prepare(method: str) -> Callable[[], None]:
        encode: Callable[[Tensor], Any] = METHODS[method](args.D, torch.device(args.device))
        if on_cpu and method == "int8":
            encode = Quantiser(queries).documents

        def run() -> None:
            for block in documents.split(args.block_documents or (2048 if on_cpu else 32768)):
                encode(block)

        return run

    no_ceiling = np.full(args.Q, np.inf)
    runs: dict[str, Callable[[], Any]] = {f"ours {m}": search(m, args.k, no_ceiling) for m in methods}
    runs["torch matmul + topk"] = lambda: torch_topk(queries, documents, args.k)
    runs["matmul alone"] = lambda: matmul_alone(queries, documents)
    runs |= {f"prepare rows {method}": prepare(method) for method in methods}
    if on_cpu and importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(args.D)
        index.add(documents.numpy())
        print(f"faiss {faiss.__version__}: {blas_kernel('faiss')}", flush=True)
        runs["faiss-cpu flat"] = lambda: index.search(queries.numpy(), args.k)[1]
    has_st = on_cpu and importlib.util.find_spec("sentence_transformers") is not None
    if has_st:
        from sentence_transformers.util import dot_score, semantic_search

        runs["sentence-transformers semantic_search"] = lambda: np.array(
            [[hit["corpus_id"] for hit in row] for row in semantic_search(queries, documents, top_k=args.k,
            score_function=dot_score)]
        )  # fmt: skip
    operations = 2 * args.Q * args.N * args.D
    topk = compare(runs, ours, args.repeats, args.device)
    for method in methods:
        topk[f"ours {method}"]["certified_share"] = stats[method].num_certified / (
            args.Q * (args.repeats + 1)
        )
        topk[f"ours {method}"]["exhaustive"] = stats[method].num_exhaustive
    show("top-k", topk, ours, operations)
    if not on_cpu:
        break_down(runs, topk)

    scores = pair_scores(queries.float(), torch.arange(args.Q, device=args.device), documents, positives)
    limits = ceiling(scores.cpu().numpy(), THRESHOLD)
    known = Exclude(np.arange(args.Q + 1), positives.cpu().numpy())
    runs = {f"ours {m}": search(m, NUM_NEGATIVES, limits, known) for m in methods}
    on_device = torch.from_numpy(limits).to(args.device)
    runs["torch matmul + mask + topk"] = lambda: torch_mine(queries, documents, on_device, positives)
    if has_st and importlib.util.find_spec("datasets"):
        runs["sentence-transformers mine_hard_negatives"] = sentence_transformers_mine(
            queries, documents, positives
        )
    mined = compare(runs, ours, args.repeats, args.device)
    show(f"{NUM_NEGATIVES} negatives below {THRESHOLD} x positive", mined, ours, operations)

    if not on_cpu:
        break_down(runs, mined)
        results = ResultsFile("mining")
        for what, table in (("topk", topk), ("mining", mined)):
            for variant, row in table.items():
                results.append(what=what, variant=variant, shape={n: vars(args)[n] for n in "QNDk"}, **row)
        print(f"\nwrote {results.path}")
    if args.output:
        name = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "hardware": name,
            "torch": torch.__version__,
            "faiss_blas": blas_kernel("faiss"),
            **vars(args),
            "topk": topk,
            "mining": mined,
        }
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


def on_a_cpu() -> list[str]:
    """What `auto` takes here first, and fp32."""
    return list(dict.fromkeys([pick_method(torch.device("cpu"), MANY_QUERIES), "fp32"]))


def blas_kernel(library: str) -> str:
    """ "OpenBLAS 0.3.15 SkylakeX": the kernel that the OpenBLAS in a package's files takes on this CPU, for
    good or bad."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return "BLAS not known without threadpoolctl"
    import threadpoolctl

    for pool in threadpoolctl.threadpool_info():
        if pool.get("internal_api") == "openblas" and library in pool["filepath"]:
            return f"OpenBLAS {pool['version']} {pool['architecture']}"
    return "BLAS not known"


if __name__ == "__main__":
    main()
