"""Ten thousand synthetic rows from an endpoint on this machine that misbehaves: what is accepted, which
planted faults are caught, how fast, and in how much memory.

    python -m benchmarks.synthesis [--requests 10000] [--in_flight 64] [--faults 0.01]

The endpoint (benchmarks/synthesis_server.py) runs in this process, synthesis in one of its own, whose time
and memory are given. --faults: the share of the requests that gets each of the faults.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.synthesis_server import COMMON, IN_THE_ANSWER, ON_THE_WAY, Server

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


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
    verdicts, digests = {}, {}
    for line in (folder / "out/datasets/verdicts.jsonl").read_text().splitlines():
        value = json.loads(line)
        verdicts[value["request"]] = value["verdict"]
    for line in (folder / "out/journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        digests[int(event["key"])] = event["digest"]
    found: dict[str, Counter[str]] = {}
    for request, verdict in verdicts.items():
        found.setdefault(server.planted[digests[request]] or "none", Counter())[verdict] += 1
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--in_flight", type=int, default=32, help="of each of the two generators")
    parser.add_argument(
        "--faults", type=float, default=0.01, help="share of the requests that gets each fault"
    )
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
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
        stamp, commit = (
            datetime.now(UTC),
            subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip(),
        )
        about = {"date": f"{stamp:%Y-%m-%d %H:%M}", "commit": commit,
                 "gpu": f"{platform.machine()} CPU, {os.cpu_count()} cores",
                 "command": "python -m benchmarks.synthesis " + " ".join(sys.argv[1:])}  # fmt: skip
        path = RESULTS / f"synthesis-{stamp:%Y%m%d-%H%M%S}.jsonl"
        path.write_text("".join(json.dumps({**about, **row}) + "\n" for row in (whole, *rows)))


if __name__ == "__main__":
    main()
