"""Transformers without a hub, and the fixtures of tests that compare models bit by bit."""

from __future__ import annotations

import os

# Before transformers is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fakes.alone import _one_thread, _quiet_transformers  # noqa: F401  fixtures
