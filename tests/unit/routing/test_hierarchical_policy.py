"""Two levels of softmax, worked by hand."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import HierarchicalPolicyConfig
from moe_runtime.errors import ConfigError, ShapeError
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules
from moe_runtime.routing.weights import requested_weights

# Groups 0.6 and 0.4; inside them 0.5, 0.5 x 0.9 and so on: products 0.33, 0.27, 0.36, 0.04.
TREE_ROW = torch.tensor([[0.6, 0.4, 0.55, 0.45, 0.9, 0.1]]).log()
# First level as given, then experts 1, 2, 3.
INSIDE = [0.3, 0.5, 0.2]
IDENTITIES = [lambda x: x] * 4


def tree(**options):
    return HierarchicalPolicyConfig(kind="hierarchical", **options)


def shared_first(**options):
    return HierarchicalPolicyConfig(kind="hierarchical", mode="shared_first", **options)


def assign(config, logits, *, num_experts=4, **options):
    return build_policy(config, num_experts=num_experts).assign(logits, TokenInfo(**options))


def branch_row(shared):
    return torch.tensor([[shared, 1 - shared, *INSIDE]]).log()


@pytest.mark.parametrize(
    ("options", "experts", "products"),
    [
        ({"k_groups": 1, "k": 1}, [0], [0.33]),
        ({"k_groups": 1, "k": 2}, [0, 1], [0.33, 0.27]),
        # The best expert of the second group has the largest product, so it is the first choice.
        ({"k_groups": 2, "k": 1}, [2, 0], [0.36, 0.33]),
        ({"k_groups": 2, "k": 2}, [2, 0, 1, 3], [0.36, 0.33, 0.27, 0.04]),
    ],
)
def test_a_tree_takes_the_best_experts_of_the_best_groups_by_their_products(options, experts, products):
    assignments = assign(tree(**options), TREE_ROW)
    assert assignments.expert_ids.tolist() == experts
    assert requested_weights(assignments).tolist() == pytest.approx(products)


def test_products_may_be_normalised_over_the_tokens_experts():
    assignments = assign(tree(k_groups=2, k=1, normalize="before_drop"), TREE_ROW)
    assert requested_weights(assignments).tolist() == pytest.approx([0.36 / 0.69, 0.33 / 0.69])


def test_a_request_for_fewer_gets_the_best_of_the_trees_choices():
    config = tree(k_groups=2, k=2)
    assert assign(config, TREE_ROW, k=2).expert_ids.tolist() == [2, 0]
    rows = assign(config, TREE_ROW.expand(3, 6), k=torch.tensor([0, 3, 1]))
    assert list(zip(rows.token_ids.tolist(), rows.expert_ids.tolist(), strict=True)) == [(1, 2), (2, 2), (1, 0), (1, 1)]


def test_overflow_of_a_tree_stays_in_the_tokens_groups(route):
    # One place each, ceil(3 / 4): token 1 takes the other expert of the group, token 2 finds none.
    rules = RoutingRules(tree(k=1), CapacityConfig(factor=1.0, min=1, overflow="reroute", max_reroutes=3))
    routed = route(torch.ones(3, 1), RoutingInputs(TREE_ROW.expand(3, 6)), rules, IDENTITIES)
    assert [pair[2:] for pair in routed.pairs()] == [
        (0, False, "served", pytest.approx(0.33)),
        (1, True, "served", pytest.approx(0.27)),
        (0, False, "dropped_capacity", 0.0),
    ]


@pytest.mark.parametrize(
    ("shared", "experts", "weights"), [(0.7, [0], [0.7]), (0.5, [0], [0.5]), (0.4, [2, 1], [0.3, 0.18])]
)
def test_a_token_takes_the_shared_expert_or_the_best_of_the_others(shared, experts, weights):
    assignments = assign(shared_first(k=2), branch_row(shared))
    assert assignments.expert_ids.tolist() == experts
    assert requested_weights(assignments).tolist() == pytest.approx(weights)


def test_tokens_of_both_branches_stand_in_order_of_choice():
    logits = torch.cat([branch_row(0.4), branch_row(0.7), branch_row(0.2)])
    assignments = assign(shared_first(k=2), logits)
    assert assignments.token_ids.tolist() == [0, 1, 2, 0, 2]
    assert assignments.expert_ids.tolist() == [2, 0, 2, 1, 1]
    assert assignments.ranks.tolist() == [0, 0, 0, 1, 1]


def test_a_request_for_one_expert_gets_the_best_of_its_branch():
    logits = torch.cat([branch_row(0.4), branch_row(0.7), branch_row(0.7)])
    assert assign(shared_first(k=2), logits, k=1).expert_ids.tolist() == [2, 0, 0]
    assert assign(shared_first(k=2), logits, k=torch.tensor([1, 2, 0])).expert_ids.tolist() == [2, 0]


def test_overflow_of_one_branch_may_go_to_the_other(route):
    # One place each, ceil(2 / 4).
    rules = RoutingRules(shared_first(k=1), CapacityConfig(factor=1.0, min=1, overflow="reroute"))
    inputs = RoutingInputs(branch_row(0.4).expand(2, 5))
    assert route(torch.ones(2, 1), inputs, rules, IDENTITIES).pairs()[1][2:] == (
        0,
        True,
        "served",
        pytest.approx(0.4),
    )
    inputs = RoutingInputs(branch_row(0.7).expand(2, 5))
    assert route(torch.ones(2, 1), inputs, rules, IDENTITIES).pairs()[1][2:] == (
        2,
        True,
        "served",
        pytest.approx(0.15),
    )


def test_gates_are_as_wide_as_both_levels():
    assert build_policy(tree(num_groups=3), num_experts=6).num_logits == 9
    assert build_policy(shared_first(), num_experts=6).num_logits == 7
    with pytest.raises(ShapeError, match=r"router_logits: expected shape \(num_tokens, 9\), found \(2, 6\)"):
        assign(tree(num_groups=3), torch.zeros(2, 6), num_experts=6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tree(num_groups=4), r"policy\.num_groups: expected a divisor of the layer's 6 experts, found 4"),
        (tree(num_groups=3, k_groups=4), r"policy\.k_groups: expected at most the 3 groups, found 4"),
        (tree(num_groups=3, k=3), r"policy\.k: expected at most the 2 experts of a group, found 3"),
        (shared_first(k=6), r"policy\.k: expected at most the 5 experts that are not shared, found 6"),
    ],
)
def test_levels_that_do_not_fit_the_layer_are_refused_at_load(config, message):
    with pytest.raises(ConfigError, match=message):
        build_policy(config, num_experts=6)


def test_a_layer_of_one_expert_has_no_two_levels():
    with pytest.raises(ConfigError, match=r"policy\.k: expected at most the 0 experts that are not shared, found 1"):
        build_policy(shared_first(k=1), num_experts=1)
