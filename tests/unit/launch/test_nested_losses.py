"""Layers whose experts are layers, as threads of this process: inner layers that serve nothing, or couple requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_runtime.launch.nested.asked_layer import AskedLayer
from moe_runtime.launch.nested.tally import total_loss
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient
from moe_runtime.service.report import empty_report
from moe_runtime.service.requests import LayerRequest

LONG_S = 20.0
ROWS = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
FEED_FORWARD = {"kind": "feed_forward", "options": {"hidden_features": 8, "out_features": 6}}
NESTED = {"kind": "moe", "name": "nested", "options": {"layer": "inner"}}
#: Nobody listens there: each call fails.
LOST = {"kind": "remote", "options": {"target": "127.0.0.1:9", "layer": "far", "timeout_ms": 200}}
EXPERT_CHOICE = {"kind": "expert_choice"}
DENSE = {"kind": "dense"}
NO_ASSIGNMENTS = empty_report(LayerRequest("r", "inner", torch.zeros(0, 6)), table_version=1, warnings=("w",))


def layer(*experts: dict[str, Any], policy: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"item_shape": [6], "experts": [*experts], "policy": policy, "timeout_ms": 20_000, **changes}


def config(**layers: dict[str, Any]) -> dict[str, Any]:
    return {"device": "cpu", "layers": layers, "router": {"address": "127.0.0.1:0"}}


def asked(data: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """What layer ``outer`` answers, and the counters of its expert ``nested``."""
    with serve(data, ray=False) as runtime, MoEClient(runtime.address) as client:
        result = client.forward(ROWS, layer="outer", timeout_s=LONG_S)
        health = {host["host_id"]: host["health"] for host in runtime.describe()["hosts"]}
    return result, health["outer/nested/0"]["inner"]["outer/nested/0"]


def test_an_inner_layer_that_lost_everything_is_a_failed_expert_of_the_outer_one() -> None:
    data = config(outer=layer(NESTED, FEED_FORWARD, policy=DENSE), inner=layer(LOST, policy=DENSE))
    result, counts = asked(data)
    report = result.report
    assert (report.num_served, report.num_dropped_failure) == (9, 9)
    assert report.warnings == ("expert nested: its inner layer served nothing",)
    assert (counts["num_calls"], counts["num_failed_calls"], counts["num_dropped_failure"]) == (1, 1, 9)


def test_rows_of_an_inner_layer_that_lost_everything_go_where_the_outer_one_says() -> None:
    top_1 = {"kind": "top_k", "k": 1}
    rerouted = {"order": ["reroute", "drop"]}
    data = config(outer=layer(NESTED, FEED_FORWARD, policy=top_1, on_failure=rerouted), inner=layer(LOST, policy=DENSE))
    result, counts = asked(data)
    report = result.report
    assert (report.num_served, report.num_dropped_failure) == (9, 0)
    assert report.num_rerouted == counts["num_dropped_failure"] > 0
    assert report.warnings == ("expert nested: its inner layer served nothing; rerouted",)


def test_an_inner_layer_that_lost_a_part_has_answered_and_its_host_counts_the_loss() -> None:
    data = config(outer=layer(NESTED, FEED_FORWARD, policy=DENSE), inner=layer(LOST, FEED_FORWARD, policy=DENSE))
    result, counts = asked(data)
    report = result.report
    assert (report.num_served, report.num_dropped_failure, report.warnings) == (18, 0, ())
    assert (counts["num_served"], counts["num_dropped_failure"]) == (9, 9)
    assert "num_failed_calls" not in counts


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"num_assignments": 8, "num_dropped_failure": 8}, "served none of 8 assignments: w"),
        (
            {"num_assignments": 8, "num_dropped_failure": 1, "num_dropped_capacity": 7},
            "served none of 8 assignments: w",
        ),
        (
            {"num_assignments": 8, "num_dropped_failure": 8, "num_shared_dropped": 4},
            "served none of 12 assignments: w",
        ),
        # Shared experts alone were asked.
        ({"num_shared_dropped": 4}, "served none of 4 assignments: w"),
        ({"num_assignments": 8, "num_dropped_failure": 8, "num_shared_served": 4}, None),
        ({"num_assignments": 8, "num_dropped_failure": 7, "num_served": 1}, None),
        # Its capacity is what the layer was given: nothing failed.
        ({"num_assignments": 8, "num_dropped_capacity": 8}, None),
        ({}, None),
    ],
)
def test_all_is_lost_where_something_failed_and_nothing_was_served(
    counts: dict[str, int], expected: str | None
) -> None:
    assert total_loss(replace(NO_ASSIGNMENTS, **counts)) == expected


@pytest.mark.parametrize("allowed", [False, True])
def test_a_layer_elsewhere_whose_requests_would_change_each_other_s_answers_has_to_allow_it(
    allowed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    far = layer(FEED_FORWARD, FEED_FORWARD, policy=EXPERT_CHOICE, allow_batch_coupled=allowed)
    with serve(config(far=far), ray=False) as there, MoEClient(there.address) as client:
        described = client.describe()["layers"]["far"]
        remote = {"kind": "remote", "name": "far", "options": {"target": there.address, "layer": "far"}}
        outer = layer(remote, FEED_FORWARD, policy=DENSE)
        with serve(config(outer=outer), ray=False) as here, MoEClient(here.address) as client:
            report = client.forward(ROWS, layer="outer", timeout_s=LONG_S).report
    refusal = "far: allow_batch_coupled: expected true in the layer's configuration, found false: its policy, expert_ch"
    assert described["batch_coupled"] is not allowed
    assert (refusal in caplog.text) is not allowed
    assert (report.num_served, report.num_dropped_failure) == ((18, 0) if allowed else (9, 9))
    assert report.warnings == (() if allowed else ("expert far: its inner layer gave no answer",))


def test_routers_that_do_not_say_whether_requests_are_kept_apart_are_asked_all_the_same() -> None:
    described = {"item_shape": [6], "out_shape": [6], "dtype": "float32", "gate_features": 6, "policy": "top_k"}
    expected = AskedLayer("far", "layer far", (6,), (6,))
    assert expected.mistake_in({"layers": {"far": described}}, dtype="float32") is None
    told = {**described, "batch_coupled": True}
    assert "allow_batch_coupled" in str(expected.mistake_in({"layers": {"far": told}}, dtype="float32"))
