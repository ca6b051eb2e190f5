"""`python -m benchmarks.kernels`, as far as it goes without a GPU."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_device_the_gate_runs_and_says_so():
    command = [sys.executable, "-m", "benchmarks.kernels", "--kernel", "swiglu", "rope"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == 0, result.stderr
    assert "no CUDA device" in result.stdout
    assert result.stdout.count("passed") == 2


def test_rehearsal_of_a_whole_run(passes, tmp_path):
    passes("benchmark_rehearsal", folder=str(tmp_path))


def test_losses_are_timed_on_rows_of_the_dtype_that_training_scores(passes):
    passes("training_scores_what_is_timed")
