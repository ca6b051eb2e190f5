"""Saving, reading and merging on this disk, each beside a plain copy of the same bytes in the same run.

    python -m benchmarks.checkpoint [--parameters 2e8] [--sources 6] [--dtypes bf16 fp32] [--folder DIR]
    python -m benchmarks.checkpoint --only merge --mergekit /path/to/its/environment/bin/python

save    `Saver` of fp32 weights and both moments, one rank: how long it keeps training (beside copying the
        same tensors in memory), and bytes per second until the checkpoint is durable, sha256 included, beside
        shutil.copyfile + fsync of the files that it wrote
read    those files verified (sha256) and every weight read into memory, beside reading the same bytes and
        doing nothing
merge   the mean of N Hugging Face folders in a process of its own: seconds, bytes read per second, its share
        of the rate of two plain copies, peak memory, and how many weights are not the nearest to the real
        mean: the share of a sample in rational arithmetic, and the number of all in fp64. The copies: "all"
        writes every source's bytes again (shutil.copyfile, fsync), "least" reads every source and writes as
        many bytes as the merge does, which no merge can do without.

Before every timed read the files are dropped from the page cache (posix_fadvise DONTNEED; a file system that
ignores it makes all columns equally faster). Rounds are interleaved; medians. Needs about (2 N + 2) times the
bytes of one model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.ceilings import commit, cpu_name
from nemo_embed_core.checkpoint.manifest import state_name
from nemo_embed_core.checkpoint.runs import checkpoints
from nemo_embed_core.checkpoint.saver import Saver
from nemo_embed_core.checkpoint.weights import Rows, open_weights
from nemo_embed_core.checkpoint.write import Piece, save_checkpoint
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.export.folder import hf_config
from nemo_embed_core.files.durable import fsync, new_folder
from nemo_embed_core.files.safetensors import SafetensorsWriter, find_tensors
from nemo_embed_core.merge.average import exact_sum, nearest
from nemo_embed_core.merge.sources import open_sources
from nemo_embed_core.merge.stream import write_weights
from nemo_embed_core.model.spec import hf_shapes, parameter_shapes
from nemo_embed_core.options import to_dict
from nemo_embed_core.train.optim import STATE

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PIECE = 4 << 20  # values generated, bytes read and written at a time


def model_of(parameters: float) -> ModelConfig:
    """A Llama of this many parameters or up to a layer more, about a sixth of them in the embedding."""
    hidden = next(h for h in (4096, 2048, 1024, 256, 64) if 32 * h * h <= parameters / 5 or h == 64)
    layer = 27 * hidden * hidden // 2
    return ModelConfig(
        vocab_size=32 * hidden,
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=max(1, math.ceil((parameters - 32 * hidden * hidden) / layer)),
        num_attention_heads=max(4, hidden // 64),
        num_key_value_heads=max(2, hidden // 128),
    )


def write_source(folder: Path, config: ModelConfig, dtype: torch.dtype, seed: int) -> Path:
    """A Hugging Face folder whose weights differ from another seed's by about 5 %, as those of sister runs
    do."""
    folder.mkdir(parents=True)
    shapes = hf_shapes(config)
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + seed)
    pool = min(PIECE, max(torch.Size(shape).numel() for shape in shapes.values()))
    base = torch.randn(pool, generator=common) * 0.02
    noise = torch.randn(pool, generator=own) * 0.001
    turn = 0
    entries = {name: (dtype, shape) for name, shape in shapes.items()}
    with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
        for shape in shapes.values():
            left = torch.Size(shape).numel()
            while left:
                turn += 1  # other sums at every place, without generating them
                values = (base.roll(977 * turn) + noise.roll(1009 * turn))[:left]
                writer.write(values.to(dtype))
                left -= len(values)
        writer.close()
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(hf_config(config, name, {})))
    return folder


def forget(paths: Sequence[Path]) -> None:
    """Out of the page cache, so that the next read comes from the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def copy(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir()
    for i, path in enumerate(paths):
        target = folder / str(i)
        shutil.copyfile(path, target)
        fd = os.open(target, os.O_RDONLY)
        fsync(fd)
        os.close(fd)


def read(paths: Sequence[Path]) -> None:
    piece = bytearray(PIECE)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(piece):
                # Pages of one file for the next: taking new ones from a virtual machine's host costs more
                # than the disk.
                os.posix_fadvise(file.fileno(), 0, file.tell() - n, os.POSIX_FADV_DONTNEED)


def read_and_write(paths: Sequence[Path], target: Path, size: int) -> None:
    read(paths)
    piece = bytes(PIECE)
    with target.open("xb", buffering=0) as file:
        for start in range(0, size, PIECE):
            file.write(piece[: size - start])
        fsync(file.fileno())


# ------------------------------------------------------------------------------------------ save and read


def bench_save(folder: Path, config: ModelConfig, repeats: int) -> dict[str, Any]:
    shapes = parameter_shapes(config)
    values = {
        tensor: torch.rand(shape)
        for name, shape in shapes.items()
        for tensor in (name, *(state_name(state, name) for state in STATE))
    }
    pieces = {n: Piece(tuple(x.shape), ((0,) * x.dim(), tuple(x.shape)), x) for n, x in values.items()}
    twins = {name: torch.empty_like(value) for name, value in values.items()}
    model = to_dict(config)
    training = {"seed": 0, "global_batch_size": 1, "init_from": "", "data": {}}
    training["data"] = {
        "num_hard_negatives": 0,
        "query_max_length": 1,
        "document_max_length": 1,
        "datasets": [],
    }
    meta = {"model": model, "config": training, "export_dtype": "float32", "ledger": "", "data_digest": ""}
    root = folder / "run"
    root.mkdir()
    write = partial(
        save_checkpoint,
        root,
        rank=0,
        world_size=1,
        keep=1,
        gather=lambda value: [value],
        log=lambda message: None,
    )
    saver = Saver(write, log=lambda message: None)
    size = sum(value.nbytes for value in values.values())
    rows: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        rows.setdefault(name, []).append(value)

    for step in range(repeats + 1):  # the first one makes the host buffers

        def both() -> None:
            saver.save(step, pieces, meta=meta, extra_files={})  # noqa: B023
            saver.wait()

        add("save_s", seconds(both))
        add("stall_s", saver.take_stall())
        add("memory_copy_s", seconds(lambda: [twins[name].copy_(value) for name, value in values.items()]))
        found = checkpoints(root)[0]
        files = sorted(found.glob("*.safetensors"))
        forget(files)
        add("copy_s", seconds(lambda: copy(files, folder / "copied")))  # noqa: B023
        shutil.rmtree(folder / "copied")
    weights = [path for path in files if path.name.startswith("model-")]
    for _ in range(repeats):
        forget(weights)
        add("read_s", seconds(lambda: read_all(root)))
        forget(weights)
        add("plain_read_s", seconds(lambda: read(weights)))
    figures = {
        name: statistics.median(times[1:] if len(times) > repeats else times) for name, times in rows.items()
    }
    return {
        "bytes": size,
        **figures,
        "stall_x_copy": figures["stall_s"] / figures["memory_copy_s"],
        "save_x_copy": figures["copy_s"] / figures["save_s"],
        "read_bytes": sum(path.stat().st_size for path in weights),
        "read_x_plain": figures["plain_read_s"] / figures["read_s"],
    }


def read_all(run: Path) -> None:
    source = open_weights(str(run))
    for name, shape in parameter_shapes(source.model).items():
        source.reader.read_box(name, ((0,) * len(shape), shape))


# ------------------------------------------------------------------------------------------ merge


def merge_here(output: Path, paths: Sequence[str]) -> dict[str, float]:
    """In a process of its own: the merge, with the memory that it takes on top of the imports'."""
    torch.zeros(1 << 20).double().dot(torch.ones(1 << 20).double())  # what torch loads at the first use
    before = _resident()
    # Linux: forget the peak of the imports. Where that is not allowed, the peak includes them.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    with new_folder(output) as folder:
        sources = open_sources(paths)
        write_weights(folder, sources, sources[0].dtype)
    return {"seconds": time.perf_counter() - began, "resident_before": before, "resident_peak": _peak()}


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    try:
        return _status("VmHWM")
    except StopIteration:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_merge(output: Path, sources: Sequence[Path]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--merge-here", str(output), *map(str, sources)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def run_mergekit(python: str, output: Path, sources: Sequence[Path], dtype: torch.dtype) -> dict[str, float]:
    """`mergekit-yaml` of another environment; the time is its own process's, imports included."""
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in sources]
    recipe = {"merge_method": "linear", "models": models, "dtype": str(dtype).removeprefix("torch.")}
    recipe_file = output.with_suffix(".yaml")
    recipe_file.write_text(json.dumps(recipe))  # JSON is YAML
    tool = Path(python).parent / "mergekit-yaml"
    began = time.perf_counter()
    command = [tool, recipe_file, output, "--no-copy-tokenizer"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # of this process alone, unlike RUSAGE_CHILDREN
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{tool} ended with code {process.returncode}")
    return {"seconds": time.perf_counter() - began, "resident_peak": usage.ru_maxrss * 1024}


def wrongly_rounded(output: Path, sources: Sequence[Path], dtype: torch.dtype, sample: int) -> float:
    """The share of `sample` weights of the output that are not the value of dtype nearest to the mean,
    exactly computed."""
    files = sorted(output.glob("*.safetensors"))
    where = {name.removeprefix("model."): (f, v) for f in files for name, v in find_tensors(f).items()}
    opened = [open_weights(str(path), hashed=False) for path in sources]
    shapes, rng, wrong = hf_shapes(opened[0].model), random.Random(0), 0
    names = list(shapes)
    rows = [Rows(source) for source in opened]
    sizes = [torch.Size(shapes[name]).numel() for name in names]
    for _ in range(sample):
        name = rng.choices(names, sizes)[0]
        columns = torch.Size(shapes[name][1:]).numel()
        row, column = rng.randrange(shapes[name][0]), rng.randrange(columns)
        values = []
        for source in rows:
            block = torch.empty(1, columns, dtype=source.dtypes[name])
            source.read(name, row, block)
            values.append(block[0, column].item())
        file, (kind, _, start) = where[name]
        with file.open("rb", buffering=0) as handle:
            handle.seek(start + (row * columns + column) * kind.itemsize)
            got = torch.frombuffer(bytearray(handle.read(kind.itemsize)), dtype=kind)[0]
        wrong += bool(got.double() != nearest(exact_sum(values, None), dtype).double())
    for source in rows:
        source.close()
    return wrong / sample


def wrongly_rounded_of_all(output: Path, sources: Sequence[Path], dtype: torch.dtype) -> int:
    """How many weights are farther from the mean than a neighbour, or as far and odd: N times both, in fp64.

    Without an error for sums of at most 53 bits: bf16, and fp32 whose magnitudes are not a billion apart.
    """
    opened = [safe_open(path / "model.safetensors", "pt") for path in (output, *sources)]
    wrong = 0
    for name in opened[0].keys():  # noqa: SIM118 (not a dict)
        for got, *values in zip(
            *(file.get_tensor(name).view(-1).split(PIECE) for file in opened), strict=True
        ):
            total = sum(x.double() for x in values)
            is_odd = (got.view(torch.int16 if dtype.itemsize == 2 else torch.int32) & 1).bool()
            distance = (got.double() * len(values) - total).abs()
            worse = torch.zeros_like(is_odd)
            for end in (-torch.inf, torch.inf):
                neighbour = torch.nextafter(got, torch.full_like(got, end)).double()
                other = (neighbour * len(values) - total).abs()
                worse |= (other < distance) | ((other == distance) & is_odd)
            wrong += int(worse.sum())
    return wrong


def bench_merge(folder: Path, config: ModelConfig, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    dtype = DTYPES[kind]
    sources = [write_source(folder / f"{kind}-{i}", config, dtype, i) for i in range(options.sources)]
    files = [path / "model.safetensors" for path in sources]
    size, output = files[0].stat().st_size, folder / "merged"
    times: dict[str, list[float]] = {"all": [], "least": [], "merge": []}
    memory: list[dict[str, float]] = []
    for _ in range(options.repeats):
        forget(files)
        times["all"].append(seconds(lambda: copy(files, folder / "copied")))
        shutil.rmtree(folder / "copied")
        forget(files)
        shutil.rmtree(output, ignore_errors=True)
        memory.append(run_merge(output, sources))
        times["merge"].append(memory[-1]["seconds"])
        forget(files)
        times["least"].append(seconds(lambda: read_and_write(files, folder / "written", size)))
        (folder / "written").unlink()
    figures = {name: statistics.median(values) for name, values in times.items()}
    largest = max(torch.Size(shape).numel() for shape in hf_shapes(config).values()) * dtype.itemsize
    growth = max(m["resident_peak"] - m["resident_before"] for m in memory)
    result: dict[str, Any] = {
        "dtype": kind,
        "bytes_read": sum(path.stat().st_size for path in files),
        "bytes_written": size,
        "seconds": {name: [round(t, 4) for t in values] for name, values in times.items()},
        "merge_s": figures["merge"],
        "x_copy_all": figures["all"] / figures["merge"],
        "x_copy_least": figures["least"] / figures["merge"],
        "resident_peak": max(m["resident_peak"] for m in memory),
        "resident_growth": growth,
        "largest_tensor": largest,
        "growth_above_largest_tensor": growth - largest,
        "sample": options.sample,
        "wrongly_rounded": wrongly_rounded(output, sources, dtype, options.sample),
        "wrongly_rounded_of_all": wrongly_rounded_of_all(output, sources, dtype),
    }
    if options.mergekit:
        peer = folder / "mergekit"
        forget(files)
        theirs = run_mergekit(options.mergekit, peer, sources, dtype)
        theirs["wrongly_rounded"] = wrongly_rounded(peer, sources, dtype, options.sample)
        result["mergekit"] = theirs
        shutil.rmtree(peer)
    for path in (*sources, output):
        shutil.rmtree(path)
    return result


# ------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=2e8)
    parser.add_argument("--sources", type=int, default=6)
    parser.add_argument(
        "--dtypes", nargs="+", choices=sorted(DTYPES), default=["bf16", "fp32"], help="of the sources"
    )
    parser.add_argument("--only", choices=("save", "merge"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, default=20_000, help="weights checked in rational arithmetic")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; default: a temporary one; emptied afterwards"
    )
    parser.add_argument(
        "--mergekit", metavar="PYTHON", help="of an environment with mergekit, to compare with"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--merge-here", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.merge_here:
        print(json.dumps(merge_here(Path(options.merge_here[0]), options.merge_here[1:])))
        return 0

    config = model_of(options.parameters)
    num_parameters = sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    report: dict[str, Any] = {
        "benchmark": "checkpoint",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": [
            "python",
            "-m",
            "benchmarks.checkpoint",
            *(arguments if arguments is not None else sys.argv[1:]),
        ],
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "torch": torch.__version__,
        "model": to_dict(config),
        "parameters": num_parameters,
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-", dir=options.folder) as name:
        folder = Path(name)
        print(
            f"{num_parameters:,} parameters, {report['cpu']}, {report['cores']} cores, "
            f"load {report['load_before'][0]:.1f}"
        )
        if options.only != "merge":
            s = report["save"] = bench_save(folder, config, options.repeats)
            shutil.rmtree(folder / "run")
            gb = s["bytes"] / 1e9
            print(f"save   {gb:.2f} GB of fp32 weights and moments")
            print(
                f"       training waits {s['stall_s']:.3f} s, "
                f"{s['stall_x_copy']:.2f} x copying them in memory"
            )
            print(
                f"       durable after {s['save_s']:.2f} s, {gb / s['save_s']:.2f} GB/s, "
                f"{s['save_x_copy']:.2f} x the rate of a copy"
            )
            print(
                f"read   {s['read_bytes'] / 1e9:.2f} GB of weights verified and read in {s['read_s']:.2f} s, "
                f"{s['read_bytes'] / 1e9 / s['read_s']:.2f} GB/s, "
                f"{s['read_x_plain']:.2f} x the rate of reading alone"
            )
        if options.only != "save":
            report["merge"] = []
            print(
                f"merge  {options.sources} sources   seconds   GB/s read   x copy all   x copy least   MB "
                f"above   wrong   of all"
            )
            for kind in options.dtypes:
                r = bench_merge(folder, config, kind, options)
                report["merge"].append(r)
                rate = r["bytes_read"] / 1e9 / r["merge_s"]
                print(
                    f"       {kind:12}{r['merge_s']:8.2f}{rate:12.2f}"
                    f"{r['x_copy_all']:13.2f}{r['x_copy_least']:15.2f}"
                    f"{r['growth_above_largest_tensor'] / 1e6:11.0f}"
                    f"{r['wrongly_rounded']:8.4%}{r['wrongly_rounded_of_all']:9}",
                    flush=True,
                )
                if "mergekit" in r:
                    theirs = r["mergekit"]
                    print(
                        f"       mergekit    "
                        f"{theirs['seconds']:8.2f}{r['bytes_read'] / 1e9 / theirs['seconds']:12.2f}{'':28}"
                        f"{(theirs['resident_peak'] - r['largest_tensor']) / 1e6:11.0f}"
                        f"{theirs['wrongly_rounded']:8.2%}"
                    )
            print(
                "MB above: peak resident memory minus that after the imports and minus the largest tensor "
                "(mergekit: of all)"
            )
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
