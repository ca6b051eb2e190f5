"""Who may write into a folder: a run for as long as it beats, a process for as long as it lives."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nemo_embed_core.errors import UserError
from nemo_embed_core.files.durable import make_folder, pid_namespace, start_time
from nemo_embed_core.files.strict_json import parse


class Lock:
    """folder/.lock: one run at a time writes there. JSON {host, pid, start, pid_namespace, time, run}.

    `start` (field 22 of /proc/PID/stat) tells a reused pid from the process that made the lock. Of a
    process on this host we know whether it lives; of one elsewhere only the heartbeat tells, the file's
    mtime: a lock without one for STALE_S is taken over. A job that is requeued to another node after its
    node died therefore waits that long instead of failing; where the heartbeat moves meanwhile, it is
    refused at once. `run` is this run's new id.
    """

    STALE_S = 300.0  # below the default parallel.timeout_s: rank 0 waits this long before it joins the others
    BEAT_S = 15.0
    POLL_S = 5.0

    def __init__(self, folder: Path, log: Callable[[str], None]):
        self.path, self._log = folder / ".lock", log
        self.run = uuid.uuid4().hex
        self._ended = threading.Event()
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": start_time(os.getpid()),
            "pid_namespace": pid_namespace(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "run": self.run,
        }

    def refuse_if_held(self, warn: bool = True) -> bool:
        """UserError when a live run holds the folder; True when a lock is there that may be taken over."""
        first = None  # mtime when we began to wait for another host
        while True:
            try:
                beat = self.path.stat().st_mtime
                age = _now(self.path.parent) - beat
                owner = parse(self.path.read_text())
                where = f"process {owner['pid']} on {owner['host']} (since {owner['time']})"
                same_host = all(owner[key] == self._owner[key] for key in ("host", "pid_namespace"))
                alive = start_time(int(owner["pid"])) == owner["start"] if same_host else age < self.STALE_S
                mine = same_host and alive and owner["pid"] == os.getpid()
            except FileNotFoundError:
                return False
            except (ValueError, KeyError, TypeError):  # its process died between creating and filling it
                where, same_host, alive, mine = "a process that left no name", True, age < self.BEAT_S, False
            if same_host or not alive or beat != (first or beat):
                break
            if first is None:
                until = f"its heartbeat moves or is {self.STALE_S / 60:.0f} minutes old"
                self._log(f"{self.path} is of {where}: waiting until {until}")
            first = beat
            time.sleep(self.POLL_S)
        if alive and not mine:
            raise UserError(
                f"{self.path.parent} is in use by {where}; wait until it ends or choose another output_dir. "
                f"If you know that it is gone, delete {self.path}"
            )
        if warn and not mine:
            self._log(f"WARNING: {self.path} is of {where}, which is gone; taking it over")
        return True

    def acquire(self) -> Lock:
        """Take the folder and keep the heartbeat going until release()."""
        make_folder(self.path.parent)
        if self.refuse_if_held():
            self.path.unlink(missing_ok=True)
        try:
            with self.path.open("x") as file:  # O_EXCL: of two that see no lock, one gets it
                json.dump(self._owner, file)
        except FileExistsError:
            self.refuse_if_held()
            folder = self.path.parent
            raise UserError(f"{folder} is being taken by another run at this moment; try again") from None
        threading.Thread(target=self._beat, name="lock heartbeat", daemon=True).start()
        return self

    def _beat(self) -> None:
        while not self._ended.wait(self.BEAT_S):
            with suppress(OSError):  # a lock that has vanished is check()'s to report
                os.utime(self.path)

    def check(self) -> None:
        """Before a publication: of two runs that took over the same stale lock one ends here."""
        try:
            run = parse(self.path.read_text())["run"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"the lock {self.path} of this run is gone ({why})") from None
        if run != self.run:
            raise UserError(f"{self.path} was taken by another run ({run}, this is {self.run})")

    def release(self) -> None:
        self._ended.set()
        with suppress(UserError, FileNotFoundError):  # not ours any more: leave it
            self.check()
            self.path.unlink()


def _now(folder: Path) -> float:
    """The file system's own clock: nodes' clocks differ."""
    path = folder / f".clock-{uuid.uuid4().hex}"  # two hosts may have the same pid
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()


def hold(folder: Path) -> int | None:
    """A descriptor that holds folder/lock until this process ends, however it does; None: not to be had."""
    path = folder / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink and path.exists():  # else its owner has just ended
            return descriptor
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise
    os.close(descriptor)
    return None
