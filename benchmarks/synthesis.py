"""Ten thousand synthetic rows from an endpoint on this machine that misbehaves: what is accepted, which
planted faults are caught, how fast, and in how much memory.

    python -m benchmarks.synthesis [--save]

The endpoint (benchmarks/synthesis_server.py) runs in this process, synthesis in one of its own, whose time
and memory are given.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.ceilings import ResultsFile
from benchmarks.synthesis_server import COMMON, IN_THE_ANSWER, ON_THE_WAY, Server

ROOT = Path(__file__).resolve().parents[1]


def run(requests: int, in_flight: int, share: float, folder: Path) -> tuple[dict, list[dict]]:
    faults = dict.fromkeys([*ON_THE_WAY, *IN_THE_ANSWER], share)
    config = {
        "output": str(folder / "out"),
        "documents": str(ROOT / "docs"),
        "self_pairs": {"held_out": 0.2},
        "generate": {
            "requests": requests, "languages": list(COMMON), "timeout_s": 5.0,
            "backoff_s": 0.05, "max_output_tokens": 1500,
        },
    }  # fmt: skip
    with Server(faults, delay_s=0.1) as server:
        model = {"base_url": server.url, "max_in_flight": in_flight, "input_price": 0.1, "output_price": 0.4}
        config["generate"]["models"] = [  # type: ignore[index]
            {"name": name, "weight": weight, **model} for name, weight in (("large", 1.0), ("small", 2.0))
        ]
        (folder / "config.yaml").write_text(json.dumps(config))
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [
            sys.executable,
            str(ROOT / "launch/synthesize.py"),
            "--config",
            str(folder / "config.yaml"),
        ]
        subprocess.run(
            command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
        )
        seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Counter[str]] = {}
    for line in (folder / "out/datasets/verdicts.jsonl").read_text().splitlines():
        value = json.loads(line)
        found.setdefault(server.planted[value["digest"]] or "none", Counter())[value["verdict"]] += 1
    rows = []
    for fault in ["none", *ON_THE_WAY, *IN_THE_ANSWER]:
        counts = found.get(fault, Counter())
        wanted = IN_THE_ANSWER.get(fault, "accepted")
        rows.append({
            "what": "fault", "fault": fault, "planted": counts.total(), "wanted": wanted,
            "as_wanted": counts[wanted],
            "others": {verdict: count for verdict, count in counts.most_common() if verdict != wanted},
        })  # fmt: skip
    report = json.loads((folder / "out/datasets/report.json").read_text())
    whole = {
        "what": "run", "requests": requests, "in_flight": 2 * in_flight, "seconds": round(seconds, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mib": round(after.ru_maxrss / 1024), "verdicts": report["requests"],
        "paid": server.paid.total(), "paid_twice": sum(count > 1 for count in server.paid.values()),
        "most_in_flight": server.most_in_flight,
        "journal_bytes": (folder / "out/journal.jsonl").stat().st_size,
    }  # fmt: skip
    return whole, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="rows that are asked for")
    parser.add_argument("--in_flight", type=int, default=32, help="of each of the two generators")
    parser.add_argument(
        "--faults", type=float, default=0.01, help="share of the requests that gets each fault"
    )
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        whole, rows = run(options.requests, options.in_flight, options.faults, Path(name))
    print(f"\n{'planted':26s}{'times':>7s}  {'left out for':12s}{'times':>7s}  otherwise")
    for row in rows:
        print(
            f"{row['fault']:26s}{row['planted']:7,}  {row['wanted']:12s}{row['as_wanted']:7,}  "
            f"{row['others'] or ''}"
        )
    print(json.dumps(whole, indent=1))
    if options.save:
        results = ResultsFile("synthesis", device="cpu")
        for row in (whole, *rows):
            results.append(command=" ".join(["python -m benchmarks.synthesis", *sys.argv[1:]]), **row)


if __name__ == "__main__":
    main()
