from typing import Literal

from pydantic import Field

from moe_runtime.config.reference import configuration_page
from moe_runtime.config.strict import StrictModel


class PaddedOptions(StrictModel):
    """Pads ``rows``."""

    width: int = Field(ge=1, le=9, description="How far.")
    side: Literal["left", "right"] | None = Field(None, description="Where | how.")
    label: str = "none"


class NoOptions(StrictModel):
    """Takes nothing."""


PAGE = configuration_page({"padded": PaddedOptions, "plain": NoOptions})


def test_a_required_key_is_listed_with_its_limits() -> None:
    assert "| `width` | integer, ≥ 1, ≤ 9 | required | How far. |" in PAGE


def test_an_optional_key_is_listed_with_its_default_and_cannot_break_the_table() -> None:
    assert "| `side` | `left` or `right` or `null` | `null` | Where \\| how. |" in PAGE
    assert "| `label` | text | `none` |  |" in PAGE


def test_a_kind_without_options_says_so() -> None:
    assert "### `plain`\n\nTakes nothing.\n\nNo keys.\n" in PAGE


def test_every_block_is_found_under_its_path() -> None:
    for heading in (
        "## The top level",
        "## `layers.<name>`",
        "## `layers.<name>.gate`, kind `mlp`",
        "## `layers.<name>.experts.<n>.view`",
        "## `router`",
        "### `padded`\n\nPads `rows`.",
    ):
        assert f"{heading}\n" in PAGE


def test_names_lists_and_tuples_are_described_in_plain_words() -> None:
    assert "| `layers` | mapping of name to block | required |" in PAGE
    assert "| `item_shape` | list of integers, 1 or more | required |" in PAGE
    assert "| `columns` | [integer, integer] or `null` | `null` |" in PAGE
