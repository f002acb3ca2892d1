"""Watching which processes a test forks."""

import os

import pytest


def watch_forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the id of each process that this one forks."""
    started: list[int] = []
    fork = os.fork

    def noted() -> int:
        started.append(fork())
        return started[-1]

    monkeypatch.setattr(os, "fork", noted)
    return started
