"""`make gpu`: everything, what matters most first, within its seconds."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_gpu(folder: Path, budget: int, fails: str = "nothing") -> subprocess.CompletedProcess[str]:
    """With a Python that only says what it was asked for."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "ran $*"\ncase "$*" in *{fails}*) exit 3;; esac\n'
    )
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={python}", f"BUDGET={budget}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def ran(result: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^ran -m (?:benchmarks\.)?(\w+)", result.stdout, re.M)


def test_all_parts_fit_into_nine_minutes_the_step_first(tmp_path: Path) -> None:
    result = make_gpu(tmp_path, 540)
    (names,) = re.findall(r"^BENCHMARKS \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert result.returncode == 0 and ran(result)[:2] == ["step", "pytest"], result.stderr
    assert sorted(ran(result)) == sorted([*names.split(), "pytest"])
    parts = re.search(r"^PARTS = (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert parts and sum(int(part.split(":")[1]) for part in parts[1].split()) <= 540
    assert "left out" not in result.stdout


def test_what_does_not_fit_is_left_out_and_said_and_a_failure_ends_nothing_else(tmp_path: Path) -> None:
    result = make_gpu(tmp_path, 100, fails="ceilings")
    assert ran(result) == ["pytest", "ceilings", "mining", "optimizer"]
    assert result.returncode != 0 and "make gpu: failed: ceilings" in result.stderr
    assert "== step left out: about 275 s, " in result.stdout
    assert re.search(r"^== make gpu: \d+ s; left out: step kernels$", result.stdout, re.M), result.stdout
