"""The command line, `moe-runtime`: serve, validate, status and demo."""

from moe_runtime.cli.entry import main

__all__ = ["main"]
