from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import DensePolicyConfig, TopKPolicyConfig
from moe_runtime.errors import ConfigError
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules

IDENTITIES = [lambda x: x] * 5


def reroute_rules(policy, *, factor, max_reroutes=2):
    capacity = CapacityConfig(factor=factor, min=1, overflow="reroute", max_reroutes=max_reroutes)
    return RoutingRules(policy, capacity)


def experts_of(routed):
    return [(pair[0], pair[2], pair[3], pair[4]) for pair in routed.pairs()]


def test_overflow_tries_the_next_best_experts_in_turn_and_no_more_than_allowed(route):
    # One place each, ceil(4 / 5): token 1 moves to expert 1, token 2 to expert 2, token 3 has no third try.
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]] * 4)
    routed = route(
        torch.ones(4, 1), RoutingInputs(logits), reroute_rules(TopKPolicyConfig(k=1), factor=1.0), IDENTITIES
    )
    assert experts_of(routed) == [
        (0, 0, False, "served"),
        (1, 1, True, "served"),
        (2, 2, True, "served"),
        (3, 0, False, "dropped_capacity"),
    ]


def test_a_token_never_gets_an_expert_twice_and_skipping_one_is_not_a_try(route):
    # One place each, ceil(0.4 * 4 / 5). Token 1 loses both its experts; its first overflow takes expert 2, the
    # second skips expert 2, which the token holds, and takes expert 3 with its only try.
    logits = torch.tensor([[5.0, 4.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    rules = reroute_rules(TopKPolicyConfig(k=2), factor=0.4, max_reroutes=1)
    routed = route(torch.ones(2, 1), RoutingInputs(logits), rules, IDENTITIES)
    assert experts_of(routed)[1::2] == [(1, 2, True, "served"), (1, 3, True, "served")]


def test_a_token_that_asked_for_every_expert_has_nowhere_to_go(route):
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    routed = route(
        torch.ones(2, 1), RoutingInputs(logits), reroute_rules(TopKPolicyConfig(k=2), factor=0.5), IDENTITIES
    )
    assert experts_of(routed)[1::2] == [(1, 0, False, "dropped_capacity"), (1, 1, False, "dropped_capacity")]


@pytest.mark.parametrize("score", ["softmax", "softmax_after_topk"])
def test_weights_are_those_that_the_token_would_have_with_the_full_expert_masked(route, score):
    # ceil(0.5 * 4 / 4) = 1 place. Token 1 asks for experts 0 and 2 and gets 1 instead of 0; the weights are the
    # softmax over [log 2, log 3], its logits of experts 1 and 2.
    logits = torch.tensor([[9.0, 0.1, 0.1, 8.0], [5.0, 2.0, 3.0, 1.0]]).log()
    rules = reroute_rules(TopKPolicyConfig(k=2, score=score), factor=0.5)
    routed = route(torch.ones(2, 1), RoutingInputs(logits), rules, IDENTITIES)
    weights = {pair[2]: pair[5] for pair in routed.pairs() if pair[0] == 1}
    assert weights == {1: pytest.approx(0.4), 2: pytest.approx(0.6)}


def test_gradients_flow_through_the_score_at_the_new_expert():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]], requires_grad=True)
    policy = build_policy(TopKPolicyConfig(k=1), num_experts=2)
    admission = admit(policy.assign(logits), CapacityConfig(factor=1.0, min=1, overflow="reroute"))
    admission.assignments.scores[1].backward()
    p = torch.sigmoid(torch.tensor(1.0)).item()
    assert logits.grad.flatten().tolist() == pytest.approx([0.0, 0.0, -p * (1 - p), p * (1 - p)])


def test_assignments_without_scores_for_other_experts_cannot_be_rerouted():
    policy = build_policy(DensePolicyConfig(kind="dense"), num_experts=2)
    rule = CapacityConfig(factor=0.5, min=1, overflow="reroute")
    with pytest.raises(ConfigError, match=r"capacity\.overflow: expected drop, found reroute"):
        admit(policy.assign(torch.zeros(4, 2)), rule)


def test_the_assignments_given_stay_as_they_were():
    policy = build_policy(TopKPolicyConfig(k=1), num_experts=2)
    assignments = policy.assign(torch.tensor([[2.0, 0.0]] * 4))
    before = replace(assignments.pairs, expert_ids=assignments.expert_ids.clone(), scores=assignments.scores.clone())
    admission = admit(assignments, CapacityConfig(factor=1.0, min=1, overflow="reroute"))
    assert int(admission.rerouted.sum()) == 2
    assert torch.equal(assignments.expert_ids, before.expert_ids)
    assert torch.equal(assignments.scores, before.scores)
