"""What every test of synthesis shares."""

import os

import pytest


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time, for power cuts: what a killed process has written is there without."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
