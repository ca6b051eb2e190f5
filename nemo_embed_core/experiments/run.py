"""The steps of an experiment in processes of their own: what is done is left, what was killed goes on.

output/steps/NAME-DIGEST/   config.yaml, log.txt, the product, and done.json when it is whole
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from nemo_embed_core.config import ExperimentConfig
from nemo_embed_core.errors import UserError, failpoint
from nemo_embed_core.evaluation.compare_plot import pyplot_or_refuse
from nemo_embed_core.experiments.cells import Plan, Row, Step, steps_of
from nemo_embed_core.experiments.grid import Grid, read_grid
from nemo_embed_core.experiments.state import DONE, is_done, is_there, listed, place, real, to_do
from nemo_embed_core.experiments.table import present, results
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.files.lock import Lock
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.version import code_version

LOG = "log.txt"
Say = Callable[[str], None]


def run(config: ExperimentConfig, say: Say = print) -> dict[str, Any] | None:
    """The results, written and printed; None of a dry run, and where cells are left to another call."""
    grid = read_grid(config.grid, config.constants)
    plan = steps_of(grid)
    rows = _chosen(grid, plan.rows, config.only)
    output = Path(config.output).resolve()
    if config.dry_run:
        for line in listed(plan, rows, output):
            say(line)
        return None
    pyplot_or_refuse()  # not after hours
    Runner(config, output, plan, rows, say).run()
    if left := [row for row in plan.rows if not all(is_done(s, output) for s in row.ends)]:
        say(f"{len(plan.rows) - len(left)} of {len(plan.rows)} rows have their scores: no table yet")
        return None
    found = results(grid, plan, functools.partial(real, output=output))
    present(found, output, say)
    return found


def _chosen(grid: Grid, rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    wanted: dict[str, set[str]] = {}
    for item in only:
        axis, _, value = item.partition("=")
        there = {
            "seed": list(map(str, grid.seeds)),
            **{name: list(values) for name, values in grid.axes.items()},
        }
        if value not in there.get(axis, ()):
            ways = "; ".join(f"{name}: {', '.join(values)}" for name, values in there.items())
            raise grid.refuse(f"only={item} is no cell; there are {ways}")
        wanted.setdefault(axis, set()).add(value)
    return [
        row for row in rows
        if all({**row.values, "seed": str(row.seed)}.get(axis) in values for axis, values in wanted.items())
    ]  # fmt: skip


def _start(command: list[str], log: IO[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


class Runner:
    """jobs steps at a time, the plan's first of those that wait for no other, each on `ranks` GPUs of its own
    where there are GPUs.

    Each step has a lock: several commands may run cells of one grid in one folder, from several machines.
    """

    GRACE_S = 60.0  # for training to save where it is

    def __init__(self, config: ExperimentConfig, output: Path, plan: Plan, rows: Sequence[Row], say: Say):
        self.output, self.plan, self.rows, self.say = output, plan, rows, say
        self.ranks, self.delete = config.ranks, config.delete_models
        todo = to_do(rows, output)
        self.steps = [step for step in plan.steps if step.digest in todo]
        self.number, self.mutex = 0, threading.Lock()
        self.processes, self.ending = set[subprocess.Popen[bytes]](), threading.Event()
        from torch.cuda import device_count  # seconds, and only here

        gpus = device_count()
        if gpus and (config.jobs or 1) * config.ranks > gpus:
            raise UserError(
                f"jobs={config.jobs} x ranks={config.ranks} need more GPUs than there are, {gpus}"
            )
        self.jobs = config.jobs or max(1, gpus // config.ranks)
        self.places: SimpleQueue[str] = SimpleQueue()
        for job in range(self.jobs):
            mine = range(job * config.ranks, (job + 1) * config.ranks)
            self.places.put(",".join(map(str, mine)) if gpus else "")

    def run(self) -> None:
        """UserError of the first step that fails. Those that run beside it are then ended, as they are at a
        signal: training saves where it is."""
        waiting, running = {step.digest: step for step in self.steps}, dict[Future[None], str]()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    missing = {*waiting, *running.values()}
                    ready = (s for s in waiting.values() if not any(n.digest in missing for n in s.needs))
                    for step in itertools.islice(ready, self.jobs - len(running)):
                        running[pool.submit(self._step, step)] = step.digest
                    waiting = {d: step for d, step in waiting.items() if d not in running.values()}
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        del running[future]
            except BaseException:
                self._end(running)
                raise

    def _end(self, futures: Iterable[Future[None]]) -> None:
        with self.mutex:  # no process starts behind this
            self.ending.set()
            processes = list(self.processes)
        for process in processes:
            process.terminate()
        try:
            wait(futures, timeout=self.GRACE_S)
        finally:  # also at a second Ctrl-C
            for process in processes:
                process.kill()

    def _step(self, step: Step) -> None:
        if (lock := self._lock(step)) is None:
            return
        gpus = self.places.get()
        try:
            self._run(step, gpus)
        finally:
            self.places.put(gpus)
            lock.release()
        if self.delete:
            self._delete()

    def _lock(self, step: Step) -> Lock | None:
        """Of its folder; None where another command has done it meanwhile."""
        lock, waits = Lock(place(step, self.output), self.say), False
        while step.digest in to_do(self.rows, self.output):
            try:
                lock.acquire()
            except UserError as error:
                if not waits:
                    self.say(f"{place(step, self.output).name}: waiting, as {error}")
                waits = True
                if self.ending.wait(Lock.POLL_S):
                    raise CancelledError from None
                continue
            if step.digest in to_do(self.rows, self.output):
                return lock
            lock.release()
        return None

    def _run(self, step: Step, gpus: str) -> None:
        folder = place(step, self.output)
        self._clear(step, folder)
        command = [sys.executable, "-m", "nemo_embed_core.experiments.step", str(os.getpid())]
        command += self._command(step, folder)
        threads = max(1, (os.cpu_count() or 1) // (self.jobs * self.ranks))
        env = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if gpus:
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[int(i)] if visible else i for i in gpus.split(","))
        start = time.monotonic()
        failpoint("experiment", step.name)
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            with self.mutex:
                if self.ending.is_set():
                    raise CancelledError
                process = _start(command, log, env)
                self.processes.add(process)
            code = process.wait()
        with self.mutex:
            self.processes.remove(process)
        seconds = time.monotonic() - start
        if code:
            last = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            said = "\n".join(last)
            raise UserError(f"{step.name} ended with code {code}; the end of {folder / LOG}:\n{said}")
        if step.verb.name == "train":
            _check_ended(Path(real(step.product, self.output)))
        failpoint("experiment-done", step.name)
        about = {"digest": step.digest, "seconds": round(seconds, 1), "code": code_version()}
        write_atomically(folder / DONE, f"{json.dumps(about, indent=1)}\n".encode())
        with self.mutex:
            self.number += 1
            self.say(f"[{self.number}/{len(self.steps)}] {folder.name}: {seconds:.0f} s")

    def _clear(self, step: Step, folder: Path) -> None:
        """What a killed one has left: only training goes on with it. And the mark of one whose model was
        deleted since: of a part of the model that is made again it would say that it is whole."""
        (folder / DONE).unlink(missing_ok=True)
        product = Path(real(step.product, self.output))
        left = [] if step.verb.name == "train" else [product]
        if step.verb.name == "mine" and len(step.options["datasets"]) > 1:
            left = [path for path in product.glob("*") if path.suffix != ".work"]  # its embeddings stay
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _command(self, step: Step, folder: Path) -> list[str]:
        """The launcher as a module, with its options in a file; merge takes arguments."""
        import yaml

        product, options = Path(real(step.product, self.output)), real(step.options, self.output)
        if step.verb.name == "merge":
            argv = ["merge", *options.pop("sources"), "-o", str(product)]
            for name, value in options.items():
                if value is not None:
                    argv += [
                        f"--{name.replace('_', '-')}",
                        *map(str, value if isinstance(value, list) else [value]),
                    ]
            return ["nemo_embed_core.cli", *argv]
        file = folder / "config.yaml"
        options = {**options, step.verb.output: str(product)}
        write_atomically(file, yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode())
        argv = [step.verb.name, "--config", str(file)]
        if step.verb.name == "judge":
            return ["nemo_embed_core.experiments.judge", *argv[1:]]
        if self.ranks > 1 and step.verb.name in ("train", "mine"):
            ranks = ["--standalone", "--nproc-per-node", str(self.ranks)]
            worker = ["nemo_embed_core.experiments.step", "0", "nemo_embed_core.cli"]  # ends with torchrun
            return ["torch.distributed.run", *ranks, "-m", *worker, *argv]
        return ["nemo_embed_core.cli", *argv]

    def _delete(self) -> None:
        """Weights of models that no step to come reads. Not what is a link, or what another step was given by
        its path: these are somebody's own."""
        with self.mutex:
            todo = to_do(self.plan.rows, self.output)
            needed = {n.digest for step in self.plan.steps if step.digest in todo for n in step.needs}
            given = {Path(path).resolve() for step in self.plan.steps for path in step.inputs}
            for step in self.plan.steps:
                if step.verb.is_model and step.digest not in needed and is_there(step, self.output):
                    product = Path(real(step.product, self.output))
                    is_given = any(p.is_relative_to(product) or product.is_relative_to(p) for p in given)
                    if not product.is_symlink() and not is_given:
                        _delete_model(product)


def _check_ended(run: Path) -> None:
    """Training that was asked to end by a signal ends well too, before its last step."""
    from nemo_embed_core.checkpoint.manifest import MANIFEST
    from nemo_embed_core.checkpoint.runs import checkpoints

    manifest = read_object(checkpoints(run)[0] / MANIFEST)
    if manifest["step"] < manifest["config"]["steps"]:
        at = f"step {manifest['step']} of {manifest['config']['steps']}"
        raise UserError(f"{run} was stopped by a signal at {at}: give the command again, it goes on there")


def _delete_model(product: Path) -> None:
    """But for its metrics. It loses its name first, as a part of a model would pass for one."""
    metrics, aside = product / "metrics.jsonl", product.with_name(".deleted")
    with suppress(FileNotFoundError):  # another command deletes it too
        if metrics.is_file():
            metrics.replace(product.parent / metrics.name)
        shutil.rmtree(aside, ignore_errors=True)  # of a command that was killed here
        product.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
