"""A token store of two million rows of distinct texts: memory at every line of progress, and the same bytes
after five kills.

    python -m benchmarks.two_million [--rows 2000000] [--tokenizer ../shared/tokenizers/llama-3.1]
                                     [--folder DIR]

Rows are a query and a positive of some twelve tokens each, no text twice. launch/prepare.py compiles them
once undisturbed (one thread reads, one tokenises), then again in another folder, ended by kill -9 while it
checks, at 20, 45 and 70 % of the rows, and when all rows are tokenised and not yet judged; the sixth process
goes on to the end.

held      what the process keeps of each distinct document, reckoned: its 16-byte key (64 bytes as an object
          of Python), its number (32) and its place in the dict (the table as this Python grows it); where its
          tokens lie stands on disk
resident  the process's own memory (RssAnon), when a line of progress was printed; less what is held it should
          be flat from 5 % of the rows on, when as many texts wait for the tokenizer (2 MiB of characters of
          either side, and their tokens) as ever will. Judging comes last, and reads the arrays of all rows:
          its peak is a line of its own.

Exits with 1 where a byte differs, or where resident memory less what is held varies by more than --flat MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.ceilings import ResultsFile
from nemo_embed_core.data.tokenizer import train_sentencepiece
from nemo_embed_core.files.durable import sha256_file

ROOT = Path(__file__).resolve().parents[1]
LLAMA = ROOT.parent / "shared" / "tokenizers" / "llama-3.1"
MIB = 1 << 20
KILLS = (0.0, 0.2, 0.45, 0.7, 1.0)  # shares of the rows that are committed; 0: while they are checked
Point = tuple[str, int, int]  # (what the process does, rows so far, bytes of RssAnon)


def write_rows(path: Path, count: int) -> None:
    """{"query", "pos", "neg"} of words drawn with a seed, and the number of the row among them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioumnrstlkdpbg", k=rng.randint(2, 6))) for _ in range(5000)]
    with path.open("w") as file:
        for i in range(count):
            query, document = (" ".join(rng.choices(words, k=4)) for _ in range(2))
            file.write(json.dumps({"query": f"{query} q{i}", "pos": [f"{document} d{i}"], "neg": []}) + "\n")


def held(documents: int) -> int:
    """Bytes of the dict {key: number} that tells which documents were met."""
    return (64 + 32) * documents + sys.getsizeof(dict.fromkeys(range(documents)))


class Prepare:
    """launch/prepare.py in a process of its own, looked at four times a second."""

    def __init__(self, rows: Path, tokenizer: Path, cache: Path):
        self.cache, self.output = cache, cache.with_suffix(".txt")
        command = [
            sys.executable, "-u", str(ROOT / "launch" / "prepare.py"), "--tokenizer", str(tokenizer),
            "--data.datasets", json.dumps([{"path": str(rows)}]), "--data.cache_dir", str(cache),
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        self.began = time.perf_counter()
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def committed(self) -> int:
        """Rows of the last state that a kill leaves."""
        for path in self.cache.glob(".building-*/state.json"):
            return int(json.loads(path.read_bytes())["rows"])
        return 0

    def anonymous(self) -> int:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except ProcessLookupError:
            return 0
        found = re.search(r"RssAnon:\s*(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0  # a process that has ended has none

    def watch(self, until: Callable[[], bool] = lambda: False) -> list[Point]:
        """Until the process ends or until() is true, which kills it. A point for each line of progress, and
        the largest of what comes behind the last one."""
        points: list[Point] = []
        seen = peak = 0
        while self.process.poll() is None:
            memory = self.anonymous()
            lines = re.findall(r"(tokenised|reading)\D.*?([\d,]+) (?:of|lines)", self.output.read_text())
            if len(lines) > seen:
                seen, peak = len(lines), 0
                points.append((lines[-1][0], int(lines[-1][1].replace(",", "")), memory))
            peak = max(peak, memory)
            if until():
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
                return points
            time.sleep(0.25)
        if self.process.returncode:
            raise SystemExit(f"it ended with {self.process.returncode}: {self.output.read_text()[-2000:]}")
        return [*points, ("behind the last line", points[-1][1] if points else 0, peak)]


def store_files(cache: Path) -> dict[str, tuple[int, str]]:
    """{name: (bytes, sha256)} of the one store there."""
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    return {file.name: (file.stat().st_size, sha256_file(file)) for file in sorted(folder.iterdir())}


def kill_and_resume(rows: Path, tokenizer: Path, cache: Path, count: int) -> list[str]:
    """Kills at KILLS, then the run that ends: a line of what each kill left and each start went on with."""
    rng, lines = random.Random(1), []
    for share in KILLS:
        prepare, late = Prepare(rows, tokenizer, cache), rng.uniform(0, 5)
        met: list[float] = []

        def is_time(
            prepare: Prepare = prepare, share: float = share, late: float = late, met: list[float] = met
        ) -> bool:
            is_met = (
                prepare.committed() >= share * count
                if share
                else bool(list(prepare.cache.glob(".building-*")))
            )
            if is_met:
                met.append(time.perf_counter())
            return is_met and (share == 1 or met[-1] - met[0] >= late)

        prepare.watch(is_time)
        if prepare.process.returncode != -signal.SIGKILL:
            raise SystemExit(f"it ended before the kill at {share:.0%} of the rows: give more --rows")
        seconds = time.perf_counter() - prepare.began
        what = "while it checked" if not share else f"at {share:.0%}"
        lines.append(f"kill -9 {what}, after {seconds:.1f} s: {prepare.committed():,} rows are committed")
        print(lines[-1], flush=True)
    last = Prepare(rows, tokenizer, cache)
    last.watch()
    went_on = re.search(r"going on with .*", last.output.read_text())
    if went_on is None:
        raise SystemExit(f"the last run went on with nothing: {last.output.read_text()[-2000:]}")
    lines.append(went_on[0].replace(str(cache), "..."))
    print(lines[-1], flush=True)
    return lines


def report(points: list[Point], count: int) -> dict[str, float]:
    """Prints the points; the spread of resident memory less what is held, over the tokenising."""
    print(f"{'':22}{'rows':>12} {'resident':>10} {'held':>10} {'less':>10}  MiB")
    rests = []
    for what, rows, memory in points:
        kept = held(rows) if what == "tokenised" else 0
        print(f"{what:22}{rows:12,} {memory / MIB:10,.1f} {kept / MIB:10,.1f} {(memory - kept) / MIB:10,.1f}")
        rests += [memory - kept] * (what == "tokenised" and rows >= count / 20)
    if len(rests) < 3:
        raise SystemExit(f"{len(rests)} lines of progress while tokenising: give more --rows")
    spread, peak = max(rests) - min(rests), points[-1][2]
    print(
        f"held at the end: {held(count) / count:.0f} bytes a document; resident less held varies by "
        f"{spread / MIB:.1f} MiB over {len(rests)} lines; behind the last line at most "
        f"{peak / MIB:,.0f} MiB, {(peak - min(rests)) / count:.0f} bytes a row above the least",
        flush=True,
    )
    return {"held_bytes_a_document": held(count) / count, "spread_mib": spread / MIB, "peak_mib": peak / MIB}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--tokenizer", default=str(LLAMA) if LLAMA.exists() else "", help="'': a trained one")
    parser.add_argument("--flat", type=float, default=96.0, help="MiB (default 96)")
    parser.add_argument("--folder", help="for all files, 1 kB a row; a new temporary folder")
    options = parser.parse_args()
    count, results, load = options.rows, ResultsFile("two_million", device="cpu"), os.getloadavg()[0]
    print(f"{results.run['gpu']}, load {load:.1f}, {count:,} rows; to {results.path}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows, tokenizer = folder / "rows.jsonl", Path(options.tokenizer)
        write_rows(rows, count)
        if not options.tokenizer:
            with rows.open() as file:
                tokenizer = folder / "tokenizer"
                train_sentencepiece([next(file) for _ in range(2000)], 4000, tokenizer)
        calm = Prepare(rows, tokenizer, folder / "calm")
        points = calm.watch()
        seconds = time.perf_counter() - calm.began
        figures = report(points, count)
        results.append(what="calm", rows=count, seconds=seconds, points=points, load=load, **figures)
        print(f"undisturbed: {seconds:,.0f} s, {count / seconds:,.0f} rows/s", flush=True)
        kills = kill_and_resume(rows, tokenizer, folder / "killed", count)
        was, now = store_files(folder / "calm"), store_files(folder / "killed")
        different = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        size = sum(size for size, _ in was.values())
        results.append(
            what="killed", rows=count, kills=kills, files=len(was), bytes=size, different=different
        )
        print(f"{len(was)} files, {size:,} bytes; different after the kills: {different or 'none'}")
        if different or figures["spread_mib"] > options.flat:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
