from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.draws import normal
from moe_runtime.config.policies import GlobalAssignmentPolicyConfig
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.balanced import best_balance
from moe_runtime.routing.seats import EXACT_UP_TO, balanced_experts

SOLVERS = pytest.mark.parametrize("solver", ["exact", "auction", "auto"])
# Everybody likes expert 0 better, by less and less.
LOGITS = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])


def assign(logits, *, solver="auto", evaluation="greedy", **info):
    config = GlobalAssignmentPolicyConfig(kind="global_assignment", solver=solver, evaluation=evaluation)
    return build_policy(config, num_experts=logits.shape[1]).assign(logits, TokenInfo(**info))


def total(scores, experts):
    return float(scores.double().gather(1, experts[:, None]).sum())


def assert_balanced(experts, *, num_experts):
    loads = torch.bincount(experts, minlength=num_experts)
    assert loads.shape == (num_experts,)
    assert int(loads.max() - loads.min()) <= 1


@SOLVERS
def test_training_gives_every_expert_as_many_tokens_at_the_highest_total(solver):
    assignments = assign(LOGITS, solver=solver, training=True)
    assert assignments.choices.expert_ids.flatten().tolist() == [0, 0, 1, 1]
    assert assignments.scores.tolist() == pytest.approx(torch.sigmoid(torch.tensor([3.0, 2.0, 0.0, 0.0])).tolist())


@SOLVERS
def test_where_experts_do_not_divide_the_tokens_the_best_ones_get_one_more(solver):
    # Expert 0 gets two of three tokens: 3 + 2 + 0 is more than 3 + 0 + 0.
    assert assign(LOGITS[:3], solver=solver, training=True).expert_ids.tolist() == [0, 0, 1]


@SOLVERS
def test_fewer_tokens_than_experts_get_an_expert_each(solver):
    logits = torch.tensor([[5.0, 4.0, 0.0, 0.0], [5.0, 1.0, 0.0, 0.0]])
    assert assign(logits, solver=solver, training=True).expert_ids.tolist() == [1, 0]


def test_evaluation_takes_each_tokens_best_expert():
    assert assign(LOGITS).expert_ids.tolist() == [0, 0, 0, 0]
    assert assign(LOGITS, evaluation="as_in_training").expert_ids.tolist() == [0, 0, 1, 1]


def test_only_evaluation_as_in_training_couples_the_batch():
    coupled = {
        evaluation: build_policy(
            GlobalAssignmentPolicyConfig(kind="global_assignment", evaluation=evaluation), num_experts=2
        ).batch_coupled
        for evaluation in ("greedy", "as_in_training")
    }
    assert coupled == {"greedy": False, "as_in_training": True}


def test_padding_and_rows_that_ask_for_nothing_take_no_seat():
    mask = torch.tensor([False, True, True, True])
    assignments = assign(LOGITS, training=True, mask=mask, k=torch.tensor([1, 1, 1, 0]))
    assert assignments.token_ids.tolist() == [1, 2]
    assert assignments.expert_ids.tolist() == [0, 1]


@SOLVERS
def test_no_tokens_and_one_expert_are_no_special_matter(solver):
    assert assign(torch.zeros(0, 3), solver=solver, training=True).num_assignments == 0
    assert assign(torch.randn(4, 1), solver=solver, training=True).expert_ids.tolist() == [0, 0, 0, 0]


@given(seed=st.integers(0, 2**31), num_tokens=st.integers(1, 6), num_experts=st.integers(1, 4))
@settings(max_examples=60)
def test_exact_has_the_total_of_the_best_of_all_permutations(seed, num_tokens, num_experts):
    scores = normal(num_tokens, num_experts, seed=seed)
    share, remainder = divmod(num_tokens, num_experts)
    best = -torch.inf
    for favoured in itertools.combinations(range(num_experts), remainder):
        seats = [expert for expert in range(num_experts) for _ in range(share + (expert in favoured))]
        for seating in set(itertools.permutations(seats)):
            best = max(best, total(scores, torch.tensor(seating)))
    experts = balanced_experts(scores, solver="exact")
    assert_balanced(experts, num_experts=num_experts)
    assert total(scores, experts) == pytest.approx(best)
    assert total(scores, torch.tensor(best_balance(scores.tolist(), num_experts))) == pytest.approx(best)


def skewed(kind, num_tokens, num_experts):
    """Scores above 0, since a percent of a total around 0 means nothing."""
    scores = normal(num_tokens, num_experts, seed=num_tokens + num_experts)
    if kind == "hot":
        return 5.0 + 0.1 * scores + torch.linspace(5.0, 0.0, num_experts)
    if kind == "clusters":
        return 4.0 + scores[torch.arange(num_tokens) % 5 % num_tokens] + 0.01 * scores
    if kind == "whole numbers":
        return (scores * 2).round().clamp(0.0, 2.0)
    if kind == "all alike":
        return 4.0 + scores[:1].expand(num_tokens, num_experts)
    if kind == "outlier":
        scores[0] *= 1000
    return scores.abs()


@pytest.mark.parametrize("kind", ["normal", "hot", "clusters", "whole numbers", "all alike", "outlier"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [(64, 8), (61, 8), (100, 16), (5, 16), (40, 64), (200, 3), (48, 2)]
)
def test_an_auction_is_balanced_and_within_a_percent_of_the_highest_total(kind, num_tokens, num_experts):
    scores = skewed(kind, num_tokens, num_experts)
    best = total(scores, balanced_experts(scores, solver="exact"))
    experts = balanced_experts(scores, solver="auction")
    assert_balanced(experts, num_experts=num_experts)
    assert best * 0.99 <= total(scores, experts) <= best + 1e-9 * best


@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(0, 60),
    num_experts=st.integers(1, 9),
    max_rounds=st.sampled_from([1, 2, 5, 2000]),
)
@settings(max_examples=80)
def test_an_auction_is_balanced_wherever_it_is_ended(seed, num_tokens, num_experts, max_rounds):
    scores = normal(num_tokens, num_experts, seed=seed) + torch.linspace(3.0, 0.0, num_experts)
    experts = balanced_experts(scores, solver="auction", max_rounds=max_rounds)
    assert_balanced(experts, num_experts=num_experts)
    assert torch.equal(balanced_experts(scores, solver="auction", max_rounds=max_rounds), experts)


@SOLVERS
@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("num_tokens", [12, 13])
def test_extreme_logits_are_balanced_as_well(solver, value, num_tokens):
    equal = torch.full((num_tokens, 4), value)
    one_sided = torch.zeros(num_tokens, 4)
    one_sided[:, 0] = value
    mixed = one_sided.clone()
    mixed[:, 3] = -value
    for logits in (equal, one_sided, mixed):
        assignments = assign(logits, solver=solver, training=True)
        assert_balanced(assignments.expert_ids, num_experts=4)
        assert assignments.scores.isfinite().all()


def test_large_batches_are_left_to_the_auction():
    scores = normal(EXACT_UP_TO + 8, 8, seed=0)
    assert torch.equal(balanced_experts(scores, solver="auto"), balanced_experts(scores, solver="auction"))
    few = scores[:EXACT_UP_TO]
    assert torch.equal(balanced_experts(few, solver="auto"), balanced_experts(few, solver="exact"))


def test_the_gate_learns_through_the_weights():
    logits = LOGITS.clone().requires_grad_()
    assign(logits, training=True).scores.sum().backward()
    chosen = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    assert torch.equal(logits.grad != 0.0, chosen)
