"""What ranks know of each other besides their collectives: who joined, who is behind, who failed first.

A collective that waits for a rank which is stopped, stuck or dead says nothing about it. So every rank notes
what it is about to do (`note`, a host variable), and a thread of its own passes that on to the ranks' store
once a second. A rank that makes no progress for parallel.timeout_s reads the others' notes and ends the job
with the name of the one that is behind; a rank that fails leaves its error there, and the others end with
that line instead of a "connection reset" of their own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from nemo_embed_core.errors import UserError

# Of a rank that was ended because of another one, or of a set-up in which a rank is missing.
OTHER_RANK_EXIT_CODE = 5
INTERVAL_S = 1.0  # between a rank's reports to the store
# From another rank's error until this rank is ended by force: time to end by itself, for example of the same
# error.
GRACE_S = 3.0

# (notes so far, step, phase, since); replaced whole, so no lock.
_progress = (0, 0, "start", time.monotonic())


def note(phase: str, step: int | None = None) -> None:
    """This rank is about to do `phase` of `step`. All ranks note the same sequence: their counts tell who is
    behind."""
    global _progress
    count, last_step, _, _ = _progress
    _progress = (count + 1, last_step if step is None else step, phase, time.monotonic())


def note_exchange() -> None:
    """This rank is about to wait for all others in a small host-side exchange."""
    note(_progress[2].removesuffix(" (all ranks)") + " (all ranks)")


def place() -> str:
    return _name(_progress[2], _progress[1])


def _name(phase: str, step: int) -> str:
    return f"'{phase}' of step {step}" if step else f"'{phase}'"


def _main_thread() -> tuple[str, bool]:
    """(" in file.py:12 function", whether that is a wait for other ranks) of the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    files: list[str] = []
    text = ""
    while frame is not None and len(files) < 5:
        path = frame.f_code.co_filename
        files.append(path)
        if not text and "/torch/" not in path:
            text = f" in {os.path.basename(path)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return text, any(
        "/torch/distributed/" in path or path.endswith("parallel/collectives.py") for path in files
    )


# ------------------------------------------------------------------------------------------ joining


def _agent_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(world_size: int, timeout_s: float, serve: bool = False) -> dist.TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, world_size, serve, timedelta(seconds=timeout_s), wait_for_workers=False)


def _attempt() -> str:
    """Tells the keys of a restart by torchrun from those of its earlier attempts in the same store."""
    get = os.environ.get
    return f"{get('TORCHELASTIC_RUN_ID', '')}/attempt_{get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _report(beat: int) -> str:
    count, step, phase, since = _progress
    age = time.monotonic() - since
    code, waiting = _main_thread() if age > INTERVAL_S / 2 else ("", False)
    values = {"count": count, "step": step, "phase": phase, "age": age, "code": code, "waiting": waiting}
    return json.dumps({**values, "beat": beat, "host": socket.gethostname()})


def join(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """The ranks' store at MASTER_ADDR:MASTER_PORT once all ranks are there; SystemExit names those that are
    missing.

    As init_process_group("env://") makes it: served by torchrun's agent, or by rank 0 without one.
    """
    server = "torchrun's agent" if _agent_has_store() else "rank 0"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        server_store = _connect(world_size, timeout_s, serve=rank == 0 and not _agent_has_store())
    except RuntimeError as error:  # all of torch.distributed's errors are
        _end(
            rank,
            f"no connection to {server} at {address} within {timeout_s:g} s: {str(error).splitlines()[0]}",
        )
    store = dist.PrefixStore(_attempt(), server_store)
    note("start")
    store.set(f"at/{rank}", _report(0))
    try:
        store.wait([f"at/{r}" for r in range(world_size)], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        try:
            missing = [r for r in range(world_size) if not store.check([f"at/{r}"])]
        except RuntimeError:
            _end(
                rank,
                f"{server} at {address} went away while ranks were joining: {str(error).splitlines()[0]}",
            )
        _end(
            rank,
            f"rank {', '.join(map(str, missing))} of {world_size} did not join at {address} within "
            f"{timeout_s:g} s. It did not start, ended early (look for its own message), or still "
            "tokenises (launch/prepare.py does that beforehand)",
        )
    return store


def _end(rank: int, message: str) -> NoReturn:
    print(f"[rank {rank}] {message}", file=sys.stderr, flush=True)
    raise SystemExit(OTHER_RANK_EXIT_CODE)


# --------------------------------------------------------------------------------------- restarts by torchrun


def _begun() -> str:
    # In the agent's store, which outlives the workers.
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/training_begun"


def mark_begun() -> None:
    """Called by rank 0 once its output folder is accepted: what stands there from now on is this torchrun's
    own."""
    if _agent_has_store():
        _connect(1, 60).set(_begun(), "1")


def begun_before() -> bool:
    """Whether an earlier attempt of this same torchrun (--max-restarts) had called mark_begun."""
    return (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        and _agent_has_store()
        and _connect(1, 60).check([_begun()])
    )


# ------------------------------------------------------------------------------------------ watching


@dataclass(frozen=True)
class Suspect:
    rank: int | None  # None: torchrun's agent
    text: str  # what it is accused of
    gone: bool  # its process does not report any more


def _listed(suspects: list[Suspect]) -> str:
    more = f"; and {len(suspects) - 3} more ranks" if len(suspects) > 3 else ""
    return "; ".join(suspect.text for suspect in suspects[:3]) + more


class Watch:
    """Two threads: one talks to the store (and may block on it), one keeps the time and never blocks."""

    def __init__(self, rank: int, world_size: int, timeout_s: float):
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.interval = min(INTERVAL_S, timeout_s / 10)
        self._first: dict[str, Any] | None = None  # the error of the rank that failed first
        self._claim: dict[str, Any] | None = None  # what this rank would report as the first error
        self._others: dict[int, dict[str, Any]] = {}  # rank -> its last report
        self._moved: dict[int, float] = {}  # rank -> when its report last changed, on this rank's clock
        self._read = 0.0  # when all reports were last read
        self._suspicious = False  # read them although this rank makes progress
        self._answered = self._awake = time.monotonic()  # last answer of the store; start, or end of a pause
        self._lost = False  # the connection to the store
        self._beat = 0
        self._stopped, self._wake, self._exchanged = (
            threading.Event(),
            threading.Event(),
            threading.Condition(),
        )
        # A connection of its own: a blocked call of the process group must not silence this rank.
        self._store = dist.PrefixStore(_attempt(), _connect(world_size, timeout_s))
        self._talker = threading.Thread(target=self._talk, name="liveness: store", daemon=True)
        self._talker.start()
        threading.Thread(target=self._keep_time, name="liveness: time", daemon=True).start()

    def close(self) -> None:
        self._stopped.set()
        self._wake.set()
        self._talker.join(timeout=1)

    # ---- the thread that talks

    def _talk(self) -> None:
        while not self._stopped.is_set():
            try:
                self._exchange()
                self._answered = time.monotonic()
                with self._exchanged:
                    self._exchanged.notify_all()
            except RuntimeError:
                if not self._stopped.is_set():
                    self._lost = True
                with self._exchanged:
                    self._exchanged.notify_all()
                return
            self._wake.wait(self.interval)
            self._wake.clear()
        with suppress(RuntimeError):
            self._report()  # "done"

    def _report(self) -> None:
        self._beat += 1
        self._store.set(f"at/{self.rank}", _report(self._beat))

    def _exchange(self) -> None:
        self._report()
        if self._first is None:
            if self._claim is not None:  # whoever is first stays it
                self._first = json.loads(self._store.compare_set("first", "", json.dumps(self._claim)))
            elif self._store.check(["first"]):
                self._first = json.loads(self._store.get("first"))
            if self._first is not None:
                self._store.add("know", 1)
        if self._suspicious or time.monotonic() - _progress[3] > 2 * self.interval:
            self._read = now = time.monotonic()
            for rank, text in enumerate(self._store.multi_get([f"at/{r}" for r in range(self.world_size)])):
                report = json.loads(text)
                if report["beat"] != self._others.get(rank, {}).get("beat"):
                    self._moved[rank] = now
                self._others[rank] = report

    # ---- the thread that keeps the time

    def _keep_time(self) -> None:
        last = time.monotonic()
        seen = 0.0
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            if now - last > 5 * self.interval + 2:
                # This process was stopped itself (a suspended job): nobody is to blame for that time.
                self._awake = now
            last = now
            if self._first is not None and self._claim is None:
                seen = seen or now
                if now - seen > GRACE_S:
                    self._exit(self._about_first())
            elif self._claim is None and now - max(_progress[3], self._awake) > self.timeout_s:
                suspects = self._suspects()
                if suspects:
                    message = _listed(suspects)
                    self._make_claim(message, [s.rank for s in suspects])
                    first = self._first is None or self._first["rank"] == self.rank
                    self._exit(message if first else self._about_first())

    def _silent(self) -> bool:
        return self._lost or time.monotonic() - max(self._answered, self._awake) > 3 * self.interval + 1

    def _suspects(self) -> list[Suspect]:
        """The most suspect first; empty when all are alive, equally far and waiting (or all are working)."""
        now, count, here = time.monotonic(), _progress[0], place()
        if self._silent():
            silence = f"{'gone' if self._lost else 'silent'} for {now - self._answered:.0f} s"
            if _agent_has_store():
                address = os.environ["MASTER_ADDR"]
                text = f"torchrun on {address}, which holds the ranks' store, has been {silence}, at {here}"
                return [Suspect(None, text, gone=True)]
            return [
                Suspect(
                    0,
                    f"rank 0 did not reach {here} (it holds the ranks' store and has been {silence})",
                    gone=True,
                )
            ]
        gone, behind = [], []
        for rank, report in self._others.items():
            if rank == self.rank or report["phase"] == "done":
                continue
            seen = _name(report["phase"], report["step"]) + report["code"]
            age = report["age"] + now - self._moved[rank]
            seen = f"last seen at {seen}, {age:.0f} s ago, on {report['host']}"
            if self._read - self._moved[rank] > 3 * self.interval:
                text = f"rank {rank} did not reach {here} ({seen}; its process is stopped or gone)"
                gone.append(Suspect(rank, text, gone=True))
            elif report["count"] < count:
                behind.append(
                    (report["count"], Suspect(rank, f"rank {rank} did not reach {here} ({seen})", gone=False))
                )
            elif report["count"] == count and not report["waiting"] and _main_thread()[1]:
                behind.append(
                    (
                        count,
                        Suspect(rank, f"rank {rank} keeps the others waiting in {here} ({seen})", gone=False),
                    )
                )
        # Of those that run, the farthest behind: the others wait for it too.
        return gone or [suspect for n, suspect in behind if n == min(behind, key=lambda b: b[0])[0]]

    def _about_first(self) -> str:
        assert self._first is not None
        return f"rank {self._first['rank']} ended the job first: {self._first['message']}"

    def _make_claim(self, message: str, accused: list[int | None]) -> None:
        """Tell the others, unless one of them was first; waits a moment for the store, which may be what is
        broken."""
        self._claim = {"rank": self.rank, "message": message, "accused": accused}
        if self._lost:
            return
        with self._exchanged:
            self._wake.set()
            self._exchanged.wait_for(lambda: self._first is not None or self._lost, timeout=2)

    def _exit(self, message: str) -> None:
        if self._stopped.is_set():
            return
        print(f"[rank {self.rank}] {message}; ending this rank", file=sys.stderr, flush=True)
        if self._first is not None and self.rank in self._first["accused"]:
            faulthandler.dump_traceback(sys.stderr)  # where the stuck rank stands
        self._let_others_know()
        sys.stdout.flush()
        os._exit(OTHER_RANK_EXIT_CODE)

    def _let_others_know(self) -> None:
        """The rank that serves the store stays until all know the first error, not long: one may be dead."""
        if self.rank or _agent_has_store():
            return
        deadline = time.monotonic() + 2 * self.interval + 0.5
        while time.monotonic() < deadline and not self._silent():
            with self._exchanged:
                self._exchanged.wait(self.interval)
            if self._known_by() >= self.world_size:
                return

    def _known_by(self) -> int:
        try:
            return int(self._store.add("know", 0))
        except RuntimeError:
            return 0

    # ---- the main thread, on an error

    def failed(self, error: BaseException) -> None:
        """Called with the error that ends this rank: SystemExit with one line when another rank caused it."""
        where = place()
        message = f"at {where}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if _is_lost_connection(error):
            self._find_dead()
            if self._first is not None:
                mine = self._first["rank"] == self.rank
                line = self._first["message"] if mine else self._about_first()
                print(f"[rank {self.rank}] {line}; ending this rank at {where}", file=sys.stderr, flush=True)
                self._let_others_know()
                raise SystemExit(OTHER_RANK_EXIT_CODE) from None
        self._make_claim(message, [])
        if not isinstance(error, (UserError, SystemExit)):  # the launcher has a paragraph for those
            if self._first is not None and self._first["rank"] != self.rank:
                print(f"[rank {self.rank}] {self._about_first()}", file=sys.stderr)
            print(f"[rank {self.rank} of {self.world_size}] error {message}", file=sys.stderr, flush=True)
        self._let_others_know()

    def _find_dead(self) -> None:
        """Wait for the first error; without one, blame the rank that has stopped reporting."""
        self._suspicious = True
        deadline = time.monotonic() + 6 * self.interval + 2
        while self._first is None and time.monotonic() < deadline:
            with self._exchanged:
                self._wake.set()
                self._exchanged.wait(self.interval / 2)
            if self._first is None and (gone := [s for s in self._suspects() if s.gone]):
                self._make_claim(f"lost a connection: {_listed(gone)}", [])
                if self._first is None:  # the store is what is gone
                    self._first = self._claim


def _is_lost_connection(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or bool(
        re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)|Broken pipe|Timed out waiting|Socket", str(error))
    )


@contextmanager
def watched(rank: int, world_size: int, timeout_s: float) -> Iterator[None]:
    """Around the work of a rank that has joined: nobody waits longer than timeout_s for one that makes no
    progress."""
    watch = Watch(rank, world_size, timeout_s)
    try:
        yield
        note("done")
    except BaseException as error:
        watch.failed(error)
        raise
    finally:
        watch.close()
