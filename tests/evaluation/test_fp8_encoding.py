"""precision=fp8 of an encoder: vectors close to those of bf16, half of the memory of its weights, and models
that it does not fit refused."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import MODEL, WORDS, train_config

from nemo_embed_core.checkpoint.source import resolve
from nemo_embed_core.config import EvaluateConfig
from nemo_embed_core.encoders import check_precision, open_encoder
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.errors import UserError
from nemo_embed_core.evaluation.models import Subject
from nemo_embed_core.mine.teachers import check_source
from nemo_embed_core.parallel.mesh import distributed, pick_precision
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

TEXTS = [" ".join(random.Random(i).choices(WORDS, k=1 + i % 40)) for i in range(200)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = train_config(tmp_path_factory.mktemp("trained"), optim={"lr": 2e-3})
    with distributed(config.parallel, "cpu", MODEL) as mesh:
        Trainer(config, mesh, prepare(config), lambda message: None).run()
    return Path(config.output_dir)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b).sum(1)


def test_vectors_are_close_to_those_of_bf16(trained: Path) -> None:
    encoders = {name: Embedder.load(trained, "cpu", name, 500) for name in ("bf16", "fp8")}
    rows = {name: encoder.encode(TEXTS) for name, encoder in encoders.items()}
    close = cosines(rows["bf16"], rows["fp8"])
    # The same model with other random weights would be at 0.6; bf16 beside fp32 is at 0.99998.
    assert 0.99 < close.mean() < 0.9999 and close.min() > 0.95, f"{close.mean()=} {close.min()=}"
    order = np.random.default_rng(0).permutation(len(TEXTS))
    others = encoders["fp8"].encode([TEXTS[i] for i in order[:77]])
    assert cosines(rows["fp8"][order[:77]], others).min() > 0.97, "the scale is that of the texts beside it"
    assert np.array_equal(rows["fp8"], encoders["fp8"].encode(TEXTS)), "of the same batches the same bits"
    assert encoders["bf16"].digest != encoders["fp8"].digest
    blocks = dict(encoders["fp8"].encoder.model.layers.named_parameters())
    assert {p.dtype for p in blocks.values() if p.ndim == 2} == {torch.float8_e4m3fn}
    assert {p.dtype for p in blocks.values() if p.ndim == 1} == {torch.bfloat16}


def test_what_fp8_does_not_fit_is_refused_before_a_text_is_read(ours: Path, static: Path) -> None:
    source = resolve(ours)
    assert source.model is not None
    narrow = replace(source, model=replace(source.model, intermediate_size=40))
    with pytest.raises(UserError, match=r"multiples of 16.*intermediate_size=40.* one of 32 x 40; use"):
        check_source(narrow, [], [], "fp8")
    config = EvaluateConfig(models=[str(static)], data="nowhere", precision="fp8", device="cpu")
    with pytest.raises(UserError, match="is run by sentence-transformers: use precision=bf16"):
        Subject.of(str(static)).check(config, [])
    with pytest.raises(UserError, match="is run by sentence-transformers: use precision=bf16"):
        open_encoder(static, "cpu", "fp8")
    for precision in ("bf16", "fp32"):
        check_precision(narrow, precision, False)
        check_precision(resolve(static), precision, True)
    check_source(source, [], [], "fp8")


def test_a_gpu_without_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    a100 = SimpleNamespace(capability=(8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: a100.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"8\.9 or later .*NVIDIA A100 has 8\.0; use precision=bf16"):
        pick_precision("fp8", torch.device("cuda"))
    assert pick_precision("bf16", torch.device("cuda")) == "bf16"
    a100.capability = (9, 0)
    assert pick_precision("fp8", torch.device("cuda")) == pick_precision("fp8", torch.device("cpu")) == "fp8"
