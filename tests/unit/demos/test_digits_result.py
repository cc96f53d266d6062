from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from moe_runtime.demos.digits.result import DigitsResult
from moe_runtime.demos.errors import DemoError


@pytest.mark.parametrize("difference", [1.1e-5, math.inf, math.nan])
def test_a_difference_beyond_rounding_fails_the_demo(difference: float, result: DigitsResult) -> None:
    with pytest.raises(DemoError, match="reference"):
        replace(result, max_difference=difference).check()


def test_an_accuracy_below_96_percent_fails_the_demo(result: DigitsResult) -> None:
    with pytest.raises(DemoError, match=r"at least 96%, found 95\.90%"):
        replace(result, accuracy=0.959).check()


def test_the_json_file_holds_every_figure(result: DigitsResult, tmp_path: Path) -> None:
    result.write_json(tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())

    assert written["accuracy"] == result.accuracy
    assert written["max_difference"] == result.max_difference
    assert written["config_path"] == str(result.config_path)
    assert [expert["accuracy"] for expert in written["experts"]] == [expert.accuracy for expert in result.experts]
    assert {"tokens_per_s", "p50_ms", "p99_ms", "num_dropped_capacity", "num_dropped_failure", "batch_sizes"} <= set(
        written
    )
