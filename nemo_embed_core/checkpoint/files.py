"""Durable files: a streaming safetensors writer that hashes what it writes, atomic publication of a folder, and what an
output folder is asked before a run trusts it: can it be written, is there room, does another run use it.

The order that a crash at any point survives: write into a `.tmp-` folder, fsync every file, fsync the folder, rename,
fsync the parent; only then is anything reported as saved.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_embed_core.config import UserError

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
PIECE_BYTES = 8 << 20  # hashed and written at a time


def safetensors_header(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, int]:
    """The bytes in front of the tensors, which follow one another in the order of `entries`, and how many those are."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + dtype.itemsize * _numel(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins on a multiple of 8
    return len(text).to_bytes(8, "little") + text, end


def read_safetensors_header(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """name -> (dtype, shape, its first byte in the file), of a file that the library has opened, so checked, before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    kinds = {text: dtype for dtype, text in DTYPES.items()}
    return {
        name: (kinds[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in kinds
    }


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor (or piece by piece), so that no file is ever held in memory.

    `entries`: name -> (dtype, shape), in the order in which the bytes will come. The library writes whole files only.
    As a context manager it closes the file also when writing fails; the caller calls close() at the end of the block.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
    ):
        header, self._missing = safetensors_header(entries, metadata)
        self.path = path
        self._hash = hashlib.sha256()
        self._file = path.open("xb")
        try:
            self._put(header)
        except OSError:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # After a failed write the rest of the buffer cannot be written either; that error is on its way already.
        with suppress(OSError):
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._hash.update(piece)
            begin = self._file.tell()
            self._file.write(piece)
            start_writing_back(self._file.fileno(), begin, len(piece))

    def write(self, tensor: Tensor) -> None:
        """The next bytes in order; the caller keeps to the order of `entries`."""
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        self._missing -= data.numel()
        self._put(data.numpy().data)

    def close(self) -> dict[str, Any]:
        """fsync; returns {"size", "sha256"} of what was written."""
        assert self._missing == 0, f"{self.path}: {self._missing} bytes of its tensors were not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return {"size": size, "sha256": self._hash.hexdigest()}


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def start_writing_back(fd: int, begin: int, size: int) -> None:
    """Let the disk begin on what was just written, so that the fsync at the end finds little left to wait for."""
    # Linux first queues what is dirty there and then drops only what is clean: nothing, as it is on its way.
    os.posix_fadvise(fd, begin, size, os.POSIX_FADV_DONTNEED)


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """A whole small file, fsynced."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """mkdir -p, durably: a new folder that a power cut takes away takes along all that was saved in it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_dir(folder.parent)


def publish(tmp: Path, final: Path) -> Path | None:
    """Make a finished folder visible under its name: durable before and after the rename.

    What has that name already keeps its files under a new one, which is returned.
    """
    for folder in (*(path for path in tmp.rglob("*") if path.is_dir()), tmp):
        fsync_dir(folder)
    aside = None
    if final.exists():  # damaged: the same step, saved again after a resume from an older checkpoint
        aside = final.with_name(f"damaged-{final.name}-{uuid.uuid4().hex[:8]}")
        os.rename(final, aside)
    os.rename(tmp, final)
    fsync_dir(final.parent)
    return aside


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and is removed when it does not.

    `final` must not exist, or be empty: results are never mixed with older ones.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists and is not empty; choose another output or delete it")
    make_folder(final.parent)
    # The owner in the name: what a killed process of this host left is removed, what a living one makes is not.
    owner = f".tmp-{final.name}-{socket.gethostname()}-{''.join(filter(str.isdigit, _pid_namespace()))}-"
    tmp = final.parent / f"{owner}{os.getpid()}"
    for stale in final.parent.iterdir():
        pid = stale.name.removeprefix(owner)
        if pid != stale.name and pid.isdecimal() and (int(pid) == os.getpid() or _start_time(int(pid)) is None):
            shutil.rmtree(stale)
    tmp.mkdir()
    try:
        yield tmp
        for file in tmp.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if final.exists():
            final.rmdir()
        publish(tmp, final)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------ an output folder


def probe(folder: Path) -> None:
    """Write, fsync and rename in the folder, as a save will: an unwritable output fails now, not hours later."""
    old = folder / f".probe-{uuid.uuid4().hex}"
    new = folder / f"{old.name}-renamed"
    try:
        make_folder(folder)
        write_bytes(old, b"probe")
        os.rename(old, new)
        fsync_dir(folder)
        new.unlink()
    except OSError as error:
        with suppress(OSError):
            old.unlink(missing_ok=True)
        raise UserError(
            f"output_dir {folder} is not writable: {error}; make it so or choose another output_dir"
        ) from None


def free_bytes(path: Path) -> int:
    """Of the file system of `path`, or of the nearest folder above that still exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_free_space(folder: Path, needed: int, what: str) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs {needed:,} bytes, {free:,} are free on its file system; free "
            f"{needed - free:,} more or choose an output_dir on another one"
        )


@contextmanager
def writing(folder: Path, needed: int, what: str) -> Iterator[None]:
    """OSErrors of the block as a UserError that names the folder, and where it is full the bytes that `what` needs and that are free."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{folder}: {error}; {what} needs {needed:,} bytes, {free_bytes(folder):,} are free"
            ) from None
        raise UserError(f"{folder}: {what} could not be written: {error}") from None


class Lock:
    """folder/.lock: one run at a time writes into a folder. JSON {host, pid, start, pid_namespace, time, run}.

    `start` (field 22 of /proc/PID/stat) tells a reused pid from the process that made the lock. Of a process on this
    host we know whether it lives; of one elsewhere only the heartbeat tells, the file's mtime: a lock without one for
    STALE_S is taken over. A job that is requeued to another node after its node died therefore waits that long instead of
    failing; where the heartbeat moves meanwhile, it is refused at once. `run` is a new id of this run.
    """

    STALE_S = 300.0  # less than parallel.timeout_s by default: rank 0 waits this long before it joins the others
    BEAT_S = 15.0
    POLL_S = 5.0

    def __init__(self, folder: Path, log: Callable[[str], None]):
        self.path, self._log = folder / ".lock", log
        self.run = uuid.uuid4().hex
        self._ended = threading.Event()
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": _start_time(os.getpid()),
            "pid_namespace": _pid_namespace(),
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
                owner = json.loads(self.path.read_text())
                where = f"process {owner['pid']} on {owner['host']} (since {owner['time']})"
                same_host = all(owner[key] == self._owner[key] for key in ("host", "pid_namespace"))
                alive = _start_time(int(owner["pid"])) == owner["start"] if same_host else age < self.STALE_S
                mine = same_host and alive and owner["pid"] == os.getpid()
            except FileNotFoundError:
                return False
            except (ValueError, KeyError, TypeError):  # empty: its process died between creating and filling it
                where, same_host, alive, mine = "a process that left no name", True, age < self.BEAT_S, False
            if same_host or not alive or beat != (first or beat):
                break
            if first is None:
                self._log(
                    f"{self.path} is of {where}: waiting until its heartbeat moves or is {self.STALE_S / 60:.0f} minutes old"
                )
            first = beat
            time.sleep(self.POLL_S)
        if alive and not mine:
            raise UserError(
                f"{self.path.parent} is in use by {where}; wait until it ends or choose another output_dir. If you know "
                f"that it is gone, delete {self.path}"
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
            raise UserError(f"{self.path.parent} is being taken by another run at this moment; try again") from None
        threading.Thread(target=self._beat, name="lock heartbeat", daemon=True).start()
        return self

    def _beat(self) -> None:
        while not self._ended.wait(self.BEAT_S):
            with suppress(OSError):  # a lock that has vanished is check()'s to report
                os.utime(self.path)

    def check(self) -> None:
        """Before anything is published: two runs that took over the same stale lock end here, as does a vanished folder."""
        try:
            run = json.loads(self.path.read_text())["run"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the lock {self.path} of this run is gone ({type(error).__name__}: {error})") from None
        if run != self.run:
            raise UserError(f"{self.path} was taken by another run ({run}, this is {self.run})")

    def release(self) -> None:
        self._ended.set()
        with suppress(UserError, FileNotFoundError):  # not ours any more: leave it
            self.check()
            self.path.unlink()


def _start_time(pid: int) -> str | None:
    """When the process started, in clock ticks since boot; None when there is no such process or only its zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _pid_namespace() -> str:
    """Containers that share a host name do not share pids."""
    return os.readlink("/proc/self/ns/pid")


def _now(folder: Path) -> float:
    """The file system's own clock: nodes' clocks differ."""
    path = folder / f".clock-{uuid.uuid4().hex}"  # two hosts may have the same pid
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()
