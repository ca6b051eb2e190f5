"""The trainers' comparison: both sides train fp32 weights."""

import torch
from tiny import write_hf

from benchmarks.trainers import peer_model


def test_the_peer_trains_fp32_weights_of_a_folder_in_bf16(tmp_path):
    model = peer_model(write_hf(tmp_path / "model", torch.bfloat16))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
