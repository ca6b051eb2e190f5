"""Training and encoding in fp8 beside bf16 (on a CPU: fp32), from one seed on the same rows: what it costs.

    python -m benchmarks.fp8 [--steps 1000 --output runs/fp8 --kernels]

A small model is trained on the docstrings of the installed packages (the demo's data) by `precision: auto`
and by `precision: fp8`, then encodes a split that neither saw. Printed are the mean losses of both curves'
first and last hundred steps, nDCG@10 with the paired 95 % interval of the difference (bootstrap over
queries), and cosines of the fp8-trained model's vectors under both precisions. The exit code is 1 when a gate
fails:

    every loss is finite; the last hundred are at most 3 % above auto's; the interval of nDCG reaches -0.01;
    the cosine of the fp8-trained model in auto and in fp8 is at least 0.995 on average and 0.97 anywhere

Without a CUDA device products in fp8 are emulated, and nothing is timed. --kernels: first the times of
quantising and of a product at the 8B's shapes, as shares of a copy and beside bf16; that alone on a GPU with
--steps 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.ceilings import ResultsFile, copy_bandwidth, interleaved_times
from nemo_embed_core.config import ParallelConfig, TrainConfig
from nemo_embed_core.data.prompts import query_prompt
from nemo_embed_core.demo.stages import TASK, prepare_data
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.kernels.fp8 import E4M3, E5M2, amax, quantize, scaled_mm
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
LOSS, NDCG, COSINE, WORST_COSINE = 1.03, -0.01, 0.995, 0.97  # the gates
SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}  # in, out


def train(folder: Path, precision: str, steps: int) -> list[float]:
    """The loss of every step; the run is left in folder/precision."""
    config = TrainConfig.from_yaml(
        ROOT / "configs/train-demo-random-stage1.yaml", output_dir=str(folder / precision), steps=steps,
        precision=precision, global_batch_size=12, log_every=100, tokenizer=str(folder / "data/tokenizer"),
        model={"num_hidden_layers": 2}, optim={"lr": 1e-3, "warmup_steps": min(50, steps // 2)},
        data={
            "datasets": [{"path": str(folder / "data/stage1.jsonl"), "task": TASK}],
            "cache_dir": str(folder / "cache"), "query_max_length": 32, "document_max_length": 32,
        },
    )  # fmt: skip
    with distributed(ParallelConfig(), config.device, config.model) as mesh:
        Trainer(config, mesh, prepare(config), print).run()
    lines = (folder / precision / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def vectors(folder: Path, run: str, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the queries and the passages of the demo's dev split."""
    embedder = Embedder.load(folder / run, precision=precision, max_tokens=4096)
    queries, passages = (texts_of(folder / f"data/dev/{name}.jsonl") for name in ("queries", "corpus"))
    return (
        embedder.encode(list(queries.values()), query_prompt(TASK), max_length=32),
        embedder.encode(list(passages.values()), max_length=32),
    )


def texts_of(path: Path) -> dict[str, str]:
    return {row["_id"]: row["text"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def ndcg(folder: Path, rows: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """nDCG@10 of each query; a passage is relevant or not."""
    queries, passages = (list(texts_of(folder / f"data/dev/{name}.jsonl")) for name in ("queries", "corpus"))
    column = {name: i for i, name in enumerate(passages)}
    relevant: dict[str, set[int]] = {query: set() for query in queries}
    for line in (folder / "data/dev/qrels/test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, passage, _ = line.split("\t")
        relevant[query].add(column[passage])
    discount = 1 / np.log2(np.arange(2, 12))
    best = np.argsort(-(rows[0] @ rows[1].T), axis=1, kind="stable")[:, :10]
    return np.array(
        [
            (discount * [place in relevant[query] for place in places]).sum()
            / discount[: len(relevant[query])].sum()
            for query, places in zip(queries, best, strict=True)
        ]
    )


def interval(differences: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95 % of the mean, by bootstrap."""
    rng, n = np.random.default_rng(0), len(differences)
    means = [differences[rng.integers(0, n, n)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def faults(
    losses: Mapping[str, list[float]], difference: tuple[float, float], cosines: np.ndarray
) -> list[str]:
    """The gates that fail."""
    ends = {name: statistics.fmean(values[-100:]) for name, values in losses.items()}
    checks = {
        "a loss is not finite": all(np.isfinite(values).all() for values in losses.values()),
        f"the last losses are more than {LOSS - 1:.0%} above auto's": ends["fp8"] <= LOSS * ends["auto"],
        f"the interval of nDCG@10 ends below {NDCG}": difference[1] >= NDCG,
        f"cosines are below {COSINE} on average": cosines.mean() >= COSINE,
        f"a cosine is below {WORST_COSINE}": cosines.min() >= WORST_COSINE,
    }
    return [fault for fault, passed in checks.items() if not passed]


def time_kernels(tokens: int = 16384, repeats: int = 20) -> None:
    """Quantising an input and a gradient of each product, and the product, beside bf16."""
    results, ceiling = ResultsFile("fp8"), copy_bandwidth()
    print(f"{tokens:,} tokens; a copy at {ceiling:.0f} GB/s; to {results.path}")
    for name, (inner, out) in SHAPES.items():
        x, w = (torch.randn(rows, inner, device="cuda").bfloat16() for rows in (tokens, out))
        largest, w8 = amax(x), quantize(w, amax(w), E4M3)
        x8 = quantize(x, largest, E4M3)

        def product(fast: bool, x8=x8, w8=w8) -> Callable[[], object]:  # type: ignore[no-untyped-def]
            return lambda: scaled_mm(x8.rows, x8.scale, w8.rows, w8.scale, fast=fast)

        calls: dict[str, tuple[Callable[[], object], int]] = {  # and bytes an element of x; 0: a product
            "amax": (lambda x=x: amax(x), 2),  # type: ignore[misc]
            "quantise": (lambda x=x, a=largest: quantize(x, a, E4M3), 3),  # type: ignore[misc]
            "both layouts": (lambda x=x, a=largest: quantize(x, a, E5M2, columns=True), 4),  # type: ignore[misc]
            "bf16 product": (lambda x=x, w=w: x @ w.t(), 0),  # type: ignore[misc]
            "fp8 product": (product(True), 0),
            "fp8 product, exact sums": (product(False), 0),
        }
        times = interleaved_times({what: call for what, (call, _) in calls.items()}, repeats)
        for what, (_, moved) in calls.items():
            ms = statistics.median(times[what])
            if moved:
                rate = moved * x.numel() / ms / 1e6
                figures, shown = {"gb_per_s": rate}, f"{rate:6.0f} GB/s {rate / ceiling:6.1%}"
            else:
                rate = 2 * tokens * inner * out / ms / 1e9
                figures, shown = {"tflop_per_s": rate}, f"{rate:6.0f} TFLOP/s"
            print(f"  {name:8s} {what:24s} {ms:8.3f} ms  {shown}")
            results.append(matrix=name, what=what, tokens=tokens, ms=ms, **figures)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of each run; 0: none (default 1000)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/fp8"), help="data and runs (default runs/fp8)"
    )
    parser.add_argument("--kernels", action="store_true", help="time the kernels first")
    options = parser.parse_args(arguments)
    if options.kernels and not torch.cuda.is_available():
        print("no CUDA device on this machine: no kernel is timed")
    elif options.kernels:
        time_kernels()
    if not options.steps:
        return
    folder = options.output
    if not (folder / "data/tokenizer").is_dir():
        prepare_data(folder / "data")
    losses = {precision: train(folder, precision, options.steps) for precision in ("auto", "fp8")}
    rows = {pair: vectors(folder, *pair) for pair in (("auto", "auto"), ("fp8", "auto"), ("fp8", "fp8"))}
    on_gpu = torch.cuda.is_available()
    where = "auto is bf16" if on_gpu else "no GPU: auto is fp32, and products in fp8 are emulated"
    print(f"{options.steps} steps; {where}")
    for name, values in losses.items():
        first, last = statistics.fmean(values[:100]), statistics.fmean(values[-100:])
        print(f"  loss {name:4s}: {first:.4f} in the first hundred steps, {last:.4f} in the last")
    scores = {pair: ndcg(folder, found) for pair, found in rows.items()}
    for (run, precision), values in scores.items():
        print(f"  nDCG@10 of the {run} run, encoded in {precision}: {values.mean():.4f}")
    difference = interval(scores["fp8", "fp8"] - scores["auto", "auto"])
    print(f"  nDCG@10, all fp8 less all auto: 95 % in [{difference[0]:+.4f}, {difference[1]:+.4f}]")
    pairs = zip(rows["fp8", "auto"], rows["fp8", "fp8"], strict=True)
    cosines = np.concatenate([(a.astype(np.float64) * b).sum(1) for a, b in pairs])
    print(f"  cosine of the fp8 run in auto and in fp8: {cosines.mean():.5f}, at least {cosines.min():.5f}")
    if found := faults(losses, difference, cosines):
        raise SystemExit(f"gate failed: {'; '.join(found)}")
    print("every gate passed")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
