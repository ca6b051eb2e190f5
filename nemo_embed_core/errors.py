"""How a process of ours ends: errors that say what to change, exit codes, and faults that tests inject."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO


class UserError(ValueError):
    """Wrong input or wrong set-up: one paragraph with the numbers and what to change; exit code 2."""

    exit_code = 2


class DataError(UserError):
    """`path:line: what is wrong and what to change`."""

    def __init__(self, path: object, line: int | None, message: str):
        super().__init__(f"{path}:{line}: {message}" if line is not None else f"{path}: {message}")


@contextmanager
def user_errors() -> Iterator[None]:
    """Around a launcher's main(): a UserError is printed as a paragraph and ends the process with code 2.

    At Ctrl-C and where the reader of stdout has ended (`merge.py --help | head -1`), the work ends without
    traceback, with the shell's codes.
    """
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"[rank {rank}] error"
        with suppress(BrokenPipeError):
            print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            with suppress(BrokenPipeError):
                print("stopped by an interrupt", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise  # of another pipe or socket
        with suppress(BrokenPipeError):
            print("stopped: the reader of stdout has ended", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGPIPE) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(BrokenPipeError):
                stream.flush()
            if _is_unread(stream):  # what is left in the buffer would be an error at Python's end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe whose reading end is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except io.UnsupportedOperation:  # a stand-in of a notebook or of pytest
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))


def run_rank(main: Callable[[], None]) -> NoReturn:
    """main() of a launcher that makes process groups; the process then ends without finalising Python.

    gloo's threads outlive destroy_process_group while anything (FSDP2, autograd) refers to their group. A
    thread that wants the interpreter while it is finalised is unwound by force, and the rank dies of SIGABRT
    ("terminate called without an active exception") after its work was done and saved: seen in one of some
    fifteen runs, torch 2.13 (docs/log.md).
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def failpoint(name: str, at: object) -> None:
    """Fault injection for the tests; does nothing when NEMO_EMBED_FAIL is unset, as it is outside them.

    NEMO_EMBED_FAIL=name@at[:action][,...], `*` for every `at`. Actions: kill (the default: as a power cut
    would), stop and term send this process the signal; raise and oom raise; sleep=SECONDS.
    """
    for spec in filter(None, os.environ.get("NEMO_EMBED_FAIL", "").split(",")):
        point, _, action = spec.partition(":")
        if point not in (f"{name}@{at}", f"{name}@*"):
            continue
        if action == "raise":
            raise RuntimeError(f"injected at {name}")
        if action == "oom":
            raise MemoryError(f"injected at {name}")
        if action.startswith("sleep="):
            time.sleep(float(action.removeprefix("sleep=")))
        else:
            names = {"": "SIGKILL", "kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM"}
            os.kill(os.getpid(), signal.Signals[names[action]])
