"""One owner of pooling: what the options, the arithmetic and every consumer of an export call it."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer.modules import Pooling as Theirs
from tiny import MODEL

from nemo_embed_core.checkpoint.source import Usage, resolve
from nemo_embed_core.config import Pooling
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.consumers import reload_request
from nemo_embed_core.export.folder import hf_config, sentence_transformers_files
from nemo_embed_core.model import pooling, spec
from nemo_embed_core.model.attention import Segments
from nemo_embed_core.parallel.mesh import TensorParallel


def test_every_pooling_is_computed_and_spelled() -> None:
    assert set(get_args(Pooling)) == set(pooling.POOLINGS) == set(spec.POOLINGS)
    with pytest.raises(UserError, match=r"model\.pooling='max'"):
        dataclasses.replace(MODEL, pooling="max")


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


@pytest.mark.parametrize("name", get_args(Pooling))
@pytest.mark.parametrize("lengths", [[3, 1, 5], [0, 2, 0, 7]])
def test_rows_equal_sentence_transformers(name: Pooling, lengths: list[int]) -> None:
    """Its own module on padded states; a text without a token, which it is not asked for, gives 0."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(n, 8, generator=generator) for n in lengths]
    segments = Segments(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), lengths, max(lengths))
    got = pooling.pool(name, torch.cat(states), segments, TensorParallel())
    module = Theirs(8, pooling_mode=spec.POOLINGS[name].mode)
    for row, state in zip(got, states, strict=True):
        want = torch.zeros(8)
        if len(state):
            padded = torch.nn.functional.pad(state, (0, 0, 0, 2), value=7.0)
            mask = torch.tensor([1] * len(state) + [0, 0])
            features = {"token_embeddings": padded[None], "attention_mask": mask[None]}
            want = torch.nn.functional.normalize(module(features)["sentence_embedding"][0], dim=0)
        torch.testing.assert_close(row, want)


@pytest.mark.parametrize("name", get_args(Pooling))
def test_every_rank_s_share_of_the_tokens_adds_up(name: Pooling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and gradients of all tokens under sequence parallelism; the ranks' shares are summed here.
    One text has no token."""
    lengths = [3, 1, 0, 7, 5]
    segments = Segments(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), lengths, 7)
    whole = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 8, dtype=torch.float64)
    want = pooling.pool(name, whole, segments, TensorParallel())
    (gradient,) = torch.autograd.grad((want * weight).sum(), whole)
    monkeypatch.setattr(TensorParallel, "group", None)

    def ranks(rank: int) -> TensorParallel:
        return TensorParallel(size=4, rank=rank, sequence_parallel=True)

    shares: list[torch.Tensor] = []
    monkeypatch.setattr(pooling, "reduce_from_tp", lambda rows, group: shares.append(rows) or rows)
    for rank in range(4):
        pooling.pool(name, whole[4 * rank : 4 * rank + 4], segments, ranks(rank))
    total = sum(shares)
    assert isinstance(total, torch.Tensor)
    monkeypatch.setattr(pooling, "reduce_from_tp", lambda rows, group: total)
    got = pooling.pool(name, whole[:4], segments, ranks(0))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (theirs,) = torch.autograd.grad((got * weight).sum(), whole)
    torch.testing.assert_close(theirs, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", get_args(Pooling))
def test_a_pooling_reaches_every_consumer_from_the_table(name: Pooling, tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, pooling=name)
    usage = Usage(query_max_length=8, document_max_length=9, pooling=model.pooling)
    config = hf_config(model, "float32", {})
    files = {"config.json": config, **sentence_transformers_files(model, usage)}
    flags = files["1_Pooling/config.json"]
    flag = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}.get(name, "weightedmean_tokens")
    said = [key for key, value in flags.items() if value is True]
    assert said == [f"pooling_mode_{flag}", "include_prompt"]
    assert reload_request([], 9, False, pooling=name)["pooling"] == spec.POOLINGS[name].mode
    (tmp_path / "1_Pooling").mkdir()
    for file, value in files.items():
        (tmp_path / file).write_text(json.dumps(value))
    save_file(
        {name: torch.zeros(shape) for name, shape in spec.hf_shapes(model).items()},
        tmp_path / "model.safetensors",
    )
    source = resolve(tmp_path)
    assert source.kind == "llama" and source.model == model and source.usage.pooling == name
    del config["pooling"]  # modules.json alone says it
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve(tmp_path).model == model
