"""What every test gets: fixed seeds, one thread, no network, and a reason printed for what this machine
cannot check."""

import os
import random
from collections.abc import Iterator

# Before torch and transformers are imported: child processes inherit these too. One thread, because pytest
# workers and gloo ranks already fill the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from forked import Server

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that start processes take longest: first, so that none is the last one on one core.
    long = {item.path for item in items if "dist" in item.keywords or "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Of forks, for all tests that need one."""
    started = Server()
    yield started
    started.close()
