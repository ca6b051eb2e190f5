"""miner(): launch/mine.py in a forked process, on a toy model and its data."""

import json
from pathlib import Path

import pytest
from forked import Outcome, Server
from tiny import MODEL, write_rows, write_tokenizer

# What a run imports on the way; torch._dynamo at the first call of a custom op.
WARM = ["jsonargparse", "matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo"]
WARM += [
    f"nemo_embed_core.{name}" for name in ("encoders.sentence_transformer", "mine.formats", "mine.negatives")
]


class Miner:
    """model, data: what to give the launcher; miner(*options, env=...) is its Outcome."""

    def __init__(self, folder: Path, server: Server):
        self.folder, self.model, self.data = folder, str(folder / "run"), str(folder / "train.jsonl")
        self.server = server
        server.preload(*WARM)
        write_tokenizer(folder / "tokenizer")
        write_rows(folder / "train.jsonl")
        self.shape = shape = [
            f"--model.{k}={getattr(MODEL, k)}" for k in ("vocab_size", "hidden_size", "intermediate_size")
        ]
        shape += [f"--model.{k}={getattr(MODEL, k)}" for k in ("num_hidden_layers", "num_attention_heads")]
        shape += [f"--model.num_key_value_heads={MODEL.num_key_value_heads}", "--model.initializer_range=0.1"]
        data = [
            "--data.datasets",
            json.dumps([{"path": self.data}]),
            "--data.cache_dir",
            str(folder / "cache"),
        ]
        rest = [
            "--output_dir",
            self.model,
            "--tokenizer",
            str(folder / "tokenizer"),
            "--steps",
            "0",
            "--device",
            "cpu",
        ]
        rest += ["--global_batch_size", "8"]
        made = server.launch(["launch/train.py", *rest, *data, *shape])
        assert made.code == 0, made.output

    def __call__(self, *options: str, env: dict[str, str] | None = None) -> Outcome:
        return self.server.launch(["launch/mine.py", "--device", "cpu", *options], env)


@pytest.fixture(scope="session")
def miner(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Miner:
    return Miner(tmp_path_factory.mktemp("miner"), server)
