"""The console script. It loads in the base install, where it says what the command line needs."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

#: What the runtime extra installs, by the names that it is imported by.
_RUNTIME_PACKAGES = (
    "fsspec",
    "grpc_health",
    "prometheus_client",
    "ray",
    "rich",
    "safetensors",
    "torch",
    "typer",
    "yaml",
    "zmq",
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line with the process's arguments, or with these; always ends in ``SystemExit``."""
    missing = [package for package in _RUNTIME_PACKAGES if find_spec(package) is None]
    if missing:
        sys.exit(
            f"moe-runtime: this is the client alone (no {', '.join(missing)}); "
            "for the command line: pip install 'moe-runtime[runtime]'"
        )
    # gRPC's own log repeats, over several lines, what our errors say in one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from moe_runtime.cli.app import app

    app(arguments, prog_name="moe-runtime")
