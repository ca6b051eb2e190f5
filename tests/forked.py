"""run(): a function of a test module on forked ranks, from a server that has imported torch and the trainer
once.

    outcomes = server.run(train, 2, config)     # [Outcome(code, result, output)], one per rank

def train(config): ...                          # top level; may return what torch.save takes

A UserError ends a rank as it ends a launcher: a paragraph in its output and the error's exit code. A killed
rank has -9.
"""

import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GRACE_S = 10.0  # after a rank failed: time for the others to end by themselves, as torchrun would end them


class Outcome(NamedTuple):
    code: int
    result: Any
    output: str


class Server:
    def __init__(self) -> None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=env
        )

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any) -> list[Outcome]:
        import torch

        assert "." not in fn.__qualname__, (
            f"{fn.__qualname__} must be a function at the top level of its module"
        )
        with tempfile.TemporaryDirectory() as folder:
            torch.save(args, Path(folder, "args"))
            request = {
                "path": inspect.getsourcefile(fn),
                "name": fn.__name__,
                "folder": folder,
                "n": world_size,
            }
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            codes = json.loads(self.process.stdout.readline())
            outcomes = []
            for rank, code in enumerate(codes):
                result, output = Path(folder, f"result-{rank}"), Path(folder, f"log-{rank}").read_text()
                # Shown when the test fails.
                print(f"--- rank {rank} of {world_size}, exit code {code}\n{output}")
                outcomes.append(
                    Outcome(code, torch.load(result, weights_only=False) if result.exists() else None, output)
                )
            return outcomes

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _rank(rank: int, request: dict[str, Any], port: int) -> None:
    import torch

    from nemo_embed_core.errors import user_errors

    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["n"], "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({k: str(v) for k, v in env.items()}, MASTER_PORT=str(port))
    log = os.open(f"{request['folder']}/log-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location(Path(request["path"]).stem, request["path"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    args = torch.load(f"{request['folder']}/args", weights_only=False)
    with user_errors():
        torch.save(getattr(module, request["name"])(*args), f"{request['folder']}/result-{rank}")


def _serve(request: dict[str, Any]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(request["n"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _rank(rank, request, port)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + 120
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] != 0:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        elif time.monotonic() > deadline:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
            deadline += 60
        else:
            time.sleep(0.005)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    found = importlib.util.spec_from_file_location(
        "crash_worker", Path(__file__).with_name("train") / "crash_worker.py"
    )
    assert found is not None and found.loader is not None
    crash_worker = importlib.util.module_from_spec(found)
    found.loader.exec_module(crash_worker)
    crash_worker.warm_up()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), file=answers, flush=True)
