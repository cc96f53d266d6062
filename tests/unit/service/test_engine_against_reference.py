"""Whatever the rules, the engine computes what the slow per-token reference does, failed experts included."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.service import FakeTransport, endpoint, make_layer, table_of
from moe_runtime.config.models import CapacityConfig, OnFailureConfig
from moe_runtime.config.policies import DensePolicyConfig, PolicyConfig, SwitchPolicyConfig, TopKPolicyConfig
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules, forward_reference, route_reference
from moe_runtime.service.batch import Batch
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.ports import HostReply, HostRequest, SegmentResult
from moe_runtime.service.report import BatchLedger

NUM_EXPERTS, MOST_SHARED = 4, 2
OUTCOMES = {"served": 0, "dropped_capacity": 1, "dropped_failure": 2}

policies = st.one_of(
    st.just(DensePolicyConfig(kind="dense")),
    st.just(SwitchPolicyConfig(kind="switch")),
    st.builds(
        TopKPolicyConfig,
        k=st.integers(1, 3),
        score=st.sampled_from(["softmax", "sigmoid", "softmax_after_topk"]),
        normalize=st.sampled_from(["before_drop", "after_drop", "none"]),
        norm_p=st.sampled_from([1.0, 2.0]),
        scaling_factor=st.sampled_from([1.0, 2.5]),
    ),
)
capacities = st.builds(
    CapacityConfig,
    factor=st.sampled_from([None, 0.5, 1.0, 1.25]),
    min=st.integers(1, 2),
    max_reroutes=st.integers(1, 3),
    drop=st.sampled_from(["position", "priority", "score", "random"]),
)


def scale(expert_id: int) -> float:
    return float(expert_id + 1)


def answer_truthfully(transport: FakeTransport, request: HostRequest) -> None:
    parts = request.rows.split([segment.num_rows for segment in request.segments])
    rows = [scale(int(s.replica_id.split("/")[1])) * part for s, part in zip(request.segments, parts, strict=True)]
    results = tuple(SegmentResult(segment.replica_id, segment.num_rows) for segment in request.segments)
    transport.arrivals.append(HostReply(request.ticket, results, torch.cat(rows)))


@settings(max_examples=120)
@given(
    policy=policies,
    capacity=capacities,
    residual=st.sampled_from(["add", "passthrough", "none", "blend"]),
    num_tokens=st.integers(1, 9),
    num_shared=st.sampled_from([0, 0, 1, MOST_SHARED]),
    dead=st.sets(st.integers(0, NUM_EXPERTS + MOST_SHARED - 1), max_size=2),
    steps=st.sampled_from([("drop",), ("reroute", "drop"), ("replica", "reroute", "error")]),
    seed=st.integers(0, 10_000),
)
def test_outputs_and_outcomes_equal_the_reference(
    policy: PolicyConfig,
    capacity: CapacityConfig,
    residual: str,
    num_tokens: int,
    num_shared: int,
    dead: set[int],
    steps: tuple[str, ...],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_tokens, 3, generator=generator)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator)
    mask = torch.rand(num_tokens, generator=generator) > 0.2
    num_experts = NUM_EXPERTS + num_shared
    layer = make_layer(
        num_experts,
        num_shared=num_shared,
        gate_features=NUM_EXPERTS,
        policy=build_policy(policy, num_experts=NUM_EXPERTS),
        capacity=capacity,
        residual=residual,
        on_failure=OnFailureConfig(order=steps),
    )
    transport = FakeTransport(refusing={endpoint(10 + expert_id) for expert_id in dead})
    engine = RouterEngine({"layer": layer}, transport)
    engine.set_table(table_of(1, *range(10, 10 + num_experts)))
    engine.submit(
        Batch("layer", tokens, gate_input=logits, info=TokenInfo(mask=mask, row_seeds=torch.arange(num_tokens)))
    )
    for _, request in transport.sent:
        answer_truthfully(transport, request)
    (result,) = engine.poll(0.0)

    can_reroute = "reroute" in steps and layer.policy.can_reroute
    rules = RoutingRules(policy, capacity, residual, reroutes_failures=can_reroute, num_shared=num_shared)
    inputs = RoutingInputs(
        logits,
        mask=mask.tolist(),
        row_seeds=list(range(num_tokens)),
        failed={(token, expert_id) for token in range(num_tokens) for expert_id in dead},
    )
    experts = [lambda row, e=e: scale(e) * row for e in range(num_experts)]
    every_pair = sorted(route_reference(inputs, rules), key=lambda pair: (pair.token, pair.rank))
    pairs, shared = ([pair for pair in every_pair if pair.shared == kind] for kind in (False, True))
    has_failures = any(pair.outcome == "dropped_failure" for pair in every_pair)
    assert bool(result.errors) == (steps[-1] == "error" and has_failures)
    if result.errors:
        # The request fails as a whole: what else becomes of its rows is nobody's business.
        return
    expected = forward_reference(tokens, inputs, rules, experts=experts)
    torch.testing.assert_close(result.outputs.double(), expected, rtol=1e-4, atol=1e-5)

    report = BatchLedger(result, layer).part(first_row=0, last_row=num_tokens, queue_s=0.0, return_routing=True)
    assert report.token_ids is not None
    assert report.expert_ids is not None
    assert report.outcomes is not None
    assert report.token_ids.tolist() == [pair.token for pair in pairs]
    assert report.expert_ids.tolist() == [pair.expert for pair in pairs]
    assert report.outcomes.tolist() == [OUTCOMES[pair.outcome] for pair in pairs]
    assert report.num_rerouted == sum(pair.rerouted for pair in pairs)
    assert report.num_assignments == report.num_served + report.num_dropped_capacity + report.num_dropped_failure
    num_shared_served = sum(pair.outcome == "served" for pair in shared)
    assert (report.num_shared_served, report.num_shared_dropped) == (num_shared_served, len(shared) - num_shared_served)
    if num_shared:
        weights = torch.zeros(num_tokens, num_shared)
        for pair in shared:
            weights[pair.token, pair.expert - NUM_EXPERTS] = pair.weight
        assert report.shared_weights is not None
        assert report.shared_weights.tolist() == weights.tolist()
