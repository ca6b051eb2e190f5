"""What a training step sends: calls and bytes of every collective of the engine, by axis, as formulas.

    traffic = step_traffic(Wire(...), micro_batches)    {("dp_shard", "all_gather"): Traffic(33, 15.0e9), ...}

Bytes are those of the whole buffer, gathered or before it is scattered; of a group of n ranks each sends
(n - 1) / n of it, of an all-reduce twice that. `Counted` counts what really happens, under the same keys.

L layers · D hidden_size · T tokens and N sequences of a micro-batch, padding included · n micro-batches
W bytes of a unit's weights on a tp rank, as they run, padded to equal shards; with fp8 the matrices of a
block have 1 byte an element · G the same of its gradients

axis           operation        calls x bytes, over the L blocks and the root as units
dp_shard       all_gather       W of each unit, once a step; with reshard in each forward and backward
               reduce_scatter   G of each unit, once a step; with reshard in each backward
dp_replicate   all_reduce       G / shard of each unit, once a step
tp (SP)        all_gather       of T D: embedding 1 in backward; a block 2 forward, 4 backward
               reduce_scatter   of T D: embedding 1 forward; a block 2 forward, 2 backward
               all_reduce       of N D: pooling 1 forward; once a step the gradients of the 2 L + 1 norms,
                                and, at any tp, of those of heads (Qwen3)
tp (no SP)     all_reduce       of T D: embedding 1 forward; a block 2 forward, 2 backward
tp (fp8)       all_gather       of a block 2 forward and 2 of the 4 backward: 1 byte an element
               all_reduce       the largest values, 4 bytes: a block 4 forward (2 without SP), 2 backward;
                                with a dp_shard of one also those of its 4 matrices, once a step; with reshard
                                in each forward and backward
dp_shard, tp   all_reduce       with fp8, of more: the largest values of all 4 L matrices at once, once a step
dp             all_gather       with in-batch terms: documents, and for query-query queries, as they are
                                scored, in the dtype of the run, and the documents' ids, once a step
               reduce_scatter   the gradients of those rows, in fp32, once a step
               with CoSENT      all_gather of a cosine and a grade of each row, in fp32, and reduce_scatter of
                                the cosines' gradients, once a step for each width
               all_reduce       the gradient of a learned temperature, 4 bytes, and of a projection to a
                                teacher's vectors, 4 bytes an element
dp_shard, tp   all_reduce       the square of the gradient norm, 4 bytes
LoRA           W is frozen      no reduction over dp; no gather of a column-parallel input in backward, nor of
                                the embedding's gradient, and no gradient of the first block's input
               tp (SP)          of T r: a column-parallel layer all_gather forward, reduce_scatter backward, a
                                row-parallel one the reverse; the gradients of whole factors as the norms'
               tp (no SP)       all_reduce of T r: row-parallel forward, column-parallel backward

For LoRA qkv_proj is taken to be among its targets: without it a little less is sent.

GradCache (in-batch negatives or CoSENT, and n > 1) runs each forward but the first micro-batch's twice; full
recomputation runs a block's forward in its backward, selective none of its collectives. An axis of one rank
sends nothing. The trainer adds an all-reduce of some hundred bytes over all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_embed_core.parallel.mesh import Mesh


class Traffic(NamedTuple):
    calls: int
    bytes: int


Key = tuple[str, str]  # axis, operation


def sent(operation: str, whole: float, ranks: int) -> float:
    """Bytes that each rank sends of buffers of `whole` bytes, by the ring algorithm."""
    return (2 if operation == "all_reduce" else 1) * (ranks - 1) / ranks * whole


@dataclass(frozen=True, kw_only=True)
class LoraWire:
    """units: as Wire's, of the factors, which alone have gradients. columns, rows: of a block's column- and
    row-parallel layers those that have factors, of this rank; the last layer of a block is among them or
    not. whole: shapes of a block's factors that tp does not cut."""

    units: Sequence[Sequence[Sequence[int]]]
    rank: int
    columns: int
    rows: int
    has_last: bool
    whole: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Wire:
    """units: of the root and of each block, the shapes of its parameters on a tp rank."""

    units: Sequence[Sequence[Sequence[int]]]
    hidden_size: int
    dp_shard: int
    dp_replicate: int = 1
    tp: int = 1
    sequence_parallel: bool = True
    reshard: bool = False
    recompute: bool = False
    in_batch_columns: int = 0  # documents of a rank that go to all ranks; 0: own alone
    in_batch_queries: int = 0  # likewise
    graded_queries: int = 0  # of a rank, whose cosines and grades go to all ranks
    couples_rows: bool = False  # GradCache joins micro-batches
    widths: int = 1  # at which the loss is taken
    learned_temperature: bool = False
    projection: int = 0  # elements of the one to a teacher's vectors
    weight_bytes: int = (
        2  # of an element: as weights run and columns are scored, gradients are reduced, and rows are pooled
    )
    fp8: bool = False  # products of the blocks
    reduce_bytes: int = 4
    row_bytes: int = 4
    lora: LoraWire | None = None
    head_norms: Sequence[int] = ()  # lengths of a block's norms whose gradients tp ranks have shares of

    @property
    def num_layers(self) -> int:
        return len(self.units) - 1


def step_traffic(wire: Wire, micro_batches: Sequence[tuple[int, int]]) -> dict[Key, Traffic]:
    """Of micro-batches of (T, N), by the formulas above."""
    found: dict[Key, list[int]] = defaultdict(lambda: [0, 0])

    def add(axis: str, operation: str, calls: int, each: int) -> None:
        found[axis, operation][0] += calls
        found[axis, operation][1] += calls * each

    n, s, L, D = len(micro_batches), wire.dp_shard, wire.num_layers, wire.hidden_size
    passes = [1] + [2 if wire.couples_rows else 1] * (n - 1)  # forwards of each micro-batch
    gathers, reductions = (sum(passes) + n, n) if wire.reshard else (1, 1)
    lora = wire.lora
    for unit, (shapes, trained) in enumerate(
        zip(wire.units, lora.units if lora else wire.units, strict=True)
    ):
        numel, gradients = _numel(shapes, s), _numel(trained, s)
        if s > 1:
            in_fp8 = wire.fp8 and unit > 0  # not the root, which has no products
            one_byte = _numel([shape for shape in shapes if len(shape) > 1], s) if in_fp8 else 0
            one_byte -= gradients if lora and in_fp8 else 0
            size = numel * wire.weight_bytes - one_byte * (wire.weight_bytes - 1)
            add("dp_shard", "all_gather", gathers, size)
            add("dp_shard", "reduce_scatter", reductions if gradients else 0, gradients * wire.reduce_bytes)
        if wire.dp_replicate > 1:
            add("dp_replicate", "all_reduce", 1 if gradients else 0, gradients // s * wire.reduce_bytes)
    if wire.tp > 1:
        # What a block does again in backward: up to the last tensor that backward needs, which the
        # row-parallel product after it makes no more.
        again = 1 if wire.recompute else 0
        rows_again = again * L * (2 if lora and lora.has_last else 1)
        first = 1 if lora else 0  # products whose input has no gradient
        for (T, N), forwards in zip(micro_batches, passes, strict=True):
            hidden = T * D * wire.weight_bytes
            if wire.sequence_parallel:
                # Inputs of the column-parallel products, which backward gathers too, and its gradients.
                inputs = T * D if wire.fp8 else hidden
                add("tp", "all_gather", 2 * L * (forwards + again + (0 if lora else 1)), inputs)
                add("tp", "all_gather", 2 * L + 1 - first, hidden)
                add("tp", "reduce_scatter", (2 * L + 1) * forwards + 2 * L - first + rows_again, hidden)
                add("tp", "all_reduce", forwards, N * D * wire.row_bytes)
            else:
                add("tp", "all_reduce", (2 * L + 1) * forwards + 2 * L - first + rows_again, hidden)
            if lora:
                narrow, passed = T * lora.rank * wire.weight_bytes, L * (forwards + again)
                if wire.sequence_parallel:
                    add("tp", "all_gather", passed * lora.columns + L * lora.rows, narrow)
                    add("tp", "reduce_scatter", passed * lora.rows + L * lora.columns, narrow)
                else:
                    add("tp", "all_reduce", passed * lora.rows + L * lora.columns, narrow)
            if wire.fp8:
                matrices = 4 if wire.sequence_parallel else 2
                add("tp", "all_reduce", (matrices * (forwards + again) + 2) * L - first, 4)
                add("tp", "all_reduce", 4 * L * (forwards + again + 1) if wire.reshard and s == 1 else 0, 4)
        add("tp", "all_reduce", 4 * L if wire.fp8 and s == 1 and not wire.reshard else 0, 4)
        norms = sum(L * -(-size // s) for size in wire.head_norms) if lora is None else 0
        if wire.sequence_parallel:
            factors = [L * _numel([shape], s) // s for shape in lora.whole] if lora else []
            norms += sum(factors) if lora else (2 * L + 1) * -(-D // s)
        add("tp", "all_reduce", 1 if norms else 0, norms * 4)
        add("tp", "all_reduce", 1, 4)
    if s > 1:
        add("dp_shard", "all_reduce", 1, 4)
        if wire.fp8:
            add("dp_shard", "all_reduce", 1, 16 * L)
            if wire.tp > 1:
                add("tp", "all_reduce", 1, 16 * L)
    dp = s * wire.dp_replicate
    # The same ranks have one name.
    axis = "dp_shard" if wire.dp_replicate == 1 else "dp_replicate" if s == 1 else "dp"
    rows = [count for count in (wire.in_batch_columns, wire.in_batch_queries) if count and dp > 1]
    for count in rows:
        add(axis, "all_gather", 1, dp * count * D * wire.weight_bytes)
        add(axis, "reduce_scatter", 1, dp * count * D * wire.row_bytes)
    if rows:
        add(axis, "all_gather", 1, dp * rows[0] * 8)
    if wire.graded_queries and dp > 1:
        add(axis, "all_gather", wire.widths, dp * wire.graded_queries * wire.row_bytes)
        add(axis, "all_gather", wire.widths, dp * wire.graded_queries * 4)
        add(axis, "reduce_scatter", wire.widths, dp * wire.graded_queries * wire.row_bytes)
    if wire.learned_temperature and dp > 1:
        add(axis, "all_reduce", 1, 4)
    if wire.projection and dp > 1:
        add(axis, "all_reduce", 1, 4 * wire.projection)
    return {key: Traffic(*values) for key, values in sorted(found.items())}


def _numel(shapes: Sequence[Sequence[int]], shards: int) -> int:
    """Elements, padded to equal shards."""
    return sum(-(-rows // shards) * shards * torch.Size(rest).numel() for rows, *rest in shapes)


# ------------------------------------------------------------------------------------------ what happens

_OPERATIONS = {
    "allgather": "all_gather", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce", "all_reduce": "all_reduce",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """`with Counted(mesh) as counted: ...; counted.traffic`: every collective of this process, on whatever
    backend, fake tensors included. A group that is none of the mesh's has its own name as axis."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self._found: dict[Key, list[int]] = defaultdict(lambda: [0, 0])
        self._axes = axes(mesh)

    @property
    def traffic(self) -> Mapping[Key, Traffic]:
        return {key: Traffic(*values) for key, values in sorted(self._found.items())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        name = name.lstrip("_")
        operation = next((op for start, op in _OPERATIONS.items() if name.startswith(start)), None)
        if operation is not None and namespace in ("c10d", "_c10d_functional"):
            leaves = tree_leaves((args, kwargs))
            tensors = [x for x in [*leaves, *tree_leaves(out)] if isinstance(x, torch.Tensor)]
            group = _group_name(leaves)
            entry = self._found[self._axes.get(group, group), operation]
            entry[0] += 1
            entry[1] += max(x.numel() * x.element_size() for x in tensors)
        return out


def _group_name(arguments: Sequence[Any]) -> str:
    """Functional collectives take the group's name last, the others a boxed group."""
    for x in reversed(arguments):
        if isinstance(x, torch.ScriptObject) and "ProcessGroup" in x._type().qualified_name():
            return dist.ProcessGroup.unbox(x).group_name
    return next(x for x in reversed(arguments) if isinstance(x, str))


def axes(mesh: Mesh) -> dict[str, str]:
    """Name of a process group -> its axis."""
    found = {mesh.dp_group.group_name: "dp", mesh.shard_group.group_name: "dp_shard"}
    if mesh.fsdp.ndim > 1:
        found[mesh.fsdp.get_group("dp_replicate").group_name] = "dp_replicate"
    if mesh.tp.mesh is not None:
        found[mesh.tp.group.group_name] = "tp"
    return found
