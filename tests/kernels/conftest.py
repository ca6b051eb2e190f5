"""A server of forks in Triton's interpreter, which is set up when triton is imported (see checks.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Server

CHECKS = Path(__file__).with_name("checks.py")


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Server]:
    server = Server(TRITON_INTERPRET="1", PYTHONWARNINGS="ignore::RuntimeWarning")
    yield server
    server.close()


@pytest.fixture
def interpreted(interpreter: Server) -> Callable[..., str | None]:
    """interpreted(check, mutation=None, constants=None, **arguments) -> the error, or None."""

    def ask(
        check: str, mutation: tuple[str, str] | None = None, constants: dict | None = None, **arguments: Any
    ) -> str | None:
        outcome = interpreter.call((CHECKS, "error_of"), check, arguments, mutation, constants)
        assert outcome.code == 0, outcome.output
        return outcome.result

    return ask


@pytest.fixture
def passes(interpreted) -> Callable[..., None]:
    def run(check: str, **arguments) -> None:
        error = interpreted(check, **arguments)
        if error is not None:
            pytest.fail(error, pytrace=False)

    return run
