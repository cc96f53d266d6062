"""Layers whose experts are layers of the same runtime, as threads of this process: answers, load, and the end."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.secured import ALICE, write_tokens
from moe_runtime.config.load import load_config
from moe_runtime.errors import OverloadedError
from moe_runtime.experts.build import build_expert
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.recipes import LayerRecipe
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.certificates import make_certificates
from moe_runtime.rpc.channels import ClientTLS
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.retries import RetryPolicy

LONG_S = 20.0
NO_RETRY = RetryPolicy(max_attempts=1)
FEED_FORWARD = {"kind": "feed_forward", "options": {"hidden_features": 8, "out_features": 6}}
MOE = {"kind": "moe", "name": "nested", "options": {"layer": "inner"}}

#: An expert that says when it is reached, and waits until it may go on.
PLUG_IN = """
import threading

from torch import nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.experts import ExpertContract, ExpertKind

REACHED, GO_ON = threading.Event(), threading.Event()
GO_ON.set()


class Options(StrictModel):
    pass


class Waiting(nn.Module):
    def __init__(self, in_shape, options):
        super().__init__()
        self.contract = ExpertContract(in_shape, in_shape)

    def forward(self, rows):
        REACHED.set()
        GO_ON.wait()
        return rows


KIND = ExpertKind("waiting", Options, Waiting)
"""


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    info = tmp_path / "waiting_expert-1.0.dist-info"
    info.mkdir()
    (tmp_path / "waiting_expert.py").write_text(PLUG_IN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: waiting-expert\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_runtime.experts]\nwaiting = waiting_expert:KIND\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plug_in = importlib.import_module("waiting_expert")
    yield plug_in
    plug_in.GO_ON.set()


def config(outer: dict[str, Any] | None = None, inner: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "name": "nested",
        "device": "cpu",
        "layers": {
            "outer": {"item_shape": [6], "experts": [MOE, FEED_FORWARD], "timeout_ms": 20_000, **(outer or {})},
            "inner": {"item_shape": [6], "experts": [{**FEED_FORWARD, "count": 3}], **(inner or {})},
        },
        **changes,
        "router": {"address": "127.0.0.1:0", **changes.get("router", {})},
    }


def rows(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(num_rows))


def by_hand(data: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """Top-2 by softmax, renormalised, of each layer: the inner ones first, as an expert of the outer ones."""
    recipes = {recipe.name: recipe for recipe in build_layers(load_config(data))}

    def expert_outputs(recipe: LayerRecipe, given: torch.Tensor) -> list[torch.Tensor]:
        return [
            of_layer(recipes[expert.spec.options["layer"]], given)
            if expert.spec.kind == "moe"
            else build_expert(expert.spec).module(given)
            for expert in recipe.experts
        ]

    def of_layer(recipe: LayerRecipe, given: torch.Tensor) -> torch.Tensor:
        scores = build_routed_layer(recipe).gate(given).softmax(dim=-1)
        weights, chosen = scores.topk(2, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        outputs = torch.stack(expert_outputs(recipe, given), dim=1)
        picked = outputs[torch.arange(len(given)).unsqueeze(1), chosen]
        return (weights.unsqueeze(-1) * picked).sum(dim=1)

    with torch.inference_mode():
        return of_layer(recipes["outer"], tokens)


def in_parallel(num_clients: int, call: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(num_clients) as pool:
        return list(pool.map(call, range(num_clients)))


def test_the_answer_is_the_inner_layer_and_then_the_outer_one() -> None:
    with serve(config(), ray=False) as runtime, MoEClient(runtime.address) as client:
        result = client.forward(rows(9), layer="outer", timeout_s=LONG_S)
        [nested, _] = client.describe()["layers"]["outer"]["experts"]
        inner = {host["host_id"]: host["health"]["inner"] for host in runtime.describe()["hosts"]}
    assert (result.report.num_served, result.report.num_dropped_failure) == (18, 0)
    torch.testing.assert_close(result.outputs, by_hand(config(), rows(9)), rtol=0, atol=1e-5)
    assert (nested["kind"], nested["replicas"][0]["weights_version"]) == ("moe", "moe:inner")
    [counted] = [counts for counts in inner.values() if counts]
    assert (counted["outer/nested/0"]["num_calls"], counted["outer/nested/0"]["num_served"]) == (1, 18)


def test_three_levels_and_a_layer_that_two_others_share_give_what_they_give_by_hand() -> None:
    data = config(inner={"experts": [{"kind": "moe", "options": {"layer": "core"}}, FEED_FORWARD]})
    data["layers"]["core"] = {"item_shape": [6], "experts": [{**FEED_FORWARD, "count": 3}]}
    data["layers"]["outer"]["experts"] = [MOE, {"kind": "moe", "options": {"layer": "core"}}, FEED_FORWARD]
    with serve(data, ray=False) as runtime, MoEClient(runtime.address) as client:
        result = client.forward(rows(9), layer="outer", timeout_s=LONG_S)
    assert result.report.num_served == 18
    torch.testing.assert_close(result.outputs, by_hand(data, rows(9)), rtol=0, atol=1e-5)


def test_an_exact_layer_of_exact_layers_gives_the_same_bits_however_often() -> None:
    data = config(outer={"exact": True}, inner={"exact": True})
    with serve(data, ray=False) as runtime, MoEClient(runtime.address) as client:
        answers = in_parallel(8, lambda _: client.forward(rows(5), layer="outer", timeout_s=LONG_S).outputs)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_one_router_with_one_batch_in_flight_serves_sixteen_clients_of_both_layers() -> None:
    one = {"max_batches_in_flight": 1}
    with serve(config(outer=one, inner=one), ray=False) as runtime, MoEClient(runtime.address) as client:

        def call(number: int) -> list[tuple[int, int]]:
            layer = "inner" if number % 4 == 3 else "outer"
            reports = [client.forward(rows(number + 1), layer=layer, timeout_s=LONG_S).report for _ in range(10)]
            return [(report.num_served, report.num_dropped_failure) for report in reports]

        answers = in_parallel(16, call)
    assert answers == [[(2 * (number + 1), 0)] * 10 for number in range(16)]


@pytest.mark.parametrize(
    "limits",
    [
        {"router": {"max_queued_tokens": 8, "max_batch_tokens": 8}},
        {"limits": {"max_concurrent_requests": 2}},
        {"router": {"max_queued_bytes": 200, "max_batch_tokens": 8}},
    ],
    ids=["tokens", "open requests", "bytes"],
)
def test_with_a_queue_full_of_outer_requests_each_is_answered_in_full_or_refused(limits: dict[str, Any]) -> None:
    one = {"max_batches_in_flight": 1}
    data = config(outer=one, inner=one, **limits)
    with serve(data, ray=False) as runtime, MoEClient(runtime.address, retry_policy=NO_RETRY) as client:

        def call(_: int) -> list[int | None]:
            ends: list[int | None] = []
            for _ in range(10):
                try:
                    report = client.forward(rows(4), layer="outer", timeout_s=LONG_S).report
                    ends.append(report.num_dropped_failure)
                except OverloadedError:
                    ends.append(None)
            return ends

        ends = [end for ends in in_parallel(16, call) for end in ends]
        status = client.status()
    assert len(ends) == 160
    assert set(ends) == {0, None}
    assert status["queue"]["tokens"] == status["open_requests"] == 0


def test_a_request_in_flight_when_its_runtime_drains_still_gets_what_it_needs_of_the_inner_layer(waiting: Any) -> None:
    # One host, and so one after the other: the waiting expert, and then the one that asks the inner layer.
    cpu = {"resources": {"num_gpus": 0}}
    experts = [{"kind": "waiting", **cpu}, {**MOE, **cpu}]
    data = config(outer={"experts": experts, "experts_per_actor": 2, "policy": {"kind": "dense"}})
    with ThreadPoolExecutor(2) as pool, serve(data, ray=False) as runtime, MoEClient(runtime.address) as client:
        waiting.REACHED.clear()
        waiting.GO_ON.clear()
        answer = pool.submit(client.forward, rows(3), layer="outer", timeout_s=LONG_S)
        assert waiting.REACHED.wait(LONG_S)
        closing = pool.submit(runtime.close)
        with MoEClient(runtime.address, retry_policy=NO_RETRY) as watcher:
            give_up = threading.Event()
            while not watcher.status()["draining"]:
                assert not give_up.wait(0.01)
        waiting.GO_ON.set()
        report = answer.result(LONG_S).report
        assert closing.result(LONG_S)
    assert (report.num_served, report.num_dropped_failure) == (6, 0)


def test_an_inner_layer_that_is_late_costs_the_outer_one_that_expert_alone(waiting: Any) -> None:
    data = config(
        outer={"policy": {"kind": "dense"}, "timeout_ms": 1000},
        inner={"experts": [{"kind": "waiting"}], "policy": {"kind": "switch"}},
    )
    with serve(data, ray=False) as runtime, MoEClient(runtime.address) as client:
        waiting.GO_ON.clear()
        late = client.forward(rows(3), layer="outer", timeout_s=LONG_S).report
        waiting.GO_ON.set()
    assert (late.num_served, late.num_dropped_failure) == (3, 3)
    assert late.warnings == ("expert nested: its inner layer gave no answer",)


def test_a_runtime_with_tokens_and_certificates_asks_itself_as_any_client_does(tmp_path: Path) -> None:
    files = make_certificates(tmp_path / "certs")
    (tmp_path / "token").write_text(ALICE)
    options = {"layer": "inner", "ca": str(files.ca), "token_file": str(tmp_path / "token")}
    data = config(outer={"experts": [{**MOE, "options": options}, FEED_FORWARD]})
    data["security"] = {
        "tls": {"cert": str(files.server), "key": str(files.server_key)},
        "tokens": str(write_tokens(tmp_path / "tokens.json")),
    }
    tls = ClientTLS(ca=files.ca)
    with serve(data, ray=False) as runtime, MoEClient(runtime.address, tls=tls, token=ALICE) as client:
        assert client.forward(rows(3), layer="outer", timeout_s=LONG_S).report.num_served == 6
