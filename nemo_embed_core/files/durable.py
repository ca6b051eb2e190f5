"""Durable files: what has its name is whole after a crash at any point. And what an output is asked first.

The order: write beside it (a folder into `.tmp-NAME...`, a file into `.NAME.tmp`), fsync every file, fsync
the folder, rename, fsync the parent; only then is anything reported as saved.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_embed_core.errors import UserError, failpoint


def fsync(file: int | Path) -> None:
    """Of an open file, or of a file or folder by its path."""
    if isinstance(file, int):
        os.fsync(file)
        return
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path) -> str:
    """sha256 over the names and contents of all its files, also of those behind links."""
    digest = hashlib.sha256()
    found = [Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names]
    for file in sorted(found):
        if file.is_file():
            digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ files


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """A whole small file, fsynced."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to: durably renamed to it when the block ends well, else removed.

    shared: several processes may do this at once and the last one stays. Otherwise what a
    killed one left is overwritten.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8] + '.' if shared else ''}tmp")
    try:
        yield temporary
        fsync(temporary)
        failpoint("rename", f"{path.parent.name}/{path.name}")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_atomically(path: Path, data: bytes | Iterable[bytes], shared: bool = False) -> None:
    """The whole file under its name or nothing; data may come in pieces, which are never all in memory."""
    with replacing(path, shared) as temporary, temporary.open("wb") as file:
        file.writelines((data,) if isinstance(data, bytes) else data)


def link_atomically(name: Path, target: Path) -> None:
    """name -> target, relative, in place of the link that it was. UserError where it is something else."""
    if name.exists() and not name.is_symlink():
        raise UserError(f"{name} is not the link to {target.name} that it should be: move it away")
    beside = name.with_name(f".{name.name}.link")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(target, name.parent))
    os.replace(beside, name)
    fsync(name.parent)


# ------------------------------------------------------------------------------------------ folders


def make_folder(path: Path) -> None:
    """mkdir -p, durably: a new folder that a power cut takes away takes along all that was saved in it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def fsync_files(folder: Path) -> None:
    """Of every file in it and in the folders in it; publish() does the folders themselves."""
    for file in folder.rglob("*"):
        if file.is_file():
            fsync(file)


def publish(tmp: Path, final: Path, first_wins: bool = False) -> Path | None:
    """Make a folder of durable files visible under its name: durable before and after the rename.

    What has that name already keeps its files under a new one, which is returned; with first_wins it stays
    as it is and `tmp` goes.
    """
    for folder in (*(path for path in tmp.rglob("*") if path.is_dir()), tmp):
        fsync(folder)
    aside = None
    if final.exists() and not first_wins:  # damaged: its step is saved again, after a resume
        aside = final.with_name(f"damaged-{final.name}-{uuid.uuid4().hex[:8]}")
        os.rename(final, aside)
    try:
        os.rename(tmp, final)
    except OSError as error:
        if not first_wins or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(tmp, ignore_errors=True)
    fsync(final.parent)
    return aside


@contextmanager
def new_folder(final: Path, replaces: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and is removed when it does not.

    `final` must not exist, or be empty: results are never mixed with older ones. replaces: it may hold what
    can be made again, which stays until the new one is whole, and then goes.
    """
    if not replaces and final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists and is not empty; choose another output or delete it")
    make_folder(final.parent)
    # Named after its owner: what a killed process of this host left goes, what a living one makes stays.
    owner = f".tmp-{final.name}-{socket.gethostname()}-{''.join(filter(str.isdigit, pid_namespace()))}-"
    tmp = final.parent / f"{owner}{os.getpid()}"
    for stale in final.parent.iterdir():
        pid = stale.name.removeprefix(owner)
        if pid == stale.name or not pid.isdecimal():
            continue
        if int(pid) == os.getpid() or start_time(int(pid)) is None:
            shutil.rmtree(stale)
    tmp.mkdir()
    try:
        yield tmp
        fsync_files(tmp)
        if replaces:
            if (old := publish(tmp, final)) is not None:
                shutil.rmtree(old)
        else:
            made = tmp.stat().st_ino
            publish(tmp, final, first_wins=True)  # takes the place of an empty folder
            if final.stat().st_ino != made:
                raise UserError(
                    f"{final} has been written by another process meanwhile: its result stays, and this one "
                    "is dropped"
                )
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------ an output folder


def probe(folder: Path) -> None:
    """Write, fsync and rename in it, as a save will: an unwritable folder fails now, not hours later."""
    old = folder / f".probe-{uuid.uuid4().hex}"
    new = folder / f"{old.name}-renamed"
    try:
        make_folder(folder)
        write_bytes(old, b"probe")
        os.rename(old, new)
        fsync(folder)
        new.unlink()
    except OSError as error:
        with suppress(OSError):
            old.unlink(missing_ok=True)
        raise UserError(
            f"output_dir {folder} is not writable: {error}; make it so or choose another output_dir"
        ) from None


def probe_file(output: Path) -> None:
    """Make its folder and write beside it, as the end of hours of work will."""
    if output.is_dir():
        raise UserError(f"output {output} is a folder: give the name of a JSON file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = output.with_name(f".{output.name}.tmp")
        beside.write_text("")
        beside.unlink()
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror}") from None


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """UserError where one of the outputs is a file that is read, under this name or another one."""
    files = {(stat.st_dev, stat.st_ino): file for file in inputs if file.exists() for stat in [file.stat()]}
    for output in outputs:
        if not output.exists():
            continue
        stat = output.stat()
        if (read := files.get((stat.st_dev, stat.st_ino))) is not None:
            as_what = "" if read == output else f" (as {read})"
            raise UserError(f"{output} is read{as_what}, and would be written over: choose another name")


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
    """OSErrors of the block as a UserError that names the folder, and what a full disk lacks."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{folder}: {error}; {what} needs {needed:,} bytes, {free_bytes(folder):,} are free"
            ) from None
        raise UserError(f"{folder}: {what} could not be written: {error}") from None


# ------------------------------------------------------------------------------------------ processes


def start_time(pid: int) -> str | None:
    """When it started, in clock ticks since boot; None when there is no such process or only its zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def pid_namespace() -> str:
    """Containers that share a host name do not share pids."""
    return os.readlink("/proc/self/ns/pid")
