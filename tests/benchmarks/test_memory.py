"""The memory benchmark runs, and what it measures does not grow with the text."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_prepare_holds_a_small_part_of_the_text():
    # A process of its own: a child's peak begins with what its parent held when it was started.
    options = ("--documents", "120", "--bytes", "500000", "--max_length", "32", "--only", "prepare")
    command = [sys.executable, "-m", "benchmarks.memory", *options]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    above, least = re.search(r"prepare +(-?\d+) MiB above the (\d+) MiB", printed).groups()
    assert int(above) < 40, "of 57 MiB of text; 23 bytes a byte once"
    assert 20 < int(least) < 150, "torch alone is 190, and prepare needs none of it"
