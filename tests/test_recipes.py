"""docs/recipe.md and configs/: counts are the paper's, every file is accepted and planned, every command of
the page runs on the release made small."""

import contextlib
import gzip
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Server
from recipes import CONFIGS, MIX, RECIPES, ROOT, commands, files, launcher, run_commands
from safetensors.torch import load_file
from tiny import MODEL, write_hf
from toy_evaluation import write_beir
from toy_release import CLASSES, LOADERS, NAMES, NUM_ROWS, RELEASE, ROWS, document, query, write_release

from nemo_embed_core.command_line import load_config
from nemo_embed_core.config import (
    ClusterConfig,
    DataConfig,
    DatasetConfig,
    PlanConfig,
    PrepareConfig,
    TrainConfig,
)
from nemo_embed_core.data.dataset import read_metadata
from nemo_embed_core.data.readers import read_rows

PAGE = ROOT / "docs/recipe.md"
RUNS = [CONFIGS / f"train-8b-run{i}.yaml" for i in range(1, 7)]
TRAINED = [
    path for path in RECIPES if launcher(path) is TrainConfig and not re.search("debug|demo", path.stem)
]

# ------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_prints_the_options_that_it_means(path: Path) -> None:
    """--print_config; places may be left to the command line."""
    given = "".join(file.read_text() for file in files(path))
    places = {"TrainConfig": ["output_dir"], "EvaluateConfig": ["data"]}.get(launcher(path).__name__, [])
    given = given.replace("\ntasks:", "\ndata:")  # which has its own
    more = {place: "somewhere" for place in places if f"\n{place}:" not in given}
    taken = [(launcher(path), files(path), more)]
    taken += [(PrepareConfig, [path], {"tokenizer": "somewhere"})] if path == MIX else []
    for cls, paths, options in taken:
        argv = [part for file in paths for part in ("--config", str(file))]
        argv += [f"--{name}={value}" for name, value in options.items()]
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as end:
            load_config(cls, [*argv, "--print_config"])
        assert end.value.code == 0
        assert cls.from_dict(yaml.safe_load(printed.getvalue())) == cls.from_yaml(*paths, **options)


SOURCES = {
    "AmazonReviews": 60_000, "BioASQ": 2_495, "DBLP-Citation": 25_000, "EmotionClassification": 13_046,
    "FEVER": 140_085, "GooAQ": 100_000, "HotpotQA": 170_000, "HoVer": 29_721, "InF-IR": 77_518,
    "MAmmoTH2": 317_180, "MIRACL": 79_648, "MLDR": 9_500, "MrTyDi": 12_610, "MSMARCO": 500_000,
    "MultiNLI": 75_505, "NaturalQuestions": 100_231, "NFCorpus": 3_685, "PAQ": 500_000, "Quora": 101_762,
    "RedditClustering": 90_000, "SciFact": 919, "SQuAD": 87_599, "StackExchange": 80_001,
    "SuperGLUE-TE": 3_094, "synthetic-bitext": 169_534, "SyntheticClassificationData": 1_044_212,
    "synthetic-retrieval": 182_814, "synthetic-STS": 239_997, "Toxic": 16_800, "TriviaQA": 73_346,
    "TuPy": 3_200,
}  # fmt: skip
# arXiv:2511.07025, of its stage 2: 33,668 steps of 128 queries are one epoch of them.


def test_the_mix_has_every_source_of_the_paper_with_its_count() -> None:
    text = MIX.read_text(encoding="utf-8")
    released = DataConfig.from_dict(yaml.safe_load(text)["data"]).datasets
    slots = [
        DatasetConfig.from_dict(yaml.safe_load(line)) for line in re.findall(r"^  # - (\{.*\})$", text, re.M)
    ]
    assert (len(released), len(slots)) == (14, 17)
    assert {Path(d.path).name: d.cap for d in (*released, *slots)} == SOURCES
    assert sum(SOURCES.values()) == 4_309_502 and -(-4_309_502 // 128) == 33_668
    assert {Path(d.path).parent.name for d in released} == {Path(RELEASE).name}
    assert {Path(d.path).parent for d in slots} == {Path("data/own")}, (
        "nothing that could be taken for released"
    )


def test_the_table_of_runs_is_what_their_files_say() -> None:
    """And its steps are one epoch of each, counted without the sampler."""
    rows = re.findall(r"^\| (\d) \| (\d+) \| ([\d.e-]+) \| ([^|]+) \| ([\d,]+) \|$", PAGE.read_text(), re.M)
    assert len(rows) == len(RUNS) == 6
    for path, (number, seed, rate, weights, steps) in zip(RUNS, rows, strict=True):
        config = TrainConfig.from_yaml(*files(path))
        said = {
            name: float(weight) for name, weight in re.findall(r"(\w+) ([\d.]+)", weights) if name != "all"
        }
        assert path.stem == f"train-8b-run{number}" and config.output_dir == f"runs/8b-run{number}"
        assert (config.seed, config.optim.lr, config.data.weights) == (int(seed), float(rate), said)
        draws = sum(int(SOURCES[name] * said.get(name, 1) + 0.5) for name in NAMES)
        assert -(-draws // config.global_batch_size) == int(steps.replace(",", ""))
        one, other = config, TrainConfig.from_yaml(*files(RUNS[0]))
        assert [d.path for d in one.data.datasets] == [d.path for d in other.data.datasets], "one store"
    mixes = [TrainConfig.from_yaml(*files(path)) for path in RUNS]
    assert len({str(config.data.weights) for config in mixes}) == len({config.seed for config in mixes}) == 6
    assert len({config.optim.lr for config in mixes}) == 3


CLUSTERS = {"train-h200": ClusterConfig(gpu="H200", per_node=1), "train-1b": ClusterConfig(gpu="H100")}


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_a_recipe_fits_its_cluster_by_the_plan(path: Path) -> None:
    """As it stands: its own recompute and tokens of a micro-batch."""
    from nemo_embed_core.plan.plan import plan

    both = [path] if path.stem not in CLUSTERS else [path, CONFIGS / "train-8b-stage2.yaml"]
    for of in both:
        train = files(path) if of == path else [of, MIX, path]
        train = [*train, MIX] if path.stem == "train-8b-stage2" else train
        cluster = CLUSTERS.get(path.stem, ClusterConfig(gpu="H100", nodes=8))
        options = PlanConfig(
            train=[str(file) for file in train], cluster=cluster, tp_sizes=[1], max_tokens=[]
        )
        found = plan(options, lambda line: None)
        config = TrainConfig.from_yaml(*train)
        own = (config.activation_checkpointing, config.data.max_tokens, 1)
        assert own in [(c.recompute, c.max_tokens, c.layout.replicate) for c in found.best], own


# ------------------------------------------------------------------------------------------ the commands


def made_small(verb: str, argv: list[str]) -> list[str]:
    """The command with what a toy on a CPU needs to be other; the six runs keep their epoch."""
    if verb == "train":
        argv = [
            *argv,
            "--optim.warmup_steps",
            "1",
            "--global_batch_size",
            "8" if "one_source" in argv else "64",
        ]
        epoch = any(str(run.relative_to(ROOT)) in argv for run in RUNS)
        argv += [] if epoch else ["--epochs", "null", "--steps", "2"]
    if verb == "mine":  # to random weights all texts are alike
        argv = [*argv, "--threshold", "1.2"]
    return [*argv, "--device", "cpu"] if verb in ("train", "mine", "evaluate") else argv


@pytest.fixture(scope="module")
def made(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the page was run, in its order."""
    folder = tmp_path_factory.mktemp("recipe")
    write_release(folder)
    shutil.copytree(CONFIGS, folder / "configs")
    for i, name in enumerate(MODELS):
        write_hf(folder / "models" / name, torch.float32, seed=i, config=replace(MODEL, num_hidden_layers=1))
    rows = [
        {"query": query("web", i), "pos": [document("web", i)], "neg": [document("web", i + 1)]}
        for i in range(64)
    ]
    with gzip.open(folder / "data/stage1.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [{"_id": f"d{i}", "text": document("FEVER", i)} for i in range(12)]
    queries = [{"_id": f"q{i}", "text": query("FEVER", i)} for i in range(6)]
    write_beir(folder / "data/heldout", corpus, queries, [(f"q{i}", f"d{i}", 1) for i in range(6)])
    given = [(verb, made_small(verb, argv)) for verb, argv in commands(PAGE) if verb != "plan"]
    server.preload("launch.evaluate", "nemo_embed_core.evaluation.retrieval:mteb_imported", "torch._dynamo")

    # As published, with ids only: all of them are named with what to download, at once.
    ((code, said),) = server.call(run_commands, str(folder), given[:1]).result
    assert code == 2 and len(re.findall(r"has ids only: its texts are someone/(\w+)", said)) == len(LOADERS)
    assert all(f"hf download someone/{name} --repo-type dataset" in said for name in LOADERS)
    for file in ("mix-release.yaml", "mine-teachers.yaml"):
        path = folder / "configs" / file
        text = re.sub(r"cap: \d+", f"cap: {NUM_ROWS}", path.read_text())
        for name in LOADERS:  # the page's edit
            text = re.sub(rf"({RELEASE}/{name})\b", rf"\1, source: data/sources/{name}", text)
        path.write_text(text)

    outcome = server.call(run_commands, str(folder), given)
    assert outcome.code == 0, outcome.output[-8000:]
    failed = [(given[i], said[-3000:]) for i, (code, said) in enumerate(outcome.result) if code]
    assert not failed, failed
    return folder


MODELS = ("Llama-3.1-8B", "Llama-3.2-1B", "e5-mistral-7b-instruct", "Qwen3-Embedding-8B")


def test_the_mined_release_has_every_row_with_its_own_texts(made: Path) -> None:
    for name, count in ROWS.items():
        folder = made / "data/mined" / name
        assert not read_metadata(folder).ids_only
        assert (
            read_metadata(folder).query_instruction == read_metadata(made / RELEASE / name).query_instruction
        )
        rows = list(read_rows(DatasetConfig(path=str(folder))))
        assert [row.query for row in rows] == [query(name, i) for i in range(count)], name
        if name in CLASSES:
            continue
        assert [row.pos for row in rows] == [[document(name, i)] for i in range(count)], name
        for row in rows:
            assert len(row.neg) == 4 and not {*row.neg} & {*row.pos}
            assert all(score < 1.2 * row.pos_scores[0] for score in row.neg_scores)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_six_runs_draw_what_their_mix_says_at_their_rate(made: Path) -> None:
    first = {}
    for path in RUNS:
        config = TrainConfig.from_yaml(*files(path))
        run = made / config.output_dir
        draws = {name: int(NUM_ROWS * config.data.weights.get(name, 1) + 0.5) for name in NAMES}
        steps = metrics(run)
        assert len(steps) == -(-sum(draws.values()) // 64), path.stem
        assert max(step["lr"] for step in steps) == config.optim.lr
        first[path.stem] = steps[0]["loss"]
    assert len(set(first.values())) == 6, "each draws other rows"
    assert len(list((made / "data-cache").glob("[0-9a-f]*"))) == 2, (
        "a store of stage 1, and one for all mixes"
    )


def test_the_average_is_of_the_six_and_all_are_evaluated(made: Path) -> None:
    merged = load_file(made / "exports/Llama-embed-8b/model.safetensors")
    files = [next((made / f"runs/8b-run{i}").glob("step-*/model-*.safetensors")) for i in range(1, 7)]
    weights = [load_file(file) for file in files]
    for name in ("norm.weight", "embed_tokens.weight"):
        mean = torch.stack([w[f"model.{name}"].double() for w in weights]).mean(0)
        assert merged[name].dtype == torch.float32 and (merged[name].double() - mean).abs().max() < 1e-7
        assert (merged[name] - weights[0][f"model.{name}"]).abs().max() > 1e-6, "they differ"
    report = json.loads((made / "reports/recipe.json").read_text())
    assert list(report)[:1] == ["exports/Llama-embed-8b"] and list(report)[-1] == "bm25" and len(report) == 8
    assert all(0 < values["ndcg_at_10"] <= 1 for values in report.values())


def test_the_one_gpu_layout_and_the_ablations_train(made: Path) -> None:
    assert TrainConfig.from_yaml(made / "runs/8b-stage2/config.yaml").optim.master_weights == "split"
    losses = {name: metrics(made / f"runs/1b-{name}") for name in ("none", "positives", "all")}
    assert all(len(steps) == 2 for steps in losses.values())
    first = [losses[name][0]["loss"] for name in ("none", "positives", "all")]
    assert first == sorted(first) and first[0] < first[2], "the same rows with more to beat"
