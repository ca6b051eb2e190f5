"""The peak of anonymous host memory of a mining run is within the formula of docs/mining.md without mapped
rows, at 8 times the documents too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from nemo_embed_core.mine.negatives import mine_negatives
from nemo_embed_core.mine.pool import Document
from nemo_embed_core.mine.teachers import Teacher

WIDTH, QUERIES, SHARD, BLOCK_QUERIES, K = 256, 300, 4096, 256, 4
SMALL, LARGE = 8_000, 64_000


def formula(method: str, num_documents: int) -> dict[str, float]:
    """docs/mining.md, "Memory", for one teacher on a CPU, without the shards that are mapped; in bytes."""
    kept = K + 32
    if method == "fp32":
        search = {
            "queries": BLOCK_QUERIES * (12 * kept + 4 * WIDTH),
            "block": 2 * 2048 * WIDTH * 4,
            "tile": 1024 * 2048 * 9,
        }
    else:
        search = {
            "queries": BLOCK_QUERIES * (48 * kept + 5 * WIDTH),
            "block": 4096 * WIDTH * 9 + 512 * WIDTH * 16,
            "tile": min(BLOCK_QUERIES, 1024) * 4096 * 14,
        }
    return search | {
        "texts": num_documents * 300 + QUERIES * 1000,
        "shard": SHARD * WIDTH * (4 + 3 * 2),
        "gathered": 64 << 20,
        "results": QUERIES * K * 12 * 4,
    }


class Line:
    """Rows of unit length, made from the text's number: nothing is kept."""

    hidden_size, digest = WIDTH, "line"

    def encode(self, texts, prompt="", max_length=512):
        first = int(texts[0].split()[1])
        rows = np.random.default_rng(first).standard_normal((len(texts), WIDTH), np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Query:
    def __init__(self, i: int):
        self.query, self.pos, self.neg = f"query {i}", [f"passage {i} " + "x" * 200], []


def run(method: str, num_documents: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        documents = (Document(f"passage {i} " + "x" * 200) for i in range(num_documents))
        rows = [Query(i) for i in range(QUERIES)]
        mine_negatives(
            rows, [Teacher.of(Line())], Path(folder, "out.jsonl"), documents=documents, method=method,
            shard_size=SHARD,
            block_queries=BLOCK_QUERIES, log=lambda _: None,
        )  # fmt: skip


def anonymous() -> int:
    """Bytes of this process that are in no file. Rows of a memory-mapped file and pages of libraries count in
    RSS too, but how many of them are mapped at a time is up to the system, which takes them back."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def peak(method: str, num_documents: int) -> int:
    """The most anonymous memory, looked up every 2 ms, of a fork that mines (0: does nothing)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        seen, ended = [anonymous()], threading.Event()

        def watch() -> None:
            while not ended.wait(0.002):
                seen.append(anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        if num_documents:
            run(method, num_documents)
        ended.set()
        watcher.join()
        os.write(write, str(max(seen)).encode())
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    return int(os.read(read, 100))


@pytest.mark.parametrize("method", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
def test_peak_memory_is_within_the_formula_and_grows_by_what_finds_texts_only(method):
    # Otherwise what malloc keeps of what was freed counts too, 10 MB of it in one run and none in the next.
    returned = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    path = os.pathsep.join(filter(None, sys.path))
    env = os.environ | returned | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__, method], capture_output=True, text=True, env=env, check=True
    )
    nothing, small, large = json.loads(result.stdout)
    parts = [formula(method, n) for n in (SMALL, LARGE)]
    print(
        {
            "measured": [small - nothing, large - nothing],
            "formula": [sum(p.values()) for p in parts],
            "parts": parts[1],
        }
    )
    for measured, part in zip((small - nothing, large - nothing), parts, strict=True):
        assert measured < sum(part.values())
    # The rows again, or the texts, would not fit into this.
    assert large - small < parts[1]["texts"] - parts[0]["texts"]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    run(sys.argv[1], 500)  # what is imported and allocated once
    print(json.dumps([peak(sys.argv[1], n) for n in (0, SMALL, LARGE)]))
