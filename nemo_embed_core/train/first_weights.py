"""What the model is filled with before its first step: a base model, some layers of one, either of them
turned, LoRA's factors beside one, or random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_embed_core.checkpoint.adapter import Adapter, adapter_of
from nemo_embed_core.checkpoint.kept_layers import KeptLayers
from nemo_embed_core.checkpoint.turned_axes import TurnedAxes
from nemo_embed_core.checkpoint.weights import BoxReader, RandomReader, Weights, fill, open_weights
from nemo_embed_core.config import LoraConfig, ModelConfig, TrainConfig
from nemo_embed_core.data.sampler import Sampler
from nemo_embed_core.data.store import Store
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.lora import initial_factor
from nemo_embed_core.model.spec import adapter_shapes
from nemo_embed_core.parallel.boxes import Box
from nemo_embed_core.parallel.collectives import raise_first
from nemo_embed_core.train.engine import Engine
from nemo_embed_core.train.optim import remainder_of
from nemo_embed_core.train.principal_axes import principal_axes


def open_base(
    config: TrainConfig, checkpoint: Path | None, manifest: Mapping[str, Any] | None
) -> Weights | None:
    """init_from, where its weights are needed: of a new run, and whenever they stay beside LoRA's."""
    if not config.init_from or (checkpoint is not None and not config.lora.rank):
        return None
    weights = open_weights(config.init_from, base=True)
    adapter = adapter_of(manifest) if manifest is not None else None
    if checkpoint is not None and adapter is not None:
        adapter.check_base(weights, checkpoint)
    return weights


def adapter_to_save(config: TrainConfig, weights: Weights | None) -> Adapter | None:
    """What manifests say of the adapters; None where whole models are saved."""
    if not config.lora.rank:
        return None
    assert weights is not None, "LoRA has a base: TrainConfig"
    return Adapter.of(config.lora, weights)


def check_lora(config: TrainConfig, weights: Weights) -> None:
    """UserError for a base that LoRA's checkpoints could not name."""
    if config.lora.rank and weights.adapted is not None:
        raise UserError(
            f"lora: {config.init_from} holds LoRA adapters itself, of {weights.adapted.adapter.base}; make "
            "one model of both first (launch/merge.py), and give that as init_from"
        )


class FirstFactors:
    """LoRA's factors as training begins; all else is read."""

    def __init__(self, reader: BoxReader, model: ModelConfig, lora: LoraConfig, seed: int):
        self._reader, self._shapes, self._seed = reader, adapter_shapes(model, lora), seed

    def read_box(self, name: str, box: Box) -> Tensor:
        if name not in self._shapes:
            return self._reader.read_box(name, box)
        whole = initial_factor(name, self._shapes[name], self._seed)
        return whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))]


def first_reader(config: TrainConfig, model: ModelConfig, weights: Weights | None) -> BoxReader:
    reader: BoxReader = RandomReader(model, config.seed)
    if weights is not None:
        reader = KeptLayers(weights.reader, config.init_layers) if config.init_layers else weights.reader
    return FirstFactors(reader, model, config.lora, config.seed) if config.lora.rank else reader


def fill_first(
    engine: Engine, weights: Weights | None, store: Store, sampler: Sampler, log: Callable[[str], None]
) -> None:
    """What a run begins with. weights: open_base's, without which a resumed run's come afterwards."""
    config = engine.config
    reader = first_reader(config, engine.model_config, weights)
    fill_engine(engine, reader)
    if config.init_axes == "principal" and weights is not None:
        axes_DD = principal_axes(engine, store, sampler, log)
        fill_engine(engine, TurnedAxes(reader, engine.model_config, axes_DD))


def fill_engine(engine: Engine, reader: BoxReader) -> None:
    """This rank's box of every parameter; UserError on all ranks."""
    mesh, failure = engine.mesh, None
    try:
        fill(
            engine.model,
            reader,
            engine.model_config,
            (mesh.tp.rank, mesh.tp.size),
            (mesh.shard_rank, mesh.shard_size),
            partial(remainder_of, engine.optimizer),
            engine.shapes,
        )
    except UserError as error:
        failure = str(error)
    raise_first(failure)
