"""The steps of a plan in processes of their own: what is done is left, what was killed goes on.

output/steps/NAME-DIGEST/   config.yaml, log.txt, the product, and done.json when it is whole
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
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

from nemo_embed_core.command_line import arguments
from nemo_embed_core.errors import UserError, failpoint
from nemo_embed_core.files.durable import write_atomically
from nemo_embed_core.files.lock import Lock
from nemo_embed_core.files.strict_json import read_object
from nemo_embed_core.steps.state import DONE, is_there, place, real, to_do
from nemo_embed_core.steps.step import Step
from nemo_embed_core.version import code_version

LOG, CONFIG = "log.txt", "config.yaml"
CLI, CHILD = "nemo_embed_core.cli", "nemo_embed_core.steps.child"
Say = Callable[[str], None]


def _start(command: list[str], log: IO[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


class Runner:
    """What `wanted` needs of a plan's steps, jobs at a time, the plan's first of those that wait for no
    other, each on `ranks` GPUs of its own where there are GPUs; jobs=0: as many as these allow.

    wanted: steps that are to be done now.  ends: all that the plan is for; delete: models that none of these
    needs any more lose their weights.  Each step has a lock: several commands may run parts of one plan in
    one folder, from several machines.
    """

    GRACE_S = 60.0  # for training to save where it is

    def __init__(
        self, output: Path, plan: Sequence[Step], wanted: Sequence[Step], ends: Sequence[Step], say: Say,
        ranks: int = 1, jobs: int = 1, delete: bool = False,
    ):  # fmt: skip
        self.output, self.plan, self.wanted, self.ends, self.say = output, plan, wanted, ends, say
        self.ranks, self.delete = ranks, delete
        todo = to_do(wanted, output)
        self.steps = [step for step in plan if step.digest in todo]
        self.number, self.mutex = 0, threading.Lock()
        self.processes, self.ending = set[subprocess.Popen[bytes]](), threading.Event()
        from torch.cuda import device_count  # seconds, and only here

        gpus = device_count()
        if gpus and (jobs or 1) * ranks > gpus:
            raise UserError(f"jobs={jobs} x ranks={ranks} need more GPUs than there are, {gpus}")
        self.jobs = jobs or max(1, gpus // ranks)
        self.places: SimpleQueue[str] = SimpleQueue()
        for job in range(self.jobs):
            mine = range(job * ranks, (job + 1) * ranks)
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
        while step.digest in to_do(self.wanted, self.output):
            try:
                lock.acquire()
            except UserError as error:
                if not waits:
                    self.say(f"{place(step, self.output).name}: waiting, as {error}")
                waits = True
                if self.ending.wait(Lock.POLL_S):
                    raise CancelledError from None
                continue
            if step.digest in to_do(self.wanted, self.output):
                return lock
            lock.release()
        return None

    def _run(self, step: Step, gpus: str) -> None:
        import yaml

        folder = place(step, self.output)
        self._clear(step, folder)
        if options := file_of(step, self.output):
            data = yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode()
            write_atomically(folder / CONFIG, data)
        command = [sys.executable, "-m", CHILD, str(os.getpid()), *command_of(step, self.output, self.ranks)]
        threads = max(1, (os.cpu_count() or 1) // (self.jobs * self.ranks))
        env = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if gpus:
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[int(i)] if visible else i for i in gpus.split(","))
        start = time.monotonic()
        failpoint("step", step.name)
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
        failpoint("step-done", step.name)
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

    def _delete(self) -> None:
        """Weights of models that no step to come reads. Not what is a link, or what another step was given by
        its path: these are somebody's own."""
        with self.mutex:
            todo = to_do(self.ends, self.output)
            needed = {n.digest for step in self.plan if step.digest in todo for n in step.needs}
            given = {Path(path).resolve() for step in self.plan for path in step.inputs}
            for step in self.plan:
                if step.verb.is_model and step.digest not in needed and is_there(step, self.output):
                    product = Path(real(step.product, self.output))
                    is_given = any(p.is_relative_to(product) or product.is_relative_to(p) for p in given)
                    if not product.is_symlink() and not is_given:
                        _delete_model(product)


def file_of(step: Step, output: Path) -> dict[str, Any] | None:
    """What its file of options has; None of a launcher that takes arguments."""
    if step.verb.argv is not None:
        return None
    return {**real(step.options, output), step.verb.output: str(real(step.product, output))}


def command_of(step: Step, output: Path, ranks: int = 1) -> list[str]:
    """Its module and arguments, as python -m takes them."""
    product = str(real(step.product, output))
    if step.verb.argv is not None:
        return [CLI, step.verb.launcher, *step.verb.argv(real(step.options, output), product)]
    argv = ["--config", str(place(step, output) / CONFIG)]
    if step.verb.module:
        return [step.verb.module, *argv]
    if ranks > 1 and step.verb.is_ranked:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return [*torchrun, "-m", CHILD, "0", CLI, step.verb.launcher, *argv]  # ends with torchrun
    return [CLI, step.verb.launcher, *argv]


def shown(step: Step, output: Path, ranks: int = 1) -> str:
    """The same as a command to copy, with its options in place of the file that has them."""
    given = file_of(step, output)
    command = command_of(step, output, ranks)
    if given is not None:
        command = [*command[:-2], *arguments(step.verb.options.from_dict(given))]
    if command[0] == CLI:
        return shlex.join(["nemo-embed", *command[1:]])
    return shlex.join(["python", "-m", *command])


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
