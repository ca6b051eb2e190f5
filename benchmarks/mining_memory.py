"""Memory of mining, per million rows and documents: a dataset folder on ids, and the same as JSON lines.

    python -m benchmarks.mining_memory [--rows 100000] [--documents 100000] [--width 64] [--length 400]
                                       [--only dataset] [--ranks 1] [--folder DIR]

Every row judges one document, and the texts have --length characters. All of a run but the encoder is the
launcher's: vectors are made of the texts' numbers, so that nothing of a model is in the figures. "peak" is
all resident memory above what the process had before it began; "anonymous" leaves out memory-mapped vectors,
which the kernel takes back. A quarter of the size is run first, and the growth from it is given per million
of the larger of rows and documents. "written" are the bytes that the process wrote to files, wherever they
are: vectors, what the search found, the output, and copies of texts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from unittest import mock

import numpy as np

from nemo_embed_core.checkpoint.source import Source, Usage
from nemo_embed_core.config import MineConfig, ParallelConfig
from nemo_embed_core.data.dataset import Metadata
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.mine import run as mining
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.parallel.collectives import gather_objects
from nemo_embed_core.parallel.layout import world_size_from_env
from nemo_embed_core.parallel.mesh import distributed

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("dataset", "jsonl")
MIB = 2**20


class Numbered:
    """Unit rows from the number in each text; query i is near document i."""

    def __init__(self, width: int):
        rng = np.random.default_rng(0)
        self.parts = [rng.standard_normal((size, width), np.float32) for size in (65536, 65521, 4099)]
        self.hidden_size, self.digest = width, f"numbered-{width}"

    def encode(self, texts: Sequence[str], prompt: str = "", max_length: int = 512) -> np.ndarray:
        numbers = np.array([int(text.split(" ", 2)[1]) for text in texts])
        first, second, third = (part[numbers % len(part)] for part in self.parts)
        rows = first + second + (third if texts[0].startswith("query") else 0)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def texts(kind: str, stop: int, length: int, start: int = 0) -> Iterator[str]:
    filler = "abcdefgh " * (length // 9 + 1)
    return (f"{kind} {i} {filler}"[:length] for i in range(start, stop))


def write_data(folder: Path, path: str, num_rows: int, num_documents: int, length: int) -> dict[str, str]:
    """The options that mine it."""
    judged = chain.from_iterable(texts("document", num_documents, length) for _ in count())
    pairs = zip(texts("query", num_rows, 60), judged, strict=False)
    others = range(num_rows, num_documents)
    rest = texts("document", num_documents, length, num_rows)
    folder.mkdir(exist_ok=True)
    if path == "dataset":
        rows = (Row(query, [text], [], "rows", i + 1) for i, (query, text) in enumerate(pairs))
        write_dataset(folder / "data", rows, Metadata(corpus_id="c"), (("", text) for text in rest))
        return {"data": str(folder / "data"), "output_format": "dataset"}
    with open(folder / "rows.jsonl", "w") as file:
        file.writelines(json.dumps({"query": q, "pos": [text], "neg": []}) + "\n" for q, text in pairs)
    with open(folder / "corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in rest)
    corpus = {"corpus": str(folder / "corpus.jsonl")} if others else {}
    return {"data": str(folder / "rows.jsonl"), **corpus}


def resident(name: str) -> int:
    """VmRSS, VmHWM (its peak) or RssAnon of this process, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


class Peaks:
    """The most anonymous memory by phase, looked at fifty times a second."""

    def __init__(self) -> None:
        self.phase, self.most = "read", dict[str, int]()
        self.idle = {name: resident(name) for name in ("VmRSS", "RssAnon")}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            size = resident("RssAnon") - self.idle["RssAnon"]
            self.most[self.phase] = max(self.most.get(self.phase, 0), size)
            time.sleep(0.02)

    def say(self, line: str) -> None:
        words = {"encoded": "search", "searched": "write"}  # a line ends its phase or a step of it
        if (word := line.split(" ", 1)[0]) in words:
            done, _, total = line.split(" ", 4)[1:4]
            is_last = done == total and "documents" not in line
            self.phase = words[word] if is_last else {"encoded": "encode", "searched": "search"}[word]
        elif " documents to search" in line:
            self.phase = "encode"


def worker(options: dict[str, str], width: int) -> None:
    """One rank of a run; prints its figures."""
    peaks, world = Peaks(), world_size_from_env()
    source = Source(Path("numbered"), Path("numbered"), "llama", Usage())
    options = {**options, "model": "numbered", "device": "cpu", "num_negatives": 4, "threshold": 0.95}
    config = MineConfig(**options)  # type: ignore[arg-type]
    with distributed(ParallelConfig(dp_size=world), "cpu") as mesh:
        ranks = Ranks(mesh.dp_rank, mesh.dp_size, gather_objects)
        with (
            mock.patch.object(mining, "resolve", lambda path: source),  # there is no folder to look at
            mock.patch.object(mining, "check_source", lambda *arguments: None),
        ):
            plan = mining.make_plan(config, peaks.say, *([ranks] if world > 1 else []))
        reports = mining.mine(plan, ranks, mesh.device, lambda source: Numbered(width), peaks.say)
    (report,) = reports.values()
    figures = {
        "rank": ranks.rank,
        "peak": resident("VmHWM") - peaks.idle["VmRSS"],
        "anonymous": peaks.most,
        "written": int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0]),
        "negatives": report["negatives"],
    }
    print("figures " + json.dumps(figures), flush=True)


def run(options: dict[str, str], output: Path, width: int, num_ranks: int) -> tuple[list[dict], float]:
    """Figures of each rank, and seconds."""
    arguments = json.dumps([{**options, "output": str(output)}, width])
    python = [sys.executable]
    if num_ranks > 1:
        python += ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    made = subprocess.run(
        [*python, str(Path(__file__).resolve()), "--worker", arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(made.stderr[-3000:])
    lines = [line for line in made.stdout.splitlines() if line.startswith("figures ")]
    found = [json.loads(line.removeprefix("figures ")) for line in lines]
    return sorted(found, key=lambda one: one["rank"]), time.perf_counter() - begin


def measure(folder: Path, path: str, rows: int, documents: int, width: int, length: int, ranks: int) -> None:
    found = []
    for part in (4, 1):
        size, place = (rows // part, documents // part), folder / f"{path}-{part}"
        found.append(run(write_data(place, path, *size, length), place / "out", width, ranks))
        vectors, text = sum(size) * width * 2 / MIB, (size[1] * length + size[0] * 60) / MIB
        print(
            f"{path}: {size[0]:,} rows, {size[1]:,} documents of {length} characters ({text:,.0f} MiB of "
            f"text), width {width} ({vectors:,.0f} MiB of vectors), {ranks} ranks, {found[-1][1]:,.0f} s"
        )
        for one in found[-1][0]:
            phases = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in one["anonymous"].items())
            print(
                f"  rank {one['rank']}: peak {one['peak'] / MIB:,.0f} MiB above idle, anonymous by phase "
                f"{phases}; written {one['written'] / MIB:,.0f} MiB",
                flush=True,
            )
    (small, _), (large, _) = found
    for before, after in zip(small, large, strict=True):
        growth = max(after["anonymous"].values()) - max(before["anonymous"].values())
        millions = 0.75 * max(rows, documents) / 1e6
        print(f"  rank {after['rank']}: anonymous grows by {growth / millions / MIB:,.0f} MiB per million")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=64, help="of the vectors")
    parser.add_argument("--length", type=int, default=400, help="characters of a document")
    parser.add_argument("--only", choices=PATHS, action="append", help="again for several; all of them")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", help="for data and output; a new temporary folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*json.loads(options.worker))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for path in options.only or PATHS:
            sizes = (options.rows, options.documents, options.width, options.length, options.ranks)
            measure(Path(name), path, *sizes)


if __name__ == "__main__":
    main()
