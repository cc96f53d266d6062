"""The machine that figures were made on, and the versions of what they depend on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_DISTRIBUTIONS = ("torch", "ray", "pyzmq", "grpcio", "numpy", "transformers")
_REPOSITORY = Path(__file__).parents[2]


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory, system, versions, and the commit of this repository; what is unknown is left out."""
    found: dict[str, str | int | float | None] = {
        "cpu": _from_file(Path("/proc/cpuinfo"), "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in _DISTRIBUTIONS},
        "commit": _commit(),
    }
    return {name: value for name, value in found.items() if value is not None}


def _from_file(path: Path, key: str) -> str | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit, marked where files differ from it; None outside a repository."""
    command = ["git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
