"""Top-k by biased scores and from the best groups: DeepSeek-V3 and -V2, worked by hand."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import GroupsConfig, TopKPolicyConfig
from moe_runtime.errors import ConfigError, ShapeError
from moe_runtime.routing.moved import next_best_experts
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules
from moe_runtime.routing.weights import requested_weights

IDENTITIES = [lambda x: x] * 6


def assign(config, logits, bias=None, **options):
    bias = None if bias is None else torch.tensor(bias)
    policy = build_policy(config, num_experts=logits.shape[1])
    return policy.assign(logits, TokenInfo(expert_bias=bias, **options))


def sigmoids(*rows):
    return torch.tensor(rows).logit()


def experts_of(assignments):
    return assignments.choices.expert_ids.tolist()


def test_the_bias_decides_who_is_selected_and_has_no_part_in_the_weights():
    # Biased scores are 0.3, 0.6, 0.7, 0.5.
    config = TopKPolicyConfig(k=2, score="sigmoid", scaling_factor=2.5, expert_bias=True)
    assignments = assign(config, sigmoids([0.8, 0.6, 0.5, 0.2]), [-0.5, 0.0, 0.2, 0.3])
    assert experts_of(assignments) == [[2, 1]]
    assert requested_weights(assignments).tolist() == pytest.approx([2.5 * 0.5 / 1.1, 2.5 * 0.6 / 1.1])


def test_softmax_scores_are_biased_as_well():
    # Biased scores are 0.1, 0.3, 0.4.
    config = TopKPolicyConfig(k=2, expert_bias=True)
    assignments = assign(config, torch.tensor([[0.5, 0.3, 0.2]]).log(), [-0.4, 0.0, 0.2])
    assert experts_of(assignments) == [[2, 1]]
    assert requested_weights(assignments).tolist() == pytest.approx([0.4, 0.6])


def test_logits_are_biased_where_the_softmax_comes_after_the_selection():
    config = TopKPolicyConfig(k=2, score="softmax_after_topk", expert_bias=True)
    assignments = assign(config, torch.tensor([[5.0, 3.0, 2.0]]).log(), [-9.0, 0.0, 0.0])
    assert experts_of(assignments) == [[1, 2]]
    assert requested_weights(assignments).tolist() == pytest.approx([0.6, 0.4])


def test_without_a_bias_to_read_selection_is_by_score():
    logits = sigmoids([0.2, 0.9, 0.5])
    assert experts_of(assign(TopKPolicyConfig(expert_bias=True), logits)) == [[1, 2]]
    assert experts_of(assign(TopKPolicyConfig(), logits, [9.0, 0.0, 0.0])) == [[1, 2]]


def test_a_plain_selection_carries_no_preferences_of_its_own():
    assert assign(TopKPolicyConfig(), torch.zeros(2, 3)).preferences is None
    assert assign(TopKPolicyConfig(expert_bias=True), torch.zeros(2, 3)).preferences is None


def test_gradients_go_through_the_scores_alone():
    logits = sigmoids([0.8, 0.6, 0.5]).requires_grad_()
    config = TopKPolicyConfig(k=1, score="sigmoid", normalize="none", expert_bias=True)
    requested_weights(assign(config, logits, [-1.0, -1.0, 0.0])).sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([0.0, 0.0, 0.25])


def test_a_bias_for_another_number_of_experts_is_refused():
    with pytest.raises(ShapeError, match=r"expert_bias: expected shape \(3,\), found \(1,\)"):
        assign(TopKPolicyConfig(expert_bias=True), torch.zeros(2, 3), [1.0])


def test_two_experts_of_a_group_count_at_most():
    # Of the first group 0.5 + 0.5 count, of the second 0.8 + 0.3.
    config = TopKPolicyConfig(k=2, score="sigmoid", groups=GroupsConfig(count=2, keep=1, score="top2_sum"))
    assert experts_of(assign(config, sigmoids([0.5, 0.5, 0.5, 0.8, 0.3, 0.1]))) == [[3, 4]]


@pytest.mark.parametrize(("rule", "expected"), [("top2_sum", [2, 3]), ("max", [0, 1])])
def test_a_group_is_worth_its_two_best_experts_or_its_best(rule, expected):
    config = TopKPolicyConfig(k=2, score="sigmoid", groups=GroupsConfig(count=2, keep=1, score=rule))
    assert experts_of(assign(config, sigmoids([0.9, 0.1, 0.65, 0.6]))) == [expected]


@pytest.mark.parametrize(("expert_bias", "expected"), [(True, "top2_sum"), (False, "max")])
def test_groups_are_scored_as_deepseek_does_with_and_without_a_bias(expert_bias, expected):
    config = TopKPolicyConfig(expert_bias=expert_bias, groups=GroupsConfig(count=2, keep=1))
    assert build_policy(config, num_experts=4).groups.score == expected


def test_the_bias_counts_for_the_groups():
    config = TopKPolicyConfig(k=1, score="sigmoid", expert_bias=True, groups=GroupsConfig(count=2, keep=1))
    assert experts_of(assign(config, sigmoids([0.9, 0.9, 0.5, 0.6]), [0.0, 0.0, 0.5, 0.5])) == [[3]]


def test_a_negative_biased_score_of_a_group_that_is_kept_loses_to_no_group_left_out():
    # Biased scores are 0.1, -0.3 and -0.5, -0.6: masked with 0, the second choice would come from the other group.
    config = TopKPolicyConfig(k=2, score="sigmoid", expert_bias=True, groups=GroupsConfig(count=2, keep=1))
    assert experts_of(assign(config, sigmoids([0.5, 0.2, 0.5, 0.4]), [-0.4, -0.5, -1.0, -1.0])) == [[0, 1]]


@pytest.mark.parametrize(("bias", "expected"), [(None, (1, 0.3)), ([0.0, 0.0, 0.15, 0.0], (2, 0.2))])
def test_overflow_goes_where_the_bias_says_and_weighs_what_the_score_says(route, bias, expected):
    # One place each, ceil(2 / 4).
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2).log()
    policy = TopKPolicyConfig(k=1, normalize="none", expert_bias=True)
    rules = RoutingRules(policy, CapacityConfig(factor=1.0, min=1, overflow="reroute"))
    routed = route(torch.ones(2, 1), RoutingInputs(logits, expert_bias=bias), rules, IDENTITIES)
    _, _, expert, rerouted, outcome, weight = routed.pairs()[1]
    assert ((expert, weight), rerouted, outcome) == ((expected[0], pytest.approx(expected[1])), True, "served")


def test_overflow_never_goes_to_a_group_that_is_left_out(route):
    # One place each, ceil(3 / 4): token 1 takes the other expert of the group, token 2 finds none.
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]] * 3).log()
    policy = TopKPolicyConfig(k=1, groups=GroupsConfig(count=2, keep=1))
    rules = RoutingRules(policy, CapacityConfig(factor=1.0, min=1, overflow="reroute", max_reroutes=3))
    routed = route(torch.ones(3, 1), RoutingInputs(logits), rules, IDENTITIES)
    assert [(pair[2], pair[4]) for pair in routed.pairs()] == [
        (0, "served"),
        (1, "served"),
        (0, "dropped_capacity"),
    ]


def test_what_fails_goes_to_the_best_by_biased_score_within_the_groups():
    config = TopKPolicyConfig(k=1, score="sigmoid", expert_bias=True, groups=GroupsConfig(count=2, keep=1))
    logits = sigmoids([0.9, 0.5, 0.4, 0.8, 0.8, 0.8])
    assignments = assign(config, logits, [0.0, 0.0, 0.2, -1.0, -1.0, -1.0])
    allowed = torch.tensor([[False, True, True, True, True, True]])
    assert next_best_experts(assignments, torch.tensor([0]), allowed=allowed, limit=5) == [[2, 1]]


def test_a_row_may_ask_for_fewer_of_its_groups_experts():
    config = TopKPolicyConfig(k=2, score="sigmoid", groups=GroupsConfig(count=2, keep=1))
    logits = sigmoids([0.9, 0.1, 0.65, 0.6], [0.1, 0.2, 0.3, 0.4])
    assignments = assign(config, logits, k=torch.tensor([1, 2]))
    assert assignments.token_ids.tolist() == [0, 1, 1]
    assert assignments.expert_ids.tolist() == [0, 3, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"groups": GroupsConfig(count=4, keep=1)},
            r"policy\.groups\.count: expected a divisor of the layer's 6 experts, found 4",
        ),
        (
            {"k": 5, "groups": GroupsConfig(count=3, keep=2)},
            r"policy\.k: expected at most the 4 experts of the groups kept, found 5",
        ),
    ],
)
def test_groups_that_do_not_fit_the_layer_are_refused_at_load(options, message):
    with pytest.raises(ConfigError, match=message):
        build_policy(TopKPolicyConfig(**options), num_experts=6)


def test_the_layer_is_told_to_keep_a_bias():
    assert build_policy(TopKPolicyConfig(expert_bias=True), num_experts=4).uses_bias
    assert not build_policy(TopKPolicyConfig(), num_experts=4).uses_bias
