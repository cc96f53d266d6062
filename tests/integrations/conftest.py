"""Models of transformers without a hub, and runtimes in this process for their experts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

from moe_runtime.config.state_folder import STATE_FOLDER_VARIABLE
from moe_runtime.launch.runtime import serve
from moe_runtime.launch.served import Runtime


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrix products depend on the number of threads; experts in this process share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
