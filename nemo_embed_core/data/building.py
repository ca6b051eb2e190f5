"""The folder in which a token store is built: of one process, surviving a kill, published by a rename.

    with building(cache_dir / name, log) as folder: ...; publish(folder, cache_dir / name)

folder/state.json is the last commit: how many rows are done and how many bytes of each file belong to them.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_embed_core.errors import UserError
from nemo_embed_core.files import durable
from nemo_embed_core.files.lock import hold
from nemo_embed_core.files.strict_json import parse

STALE_S = 24 * 3600  # a killed build of other data is kept this long, so that two builds may take turns

Log = Callable[[str], None]


@contextmanager
def building(folder: Path, log: Log) -> Iterator[Path]:
    """A folder that this process alone holds: what a killed build of the same store left, or a new one.

    Left by a killed process, by Ctrl-C or by a full disk, it stays; after bad data it goes.
    """
    durable.make_folder(folder.parent)
    prefix = f".building-{folder.name[:16]}-"
    temporary, lock = _sweep(folder.parent, prefix, log)
    if temporary is None:
        temporary = folder.with_name(f"{prefix}{uuid.uuid4().hex[:8]}")
        temporary.mkdir()
        lock = hold(temporary)
        if lock is None:
            log(f"WARNING: {folder.parent} has a file system without locks; a killed build there starts anew")
    try:
        yield temporary
    except (UserError, AssertionError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _sweep(parent: Path, prefix: str, log: Log) -> tuple[Path | None, int | None]:
    """Takes the leftover with this prefix that has come furthest; removes the others, or names them."""
    mine: list[tuple[int, Path, int]] = []
    for leftover in parent.glob(".sources.json.*.tmp"):  # killed between writing it and its rename
        with suppress(OSError):  # another process renames or removes it
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
    for leftover in sorted(parent.glob(".building-*")):
        if (age := _age(leftover)) is None:
            continue  # published or removed meanwhile
        if not (leftover / "lock").exists():  # of an older version, or being made right now
            if age > 3600:
                log(f"removing {leftover}, left by an older version")
                shutil.rmtree(leftover, ignore_errors=True)
            continue
        lock = hold(leftover)
        if lock is None:
            continue  # somebody builds there
        rows = (read_state(leftover) or {"rows": 0})["rows"]
        if leftover.name.startswith(prefix):
            mine.append((rows, leftover, lock))
            continue
        if rows and age < STALE_S:
            log(
                f"{leftover} is of a killed build of other data: starting that again goes on from its "
                f"{rows:,} rows; it is removed when it is a day old"
            )
        else:
            log(f"removing {leftover}, left by a process that is gone")
            shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)
    mine.sort()
    for _, leftover, lock in mine[:-1]:
        log(f"removing {leftover}, left by a process that is gone")
        shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)
    return (mine[-1][1], mine[-1][2]) if mine else (None, None)


def _age(folder: Path) -> float | None:
    """Seconds since it or a file in it was written; None where it is gone. Another process builds there."""
    times = []
    for path in (folder, *folder.glob("*")):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times) if times else None


def read_state(folder: Path) -> dict[str, Any] | None:
    try:
        state = parse((folder / "state.json").read_bytes())
        whole = all((folder / name).stat().st_size >= size for name, size in state["sizes"].items())
        return state if whole and isinstance(state["rows"], int) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def publish(temporary: Path, folder: Path) -> None:
    """Renames a built store into place, durably; losing the race to another builder of it is fine."""
    durable.fsync_files(temporary)
    durable.publish(temporary, folder, first_wins=True)
    (folder / "lock").unlink(missing_ok=True)
