from __future__ import annotations

import pytest
import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import TopKPolicyConfig
from moe_runtime.routing.capacity import admit, expert_capacity
from moe_runtime.routing.draws import hash_choices
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo


def assign(probabilities, *, k=1, mask=None, **options):
    policy = build_policy(TopKPolicyConfig(k=k, **options), num_experts=len(probabilities[0]))
    return policy.assign(torch.tensor(probabilities).log(), TokenInfo(mask=mask))


@pytest.mark.parametrize(
    ("factor", "num_assignments", "num_experts", "minimum", "num_valid", "expected"),
    [
        (1.1, 100, 10, 1, 100, 11),  # in floats 1.1 * 100 / 10 rounds up to 12
        (1.25, 16, 4, 1, 16, 5),
        (1.25, 17, 4, 1, 17, 6),
        (1.0, 8, 8, 4, 8, 4),
        (1.0, 8, 8, 4, 3, 3),  # more places than rows mean nothing
        (0.3, 10, 1, 1, 10, 3),
        (1e-9, 10, 1, 1, 10, 1),
        (1.0, 0, 4, 4, 0, 0),
        (None, 10, 2, 1, 10, None),
    ],
)
def test_capacity_is_exact_at_least_the_minimum_and_at_most_the_valid_rows(
    factor, num_assignments, num_experts, minimum, num_valid, expected
):
    rule = CapacityConfig(factor=factor, min=minimum)
    capacity = expert_capacity(num_assignments, num_valid=num_valid, num_experts=num_experts, rule=rule)
    assert capacity == expected


def test_dropless_admits_everyone():
    admission = admit(assign([[0.9, 0.1]] * 9), CapacityConfig())
    assert admission.capacity is None
    assert admission.admitted.tolist() == [True] * 9
    assert admission.rerouted.tolist() == [False] * 9


def test_padding_takes_no_part_in_the_capacity():
    mask = torch.tensor([True, True, False, False, False, False, False, False])
    admission = admit(assign([[0.9, 0.1]] * 8, mask=mask), CapacityConfig(factor=1.0, min=4))
    # ceil(2 / 2) = 1, the minimum is 4, and there are 2 valid rows.
    assert admission.capacity == 2
    assert admission.admitted.tolist() == [True, True]


def test_valid_rows_are_counted_once_when_they_ask_for_several_experts():
    mask = torch.tensor([True, True, True, False])
    admission = admit(assign([[0.6, 0.4]] * 4, k=2, mask=mask), CapacityConfig(factor=9.0))
    assert admission.capacity == 3


def test_batch_of_padding_alone_has_no_places_and_needs_none():
    admission = admit(assign([[0.9, 0.1]] * 3, mask=torch.zeros(3, dtype=torch.bool)), CapacityConfig(factor=1.0))
    assert admission.capacity == 0
    assert admission.admitted.tolist() == []


# Expert 0 has 2 places, ceil(0.5 * 8 / 2). Tokens 0 and 1 choose it first, tokens 2 and 3 second.
PAIRS = [[0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.2, 0.8]]


@pytest.mark.parametrize(
    ("drop", "admitted"),
    [
        # Assignments: 0->0, 1->0, 2->1, 3->1, then 0->1, 1->1, 2->0, 3->0.
        ("position", [True, True, True, True, False, False, False, False]),
        ("priority", [True, True, True, True, False, False, False, False]),
        ("score", [True, True, True, True, False, False, False, False]),
    ],
)
def test_first_choices_take_places_before_any_second_choice(drop, admitted):
    rule = CapacityConfig(factor=0.5, min=1, drop=drop)
    assert admit(assign(PAIRS, k=2), rule).admitted.tolist() == admitted


def test_score_may_prefer_a_second_choice_where_priority_does_not():
    # Of expert 0: token 0's first choice scores 0.4, token 1's second choice 0.45. One place: ceil(0.5 * 4 / 3).
    pairs = [[0.4, 0.3, 0.3 - 1e-3], [0.45, 0.05, 0.5]]
    rule = {"factor": 0.5, "min": 1}
    assert admit(assign(pairs, k=2), CapacityConfig(drop="priority", **rule)).admitted.tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert admit(assign(pairs, k=2), CapacityConfig(drop="score", **rule)).admitted.tolist() == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("drop", ["position", "priority", "score"])
def test_ties_go_by_position(drop):
    admission = admit(assign([[0.9, 0.1]] * 5), CapacityConfig(factor=0.8, min=1, drop=drop))
    assert admission.admitted.tolist() == [True, True, False, False, False]


def test_random_drops_depend_on_each_rows_seed_and_not_on_its_place():
    seeds = torch.tensor([11, 12, 13, 14, 15, 16])
    rule = CapacityConfig(factor=1.0, min=1, drop="random")
    admitted = admit(assign([[0.9, 0.1]] * 6), rule, row_seeds=seeds).admitted
    turned = admit(assign([[0.9, 0.1]] * 6), rule, row_seeds=seeds.flip(0)).admitted
    assert int(admitted.sum()) == 3
    assert turned.tolist() == admitted.flip(0).tolist()


def test_random_drops_spread_over_seeds():
    rule = CapacityConfig(factor=1.0, min=1, drop="random")
    admitted = [
        admit(assign([[0.9, 0.1]] * 6), rule, row_seeds=torch.arange(6) + 1000 * seed).admitted for seed in range(200)
    ]
    assert torch.stack(admitted).float().mean(0).tolist() == pytest.approx([0.5] * 6, abs=0.12)


def test_draws_are_those_of_splitmix64():
    # The first outputs of splitmix64 from seed 1234567, as its authors' C code prints them.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    draws = hash_choices(torch.full((3,), 1234567), torch.arange(3))
    assert [draw % 2**64 for draw in draws.tolist()] == expected
