"""Unit tests never start Ray: what they test is built to run without it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _forbid_ray_init(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a unit test called ray.init; tests that need a cluster belong in tests/ray")

    try:
        import ray
    except ModuleNotFoundError:
        return
    monkeypatch.setattr(ray, "init", refuse)
