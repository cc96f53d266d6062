"""Writes ``docs/configuration.md``: ``python -m moe_runtime.cli.configuration_page PATH`` (``make docs``)."""

from __future__ import annotations

import sys
from pathlib import Path

from moe_runtime.config.reference import configuration_page
from moe_runtime.experts.registry import built_in_kinds
from moe_runtime.launch.nested.kinds import register_nested_kinds


def current_page() -> str:
    """The page as the models of configuration and of the built-in kinds have it now."""
    register_nested_kinds()
    return configuration_page({name: kind.options for name, kind in built_in_kinds().items()})


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(current_page(), encoding="utf-8")
