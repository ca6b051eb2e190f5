"""launch(): launch/mine.py in a forked process of a server that has imported torch once, on a toy model and
its data."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import MODEL, write_rows, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
# What a run imports on the way; torch._dynamo at the first call of a custom op.
WARM = ["jsonargparse", "matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo"]
WARM += [
    f"nemo_embed_core.{name}" for name in ("encoders.sentence_transformer", "mine.formats", "mine.negatives")
]


class Miner:
    """model, data: what to give the launcher; miner(*options, env=...) -> {"code", "stderr", "cpu_s"}."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.data = folder, str(folder / "run"), str(folder / "train.jsonl")
        pipe, env = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
        command = (
            f"import {', '.join(WARM)}, runpy; runpy.run_path('tests/launch_worker.py', run_name='__main__')"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", command], stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=env
        )
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
        made = self.run(["launch/train.py", *rest, *data, *shape])
        assert made["code"] == 0, made["stderr"]

    def run(self, argv: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"argv": argv, "env": env or {}}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self, *options: str, env: dict[str, str] | None = None) -> dict[str, Any]:
        return self.run(["launch/mine.py", "--device", "cpu", *options], env)


@pytest.fixture(scope="session")
def miner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Miner]:
    one = Miner(tmp_path_factory.mktemp("miner"))
    yield one
    one.process.kill()
    one.process.communicate()
