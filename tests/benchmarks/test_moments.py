"""benchmarks.moments, as short as it can be."""

import pytest
import torch

from benchmarks import moments


def test_the_dynamic_map_has_256_values_and_nearest_ones_are_taken() -> None:
    for signed in (True, False):
        values = moments.dynamic_map(signed)
        assert len(values.unique()) == 256 and values.max() == 1 and bool((values < 0).any()) == signed
        x = torch.randn(3, 512).abs() if not signed else torch.randn(3, 512)
        got = moments.mapped(x, values).view(-1, 256)
        scales = x.view(-1, 256).abs().amax(1, keepdim=True)
        nearest = (x.view(-1, 256, 1) / scales[..., None] - values).abs().argmin(-1)
        assert torch.allclose(got, values[nearest] * scales)


def test_a_line_of_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    moments.main(["--steps", "16", "--rows", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(moments.KINDS)
    assert "fp32                 exp_avg_sq    1.000,   0% are 0; updates 1.00 / 1.00 / 1.00" in lines[0]
