"""Layers with shared experts, served as threads and asked over gRPC, equal the slow oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import moe_runtime as moe
from fakes.faulty_experts import FAULTS, install
from moe_runtime.config.load import load_config
from moe_runtime.experts.build import build_expert
from moe_runtime.launch.build import build_layers, validate
from moe_runtime.launch.recipes import LayerRecipe
from moe_runtime.launch.router_process import build_routed_layer
from moe_runtime.routing.reference.choices import RoutedPair, RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules, forward_reference, route_reference

WIDTH, NUM_EXPERTS, TOP_K, NUM_SHARED = 16, 4, 2, 2
FEED_FORWARD = {"kind": "feed_forward", "options": {"hidden_features": 24}}


def config(**layer: Any) -> dict[str, Any]:
    return {
        "name": "sharing",
        "device": "cpu",
        "router": {"address": "127.0.0.1:0", "max_batch_tokens": 32},
        "layers": {
            "layer": {
                "item_shape": [WIDTH],
                "policy": {"kind": "top_k", "k": TOP_K},
                "timeout_ms": 20_000,
                "experts": [{**FEED_FORWARD, "count": NUM_EXPERTS}],
                "shared_experts": [{**FEED_FORWARD, "name": "common", "count": NUM_SHARED}],
                **layer,
            }
        },
    }


def random_tokens(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


class Oracle:
    """The same layer, worked out token by token."""

    def __init__(self, served: dict[str, Any], tokens: torch.Tensor, **wishes: Any) -> None:
        (recipe,) = build_layers(load_config(served))
        gate = build_routed_layer(recipe).gate
        with torch.inference_mode():
            gated = None if recipe.shared_gate == "none" else gate.shared_weights(tokens).tolist()
            inputs = RoutingInputs(gate(tokens), shared_weights=gated, **wishes)
            rules = self.rules_of(recipe)
            self.pairs = route_reference(inputs, rules)
            self.outputs = forward_reference(tokens, inputs, rules, experts=self.experts_of(recipe))

    @staticmethod
    def rules_of(recipe: LayerRecipe) -> RoutingRules:
        return RoutingRules(
            recipe.policy, recipe.capacity, recipe.residual, recipe.weight_on, num_shared=recipe.num_shared
        )

    @staticmethod
    def experts_of(recipe: LayerRecipe) -> list[Any]:
        modules = [build_expert(expert.spec).module for expert in recipe.experts]
        return [lambda row, module=module: module(row.float()[None])[0].double() for module in modules]

    def routed(self) -> list[RoutedPair]:
        """What the policy asked for, as a report lists it."""
        pairs = [pair for pair in self.pairs if not pair.shared]
        return sorted(pairs, key=lambda pair: (pair.token, pair.rank))

    def shared_weights(self, num_tokens: int) -> list[list[float]]:
        weights = np.zeros((num_tokens, NUM_SHARED))
        for pair in self.pairs:
            if pair.shared:
                weights[pair.token, pair.expert - NUM_EXPERTS] = pair.weight
        return weights.tolist()


@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"shared_gate": "sigmoid"},
        {"shared_gate": "sigmoid", "residual": "blend", "capacity": {"factor": 0.75, "min": 1}},
        {"weight_on": "input", "residual": "add", "policy": {"kind": "top_k", "k": 1, "score": "sigmoid"}},
    ],
)
def test_answers_and_their_routing_are_those_of_the_oracle(layer: dict[str, Any]) -> None:
    served, tokens = config(**layer), random_tokens(20)
    mask = np.arange(20) % 5 != 3
    with moe.serve(served, ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        options = moe.RequestOptions(mask=mask)
        result = client.forward(tokens, layer="layer", options=options, timeout_s=30.0, return_routing=True)
        (described,) = client.describe()["layers"].values()
    oracle, report = Oracle(served, tokens, mask=mask.tolist()), result.report
    torch.testing.assert_close(result.outputs.double(), oracle.outputs, rtol=1e-4, atol=1e-5)
    assert report.token_ids.tolist() == [pair.token for pair in oracle.routed()]
    assert report.expert_ids.tolist() == [pair.expert for pair in oracle.routed()]
    np.testing.assert_allclose(report.expert_weights, [pair.weight for pair in oracle.routed()], rtol=1e-4)
    np.testing.assert_allclose(report.shared_weights, oracle.shared_weights(20), rtol=1e-4)
    assert report.num_assignments == len(oracle.routed()) == report.num_served + report.num_dropped_capacity
    assert (report.num_shared_served, report.num_shared_dropped) == (int(mask.sum()) * NUM_SHARED, 0)
    assert described["num_shared"] == NUM_SHARED
    names = {expert["name"]: expert["shared"] for expert in described["experts"]}
    assert names == {f"feed_forward-{i}": False for i in range(4)} | {f"common-{i}": True for i in range(2)}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The same bits need the same number of threads, here and in the threads that experts run in."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_one_process(tokens: torch.Tensor, served: dict[str, Any]) -> torch.Tensor:
    """The layer as anybody would write it: the routed sum, then each shared expert's output times its weight."""
    (recipe,) = build_layers(load_config(served))
    gate = build_routed_layer(recipe).gate
    modules = [build_expert(expert.spec).module for expert in recipe.experts]
    with torch.inference_mode():
        scores, expert_ids = torch.topk(torch.softmax(gate(tokens), dim=-1), TOP_K)
        weights = scores / scores.sum(dim=-1, keepdim=True)
        slots = torch.zeros(tokens.shape[0] * TOP_K, WIDTH)
        for expert_id, module in enumerate(modules[:NUM_EXPERTS]):
            chosen = (expert_ids.reshape(-1) == expert_id).nonzero().squeeze(1)
            slots[chosen] = module(tokens[chosen // TOP_K])
        outputs = (slots * weights.reshape(-1, 1)).view(-1, TOP_K, WIDTH).sum(dim=1)
        shared_weights = gate.shared_weights(tokens)
        for place, module in enumerate(modules[NUM_EXPERTS:]):
            outputs = outputs + module(tokens) * shared_weights[:, place : place + 1]
        return outputs


def test_a_request_without_rows_gets_a_weight_column_for_each_shared_expert() -> None:
    with moe.serve(config(), ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        report = client.forward(random_tokens(0), layer="layer", return_routing=True, timeout_s=20).report
        bare = client.forward(random_tokens(0), layer="layer", timeout_s=20).report
    assert report.shared_weights.shape == (0, NUM_SHARED)
    assert bare.shared_weights is None


@pytest.mark.usefixtures("one_thread")
def test_an_exact_layer_with_shared_experts_gives_the_bits_of_one_process() -> None:
    served = config(exact=True, shared_gate="sigmoid", residual="none")
    with moe.serve(served, ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        for seed, num_tokens in enumerate((1, 7, 32)):
            tokens = random_tokens(num_tokens, seed)
            result = client.forward(tokens, layer="layer", timeout_s=30.0)
            assert torch.equal(result.outputs, in_one_process(tokens, served))


def test_rows_that_a_shared_expert_fails_cost_that_part_of_their_sum_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site"))
    served = config(experts=[{"kind": "identity", "count": 2}], shared_experts=[{"kind": "faulty"}])
    tokens = random_tokens(4)
    tokens[2, 0] = FAULTS["raise"]
    with moe.serve(served, ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        result = client.forward(tokens, layer="layer", timeout_s=30.0, return_routing=True)
        (described,) = client.status()["layers"].values()
    # Of an identity that all weights add up to 1, and a shared expert that gives ten times its rows.
    expected = tokens * torch.tensor([11.0, 11.0, 1.0, 11.0])[:, None]
    torch.testing.assert_close(result.outputs, expected, rtol=1e-5, atol=1e-5)
    report = result.report
    assert (report.num_served, report.num_dropped_failure, report.num_rerouted) == (8, 0, 0)
    assert (report.num_shared_served, report.num_shared_dropped) == (3, 1)
    assert report.shared_weights.tolist() == [[1.0], [1.0], [0.0], [1.0]]
    assert "expert faulty-0: " in report.warnings[0]
    assert described["experts"][2]["num_dropped_failure"] == 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            {"shared_experts": [{"kind": "identity", "name": "feed_forward-1"}, {"kind": "identity", "name": "twice"}],
             "experts": [{**FEED_FORWARD, "name": "twice"}, {**FEED_FORWARD, "name": "other"}]},
            r"layers\.layer\.shared_experts\.1\.name: expected a name that no other .* 'twice', which experts\.0 has",
        ),
        (
            {"shared_experts": [{"kind": "feed_forward", "options": {"hidden_features": 8, "out_features": 3}}]},
            r"layers\.layer\.shared_experts\.0: expected output rows of shape \[16\], which layers\.layer\.experts\.0",
        ),
        (
            {"shared_experts": [{"kind": "identity", "resources": {"num_gpus": 1}}]},
            r"layers\.layer\.shared_experts\.0\.resources\.num_gpus: expected 0 or nothing with device cpu, found 1",
        ),
        (
            {"shared_experts": [], "shared_gate": "sigmoid"},
            r"layers\.layer.*shared_gate: expected none without shared_experts, found sigmoid",
        ),
        (
            {"residual": "blend", "shared_experts": [],
             "experts": [{"kind": "feed_forward", "count": 2, "options": {"hidden_features": 8, "out_features": 3}}]},
            r"layers\.layer\.residual: expected none, found blend: tokens have shape \[16\], outputs \[3\]",
        ),
    ],
)  # fmt: skip
def test_a_configuration_of_shared_experts_that_cannot_be_is_refused(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(moe.ConfigError, match=message):
        validate(config(**layer))


def test_a_summary_tells_shared_experts_from_the_others() -> None:
    (summary,) = validate(config()).layers
    assert summary.experts == {f"feed_forward-{i}": "feed_forward" for i in range(4)}
    assert summary.shared_experts == {f"common-{i}": "feed_forward" for i in range(2)}
    assert summary.num_actors == NUM_EXPERTS + NUM_SHARED
