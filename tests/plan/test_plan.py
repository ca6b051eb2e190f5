"""The planner against what was recorded on a GPU and published of a cluster, and against the formulas of the
wire."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny import DRAWN, MODEL, train_config

from benchmarks import step_data as step
from launch import plan as launcher
from nemo_embed_core.checkpoint.manifest import seal
from nemo_embed_core.config import (
    ClusterConfig,
    DatasetConfig,
    LengthsConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PlanConfig,
    TrainConfig,
)
from nemo_embed_core.config.train import Recompute
from nemo_embed_core.data.build import open_store
from nemo_embed_core.data.packing import load_batch
from nemo_embed_core.data.sampler import Sampler
from nemo_embed_core.data.shapes import Shape
from nemo_embed_core.data.tokenizer import load_tokenizer
from nemo_embed_core.errors import UserError
from nemo_embed_core.model.spec import parameter_shapes
from nemo_embed_core.options import dump_yaml
from nemo_embed_core.parallel.mesh import distributed
from nemo_embed_core.parallel.wire import step_traffic
from nemo_embed_core.plan.hardware import GPUS
from nemo_embed_core.plan.lengths import Texts, draw, split, texts_of
from nemo_embed_core.plan.plan import (
    Candidate,
    Found,
    needed,
    num_parameters,
    num_trained,
    traffic_of,
    wire_of,
)
from nemo_embed_core.plan.plan import _model as shape_of
from nemo_embed_core.plan.plan import plan as make_plan
from nemo_embed_core.plan.pretend import PARTS, pretend
from nemo_embed_core.plan.report import report
from nemo_embed_core.plan.time import Layout, link, step_seconds
from nemo_embed_core.train.preflight import prepare
from nemo_embed_core.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/step-20261127-140006.jsonl"  # one H200


@pytest.mark.parametrize("shape, layers, vocab_size", [("8b", 8, 32064), ("1b", 16, 128256)])
def test_the_recorded_peaks_within_five_percent(shape: str, layers: int, vocab_size: int) -> None:
    """The very batches of the record: three of 28 queries, of which the largest makes the peak."""
    rows = [json.loads(line) for line in RECORD.read_text().splitlines()]
    (recorded,) = [
        row["peak_gb"] for row in rows
        if row["what"] == "train" and row["shape"] == shape and row["variant"].startswith("ours")
    ]  # fmt: skip
    model = replace(step.SHAPES[shape], num_hidden_layers=layers, vocab_size=vocab_size)
    groups = step.Groups(3 * 28, 4, vocab_size, seed=0)
    batches = [b.micro_batches[0] for b in step.global_batches(groups, model, 28, 16384)]
    largest = max(batches, key=lambda batch: batch.num_tokens)
    seen = pretend(TrainConfig(output_dir="", steps=1), model, 1, [Shape(largest.lengths, 28, 5)])
    assert abs(seen.peak / 1e9 / recorded - 1) < 0.05, f"{seen.peak / 1e9:.2f} GB, recorded {recorded:.2f}"
    assert sum(seen.components.values()) == seen.peak and list(seen.components) == list(PARTS)
    parameters = num_parameters(model)
    assert seen.components["weights"] == 4 * parameters, "fp32 masters"
    assert abs(seen.components["optimizer states"] - 8 * parameters) < 1e4, "two moments, and the steps"


@pytest.mark.parametrize(
    "world_size, copies, precision, sizes, more",
    [
        (64, 8, "bf16", (1, 2, 4, 8), {}), (512, 64, "bf16", (1, 2, 4, 8), {}), (64, 8, "fp8", (1, 4), {}),
        (64, 8, "bf16", (2,), {
            "loss": LossConfig(cosent_weight=1.0, kl_weight=1.0, matryoshka_dims=[4096, 64]),
        }),
        (64, 8, "bf16", (1, 2, 4), {"targets": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
        (64, 8, "fp8", (4,), {"targets": ["qkv_proj", "o_proj"], "again": "full"}),
        (64, 8, "bf16", (1, 4), {"targets": ["qkv_proj", "down_proj"], "again": "full"}),
    ],
)  # fmt: skip
def test_a_pretended_step_sends_what_the_formulas_say(
    world_size: int, copies: int, precision: Literal["bf16", "fp8"], sizes: tuple[int, ...], more: Any
) -> None:
    """Every layout of a block of the 8B, on one rank of a cluster; with LoRA of two, with and without
    recomputation and sequence parallelism."""
    lora = LoraConfig(rank=8, dropout=0.1, targets=more["targets"]) if "targets" in more else LoraConfig()
    model = ModelConfig(num_hidden_layers=2 if lora.rank else 1)
    for tp in sizes:
        for replicate in (1, copies):
            layout = Layout(tp, replicate, world_size)
            is_odd = lora.rank > 0 and replicate > 1
            parallel = ParallelConfig(
                tp_size=tp, dp_replicate=replicate, sequence_parallel=not is_odd, reshard_after_forward=is_odd
            )
            config = TrainConfig(
                output_dir="", steps=1, parallel=parallel, global_batch_size=12 * layout.dp,
                precision=precision, lora=lora, init_from="base" if lora.rank else "",
                activation_checkpointing=more.get("again", "none"), loss=more.get("loss", LossConfig()),
            )  # fmt: skip
            shapes = [Shape((96,) * 40, 8, 4), Shape((64,) * 20, 4, 4)]
            seen = pretend(config, model, world_size, shapes, parts=False)
            formulas = step_traffic(
                wire_of(config, model, layout), [(s.num_tokens, len(s.lengths)) for s in shapes]
            )
            assert seen.traffic == formulas, layout


def test_lora_of_the_8b_fits_a_card_of_24_gb() -> None:
    """Rank 16 with full recomputation: the base in bf16, and fp32 states of the factors alone."""
    lora = LoraConfig(rank=16)
    config = TrainConfig(output_dir="", steps=1, init_from="base", lora=lora, activation_checkpointing="full")
    seen = [
        pretend(config, ModelConfig(num_hidden_layers=n), 1, [Shape((128,) * 32, 4, 8)], parts=n == 4)
        for n in (2, 4)
    ]
    factors = num_trained(config, ModelConfig(num_hidden_layers=4))
    base = num_parameters(ModelConfig(num_hidden_layers=4))
    assert seen[1].components["weights"] == 2 * base + 4 * factors
    assert abs(seen[1].components["optimizer states"] - 8 * factors) < 1e4
    whole = seen[1].peak + (seen[1].peak - seen[0].peak) / 2 * 28
    assert 2 * num_parameters(ModelConfig()) < whole and needed(whole) < GPUS["L4"].memory


def test_fp8_is_faster_by_its_products_alone_and_no_a100_has_it(tmp_path: Path) -> None:
    """16,384 tokens of the 8B on one H200: 42.1 GFLOP of products a token, at 782 TFLOP/s in bf16."""
    model, layout = ModelConfig(), Layout(1, 1, 1)
    cluster = ClusterConfig(gpu="H200", nodes=1, per_node=1)
    arguments = cluster, layout, model, [(16384, 16384 * 105)], {}, "selective", num_parameters(model)
    (least, most), (fp8_least, fp8_most) = (step_seconds(*arguments, 26, fp8) for fp8 in (False, True))
    products = 16384 * 42.1e9
    # Quantising reads and writes 11.8 MB a token and 45 GB of weights, at 4.2 TB/s.
    added = (16384 * 11.8e6 + 45e9) / 4.2e12
    for before, after, rate in ((least, fp8_least, 1500e12), (most, fp8_most, 1300e12)):
        assert abs(before - after - (products / 781e12 - products / rate - added)) < 4e-3
    train = tmp_path / "train.yaml"
    train.write_text("output_dir: x\nsteps: 1\nprecision: fp8\n")
    config = PlanConfig(train=str(train), cluster=ClusterConfig(gpu="A100-80GB"), tp_sizes=[1], max_tokens=[])
    found = make_plan(config, lambda message: None)
    assert not found.best and {c.why for c in found.impossible} == {
        "A100-80GB has no fp8 products: precision=bf16"
    }


def test_the_whole_model_is_the_continuation_of_a_few_layers() -> None:
    config = TrainConfig(output_dir="", steps=1, parallel=ParallelConfig(tp_size=2))
    shapes = [Shape((128,) * 60, 12, 4)]
    two, four, eight = (
        pretend(config, ModelConfig(num_hidden_layers=n), 16, shapes, parts=False).peak for n in (2, 4, 8)
    )
    assert abs((two + 3 * (four - two)) / eight - 1) < 0.01


def test_graded_pairs_of_a_large_batch_need_memory() -> None:
    """CoSENT's differences of all pairs of the global batch, and their gradients, are on every rank."""
    loss = LossConfig(info_nce_weight=0.0, cosent_weight=1.0)
    config = TrainConfig(output_dir="", steps=1, loss=loss, global_batch_size=8192)
    model = replace(MODEL, num_hidden_layers=1)
    assert pretend(config, model, 8, [Shape((4,) * 64, 1024, 1)], parts=False).peak > 2 * 4 * 8192**2


def test_a_run_from_the_best_checkpoint_of_another_has_its_shape(tmp_path: Path) -> None:
    model = replace(MODEL, num_hidden_layers=1)
    config = train_config(tmp_path, steps=0, model=model, output_dir=str(tmp_path / "first"))
    with distributed(config.parallel, "cpu", model) as mesh:
        Trainer(config, mesh, prepare(config), log=lambda message: None).run()
    file = tmp_path / "first" / "step-00000000" / "manifest.json"
    best = {"best": {"step": 0, "value": 0.5}}
    file.write_bytes(seal({**json.loads(file.read_text()), "eval": best}))
    train = train_config(tmp_path, init_from=str(tmp_path / "first" / "best"))
    assert shape_of(train) == (model, train.init_from)


def hours(cluster: ClusterConfig, name: str, recompute: Recompute) -> tuple[float, float]:
    """Of a recipe of the paper, tp 1, every text of the 512 tokens that it allows."""
    config = TrainConfig.from_yaml(ROOT / "configs" / name)
    num_steps = config.steps or 33_668  # one epoch of the paper's rows
    lengths = LengthsConfig(query_mean=512, query_p95=512, document_mean=512, document_p95=512)
    texts = texts_of("", config.data, False, lengths, config.global_batch_size, 0)
    layout, model = Layout(1, 1, cluster.world_size), ModelConfig()
    found = split(texts.batches[0], layout.dp, config.data.max_tokens)
    seconds = step_seconds(
        cluster, layout, model, [(t, squares) for t, squares, _ in found.micro_batches],
        traffic_of(config, model, layout, found), recompute, num_parameters(model), 28,
    )  # fmt: skip
    return num_steps * seconds[0] / 3600, num_steps * seconds[1] / 3600


def test_the_papers_hours_lie_in_the_interval() -> None:
    """arXiv:2511.07025: 25.0 and 21.5 hours on 64 A100. Its lengths are not published: the longest that it
    allows."""
    a100 = ClusterConfig(gpu="A100-80GB", nodes=8, network_link=22.5)
    first, second = (hours(a100, f"train-8b-stage{i}.yaml", "full") for i in (1, 2))
    assert first[0] < 25.0 < first[1] and second[0] < 21.5 < second[1]
    assert first[0] + second[0] < 46.5 < first[1] + second[1] < 2 * (first[0] + second[0])
    h100 = ClusterConfig(gpu="H100", nodes=8)
    faster = [
        sum(pair)
        for pair in zip(*(hours(h100, f"train-8b-stage{i}.yaml", "full") for i in (1, 2)), strict=True)
    ]
    assert faster[1] < 46.5 and faster[0] < first[0] + second[0]


@pytest.mark.parametrize(
    "tp, replicate, axis, rate",
    [
        (8, 1, "tp", 370e9), (1, 1, "dp_shard", 360e9), (2, 1, "dp_shard", 180e9), (8, 1, "dp_shard", 45e9),
        (1, 8, "dp_shard", 370e9), (1, 8, "dp_replicate", 45e9), (2, 8, "dp", 180e9),
    ],
)  # fmt: skip
def test_a_ring_over_nodes_has_the_cards_of_its_ranks(
    tp: int, replicate: int, axis: str, rate: float
) -> None:
    """Eight nodes of eight, 45 GB/s a card: of a node, 8 / tp ranks are in a data-parallel ring."""
    found, latency = link(ClusterConfig(nodes=8), Layout(tp, replicate, 64), axis)
    assert (found, latency) == (rate, 12e-6 if rate == 370e9 else 40e-6)


def test_batches_are_split_as_training_splits_them(tmp_path: Path) -> None:
    config = train_config(tmp_path, data={"max_tokens": 200, "num_hard_negatives": 3})
    store = open_store(config.data, load_tokenizer(config.tokenizer), log=lambda message: None)
    texts = texts_of(str(store.folder), config.data, False, LengthsConfig(), 24, 5)
    sampler = Sampler(DRAWN, 24, 5)
    assert texts.sampler is not None and texts.sampler.steps(2) == 4, "of 45 rows each"
    for number, batch in enumerate(texts.batches[:2]):
        ranks = [load_batch(store, sampler, number, rank, 4, config.data, 1, 5)[0] for rank in range(4)]
        found = split(batch, 4, 200)
        assert len(found.micro_batches) == len(ranks[0]) > 1
        for i, (tokens, squares, _) in enumerate(found.micro_batches):
            fullest = max((rank[i] for rank in ranks), key=lambda m: m.num_tokens)
            # A document that two rows share is packed once.
            assert 0 <= tokens - fullest.num_tokens <= 40
            assert squares >= sum(n * n for n in fullest.lengths) - 40**2
    assert texts.longest >= max(int(batch.sum(1).max()) for batch in texts.batches)


def test_drawn_lengths_have_the_stated_mean_and_percentile() -> None:
    lengths = draw(np.random.default_rng(0), (200_000, 1), 105, 249, 10**6)
    assert abs(lengths.mean() / 105 - 1) < 0.01 and abs(np.percentile(lengths, 95) / 249 - 1) < 0.01
    assert set(np.unique(draw(np.random.default_rng(0), (100, 2), 512, 512, 512))) == {512}


def test_the_command_ranks_layouts_and_says_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = replace(MODEL, hidden_size=1024, intermediate_size=4096, vocab_size=3_900_000)
    dump_yaml(train_config(tmp_path, model=model, global_batch_size=256), tmp_path / "run.yaml")
    command = ["plan", "--train", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "plan.json")]
    options = (
        "--cluster.per_node",
        "1",
        "--cluster.nodes",
        "4",
        "--tp_sizes",
        "1",
        "3",
        "--max_tokens",
        "[]",
    )
    monkeypatch.setattr(sys, "argv", [*command, *options])
    launcher.main()
    found = json.loads((tmp_path / "plan.json").read_text())
    text, log = capsys.readouterr()
    tried = len(found["best"]) + len(found["too_large"])
    assert log.startswith(
        f"{tried} layouts to try; fewer values of tp_sizes and max_tokens make them fewer\n"
    )
    speeds = [sum(candidate["tokens_per_s"]) for candidate in found["best"]]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) >= 2
    assert {tuple(c["layout"].values()) for c in found["best"]} == {(1, 1, 4)}, "one copy over four GPUs"
    # Each of four copies holds 4.0 B parameters of 16 bytes, and what is gathered and reduced.
    assert {tuple(c["layout"].values()) for c in found["too_large"]} == {(1, 4, 4)}
    assert min(c["peak"] for c in found["too_large"]) > 16 * found["parameters"] > 60e9
    assert f"{len(found['too_large'])} layouts need more than the 84.9 GB of a GPU" in text
    assert "tp 3 must divide the 4 KV heads and the 1 GPUs of a node" in text
    peaks = {c["recompute"]: c["peak"] for c in found["best"]}
    assert peaks["none"] >= peaks["selective"] >= peaks["full"]
    memory = found["memory"]
    assert sum(memory[part] for part in PARTS) == memory["peak"]
    assert memory["weights"] == 4 * found["parameters"] // 4, "a fourth of the fp32 masters on each rank"
    assert f"{12 * found['parameters'] / 1e9:.1f} GB a checkpoint" in text
    monkeypatch.setattr(sys, "argv", [*command, "--lengths.document_mean", "300"])
    with pytest.raises(SystemExit) as ended:
        launcher.main()
    assert ended.value.code == 2
    assert "document_p95=249.0 between it and 3.8 times it" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_before_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    dump_yaml(train_config(tmp_path), tmp_path / "run.yaml")
    monkeypatch.setattr("nemo_embed_core.plan.plan.plan", lambda *_: pytest.fail("it went on"))
    (tmp_path / "file").write_text("")
    for output, said in (("file/plan.json", "cannot be written"), (".", "is a folder")):
        argv = ["plan", "--train", str(tmp_path / "run.yaml"), "--output", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            launcher.main()
        assert ended.value.code == 2 and said in capsys.readouterr().err
    dump_yaml(train_config(tmp_path, steps=None, epochs=3), tmp_path / "epochs.yaml")
    with pytest.raises(
        UserError, match=r"epochs\.yaml: epochs=3 is of rows that nobody has counted: give store"
    ):
        make_plan(PlanConfig(train=str(tmp_path / "epochs.yaml")))
    # Of caps the draws are known: 21 and 2.5, half up, three times in batches of 8.
    datasets = [DatasetConfig(path="a", cap=21), DatasetConfig(path="b", cap=10)]
    for batches, steps in (("mixed", 9), ("one_source", 8 + 2)):
        data = {"datasets": datasets, "weights": {"b": 0.25}, "batches": batches}
        dump_yaml(train_config(tmp_path, steps=None, epochs=3, data=data), tmp_path / "epochs.yaml")
        one = PlanConfig(
            train=[str(tmp_path / "epochs.yaml")],
            cluster=ClusterConfig(per_node=1),
            tp_sizes=[1],
            max_tokens=[],
        )
        found = make_plan(one, lambda line: None)
        assert found.train.steps == steps and "as many rows as the caps of their 2 datasets" in report(found)
    with pytest.raises(UserError, match=r"store=.*data\.cache_dir/DIGEST"):
        texts_of(str(tmp_path), train_config(tmp_path).data, False, LengthsConfig(), 8, 0)


@pytest.mark.parametrize(
    ("gpus", "master_weights", "moments", "ways"),
    [
        (1, "split", "8bit", "more GPUs or"),
        (1, "split", "bf16", "more GPUs, optim.moments=8bit or"),
        (1, "fp32", "fp32", "more GPUs, optim.master_weights=split or"),
        (
            4, "split", "fp32", "more GPUs, a larger parallel.tp_size, parallel.reshard_after_forward=true, "
            "optim.moments=bf16 or",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_only_what_would_help(
    tmp_path: Path, gpus: int, master_weights: str, moments: str, ways: str
) -> None:
    optim = {"master_weights": master_weights, "moments": moments}
    train = train_config(tmp_path, precision="bf16", optim=optim)
    too_large = Candidate(layout=Layout(1, 1, gpus), recompute="full", max_tokens=512, peak=10**12)
    found = Found(
        config=PlanConfig(train="run.yaml"), train=train, model=MODEL, model_words="",
        texts=Texts([], 512, ""), best=[], seen=None, too_large=[too_large], impossible=[],
    )  # fmt: skip
    said = report(found)
    assert f"GB; {ways} fewer data.max_tokens" in said
    assert f"AdamW moves {16 if moments == '8bit' else 20 if moments == 'bf16' else 28}" in said


@pytest.mark.parametrize(("moments", "each"), [("fp32", 8.0), ("bf16", 4.0), ("8bit", 2 + 4 / 256)])
def test_states_and_seconds_of_an_update_are_those_of_its_moments(moments: str, each: float) -> None:
    optim = OptimConfig(master_weights="split", moments=moments)
    config, model = TrainConfig(output_dir="", steps=1, optim=optim), ModelConfig(num_hidden_layers=1)
    seen = pretend(config, model, 2, [Shape((64,) * 20, 4, 4)])
    shares = [torch.Size(shape).numel() / 2 for shape in parameter_shapes(model).values()]
    bytes_of_norms = 3 * model.hidden_size / 2 * (10 - each - 2)
    states = seen.components["optimizer states"]
    assert states == pytest.approx((2 + each) * sum(shares) + bytes_of_norms, abs=8)
    cluster, layout = ClusterConfig(nodes=1), Layout(1, 1, 8)
    took = [step_seconds(cluster, layout, model, [(64, 64)], {}, "none", 10**9, b)[0] for b in (28, 6)]
    assert took[0] - took[1] == pytest.approx(22 * 10**9 / 8 / GPUS[cluster.gpu].bandwidth)
