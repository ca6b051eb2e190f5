"""What this card can do at most: bytes copied per second, and bf16, fp8 and int8 products at the models'
layer shapes.

    python -m benchmarks.ceilings [--tokens 8192 16384] [--models 1b 8b]

Every other benchmark states its figures as a share of these, measured on the same card. Prints a table and
appends one JSON line per figure to benchmarks/results/. Also holds the stopwatch and the results file of the
other benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

from nemo_embed_core import version

RESULTS = Path(__file__).parent / "results"

# model -> {layer: (in, out)}: the GEMMs of a Llama-3 block as this repository fuses them
LAYERS = {
    "1b": {"qkv": (2048, 3072), "o": (2048, 2048), "gate_up": (2048, 16384), "down": (8192, 2048)},
    "8b": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
}


def commit() -> str:
    """Of the tree that runs; COMMIT in the environment names it where a copy has no history."""
    sha, is_changed = version.commit()
    return os.environ.get("COMMIT") or (sha or "unknown") + ("+changes" if is_changed else "")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


class ResultsFile:
    """JSON lines, one per figure, written as soon as it is known: what stops half-way loses nothing.

    device: "cpu" for figures that no GPU has a part in; "gpu" and "sms" are then the processor and its cores.
    """

    def __init__(self, benchmark: str, device: str = "cuda"):
        started = datetime.now(UTC)
        if device == "cpu":
            where, cores = cpu_name(), len(os.sched_getaffinity(0))
        else:
            properties = torch.cuda.get_device_properties(0)
            where, cores = properties.name, properties.multi_processor_count
        self.run = {
            "benchmark": benchmark,
            "date": started.isoformat(timespec="seconds"),
            "commit": commit(),
            "gpu": where,
            "sms": cores,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        RESULTS.mkdir(exist_ok=True)
        self.path = RESULTS / f"{benchmark}-{started:%Y%m%d-%H%M%S}.jsonl"

    def append(self, **figures: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(self.run | figures) + "\n")


# No host needs longer for a launch: a call that is late behind it waits for the GPU itself.
_LONGEST_SLEEP_MS = 20.0


def interleaved_times(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """GPU milliseconds of every call, in rounds: one of each, `repeats` times, so that clocks and neighbours
    are shared.

    Before each call the GPU is put to sleep for longer than the host needs to launch the call, so that launch
    overhead is not measured (a kernel of 5 us behind a launch of 50 us). A host that was slower than that is
    found out, as the GPU has then passed the start of the call before all of it was launched: the call is
    timed again behind a longer sleep. (Of a call that waits for the GPU itself, the launches are part.) What
    a call returns is kept alive until its time is taken, so that its outputs cannot be written into a buffer
    that is still in the cache.
    """
    sleep_ms = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        kept = call()
        sleep_ms[name] = 2e3 * (time.perf_counter() - begin) + 0.2
        torch.cuda.synchronize()
        del kept
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            while True:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(int(sleep_ms[name] * 2e6))  # cycles of a clock of at most 2 GHz
                start.record()
                kept = call()
                late = start.query()
                stop.record()
                torch.cuda.synchronize()
                del kept
                if not late or sleep_ms[name] > _LONGEST_SLEEP_MS:
                    break
                sleep_ms[name] *= 2
            times[name].append(start.elapsed_time(stop))
    return times


def kernel_times(call: Callable[[], object], calls: int = 1) -> dict[str, float]:
    """{kernel, without its template arguments: GPU microseconds of all its launches by one of the `calls`
    that call() makes}, longest first.

    From the card's own record of activity (CUPTI), so without what lies between launches: where the sum is
    far below what interleaved_times says, the time is lost there.
    """
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key.removeprefix("void ").split("<")[0]
        times[name] = times.get(name, 0.0) + event.self_device_time_total / calls
    return dict(sorted(((name, us) for name, us in times.items() if us > 0), key=lambda item: -item[1]))


def kernel_lines(times: Mapping[str, float], most: int = 8) -> str:
    """ "12.3 us first_kernel, 4.5 us second_kernel": the `most` longest; the rest as a sum."""
    longest = list(times.items())[:most]
    rest = sum(times.values()) - sum(us for _, us in longest)
    parts = [f"{us:.1f} us {name}" for name, us in longest]
    return ", ".join(parts + ([f"{rest:.1f} us others"] if len(times) > most else []))


def copy_bandwidth(gib: float = 2.0, repeats: int = 30) -> float:
    """GB/s, read plus write, of a device-to-device copy much larger than the L2 cache."""
    source = torch.randint(0, 2**31 - 1, (int(gib * 2**28),), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = interleaved_times({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e6


def matmul_call(kind: str, rows: int, inner: int, columns: int) -> Callable[[], torch.Tensor]:
    """[rows, inner] @ [inner, columns] of random numbers; the second factor as a weight [columns, inner],
    transposed."""
    if kind == "bf16":
        a = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16)
        return lambda: torch.mm(a, b.t())
    if kind == "fp8":  # e4m3, one scale per tensor, output bf16
        a = torch.randn(rows, inner, device="cuda").to(torch.float8_e4m3fn)
        b = torch.randn(columns, inner, device="cuda").to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        return lambda: torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    a = torch.randint(-127, 128, (rows, inner), device="cuda", dtype=torch.int8)
    b = torch.randint(-127, 128, (columns, inner), device="cuda", dtype=torch.int8)
    return lambda: torch._int_mm(a, b.t())


def matmul_rates(
    rows: int, inner: int, columns: int, kinds: list[str], repeats: int = 20
) -> dict[str, float | str]:
    """TFLOP/s (TOP/s for int8) of each kind, or why this torch or card cannot do it."""
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    rates: dict[str, float | str] = {}
    for kind in kinds:
        try:
            call = matmul_call(kind, rows, inner, columns)
            call()
            calls[kind] = call
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            rates[kind] = f"not measured: {str(error).splitlines()[0][:120]}"
    for kind, times in interleaved_times(calls, repeats).items():
        rates[kind] = 2 * rows * inner * columns / statistics.median(times) / 1e9
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[16384], help="rows of the products (default 16384)"
    )
    parser.add_argument("--models", nargs="+", choices=sorted(LAYERS), default=sorted(LAYERS))
    parser.add_argument(
        "--kinds", nargs="+", choices=["bf16", "fp8", "int8"], default=["bf16", "fp8", "int8"]
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("ceilings: no CUDA device on this machine, nothing to measure")
        return
    results = ResultsFile("ceilings")
    bandwidth = copy_bandwidth()
    print(f"{results.run['gpu']}, torch {torch.__version__}\ncopy {bandwidth:8.0f} GB/s (read + write)")
    results.append(what="copy", gb_per_s=bandwidth)
    shapes = [("square", 8192, 8192, 8192)]
    for model in options.models:
        for layer, (inner, columns) in LAYERS[model].items():
            shapes += [(f"{model} {layer}", tokens, inner, columns) for tokens in options.tokens]
    print(
        f"{'GEMM':12s} {'shape':>22s}"
        + "".join(f"{kind:>10s}" for kind in options.kinds)
        + "   TFLOP/s, TOP/s"
    )
    for name, rows, inner, columns in shapes:
        rates = matmul_rates(rows, inner, columns, options.kinds)
        cells = "".join(
            f"{rate:10.0f}" if isinstance(rate, float) else f"{'-':>10s}" for rate in rates.values()
        )
        print(f"{name:12s} {f'{rows} x {inner} x {columns}':>22s}{cells}", flush=True)
        for reason in {rate for rate in rates.values() if isinstance(rate, str)}:
            print(f"{'':12s} {reason}")
        results.append(what=name, rows=rows, inner=inner, columns=columns, tera_per_s=rates)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
