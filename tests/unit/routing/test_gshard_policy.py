"""GShard's top-2: who is kept, what chance does, and what the weights are."""

from __future__ import annotations

import math

import pytest
import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import GShardPolicyConfig
from moe_runtime.errors import ConfigError
from moe_runtime.routing.draws import hash_choices, uniform_draws
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules
from moe_runtime.routing.weights import requested_weights

# The second's share of the pair is 3/8.
ROW = torch.tensor([[0.5, 0.3, 0.2]]).log()
IDENTITIES = [lambda x: x] * 3


def config(**options):
    return GShardPolicyConfig(kind="gshard_top2", **options)


def assign(policy_config, logits=ROW, **options):
    return build_policy(policy_config, num_experts=logits.shape[1]).assign(logits, TokenInfo(**options))


def share_kept(policy_config, *, num_rows=4000, first_seed=0, training=True):
    seeds = torch.arange(first_seed, first_seed + num_rows)
    assignments = assign(policy_config, ROW.expand(num_rows, 3), row_seeds=seeds, training=training)
    return assignments.num_assignments / num_rows - 1


@pytest.mark.parametrize(
    ("options", "chance"),
    [
        ({"second": "proportional"}, 0.75),
        ({"second": "threshold", "threshold": 1.0}, 0.375),
        ({"second": "threshold", "threshold": 0.5}, 0.75),
        ({"second": "threshold"}, 1.0),
        ({"second": "always"}, 1.0),
        ({"second": "never"}, 0.0),
    ],
)
@pytest.mark.parametrize("first_seed", [0, -(2**63), 10**12])
def test_seconds_are_kept_as_often_as_the_rule_says(options, chance, first_seed):
    four_deviations = 4 * math.sqrt(chance * (1 - chance) / 4000)
    assert share_kept(config(**options), first_seed=first_seed) == pytest.approx(chance, abs=four_deviations)


def test_evaluation_has_a_rule_of_its_own():
    assert share_kept(config(second="never"), training=False) == 1.0
    assert share_kept(config(second="always", second_in_evaluation="never"), training=False) == 0.0
    sampled = share_kept(config(second="never", second_in_evaluation="proportional"), training=False)
    assert sampled == pytest.approx(0.75, abs=0.03)


def test_a_draw_depends_on_the_rows_seed_and_not_on_its_place():
    seeds = torch.randint(-(2**62), 2**62, (200,), generator=torch.Generator().manual_seed(3))
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(4))
    policy = config(second="proportional")
    together = assign(policy, logits, row_seeds=seeds, training=True)
    backwards = assign(policy, logits.flip(0), row_seeds=seeds.flip(0), training=True)
    seconds = together.token_ids[together.ranks == 1]
    assert 20 < len(seconds) < 180
    assert sorted((199 - backwards.token_ids[backwards.ranks == 1]).tolist()) == seconds.tolist()


def test_rows_without_a_seed_draw_by_their_index():
    logits = ROW.expand(50, 3)
    policy = config(second="proportional")
    unseeded = assign(policy, logits, training=True)
    seeded = assign(policy, logits, row_seeds=torch.arange(50), training=True)
    assert torch.equal(unseeded.token_ids, seeded.token_ids)


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, {"row_seeds"}),
        ({"second": "always"}, set()),
        ({"second": "never", "second_in_evaluation": "threshold"}, {"row_seeds"}),
    ],
)
def test_seeds_are_read_where_chance_may_decide(options, reads):
    assert build_policy(config(**options), num_experts=3).reads == reads


def test_what_chance_keeps_says_nothing_of_whom_it_drops():
    seeds, ranks = torch.arange(4000), torch.ones(4000, dtype=torch.int64)
    columns = torch.stack([uniform_draws(seeds, 1, stream=1), hash_choices(seeds, ranks).double()])
    assert abs(float(torch.corrcoef(columns)[0, 1])) < 0.06


@pytest.mark.parametrize(("normalize", "both"), [("before_drop", [5 / 8, 3 / 8]), ("none", [0.5, 0.3])])
def test_the_pair_is_normalised_over_itself(normalize, both):
    assignments = assign(config(normalize=normalize))
    assert assignments.expert_ids.tolist() == [0, 1]
    assert requested_weights(assignments).tolist() == pytest.approx(both)


@pytest.mark.parametrize(("normalize", "alone"), [("before_drop", 5 / 8), ("after_drop", 1.0), ("none", 0.5)])
def test_a_first_whose_second_chance_left_out_weighs_its_share_of_the_pair(route, normalize, alone):
    policy = config(second="never", normalize=normalize)
    routed = route(torch.ones(1, 1), RoutingInputs(ROW, training=True), RoutingRules(policy), IDENTITIES)
    assert routed.pairs() == [(0, 0, 0, False, "served", pytest.approx(alone))]


def test_a_request_for_one_expert_has_no_pair():
    assert requested_weights(assign(config(), k=1)).tolist() == [1.0]
    rows = assign(config(second="never"), ROW.expand(3, 3), k=torch.tensor([1, 2, 0]), training=True)
    assert requested_weights(rows).tolist() == pytest.approx([1.0, 5 / 8])


def test_a_full_first_may_go_to_the_second_that_was_left_out_and_is_counted_once(route):
    # One place each, ceil(2 / 3): token 1 loses expert 0.
    rules = RoutingRules(config(second="never"), CapacityConfig(factor=1.0, min=1, overflow="reroute"))
    inputs = RoutingInputs(ROW.expand(2, 3), training=True)
    routed = route(torch.ones(2, 1), inputs, rules, IDENTITIES)
    assert routed.pairs()[1] == (1, 0, 1, True, "served", pytest.approx(1.0))


def test_a_full_first_that_goes_to_the_third_is_normalised_with_the_second_that_was_left_out(route):
    # One place each, ceil(3 / 3); token 2 holds the place at expert 1, so token 1 goes from 0 to 2: 0.2 of 0.2 + 0.3.
    logits = torch.cat([ROW, torch.tensor([[0.1, 0.8, 0.1]]).log(), ROW])
    rules = RoutingRules(config(second="never"), CapacityConfig(factor=1.0, min=1, overflow="reroute"))
    routed = route(torch.ones(3, 1), RoutingInputs(logits, training=True), rules, IDENTITIES)
    assert routed.pairs()[2] == (2, 0, 2, True, "served", pytest.approx(0.4))


def test_gradients_flow_through_the_second_that_was_left_out_as_in_the_paper():
    logits = ROW.clone().requires_grad_()
    requested_weights(assign(config(second="never"), logits, training=True)).sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([15 / 64, -15 / 64, 0.0], abs=1e-6)


def test_a_layer_of_one_expert_is_refused_at_load():
    with pytest.raises(ConfigError, match=r"policy\.kind: gshard_top2 expected a layer of at least 2 experts, found 1"):
        build_policy(config(), num_experts=1)
