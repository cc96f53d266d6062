"""What ``validate`` prints of the experts of a layer."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from moe_runtime.cli.validation import print_summary
from moe_runtime.launch.build import validate


def printed(**layer: object) -> str:
    experts = [{"kind": "identity", "count": 3}, {"kind": "zero"}]
    config = {"device": "cpu", "layers": {"small": {"item_shape": [4], "experts": experts, **layer}}}
    console = Console(file=io.StringIO(), width=160)
    print_summary(validate(config), config=Path("config.yaml"), console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_shared_experts_stand_apart_from_those_that_are_routed_to() -> None:
    assert "3 identity, 1 zero; shared: 2 identity" in printed(shared_experts=[{"kind": "identity", "count": 2}])
    assert "shared" not in printed()
