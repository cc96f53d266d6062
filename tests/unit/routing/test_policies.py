from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_runtime.config.policies import DensePolicyConfig, SwitchPolicyConfig, TopKPolicyConfig
from moe_runtime.errors import ConfigError, InvalidRequestError, ShapeError
from moe_runtime.routing.assignments import WeightRule
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.weights import requested_weights, weigh_grid

# Softmax over [log 5, log 3, log 2] is [0.5, 0.3, 0.2].
LOGITS = torch.tensor([[5.0, 3.0, 2.0], [2.0, 3.0, 5.0]]).log()


def assign(config, logits=LOGITS, **options):
    return build_policy(config, num_experts=logits.shape[1]).assign(logits, TokenInfo(**options))


def columns(assignments):
    return [column.tolist() for column in (assignments.token_ids, assignments.expert_ids, assignments.ranks)]


def test_top_k_asks_for_the_best_experts_all_first_choices_first():
    assignments = assign(TopKPolicyConfig(k=2))
    assert columns(assignments) == [[0, 1, 0, 1], [0, 2, 1, 1], [0, 0, 1, 1]]
    assert assignments.scores.tolist() == pytest.approx([0.5, 0.5, 0.3, 0.3])
    assert assignments.all_scores.flatten().tolist() == pytest.approx([0.5, 0.3, 0.2, 0.2, 0.3, 0.5])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [5 / 8, 3 / 8]),
        ({"normalize": "after_drop"}, [5 / 8, 3 / 8]),
        ({"normalize": "none"}, [0.5, 0.3]),
        ({"scaling_factor": 2.5}, [12.5 / 8, 7.5 / 8]),
        ({"norm_p": 2.0}, [5 / 34**0.5, 3 / 34**0.5]),
        ({"score": "softmax_after_topk"}, [5 / 8, 3 / 8]),
        ({"score": "softmax_after_topk", "normalize": "none"}, [5 / 8, 3 / 8]),
        # sigmoid(log 5) = 5/6, sigmoid(log 3) = 3/4.
        ({"score": "sigmoid", "normalize": "none"}, [5 / 6, 3 / 4]),
        ({"score": "sigmoid"}, [10 / 19, 9 / 19]),
    ],
)
def test_scores_and_norms_give_the_weights_worked_by_hand(options, expected):
    assignments = assign(TopKPolicyConfig(k=2, **options), LOGITS[:1])
    assert requested_weights(assignments).tolist() == pytest.approx(expected)


def test_dense_asks_for_every_expert_with_its_softmax_weight():
    assignments = assign(DensePolicyConfig(kind="dense"))
    assert columns(assignments)[:2] == [[0, 1, 0, 1, 0, 1], [0, 2, 1, 1, 2, 0]]
    assert requested_weights(assignments).tolist() == pytest.approx([0.5, 0.5, 0.3, 0.3, 0.2, 0.2])
    assert assignments.all_scores is None


def test_switch_weighs_its_one_expert_by_the_probability_among_all():
    assignments = assign(SwitchPolicyConfig(kind="switch"))
    assert columns(assignments) == [[0, 1], [0, 2], [0, 0]]
    assert requested_weights(assignments).tolist() == pytest.approx([0.5, 0.5])


def test_policies_say_what_the_service_needs_to_know():
    dense = build_policy(DensePolicyConfig(kind="dense", normalize="none"), num_experts=3)
    assert (dense.max_k, dense.can_reroute, dense.batch_coupled) == (3, False, False)
    assert dense.weight_rule == WeightRule(normalize="none")
    top_k = build_policy(TopKPolicyConfig(k=2, norm_p=2.0, scaling_factor=3.0), num_experts=3)
    assert (top_k.max_k, top_k.can_reroute, top_k.batch_coupled) == (2, True, False)
    assert top_k.weight_rule == WeightRule(norm_p=2.0, scaling_factor=3.0)
    assert build_policy(SwitchPolicyConfig(kind="switch"), num_experts=3).max_k == 1


def test_a_request_may_ask_for_fewer_experts():
    assert columns(assign(TopKPolicyConfig(k=2), k=1)) == [[0, 1], [0, 2], [0, 0]]


def test_rows_may_ask_for_different_numbers_of_experts():
    assignments = assign(TopKPolicyConfig(k=3), k=torch.tensor([3, 1]))
    assert columns(assignments) == [[0, 1, 0, 0], [0, 2, 1, 2], [0, 0, 1, 2]]
    assert requested_weights(assignments).tolist() == pytest.approx([0.5, 1.0, 0.3, 0.2])


def test_softmax_after_topk_goes_over_what_the_row_asked_for():
    config = TopKPolicyConfig(k=3, score="softmax_after_topk", normalize="none")
    assignments = assign(config, k=torch.tensor([2, 1]))
    assert assignments.scores.tolist() == pytest.approx([5 / 8, 1.0, 3 / 8])


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_after_topk"])
def test_padding_asks_for_nothing_and_gives_no_nan_to_the_gradient(score):
    logits = LOGITS.clone().requires_grad_()
    policy = build_policy(TopKPolicyConfig(k=2, score=score), num_experts=3)
    assignments = policy.assign(logits, TokenInfo(mask=torch.tensor([False, True])))
    assert columns(assignments) == [[1, 1], [2, 1], [0, 1]]
    requested_weights(assignments)[0].backward()
    assert logits.grad[0].tolist() == [0.0, 0.0, 0.0]
    assert logits.grad.isfinite().all()


def test_mask_and_k_per_row_go_together():
    assignments = assign(TopKPolicyConfig(k=2), k=torch.tensor([2, 1]), mask=torch.tensor([True, False]))
    assert columns(assignments) == [[0, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_after_topk"])
def test_infinite_and_nan_logits_never_become_nan_weights(score):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[inf, inf, 0.0], [-inf, -inf, -inf], [nan, 1.0, nan], [nan, nan, nan]])
    weights = requested_weights(assign(TopKPolicyConfig(k=2, score=score), logits))
    assert weights.isfinite().all()


def test_bfloat16_logits_are_scored_in_float32():
    assert assign(TopKPolicyConfig(), LOGITS.bfloat16()).scores.dtype == torch.float32


def test_empty_batch_asks_for_nothing():
    assert columns(assign(TopKPolicyConfig(), torch.zeros(0, 4))) == [[], [], []]


def test_more_choices_than_experts_are_refused_at_load():
    with pytest.raises(ConfigError, match=r"policy\.k: expected at most the layer's 3 experts, found 4"):
        build_policy(TopKPolicyConfig(k=4), num_experts=3)


@pytest.mark.parametrize("k", [0, 3])
def test_k_outside_the_layers_is_refused(k):
    with pytest.raises(InvalidRequestError, match=f"k: expected 1 to 2, the layer's own, found {k}"):
        assign(TopKPolicyConfig(k=2), k=k)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": torch.tensor([1])}, "^k: expected one"), ({"mask": torch.ones(3, dtype=torch.bool)}, "^mask: expected")],
)
def test_rows_of_another_number_are_refused(options, message):
    with pytest.raises(ShapeError, match=message):
        assign(TopKPolicyConfig(k=2), **options)


def test_logits_for_another_number_of_experts_are_refused():
    with pytest.raises(ShapeError, match=r"router_logits: expected shape \(num_tokens, 4\), found \(2, 3\)"):
        build_policy(TopKPolicyConfig(), num_experts=4).assign(LOGITS)


@pytest.mark.parametrize("norm_p", [1.0, 2.0, 0.5])
def test_tiny_and_zero_scores_are_normalised_without_nan(norm_p):
    assignments = assign(TopKPolicyConfig(k=2, norm_p=norm_p))
    scores = torch.tensor([3e-30, 0.0, 4e-30, 0.0])
    tiny = replace(assignments, choices=replace(assignments.pairs, scores=scores))
    expected = {1.0: [3 / 7, 4 / 7], 2.0: [0.6, 0.8], 0.5: [3 / (3**0.5 + 2) ** 2, 4 / (3**0.5 + 2) ** 2]}
    weights = requested_weights(tiny).tolist()
    assert weights[::2] == pytest.approx(expected[norm_p], rel=1e-5)
    assert weights[1::2] == [0.0, 0.0]
    grid_weights = weigh_grid(scores.reshape(2, 2).t(), assignments.weight_rule)
    assert grid_weights[0].tolist() == pytest.approx(expected[norm_p], rel=1e-5)
    assert grid_weights[1].tolist() == [0.0, 0.0]
