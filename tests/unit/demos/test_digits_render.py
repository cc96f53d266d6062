from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from moe_runtime.demos.digits.render import show_result
from moe_runtime.demos.digits.result import DigitsResult


def shown(result: DigitsResult, *, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show_result(console, result, address="127.0.0.1:50051")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_tables_keep_their_lines_whole(width: int, result: DigitsResult) -> None:
    text = shown(result, width=width)
    table = text.partition("config")[0].splitlines()

    assert max(map(len, table)) <= width
    assert len(table) == 1 + 1 + 5 + 1 + 1 + 7 + 1
    assert not any("…" in line for line in table)


@pytest.mark.parametrize("width", [40, 80])
def test_commands_are_never_broken_so_that_they_can_be_pasted(width: int, result: DigitsResult) -> None:
    lines = shown(result, width=width).splitlines()

    assert any(line.endswith(f" serve {result.config_path}") for line in lines)
    assert '    result = client.forward(images, layer="digits", return_routing=True)' in lines


def test_every_expert_is_a_line_with_its_actor_and_accuracy(result: DigitsResult) -> None:
    text = shown(replace(result, experts=(replace(result.experts[0], pid=4321, accuracy=0.98765),)), width=80)

    (line,) = [line for line in text.splitlines() if line.startswith("conv")]
    assert "pid 4321" in line
    assert "98.8 %" in line


def test_failures_are_told_apart_from_full_experts(result: DigitsResult) -> None:
    text = shown(replace(result, num_assignments=1000, num_dropped_capacity=12, num_dropped_failure=3), width=80)

    assert "15 of 1,000 assignments, 1.5 %: 12 full, 3 failed" in text
