"""Every layout against one plain process of our own model: loss, every gradient, the gradient norm, and ten
clipped steps.

fp64 at 1e-10, because in fp32 a real fault hides behind rounding. Gradients and not only losses: Adam and
clipping are blind to a factor of two. In-batch modes, options and fp32 are test_oracle's, whose truth shares
no code with the trainer.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import Server
from tiny import MODEL, train_config, write_rows

from nemo_embed_core.checkpoint.weights import RandomReader, fill
from nemo_embed_core.config import DatasetConfig, ModelConfig, TrainConfig
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.sampler import Sampler, choose_documents
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.model.attention import Segments, reference_attention
from nemo_embed_core.model.encoder import Encoder
from nemo_embed_core.model.spec import parameter_shapes
from nemo_embed_core.parallel.mesh import TensorParallel, build_mesh
from nemo_embed_core.train.optim import build_optimizer
from nemo_embed_core.train.schedule import learning_rate

DTYPES = {"fp64": torch.float64}
TOLERANCE = {"fp64": (1e-12, 1e-10, 1e-10)}  # loss, gradient, curve: relative
LAYOUTS = {2: [(2, False, 1), (2, True, 1), (1, False, 2)], 4: [(4, True, 1), (2, True, 2)]}
# A vocabulary and MLP blocks (9 of 11 channels) that neither 2 nor 4 divides: the last ranks hold padding.
MODELS = {"even": MODEL, "odd": dataclasses.replace(MODEL, vocab_size=509, intermediate_size=99)}
# (dtype, in_batch, model): optimizer steps.
CASES = {("fp64", "none", "even"): 10, ("fp64", "none", "odd"): 4}


def configure(folder: Path, in_batch: str) -> TrainConfig:
    optim = {"lr": 2e-4, "warmup_steps": 3, "weight_decay": 0.1, "clip_norm": 0.5}
    datasets = [DatasetConfig(path=str(folder / "rows.jsonl"), task="find it")]
    data = {
        "max_tokens": 200,
        "datasets": datasets,
    }  # several micro-batches on every rank, also with four queries on each
    return train_config(folder, loss={"in_batch": in_batch, "temperature": 0.05}, optim=optim, data=data)


def write_related_rows(folder: Path) -> None:
    """Rows that know of one another: queries that differ by "?", positives that are another row's positive or
    negative.

    Knowing is neither mutual nor handed on.
    """
    rows = [json.loads(line) for line in write_rows(folder / "rows.jsonl").read_text().splitlines()]
    positives = [row["pos"][0] for row in rows]
    for i, row in enumerate(rows):
        if i % 3:
            row["pos"] += random.Random(i).sample(positives, 20)
        if i % 6 == 5 and rows[i - 1]["neg"]:
            row["pos"].append(rows[i - 1]["neg"][0])
        if i % 4 == 3:
            row["query"] = rows[i % 12]["query"] + "?" * (i % 3)
        row["pos"], row["neg"] = (
            list(dict.fromkeys(row["pos"])),
            [n for n in row["neg"] if n not in row["pos"]],
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def what_each_row_knows(folder: Path, config: TrainConfig) -> list[set[tuple[int, ...]]]:
    """Per row the token ids of every document that is right for its query, from the file alone."""
    tokenizer = load_tokenizer(config.tokenizer)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    right: dict[str, set[tuple[int, ...]]] = {}
    for row in rows:
        tokens = tokenizer.encode(row["pos"], config.data.document_max_length)
        right.setdefault(row["query"].rstrip("?"), set()).update(tuple(ids.tolist()) for ids in tokens)
    return [right[row["query"].rstrip("?")] for row in rows]


def plain_process(config: TrainConfig, dtype: str, model: ModelConfig, steps: int) -> dict[str, Any]:
    """The same training without a mesh, FSDP2, packing, micro-batches or our loss: one text at a time."""
    torch.set_default_dtype(DTYPES[dtype])
    try:
        store = open_store(config.data, load_tokenizer(config.tokenizer), log=lambda message: None)
        rows = np.array(
            [r for r in range(len(store)) if config.loss.in_batch != "none" or len(store.negatives(r))]
        )
        sampler = Sampler(rows, config.global_batch_size, config.seed)
        known = what_each_row_knows(Path(config.output_dir).parent, config)
        encoder = Encoder(model, TensorParallel(), reference_attention)
        fill(encoder, RandomReader(model, config.seed), model)
        optimizer = build_optimizer(encoder, config.optim)
        result: dict[str, Any] = {"loss": [], "norm": [], "left_out": 0}
        for step in range(steps):
            loss, left_out = _whole_batch_loss(encoder, store, sampler, step, config, known)
            result["left_out"] += left_out
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                result["grads"] = {n: p.grad.clone() for n, p in encoder.named_parameters()}
            norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), config.optim.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config.optim)
            optimizer.step()
            result["loss"].append(loss.item())
            result["norm"].append(norm.item())
        return result
    finally:
        torch.set_default_dtype(torch.float32)


def _whole_batch_loss(
    encoder: Encoder,
    store: Any,
    sampler: Sampler,
    step: int,
    config: TrainConfig,
    known: list[set[tuple[int, ...]]],
) -> tuple[torch.Tensor, int]:
    """The loss, and how many candidates were left out because they are right for the row, but not its own
    positive's copies."""

    def embed(tokens: Any) -> torch.Tensor:
        ids = torch.from_numpy(tokens.astype("int64"))
        n = len(ids)
        return encoder(ids, torch.arange(n), Segments(torch.tensor([0, n], dtype=torch.int32), [n], n))[0]

    rows = sampler.rows(step)
    docs = choose_documents(store, rows, sampler.epochs(step), config.data.num_hard_negatives, config.seed)
    queries = [embed(store.query_tokens(row)) for row in rows.tolist()]
    passages = [[embed(store.document_tokens(d)) if d >= 0 else None for d in row] for row in docs.tolist()]
    losses, left_out = [], 0
    for b, q in enumerate(queries):
        places = [(b, m) for m in range(1, docs.shape[1])]
        if config.loss.in_batch != "none":
            columns = range(docs.shape[1]) if config.loss.in_batch == "all" else range(1)
            places += [(other, m) for other in range(len(queries)) if other != b for m in columns]
        candidates = [passages[b][0]]
        for other, m in places:
            if docs[other, m] >= 0 and docs[other, m] != docs[b, 0]:
                if tuple(store.document_tokens(docs[other, m]).tolist()) in known[rows[b]]:
                    left_out += 1
                else:
                    candidates.append(passages[other][m])
        scores = torch.stack([q @ p for p in candidates]) / config.loss.temperature
        losses.append(F.cross_entropy(scores[None], torch.tensor([0])))
    return torch.stack(losses).mean(), left_out


def without_padding(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of global `shape` out of the one that the ranks hold together; the padding is zero."""
    inside = tensor[tuple(slice(0, n) for n in shape)].clone()
    assert tensor.count_nonzero() == inside.count_nonzero(), (
        f"{tensor.shape=} {shape=}: the padding is not zero"
    )
    return inside


def train_on_mesh(folder: str, layouts: list, cases: dict) -> list[dict]:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from nemo_embed_core.data.packing import load_batch
    from nemo_embed_core.parallel import fsdp
    from nemo_embed_core.parallel.collectives import gather_objects
    from nemo_embed_core.parallel.grad_norm import is_tp_replicated, local_tensor, sync_replicated_grads
    from nemo_embed_core.train.optim import state_of
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.step import forward_backward
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    results = []
    for tp, sp, dp in layouts:
        for (dtype, in_batch, model), steps in cases.items():
            torch.set_default_dtype(DTYPES[dtype])
            config = configure(Path(folder), in_batch)
            mesh = build_mesh(torch.device("cpu"), dp, tp, sp)
            prepared = Prepared(MODELS[model], load_tokenizer(config.tokenizer))
            trainer = Trainer(config, mesh, prepared, log=lambda message: None, dtype=DTYPES[dtype])
            batches, _ = load_batch(
                trainer.store, trainer.sampler, 0, mesh.dp_rank, dp, config.data, tp, config.seed
            )
            forward_backward(trainer.engine.model, batches, mesh, config.loss, DTYPES[dtype])
            sync_replicated_grads(trainer.engine.model, mesh)
            shapes = parameter_shapes(MODELS[model])
            grads = {}
            for name, p in trainer.engine.model.named_parameters():
                assert isinstance(p.grad, DTensor)
                grads[fsdp.plain_name(name)] = without_padding(
                    p.grad.full_tensor(), shapes[fsdp.plain_name(name)]
                )
            records = [trainer.train_step()[0] for _ in range(steps)]
            padded = 0
            # Weights and moments behind the last row stay zero.
            for name, p in trainer.engine.model.named_parameters():
                for tensor in (p.detach(), *state_of(trainer.engine.optimizer, p).values()):
                    whole = tensor.full_tensor()
                    without_padding(whole, shapes[fsdp.plain_name(name)])
                    padded += whole.numel() - torch.Size(shapes[fsdp.plain_name(name)]).numel()
            digests = gather_objects(
                {
                    n: local_tensor(p.detach()).numpy().tobytes()
                    for n, p in trainer.engine.model.named_parameters()
                    if is_tp_replicated(p)
                }
            )
            replicas = [digests[mesh.dp_rank * tp + r] for r in range(tp)]
            results.append(
                {
                    "micro_batches": len(batches),
                    "padded": padded,
                    "grads": grads,
                    "loss": [r["loss"] for r in records],
                    "norm": [r["grad_norm"] for r in records],
                    "replicas_identical": all(replica == replicas[0] for replica in replicas),
                }
            )
    torch.set_default_dtype(torch.float32)
    return results


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], dict]]:
    folder = tmp_path_factory.mktemp("equivalence")
    write_related_rows(folder)
    return folder, {
        case: plain_process(configure(folder, case[1]), case[0], MODELS[case[2]], steps)
        for case, steps in CASES.items()
    }


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])  # of LAYOUTS
def test_every_layout_trains_like_one_process(
    world_size: int, server: Server, reference: tuple[Path, dict]
) -> None:
    folder, truths = reference
    layouts = LAYOUTS[world_size]
    results = server.results(train_on_mesh, world_size, str(folder), layouts, CASES)[0]
    for (layout, case), got in zip([(lay, c) for lay in layouts for c in CASES], results, strict=True):
        truth, (loss_tol, grad_tol, curve_tol) = truths[case], TOLERANCE[case[0]]
        where = f"(tp, sp, dp)={layout} {case}"
        assert (truth["left_out"] > 10) == (case[1] != "none"), (
            f"{where}: rows should know of one another's documents"
        )
        assert got["micro_batches"] > 1, f"{where}: the batch should need several micro-batches"
        assert (got["padded"] > 0) == (layout[0] > 1 and case[2] == "odd"), where
        assert abs(got["loss"][0] - truth["loss"][0]) <= loss_tol * truth["loss"][0], where
        assert abs(got["norm"][0] - truth["norm"][0]) <= grad_tol * truth["norm"][0], where
        for name, grad in truth["grads"].items():
            error = relative(got["grads"][name], grad)
            assert error <= grad_tol, f"{where}: gradient of {name} is off by {error:.1e}"
        for key in ("loss", "norm"):
            for step, (a, b) in enumerate(zip(got[key], truth[key], strict=True)):
                assert abs(a - b) <= curve_tol * abs(b) + 1e-12, (
                    f"{where}: {key} of step {step}: {a} against {b}"
                )
        assert got["replicas_identical"], f"{where}: tp replicas of the norms drifted apart"
