from __future__ import annotations

import pytest
import torch

from moe_runtime.config.policies import ExpertChoicePolicyConfig
from moe_runtime.errors import InvalidRequestError
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.weights import requested_weights

# Logarithms of probabilities: the softmax gives them back.
LOGITS = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]).log()


def assign(logits=LOGITS, *, factor=1.0, mask=None, **options):
    config = ExpertChoicePolicyConfig(kind="expert_choice", capacity_factor=factor, **options)
    return build_policy(config, num_experts=logits.shape[1]).assign(logits, TokenInfo(mask=mask))


def columns(assignments):
    return [column.tolist() for column in (assignments.token_ids, assignments.expert_ids, assignments.ranks)]


def test_each_expert_takes_its_best_tokens():
    assignments = assign()
    assert columns(assignments) == [[0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert requested_weights(assignments).tolist() == pytest.approx([0.9, 0.8, 0.4, 0.7])


def test_a_tokens_choices_go_by_its_own_scores():
    assignments = assign(factor=2.0)
    assert columns(assignments) == [[0, 1, 2, 3] * 2, [0, 0, 0, 1, 1, 1, 1, 0], [0] * 4 + [1] * 4]
    assert assignments.scores.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.7, 0.1, 0.2, 0.4, 0.3])


def test_some_tokens_get_no_expert_and_some_get_many():
    # Expert 0 takes tokens 0 and 1, so does expert 1: nobody wants token 2 or 3.
    logits = torch.tensor([[2.0, 3.0], [1.0, 2.0], [0.0, 0.0], [-1.0, 1.0]])
    assignments = assign(logits, score="sigmoid")
    assert columns(assignments) == [[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    assert assignments.scores.tolist() == pytest.approx(torch.sigmoid(torch.tensor([3.0, 2.0, 2.0, 1.0])).tolist())


def test_padding_is_never_taken_and_does_not_count():
    mask = torch.tensor([False, True, True, True])
    # Three tokens over two experts: two each.
    assert columns(assign(mask=mask)) == [[1, 2, 3, 2], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert assign(mask=torch.zeros(4, dtype=torch.bool)).num_assignments == 0


def test_the_share_of_an_expert_is_exact_and_at_most_the_tokens():
    logits = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    assert assign(logits, factor=1.1).load == (11,) * 10
    assert assign(logits, factor=1000.0).load == (100,) * 10
    assert assign(logits[:3], factor=0.1).load == (1,) * 10


def test_without_tokens_experts_take_none():
    assert columns(assign(LOGITS[:0])) == [[], [], []]


def test_one_expert_takes_all():
    assignments = assign(torch.randn(3, 1))
    assert columns(assignments) == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]
    assert assignments.scores.tolist() == [1.0, 1.0, 1.0]


def test_ties_go_as_torch_topk_has_them():
    assignments = assign(torch.zeros(8, 3), factor=1.0)
    for expert in range(3):
        taken = assignments.token_ids[assignments.expert_ids == expert]
        best = torch.topk(torch.full((3, 8), 1 / 3), 3, dim=-1).indices[expert]
        assert sorted(taken.tolist()) == sorted(best.tolist())


def test_scores_carry_a_gradient():
    logits = LOGITS.clone().requires_grad_()
    assign(logits, mask=torch.tensor([False, True, True, True])).scores.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].tolist() == [0.0, 0.0]
    assert (logits.grad[1] != 0.0).all()


def test_the_service_is_told_that_it_couples_the_batch_and_sets_the_capacity():
    policy = build_policy(ExpertChoicePolicyConfig(kind="expert_choice"), num_experts=3)
    assert (policy.max_k, policy.batch_coupled, policy.sets_capacity, policy.accepts_k) == (3, True, True, False)


@pytest.mark.parametrize("k", [1, torch.tensor([1, 1, 1, 1])])
def test_a_token_cannot_ask_for_fewer_experts(k):
    policy = build_policy(ExpertChoicePolicyConfig(kind="expert_choice"), num_experts=2)
    with pytest.raises(InvalidRequestError, match=r"^k: expected none"):
        policy.assign(LOGITS, TokenInfo(k=k))
