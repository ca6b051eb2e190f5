"""Wrong input and wrong set-up, through the launchers: exit code 2 and one paragraph that says what to
change."""

import json
from pathlib import Path

import pytest
import torch
from forked import Outcome, Server
from safetensors.torch import save_file
from tiny import write_rows, write_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip


class Launcher:
    def __init__(self, folder: Path, server: Server):
        self.folder, self.server = folder, server

    def __call__(self, argv: list[str], env: dict[str, str] | None = None) -> Outcome:
        return self.server.launch(argv, env)

    def train(self, *options: str, env: dict[str, str] | None = None) -> Outcome:
        shape = [f"--model.{k}={v}" for k, v in SHAPE.items()]
        base = [
            "launch/train.py",
            "--output_dir",
            str(self.folder / "run"),
            "--steps",
            "2",
            "--device",
            "cpu",
        ]
        base += ["--tokenizer", str(self.folder / "tok"), "--global_batch_size", "8"]
        base += ["--data.cache_dir", str(self.folder / "cache"), "--data.num_hard_negatives", "2"]
        rows = json.dumps([{"path": str(self.folder / "train.jsonl")}])
        return self([*base, *shape, "--data.datasets", rows, *options], env)


@pytest.fixture(scope="module")
def launch(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    folder = tmp_path_factory.mktemp("wrong")
    write_tokenizer(folder / "tok")
    write_rows(folder / "train.jsonl")
    return Launcher(folder, server)


def refuses(result: Outcome, *fragments: str) -> None:
    text = result.output
    assert result.code == 2, f"exit code {result.code}\n{text[-3000:]}"
    paragraph = [line for line in text.splitlines() if "error: " in line][-1]
    for fragment in fragments:
        assert fragment in paragraph, f"{fragment!r} is not in: {paragraph}"
    assert "Traceback" not in text and len(paragraph) < 700, text
    assert result.cpu_s < 5


OPTIONS: list[tuple[list[str], list[str]]] = [
    (["--optim.lrr=1"], ["optim.lrr", "did you mean optim.lr?"]),
    (["--optim.lr=fast"], ["optim.lr=fast must be a finite number"]),
    (["--optim.lr=-1"], ["lr=-1.0 must be positive"]),
    (["--optim.min_lr=-1"], ["optim.min_lr=-1.0 must lie between 0 and lr="]),
    (["--optim.min_lr=1"], ["optim.min_lr=1.0 must lie between 0 and lr="]),
    (["--optim.beta1=1.5"], ["beta1=1.5", "must lie in [0, 1)"]),
    (["--optim.eps=-1"], ["eps=-1.0 must be positive"]),
    (["--optim.warmup_steps=2"], ["optim.warmup_steps=2 is not below steps=2"]),
    (["--optim.warmup_steps=-1"], ["warmup_steps=-1", "must not be negative"]),
    (["--checkpoint.resume=nowhere"], ["nowhere is neither a checkpoint"]),
    (["--steps=1.5"], ["steps=1.5 must be an integer"]),
    (["--loss.in_batch=some"], ["loss.in_batch=some must be one of 'none', 'positives', 'all'"]),
    (["--loss.temperature=0"], ["loss.temperature=0.0 must be positive"]),
    (["--checkpoint.keep=0"], ["checkpoint.keep=0"]),
    (["--model.num_key_value_heads=3"], ["num_attention_heads=8 is not a multiple of num_key_value_heads=3"]),
    (["--model.hidden_size=60"], ["hidden_size=60 is not a multiple of num_attention_heads=8"]),
    (
        ["--precision=fp8", "--model.intermediate_size=120"],
        ["multiples of 16", "64 x 120; use precision=bf16"],
    ),
    (["--model.head_dim=7"], ["head_dim=7 must be even"]),
    (["--model.model_type=ministral3"], ["model_type=ministral3 needs a rope_scaling.llama_4_scaling_beta"]),
    (["--model.vocab_size=100"], ["model.vocab_size=100", "tokenizer makes ids up to"]),
    (["--tokenizer="], ["tokenizer is not set"]),
    (["--tokenizer=nowhere"], ["nowhere"]),
    (["--data.datasets=[]"], ["data.datasets is empty"]),
    (["--data.num_hard_negatives=0"], ["no negatives"]),
    (["--global_batch_size=1000"], ["global_batch_size=1000 is more than the data has rows, 45"]),
    (["--data.max_tokens=20"], ["20", "tokens"]),
    (["--data.query_max_length=1"], ["query_max_length=1 must be at least 2"]),
    (["--device=cuda"], ["device=cuda, but torch sees no CUDA device"]),
    (["--attention=flash"], ["attention=flash needs a CUDA device"]),
    (["--init_from=nowhere"], ["nowhere is not a folder"]),
    (["--config=nowhere.yaml"], ["config=", "nowhere.yaml is not a readable file of options"]),
]


@pytest.mark.parametrize("options, fragments", OPTIONS, ids=[" ".join(o) for o, _ in OPTIONS])
def test_wrong_option(launch: Launcher, options: list[str], fragments: list[str]) -> None:
    if options == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refuses(launch.train(*options), *fragments)


ENV = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
LAYOUTS: list[tuple[list[str], dict[str, str], str]] = [
    (["--parallel.tp_size=2"], {}, "world size 1 is not a multiple of parallel.tp_size=2"),
    (
        ["--parallel.tp_size=4"],
        {**ENV, "WORLD_SIZE": "6"},
        "world size 6 is not a multiple of parallel.tp_size=4",
    ),
    (["--parallel.tp_size=8"], {**ENV, "WORLD_SIZE": "8"}, "tp_size=8 does not divide num_key_value_heads=4"),
    (
        ["--parallel.tp_size=4", "--model.num_key_value_heads=2"],
        {**ENV, "WORLD_SIZE": "4"},
        "does not divide num_key_value_heads=2",
    ),
    (
        ["--parallel.dp_size=3"],
        {**ENV, "WORLD_SIZE": "4"},
        "dp_size=3 x parallel.tp_size=1 = 3 processes, but 4",
    ),
    (["--global_batch_size=9"], {**ENV, "WORLD_SIZE": "2"}, "global_batch_size=9 is not a multiple of the 2"),
    ([], {"RANK": "0"}, "RANK=0 is set but WORLD_SIZE is not"),
    ([], {"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not"),
]


@pytest.mark.parametrize("options, env, fragment", LAYOUTS, ids=[fragment for _, _, fragment in LAYOUTS])
def test_wrong_layout_before_any_collective(
    launch: Launcher, options: list[str], env: dict, fragment: str
) -> None:
    """MASTER_PORT is closed: whoever tried to connect would hang, not answer."""
    refuses(launch.train(*options, env=env), fragment)


YAML = [
    ("seed: 1\nseed: 2\n", [":2: key 'seed' stands here and on line 1"]),
    ("loss:\n  temprature: 0.02\n", ["temprature", "did you mean loss.temperature?"]),
    ("seed: [1\n", ["is not valid YAML"]),
    (
        "data:\n  datasets:\n  - {path: x, tsk: y}\n",
        ["data.datasets.tsk", "did you mean data.datasets.task?"],
    ),
    ("optim: 3\n", ["optim=3 must be a mapping"]),
    ("", ["holds no mapping of options"]),
]


@pytest.mark.parametrize("text, fragments", YAML)
def test_wrong_yaml(launch: Launcher, text: str, fragments: list[str]) -> None:
    path = launch.folder / "wrong.yaml"
    path.write_text(text)
    refuses(launch.train("--config", str(path)), *fragments)


ROWS = [
    ("", "is empty"),
    ('{"query": "a b", "pos": ["c"], "neg": []}\n{"query": \n', ":2:"),
    ('{"query": " ", "pos": ["c"], "neg": []}\n', ":1:"),
    ('{"query": "a", "pos": [], "neg": []}\n', ":1:"),
    ('{"query": "a", "pos": ["c"], "neg": ["c"]}\n', ":1:"),
    ('{"query": "a", "pos": ["c"], "negs": []}\n', ":1:"),
    (
        "".join(json.dumps({"query": f"q {i}", "pos": [f"p {i}"], "neg": []}) + "\n" for i in range(9)),
        "no negatives",
    ),
]


@pytest.mark.parametrize("text, fragment", ROWS)
def test_wrong_rows_are_named_by_line(launch: Launcher, text: str, fragment: str) -> None:
    path = launch.folder / "wrong.jsonl"
    path.write_text(text)
    refuses(launch.train("--data.datasets", json.dumps([{"path": str(path)}])), fragment)


def test_missing_data_and_unwritable_output(launch: Launcher) -> None:
    missing = str(launch.folder / "no.jsonl")
    refuses(launch.train("--data.datasets", json.dumps([{"path": missing}])), missing)
    refuses(launch.train("--output_dir", str(launch.folder / "train.jsonl" / "run")), "is not writable")


def test_wrong_base_models(launch: Launcher) -> None:
    base = launch.folder / "base"
    base.mkdir()
    init = ("--init_from", str(base))
    refuses(launch.train(*init), "has no config.json (it is empty)")
    config = {"model_type": "bert"}
    (base / "config.json").write_text(json.dumps(config))
    refuses(launch.train(*init), "model_type is 'bert'")
    (base / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama", "attention_bias": True}))
    refuses(launch.train(*init), "attention_bias=True is not supported")
    (base / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama"}))
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    refuses(launch.train(*init), "pytorch_model.bin is a pickle and is never opened")
    save_file({"norm.weight": torch.ones(64)}, base / "model.safetensors")
    refuses(launch.train(*init), "does not match its config.json", "embed_tokens.weight is missing")
    (base / "model.safetensors").write_bytes(b"\x00" * 20)
    refuses(launch.train(*init), "is not a readable safetensors file")
    index = {"weight_map": {"norm.weight": "../elsewhere.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(launch.train(*init), "../elsewhere.safetensors")


def test_a_run_is_never_overwritten(launch: Launcher) -> None:
    output = str(launch.folder / "once")
    assert launch.train("--output_dir", output).code == 0
    refuses(launch.train("--output_dir", output), "already holds checkpoints", "--checkpoint.resume auto")
    changed = launch.train("--output_dir", output, "--checkpoint.resume", "auto", "--seed", "5")
    refuses(changed, "cannot be continued", "seed was 0, now 5")
    done = launch.train("--output_dir", output, "--checkpoint.resume", "auto", "--steps", "1")
    refuses(done, "step-00000002 has done 2 steps already and steps=1")
    occupied = launch(["launch/merge.py", output, "-o", str(launch.folder / "tok")])
    refuses(occupied, "exists and is not empty")


def test_wrong_mining_merging_and_evaluation(launch: Launcher) -> None:
    data = str(launch.folder / "train.jsonl")
    mine = [
        "launch/mine.py",
        "--model",
        "nowhere",
        "--data",
        data,
        "--output",
        str(launch.folder / "m.jsonl"),
    ]
    refuses(launch([*mine, "--threshold", "2.5"]), "threshold=2.5")
    refuses(launch(mine), "nowhere is not a folder")
    refuses(
        launch(["launch/merge.py", "nowhere", "-o", str(launch.folder / "out")]), "nowhere is not a folder"
    )
    evaluate = ["launch/evaluate.py", "--data", str(launch.folder), "--models"]
    refuses(launch([*evaluate, "nowhere"]), "nowhere is not a folder")
    refuses(launch([*evaluate, "bm25"]), str(launch.folder))
    made = launch.folder / "synthesized"  # which has a folder for each split
    (made / "test").mkdir(parents=True)
    (made / "test" / "dataset_metadata.json").touch()
    evaluate[2] = str(made)
    refuses(launch([*evaluate, "bm25"]), f"its dataset folders are {made / 'test'}: give one of them")
    assert not (launch.folder / "out").exists() and not (launch.folder / "m.jsonl").exists()


def test_two_sources_of_truth_in_a_folder_are_refused_by_every_launcher(launch: Launcher) -> None:
    """The same gate everywhere: a file beside an old index, and a theta in two spellings."""
    folder = write_tokenizer(launch.folder / "two")
    data, out = str(launch.folder / "train.jsonl"), str(launch.folder / "two-out")
    save_file({"norm.weight": torch.ones(64)}, folder / "model.safetensors")
    save_file({"norm.weight": torch.zeros(64)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"norm.weight": "model-00001-of-00001.safetensors"}}
    for files, config, both in (
        (
            {"model.safetensors.index.json": index},
            {},
            ("model.safetensors, which", "model.safetensors.index.json"),
        ),
        (
            {},
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            ("rope_theta=10000.0", "rope_parameters.rope_theta=500000.0"),
        ),
    ):
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        for name, value in {**files, "config.json": {**SHAPE, "model_type": "llama", **config}}.items():
            (folder / name).write_text(json.dumps(value))
        refuses(launch.train("--init_from", str(folder)), *both)
        refuses(launch(["launch/mine.py", "--model", str(folder), "--data", data, "--output", out]), *both)
        refuses(launch(["launch/merge.py", str(folder), "-o", out]), *both)
        refuses(launch(["launch/evaluate.py", "--data", str(launch.folder), "--models", str(folder)]), *both)
        if files:  # of a folder that transformers loads, --check answers other questions first
            refuses(launch(["launch/merge.py", "--check", str(folder)]), *both)
    assert not Path(out).exists()
