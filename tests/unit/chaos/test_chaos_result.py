"""What a run reports: verdict, JSON, screen and page."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moe_runtime.chaos.errors import ChaosError
from moe_runtime.chaos.ledger import Ending, Sums
from moe_runtime.chaos.page import fill_page
from moe_runtime.chaos.render import show_result
from moe_runtime.chaos.result import ChaosResult, Spread, sums_of

DOCS = Path(__file__).parents[3] / "docs"
SUMS = Sums(
    num_requests=10,
    endings=Counter({Ending.OK: 8, Ending.TYPED_ERROR: 1, Ending.TRANSPORT_ERROR: 1}),
    errors=Counter(DeadlineExceededError=1, UnavailableError=1),
    counts=Counter(num_served=30, num_dropped_failure=2, num_rerouted=3),
    num_excused=1,
    worst_overshoot_s=0.0421,
)
RESULT = ChaosResult(
    seed=7,
    minutes=2.0,
    load_s=121.5,
    was_stopped=False,
    messages={"DeadlineExceededError": "too [late]"},
    num_leaks=0,
    mistakes=(),
    num_kills=2,
    num_faults={"kill_expert": 2, "slow": 1},
    latency_ms=Spread.of([0.001, 0.002, 0.003]),
    worst_lag_ms=12.0,
    counters_compared={"exact": 3},
    is_whole_again=True,
    back_ms={"kill_expert": Spread.of([4.0])},
    growth=(),
    recovery_ms={"kill_to_noticed": Spread.of([0.02, 0.03]), "kill_to_other_answer": None},
    **sums_of(SUMS),
)


def screen(result: ChaosResult) -> str:
    console = Console(file=io.StringIO(), width=200)
    show_result(console, result)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_times_become_milliseconds():
    assert Spread.of([0.001, 0.003]) == Spread(count=2, p50=2.0, p99=2.98, max=3.0)
    assert Spread.of([]) is None


def test_nothing_wrong_is_no_error():
    assert RESULT.broken == {}
    RESULT.check()


@pytest.mark.parametrize("promise", ["num_wrong", "num_lost", "num_late", "num_leaks"])
def test_each_broken_promise_is_an_error_that_names_it_and_the_seed(promise: str):
    with pytest.raises(ChaosError, match=f"seed 7: .*found {promise} 2"):
        replace(RESULT, **{promise: 2}).check()


def test_json_has_every_figure(tmp_path: Path):
    path = tmp_path / "result.json"
    RESULT.write_json(path, machine={"cores": 2})
    found = json.loads(path.read_text())
    assert found["machine"] == {"cores": 2}
    assert (found["num_requests"], found["num_ok"], found["num_typed_errors"]) == (10, 8, 1)
    assert (found["served"], found["dropped_failure"], found["rerouted"], found["hedged"]) == (30, 2, 3, 0)
    assert found["latency_ms"] == {"count": 3, "p50": 2.0, "p99": 2.98, "max": 3.0}
    assert found["recovery_ms"]["kill_to_noticed"]["max"] == 30.0
    assert found["num_faults"] == {"kill_expert": 2, "slow": 1}


def test_the_screen_shows_verdict_faults_errors_and_mistakes():
    shown = screen(replace(RESULT, num_wrong=1, mistakes=("request 3: outputs: 1 rows are not [finite]",)))
    assert "10 in 122 s: 8 answered, 1 typed errors, 1 without a router" in shown
    assert "1 DeadlineExceededError: too [late]" in shown
    assert "3: kill_expert 2, slow 1; 2 killed" in shown
    assert "1 wrong, 0 lost, 0 late, 0 leaked" in shown
    assert "request 3: outputs: 1 rows are not [finite]" in shown


def test_the_page_of_the_documentation_takes_a_result(tmp_path: Path):
    RESULT.write_json(tmp_path / "r.json", machine={"cpu": "Z80", "cores": 2, "commit": "abc"})
    result = json.loads((tmp_path / "r.json").read_text())
    page = fill_page((DOCS / "reliability.md").read_text(), result)
    assert "| requests | 10 |" in page
    assert "| **wrong, lost, late, leaked** | **0, 0, 0, 0** |" in page
    assert "| kill to noticed | < 100 ms | 25 | 30 | 2 |" in page
    assert "*Seed 7, 2 min of load on " in page
    assert "commit `abc`, Z80, 2 cores.*" in page
    assert fill_page(page, result) == page


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ChaosError, match="expected places for ledger, recovery, found ledger"):
        fill_page(
            "<!-- figures: ledger -->\n<!-- end -->",
            {**vars(RESULT), "machine": {}, "date": ""}
            | {"latency_ms": {"p50": 1, "p99": 1, "max": 1}, "recovery_ms": {}},
        )
