"""The checkpoint benchmark runs on a small model, cleans up, and notices wrong rounding."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package

from benchmarks import checkpoint  # noqa: E402
from nemo_embed_core.model.spec import parameter_shapes  # noqa: E402


def test_the_model_has_the_parameters_asked_for() -> None:
    for wanted in (2e5, 2e8, 8e9):
        sizes = [
            torch.Size(shape).numel() for shape in parameter_shapes(checkpoint.model_of(wanted)).values()
        ]
        assert wanted <= sum(sizes) <= 1.35 * wanted and sizes[0] < 0.7 * wanted


def test_every_figure_is_there_and_the_disk_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(output: Path, sources: list[Path]) -> dict[str, float]:
        # No process of its own: 5 s of imports.
        return checkpoint.merge_here(output, [str(path) for path in sources])

    monkeypatch.setattr(checkpoint, "run_merge", here)
    options = [
        "--parameters",
        "1e5",
        "--sources",
        "3",
        "--repeats",
        "1",
        "--sample",
        "50",
        "--folder",
        str(tmp_path),
    ]
    assert checkpoint.main([*options, "--output", str(tmp_path / "report.json")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"commit", "cpu", "model", "command", "torch", "load_before"} <= report.keys()
    save = report["save"]
    assert save["bytes"] == 12 * report["parameters"] and save["stall_s"] > 0 and save["read_x_plain"] > 0
    for row, itemsize in zip(report["merge"], (2, 4), strict=True):
        assert row["wrongly_rounded"] == 0 and row["x_copy_all"] > 0 and row["x_copy_least"] > 0
        assert row["bytes_read"] > 3 * itemsize * report["parameters"]
    assert "x copy all" in capsys.readouterr().out


def test_weights_that_are_not_the_nearest_are_counted(tmp_path: Path) -> None:
    config = checkpoint.model_of(1e5)
    sources = [checkpoint.write_source(tmp_path / str(i), config, torch.bfloat16, i) for i in range(3)]
    checkpoint.merge_here(tmp_path / "merged", [str(path) for path in sources])
    assert checkpoint.wrongly_rounded(tmp_path / "merged", sources, torch.bfloat16, 300) == 0
    inputs = [load_file(path / "model.safetensors") for path in sources]
    sloppy = {name: (inputs[0][name] + inputs[1][name] + inputs[2][name]) / 3 for name in inputs[0]}
    save_file(sloppy, tmp_path / "merged/model.safetensors", {"format": "pt"})
    assert 0.1 < checkpoint.wrongly_rounded(tmp_path / "merged", sources, torch.bfloat16, 300) < 0.9
