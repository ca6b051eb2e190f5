"""run_ranks: a function of a test module on several processes, for tests of what ranks do together.

    from ranks import run_ranks

    def check(rank, world_size, init_file, factor):              # top level; may return what torch.save takes
        dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size)
        ...

    @pytest.mark.dist
    def test_it():
        results = run_ranks(check, 4, 2.0)                       # one per rank, in order

Starting a rank costs seconds (import torch), so one call should check many things.
"""

import faulthandler
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE_S = 2.0  # after the first rank failed: time for the others to say why they failed too


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300) -> list[Any]:
    """fn(rank, world_size, init_file, *args) in `world_size` new processes of one thread each; what each
    returned.

    init_file is a path for init_method="file://...". The processes load fn's module by its path, so that it
    need not be importable by name. AssertionError with the tracebacks when a rank fails; when ranks hang for
    timeout_s they are ended, and the error shows where each stood.
    """
    assert "." not in fn.__qualname__, f"{fn.__qualname__} must be a function at the top level of its module"
    path = inspect.getsourcefile(fn)
    assert path is not None
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, Path(folder, "args"))
        processes, logs = [], []
        try:
            for rank in range(world_size):
                env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
                logs.append(open(Path(folder, f"log-{rank}"), "w+"))  # noqa: SIM115
                command = [sys.executable, __file__, path, fn.__name__, folder, str(timeout_s)]
                processes.append(
                    subprocess.Popen(command, env=env, stdout=logs[-1], stderr=subprocess.STDOUT)
                )
            # The ranks end themselves at timeout_s; this is for one that cannot.
            _wait(processes, timeout_s + 30)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failures = []
        for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
            log.seek(0)
            text = log.read()
            log.close()
            sys.stdout.write(text)  # pytest shows it when the test fails
            if process.returncode:
                failures.append(
                    f"rank {rank} of {world_size}, exit code {process.returncode}:\n{text[-8000:]}"
                )
        assert not failures, "\n".join(failures)
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen], timeout_s: float) -> None:
    """Until all have ended, or GRACE_S after the first failure: the others may wait for it in a
    collective."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.02)


def _rank_main(path: str, name: str, folder: str, timeout_s: str) -> None:
    faulthandler.dump_traceback_later(float(timeout_s), exit=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    args = torch.load(Path(folder, "args"), weights_only=False)
    result = getattr(module, name)(rank, world_size, str(Path(folder, "init")), *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.save(result, Path(folder, f"result-{rank}"))


if __name__ == "__main__":
    _rank_main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as run_rank of nemo_embed_core.config, and for its reason
