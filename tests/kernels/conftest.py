"""One child process in Triton's interpreter for all kernel tests of a session (see checks.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., str | None]]:
    """interpreted(check, mutation=None, constants=None, **arguments) -> the error, or None."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::RuntimeWarning", str(Path(__file__).with_name("checks.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def ask(
        check: str, mutation: tuple[str, str] | None = None, constants: dict | None = None, **arguments
    ) -> str | None:
        request = {"check": check, "arguments": arguments, "mutation": mutation, "constants": constants}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
        assert reply, f"the interpreter process died (exit code {process.wait()}); its stderr is above"
        return json.loads(reply)["error"]

    yield ask
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture
def passes(interpreted) -> Callable[..., None]:
    def run(check: str, **arguments) -> None:
        error = interpreted(check, **arguments)
        if error is not None:
            pytest.fail(error, pytrace=False)

    return run
