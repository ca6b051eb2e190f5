"""Alarms of a run (evaluation/alarms.py), from what its steps have at hand: on the first rank, which writes
metrics.

    watch = Watch(rows_of_a_step, config.loss, log)
    watch.recall(lines_of_metrics_jsonl)                       # where a run goes on
    engine.seen = watch.seen                                   # None in most steps
    engine.forward_backward(batches)
    values |= watch.after(values)                              # {"alarms": {...}, "spread_queries": {...}}

Losses and rows without a candidate are those of metrics.jsonl. The vectors are those of the steps' own
forwards: of every hundredth step and as many after it as it takes for ROWS different texts of each side. They
are copied to the host once they are all there, and cost two eigendecompositions of [ROWS, ROWS] a side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.config import LossConfig
from nemo_embed_core.data.packing import MicroBatch
from nemo_embed_core.evaluation.alarms import (
    WINDOW,
    Alarm,
    apart,
    collapse,
    no_negatives,
    spread,
    trivial_negatives,
)

EVERY, ROWS = 100, 128  # steps between looks at the vectors; vectors of a side
SIDES = ("queries", "documents")


class Watch:
    """rows: of a step, over all ranks.  An alarm is said when it begins, and again when it does so anew."""

    def __init__(self, rows: int, loss: LossConfig, log: Callable[[str], None]):
        self._rows, self._loss, self._log = rows, loss, log
        self._losses = deque[float](maxlen=WINDOW)
        self._info_nce = deque[float](maxlen=WINDOW)  # of the steps that have it
        self._without = deque[float](maxlen=WINDOW)
        self._contrasted = deque[float](maxlen=WINDOW)  # rows of a step that are no graded pairs
        self._dev: dict[str, list[float]] = {}
        self._train: list[float] = []  # the mean loss before each evaluation
        self._vectors: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        self._ids, self._drawn = set[int](), set[int]()  # documents and rows of them
        self._is_looking, self._looks = True, 0
        self._spreads: dict[str, dict[str, float]] = {}
        self.sounding: dict[str, Alarm] = {}

    @property
    def seen(self) -> Callable[[Tensor, MicroBatch], None] | None:
        """What takes the vectors of a micro-batch, where they are wanted."""
        return self._take if self._is_looking else None

    def _take(self, rows_ND: Tensor, batch: MicroBatch) -> None:
        mask = batch.document_mask.flatten().tolist()
        ids = batch.document_ids.flatten().tolist()
        new = []
        for i, (there, document) in enumerate(zip(mask, ids, strict=True)):
            if there and document not in self._ids:
                self._ids.add(document)
                new.append(i)
        # With in-batch negatives a micro-batch may come twice.
        rows = [i for i, row in enumerate(batch.rows.tolist()) if row not in self._drawn]
        self._drawn.update(batch.rows.tolist())
        indices = (batch.query_index[rows], batch.document_index.flatten()[new])
        for side, index in zip(SIDES, indices, strict=True):
            room = ROWS - sum(map(len, self._vectors[side]))
            # Their order in a micro-batch is that of their lengths: every few of them, not the first.
            every = max(1, len(index) // max(1, room))
            if room and len(index):
                self._vectors[side].append(rows_ND[index[::every][:room].to(rows_ND.device)])

    def after(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What metrics.jsonl also says of the step whose values these are, or of an evaluation alone: alarms
        that sound, by kind, and of every look the spread of each side."""
        more = self._look(values["step"]) if "loss" in values else {}
        self._hear({**values, **more})
        sounding = self._judge()
        for kind in sounding.keys() - self.sounding.keys():
            self._log(f"WARNING: step {values['step']}: {kind}: {sounding[kind].says}")
        self.sounding = sounding
        return {**more, **({"alarms": dict.fromkeys(sounding, 1)} if sounding else {})}

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> Iterable[str]:
        """Kinds that sound after these lines of metrics.jsonl, as if this process had made them; nothing is
        said again. A dev set that another one has replaced under its name is taken for the same."""
        for values in lines:
            self._hear(values)
        self.sounding = self._judge()
        return self.sounding.keys()

    def _hear(self, values: Mapping[str, Any]) -> None:
        if "loss" in values:
            self._losses.append(values["loss"])
            self._without.append(values.get("rows_without_candidates", 0))  # 0.1.0 did not count them
            self._contrasted.append(self._rows - values.get("graded_rows", 0))
            if (info_nce := self._info_nce_of(values)) is not None:
                self._info_nce.append(info_nce)
        held_out = {name: loss for name, loss in values.get("eval", {}).items() if name.endswith("/loss")}
        if held_out and self._losses:  # before the first step there is nothing to compare it with
            self._train.append(math.fsum(self._losses) / len(self._losses))
            for name, loss in held_out.items():
                self._dev.setdefault(name, []).append(loss)
        spreads = {side: values[f"spread_{side}"] for side in SIDES if f"spread_{side}" in values}
        self._spreads |= spreads
        self._looks += bool(spreads)

    def _info_nce_of(self, values: Mapping[str, Any]) -> float | None:
        """Without its weight, of matryoshka_dims the largest; None where the term is off, or every row of the
        step a graded pair."""
        if not (weight := self._loss.info_nce_weight):
            return None
        if "losses" not in values:  # it is the only term
            return values["loss"] / weight
        each = [loss for name, loss in values["losses"].items() if name.partition("@")[0] == "info_nce"]
        return max((loss for loss in each if loss is not None), default=None)

    def _judge(self) -> dict[str, Alarm]:
        found = [no_negatives(self._without, self._contrasted), trivial_negatives(self._info_nce)]
        found += [apart(losses, self._train[-len(losses) :]) for losses in self._dev.values()]
        # The first look is of weights that are not trained yet, which may be random.
        for side, figures in self._spreads.items() if self._looks > 1 else ():
            found.append(collapse(figures, f"the vectors of the {side}"))
        return {alarm.kind: alarm for alarm in found if alarm is not None}

    def _look(self, step: int) -> dict[str, dict[str, float]]:
        """The spread of each side, once there are vectors enough or the next look begins."""
        ends = (step + 1) % EVERY == 0
        is_full = all(sum(map(len, self._vectors[side])) >= ROWS for side in SIDES)
        found: dict[str, dict[str, float]] = {}
        if self._is_looking and (is_full or ends):
            for side, parts in self._vectors.items():
                if sum(map(len, parts)) > 1:
                    found[side] = spread(torch.cat([part.float() for part in parts]).cpu().numpy())
            self._vectors = {side: [] for side in SIDES}
            self._ids, self._drawn = set(), set()
        self._is_looking = ends or (self._is_looking and not is_full)
        return {f"spread_{side}": figures for side, figures in found.items()}
