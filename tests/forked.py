"""One process that has imported torch and the trainer and forks itself for every request: a test that needs
processes pays milliseconds for each, and not the seconds of the imports. Linux.

    (outcome,) = server.run(train, 1, config)       # train(config) on as many ranks: an Outcome each
    results = server.results(check, 2, x)           # all of which must succeed: what each returned
    outcome = server.launch(["launch/train.py", "--steps", "2"], env={"NEMO_EMBED_FAIL": "..."})
    outcome = server.call(fn, x)                    # fn(x), of no process group

def train(config): ...                              # at the top level of a module; returns what pickle takes

A rank has the environment that torchrun gives it, so dist.init_process_group("gloo") needs nothing more. A
UserError ends it as it ends a launcher: a paragraph in its output and the error's exit code. -9: killed.
"""

import ctypes
import faulthandler
import importlib.util
import inspect
import json
import os
import pickle
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
Function = Callable[..., Any] | tuple[Path, str]  # or its file and name
GRACE_S = 10.0  # after a rank failed: time for the others to end by themselves, as torchrun would end them


class Outcome(NamedTuple):
    code: int
    result: Any  # None unless the function returned
    output: str  # stdout and stderr
    seconds: float  # from the start to the end
    cpu_s: float


class Server:
    """A session has one (conftest.py); another one is for an environment that is read at an import."""

    def __init__(self, **env: str) -> None:
        self.modules = tempfile.TemporaryDirectory()  # transformers reads the name of this folder once
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
        env = {**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": self.modules.name, **env}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import forked; forked.serve()"], stdin=pipe, stdout=pipe, text=True,
            env={**env, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        )  # fmt: skip

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.modules.cleanup()

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        assert reply, f"the server of forks ended with code {self.process.wait()}; its stderr is above"
        return json.loads(reply)

    def preload(self, *names: str) -> None:
        """Import these before the next fork, for all that follow: "package.module" or "package:attribute"."""
        self._ask(preload=names)

    def call(self, fn: Function, *args: Any, env: dict[str, str] | None = None) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            return self._call(folder, fn, args, env or {})

    def _call(self, folder: str, fn: Function, args: tuple, env: dict[str, str]) -> Outcome:
        Path(folder, "args").write_bytes(pickle.dumps(args))
        return _outcome(folder, "call", *self._ask(folder=folder, function=_place(fn), env=env))

    def launch(self, argv: list[str], env: dict[str, str] | None = None) -> Outcome:
        return self.call(_launch, argv, env=env)

    def run(self, fn: Function, world_size: int, *args: Any, limit_s: float = 120) -> list[Outcome]:
        return self.watched(fn, world_size, args, limit_s=limit_s)[0]

    def watched(
        self, fn: Function, world_size: int, args: tuple, **options: Any
    ) -> tuple[list[Outcome], Any]:
        """`run` with the options of `ranks`; also the `watch` as it is at the end."""
        with tempfile.TemporaryDirectory() as folder:
            all_ranks = self._call(folder, ranks, (folder, _place(fn), world_size, args, options), {})
            assert all_ranks.code == 0, all_ranks.output
            ended, watch = all_ranks.result
            outcomes = [_outcome(folder, f"rank-{rank}", *ends) for rank, ends in sorted(ended.items())]
        for rank, outcome in zip(sorted(ended), outcomes, strict=True):  # shown when the test fails
            print(f"--- rank {rank} of {world_size}, exit code {outcome.code}\n{outcome.output[-8000:]}")
        return outcomes, watch

    def results(self, fn: Function, world_size: int, *args: Any, limit_s: float = 300) -> list[Any]:
        outcomes = self.run(fn, world_size, *args, limit_s=limit_s)
        failures = [
            f"rank {rank} of {world_size}, exit code {outcome.code}:\n{outcome.output[-8000:]}"
            for rank, outcome in enumerate(outcomes)
            if outcome.code
        ]
        assert not failures, "\n".join(failures)
        return [outcome.result for outcome in outcomes]


def _outcome(folder: str, name: str, code: int, seconds: float, cpu_s: float) -> Outcome:
    result, output = Path(folder, f"{name}.result"), Path(folder, f"{name}.log")
    value = pickle.loads(result.read_bytes()) if result.exists() else None
    return Outcome(code, value, output.read_text(errors="replace"), seconds, cpu_s)


def _place(fn: Function) -> tuple[str, str]:
    """By its file, so that the module need not be importable by name."""
    if isinstance(fn, tuple):
        return str(fn[0]), fn[1]
    assert "." not in fn.__qualname__, f"{fn.__qualname__} must be a function at the top level of its module"
    path = inspect.getsourcefile(fn)
    assert path is not None
    return path, fn.__name__


# ------------------------------------------------------------------------------------------ in the server


def _function(path: str, name: str) -> Callable[..., Any]:
    module = sys.modules.get(Path(path).stem)
    if module is None or getattr(module, "__file__", "") != path:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return getattr(module, name)


def _fork(work: Callable[[], Any], folder: str, name: str, env: dict[str, str]) -> int:
    """The pid of a process that does the work, leaves its result and output in the folder, and ends."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives a test that was ended
        os.environ.update(env)
        log = os.open(f"{folder}/{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for descriptor, to in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(descriptor, to)
        Path(folder, f"{name}.result").write_bytes(pickle.dumps(work()))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pid: int, start: float, options: int = 0) -> tuple[int, float, float] | None:
    """(exit code, seconds since the start, of CPU); None when it still runs (os.WNOHANG)."""
    ended, status, usage = os.wait4(pid, options)
    if not ended:
        return None
    seconds = time.monotonic() - start
    return os.waitstatus_to_exitcode(status), seconds, usage.ru_utime + usage.ru_stime


def _launch(argv: list[str]) -> None:
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def ranks(
    folder: str, place: tuple[str, str], world_size: int, args: tuple, options: dict[str, Any]
) -> tuple[dict[int, tuple[int, float, float]], Any]:
    """What _wait says of every rank, and `watch`. options:

    only: the ranks that are started; all
    grace_s: after the first failure; then the others are killed
    limit_s: then every rank that is left says where it is and is killed
    watch: called with {rank: pid} of all and {rank: end} of those that ended, every few milliseconds
    """
    import torch

    from nemo_embed_core.errors import user_errors

    fn = _function(*place)
    only: Iterable[int] = options.get("only") or range(world_size)
    limit_s, grace_s, watch = options["limit_s"], options.get("grace_s", GRACE_S), options.get("watch")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work() -> Any:
        faulthandler.dump_traceback_later(max(limit_s - 1, 1))
        torch.set_num_threads(1)
        torch.manual_seed(0)
        with user_errors():
            return fn(*args)

    start, pids = time.monotonic(), {}
    for rank in only:
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        env = {key: str(value) for key, value in env.items()} | {"MASTER_ADDR": "127.0.0.1"}
        pids[rank] = _fork(work, folder, f"rank-{rank}", env)
    ended: dict[int, tuple[int, float, float]] = {}
    deadline = start + limit_s
    while True:
        for rank in pids.keys() - ended.keys():
            if end := _wait(pids[rank], start, os.WNOHANG):
                ended[rank] = end
                if end[0]:
                    deadline = min(deadline, time.monotonic() + grace_s)
        if len(ended) == len(pids):
            return ended, watch
        if watch is not None:
            watch(pids, ended)
        if time.monotonic() > deadline:
            for rank in pids.keys() - ended.keys():
                os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.004)


def _warm_up() -> None:
    """Two steps on a process group without threads: what torch imports and caches on the way is in every
    fork."""
    import torch
    import torch.distributed as dist
    from tiny import MODEL, train_config
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import nemo_embed_core.encoders.embedder  # noqa: F401
    from nemo_embed_core.data.tokenizer import load_tokenizer
    from nemo_embed_core.parallel.mesh import build_mesh
    from nemo_embed_core.train.preflight import Prepared
    from nemo_embed_core.train.trainer import Trainer

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        config = train_config(Path(folder), steps=2, checkpoint={"async_save": False})
        mesh = build_mesh(torch.device("cpu"), 1, 1, False)
        prepared = Prepared(MODEL, load_tokenizer(config.tokenizer))
        Trainer(config, mesh, prepared, log=lambda message: None).run()
    dist.destroy_process_group()


def serve() -> None:
    """A line of JSON in for each request, {"preload": [...]} or {"folder", "function", "env"}; a line out."""
    _warm_up()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "preload" in request:
            for name in request["preload"]:
                pkgutil.resolve_name(name) if ":" in name else importlib.import_module(name)
            answer: Any = None
        else:
            folder, place = request["folder"], request["function"]

            def work(folder: str = folder, place: tuple[str, str] = place) -> Any:
                return _function(*place)(*pickle.loads(Path(folder, "args").read_bytes()))

            start = time.monotonic()
            answer = _wait(_fork(work, folder, "call", request["env"]), start)
        print(json.dumps(answer), file=answers, flush=True)
