"""What runs on a node to see what is installed there, or to install it.

Sent by value, because a node may lack this package: nothing here may need more than Python itself.
"""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_MAX_ERROR_LINES = 5
_PACKAGE = "moe-runtime"


def installed(distributions: list[str]) -> dict[str, str | None]:
    """Version of Python and of each distribution here; None where it is missing."""
    return {"python": platform.python_version(), **{name: installed_version(name) for name in distributions}}


def installed_version(distribution: str) -> str | None:
    """Version of a distribution here; None if it is missing.

    This package may run from its source, which no installer knows of; it tells its version itself.
    """
    try:
        return version(distribution)
    except PackageNotFoundError:
        if distribution != _PACKAGE:
            return None
    try:
        return str(importlib.import_module("moe_runtime").__version__)
    except ImportError:
        return None


def install(requirements: list[str], wheels: dict[str, bytes], timeout_s: float) -> str | None:
    """Install distributions here with pip; None, or what pip said last if it failed.

    Args:
        requirements: As pip takes them.
        wheels: Content of wheels to install, by file name.
        timeout_s: For all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in wheels.items():
            path = Path(folder) / name
            path.write_bytes(content)
            requirements = [*requirements, str(path)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"pip install took more than {timeout_s:g} s"
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return "; ".join(lines[-_MAX_ERROR_LINES:]) or f"pip ended with {done.returncode}"
