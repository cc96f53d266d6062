"""The page of routers has every preset and every policy as the code has them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from moe_runtime.cli.presets_page import with_table
from moe_runtime.config.gates import GateConfig
from moe_runtime.config.policies import PolicyConfig

PAGE = Path(__file__).parents[3] / "docs" / "routers.md"


def kinds(union: object) -> list[str]:
    models = get_args(get_args(union)[0])
    return [get_args(model.model_fields["kind"].annotation)[0] for model in models]


def test_the_table_of_presets_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text, "run `make docs`"


def test_every_policy_has_its_section_and_its_plot() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for kind in kinds(PolicyConfig):
        assert f"\n### `{kind}`\n" in text
        assert f"(images/routers-{kind}.svg)" in text


def test_every_kind_of_gate_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [kind for kind in kinds(GateConfig) if f"| `{kind}` |" not in text] == []
