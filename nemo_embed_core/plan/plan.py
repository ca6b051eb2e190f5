"""Layouts of a run on a cluster: what each needs, what it sends and how long it takes, the best first.

    found = plan(PlanConfig(...), log)
    print(report(found))

Memory comes from the engine itself on fake tensors (pretend.py), the wire from formulas that tests hold to
the real collectives (parallel/wire.py), time from published rates (time.py, hardware.py).
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from nemo_embed_core.checkpoint.kept_layers import kept_shape
from nemo_embed_core.checkpoint.runs import is_best
from nemo_embed_core.checkpoint.weights import read_model_config
from nemo_embed_core.config.model import ModelConfig
from nemo_embed_core.config.plan import PlanConfig
from nemo_embed_core.config.train import Recompute, TrainConfig
from nemo_embed_core.data.mix import parts
from nemo_embed_core.data.sampler import sampler
from nemo_embed_core.data.shapes import Most, Shape
from nemo_embed_core.data.teacher_vectors import teacher_width
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.spec import (
    HEAD_NORMS,
    adapter_shapes,
    check_fp8,
    family_of,
    parameter_shapes,
    rank_units,
    tp_dim,
    trained_shapes,
)
from nemo_embed_core.parallel.wire import Key, LoraWire, Traffic, Wire, step_traffic
from nemo_embed_core.plan.hardware import GPUS
from nemo_embed_core.plan.lengths import Split, Texts, split, texts_of
from nemo_embed_core.plan.pretend import Seen, pretend
from nemo_embed_core.plan.time import Layout, step_seconds
from nemo_embed_core.train.metrics import training_flops
from nemo_embed_core.train.optim import update_bytes

# What fake tensors do not see: workspaces and fragments grow with what is used, the CUDA context and NCCL do
# not.
SLACK_SHARE, SLACK_BYTES = 0.03, 3e9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, and what it needs and takes; `why` it is none, where it is none."""

    layout: Layout
    recompute: Recompute
    max_tokens: int
    why: str = ""
    peak: int = 0
    micro_batches: int = 0
    fill: float = 0.0  # real tokens of the room of a step
    tokens: float = 0.0  # of a step
    flops: float = 0.0
    seconds: tuple[float, float] = (0.0, 0.0)
    traffic: dict[Key, Traffic] | None = None

    @property
    def name(self) -> str:
        lay = self.layout
        copies = f" in {lay.replicate} copies" if lay.replicate > 1 else ""
        return f"tp {lay.tp} x dp {lay.dp}{copies}, recompute {self.recompute}, {self.max_tokens:,} tokens"


@dataclass(frozen=True, kw_only=True)
class Found:
    config: PlanConfig
    train: TrainConfig
    model: ModelConfig
    model_words: str
    texts: Texts
    best: list[Candidate]  # that fit, best first
    seen: Seen | None  # of the best
    too_large: list[Candidate]
    impossible: list[Candidate]

    @property
    def num_parameters(self) -> int:
        return num_parameters(self.model)

    @property
    def num_trained(self) -> int:
        return num_trained(self.train, self.model)


def num_parameters(model: ModelConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in parameter_shapes(model).values())


def num_trained(train: TrainConfig, model: ModelConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in trained_shapes(model, train.lora).values())


def needed(peak: float) -> float:
    return peak * (1 + SLACK_SHARE) + SLACK_BYTES


def plan(config: PlanConfig, log: Callable[[str], None] = print) -> Found:
    train = TrainConfig.from_yaml(*config.files)
    model, words = _model(train)
    texts = texts_of(
        config.store,
        train.data,
        train.loss.takes_lone_rows,
        config.lengths,
        train.global_batch_size,
        train.seed,
    )
    if train.epochs is not None:
        texts = texts if texts.sampler else _at_their_caps(config, train, texts)
        assert texts.sampler is not None
        train = replace(train, steps=texts.sampler.steps(train.epochs), epochs=None)
    candidates = list(_candidates(config, train, model))
    count = sum(not candidate.why for candidate in candidates)
    log(f"{count} layouts to try; fewer values of tp_sizes and max_tokens make them fewer")
    fitting, too_large, impossible = [], [], []
    for i, candidate in enumerate(candidates):
        log(f"{i + 1}/{len(candidates)} {candidate.name}")
        candidate = candidate if candidate.why else _evaluate(config, train, model, texts, candidate)
        if candidate.why:
            impossible.append(candidate)
        elif needed(candidate.peak) > GPUS[config.cluster.gpu].memory:
            too_large.append(candidate)
        else:
            fitting.append(candidate)
    fitting.sort(key=lambda c: sum(c.seconds) / c.tokens)
    seen = None
    if fitting:
        chosen = fitting[0]
        seen = pretend(_with(train, chosen), model, config.cluster.world_size, _worst(train, texts, chosen))
    return Found(
        config=config, train=train, model=model, model_words=words, texts=texts, best=fitting, seen=seen,
        too_large=sorted(too_large, key=lambda c: c.peak), impossible=impossible,
    )  # fmt: skip


def _at_their_caps(config: PlanConfig, train: TrainConfig, texts: Texts) -> Texts:
    """With the draws of datasets that all have at least as many rows as their cap."""
    datasets = train.data.datasets
    caps = [dataset.cap for dataset in datasets if dataset.cap is not None]
    if not caps or len(caps) < len(datasets):
        raise UserError(
            f"{', '.join(config.files)}: epochs={train.epochs} is of rows that nobody has counted: give "
            "store, the folder of their token store, a cap for every dataset, or steps in place of epochs"
        )
    ends = np.cumsum(caps)
    drawn = parts(datasets, np.arange(ends[-1]), ends)
    words = f"{texts.words}; as many rows as the caps of their {len(caps)} datasets, which may have fewer"
    return replace(
        texts, words=words, sampler=sampler(drawn, train.data.batches, train.global_batch_size, train.seed)
    )


def _model(train: TrainConfig) -> tuple[ModelConfig, str]:
    if train.init_from and (Path(train.init_from).exists() or is_best(Path(train.init_from))):
        whole = read_model_config(train.init_from)
        found = kept_shape(whole, train.init_layers, train.init_from)
        return replace(found, pooling=train.model.pooling, is_causal=train.model.is_causal), train.init_from
    if train.init_from:
        return (
            train.model,
            f"init_from={train.init_from} is not here: the shape is that of the options `model`",
        )
    return train.model, "the options `model`"


def _candidates(config: PlanConfig, train: TrainConfig, model: ModelConfig) -> Iterator[Candidate]:
    cluster = config.cluster
    sizes = sorted({train.data.max_tokens, *config.max_tokens})
    copies = sorted({1, cluster.nodes, train.parallel.dp_replicate})
    for tp, replicate, recompute, max_tokens in itertools.product(
        sorted({*config.tp_sizes}), copies, typing.get_args(Recompute), sizes
    ):
        layout = Layout(tp, replicate, cluster.world_size)
        why = ""
        if model.num_key_value_heads % tp or cluster.per_node % tp:
            heads, gpus = model.num_key_value_heads, cluster.per_node
            why = f"tp {tp} must divide the {heads} KV heads and the {gpus} GPUs of a node"
        elif layout.dp % replicate:
            why = f"{replicate} copies do not divide dp {layout.dp}"
        elif train.global_batch_size % layout.dp:
            why = f"dp {layout.dp} does not divide global_batch_size={train.global_batch_size}"
        elif train.precision == "fp8":
            why = _why_not_fp8(config, model, tp)
        yield Candidate(layout=layout, recompute=recompute, max_tokens=max_tokens, why=why)


def _why_not_fp8(config: PlanConfig, model: ModelConfig, tp: int) -> str:
    if not GPUS[config.cluster.gpu].fp8[0]:
        return f"{config.cluster.gpu} has no fp8 products: precision=bf16"
    try:
        check_fp8(model, tp)
    except UserError as error:
        return str(error)
    return ""


def _with(train: TrainConfig, candidate: Candidate) -> TrainConfig:
    layout = candidate.layout
    parallel = replace(train.parallel, tp_size=layout.tp, dp_size=layout.dp, dp_replicate=layout.replicate)
    return replace(
        train, parallel=parallel, activation_checkpointing=candidate.recompute,
        data=replace(train.data, max_tokens=candidate.max_tokens),
    )  # fmt: skip


def _room(candidate: Candidate) -> int:
    return candidate.max_tokens // candidate.layout.tp * candidate.layout.tp


def _worst(train: TrainConfig, texts: Texts, candidate: Candidate) -> list[Shape]:
    """What training runs first, of as many tokens as a micro-batch can have, in sequences of the mean."""
    room, M = _room(candidate), 1 + train.data.num_hard_negatives
    rows = train.global_batch_size // candidate.layout.dp
    tp = candidate.layout.tp
    tokens = min(room, -(-rows * texts.longest // tp) * tp)
    mean = float(np.mean([batch.sum() / (batch > 0).sum() for batch in texts.batches]))
    queries = max(1, min(rows, round(tokens / mean / (1 + M))))
    sequences = queries * (1 + M)
    most = Most(tokens, sequences, -(-tokens // sequences), queries, candidate.micro_batches)
    return most.step(M, train.loss.couples_rows, rows)


LAYERS = (2, 4)  # of the models whose peaks are continued to the whole one


def _evaluate(
    config: PlanConfig, train: TrainConfig, model: ModelConfig, texts: Texts, candidate: Candidate
) -> Candidate:
    layout = candidate.layout
    if texts.longest > _room(candidate):
        return replace(
            candidate,
            why=f"a row can have {texts.longest:,} tokens, more than max_tokens={candidate.max_tokens:,}",
        )
    splits = [split(batch, layout.dp, _room(candidate)) for batch in texts.batches]
    candidate = replace(candidate, micro_batches=max(len(s.micro_batches) for s in splits))
    chosen = _with(train, candidate)
    peak = _peak(chosen, model, layout.world_size, _worst(train, texts, candidate))
    times, traffic, is_frozen = [], {}, train.lora.rank > 0
    for s in splits:
        traffic = traffic_of(chosen, model, layout, s)
        times.append(
            step_seconds(
                config.cluster, layout, model, [(t, squares) for t, squares, _ in s.micro_batches], traffic,
                candidate.recompute, num_parameters(model), update_bytes(train.optim),
                train.precision == "fp8", num_trained(train, model) if is_frozen else None,
            )
        )  # fmt: skip
    tokens = float(np.mean([s.tokens for s in splits]))
    rooms = [len(s.micro_batches) * layout.dp * candidate.max_tokens for s in splits]
    return replace(
        candidate, peak=peak, traffic=traffic,
        tokens=tokens, fill=tokens / float(np.mean(rooms)),
        flops=float(np.mean([training_flops(model, s.tokens, s.squares, is_frozen) for s in splits])),
        seconds=(float(np.mean([t[0] for t in times])), float(np.mean([t[1] for t in times]))),
    )  # fmt: skip


def _peak(train: TrainConfig, model: ModelConfig, world_size: int, worst: list[Shape]) -> int:
    """Of two small depths, continued to all layers."""
    peaks = [
        pretend(train, replace(model, num_hidden_layers=n), world_size, worst, parts=False).peak
        for n in LAYERS
    ]
    slope = (peaks[1] - peaks[0]) / (LAYERS[1] - LAYERS[0])
    return round(peaks[0] + slope * (model.num_hidden_layers - LAYERS[0]))


def peak_of(train: TrainConfig, model: ModelConfig, world_size: int) -> int:
    """Bytes that a rank of data-parallel training needs at most, whatever its texts are."""
    M, (query, document) = (
        1 + train.data.num_hard_negatives,
        (max(each) for each in zip(*train.data.all_lengths(), strict=True)),
    )
    rows = -(-train.global_batch_size // world_size)
    longest, room = query + M * document, train.data.max_tokens
    count = max(1, -(-rows * longest // room))
    queries = max(1, min(rows, room // longest))
    most = Most(min(room, rows * longest), queries * (1 + M), document, queries, count)
    return _peak(train, model, world_size, most.step(M, train.loss.couples_rows, rows))


def traffic_of(train: TrainConfig, model: ModelConfig, layout: Layout, step: Split) -> dict[Key, Traffic]:
    """Of a step whose micro-batches are as full on every rank as on the fullest."""
    shapes = [(-(-t // layout.tp) * layout.tp, n + (t % layout.tp > 0)) for t, _, n in step.micro_batches]
    return step_traffic(wire_of(train, model, layout), shapes)


def wire_of(train: TrainConfig, model: ModelConfig, layout: Layout) -> Wire:
    queries, split = train.global_batch_size // layout.dp, train.optim.master_weights == "split"
    whole = parameter_shapes(model) | adapter_shapes(model, train.lora)
    return Wire(
        units=rank_units(model, layout.tp, whole), lora=_lora_wire(train, model, layout.tp),
        hidden_size=model.hidden_size, dp_shard=layout.shard,
        dp_replicate=layout.replicate, tp=layout.tp, sequence_parallel=train.parallel.sequence_parallel,
        reshard=train.parallel.reshard_after_forward and (layout.dp > 1 or not (split or train.lora.rank)),
        recompute=train.activation_checkpointing == "full", fp8=train.precision == "fp8",
        head_norms=[model.head_dim] * (len(HEAD_NORMS) if family_of(model).qk_norm else 0),
        in_batch_columns=train.loss.columns(train.data.num_hard_negatives) * queries,
        in_batch_queries=queries if train.loss.has_query_columns else 0,
        graded_queries=queries if train.loss.cosent_weight else 0,
        couples_rows=train.loss.couples_rows, widths=max(1, len(train.loss.matryoshka_dims)),
        learned_temperature=train.loss.temperature_lr > 0,
        projection=teacher_width(train) * model.hidden_size,
        reduce_bytes=2 if train.parallel.reduce_dtype == "bf16" else 4,
    )  # fmt: skip


def _lora_wire(train: TrainConfig, model: ModelConfig, tp: int) -> LoraWire | None:
    shapes, targets = adapter_shapes(model, train.lora), train.lora.targets
    if not shapes:
        return None
    block = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.0.")}
    return LoraWire(
        units=rank_units(model, tp, shapes), rank=train.lora.rank,
        columns=sum(name in targets for name in ("qkv_proj", "gate_up_proj")),
        rows=sum(name in targets for name in ("o_proj", "down_proj")), has_last="down_proj" in targets,
        whole=[shape for name, shape in block.items() if tp_dim(name) is None],
    )  # fmt: skip
