from __future__ import annotations

import pytest
import torch

from moe_runtime.config.policies import HashPolicyConfig, RandomPolicyConfig, RoundRobinPolicyConfig
from moe_runtime.errors import ConfigError, InvalidRequestError, ShapeError
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policies.gate_free import distinct_experts
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.weights import requested_weights

HASH, RANDOM, ROUND_ROBIN = (
    lambda k, **options: HashPolicyConfig(kind="hash", k=k, **options),
    lambda k: RandomPolicyConfig(kind="random", k=k),
    lambda k: RoundRobinPolicyConfig(kind="round_robin", k=k),
)
ALL = pytest.mark.parametrize("make", [HASH, RANDOM, ROUND_ROBIN], ids=["hash", "random", "round_robin"])


def assign(config, num_tokens, *, num_experts, **info):
    keys = torch.arange(num_tokens)
    facts = {"token_ids": keys, "row_seeds": keys, **info}
    return build_policy(config, num_experts=num_experts).assign(torch.zeros(num_tokens, 0), TokenInfo(**facts))


def chosen(assignments):
    return assignments.choices.expert_ids.tolist()


@ALL
def test_the_gate_is_not_asked(make):
    policy = build_policy(make(2), num_experts=4)
    assert policy.num_logits == 0
    assert (policy.max_k, policy.batch_coupled, policy.can_reroute, policy.sets_capacity) == (2, False, False, False)
    with pytest.raises(ShapeError, match=r"expected shape \(num_tokens, 0\), found \(3, 4\)"):
        policy.assign(torch.zeros(3, 4))


def test_each_says_what_it_reads():
    reads = [build_policy(make(1), num_experts=2).reads for make in (HASH, RANDOM, ROUND_ROBIN)]
    assert reads == [{"token_ids"}, {"row_seeds"}, {"row_ids"}]


@ALL
def test_each_of_k_experts_weighs_one_over_k(make):
    assignments = assign(make(4), 3, num_experts=5)
    assert requested_weights(assignments).tolist() == [0.25] * 12
    assert assignments.scores.dtype == torch.float32
    assert assignments.all_scores is None


@ALL
def test_fewer_experts_weigh_more(make):
    assert requested_weights(assign(make(4), 3, num_experts=5, k=2)).tolist() == [0.5] * 6
    rows = assign(make(4), 3, num_experts=5, k=torch.tensor([1, 0, 2]))
    assert rows.token_ids.tolist() == [0, 2, 2]
    assert requested_weights(rows).tolist() == [1.0, 0.5, 0.5]


@ALL
def test_fewer_experts_are_the_first_of_those_of_all(make):
    every = assign(make(4), 6, num_experts=5).choices.expert_ids
    assert chosen(assign(make(4), 6, num_experts=5, k=2)) == every[:, :2].tolist()


@ALL
@pytest.mark.parametrize(("k", "num_experts"), [(1, 1), (3, 3), (3, 7), (9, 64)])
def test_a_tokens_experts_differ(make, k, num_experts):
    for experts in chosen(assign(make(k), 50, num_experts=num_experts)):
        assert len(set(experts)) == k
        assert all(0 <= expert < num_experts for expert in experts)


@ALL
def test_the_batch_has_no_part_in_it(make):
    whole = assign(make(2), 20, num_experts=6, row_ids=torch.arange(20)).choices.expert_ids
    part = torch.tensor([13, 4, 7])
    facts = {"token_ids": part, "row_seeds": part, "row_ids": part}
    assert chosen(assign(make(2), 3, num_experts=6, **facts)) == whole[part].tolist()


@ALL
def test_padding_and_empty_batches_ask_for_nothing(make):
    assert assign(make(2), 2, num_experts=3, mask=torch.tensor([False, True])).token_ids.tolist() == [1, 1]
    assert assign(make(2), 0, num_experts=3).num_assignments == 0


def test_a_draw_takes_one_of_the_experts_that_are_left():
    draws = torch.tensor([[0.0, 0.0, 0.0], [0.99, 0.99, 0.99], [0.5, 0.5, 0.5]], dtype=torch.float64)
    assert distinct_experts(draws, num_experts=4).tolist() == [[0, 1, 2], [3, 2, 1], [2, 1, 3]]


def test_the_largest_draw_is_still_an_expert():
    draws = torch.full((1, 1), 1.0 - 2.0**-53, dtype=torch.float64)
    for num_experts in (1, 3, 7, 64, 255, 65536):
        assert distinct_experts(draws, num_experts=num_experts).item() == num_experts - 1


def test_round_robin_goes_through_the_experts_in_turn():
    assignments = assign(ROUND_ROBIN(2), 4, num_experts=5)
    assert chosen(assignments) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_a_hash_depends_on_the_id_and_the_seed_alone():
    ids = torch.tensor([5, 9, 5, -3])
    first = chosen(assign(HASH(2), 4, num_experts=16, token_ids=ids, row_seeds=None))
    assert first[0] == first[2]
    assert first == chosen(assign(HASH(2), 4, num_experts=16, token_ids=ids, row_seeds=torch.arange(4), training=True))
    many = torch.arange(200)
    assert chosen(assign(HASH(1), 200, num_experts=16, token_ids=many)) != chosen(
        assign(HASH(1, seed=1), 200, num_experts=16, token_ids=many)
    )


@pytest.mark.parametrize("make", [HASH, RANDOM])
def test_experts_are_chosen_alike_often(make):
    assignments = assign(make(2), 20000, num_experts=5)
    for choice in range(2):
        shares = torch.bincount(assignments.choices.expert_ids[:, choice], minlength=5) / 20000
        # Five standard deviations of a share of 0.2.
        assert (shares - 0.2).abs().max() < 0.0142


def test_a_hash_needs_ids_and_says_how_to_give_them():
    with pytest.raises(
        InvalidRequestError, match=r"^token_ids: expected one integer per token, found none: .*ids_of_rows"
    ):
        assign(HASH(1), 2, num_experts=2, token_ids=None)


def test_draws_need_seeds_and_say_how_to_give_them():
    with pytest.raises(
        InvalidRequestError, match=r"^row_seeds: expected one integer per token, found none: .*each row"
    ):
        assign(RANDOM(1), 2, num_experts=2, row_seeds=None)


@ALL
def test_more_choices_than_experts_are_refused_at_load(make):
    with pytest.raises(ConfigError, match=r"policy\.k: expected at most the layer's 2 experts, found 3"):
        build_policy(make(3), num_experts=2)
