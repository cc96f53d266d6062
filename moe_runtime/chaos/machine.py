"""The machine that a run was made on, and the versions of what it depends on."""

from __future__ import annotations

import os
import platform
from importlib import metadata

_DISTRIBUTIONS = ("moe-runtime", "torch", "ray", "pyzmq", "grpcio", "numpy")


def describe_machine() -> dict[str, str | int | float]:
    """Cores, memory, system and versions; what is unknown is left out."""
    found: dict[str, str | int | float] = {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
