"""The page of routers has every preset and every policy as the code has them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter

from moe_runtime.cli.presets_page import with_table
from moe_runtime.config.gates import GateConfig
from moe_runtime.config.policies import PolicyConfig
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.wire.messages import Report, RequestOptions

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
        # Their caller spreads the tokens of such layers.
        assert kind == "caller" or f"(img/routers-{kind}.svg)" in text


def test_every_kind_of_gate_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [kind for kind in kinds(GateConfig) if f"| `{kind}` |" not in text] == []


def test_the_table_of_policies_says_what_they_do() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text(encoding="utf-8").splitlines()]
    cells = {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 6}
    readings = {"row_seeds": "`seed`", "token_ids": "`token_ids`", "row_ids": "row"}
    for kind in kinds(PolicyConfig):
        policy = build_policy(TypeAdapter(PolicyConfig).validate_python({"kind": kind}), num_experts=8)
        _, *found = cells[kind]
        yes_or_no = {True: "yes", False: "no"}
        assert found == [
            yes_or_no[policy.accepts_k],
            yes_or_no[policy.batch_coupled],
            ", ".join(readings[fact] for fact in sorted(policy.reads)),
            yes_or_no[policy.can_reroute],
        ]


def asking() -> str:
    """The section on what a request may ask for."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition("\n## What a request may ask for\n")
    return rest.partition("\n## ")[0]


def test_every_option_of_a_request_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", asking(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(field.name for field in dataclasses.fields(RequestOptions))


def test_the_python_code_on_the_page_runs_and_gives_what_it_says() -> None:
    [code] = re.findall(r"```python\n(.*?)```", asking(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    report = names["report"]
    assert isinstance(report, Report)
    assert report.token_ids is not None
    assert report.expert_ids is not None
    assert report.token_ids.tolist() == [0, 1, 1, 2, 2]
    assert report.expert_ids[0] == report.expert_ids[1]
    assert report.warnings == ("option seed has no effect: nothing in layer mixer is drawn at random",)
