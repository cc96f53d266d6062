"""Fixtures of tests that compare models bit by bit: transformers says nothing of its work, and there is one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers() -> None:
    # Here: tests that only want one thread need not have it.
    import transformers

    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrix products depend on the number of threads; experts in this process share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
