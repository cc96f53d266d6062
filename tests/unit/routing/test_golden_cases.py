"""Golden cases of the reference, worked by hand; the fixture `route` also holds each against the slow oracle."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import SwitchPolicyConfig, TopKPolicyConfig
from moe_runtime.routing.expert_bias import bias_update, update_bias
from moe_runtime.routing.losses import load_balancing_loss
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules

# sigmoid(1), sigmoid(2), sigmoid(3): softmax over two experts.
P1, P2, P3 = 0.73105858, 0.88079708, 0.95257413

TOKENS = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
# Tokens 0, 1 and 2 want expert 0, token 1 the least; token 3 wants expert 1.
LOGITS = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
EXPERTS = (lambda x: 10 * x, lambda x: 100 * x)


def switch_rules(*, residual="none", **capacity):
    return RoutingRules(SwitchPolicyConfig(kind="switch"), CapacityConfig(factor=1.0, min=1, **capacity), residual)


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        ("none", [10 * P2, 20 * P1, 0.0, 400 * P1]),
        ("passthrough", [10 * P2, 20 * P1, 3.0, 400 * P1]),
        ("add", [1 + 10 * P2, 2 + 20 * P1, 3.0, 4 + 400 * P1]),
    ],
)
def test_third_token_for_a_full_expert_is_dropped_by_position(route, residual, expected):
    routed = route(TOKENS, RoutingInputs(LOGITS), switch_rules(residual=residual), EXPERTS)
    assert routed.plan.admission.capacity == 2
    assert routed.plan.admission.admitted.tolist() == [True, True, False, True]
    assert routed.outputs.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        ("none", [10 * P2, 0.0, 30 * P3, 400 * P1]),
        ("passthrough", [10 * P2, 2.0, 30 * P3, 400 * P1]),
        ("add", [1 + 10 * P2, 2.0, 3 + 30 * P3, 4 + 400 * P1]),
    ],
)
def test_token_of_the_lowest_gate_weight_is_dropped_by_priority(route, residual, expected):
    rules = switch_rules(residual=residual, drop="priority")
    routed = route(TOKENS, RoutingInputs(LOGITS), rules, EXPERTS)
    assert routed.plan.admission.admitted.tolist() == [True, False, True, True]
    assert routed.outputs.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("residual", "own"), [("none", [0, 0, 0, 0]), ("passthrough", [0, 0, 0, 0]), ("add", [1, 2, 3, 4])]
)
def test_overflowed_token_is_rerouted_to_the_other_expert_with_its_score_there(route, residual, own):
    rules = switch_rules(residual=residual, overflow="reroute")
    routed = route(TOKENS, RoutingInputs(LOGITS), rules, EXPERTS)
    expected = [10 * P2, 20 * P1, 300 * (1 - P3), 400 * P1]
    assert routed.plan.admission.rerouted.tolist() == [False, False, True, False]
    assert routed.plan.admission.assignments.expert_ids.tolist() == [0, 0, 1, 1]
    assert routed.outputs.flatten().tolist() == pytest.approx([y + x for y, x in zip(expected, own, strict=True)])


@pytest.mark.parametrize(("normalize", "weight"), [("before_drop", 1 / 3), ("after_drop", 1.0), ("none", 0.3)])
def test_half_dropped_token_keeps_its_weight_before_drop_and_gets_all_after_drop(route, normalize, weight):
    # Expert 0 is everybody's first choice but token 5's: C = ceil(1 * 12 / 3) = 4, so token 4 loses it.
    first_1, first_2 = [0.6, 0.3, 0.1], [0.6, 0.1, 0.3]
    logits = torch.tensor([first_1, first_1, first_1, first_2, first_2, [0.1, 0.6, 0.3]]).log()
    policy = TopKPolicyConfig(k=2, normalize=normalize)
    rules = RoutingRules(policy, CapacityConfig(factor=1.0, min=1))
    experts = (lambda x: x, lambda x: 2 * x, lambda x: 3 * x)
    routed = route(torch.ones(6, 1), RoutingInputs(logits), rules, experts)
    assert [pair[:5] for pair in routed.pairs() if pair[0] == 4] == [
        (4, 0, 0, False, "dropped_capacity"),
        (4, 1, 2, False, "served"),
    ]
    assert routed.outputs[4].item() == pytest.approx(3 * weight)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 8])
def test_load_balancing_loss_of_uniform_routing_is_one_for_every_k(num_experts):
    for k in range(1, num_experts + 1):
        # Token t asks for experts t, t + 1, ... , and all probabilities are alike.
        order = torch.stack([torch.arange(num_experts).roll(shift) for shift in range(num_experts)])
        policy = build_policy(TopKPolicyConfig(k=k), num_experts=num_experts)
        loss = load_balancing_loss(torch.zeros(num_experts, num_experts), policy.assign(-order.float()))
        assert loss.item() == pytest.approx(1.0, abs=1e-6)


def test_expert_bias_moves_by_the_rate_towards_the_mean_and_is_then_centred():
    counts = torch.tensor([10, 0, 2])
    assert bias_update(counts, rate=1e-3).tolist() == pytest.approx([-1e-3, 1e-3, 1e-3])
    moved = update_bias(torch.zeros(3), counts, rate=1e-3)
    assert moved.tolist() == pytest.approx([-4e-3 / 3, 2e-3 / 3, 2e-3 / 3])


def test_selection_is_that_of_torch_topk_ties_included():
    logits = torch.zeros(3, 8)
    assignments = build_policy(TopKPolicyConfig(k=2), num_experts=8).assign(logits)
    expected = torch.topk(logits.softmax(-1), 2).indices
    assert assignments.expert_ids.view(2, 3).t().tolist() == expected.tolist()
