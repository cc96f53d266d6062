"""Layers whose experts are layers, with actors of their own, and what is killed under them while they serve."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moe_runtime.config.load import load_config
from moe_runtime.errors import MoERuntimeError
from moe_runtime.experts.build import build_expert
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.recipes import LayerRecipe
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.launch.runtime import serve, upgrade
from moe_runtime.launch.served import Runtime
from moe_runtime.rpc.client import MoEClient
from moe_runtime.wire.messages import Report

#: The cluster and the runtime start within the first test, and each kill waits for a process to come back.
pytestmark = pytest.mark.timeout(180)

LONG_S = 20.0
NUM_CLIENTS = 4
FEED_FORWARD = {"kind": "feed_forward", "options": {"hidden_features": 16, "out_features": 8}}
CONFIG: dict[str, Any] = {
    "name": "nested",
    "device": "cpu",
    "layers": {
        "outer": {"item_shape": [8], "experts": [{"kind": "moe", "options": {"layer": "inner"}}, FEED_FORWARD]},
        "inner": {"item_shape": [8], "experts": [{**FEED_FORWARD, "count": 2}], "timeout_ms": 500},
    },
    "router": {"address": "127.0.0.1:0"},
}


@pytest.fixture(scope="module")
def nested(cluster: str) -> Iterator[Runtime]:
    """A runtime that the tests of this module share; they leave it healthy."""
    with serve(CONFIG) as runtime:
        yield runtime


class Load:
    """Clients that ask for layer ``outer`` again and again, and what they get: one end per request."""

    def __init__(self, address: str) -> None:
        self._client = MoEClient(address)
        self._stopping = threading.Event()
        self.num_asked = 0
        self.ends: list[Report | MoERuntimeError] = []

    def ask(self) -> None:
        while not self._stopping.is_set():
            self.num_asked += 1
            try:
                self.ends.append(self._client.forward(torch.ones(3, 8), layer="outer", timeout_s=LONG_S).report)
            except MoERuntimeError as exc:
                self.ends.append(exc)

    @property
    def last_ends(self) -> list[Report | MoERuntimeError]:
        return self.ends[-NUM_CLIENTS:]

    def stop(self) -> None:
        self._stopping.set()


@contextmanager
def load_on(address: str) -> Iterator[Load]:
    load = Load(address)
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(load.ask) for _ in range(NUM_CLIENTS)]
        try:
            yield load
        finally:
            load.stop()
    for client in clients:
        client.result()


def is_whole(end: Report | MoERuntimeError) -> bool:
    return isinstance(end, Report) and end.num_served == 6


def serves_again(load: Load, eventually: Callable[..., Any]) -> None:
    """Return when a number of requests that were asked from now on were served in full, one after the other."""
    seen = len(load.ends)
    eventually(lambda: len(load.ends) > seen + 2 * NUM_CLIENTS and all(map(is_whole, load.last_ends)))


def accounts_for_everything(load: Load) -> bool:
    reports = [end for end in load.ends if isinstance(end, Report)]
    return len(load.ends) == load.num_asked and all(
        report.num_served + report.num_dropped_capacity + report.num_dropped_failure == 6 for report in reports
    )


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def by_hand(tokens: torch.Tensor) -> torch.Tensor:
    """Top-2 of 2: every expert, weighted by the softmax over both; the inner layer first."""
    recipes = {recipe.name: recipe for recipe in build_layers(load_config(CONFIG))}

    def of_layer(recipe: LayerRecipe) -> torch.Tensor:
        weights = build_routed_layer(recipe).gate(tokens).softmax(dim=-1)
        outputs = [
            of_layer(recipes["inner"]) if expert.spec.kind == "moe" else build_expert(expert.spec).module(tokens)
            for expert in recipe.experts
        ]
        return sum((weights[:, i : i + 1] * output for i, output in enumerate(outputs)), torch.zeros(()))

    with torch.inference_mode():
        return of_layer(recipes["outer"])


def test_the_answer_of_nested_actors_is_the_inner_layer_and_then_the_outer_one(nested: Runtime) -> None:
    tokens = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    with MoEClient(nested.address) as client:
        result = client.forward(tokens, layer="outer", timeout_s=LONG_S)
    assert (result.report.num_served, result.report.num_dropped_failure) == (14, 0)
    assert float((result.outputs - by_hand(tokens)).abs().max()) <= 1e-5
    description = nested.describe()
    assert len({host["pid"] for host in description["hosts"]}) == 4
    assert description["layers"]["outer"]["experts"][0]["replicas"][0]["weights_version"] == "moe:inner"


def test_an_inner_expert_killed_under_load_is_the_inner_layer_s_loss_alone(
    nested: Runtime, eventually: Callable[..., Any]
) -> None:
    [replica] = nested.describe()["layers"]["inner"]["experts"][0]["replicas"]
    with load_on(nested.address) as load:
        serves_again(load, eventually)
        kill(replica["pid"])
        eventually(
            lambda: (
                nested.describe()["layers"]["inner"]["experts"][0]["replicas"][0]["pid"] not in (None, replica["pid"])
            )
        )
        serves_again(load, eventually)
    # The outer layer got an answer from the inner one all the time: what that lost, its other expert served.
    assert accounts_for_everything(load)
    assert all(map(is_whole, load.ends))


def test_a_killed_host_of_a_nested_expert_comes_back_and_finds_its_layer(
    nested: Runtime, eventually: Callable[..., Any]
) -> None:
    [replica] = nested.describe()["layers"]["outer"]["experts"][0]["replicas"]
    with load_on(nested.address) as load:
        serves_again(load, eventually)
        kill(replica["pid"])
        eventually(lambda: not all(map(is_whole, load.last_ends)))
        serves_again(load, eventually)
    assert accounts_for_everything(load)
    assert all(isinstance(end, Report) for end in load.ends)


def test_a_router_killed_under_load_costs_a_remote_runtime_that_expert_until_it_is_back(
    nested: Runtime, eventually: Callable[..., Any]
) -> None:
    remote = {"kind": "remote", "options": {"target": nested.address, "layer": "inner"}}
    outer = {
        **CONFIG,
        "name": "remote",
        "layers": {"outer": {"item_shape": [8], "experts": [remote, FEED_FORWARD], "timeout_ms": 1000}},
    }
    [router] = nested.describe()["routers"]
    with serve(outer, ray=False) as runtime, load_on(runtime.address) as load:
        serves_again(load, eventually)
        kill(router["pid"])
        eventually(lambda: not all(map(is_whole, load.last_ends)))
        serves_again(load, eventually)
    # Every request got one answer, and none an error: what was lost is in the reports.
    assert accounts_for_everything(load)
    assert all(isinstance(end, Report) for end in load.ends)
    lost = [end for end in load.ends if isinstance(end, Report) and end.num_dropped_failure]
    assert {warning for report in lost for warning in report.warnings} == {
        "expert remote-0: its inner layer gave no answer"
    }


def test_a_killed_router_that_serves_both_layers_is_found_again_by_the_runtime_s_own_experts(
    nested: Runtime, eventually: Callable[..., Any]
) -> None:
    [router] = nested.describe()["routers"]
    with load_on(nested.address) as load:
        serves_again(load, eventually)
        kill(router["pid"])
        eventually(lambda: nested.describe()["routers"][0]["pid"] != router["pid"])
        serves_again(load, eventually)
    assert accounts_for_everything(load)


def test_an_inner_layer_is_upgraded_under_load_and_nothing_is_lost(
    nested: Runtime, eventually: Callable[..., Any]
) -> None:
    layers = CONFIG["layers"]
    inner = {**layers["inner"], "experts": [{**FEED_FORWARD, "count": 3}]}
    with load_on(nested.address) as load:
        serves_again(load, eventually)
        upgrade({**CONFIG, "layers": {**layers, "inner": inner}})
        serves_again(load, eventually)
    assert accounts_for_everything(load)
    assert all(map(is_whole, load.ends))
    assert len(nested.describe()["layers"]["inner"]["experts"]) == 3
