"""A training step, encoding, and what a step is made of, at Llama shapes, beside other libraries.

    python -m benchmarks.step                               the whole 8B, then the 1B: 4.5 minutes of an H200
    python -m benchmarks.step --shape 8b --layers 8         quick: every line and row says so
    python -m benchmarks.step --shape tiny --device cpu      what a machine without a GPU runs by itself

Ours is the code that trains: packed micro-batches, train/engine.py, clipping, AdamW with exact masters. Peers
(step_peers.py, step_libraries.py) get the same groups and the same loss; each passes a gate before it is
timed: losses, embeddings and gradients equal ours. One model after another, as the states of two do not fit
on a card; what matters most comes first, and what --minutes have no time for is said.

Only *useful* tokens count, never padding. MFU is train/metrics.py: training_flops of the useful tokens (6 P T
+ full attention, no embedding, no recomputation) over the datasheet's dense bf16 peak; encoding counts a
third of it. Needs torch, triton and numpy; peers take part when their packages can be imported.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.ceilings import ResultsFile, matmul_rates
from benchmarks.step_data import SHAPES, with_layers
from benchmarks.step_report import CpuResults, Report
from benchmarks.step_runs import PEERS, Bench
from nemo_embed_core.config import ParallelConfig
from nemo_embed_core.parallel.mesh import distributed, pick_device
from nemo_embed_core.train.metrics import device_peak_flops


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="", help="of 1b, 8b, tiny, with commas; default: 8b,1b on a GPU, tiny on a CPU")
    add("--only", default="", help="of train, encode, profile; default: all on a GPU, train on a CPU")
    add("--layers", type=int, default=0, help="quick: so many instead of all, with as small a share of the "
        "vocabulary; every line and row of the results says so")  # fmt: skip
    add("--queries", type=int, default=0, help="per optimizer step; default: 28, 4 on a CPU")
    add("--tokens", type=int, default=0, help="of our micro-batch; encoding packs twice as many; "
        "default: 16384, 8192 on a CPU")  # fmt: skip
    add("--encode-tokens", type=int, default=0, help="default: 65536, 4096 on a CPU")
    add("--peers", default="auto", help=f"of {', '.join(PEERS)}, or none; auto: those of installed packages")
    add("--peer-batches", type=_numbers, default=[], help="queries per micro-batch, as 1,4,16")
    add("--activation-checkpointing", default="", choices=["none", "selective", "full"],
        help="of ours; default: selective for the whole 8B, else none")  # fmt: skip
    add("--master-weights", default="", choices=["fp32", "split"],
        help="optim.master_weights of ours; default: split in bf16; the whole 8B also with fp32 and 8,192 "
        "tokens")  # fmt: skip
    add("--moments", default="fp32", choices=["fp32", "bf16", "8bit"],
        help="optim.moments of ours; bf16 and 8bit with split masters; default: fp32")  # fmt: skip
    add("--no-compile", dest="compile", action="store_false", help="skip the compiled peers")
    add("--seconds", type=float, default=0, help="per comparison; default: 6, 20 on a CPU")
    add("--minutes", type=float, default=0, help="begin nothing that would end later; default: 4.5, no limit "
        "on a CPU")  # fmt: skip
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--precision", default="auto", choices=["auto", "bf16", "fp8", "fp32"],
        help="fp8: of ours, beside peers in bf16; default on a GPU: bf16, and the whole 8B and encoding also "
        "in fp8")  # fmt: skip
    add("--output", default="", help="JSON lines of a run on a CPU; on a GPU they go to benchmarks/results/")
    args = parser.parse_args(argv)
    cuda = pick_device(args.device).type == "cuda"
    args.shape = (args.shape or ("8b,1b" if cuda else "tiny")).split(",")
    args.only = (args.only or ("train,profile,encode" if cuda else "train")).split(",")
    args.peers = args.peers.split(",")
    for given, known, name in (
        (args.shape, SHAPES, "--shape"),
        (args.only, ("train", "encode", "profile"), "--only"),
        (args.peers, (*PEERS, "auto", "none"), "--peers"),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    args.sized = bool(args.tokens or args.queries)
    args.tokens = args.tokens or (16384 if cuda else 8192)
    args.queries = args.queries or (28 if cuda else 4)  # 28: one full micro-batch of 16384
    args.encode_tokens = args.encode_tokens or (65536 if cuda else 4096)
    args.seconds = args.seconds or (6 if cuda else 20)
    args.minutes = args.minutes or (4.5 if cuda else float("inf"))
    args.rounds = (2, 20) if cuda else (1, 5)
    args.compile = args.compile and cuda
    half = args.precision in ("bf16", "fp8") or (args.precision == "auto" and cuda)
    if args.master_weights == "split" and not half:
        parser.error("--master-weights split keeps bf16 weights: give --precision bf16 too")
    if args.moments != "fp32" and (not half or args.master_weights == "fp32"):
        parser.error(f"--moments {args.moments} is of split masters: give --precision bf16, no fp32 masters")
    args.dtype = torch.bfloat16 if half else torch.float32
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    began, args = time.monotonic(), parse(argv)
    device, results = pick_device(args.device), None
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        results = CpuResults(Path(args.output) if args.output else None)
    whole = all(with_layers(shape, args.layers) == SHAPES[shape] for shape in args.shape)
    quick = "" if whole else f"{args.layers} layers, not the whole model"
    report = Report(results or ResultsFile("step"), quick, 60 * args.minutes, began=began)
    if device.type == "cuda":
        gemm = matmul_rates(8192, 8192, 8192, ["bf16"])["bf16"]
        assert isinstance(gemm, float), gemm
        report.append(what="gemm", shape=[8192, 8192, 8192], tflops=gemm)
        if args.dtype == torch.bfloat16:
            report.ceilings["of_gemm"] = gemm * 1e12
            if peak := device_peak_flops(device):
                report.ceilings["mfu"] = peak
        where = f"{report.results.run['gpu']}: bf16 GEMM of 8192^3 at {gemm:.0f} TFLOP/s"
        report.say(f"{where}; to {report.results.path}")
    else:
        threads, load, cpu = (report.results.run[key] for key in ("threads", "load", "cpu"))
        report.say("no CUDA device is used: the correctness gate, and a tiny model on the CPU")
        report.say(f"{cpu}; {threads} threads, load before the start {load}")
    with distributed(ParallelConfig(), device.type) as mesh:
        bench = Bench(args, mesh, report)
        if not bench.passes_gate("plain"):
            report.say("nothing is timed")
            return 1
        for shape in args.shape:
            bench.run(shape)
    report.say(f"\n{time.monotonic() - began:.0f} s in all")
    return 0 if bench.fine else 1


if __name__ == "__main__":
    sys.exit(main())
