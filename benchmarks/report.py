"""The newest results of every benchmark as one page: python -m benchmarks.report > docs/benchmarks.md (make
docs).

Reads benchmarks/results/*.jsonl and nothing else; tests/test_docs.py holds the committed page to its output.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def newest(benchmark: str) -> list[tuple[Path, list[Row]]]:
    """(file, its lines) of the latest run on each device; the time of a run is in its file's name."""
    latest: dict[str, tuple[Path, list[Row]]] = {}
    for path in sorted(RESULTS.glob(f"{benchmark}-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if rows:
            latest[rows[0]["gpu"]] = path, rows
    return list(latest.values())


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands separated; nothing for a figure that was not measured."""
    if value is None:
        return ""
    return f"{value:,.{max(0, digits - len(str(int(value))))}f}" if value >= 1 else f"{value:#.{digits}g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def sized(shape: Row) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in shape.items())


# ------------------------------------------------------------------------------------------ one section each


def ceilings(rows: list[Row]) -> list[str]:
    """Rates that no kernel on this card can beat."""
    copy = next(row for row in rows if row["what"] == "copy")
    gemms = [row for row in rows if "tera_per_s" in row]
    types = list(gemms[0]["tera_per_s"])
    lines = [f"A copy reads and writes {number(copy['gb_per_s'], 4)} GB/s. GEMMs, TFLOP/s (int8: TOP/s):", ""]
    cells = (
        [row["what"], f"{row['rows']:,} x {row['inner']:,} x {row['columns']:,}"]
        + [number(row["tera_per_s"][name]) for name in types]
        for row in gemms
    )
    return lines + table(["matrix", "rows x inner x columns", *types], cells)


def kernels(rows: list[Row]) -> list[str]:
    """Times of ours; how many times as long each peer takes, forward and backward together."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["kernel"], sized(row["shape"])), {})[row["variant"]] = row
    cells = []
    for (kernel, shape), variants in sorted(cases.items(), key=lambda case: case[0][0]):
        ours = variants.pop("ours")
        total = ours["forward_ms"] + ours["backward_ms"]
        of_copy = sum(ours["copy_ms"]) / total if ours.get("copy_ms") else None
        peers = [
            f"{name} {number(row['ours_is_faster_by'])}"
            for name, row in variants.items()
            if "error" not in row
        ]
        times = f"{number(ours['forward_ms'])}, {number(ours['backward_ms'])}"
        cells.append(
            [kernel, ours["dtype"], shape, times, percent(ours["share"]), percent(of_copy), "; ".join(peers)]
        )
    lines = [
        "The dtype is that of the inputs; training scores a query's own documents in fp32 and the batch's in "
        "bf16. The share is that of the ceiling (copy or GEMM), "
        "by the bytes and FLOP that cannot be avoided; the share of a copy is",
        "that of the speed at which as many bytes are copied, launch included. "
        "The last column has the time of each peer over ours: eager",
        "torch, torch.compile, Liger, cut-cross-entropy (cce), Inf-CL, torch's segment_reduce, "
        "a padded batch. `ids`: with document ids.",
        "",
    ]
    head = ["kernel", "dtype", "shape", "forward, backward: ms", "share", "of a copy", "peer / ours"]
    return lines + table(head, cells)


def step(rows: list[Row]) -> list[str]:
    """Training steps and encoding beside transformers, and where the time of ours goes."""
    lines = [
        "Tokens are those of the texts, never padding; MFU is of the card's nominal bf16 rate. "
        "A training step has its optimizer and",
        "accumulation in it. Padded peers compute on padding, flattened ones on tokens alone, with the "
        "attention of ours. Megatron-SWIFT,",
        "which trains embedding models on Megatron's layers, could not be installed beside them.",
        "",
    ]
    cells = []
    timed = [row for row in rows if row["what"] in ("train", "encode") and "error" not in row]
    for row in timed:
        best = next(r for r in timed if (r["what"], r["shape"]) == (row["what"], row["shape"]))
        factor = "" if row is best else number(best["tokens_per_s"] / row["tokens_per_s"])
        work = f"{row['what']} {row['shape']}, {row['layers']} layers{' (quick)' if row.get('quick') else ''}"
        memory = number(row["peak_gb"])
        cells.append(
            [work, row["variant"], f"{row['tokens_per_s']:,.0f}", percent(row["mfu"]), memory, factor]
        )
    lines += table(["", "variant", "tokens/s", "MFU", "peak GB", "ours is faster"], cells)
    lacking = [f"- {row['variant']}: {row['error']}" for row in rows if "variant" in row and "error" in row]
    lines += ["", "Not timed:", "", *lacking] if lacking else []
    parts = [row for row in rows if row["what"] == "profile"]
    shapes = list(dict.fromkeys(row["shape"] for row in parts))
    shares = {(row["part"], row["shape"]): row["share"] for row in parts}
    names = list(dict.fromkeys(row["part"] for row in parts))
    cells = [[name, *(f"{shares[name, shape]:.1%}" for shape in shapes)] for name in names]
    return [
        *lines,
        "",
        "Where a training step of ours spends its time:",
        "",
        *table(["part", *shapes], cells),
    ]


def mining(rows: list[Row]) -> list[str]:
    """Exact search beside plain matmul and topk."""
    lines = [
        "`topk`: the best k documents of every query; `mining`: the best below 0.95 x the positive's score. "
        "`ids right` is the share of",
        "ids in common with the exact answer, `certified` that of the queries whose answer the bounds proved "
        "in the first pass.",
        "",
    ]
    cells = (
        [row["what"], row["variant"], sized(row["shape"])]
        + [number(row.get(key)) for key in ("seconds", "ids_in_common", "certified_share")]
        for row in rows
    )
    return lines + table(["", "variant", "shape", "seconds", "ids right", "certified"], cells)


def optimizer(rows: list[Row]) -> list[str]:
    """An AdamW update of ours and of its peers."""
    lines = [
        "One update of fp32 masters. Bytes are what a variant has to read and write once;",
        "the share is that of a copy. `torch, whole` has what ours does beside the update: clipping, and the",
        "bf16 weights that the next forward reads.",
        "",
    ]
    cells = (
        [
            row["variant"],
            f"{row['parameters']:,}",
            f"{row['bytes_a_parameter']:.4g}",
            number(row["ms"]),
            percent(row["share"]),
        ]
        for row in rows
        if "error" not in row
    )
    return lines + table(["variant", "parameters", "bytes a parameter", "ms", "of a copy"], cells)


def data(rows: list[Row]) -> list[str]:
    """Tokenising beside datasets.map, packing beside padding, and whether the loader keeps up."""
    run = rows[0]
    texts = "Debian's package descriptions" if run["texts"] == "debian" else f"{run['texts']} texts"
    lines = [
        f"{texts}, a vocabulary of {run['vocab_size']:,}, one thread on {run['sms']} cores that others share "
        f"(load {run['load']} before it).",
        "Rates are of the processor's time; the last column is the median of "
        f"{run['rounds']} rounds in turns, and their least and most. Ours reads",
        "twice, checks, hashes, tokenises each text once, judges, verifies and syncs; the peer is "
        '`load_dataset("json").map(batched=True)` with the same tokenizer.',
        "",
    ]
    cells = []
    for row in (row for row in rows if row["what"] == "compile"):
        low, middle, high = row.get("times_the_peer") or (None, None, None)
        faster = f"{number(middle)} ({number(low)} to {number(high)})" if middle else ""
        rates = [number(row[key], 4) for key in ("rows_per_core_s", "tokens_per_core_s")]
        cells.append(
            [f"{row['rows']:,}: {row['shape']}", row["variant"], *rates, number(row["seconds"]), faster]
        )
    head = [
        "rows",
        "variant",
        "rows/s a core",
        "tokens/s a core",
        "seconds on the clock",
        "times the peer's rate",
    ]
    lines += table(head, cells)
    packed = [row for row in rows if row["what"] == "packing"]
    title = f"Share of real tokens, {packed[0]['rows']:,} rows with their negatives, "
    title += f"packed into {packed[0]['max_tokens']:,} tokens (a document of several rows of a micro-batch "
    title += "is there once) and padded:"
    cells = []
    for row in packed:
        most = f"{row['ceiling']:.4f}" if "ceiling" in row else ""  # of padded rows there is none
        cells.append([row["variant"], f"{row['tokens']:,}", f"{row['useful']:.4f}", most])
    lines += ["", title, "", *table(["variant", "tokens", "useful", "in whole micro-batches"], cells), ""]
    for row in (row for row in rows if row["what"] == "loading"):
        lines.append(
            f"`load_batch` of one rank of {row['ranks']}, {row['rows_a_rank']} rows each: "
            f"{row['seconds']:.3f} s a step of {row['tokens']:,.0f} tokens, "
            f"{row['tokens_per_s']:,.0f} tokens/s; the goal is {row['goal_per_s']:,}: "
            f"it takes {row['share_of_step']:.0%} of such a step."
        )
    return lines


def two_million(rows: list[Row]) -> list[str]:
    """Memory while a large store is built, and its bytes after kills."""
    calm, killed = rows[0], rows[1]
    count, mib = calm["rows"], 1 << 20
    points = [(n, size) for what, n, size in calm["points"] if what == "tokenised"]
    wanted = [
        min(points, key=lambda point, at=at: abs(point[0] - at * count)) for at in (0.1, 0.3, 0.5, 0.7, 1)
    ]
    head = [f"{n:,} documents" for n, _ in wanted]
    (first, before), (last, after) = wanted[0], wanted[-1]
    lines = [
        f"{count:,} rows of distinct texts, compiled in {calm['seconds']:,.0f} s on {calm['sms']} cores that "
        f"others share (load {calm['load']:.1f} before it). Resident memory, MiB:",
        "",
        *table(head, [[f"{size / mib:,.0f}" for _, size in wanted]]),
        "",
        f"It grows by {(after - before) / (last - first):.0f} bytes a document; the keys that are held are "
        f"{calm['held_bytes_a_document']:.0f} at the end, reckoned. Judging takes it to "
        f"{calm['peak_mib']:,.0f} MiB. Then, in another folder:",
        "",
        *(f"- {line}" for line in killed["kills"]),
        "",
        f"{killed['files']} files, {killed['bytes']:,} bytes; different from those of the undisturbed run: "
        f"{', '.join(killed['different']) or 'none'}.",
    ]
    return lines


def beyond_memory(rows: list[Row]) -> list[str]:
    """A search over files beside its floor and faiss-cpu's IVF-PQ, and what it would take on GPUs."""
    run = rows[0]
    lines = [
        f"{sized(run['shape'])}, fp16 in files that were not in the page cache, threads: {run['threads']}, "
        f"of {run['sms']} cores that others share (load {run['load']} before it). The peak has",
        "all resident pages in it; the floor is all products at the rate of the GEMM alone, "
        "measured before and after, or all bytes at the rate of a cold read.",
        "",
    ]
    products = f"{number(run['floor_gemm_s'])} ({number(run['floor_gemm_processor_s'])} of a processor)"
    floor = f"products {products}, disk {number(run['floor_disk_s'])}"
    certified = f"1, certified for {run['certified']:,} of {run['shape']['Q']:,}"
    clock = f"{number(run['seconds'])} ({number(run['processor_s'])} of a processor)"
    cells = [[f"ours, {run['method']}", clock, floor, f"{run['peak_bytes'] / 2**30:.2f}", certified]]
    for peer in (row for row in rows if row["what"] == "search" and "searches" in row):
        kind = f"faiss-cpu {peer['version']}, IVF{peer['lists']},PQ{peer['code_bytes']}"
        peak = f"{peer['peak_bytes'] / 2**30:.2f}"
        for one in peer["searches"]:
            cells.append(
                [f"{kind}, nprobe {one['nprobe']}", number(one["seconds"]), "", peak, f"{one['recall']:.4f}"]
            )
        built = f"{number(peer['train_s'])} to train, {number(peer['add_s'])} to fill"
        cells.append([kind, built, "", peak, ""])
    lines += table(["", "seconds", "floor: seconds", "peak GiB", "recall"], cells)
    if len(cells) == 1:
        lines += ["", "faiss-cpu, whose IVF-PQ the benchmark compares, was not installed."]
    parts = ", ".join(f"{name} {number(seconds)}" for name, seconds in run["parts"].items())
    lines += ["", f"Parts of ours, seconds: {parts}.", ""]
    for law in (row for row in rows if row["what"] == "law"):
        lines.append(
            f"- Predicted, not measured: {sized(law['shape'])} on {law['gpus']} GPUs, "
            f"{law['measured_at']}: {number(law['predicted_s'])} s, where the goal is {law['goal_s']}. "
            "Products "
            f"{number(law['products_s'])}, disk {number(law['disk_s'])} at {law['disk_gb_s']:g} GB/s and bus "
            f"{number(law['bus_s'])} at {law['bus_gb_s']:g} GB/s a GPU (assumed), beside them; passes: "
            f"{law['passes']}."
        )
    return lines


SECTIONS: dict[str, Callable[[list[Row]], list[str]]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "step": step,
    "mining": mining,
    "optimizer": optimizer,
    "data": data,
    "two_million": two_million,
    "beyond_memory": beyond_memory,
}


def page() -> str:
    lines = [
        "# Benchmarks",
        "",
        "Made by `make docs` from [benchmarks/results](../benchmarks/results): "
        "the newest run on each device. `make gpu` runs them all on a",
        "machine with a CUDA device; a benchmark times nothing before it has checked the results of every "
        "variant against each other.",
        "Reasons, what was tried and what lost: [log.md](log.md). Other figures of CPUs: "
        "[mining.md](mining.md), [merging.md](merging.md).",
    ]
    for name, section in SECTIONS.items():
        for path, rows in newest(name):
            run = rows[0]
            versions = f"torch {run['torch']}, triton {run['triton']}"
            where = f"{run['gpu']}, {versions}, commit {run['commit']}, {run['date'][:10]}"
            source = f"`python -m benchmarks.{name}`, [{path.name}](../benchmarks/results/{path.name})"
            lines += ["", f"## {name}", "", f"{where}: {source}.", "", *section(rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
