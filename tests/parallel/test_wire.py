"""Collectives that the engine really makes, on gloo and on fake groups of many ranks, against the formulas of
parallel/wire.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from forked import Server
from tiny import MODEL, train_config

from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.tokenizer import load_tokenizer

# tp_size, sequence_parallel, dp_size, dp_replicate
REAL = {
    2: [(2, True, 1, 1), (2, False, 1, 1), (1, False, 2, 1), (1, False, 2, 2)],
    4: [(2, True, 2, 1), (1, False, 4, 1), (1, False, 4, 2), (2, True, 2, 2)],
}
FAKE = [(4, True, 16, 2), (4, False, 16, 1)]
# in_batch, reshard_after_forward, activation_checkpointing, max_tokens, precision, reduce_dtype
ALL_MODES = [
    (in_batch, reshard, recompute, max_tokens, *dtypes)
    for in_batch in ("none", "positives", "all")
    for reshard in (False, True)
    for recompute, max_tokens, dtypes in (
        ("none", 4000, ("bf16", "fp32")),
        ("full", 150, ("bf16", "bf16")),
        ("selective", 150, ("fp32", "fp32")),
    )
]
FP8_MODES = [
    ("positives", True, "none", 4000, "fp8", "fp32"), ("none", False, "selective", 150, "fp8", "fp32"),
    ("positives", False, "full", 150, "fp8", "bf16"), ("positives", True, "full", 150, "fp8", "bf16"),
]  # fmt: skip
LOSSES: dict[str, dict[str, Any]] = {  # more than in_batch
    "queries": {"query_query": True, "temperature_lr": 1e-3},
    "queries and documents": {"in_batch": "all", "query_query": True, "document_document": True},
    "documents": {"document_document": True},
    "vectors": {"teacher_vectors_weight": 1.0},
    "grades": {"cosent_weight": 1.0, "matryoshka_dims": [64, 16]},
}
TERM_MODES = [
    ("queries", False, "none", 4000, "bf16", "fp32"), ("documents", True, "none", 150, "fp32", "fp32"),
    ("queries and documents", False, "none", 150, "bf16", "fp32"),
    ("grades", False, "none", 150, "bf16", "fp32"), ("vectors", False, "none", 150, "bf16", "fp32"),
]  # fmt: skip
FEW_MODES = [ALL_MODES[i] for i in (1, 9, 17)] + FP8_MODES[1:] + TERM_MODES
# Each in-batch mode with and without reshard_after_forward, and a kind of recomputation by turns.
TURNS = [ALL_MODES[i] for i in (0, 4, 7, 11, 14, 15)] + FP8_MODES + TERM_MODES
ALL_MODES += FP8_MODES + TERM_MODES


def count(folder: str, layouts: list, modes: list, backend: str) -> list[tuple[str, int, dict, dict]]:
    """(case, number of micro-batches, counted, by the formulas) of rank 0."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_embed_core.checkpoint.weights import RandomReader, fill
    from nemo_embed_core.data.packing import load_batch
    from nemo_embed_core.data.sampler import Sampler
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.parallel.wire import Counted, step_traffic
    from nemo_embed_core.plan.plan import wire_of
    from nemo_embed_core.plan.time import Layout
    from nemo_embed_core.train.engine import Engine

    world_size = layouts[0][0] * layouts[0][2]
    if backend == "fake":
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    else:
        dist.init_process_group("gloo")
    found = []
    for tp, sp, dp, replicate in layouts:
        mesh = build_mesh(torch.device("cpu"), dp, tp, sp, replicate)
        for in_batch, reshard, recompute, max_tokens, precision, reduce_dtype in modes:
            parallel = {"tp_size": tp, "sequence_parallel": sp, "dp_replicate": replicate}
            parallel |= {"reshard_after_forward": reshard, "reduce_dtype": reduce_dtype}
            config = train_config(
                Path(folder), parallel=parallel, loss=LOSSES.get(in_batch, {"in_batch": in_batch}),
                data={"max_tokens": max_tokens},
                activation_checkpointing=recompute, precision=precision, global_batch_size=6 * dp,
            )  # fmt: skip
            store = open_store(config.data, load_tokenizer(config.tokenizer), log=lambda message: None)
            ranks, rank = (1, 0) if backend == "fake" else (dp, mesh.dp_rank)  # data for so many
            sampler = Sampler(torch.arange(61).numpy(), 6 * ranks, 0)
            # Norms of heads, whose gradients are summed over tp without sequence parallelism too.
            model = MODEL if reshard else replace(MODEL, model_type="qwen3")
            engine = Engine(config, model, mesh, teacher_width=24)
            place = (mesh.tp.rank, tp), (mesh.shard_rank, mesh.shard_size)
            fill(engine.model, RandomReader(model, 0), model, *place)
            batches, _ = load_batch(store, sampler, 0, rank, ranks, config.data, tp, 0)
            if config.loss.cosent_weight:
                batches = [replace(b, grades=torch.rand(len(b.query_index))) for b in batches]
            if config.loss.needs_vectors:
                ones = [torch.ones(*b.document_index.shape, 24) for b in batches]
                ones = [torch.cat([x[:, :1], x], 1) for x in ones]
                batches = [replace(b, teacher_vectors=x) for b, x in zip(batches, ones, strict=True)]
            with Counted(mesh) as counted:
                engine.forward_backward(batches)
                engine.clip()
                engine.update(1e-4)
            assert sum(len(batch.query_index) for batch in batches) == 6
            with mock.patch("nemo_embed_core.plan.plan.teacher_width", lambda c: 24 * c.loss.needs_vectors):
                wire = wire_of(config, model, Layout(tp, replicate, tp * dp))
            wire = replace(wire, weight_bytes=4 if precision == "fp32" else 2)  # plans are of bf16 weights
            sizes = [(len(batch.input_ids), len(batch.lengths)) for batch in batches]
            case = f"{tp=} {sp=} {dp=} {replicate=} {in_batch} {reshard=} {recompute=}"
            case += f" {precision} {reduce_dtype}"
            found.append((case, len(batches), dict(counted.traffic), step_traffic(wire, sizes)))
    return found if dist.get_rank() == 0 else []


def check(server: Server, folder: Path, layouts: list, modes: list, backend: str) -> None:
    data = train_config(folder)  # written and built before several ranks would
    open_store(data.data, load_tokenizer(data.tokenizer), log=lambda message: None)
    ranks = 1 if backend == "fake" else layouts[0][0] * layouts[0][2]
    outcomes = server.run(count, ranks, str(folder), layouts, modes, backend)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].output[-3000:]
    found: list[Any] = outcomes[0].result
    assert {number > 1 for _, number, _, _ in found} == {True, False}, "one micro-batch, and several"
    wrong = [
        f"{case} in {number} micro-batches, {key}: {counted.get(key)}, not {formulas.get(key)}"
        for case, number, counted, formulas in found
        for key in sorted({*counted, *formulas})
        if counted.get(key) != formulas.get(key)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.dist
@pytest.mark.parametrize(
    "layouts",
    [[REAL[2][0], REAL[2][2]], *(pytest.param(x, marks=pytest.mark.slow) for x in (REAL[2][1::2], REAL[4]))],
    ids=["2 ranks", "2 ranks otherwise", "4 ranks"],
)
def test_gloo_carries_what_the_formulas_say(layouts: list, server: Server, tmp_path: Path) -> None:
    check(server, tmp_path, layouts, FEW_MODES, "gloo")


@pytest.mark.parametrize(
    "modes", [TURNS, pytest.param(ALL_MODES, marks=pytest.mark.slow)], ids=["turns", "all"]
)
@pytest.mark.parametrize("layout", FAKE, ids=str)
def test_many_ranks_would_carry_what_the_formulas_say(
    layout: tuple, modes: list, server: Server, tmp_path: Path
) -> None:
    check(server, tmp_path, [layout], modes, "fake")
