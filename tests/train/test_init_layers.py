"""A model of some layers of another one has the vectors of transformers' own model without the rest."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MODEL, of_transformers, train_config, write_hf

from nemo_embed_core.checkpoint.manifest import read_manifest
from nemo_embed_core.checkpoint.weights import open_weights
from nemo_embed_core.encoders.embedder import Embedder
from nemo_embed_core.errors import UserError
from nemo_embed_core.export.card import describe
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

TEXTS = ["alpha beta river", "moon violin copper engine and more of it", "cat"]


def run(folder: Path, name: str, init_from: Path, layers: list[int], steps: int = 0, **changes) -> Path:
    output = folder / name
    config = train_config(
        folder, init_from=str(init_from), init_layers=layers, output_dir=str(output), steps=steps, **changes
    )
    with distributed(config.parallel, "cpu") as mesh:
        Trainer(config, mesh, prepare(config), log=lambda message: None).run()
    return output


def test_layers_are_those_that_are_named_in_their_order(tmp_path: Path) -> None:
    """Of a Hugging Face folder, and of a run that was made so."""
    hf = write_hf(tmp_path / "hf", torch.float32, config=dataclasses.replace(MODEL, num_hidden_layers=4))
    first = run(tmp_path, "first", hf, [3, 0, 2])
    second = run(tmp_path, "second", first, [2, 0])
    for folder, layers in ((first, [3, 0, 2]), (second, [2, 3])):
        manifest = read_manifest(folder / "step-00000000")
        assert manifest["model"]["num_hidden_layers"] == len(layers)
        assert not any(f"layers.{len(layers)}." in name for name in manifest["tensors"])
        rows = Embedder.load(folder, "cpu").encode(TEXTS)
        assert np.abs(rows - of_transformers(hf, TEXTS, layers)).max() < 1e-5
        assert np.abs(rows - of_transformers(hf, TEXTS, sorted(layers, reverse=True))).max() > 1e-4
    assert read_manifest(first / "step-00000000")["config"]["init_layers"] == [3, 0, 2]


def test_a_run_of_some_layers_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", torch.float32, config=dataclasses.replace(MODEL, num_hidden_layers=3))
    options = {"checkpoint": {"resume": "auto"}, "optim": {"warmup_steps": 0, "min_lr": 1e-5}}
    calm = run(tmp_path, "calm", hf, [2, 0], 2, **options)
    run(tmp_path, "stopped", hf, [2, 0], 1, **options)
    stopped = run(tmp_path, "stopped", hf, [2, 0], 2, **options)
    ends = [read_manifest(folder / "step-00000002") for folder in (calm, stopped)]
    assert ends[0]["ledger"] == ends[1]["ledger"] and ends[0]["recent_losses"] == ends[1]["recent_losses"]
    first = Embedder.load(calm / "step-00000002", "cpu").encode(TEXTS)
    assert np.array_equal(first, Embedder.load(stopped, "cpu").encode(TEXTS))
    assert np.abs(first - of_transformers(hf, TEXTS, [2, 0])).max() > 1e-6, "the steps have moved it"


@pytest.mark.parametrize(
    "layers, init_from, says",
    [
        ([0, 2], "hf", r"init_layers has 2, and .*hf has the layers 0 to 1"),
        ([1, 1], "hf", "must be different layers"),
        ([-1], "hf", "counted from 0"),
        ([0], "", "are of init_from: give that"),
    ],
)
def test_layers_that_are_not_there_are_refused(
    tmp_path: Path, layers: list, init_from: str, says: str
) -> None:
    write_hf(tmp_path / "hf", torch.float32)
    source = init_from and str(tmp_path / init_from)
    with pytest.raises(UserError, match=says):
        prepare(train_config(tmp_path, init_from=source, init_layers=layers, steps=1))


def test_a_resumed_run_says_what_it_began_with(tmp_path: Path, monkeypatch) -> None:
    """Its weights are those of its checkpoint: another init_from is said, and neither manifests nor the card
    come from it; other layers are refused. A folder that is gone may have moved."""
    hf, other = (
        write_hf(tmp_path / name, torch.float32, seed, dataclasses.replace(MODEL, num_hidden_layers=3))
        for name, seed in (("hf", 1), ("other", 2))
    )
    (other / "LICENSE").write_text("of the other one")
    options = {"checkpoint": {"resume": "auto"}, "optim": {"warmup_steps": 0}}
    output = run(tmp_path, "run", hf, [2, 0], 1, **options)
    for layers in ([0, 2], [1, 0], []):
        with pytest.raises(UserError, match=r"began with init_layers=\[2, 0\] and this run has"):
            run(tmp_path, "run", hf, layers, 2, **options)

    def goes_on(steps: int, init_from: Path) -> list[str]:
        log: list[str] = []
        config = train_config(
            tmp_path, init_from=str(init_from), init_layers=[2, 0], output_dir=str(output), steps=steps,
            **options,
        )  # fmt: skip
        with distributed(config.parallel, "cpu") as mesh:
            Trainer(config, mesh, prepare(config), log=log.append).run()
        return [line for line in log if "init_from" in line]

    (line,) = goes_on(2, other)
    assert f"init_from was '{hf}', now '{other}'" in line and line.endswith(f"began with '{hf}'")
    assert read_manifest(output / "step-00000002")["config"]["init_from"] == str(hf)
    card = describe([open_weights(output)])
    assert card["base_model"] == "hf" and "license_files" not in card
    monkeypatch.chdir(tmp_path)
    assert goes_on(3, Path("hf")) == [], "the same folder"
    hf.rename(tmp_path / "moved")
    (line,) = goes_on(4, tmp_path / "moved")
    assert "which is gone" in line
    assert read_manifest(output / "step-00000004")["config"]["init_from"] == str(tmp_path / "moved")


def test_each_option_that_changed_at_a_resume_is_named_alone(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", torch.float32)

    def said(steps: int, **changes) -> list[str]:
        log: list[str] = []
        config = train_config(
            tmp_path, init_from=str(hf), steps=steps, checkpoint={"resume": "auto"}, **changes
        )
        with distributed(config.parallel, "cpu") as mesh:
            Trainer(config, mesh, prepare(config), log=log.append).run()
        return [line.removeprefix("WARNING: ") for line in log if "changed since" in line]

    assert said(1, lora={"rank": 2, "dropout": 0.25}, loss={"matryoshka_dims": [16, 64]}) == []
    assert said(1, lora={"rank": 2, "dropout": 0.5}, loss={"temperature": 0.05}) == [
        "loss.temperature changed since the checkpoint: 0.02 -> 0.05",
        "loss.matryoshka_dims changed since the checkpoint: [16, 64] -> []",
        "lora.dropout changed since the checkpoint: 0.25 -> 0.5",
    ]
