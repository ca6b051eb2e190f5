"""Some of a model's layers as a model of their own (TrainConfig.init_layers): its shape and its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from nemo_embed_core.checkpoint.weights import BoxReader
from nemo_embed_core.config import ModelConfig
from nemo_embed_core.errors import UserError
from nemo_embed_core.parallel.boxes import Box

_LAYERS = "model.layers."  # before the number, in a parameter's name


def kept_shape(model: ModelConfig, layers: Sequence[int], source: str) -> ModelConfig:
    """The shape of `layers` of a model of this one, of all where none are named; UserError for others than it
    has."""
    if not layers:
        return model
    if beyond := [layer for layer in layers if layer >= model.num_hidden_layers]:
        raise UserError(
            f"init_layers has {beyond[0]}, and {source} has the layers 0 to {model.num_hidden_layers - 1}"
        )
    return replace(model, num_hidden_layers=len(layers))


class KeptLayers:
    """Layer i of what is read is layer layers[i] of `reader`."""

    def __init__(self, reader: BoxReader, layers: Sequence[int]):
        self._reader, self._layers = reader, layers

    def read_box(self, name: str, box: Box) -> Tensor:
        if name.startswith(_LAYERS):
            number, _, rest = name.removeprefix(_LAYERS).partition(".")
            name = f"{_LAYERS}{self._layers[int(number)]}.{rest}"
        return self._reader.read_box(name, box)
