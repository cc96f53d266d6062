"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """``$MOE_RUNTIME_CACHE``, else ``moe_runtime`` in the user's cache folder; it may not be there yet."""
    if root := environ.get("MOE_RUNTIME_CACHE"):
        return Path(root).absolute()
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "moe_runtime"
