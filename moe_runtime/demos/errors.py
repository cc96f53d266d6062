"""What a demo raises on purpose."""

from __future__ import annotations

from moe_runtime.errors import MoERuntimeError


class DemoError(MoERuntimeError):
    """The demo cannot run here, or its outcome is not what it promises."""
