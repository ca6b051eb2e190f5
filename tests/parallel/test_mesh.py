"""Wrong layouts are refused with both numbers before any process group exists."""

import dataclasses

import pytest
import torch
from tiny import MODEL

from nemo_embed_core.config import ParallelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel.layout import check_layout, world_size_from_env
from nemo_embed_core.parallel.mesh import distributed, pick_device, pick_precision


@pytest.mark.parametrize(
    "parallel, world, model, message",
    [
        ({"tp_size": 4}, 6, {}, "world size 6 is not a multiple of parallel.tp_size=4"),
        (
            {"tp_size": 2, "dp_size": 2},
            8,
            {},
            "dp_size=2 x parallel.tp_size=2 = 4 processes, but 8 were started",
        ),
        ({"tp_size": 8}, 8, {}, "tp_size=8 does not divide num_key_value_heads=4"),
        (
            {"tp_size": 3},
            3,
            {},
            "does not divide num_key_value_heads=4; of 3 processes these sizes would do: 1",
        ),
        ({"tp_size": 12}, 12, {"num_key_value_heads": 8}, "of 12 processes these sizes would do: 1, 2, 4"),
        ({"dp_replicate": 3}, 8, {}, "dp_replicate=3 does not divide the 8 data-parallel ranks"),
    ],
)
def test_wrong_layouts(parallel: dict, world: int, model: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(ParallelConfig(**parallel), world, dataclasses.replace(MODEL, **model))
    assert message in str(caught.value)


def test_dp_size_is_what_is_left() -> None:
    assert check_layout(ParallelConfig(tp_size=2), 8, MODEL) == 4
    assert check_layout(ParallelConfig(tp_size=2, dp_size=4), 8, MODEL) == 4


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert world_size_from_env() == 1
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE is not"):
        world_size_from_env()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="MASTER_ADDR is not"):
        world_size_from_env()


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed(ParallelConfig(), "cpu", MODEL) as mesh:
        assert (mesh.dp_size, mesh.tp.size, mesh.rank, mesh.tp.sequence_parallel) == (1, 1, 0, False)


def test_auto_precision_is_bf16_on_every_gpu_and_fp32_on_a_cpu() -> None:
    devices = [torch.device(name) for name in ("cuda", "cuda:1", "cpu")]
    assert [pick_precision("auto", device) for device in devices] == ["bf16", "bf16", "fp32"]
    assert [pick_precision("fp32", device) for device in devices] == ["fp32"] * 3
