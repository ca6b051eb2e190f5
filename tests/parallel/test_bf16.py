"""bf16 training: not worse than Hugging Face in bf16, and what must be fp32 is fp32.

Against the truth in fp64, of the same bf16 weights, row by row. That gate alone is blind to a rounding that
is small beside that of the activations; so each fp32 stage is compared with fp64 from the very numbers that
it was given.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Batch, Oracle, write_model
from tiny import train_config, write_rows, write_tokenizer

from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.sampler import choose_documents
from nemo_embed_core.data.tokenizer import load_tokenizer

# tp_size, sequence_parallel, dp_size, reduce_dtype; fp32 masters, and split ones whose parameters are bf16.
LAYOUTS = {
    "tp1": (1, False, 1, "fp32"), "tp2+sp": (2, True, 1, "fp32"), "dp2": (1, False, 2, "fp32"),
    "dp2 reduced in bf16": (1, False, 2, "bf16"),
}  # fmt: skip
LAYOUTS |= {f"{name} split": layout for name, layout in LAYOUTS.items()}
# With fp8 products: the same stages in fp32, and gradients and embeddings further from the truth.
FP8_LAYOUTS = {
    "fp8 tp1": (1, False, 1, "fp32"), "fp8 tp2+sp": (2, True, 1, "fp32"), "fp8 tp2": (2, False, 1, "fp32"),
    "fp8 dp2": (1, False, 2, "fp32"), "fp8 tp1 split": (1, False, 1, "fp32"),
    "fp8 tp2+sp split": (2, True, 1, "fp32"),
}  # fmt: skip
SLOW = ("dp2", "tp2+sp split", "dp2 reduced in bf16 split")  # what two of the others show together
ROWS, EACH = 16, 4  # of a step, and of a micro-batch
TEMPERATURE = 0.05
# Of a row's largest value, for stages in fp32; one rounding to bf16 on the way would cost 2e-3.
LIMITS = {
    "cos": 1e-6, "sin": 1e-6, "pooling": 2e-6, "loss": 1e-5, "gradient of the embeddings": 5e-5,
    "sum over micro-batches and ranks": 1e-6,
}  # fmt: skip


def config_of(folder: Path, layout: tuple, name: str) -> Any:
    tp, sp, dp, reduce_dtype = layout
    parallel = {"tp_size": tp, "sequence_parallel": sp, "dp_size": dp, "reduce_dtype": reduce_dtype}
    loss = {"temperature": TEMPERATURE}
    return train_config(
        folder, init_from=str(folder / "model"), output_dir=str(folder / name),
        precision="fp8" if name.startswith("fp8") else "bf16",
        global_batch_size=ROWS, parallel=parallel, loss=loss,
        optim={"master_weights": "split" if name.endswith("split") else "fp32"},
    )  # fmt: skip


def micro_batches(store: Any, config: Any, mesh: Any) -> tuple[np.ndarray, np.ndarray, list]:
    """(rows of this rank, their documents, micro-batches of EACH rows)"""
    from nemo_embed_core.data.packing import build_micro_batch

    rows = np.arange(ROWS).reshape(mesh.dp_size, -1)[mesh.dp_rank]
    ids = choose_documents(store, rows, np.zeros_like(rows), config.data.num_hard_negatives, config.seed)
    parts = [slice(i, i + EACH) for i in range(0, len(rows), EACH)]
    return rows, ids, [build_micro_batch(store, rows[part], ids[part], mesh.tp.size) for part in parts]


def one_step(folder: str, layout: tuple, name: str) -> dict[str, Any]:
    """Embeddings and gradients of a step in micro-batches, and each stage's error; on every rank of the
    layout's world."""
    import torch.distributed as dist
    from tiny import to_hf

    from nemo_embed_core.model import encoder, llama
    from nemo_embed_core.model.llama import rope_inv_freq
    from nemo_embed_core.model.spec import parameter_shapes
    from nemo_embed_core.parallel import fsdp
    from nemo_embed_core.parallel.fp8 import weights_kept
    from nemo_embed_core.parallel.grad_norm import sync_replicated_grads
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train import step as step_module
    from nemo_embed_core.train.preflight import prepare
    from nemo_embed_core.train.step import forward_backward
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    tp, sp, dp, _ = layout
    config = config_of(Path(folder), layout, name)
    mesh = build_mesh(torch.device("cpu"), dp, tp, sp)
    trainer = Trainer(config, mesh, prepare(config), log=lambda message: None)
    rows, ids, batches = micro_batches(trainer.store, config, mesh)
    shapes = parameter_shapes(trainer.model_config)

    def gradients(of: list) -> dict[str, torch.Tensor]:
        trainer.engine.optimizer.zero_grad(set_to_none=True)
        with weights_kept(trainer.engine.model):
            forward_backward(trainer.engine.model, of, mesh, config.loss, trainer.engine.dtype)
        sync_replicated_grads(trainer.engine.model, mesh)
        found = {}
        for full_name, p in trainer.engine.model.named_parameters():
            plain = fsdp.plain_name(full_name)
            # Of one micro-batch without FSDP2 the gradient is what bf16 computed: nothing was added to it.
            alone = name.endswith("split") and dp == 1 and len(of) == 1 and p.ndim == 2
            local = p.grad._local_tensor
            assert local.dtype == p.grad.dtype == (torch.bfloat16 if alone else torch.float32)
            assert p.dtype == (torch.bfloat16 if name.endswith("split") else torch.float32)
            assert p.shape == shapes[plain]
            found.update(to_hf(plain, p.grad.full_tensor().clone(), trainer.model_config))
        return found

    parts = [gradients([batch]) for batch in batches]
    seen: dict[str, list] = {"tables": [], "hidden": [], "embeddings": [], "demb": [], "losses": []}
    split_rope, loss = llama.split_rope, step_module.objective

    def see_tables(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *sizes: int) -> Any:
        assert qkv.dtype == torch.bfloat16
        seen["tables"].append((cos, sin))
        return split_rope(qkv, cos, sin, *sizes)

    def see_losses(groups: Any, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen["losses"].append(loss(groups, *options)[0].detach())
        return loss(groups, *options)

    def see_embeddings(module: Any, arguments: Any, output: torch.Tensor) -> None:
        seen["embeddings"].append(output.detach())
        if output.requires_grad:
            output.register_hook(seen["demb"].append)

    llama.split_rope, step_module.objective = see_tables, see_losses
    trainer.engine.model.model.register_forward_hook(
        lambda module, arguments, output: seen["hidden"].append(output.detach())
    )
    trainer.engine.model.register_forward_hook(see_embeddings)
    assert isinstance(trainer.engine.model, encoder.Encoder)
    total = gradients(batches)

    errors: dict[str, float] = {}

    def note(stage: str, got: torch.Tensor, want: torch.Tensor) -> None:
        """The worst row's error, relative to its largest value."""
        assert got.dtype == torch.float32, f"{stage}: {got.dtype}"
        error, row = (
            (x if x.ndim > 1 else x[None]).abs().flatten(0, -2).amax(1) for x in (got.double() - want, want)
        )
        errors[stage] = max(errors.get(stage, 0.0), (error / row.clamp(min=1e-30))[row > 0].max().item())

    inv_freq = rope_inv_freq(trainer.model_config)
    layers = trainer.model_config.num_hidden_layers
    embeddings = {}
    for i, batch in enumerate(batches):
        angles = batch.position_ids.double()[:, None] * inv_freq
        for cos, sin in seen["tables"][i * layers : (i + 1) * layers]:
            note("cos", cos.flatten(), angles.cos().flatten())
            note("sin", sin.flatten(), angles.sin().flatten())
        hidden = seen["hidden"][i]
        if sp:
            shards = [torch.empty_like(hidden) for _ in range(tp)]
            dist.all_gather(shards, hidden.contiguous(), group=mesh.tp.group)
            hidden = torch.cat(shards)
        assert hidden.dtype == torch.bfloat16
        mean = torch.stack([h.double().mean(0) for h in hidden.split(batch.lengths)])
        note("pooling", seen["embeddings"][i], mean / mean.norm(dim=1, keepdim=True))
        exact = seen["embeddings"][i].double().requires_grad_()
        q, documents = exact[batch.query_index], exact[batch.document_index]
        scores = (q[:, None] * documents).sum(-1).masked_fill(~batch.document_mask, -torch.inf) / TEMPERATURE
        losses = scores.logsumexp(1) - scores[:, 0]
        note("loss", seen["losses"][i], losses.detach())
        (losses.sum() / len(rows)).backward()
        note("gradient of the embeddings", seen["demb"][i], exact.grad)
        for row, at in zip(batch.rows.tolist(), batch.query_index.tolist(), strict=True):
            embeddings["query", row] = seen["embeddings"][i][at]
        for b, m in batch.document_mask.nonzero().tolist():
            embeddings["document", int(batch.document_ids[b, m])] = seen["embeddings"][i][
                batch.document_index[b, m]
            ]
    # Micro-batches of a fourth of the rows: their gradients are exact multiples of what they are in the whole
    # step.
    for tensor_name, gradient in total.items():
        summed = torch.stack([part[tensor_name].double() for part in parts]).mean(0)
        note("sum over micro-batches and ranks", gradient, summed)
    return {"gradients": total, "embeddings": embeddings, "errors": errors, "ids": ids, "rows": rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("bf16"))


def filled(root: Path, **shape: int) -> Path:
    write_tokenizer(root / "tokenizer")
    write_rows(root / "train.jsonl")
    write_model(root / "model", 380, 96, dtype=torch.bfloat16, hidden_size=64, **shape)
    return root


def peers(folder: Path) -> dict[torch.dtype, tuple[dict, dict]]:
    """(embeddings, gradients) of Hugging Face's model in fp64, which is the truth, and in bf16."""
    config = config_of(folder, LAYOUTS["tp1"], "peer")
    store = open_store(config.data, load_tokenizer(config.tokenizer), log=lambda message: None)
    rows = np.arange(ROWS)
    ids = choose_documents(store, rows, np.zeros_like(rows), config.data.num_hard_negatives, config.seed)
    tokens = {int(d): store.document_tokens(d).tolist() for d in np.unique(ids[ids >= 0])}
    queries = [store.query_tokens(row).tolist() for row in range(ROWS)]
    batch = Batch(queries, ids.tolist(), tokens, [set() for _ in queries], [{} for _ in queries])
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        oracle = Oracle(folder / "model", dtype)
        losses, _ = oracle.losses(batch, {"temperature": TEMPERATURE, "in_batch": "none"})
        losses.mean().backward()
        embeddings = oracle.embed(queries + list(tokens.values())).detach()
        names = [("query", row) for row in range(ROWS)] + [("document", d) for d in tokens]
        gradients = {name: p.grad for name, p in oracle.model.named_parameters()}
        found[dtype] = dict(zip(names, embeddings, strict=True)), gradients
    return found


def row_errors(got: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """|error| / |row| of each row that is not (nearly) zero."""
    got, truth = (x.double() if x.ndim > 1 else x.double()[None] for x in (got, truth))
    norm = truth.norm(dim=1)
    return ((got - truth).norm(dim=1) / norm)[norm > 1e-3 * norm.max()]


@pytest.fixture(scope="module")
def truth_and_peer(folder: Path) -> dict:
    return peers(folder)


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_bf16_is_as_good_as_hugging_face_and_rounds_nothing_else(
    name, server, folder, truth_and_peer
) -> None:
    layout = LAYOUTS[name]
    outcomes = server.run(one_step, layout[0] * layout[2], str(folder), layout, name)
    assert all(outcome.code == 0 for outcome in outcomes), outcomes[0].output[-3000:]
    (true_rows, true_gradients), (peer_rows, peer_gradients) = truth_and_peer.values()
    ours = {key: row for outcome in outcomes for key, row in outcome.result["embeddings"].items()}
    assert ours.keys() == true_rows.keys()
    keys = sorted(ours)
    stack = [torch.stack([rows[key] for key in keys]) for rows in (ours, peer_rows, true_rows)]
    compared = {"embeddings": tuple(stack)}
    compared |= {
        n: (outcomes[0].result["gradients"][n], peer_gradients[n], g) for n, g in true_gradients.items()
    }
    for what, (mine, peer, truth) in compared.items():
        own, theirs = row_errors(mine, truth), row_errors(peer, truth)
        average = (own.square().mean() / theirs.square().mean()).sqrt().item()
        assert average <= 1.3, f"{name}: {what} loses {average:.2f} times as much as Hugging Face"
        worst = (own.max() / theirs.max()).item()
        assert worst <= 3, (
            f"{name}: the worst row of {what} loses {worst:.2f} times as much as Hugging Face's worst"
        )
    for outcome in outcomes:
        assert outcome.result["errors"].keys() == LIMITS.keys()
        for stage, error in outcome.result["errors"].items():
            low, limit = 0.0, LIMITS[stage]
            if layout[3] == "bf16" and stage == "sum over micro-batches and ranks":
                low, limit = 1e-4, 2e-2  # a rounding for each micro-batch and rank
            assert low <= error <= limit, f"{name}: {stage} is off by {error:.1e} of a row, not {limit:.0e}"


def one_step_of_vectors(folder: str, layout: tuple, name: str) -> dict[str, float]:
    """The worst row's error of a step whose loss is the distance to a teacher's vectors, from the embeddings,
    the projection and the vectors that the loss was given."""
    import torch.distributed as dist
    from tiny import read_config

    from nemo_embed_core.checkpoint.weights import RandomReader
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train import step as step_module
    from nemo_embed_core.train.engine import Engine
    from nemo_embed_core.train.first_weights import fill_engine

    dist.init_process_group("gloo")
    tp, sp, dp, _ = layout
    config, model = config_of(Path(folder), layout, name), read_config(Path(folder) / "model")
    weights = {"info_nce_weight": 0.0, "teacher_vectors_weight": 0.7, "teacher_vectors_lr": 1e-3}
    config = replace(config, loss=replace(config.loss, **weights))
    mesh = build_mesh(torch.device("cpu"), dp, tp, sp)
    engine = Engine(config, model, mesh, teacher_width=24)
    fill_engine(engine, RandomReader(model, 0))
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    W = engine.projection.value
    assert W.dtype == torch.float32
    noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(7))
    W.data += noise / 8  # by the identity alone nothing is rounded
    store = open_store(config.data, load_tokenizer(config.tokenizer), log=lambda message: None)
    rows, _, batches = micro_batches(store, config, mesh)
    for i, batch in enumerate(batches):
        teacher = torch.randn(EACH, 1 + batch.document_index.shape[1], 24, generator=generator)
        batches[i] = replace(batch, teacher_vectors=teacher)
    seen: list[tuple[Any, torch.Tensor, dict[str, torch.Tensor]]] = []
    objective = step_module.objective

    def see(groups: Any, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        gradients: dict[str, torch.Tensor] = {}
        for side in ("q_BD", "docs_BMD"):
            getattr(groups, side).register_hook(lambda grad, side=side: gradients.update({side: grad}))
        losses, sums = objective(groups, *options)
        seen.append((groups, losses.detach(), gradients))
        return losses, sums

    step_module.objective = see
    engine.forward_backward(batches)
    assert len(seen) == len(batches) > 1
    errors: dict[str, float] = {}

    def note(stage: str, got: torch.Tensor, want: torch.Tensor) -> None:
        assert got.dtype == torch.float32, f"{stage}: {got.dtype}"
        error = (got.double() - want).abs().flatten(0, -2).amax(1) if got.ndim > 1 else (got - want).abs()
        size = want.abs().flatten(0, -2).amax(1) if got.ndim > 1 else want.abs()
        errors[stage] = max(errors.get(stage, 0.0), (error / size)[size > 0].max().item())

    exact = W.detach().double().requires_grad_()
    for groups, losses, gradients in seen:
        q, docs = (getattr(groups, s).detach().double().requires_grad_() for s in ("q_BD", "docs_BMD"))
        projected = torch.einsum("bnd,td->bnt", torch.cat([q[:, None], docs], 1), exact)
        teacher = groups.teacher_BND.double()
        cosines = (projected * teacher).sum(-1) / projected.norm(dim=-1) / teacher.norm(dim=-1)
        exists = torch.cat([torch.ones_like(groups.mask_BM[:, :1]), groups.mask_BM], 1)
        wanted = 0.7 * ((1 - cosines) * exists).sum(1) / exists.sum(1)
        (wanted.sum() / len(rows)).backward()
        note("loss", losses, wanted.detach())
        note("gradient of the queries", gradients["q_BD"], q.grad)
        note("gradient of the documents", gradients["docs_BMD"], docs.grad)
    note("gradient of the projection", W.grad, exact.grad)
    return errors


@pytest.mark.dist
@pytest.mark.parametrize("name", ["tp2+sp", "dp2 split"])
def test_the_distance_to_a_teacher_is_in_fp32_in_a_bf16_run(name, server, folder) -> None:
    layout = LAYOUTS[name]
    for errors in server.results(one_step_of_vectors, layout[0] * layout[2], str(folder), layout, name):
        assert max(errors.values()) < 3e-6, errors


def rms(errors: torch.Tensor) -> float:
    return errors.square().mean().sqrt().item()


@pytest.mark.dist
def test_an_fp8_step_is_near_the_truth_and_the_same_in_every_layout(server, tmp_path) -> None:
    folder = filled(tmp_path, head_dim=8)  # what a rank of two holds are multiples of 16
    rows, truth = peers(folder)[torch.float64]
    keys, found = sorted(rows), {}
    truth = truth | {"embeddings": torch.stack([rows[key] for key in keys])}
    for name, layout in FP8_LAYOUTS.items():
        outcomes = server.results(one_step, layout[0] * layout[2], str(folder), layout, name)
        rows = {key: row for outcome in outcomes for key, row in outcome["embeddings"].items()}
        embeddings = torch.stack([rows[key] for key in keys])
        found[name] = outcomes[0]["gradients"] | {"embeddings": embeddings}
        for stage, error in [item for outcome in outcomes for item in outcome["errors"].items()]:
            assert error <= LIMITS[stage], f"{name}: {stage} is not in fp32: {error:.1e}"
    one_process = found["fp8 tp1"]
    for name, what in [(name, what) for name in found for what in truth]:
        got, one, exact = found[name][what], one_process[what], truth[what]
        own, ones, apart = (rms(row_errors(*pair)) for pair in ((got, exact), (one, exact), (got, one)))
        limit = 0.2 if what == "embeddings" else 0.4
        assert own < limit and own <= 1.3 * ones, f"{name}: {what} is off by {own:.2f}, alone by {ones:.2f}"
        # With tp sums have another order, which changes a bf16 here and there, and that another value of fp8.
        # Under other scales every value is another one, and the distance 1.4 times that to the truth.
        is_same = FP8_LAYOUTS[name][0] == 1
        assert apart == 0 if is_same else 0 < apart <= ones, f"{name}: {what} is {apart:.2f} apart"
