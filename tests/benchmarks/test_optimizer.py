"""benchmarks.optimizer, as far as it goes without a GPU; the kernel runs in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A whole run with stand-ins for the device and the clock.
REHEARSAL = """
import sys
from pathlib import Path
from unittest import mock
import torch
from benchmarks import ceilings, optimizer as o

real = torch.randn
folder, device = Path(sys.argv[1]), mock.MagicMock(multi_processor_count=132)
device.name = "stand-in"
on_cpu = lambda *size, **k: real(*size, **{**k, "device": "cpu"})
tensor = lambda value, **k: torch.full((), value)

def times(calls, repeats):
    assert all(call() is None for call in calls.values())
    return {name: [1.0 + i] * repeats for i, name in enumerate(calls)}

with (
    mock.patch.object(torch.cuda, "is_available", lambda: True),
    mock.patch.object(torch.cuda, "get_device_properties", lambda i: device),
    mock.patch.object(ceilings, "RESULTS", folder),
    mock.patch.object(o, "copy_bandwidth", lambda: 4000.0),
    mock.patch.object(o, "interleaved_times", times),
    mock.patch.object(o, "shapes", lambda layers: [(9, 7), (layers,)]),
    mock.patch.object(torch, "randn", on_cpu),
    mock.patch.object(torch, "tensor", tensor),
    mock.patch.object(o, "gate", lambda device, sizes: 1.0),
    mock.patch.object(o, "gate_rounded", lambda device, sizes, moments: (1.0, 0.0)),
):
    o.main(["--repeats", "1", "--layers", "5"])
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_without_a_device_the_gate_runs_and_says_so() -> None:
    result = run("-m", "benchmarks.optimizer")
    assert result.returncode == 0, result.stderr
    assert "ulps from torch's fused AdamW" in result.stdout and "nothing is timed" in result.stdout
    assert "gate: bf16 moments" in result.stdout and "gate: 8bit moments" in result.stdout


def test_a_whole_run_has_a_line_of_each_variant(tmp_path: Path) -> None:
    result = run("-c", REHEARSAL, str(tmp_path))
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("optimizer-*.jsonl")
    lines = {line["variant"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert lines.keys() == {
        *(
            f"ours{m}, {g} gradients"
            for m in ("", ", bf16 moments", ", 8bit moments")
            for g in ("bf16", "fp32")
        ),
        "torch",
        "torch, whole",
        "apex",
        "te",
        "torchao, 8-bit moments",
        "bnb, 8-bit moments",
    }
    assert lines["ours, bf16 moments, bf16 gradients"]["bytes_a_parameter"] == 18
    assert lines["ours, 8bit moments, fp32 gradients"]["bytes_a_parameter"] == 16 + 4 * 2 / 256
    ours = lines["ours, bf16 gradients"]
    assert ours["parameters"] == 9 * 7 + 5 and ours["bytes_a_parameter"] == 26
    assert ours["gb_per_s"] == pytest.approx(26 * 68 / 1.0 / 1e6)
