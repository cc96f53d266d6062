"""Experts are selected by the bias of the table that their batch uses, and counted as they were asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from fakes.service import FakeClock, FakeTransport, logits_for, make_layer, table_of, tokens_of
from moe_runtime.config.models import CapacityConfig, OnFailureConfig
from moe_runtime.routing.assignments import Assignments, Grid, WeightRule
from moe_runtime.routing.policy import Policy, TokenInfo
from moe_runtime.service.batch import Batch
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.layer import ExpertInfo, RoutedLayer
from moe_runtime.service.online_bias import LayerBias
from moe_runtime.service.routing_table import RoutingTable


@dataclass(frozen=True, kw_only=True)
class Biased(Policy):
    """Each token goes to the expert of its highest logit plus bias; keeps the biases that it was given."""

    uses_bias: bool = True
    can_reroute: bool = True
    given: list[torch.Tensor | None] = field(default_factory=list)

    def select(self, logits: torch.Tensor, info: TokenInfo) -> Assignments:
        self.given.append(info.expert_bias)
        biased = logits if info.expert_bias is None else logits + info.expert_bias
        expert_ids = biased.argmax(1, keepdim=True)
        return Assignments(
            choices=Grid(expert_ids, logits.gather(1, expert_ids)),
            all_scores=logits,
            num_tokens=logits.shape[0],
            num_experts=self.num_experts,
            weight_rule=self.weight_rule,
        )


class BiasedGate(torch.nn.Module):
    """A gate whose router logits are its input, with a bias of its own."""

    def __init__(self, *own: float) -> None:
        super().__init__()
        self.register_buffer("expert_bias", torch.tensor(own) if own else None)

    def forward(self, gate_input: torch.Tensor, *, tasks: torch.Tensor | None = None) -> torch.Tensor:
        return gate_input


def biased(table: RoutingTable, *values: float) -> RoutingTable:
    names = tuple(f"expert-{i}" for i in range(len(values)))
    return replace(table, biases={"layer": LayerBias(names, values, num_steps=1)})


class Bench:
    """An engine with a layer of two experts at hosts 10 and 11."""

    def __init__(self, *own: float, **changes: object) -> None:
        self.policy = Biased(num_experts=2, max_k=1, weight_rule=WeightRule(normalize="none"))
        self.layer: RoutedLayer = make_layer(**{"policy": self.policy, "gate": BiasedGate(*own), **changes})
        self.transport = FakeTransport()
        self.engine = RouterEngine({"layer": self.layer}, self.transport, node="here", clock=FakeClock())

    def submit(self, logits: torch.Tensor) -> int:
        return self.engine.submit(Batch("layer", tokens_of(len(logits)), gate_input=logits))

    def hosts(self) -> list[int]:
        hosts = [where.incarnation for where, _ in self.transport.sent]
        self.transport.sent.clear()
        return hosts

    @property
    def asked(self) -> list[int]:
        return [expert.num_asked for expert in self.engine.stats.layers["layer"].experts]


def test_without_a_bias_in_the_table_the_gate_has_the_say() -> None:
    bench = Bench(0.0, 1.0)
    bench.engine.set_table(table_of(1, 10, 11))
    bench.submit(torch.tensor([[0.5, 0.0]]))
    assert bench.hosts() == [11]


def test_the_bias_of_the_table_is_added_to_that_of_the_gate() -> None:
    bench = Bench(0.0, 1.0)
    bench.engine.set_table(biased(table_of(1, 10, 11), 0.3, -0.3))
    bench.submit(torch.tensor([[0.5, 0.0]]))
    bench.submit(torch.tensor([[0.3, 0.0]]))
    assert bench.hosts() == [10, 11]


def test_a_gate_without_a_bias_takes_that_of_the_table() -> None:
    bench = Bench()
    bench.engine.set_table(biased(table_of(1, 10, 11), -0.5, 0.5))
    bench.submit(torch.tensor([[0.5, 0.0]]))
    assert bench.hosts() == [11]


def test_a_policy_that_uses_no_bias_is_given_none() -> None:
    policy = Biased(num_experts=2, max_k=1, weight_rule=WeightRule(), uses_bias=False)
    bench = Bench(5.0, 0.0, policy=policy)
    bench.engine.set_table(biased(table_of(1, 10, 11), -9.0, 9.0))
    bench.submit(torch.tensor([[0.5, 0.0]]))
    assert policy.given == [None]


def test_the_bias_is_made_once_per_table() -> None:
    bench = Bench(0.0, 0.0)
    bench.engine.set_table(biased(table_of(1, 10, 11), -0.5, 0.5))
    for _ in range(2):
        bench.submit(torch.tensor([[0.5, 0.0]]))
    bench.engine.set_table(biased(table_of(2, 10, 11), -0.5, 0.5))
    bench.submit(torch.tensor([[0.5, 0.0]]))
    first, second, third = bench.policy.given
    assert first is second
    assert third is not second


def test_a_batch_in_flight_keeps_its_bias_and_its_version() -> None:
    bench = Bench(0.0, 0.0)
    bench.engine.set_table(biased(table_of(1, 10, 11), 0.0, 0.0))
    first = bench.submit(torch.tensor([[0.5, 0.0], [0.5, 0.0]]))
    bench.engine.set_table(biased(table_of(2, 10, 11), -0.5, 0.5))
    second = bench.submit(torch.tensor([[0.5, 0.0], [0.5, 0.0]]))
    for _, request in bench.transport.sent:
        bench.transport.answer(request)
    assert bench.hosts() == [10, 11]
    results = {result.batch_id: result for result in bench.engine.poll(0.0)}
    assert (results[first].table_version, results[second].table_version) == (1, 2)
    assert results[first].plan.expert_ids.tolist() == [0, 0]
    assert results[second].plan.expert_ids.tolist() == [1, 1]


def test_a_batch_of_replaced_layers_is_routed_by_their_own_table() -> None:
    bench = Bench(0.0, 0.0)
    bench.engine.set_table(biased(table_of(1, 10, 11), -0.5, 0.5))
    old = bench.engine.lineup
    bench.engine.replace_layers({"layer": bench.layer}, biased(table_of(2, 10, 11), 0.5, -0.5))
    batch = Batch("layer", tokens_of(1), gate_input=torch.tensor([[0.5, 0.0]]))
    bench.engine.submit(batch, old)
    bench.engine.submit(batch)
    assert bench.hosts() == [11, 10]


def test_what_is_dropped_counts_as_asked_for() -> None:
    bench = Bench(0.0, 0.0, capacity=CapacityConfig(factor=1.0, min=1))
    bench.engine.set_table(table_of(1, 10, 11))
    bench.submit(logits_for(0, 0, 0, 1))
    assert bench.asked == [3, 1]
    assert [sum(s.num_rows for s in request.segments) for _, request in bench.transport.sent] == [2, 1]


def test_what_goes_elsewhere_counts_where_it_was_asked_for() -> None:
    bench = Bench(0.0, 0.0, capacity=CapacityConfig(factor=1.0, min=1, overflow="reroute"))
    bench.engine.set_table(table_of(1, 10, 11))
    bench.submit(logits_for(0, 0, 0, 1))
    assert bench.asked == [3, 1]


def test_what_an_expert_fails_counts_as_asked_for() -> None:
    bench = Bench(0.0, 0.0, on_failure=OnFailureConfig(order=("drop",)))
    bench.engine.set_table(RoutingTable(1, {("layer", 1): table_of(1, 10, 11).replicas["layer", 1]}))
    bench.submit(logits_for(0, 0, 0, 1))
    assert bench.asked == [3, 1]


def test_a_shared_expert_is_not_asked_for() -> None:
    experts = tuple(ExpertInfo(i, f"expert-{i}", "identity") for i in range(3))
    bench = Bench(0.0, 0.0, experts=experts, num_shared=1)
    bench.engine.set_table(table_of(1, 10, 11, 12))
    bench.engine.stats.layers["layer"].count_asked(bench.policy.assign(logits_for(0, 1, 1)))
    assert bench.asked == [1, 2, 0]
    assert bench.engine.lineup.asked({"layer"}) == {"layer": {"expert-0": 1, "expert-1": 2, "expert-2": 0}}
    assert bench.engine.lineup.asked({"other"}) == {}


@pytest.mark.parametrize("names", [("expert-1", "expert-new"), ("expert-0", "expert-1")])
def test_experts_of_replaced_layers_count_on_by_name(names: tuple[str, ...]) -> None:
    bench = Bench(0.0, 0.0)
    bench.engine.set_table(table_of(1, 10, 11))
    bench.submit(logits_for(0, 1, 1))
    before = bench.engine.lineup.asked({"layer"})["layer"]
    layer = replace(bench.layer, experts=tuple(ExpertInfo(i, name, "identity") for i, name in enumerate(names)))
    bench.engine.replace_layers({"layer": layer}, table_of(2, 10, 11))
    assert bench.engine.lineup.asked({"layer"})["layer"] == {name: before.get(name, 0) for name in names}
