"""Fixtures: transformers without a hub, and one thread, on whose number matrix products depend."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before transformers is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
