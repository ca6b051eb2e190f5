"""Where weights come from: a Hugging Face folder, one of our checkpoints or runs, or a seed. One way to fill a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from nemo_embed_core.checkpoint import sharded
from nemo_embed_core.config import ModelConfig, RopeScaling, UserError
from nemo_embed_core.model.hf import Box, HFReader, local_box, parameter_shapes, tp_dim
from nemo_embed_core.model.hf_config import read_config
from nemo_embed_core.model.llama import initial_weight
from nemo_embed_core.parallel.fsdp import plain_name
from nemo_embed_core.parallel.grad_norm import local_tensor


class BoxReader(Protocol):
    def read_box(self, name: str, box: Box) -> Tensor: ...


@dataclass(frozen=True)
class Weights:
    """The shape of a model, boxes of its parameters, the folder with its tokenizer and what identifies the values."""

    model: ModelConfig
    reader: BoxReader
    folder: Path
    dtype: torch.dtype  # of the stored values
    digest: str  # changes when a weight changes


class RandomReader:
    """Boxes of freshly initialised weights: a function of (seed, name), the same under every layout."""

    def __init__(self, config: ModelConfig, seed: int):
        self.config, self.seed = config, seed
        self.shapes = parameter_shapes(config)

    def read_box(self, name: str, box: Box) -> Tensor:
        whole = initial_weight(name, self.shapes[name], self.seed, self.config.initializer_range)
        return whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))]


def model_from_dict(values: dict) -> ModelConfig:
    """ModelConfig from the manifest."""
    scaling = values.get("rope_scaling")
    try:
        return ModelConfig(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})
    except TypeError as error:
        raise sharded.CheckpointError(f"the manifest's model does not fit this version: {error}") from None


def read_model_config(path: str) -> ModelConfig:
    """The shape alone, without touching a weight: for checks that must come before any process group."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a Hugging Face folder, a checkpoint or a run of ours")
    if sharded.is_checkpoint(folder):
        return model_from_dict(sharded.read_manifest(sharded.find(folder))["model"])
    return read_config(folder)


def tokenizer_folder(path: str) -> Path:
    folder = Path(path)
    return sharded.find(folder) if sharded.is_checkpoint(folder) else folder


def open_weights(path: str) -> Weights:
    """Names and shapes are checked; of a checkpoint of ours every file's sha256 too."""
    config = read_model_config(path)
    folder = Path(path)
    if sharded.is_checkpoint(folder):
        folder = sharded.find(folder)
        manifest = sharded.verify(folder)
        reader = sharded.Reader(folder)
        expected = parameter_shapes(config)
        reader.check({**expected, **{p + n: s for n, s in expected.items() for p in sharded.OPTIM_PREFIXES}})
        digests = sorted(f["sha256"] for n, f in manifest["files"].items() if n.startswith("model-"))
        dtype = getattr(torch, manifest.get("export_dtype", "float32"))
        return Weights(config, reader, folder, dtype, hashlib.sha256("".join(digests).encode()).hexdigest())
    hf = HFReader(folder, config)
    return Weights(config, hf, folder, hf.dtype, hf.digest())


def fill(
    model: nn.Module, reader: BoxReader, config: ModelConfig, tp: tuple[int, int] = (0, 1), dp: tuple[int, int] = (0, 1)
) -> None:
    """Read this rank's box of every parameter into it; tp and dp are (rank, size)."""
    shapes = parameter_shapes(config)
    with torch.no_grad():
        for full_name, parameter in model.named_parameters():
            name = plain_name(full_name)
            box = local_box(shapes[name], tp_dim(name), *tp, *dp)
            target = local_tensor(parameter)
            assert tuple(target.shape) == box[1], f"{name}: {target.shape=} {box=}"
            if target.numel():
                target.copy_(reader.read_box(name, box))
