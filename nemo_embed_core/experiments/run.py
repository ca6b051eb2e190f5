"""The steps of an experiment in processes of their own: what is done is left, what was killed goes on.

output/steps/NAME-DIGEST/   config.yaml, log.txt, the product, and done.json when it is whole
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from nemo_embed_core.config import ExperimentConfig
from nemo_embed_core.errors import UserError, failpoint
from nemo_embed_core.evaluation.compare_plot import pyplot_or_refuse
from nemo_embed_core.experiments.grid import Grid, Plan, Row, Step, closure, read_grid, steps_of
from nemo_embed_core.experiments.table import present, results
from nemo_embed_core.experiments.verbs import HERE
from nemo_embed_core.files.durable import make_folder, write_atomically
from nemo_embed_core.files.lock import Lock
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.version import code_version

DONE, LOG = "done.json", "log.txt"
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
    lock = Lock(output, say).acquire()
    try:
        Runner(config, output, plan, rows, say).run()
    finally:
        lock.release()
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


# ------------------------------------------------------------------------------------------ state on disk


def real(value: Any, output: Path) -> Any:
    """With the folder of the experiment in place of HERE."""
    if isinstance(value, dict):
        return {key: real(item, output) for key, item in value.items()}
    if isinstance(value, list):
        return [real(item, output) for item in value]
    return str(output / value[len(HERE) :]) if isinstance(value, str) and value.startswith(HERE) else value


def place(step: Step, output: Path) -> Path:
    return Path(real(step.folder, output))


def is_done(step: Step, output: Path) -> bool:
    return (place(step, output) / DONE).is_file()


def is_there(step: Step, output: Path) -> bool:
    """Done, and its product was not deleted since."""
    return is_done(step, output) and Path(real(step.product, output)).exists()


def to_do(rows: Sequence[Row], output: Path) -> set[str]:
    """Digests of the steps that have to run for what is missing of these rows."""
    found: set[str] = set()

    def want(step: Step) -> None:
        if step.digest not in found and not is_there(step, output):
            found.add(step.digest)
            for needed in step.needs:
                want(needed)

    for row in rows:
        for step in row.ends:
            if not is_done(step, output):
                want(step)
    return found


def texts(step: Step) -> int | None:
    """That a step encodes at most: of training, queries and documents of all its steps."""
    options = step.options
    if step.verb.name != "train" or options["steps"] is None:
        return None
    return options["steps"] * options["global_batch_size"] * (2 + options["data"]["num_hard_negatives"])


def listed(plan: Plan, rows: Sequence[Row], output: Path) -> Iterator[str]:
    """The steps of these rows and what they cost, as far as steps that are done tell it."""
    todo, used = to_do(rows, output), closure(step for row in rows for step in row.ends)
    steps = [step for step in plan.steps if step.digest in used]
    seconds, unknown = 0.0, list[str]()
    for step in steps:
        cost = _seconds(step, plan.steps, output)
        state = "done" if step.digest not in todo else "to do"
        size = "" if (n := texts(step)) is None else f"{n:,} texts"
        took = "" if cost is None else f"{cost:.0f} s"
        yield f"{state:6} {Path(step.folder).name:40} {step.verb.name:9} {size:>16} {took:>8}"
        if step.digest in todo:
            seconds += cost or 0
            unknown += [step.name] if cost is None else []
    names = ", ".join(dict.fromkeys(unknown))
    rest = f"; of {names} nothing is known yet: run one cell (--only)" if unknown else ""
    yield f"{len(todo)} of {len(steps)} steps to do, about {seconds / 60:.0f} minutes one after another{rest}"


def _seconds(step: Step, steps: Sequence[Step], output: Path) -> float | None:
    """As it took; else the mean of the done steps of its name, in proportion to the texts."""
    if is_done(step, output):
        return read_object(place(step, output) / DONE)["seconds"]
    own = texts(step)
    took = [
        read_object(place(other, output) / DONE)["seconds"] * ((own or 1) / (texts(other) or 1))
        for other in steps
        if other.name == step.name and is_done(other, output)
    ]
    return sum(took) / len(took) if took else None


# ------------------------------------------------------------------------------------------ running


def _start(command: list[str], log: IO[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


class Runner:
    """jobs steps at a time, in the plan's order, each on `ranks` GPUs of its own where there are GPUs."""

    def __init__(self, config: ExperimentConfig, output: Path, plan: Plan, rows: Sequence[Row], say: Say):
        self.output, self.plan, self.rows, self.say = output, plan, rows, say
        self.ranks, self.delete = config.ranks, config.delete_models
        todo = to_do(rows, output)
        self.steps = [step for step in plan.steps if step.digest in todo]
        self.number, self.said = 0, threading.Lock()
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
        """UserError of the first step that fails, when those that run beside it have ended."""
        futures: dict[str, Future[None]] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            # In the plan's order, so that a step that waits for another one never keeps it from starting.
            for step in self.steps:
                futures[step.digest] = pool.submit(self._step, step, futures)
            try:
                for future in futures.values():
                    future.result()
            except BaseException:
                for future in futures.values():
                    future.cancel()
                raise

    def _step(self, step: Step, futures: dict[str, Future[None]]) -> None:
        for needed in step.needs:
            if needed.digest in futures:
                futures[needed.digest].result()
        gpus = self.places.get()
        try:
            self._run(step, gpus)
        finally:
            self.places.put(gpus)
        if self.delete:
            self._delete()

    def _run(self, step: Step, gpus: str) -> None:
        folder = place(step, self.output)
        make_folder(folder)
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
            process = _start(command, log, env)
            try:
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
        seconds = time.monotonic() - start
        if code:
            last = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            said = "\n".join(last)
            raise UserError(f"{step.name} ended with code {code}; the end of {folder / LOG}:\n{said}")
        failpoint("experiment-done", step.name)
        about = {"digest": step.digest, "seconds": round(seconds, 1), "code": code_version()}
        write_atomically(folder / DONE, f"{json.dumps(about, indent=1)}\n".encode())
        with self.said:
            self.number += 1
            self.say(f"[{self.number}/{len(self.steps)}] {folder.name}: {seconds:.0f} s")

    def _command(self, step: Step, folder: Path) -> list[str]:
        """The launcher as a module, with its options in a file; merge takes arguments."""
        import yaml

        product, options = Path(real(step.product, self.output)), real(step.options, self.output)
        if step.verb.name == "merge":
            shutil.rmtree(product, ignore_errors=True)  # a part of one: merge takes new folders only
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
            return ["torch.distributed.run", *ranks, "-m", "nemo_embed_core.cli", *argv]
        return ["nemo_embed_core.cli", *argv]

    def _delete(self) -> None:
        """Weights of models that no step to come reads."""
        with self.said:
            todo = to_do(self.plan.rows, self.output)
            needed = {n.digest for step in self.plan.steps if step.digest in todo for n in step.needs}
            for step in self.plan.steps:
                if step.verb.is_model and step.digest not in needed and is_there(step, self.output):
                    product = Path(real(step.product, self.output))
                    if (metrics := product / "metrics.jsonl").is_file():
                        metrics.replace(place(step, self.output) / "metrics.jsonl")
                    shutil.rmtree(product)
