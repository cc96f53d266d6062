"""Models of transformers without a hub, and runtimes in this process for their experts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from fakes.alone import _one_thread, _quiet_transformers  # noqa: F401  fixtures
from moe_runtime.config.state_folder import STATE_FOLDER_VARIABLE
from moe_runtime.launch.runtime import serve
from moe_runtime.launch.served import Runtime


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files of experts are kept, instead of the home of whoever runs the tests."""
    monkeypatch.setenv(STATE_FOLDER_VARIABLE, str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    """A runtime in this process that has no layers yet."""
    with serve({"name": "empty", "router": {"replicas": 0}, "layers": {}}, ray=False) as runtime:
        yield runtime
