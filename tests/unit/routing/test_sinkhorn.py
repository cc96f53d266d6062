from __future__ import annotations

import pytest
import torch

from moe_runtime.config.policies import SinkhornPolicyConfig
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.scaling import scale_columns

# Everybody likes expert 0 better, by less and less.
LOGITS = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])


def assign(logits=LOGITS, *, training=True, mask=None, k_asked=None, **options):
    policy = build_policy(SinkhornPolicyConfig(kind="sinkhorn", **options), num_experts=logits.shape[1])
    return policy.assign(logits, TokenInfo(k=k_asked, mask=mask, training=training))


def test_who_likes_the_favourite_most_gets_it():
    assignments = assign()
    assert assignments.expert_ids.tolist() == [0, 0, 1, 1]
    assert assignments.scores.tolist() == pytest.approx(torch.sigmoid(torch.tensor([4.0, 3.0, 0.0, 0.0])).tolist())


def test_the_price_of_the_favourite_is_where_the_loads_are_equal():
    # sigmoid(4 - p) + sigmoid(3 - p) + sigmoid(2 - p) + sigmoid(1 - p) = 2 at p = 2.5.
    gaps = (LOGITS - LOGITS.amax(1, keepdim=True)).double()
    factors = scale_columns(gaps.exp(), tolerance=1e-9, max_iterations=1000)
    assert float(factors.log().diff()) == pytest.approx(2.5, abs=1e-6)


def test_scaled_rows_and_columns_have_equal_sums():
    matrix = torch.rand(30, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp_min(1e-3)
    factors = scale_columns(matrix, tolerance=1e-6, max_iterations=1000)
    scaled = matrix * factors / (matrix @ factors)[:, None]
    assert scaled.sum(0).tolist() == pytest.approx([30 / 7] * 7, rel=1e-6)


def test_the_scaling_ends_after_its_rounds():
    matrix = LOGITS.double().exp() / LOGITS.double().exp().amax(1, keepdim=True)
    once = scale_columns(matrix, tolerance=1e-9, max_iterations=1)
    expected = 2.0 / (matrix / matrix.sum(1, keepdim=True)).sum(0)
    torch.testing.assert_close(once, expected)


def test_evaluation_takes_the_best_logits():
    assert assign(training=False).expert_ids.tolist() == [0, 0, 0, 0]
    assert assign(training=False, evaluation="as_in_training").expert_ids.tolist() == [0, 0, 1, 1]


def test_several_experts_weigh_as_the_softmax_over_all_has_it():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]]).log()
    assignments = assign(logits, training=False, k=2)
    assert assignments.scores.tolist() == pytest.approx([0.5, 0.5, 0.3, 0.3])
    # The layer's k says how experts are weighed, not the request's.
    assert assign(logits, training=False, k=2, k_asked=1).scores.tolist() == pytest.approx([0.5, 0.5])


def test_padding_does_not_count():
    logits = torch.cat([LOGITS, torch.full((4, 2), 9.0)])
    mask = torch.tensor([True] * 4 + [False] * 4)
    assignments = assign(logits, mask=mask)
    assert assignments.token_ids.tolist() == [0, 1, 2, 3]
    assert assignments.expert_ids.tolist() == [0, 0, 1, 1]
    assert assign(logits, mask=torch.zeros(8, dtype=torch.bool)).num_assignments == 0


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
def test_extreme_logits_give_no_nan(value, k):
    one_sided = torch.zeros(6, 3)
    one_sided[:, 0] = value
    mixed = one_sided.clone()
    mixed[:3, 1] = -value
    for logits in (torch.full((6, 3), value), one_sided, mixed):
        for dtype in (torch.float32, torch.float64):
            assignments = assign(logits.to(dtype), k=k)
            assert assignments.scores.isfinite().all()
            assert assignments.num_assignments == 6 * k


@pytest.mark.parametrize("gap", [200.0, 300.0, 1e4, 1e30])
def test_factors_stay_above_0_and_finite_at_the_widest_gaps(gap):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        signs = torch.randint(0, 2, (9, 4), generator=generator).double()
        gaps = (-gap * signs).clamp_min(-300.0)
        gaps[torch.arange(9), torch.randint(0, 4, (9,), generator=generator)] = 0.0
        factors = scale_columns(gaps.exp(), tolerance=1e-12, max_iterations=500)
        assert factors.isfinite().all()
        assert (factors > 0.0).all()


def test_a_single_token_goes_to_its_best_experts():
    assert assign(torch.tensor([[0.1, 0.3, 0.2]]), k=2).expert_ids.tolist() == [1, 2]


def test_no_tokens_fewer_tokens_than_experts_and_one_expert():
    assert assign(torch.zeros(0, 3)).num_assignments == 0
    assert sorted(assign(torch.tensor([[5.0, 1.0, 0.0], [9.0, 1.0, 0.0]])).expert_ids.tolist()) == [0, 1]
    assert assign(torch.randn(3, 1)).expert_ids.tolist() == [0, 0, 0]


def test_only_evaluation_as_in_training_couples_the_batch():
    for evaluation in ("greedy", "as_in_training"):
        policy = build_policy(SinkhornPolicyConfig(kind="sinkhorn", evaluation=evaluation), num_experts=2)
        assert policy.batch_coupled == (evaluation == "as_in_training")


def test_the_gate_learns_through_the_weights_and_not_through_the_scaling():
    logits = LOGITS.clone().requires_grad_()
    assign(logits).scores.sum().backward()
    chosen = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    assert torch.equal(logits.grad != 0.0, chosen)
