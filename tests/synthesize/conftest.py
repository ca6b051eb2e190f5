"""What every test of synthesis shares."""

import os
import ssl
from functools import cache

import pytest

ONCE = cache(ssl.create_default_context)


@pytest.fixture(autouse=True)
def without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync was half of the time, for power cuts: what a killed process has written is there without. And
    each client of the openai library reads all certificates, which no server here has."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(ssl, "create_default_context", ONCE)
