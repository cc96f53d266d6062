"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes is the machine's affair: timings are benchmarks, never assertions.
settings.register_profile("moe_runtime", deadline=None)
settings.load_profile("moe_runtime")
