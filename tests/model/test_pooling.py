"""One owner of pooling: what the options, the arithmetic and every consumer of an export call it."""

import dataclasses
import json
import sys
from typing import Literal, get_args

import pytest
import torch
from safetensors.torch import save_file
from tiny import MODEL

from nemo_embed_core.checkpoint.source import Usage, resolve
from nemo_embed_core.config import ModelConfig, Pooling
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.consumers import reload_request
from nemo_embed_core.export.folder import hf_config, sentence_transformers_files
from nemo_embed_core.model import pooling, spec
from nemo_embed_core.model.attention import Segments
from nemo_embed_core.parallel.mesh import TensorParallel


def test_every_pooling_is_computed_and_spelled() -> None:
    assert set(get_args(Pooling)) == set(pooling.POOLINGS) == set(spec.POOLINGS)
    with pytest.raises(UserError, match=r"model\.pooling='cls'"):
        dataclasses.replace(MODEL, pooling="cls")


@pytest.mark.parametrize("name", get_args(Pooling))
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_card_computes_is_what_the_encoder_computes(name: Pooling, side: str) -> None:
    lengths, generator = [3, 1, 5], torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 8, generator=generator) for n in lengths]
    hidden, mask = torch.full((3, 6, 8), 7.0), torch.zeros(3, 6, 1)  # 7: padding that must not count
    for i, row in enumerate(rows):
        place = slice(6 - len(row), 6) if side == "left" else slice(0, len(row))
        hidden[i, place], mask[i, place] = row, 1
    theirs = torch.nn.functional.normalize(
        eval(spec.POOLINGS[name].torch, {"torch": torch, "hidden": hidden, "mask": mask}), dim=-1
    )
    segments = Segments(torch.tensor([0, 3, 4, 9], dtype=torch.int32), lengths, 5)
    torch.testing.assert_close(pooling.pool(name, torch.cat(rows), segments, TensorParallel()), theirs)


def test_a_new_pooling_reaches_every_consumer_from_the_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[ModelConfig.__module__], "Pooling", Literal["mean", "last"])
    last = spec.PoolingSpec(mode="lasttoken", words="state of the last token", torch="hidden[:, -1]")
    monkeypatch.setattr(spec, "POOLINGS", {**spec.POOLINGS, "last": last})
    for module in ("export.folder", "export.consumers", "model.hf_config"):
        monkeypatch.setattr(sys.modules[f"nemo_embed_core.{module}"], "POOLINGS", spec.POOLINGS)
    model = dataclasses.replace(MODEL, pooling="last")
    usage = Usage(query_max_length=8, document_max_length=9, pooling=model.pooling)
    config = hf_config(model, "float32", {})
    files = {"config.json": config, **sentence_transformers_files(model, usage)}
    assert config["pooling"] == "last"
    flags = files["1_Pooling/config.json"]
    assert [flag for flag, value in flags.items() if value is True] == [
        "pooling_mode_lasttoken",
        "include_prompt",
    ]
    assert reload_request([], 9, False, pooling="last")["pooling"] == "lasttoken"
    (tmp_path / "1_Pooling").mkdir()
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    save_file(
        {name: torch.zeros(shape) for name, shape in spec.hf_shapes(model).items()},
        tmp_path / "model.safetensors",
    )
    source = resolve(tmp_path)
    assert source.kind == "llama" and source.model == model and source.usage.pooling == "last"
    del config["pooling"]  # modules.json alone says it
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve(tmp_path).model == model
