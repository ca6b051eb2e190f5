"""Memory of mining, per million rows and documents: a dataset folder on ids, and the same as JSON lines.

    python -m benchmarks.mining_memory [--rows 100000] [--documents 100000] [--width 64] [--length 400]
                                       [--only dataset] [--ranks 1] [--folder DIR]

Every row judges one document, and the texts have --length characters. All of a run but the encoder is the
launcher's: vectors are made of the texts' numbers, so that nothing of a model is in the figures. "above" is
the peak less that of 64 rows and documents; "anonymous" the most by phase, less that of reading those,
without memory-mapped vectors, which the kernel takes back. "written" are the bytes that the process wrote to
files, wherever they are: vectors, what the search found, the output, and copies of texts.
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
from pathlib import Path

import numpy as np

from benchmarks.memory import ROOT, write_beir, write_model
from nemo_embed_core.config import MineConfig, ParallelConfig
from nemo_embed_core.data.dataset import Metadata
from nemo_embed_core.data.dataset_writer import write_dataset
from nemo_embed_core.data.formats.row import Row
from nemo_embed_core.data.tokenizer import train_sentencepiece
from nemo_embed_core.mine.corpus import Ranks
from nemo_embed_core.mine.run import make_plan, mine
from nemo_embed_core.parallel.collectives import gather_objects
from nemo_embed_core.parallel.layout import world_size_from_env
from nemo_embed_core.parallel.mesh import distributed

PATHS = ("dataset", "jsonl")
FEW = 64
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


def texts(kind: str, count: int, length: int) -> Iterator[str]:
    filler = "abcdefgh " * (length // 9 + 1)
    return (f"{kind} {i} {filler}"[:length] for i in range(count))


def write_data(folder: Path, path: str, num_rows: int, num_documents: int, length: int) -> dict[str, str]:
    """The options that mine it."""
    pairs = zip(texts("query", num_rows, 60), texts("document", num_documents, length), strict=False)
    others = list(range(num_rows, num_documents))
    rest = (f"document {i} {'abcdefgh ' * (length // 9 + 1)}"[:length] for i in others)
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


class Peaks:
    """The most anonymous memory by phase, looked at fifty times a second."""

    def __init__(self) -> None:
        self.phase, self.most = "read", dict[str, int]()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            size = int(status.split("RssAnon:")[1].split()[0]) * 1024
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
    config = MineConfig(**options, device="cpu", num_negatives=4, threshold=0.95)  # type: ignore[arg-type]
    with distributed(ParallelConfig(dp_size=world), "cpu") as mesh:
        ranks = Ranks(mesh.dp_rank, mesh.dp_size, gather_objects)
        plan = make_plan(config, peaks.say, *([ranks] if world > 1 else []))
        reports = mine(plan, ranks, mesh.device, lambda source: Numbered(width), peaks.say)
    (report,) = reports.values()
    status = Path("/proc/self/status").read_text()
    figures = {
        "rank": ranks.rank,
        "peak": int(status.split("VmHWM:")[1].split()[0]) * 1024,
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
    few, many = folder / f"{path}-few", folder / f"{path}-many"
    model = {"model": str(folder / "model")}
    least, _ = run(model | write_data(few, path, FEW, FEW, length), few / "out", width, ranks)
    many_options = model | write_data(many, path, rows, documents, length)
    most, seconds = run(many_options, many / "out", width, ranks)
    vectors, per_million = (rows + documents) * width * 2 / MIB, 1e6 / max(rows, documents)
    text = (documents * length + rows * 60) / MIB
    print(
        f"{path}: {rows:,} rows, {documents:,} documents of {length} characters ({text:,.0f} MiB of text), "
        f"width {width} ({vectors:,.0f} MiB of vectors), {ranks} ranks, {seconds:,.0f} s"
    )
    for few_figures, figures in zip(least, most, strict=True):
        above = figures["peak"] - few_figures["peak"]
        idle = few_figures["anonymous"]["read"]
        phases = {name: (size - idle) / MIB for name, size in figures["anonymous"].items()}
        own = max(phases.values())
        print(
            f"  rank {figures['rank']}: peak {above / MIB:,.0f} MiB above, anonymous {own:,.0f} MiB "
            f"({', '.join(f'{name} {size:,.0f}' for name, size in phases.items())}), "
            f"{own * per_million:,.0f} MiB per million; written {figures['written'] / MIB:,.0f} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=100_000, help="at least as many as rows")
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
    if options.documents < options.rows:
        parser.error("--documents must be at least --rows")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_beir(folder / "few", 8, 400)
        train_sentencepiece([(folder / "few" / "corpus.jsonl").read_text()], 600, folder / "tokenizer")
        write_model(folder)
        for path in options.only or PATHS:
            sizes = (options.rows, options.documents, options.width, options.length, options.ranks)
            measure(folder, path, *sizes)


if __name__ == "__main__":
    main()
