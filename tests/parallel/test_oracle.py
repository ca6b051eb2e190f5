"""The trainer against an oracle that shares no line with it, in fp64, over layouts and every option that
decides a number.

Loss, accuracy, gradient norm, every clipped gradient and every weight after the last step, row by row: an
error in few rows or in small ones must not hide behind the largest of a tensor.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Server
from oracle import Batch, Dropped, LowRank, Oracle, write_model
from tiny import train_config, write_rows, write_tokenizer
from tokenizers import Tokenizer

from nemo_embed_core.config import (
    DataConfig,
    DatasetConfig,
    LossConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.sampler import Sampler, choose_documents
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.data.vectors import write_keys
from nemo_embed_core.mine.corpus import encode_corpus

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
# Of a row's largest value, and of the tensor's: what rounding loses of a row that is nearly cancelled.
TOLERANCE = {"fp64": (1e-11, 1e-13), "fp32": (1e-4, 1e-5)}
LAYOUTS = [  # tp_size, sequence_parallel, dp_size, dp_replicate
    (1, False, 1, 1), (2, True, 1, 1), (2, False, 1, 1), (1, False, 2, 1), (4, True, 1, 1), (2, True, 2, 1),
    (2, False, 2, 1), (1, False, 4, 1), (1, False, 2, 2), (1, False, 4, 2), (2, True, 2, 2),
]  # fmt: skip
# 380 and 40: whole rows and whole MLP blocks on 4 ranks; 381 and 27: padding on 2 and on 4.
MODELS = {"even": (380, 40), "odd": (381, 27)}
# Facts of other base models in which tensor parallelism could err: (name, what of the even model is another).
BASES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "causal": {"model_type": "mistral", "sliding_window": None, "is_causal": True},
}
BASE_LAYOUTS = [(2, False, 1, 1), (2, True, 1, 1), (1, False, 2, 1)]
SLOW_LAYOUTS = [(4, True, 1, 1), (2, True, 2, 1), (2, False, 2, 1)]
# Of four ranks, what fewer show: dp alone, tp and dp without sequence parallelism, copies beside tp.
SLOW_MIXED = [(1, False, 4, 1), (2, False, 2, 1), (2, True, 2, 2)]

# No default among them, and a clip_norm that clips.
BASE: dict[str, Any] = {
    "steps": 3, "global_batch_size": 8, "seed": 3, "activation_checkpointing": "none", "attention": "auto",
    "loss": {
        "temperature": 0.05, "in_batch": "positives", "kl_weight": 0.5, "kl_temperature": 0.1,
        "matryoshka_dims": [32, 8], "matryoshka_weights": [1.0, 0.5], "teacher_vectors_weight": 0.4,
        "teacher_vectors_lr": 0.02,
    },
    "optim": {
        "lr": 2e-3, "min_lr": 5e-4, "warmup_steps": 1, "weight_decay": 0.3, "beta1": 0.7, "beta2": 0.9,
        "eps": 1e-3, "clip_norm": 0.5,
    },
    "data": {"num_hard_negatives": 2, "query_max_length": 40, "document_max_length": 40, "max_tokens": 200},
    "parallel": {"reshard_after_forward": True},
}  # fmt: skip
# One option after the other is changed; True: so is the run.
CHANGES: list[tuple[str, Any, bool]] = [
    ("steps", 4, True), ("global_batch_size", 12, True), ("seed", 4, True), ("loss.temperature", 0.3, True),
    ("loss.in_batch", "none", True), ("loss.in_batch", "all", True),
    ("loss.query_query", True, True), ("loss.document_document", True, True),
    ("loss.false_negative_margin", 0.05, True), ("loss.temperature_lr", 0.1, True),
    ("loss.matryoshka_dims", [32, 5], True), ("loss.matryoshka_weights", [0.5, 2.0], True),
    ("loss.info_nce_weight", 0.5, True), ("loss.kl_weight", 2.0, True), ("loss.kl_temperature", 0.05, True),
    ("loss.margin_mse_weight", 3.0, True), ("loss.teacher_vectors_weight", 1.5, True),
    ("loss.teacher_vectors_lr", 0.1, True), ("optim.lr", 1e-3, True),
    ("optim.min_lr", 1e-3, True), ("optim.warmup_steps", 2, True), ("optim.warmup_steps", 0, True),
    ("optim.weight_decay", 0.0, True), ("optim.beta1", 0.2, True), ("optim.beta2", 0.5, True),
    ("optim.eps", 1e-8, True), ("optim.clip_norm", 0.0, True), ("optim.clip_norm", 0.25, True),
    ("optim.clip_norm", 1e6, True), ("data.num_hard_negatives", 1, True), ("data.query_max_length", 19, True),
    ("data.document_max_length", 7, True), ("data.max_tokens", 4000, False),
    ("attention", "reference", False), ("activation_checkpointing", "full", False),
    ("activation_checkpointing", "selective", False),
    ("parallel.reshard_after_forward", False, False),
]  # fmt: skip


TERMS: list[dict[str, Any]] = [  # of the loss, beside in_batch
    {
        "in_batch": "all", "query_query": True, "document_document": True, "false_negative_margin": 0.02,
        "temperature_lr": 0.1, "matryoshka_dims": [4, 32, 9], "matryoshka_weights": [0.5, 1.0, 2.0],
        "teacher_vectors_weight": 2.0, "teacher_vectors_lr": 0.1,
    },
    {"in_batch": "none", "query_query": True, "false_negative_margin": 0.05, "temperature_lr": 0.3},
    {"in_batch": "none", "document_document": True, "temperature_lr": 0.03, "matryoshka_dims": [7],
     "kl_weight": 1.5, "kl_temperature": 0.05, "teacher_vectors_weight": 0.7, "teacher_vectors_lr": 0.3},
    {
        "in_batch": "none", "matryoshka_dims": [32, 3], "matryoshka_weights": [0.3, 1.0], "kl_weight": 0.5,
        "kl_temperature": 0.1, "margin_mse_weight": 2.0, "info_nce_weight": 0.0,
        "teacher_vectors_weight": 1.3, "teacher_vectors_lr": 0.05,
    },
]  # fmt: skip


def changed(base: dict[str, Any], option: str, value: Any) -> dict[str, Any]:
    group, _, name = option.rpartition(".")
    return {**base, group: {**base[group], name: value}} if group else {**base, name: value}


def mixed_cases() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every layout with every in-batch mode, once in fp32 and with further terms; and once more or three
    times with every mode. The other options are drawn from what is no default."""
    rng = random.Random(0)
    cases, more = [], []
    for layout in LAYOUTS:
        own: list[dict[str, Any]] = []
        # Four ranks on two cores take their time.
        times = 4 if layout[0] * layout[2] < 4 and layout[3] == 1 else 2
        modes = ["none", "positives", "all"] * times + [rng.choice(["none", "all"])]
        for i, in_batch in enumerate(modes):
            lr = rng.choice([1e-3, 3e-3])
            optim = {
                "lr": lr, "min_lr": rng.choice([0.0, lr / 2, lr]), "warmup_steps": rng.choice([0, 1]),
                "weight_decay": rng.choice([0.0, 0.1, 0.5]), "beta1": rng.choice([0.0, 0.5, 0.8]),
                "beta2": rng.choice([0.5, 0.9, 0.99]), "eps": rng.choice([1e-4, 1e-2, 0.3]),
                "clip_norm": rng.choice([0.0, 0.05, 1e6]),
            }  # fmt: skip
            data = {"num_hard_negatives": rng.choice([2, 3]), "max_tokens": rng.choice([150, 250, 4000])}
            # At 0.005 a row that only has its own negatives may have a loss so small that nothing is left to
            # compare.
            temperature = rng.choice([0.02 if in_batch == "none" else 0.005, 0.02, 0.1, 1.0])
            loss = {"temperature": temperature, "in_batch": in_batch}
            case = {
                **BASE, "layout": layout, "model": rng.choice(["even", "odd"]), "dtype": "fp64", "seed": i,
                "steps": rng.choice([2, 3]), "optim": optim, "data": {**BASE["data"], **data}, "loss": loss,
                "activation_checkpointing": ("full", "selective", *["none"] * 3)[int(rng.random() * 5)],
                "parallel": {"reshard_after_forward": rng.random() < 0.5},
            }  # fmt: skip
            if (
                i == len(modes) - 1
            ):  # FSDP2 runs other code for it; a temperature and an eps at which rounding is not magnified
                case |= {
                    "dtype": "fp32",
                    "loss": {**loss, "temperature": 0.1},
                    "optim": {**optim, "eps": 0.1},
                }
            own.append(case)
        cases += [*own[:3], own[-1]]
        more += own[3:-1]
        # All where ranks share a batch and nothing else; elsewhere one by turns.
        one = [TERMS[LAYOUTS.index(layout) % len(TERMS)]]
        for terms in TERMS if layout == (1, False, 2, 1) else one:
            own.append({**own[-2], "dtype": "fp64", "seed": 30, "loss": {"temperature": 0.05, **terms}})
            cases.append(own[-1])
    return cases, more


MIXED, MORE = mixed_cases()


def configure(folder: Path, case: dict[str, Any], name: str) -> TrainConfig:
    tp, sp, dp, replicate = case["layout"]
    changes = {key: value for key, value in case.items() if key not in ("layout", "model", "dtype")}
    changes["parallel"] = {
        **case["parallel"],
        "tp_size": tp,
        "sequence_parallel": sp,
        "dp_size": dp,
        "dp_replicate": replicate,
    }
    changes["model"] = {
        "is_causal": case["model"] == "causal", "pooling": changes.pop("pooling", "mean"),
    }  # fmt: skip
    dataset = DatasetConfig(
        path=str(folder / "train.jsonl"), task="find it", teacher_vectors=str(folder / "teacher")
    )
    changes["data"] = {**case["data"], "datasets": [dataset]}
    return train_config(
        folder, init_from=str(folder / case["model"]), output_dir=str(folder / f"runs-{name}"), **changes
    )


def without_padding(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    inside = tensor[tuple(slice(0, n) for n in shape)].clone()
    assert tensor.count_nonzero() == inside.count_nonzero(), (
        f"{tensor.shape=} {shape=}: the padding is not zero"
    )
    return inside


def train_cases(folder: str, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """On every rank of one layout's world; what rank 0 saw of each step."""
    import torch.distributed as dist
    from tiny import to_hf
    from torch.distributed.tensor import DTensor

    from nemo_embed_core.parallel.grad_norm import is_tp_replicated, local_tensor
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.preflight import prepare
    from nemo_embed_core.train.trainer import Trainer

    dist.init_process_group("gloo")
    results = []
    mesh = build_mesh(torch.device("cpu"), *(cases[0][1]["layout"][i] for i in (2, 0, 1, 3)))
    for name, case in cases:
        dtype = DTYPES[case["dtype"]]
        torch.set_default_dtype(dtype)
        config = configure(Path(folder), case, name)
        trainer = Trainer(config, mesh, prepare(config), log=lambda message: None, dtype=dtype)
        shapes = trainer.engine.shapes
        frozen = {
            n: local_tensor(p).clone()
            for n, p in trainer.engine.model.named_parameters()
            if not p.requires_grad
        }

        def whole(what: str, trainer: Any = trainer, shapes: dict = shapes) -> dict[str, torch.Tensor]:
            found = {}
            for name, p in trainer.engine.trained():
                tensor = getattr(p, what)
                tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                tensor = without_padding(tensor, shapes[name])
                layer, _, factor = name.partition(".lora.")
                if factor == "A":
                    found[f"{layer.removeprefix('model.')}/A"] = tensor
                else:
                    weight = f"{layer}.weight" if factor else name
                    parts = to_hf(weight, tensor, trainer.model_config)
                    found.update({f"{part}/B" if factor else part: rows for part, rows in parts})
            return found

        gradients: list[dict[str, torch.Tensor]] = []
        projection, of_projection = trainer.engine.projection, []
        start = whole("data") if "lora" in case else {}

        def record(
            *_: Any, whole: Any = whole, gradients: list = gradients, projection: Any = projection,
            of_projection: list = of_projection,
        ) -> None:  # fmt: skip
            gradients.append(whole("grad"))
            if projection is not None:
                of_projection.append(projection.value.grad.clone())

        trainer.engine.optimizer.register_step_pre_hook(record)
        records = [trainer.train_step()[0] for _ in range(config.steps)]
        weights = whole("data")
        if projection is not None:
            everywhere = [torch.empty_like(projection.value) for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, projection.value.detach())
            assert all(torch.equal(copy, everywhere[0]) for copy in everywhere), "projections drifted apart"
            of_projection.append(projection.value.detach().clone())
        for full_name, p in trainer.engine.model.named_parameters():
            if full_name in frozen:
                assert p.grad is None and p not in trainer.engine.optimizer.state, full_name
                assert torch.equal(local_tensor(p), frozen[full_name]), (
                    f"{full_name} is frozen and has changed"
                )
        for full_name, p in trainer.engine.model.named_parameters():
            if is_tp_replicated(p) and mesh.tp.size > 1:
                copies = [torch.empty_like(local_tensor(p)) for _ in range(mesh.tp.size)]
                dist.all_gather(copies, local_tensor(p.detach()).contiguous(), group=mesh.tp.group)
                assert all(torch.equal(copy, copies[0]) for copy in copies), (
                    f"{full_name}: tp replicas drifted apart"
                )
        trainer.close()
        results.append(
            {
                "records": records, "gradients": gradients, "weights": weights, "start": start,
                "projection": of_projection,
            }
        )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    return results if dist.get_rank() == 0 else []


# ------------------------------------------------------------------------------------------ the oracle's side


def write_data(path: Path) -> None:
    """Rows of ragged lengths and 0 to 4 negatives; some have two positives, some the query of another one but
    for its spelling, some bring another row's positive as a negative. Few rows, so that they meet in a batch.
    """
    rows = [json.loads(line) for line in write_rows(path, num_rows=24).read_text().splitlines()]
    for i in range(2, len(rows)):
        if i % 4 == 0:
            rows[i]["pos"] = rows[i]["pos"] + rows[i - 1]["pos"][:1]
        if i % 6 == 5:
            rows[i]["query"] = rows[i - 2]["query"] + "?"
        if i % 5 == 3:
            rows[i]["group"] = i % 2
        if i % 3 == 1:
            rows[i]["neg"] = rows[i]["neg"] + rows[i - 2]["pos"][:1]
    rng = random.Random(5)
    for i, row in enumerate(rows):
        if i % 5 != 2:  # the others have none
            row["pos_scores"], row["neg_scores"] = (
                [rng.randrange(16, 64) / 64 for _ in row[s]] for s in ("pos", "neg")
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def vector(side: str, text: str) -> np.ndarray:
    """[24] fp32, of any length: what a teacher says of a text, with fewer columns than the student."""
    return np.random.default_rng(list(f"{side} {text}".encode())).normal(size=24).astype(np.float32)


class Teacher:
    digest, hidden_size = "a teacher", 24

    def __init__(self, side: str):
        self.side = side

    def encode(self, texts: list[str], prompt: str = "", max_length: int = 512) -> np.ndarray:
        return np.stack([vector(self.side, text) for text in texts])


def write_vectors(path: Path, work: Path) -> None:
    """As mining keeps them, in another order than the rows have, with texts that no row has."""
    rows = [json.loads(line) for line in path.read_text().splitlines()][::-1]
    sides = {
        "queries": [row["query"] for row in rows],
        "documents": ["of no row", *dict.fromkeys(text for row in rows for text in row["neg"] + row["pos"])],
    }
    for side, texts in sides.items():
        options = {"dtype": "float32", "unit": False, "shard_size": 10, "log": lambda message: None}
        encode_corpus(texts, Teacher(side), work / side, **options)
        write_keys(work, **{side: texts})


def batches(config: TrainConfig) -> list[Batch]:
    """The batch of each step from the texts; the choice of rows and documents is the sampler's, whose tests
    are its own."""
    store = open_store(config.data, load_tokenizer(config.tokenizer), log=lambda message: None)
    encode = Tokenizer.from_file(f"{config.tokenizer}/tokenizer.json").encode
    (source,) = config.data.datasets
    data = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    known: dict[str, set[tuple[int, ...]]] = {}

    def cut(text: str) -> tuple[int, ...]:
        return tuple(encode(text).ids[: config.data.document_max_length])

    def right(row: dict[str, Any]) -> set[tuple[int, ...]]:
        return known[row["query"].rstrip("?")] | known.get(f"group {row.get('group')}", set())

    for row in data:
        known.setdefault(row["query"].rstrip("?"), set()).update(map(cut, row["pos"]))
        if "group" in row:
            known.setdefault(f"group {row['group']}", set()).update(map(cut, row["pos"]))
    drawn = [
        i
        for i, row in enumerate(data)
        if config.loss.has_in_batch
        or config.loss.teacher_vectors_weight
        or any(cut(text) not in right(row) for text in row["neg"])
    ]
    # Ids are given in the order in which the rows bring their texts.
    texts = list(dict.fromkeys(text for row in data for text in row["pos"] + row["neg"]))
    sampler = Sampler(np.array(drawn), config.global_batch_size, config.seed)
    out = []
    for step in range(config.steps):
        rows = sampler.rows(step)
        documents = choose_documents(
            store, rows, sampler.epochs(step), config.data.num_hard_negatives, config.seed
        )
        tokens = {int(d): store.document_tokens(d).tolist() for d in np.unique(documents[documents >= 0])}
        found = [data[row] for row in rows.tolist()]
        prompt, length = f"Instruct: {source.task}\nQuery: ", config.data.query_max_length
        queries = [encode(prompt + row["query"]).ids[:length] for row in found]
        scores = [
            {
                cut(text): score  # the first one, where texts are the same when they are cut
                for side in ("neg", "pos")
                for text, score in reversed([*zip(row[side], row.get(f"{side}_scores", []), strict=False)])
            }
            for row in found
        ]
        assert all(tuple(ids) == cut(texts[d]) for d, ids in tokens.items())
        vectors = [
            [
                torch.from_numpy(x).double()
                for x in (
                    vector("queries", row["query"]), *(vector("documents", texts[d]) for d in own if d >= 0),
                )
            ]
            for row, own in zip(found, documents.tolist(), strict=True)
        ]  # fmt: skip
        out.append(Batch(queries, documents.tolist(), tokens, [right(row) for row in found], scores, vectors))
    return out


def expected(folder: Path, case: dict[str, Any], start: dict[str, Any] | None = None) -> dict[str, Any]:
    """start: LoRA's factors, of which only those of the first step are the product's."""
    config, model = configure(folder, case, "oracle"), folder / case["model"]
    oracle = Oracle(model, torch.float64, case.get("pooling", "mean"))
    if start:
        scale, rate = config.lora.alpha / config.lora.rank, config.lora.dropout
        oracle = LowRank(model, torch.float64, start, scale)
        if rate:
            oracle = Dropped(model, torch.float64, start, scale, rate, config.seed)
    options = config.steps, case["loss"], case["optim"]
    steps = [oracle.step(batch, number, *options) for number, batch in enumerate(batches(config))]
    return {"steps": steps, "weights": oracle.weights()}


def rows_off(got: torch.Tensor, want: torch.Tensor, tolerance: tuple[float, float]) -> float:
    """The largest error of a row, in units of what it may be."""
    error, row = (
        (x.double().flatten(0, -2) if x.ndim > 1 else x[None].double()).abs().amax(1)
        for x in (got - want, want)
    )
    budget = tolerance[0] * row + tolerance[1] * want.abs().max()
    return (error / budget.clamp(min=1e-300)).max().item()


def compare(case: dict[str, Any], got: dict[str, Any], want: dict[str, Any]) -> None:
    tolerance = TOLERANCE[case["dtype"]]
    shown = {key: value for key, value in case.items() if key != "data"}
    assert len(got["gradients"]) == len(want["steps"]) == case["steps"]
    for number, (record, gradients, step) in enumerate(
        zip(got["records"], got["gradients"], want["steps"], strict=True)
    ):
        where = f"step {number} of {shown}"
        # Every row is learnt: what is left is rounding on both sides.
        if step.norm < 1e-10 and case["dtype"] == "fp64":
            assert record["loss"] < 1e-10 and record["grad_norm"] < 1e-10, where
            continue
        assert abs(record["loss"] / step.losses.mean().item() - 1) < tolerance[0], f"{where}: loss"
        assert abs(record["grad_norm"] / step.norm - 1) < tolerance[0], f"{where}: gradient norm"
        if case["loss"].get("temperature_lr"):
            assert abs(record["temperature"] / step.temperature - 1) < tolerance[0], f"{where}: temperature"
            assert number == 0 or step.temperature != want["steps"][0].temperature, where
        for name, mean in step.terms.items() if "losses" in record else ():
            if name in record["losses"] or not name.startswith("info_nce"):
                assert abs(record["losses"][name] / mean - 1) < tolerance[0], f"{where}: loss of {name}"
        # Else only candidates of the same micro-batch are looked at, and those that the terms leave out.
        if case["loss"]["in_batch"] == "none" and case["loss"].keys() == {"in_batch", "temperature"}:
            hits = [bool((s[0] > s[1:]).all()) for s in step.scores if len(s) > 1]
            assert abs(record["accuracy"] - np.mean(hits)) < 1e-12, (
                f"{where}: accuracy of rows that have a candidate"
            )
            assert record["rows_without_candidates"] == len(step.scores) - len(hits), where
            negatives = torch.cat([s[1:] for s in step.scores])
            assert abs(record["negative_similarity"] - negatives.mean().item()) < 1e-6, where
        assert abs(record["positive_similarity"] - np.mean([s[0].item() for s in step.scores])) < 1e-6, where
        assert gradients.keys() == step.gradients.keys()
        for name, gradient in step.gradients.items():
            off = rows_off(gradients[name], gradient, tolerance)
            assert off <= 1, f"{where}: a row of the gradient of {name} is off by {off:.1e} times its budget"
    if case["loss"].get("teacher_vectors_weight"):
        *gradients, value = got["projection"]
        for number, (gradient, step) in enumerate(zip(gradients, want["steps"], strict=True)):
            off = rows_off(gradient, step.projection[0], tolerance)
            assert off <= 1, f"step {number} of {shown}: the projection's gradient is off by {off:.1e}"
        off = rows_off(value, want["steps"][-1].projection[1], tolerance)
        assert off <= 1, f"{shown}: the projection is off by {off:.1e} times its budget"
    for name, weight in want["weights"].items():
        off = rows_off(got["weights"][name], weight, tolerance)
        assert off <= 1, (
            f"{shown}: a row of {name} after {case['steps']} steps is off by {off:.1e} times its budget"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tokenizer and two models; both sides read them."""
    root = tmp_path_factory.mktemp("oracle")
    write_tokenizer(root / "tokenizer")
    write_data(root / "train.jsonl")
    write_vectors(root / "train.jsonl", root / "teacher")
    for name, (vocab_size, intermediate_size) in MODELS.items():
        write_model(root / name, vocab_size, intermediate_size)
    for name, shape in BASES.items():
        write_model(root / name, *MODELS["even"], **shape)
    return root


def run(server: Server, folder: Path, cases: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    tp, _, dp, _ = cases[0]["layout"]
    named = [(f"{name}-{i}", case) for i, case in enumerate(cases)]
    outcomes = server.run(train_cases, tp * dp, str(folder), named)
    assert [outcome.code for outcome in outcomes] == [0] * (tp * dp), outcomes[0].output[-3000:]
    return outcomes[0].result


def named(layout: tuple) -> str:
    tp, sp, dp, replicate = layout
    return f"tp{tp}{'+sp' * sp}-dp{dp}{f'-replicate{replicate}' * (replicate > 1)}"


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=pytest.mark.slow) if x in SLOW_MIXED else x for x in LAYOUTS],
    ids=map(named, LAYOUTS),
)
def test_a_layout_trains_as_the_oracle(layout: tuple, server: Server, folder: Path) -> None:
    cases = [case for case in MIXED if case["layout"] == layout]
    results = run(server, folder, cases, f"mixed-{LAYOUTS.index(layout)}")
    for case, got in zip(cases, results, strict=True):
        compare(case, got, expected(folder, case))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_more_cases_of_a_layout_train_as_the_oracle(layout: tuple, server: Server, folder: Path) -> None:
    cases = [case for case in MORE if case["layout"] == layout]
    results = run(server, folder, cases, f"more-{LAYOUTS.index(layout)}")
    for case, got in zip(cases, results, strict=True):
        compare(case, got, expected(folder, case))


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout",
    [*BASE_LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS)],
    ids=named,
)
def test_a_base_model_trains_as_the_oracle(layout: tuple, server: Server, folder: Path) -> None:
    """Two steps, of which the second sees what the first did; every pooling, with recomputation too."""
    base = {**BASE, "layout": layout, "dtype": "fp64", "steps": 2}
    cases = [
        {**base, "model": name, "pooling": pooling, "activation_checkpointing": again}
        for name, pooling, again in (
            ("qwen2", "weightedmean", "full"), ("qwen3", "cls", "selective"), ("causal", "last", "none"),
        )
    ]  # fmt: skip
    results = run(server, folder, cases, f"bases-{'-'.join(map(str, layout))}")
    for case, got in zip(cases, results, strict=True):
        compare(case, got, expected(folder, case))


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout, model, again",
    [
        ((1, False, 1, 1), "qwen3", "selective"), ((2, False, 1, 1), "odd", "full"),
        ((2, True, 1, 1), "odd", "selective"), ((1, False, 2, 1), "qwen2", "full"),
        pytest.param((2, True, 2, 1), "odd", "none", marks=pytest.mark.slow),
        pytest.param((4, True, 1, 1), "even", "full", marks=pytest.mark.slow),
        pytest.param((2, False, 2, 2), "even", "selective", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_lora_trains_as_the_projection_of_a_dense_run(
    layout: tuple, model: str, again: str, server: Server, folder: Path
) -> None:
    """Two steps: B is zero in the first, whose update the second's dA shows. The base stays as it was."""
    case = {
        **BASE, "layout": layout, "model": model, "dtype": "fp64", "activation_checkpointing": again,
        "lora": {"rank": 3, "alpha": 7.0}, "steps": 2,
    }  # fmt: skip
    (got,) = run(server, folder, [case], f"lora-{'-'.join(map(str, layout))}")
    for name, factor in got["start"].items():
        assert factor.any() == name.endswith("/A") and factor.abs().max() <= factor.shape[1] ** -0.5, name
    compare(case, got, expected(folder, case, got["start"]))


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout, model, again, max_tokens",
    [
        ((1, False, 1, 1), "qwen3", "selective", 200), ((2, False, 1, 1), "odd", "full", 200),
        ((2, True, 1, 1), "odd", "selective", 200), ((1, False, 2, 1), "qwen2", "full", 150),
        ((1, False, 1, 1), "odd", "none", 4000), ((2, True, 1, 1), "even", "none", 4000),
        pytest.param((2, True, 2, 1), "odd", "none", 150, marks=pytest.mark.slow),
        pytest.param((4, True, 1, 1), "odd", "full", 200, marks=pytest.mark.slow),
        pytest.param((2, False, 2, 2), "even", "selective", 200, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_dropout_of_lora_is_the_oracles_in_every_layout(
    layout: tuple, model: str, again: str, max_tokens: int, server: Server, folder: Path
) -> None:
    """Masks by the oracle's own integers: of tp ranks' shares of tokens and columns, of ranks and
    micro-batches that have other texts beside, made again in backward, and others in each step."""
    case = {
        **BASE, "layout": layout, "model": model, "dtype": "fp64", "activation_checkpointing": again,
        "lora": {"rank": 3, "alpha": 7.0, "dropout": 0.3}, "steps": 3,
        "data": {**BASE["data"], "max_tokens": max_tokens},
    }  # fmt: skip
    (got,) = run(server, folder, [case], f"dropout-{'-'.join(map(str, layout))}-{max_tokens}")
    compare(case, got, expected(folder, case, got["start"]))


@pytest.mark.parametrize("group", ["loss", "optim", "data", "rest"])
def test_every_option_changes_the_run_as_the_oracle_says(group: str, server: Server, folder: Path) -> None:
    base = {**BASE, "layout": LAYOUTS[0], "model": "even", "dtype": "fp64"}
    known = ("loss", "optim", "data")
    changes = [c for c in CHANGES if (c[0].split(".")[0] if c[0].split(".")[0] in known else "rest") == group]
    cases = [changed(base, option, value) for option, value, _ in changes]
    results = run(server, folder, [base, *cases], f"single-{group}")
    before = expected(folder, base)
    compare(base, results[0], before)
    for (option, value, matters), case, got in zip(changes, cases, results[1:], strict=True):
        after = expected(folder, case)
        compare(case, got, after)
        difference = max(rows_off(w, before["weights"][n], (1e-6, 0.0)) for n, w in after["weights"].items())
        assert (difference > 1) == matters, f"{option}={value} is no case of its option: {difference:.1e}"


def test_no_option_of_the_loss_and_the_optimizer_is_left_out() -> None:
    """A new field of these must come into CHANGES, or be known here to decide no number of a step."""
    elsewhere = {
        DataConfig: {
            "datasets", "cache_dir", "store", "on_long_row", "on_bad", "negatives", "batches", "weights",
        },
        ParallelConfig: {
            "tp_size", "sequence_parallel", "dp_size", "dp_replicate", "reduce_dtype", "timeout_s",
        },
        LossConfig: {"cosent_weight", "cosent_temperature"},  # of graded rows: tests/loss/test_graded.py
        OptimConfig: {"master_weights", "moments"},
        TrainConfig: {
            "output_dir", "init_from", "init_layers", "init_axes", "tokenizer", "model", "checkpoint",
            "precision", "device", "on_spike", "spike_zscore", "log_every", "tensorboard", "loss", "optim",
            "data", "parallel", "epochs", "eval", "report_to", "lora",
        },
    }  # fmt: skip
    groups = {
        DataConfig: "data.",
        ParallelConfig: "parallel.",
        LossConfig: "loss.",
        OptimConfig: "optim.",
        TrainConfig: "",
    }
    changes = {option for option, _, _ in CHANGES}
    for cls, known in elsewhere.items():
        missing = {f.name for f in dataclasses.fields(cls)} - known
        assert missing == {name for name in missing if groups[cls] + name in changes}, (
            f"{cls.__name__}: {missing}"
        )
