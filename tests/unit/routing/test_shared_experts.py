"""Shared experts get every valid token, outside of k, capacity, normalisation and losses."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import TopKPolicyConfig
from moe_runtime.errors import ShapeError
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.combine import combine, gather_rows
from moe_runtime.routing.moved import move_rows
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.shared import add_shared_experts, with_shared_of, without_shared

# Probabilities of three experts. First choices: 0, 0, 2; second choices: 1, 2, 0.
LOGITS = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.3, 0.1, 0.6]]).log()
TOKENS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
#: Of two shared experts, which are experts 3 and 4.
GATED = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])


def admit_batch(*, k=1, capacity=None, mask=None, ks=None, **policy):
    built = build_policy(TopKPolicyConfig(k=k, **policy), num_experts=3)
    return admit(built.assign(LOGITS, TokenInfo(mask=mask, k=ks)), capacity or CapacityConfig())


def pairs_of(admission):
    assignments = admission.assignments
    columns = (assignments.token_ids, assignments.expert_ids, assignments.ranks)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def weights_of(plan):
    """The weight of each planned (token, expert)."""
    keys = zip(plan.token_ids.tolist(), plan.expert_ids.tolist(), strict=True)
    return dict(zip(keys, plan.weights.tolist(), strict=True))


def test_without_shared_experts_the_admission_comes_back_as_it_is():
    admission = admit_batch()
    assert add_shared_experts(admission, num_shared=0) is admission
    assert without_shared(admission) is admission
    assert with_shared_of(admission, admission) is admission


def test_a_grid_stays_a_grid_and_only_the_policys_columns_are_normalised():
    admission = add_shared_experts(admit_batch(k=2, scaling_factor=2.5), num_shared=2, weights=GATED)
    grid = admission.assignments.grid
    assert grid is not None
    assert grid.expert_ids.tolist() == [[0, 1, 3, 4], [0, 2, 3, 4], [2, 0, 3, 4]]
    assert (admission.assignments.num_experts, admission.assignments.num_routed) == (5, 3)
    plan = plan_dispatch(admission)
    assert plan.rows_per_token == 4
    assert plan.rows_per_expert == (3, 1, 2, 3, 3)
    weights = weights_of(plan)
    assert [weights[0, expert] for expert in (0, 1, 3, 4)] == pytest.approx([2.5 * 5 / 8, 2.5 * 3 / 8, 0.9, 0.1])


@pytest.mark.parametrize("norm_p", [1.0, 2.0])
@pytest.mark.parametrize("normalize", ["before_drop", "after_drop", "none"])
def test_pairs_weigh_what_the_grid_of_the_same_choices_does(normalize, norm_p):
    policy = {"k": 2, "normalize": normalize, "norm_p": norm_p, "scaling_factor": 2.0}
    grid, pairs = (
        add_shared_experts(admit_batch(mask=mask, **policy), num_shared=2, weights=GATED)
        for mask in (None, torch.ones(3, dtype=torch.bool))
    )
    assert pairs.assignments.grid is None
    assert pairs_of(pairs) == pairs_of(grid)
    assert weights_of(plan_dispatch(pairs)) == pytest.approx(weights_of(plan_dispatch(grid)))


def test_shared_experts_stand_behind_all_choices_and_padding_gets_none():
    mask = torch.tensor([True, False, True])
    admission = add_shared_experts(admit_batch(k=2, mask=mask, ks=torch.tensor([1, 2, 2])), num_shared=2, mask=mask)
    # Token 0 asks for one expert, token 2 for two: shared ones have the same ranks for both.
    assert pairs_of(admission) == [
        (0, 0, 0), (2, 2, 0), (2, 0, 1), (0, 3, 2), (2, 3, 2), (0, 4, 3), (2, 4, 3),
    ]  # fmt: skip


def test_a_valid_token_that_asks_for_no_expert_still_gets_the_shared_ones():
    admission = add_shared_experts(admit_batch(ks=torch.tensor([0, 1, 0])), num_shared=1)
    assert pairs_of(admission) == [(1, 0, 0), (0, 3, 1), (1, 3, 1), (2, 3, 1)]
    nobody = add_shared_experts(admit_batch(ks=torch.zeros(3, dtype=torch.int64)), num_shared=1)
    assert pairs_of(nobody) == [(0, 3, 0), (1, 3, 0), (2, 3, 0)]


def test_capacity_is_that_of_the_policys_choices_and_shared_experts_are_never_full():
    # Three assignments of three experts: one place each, so token 1 is dropped by expert 0.
    admission = add_shared_experts(admit_batch(capacity=CapacityConfig(factor=1.0, min=1)), num_shared=2)
    assert admission.capacity == 1
    assert admission.admitted.tolist() == [True, False, True] + [True] * 6
    assert not admission.rerouted.any()
    assert plan_dispatch(admission).rows_per_expert == (1, 0, 1, 3, 3)


def test_a_reroute_before_them_keeps_what_was_asked_for():
    rule = CapacityConfig(factor=1.0, min=1, overflow="reroute")
    admission = add_shared_experts(admit_batch(capacity=rule), num_shared=1)
    assert admission.asked_expert_ids.tolist() == [0, 0, 2, 3, 3, 3]
    assert admission.assignments.expert_ids.tolist() == [0, 1, 2, 3, 3, 3]
    assert admission.rerouted.tolist() == [False, True, False, False, False, False]


def test_taking_them_out_and_putting_them_back_changes_nothing():
    for mask in (None, torch.tensor([True, True, False])):
        for rule in (CapacityConfig(), CapacityConfig(factor=0.75, min=1, overflow="reroute")):
            before = admit_batch(k=2, mask=mask, capacity=rule)
            admission = add_shared_experts(before, num_shared=2, weights=GATED, mask=mask)
            routed = without_shared(admission)
            assert pairs_of(routed) == pairs_of(before)
            assert routed.admitted.tolist() == before.admitted.tolist()
            back = with_shared_of(admission, routed)
            assert pairs_of(back) == pairs_of(admission)
            assert back.assignments.scores.tolist() == admission.assignments.scores.tolist()
            assert back.asked_expert_ids.tolist() == admission.asked_expert_ids.tolist()
            assert (back.assignments.num_experts, back.assignments.num_shared) == (5, 2)


@pytest.mark.parametrize("score", ["softmax", "softmax_after_topk"])
def test_moved_rows_leave_the_weights_of_shared_experts_alone(score):
    plan = plan_dispatch(add_shared_experts(admit_batch(k=2, score=score), num_shared=2, weights=GATED))
    # Token 0 loses expert 0 and takes expert 2: it holds 1 and 2 then.
    moved = move_rows(plan, torch.tensor([0]), torch.tensor([2]))
    assert moved.rows_per_expert == (2, 1, 3, 3, 3)
    weights = weights_of(moved)
    assert [weights[0, expert] for expert in (1, 2, 3, 4)] == pytest.approx([3 / 5, 2 / 5, 0.9, 0.1])
    assert [weights[1, expert] for expert in (0, 2, 3, 4)] == pytest.approx([6 / 9, 3 / 9, 0.8, 0.2])


def test_the_input_of_a_shared_expert_is_scaled_by_its_own_weight_alone():
    # Llama 4: the routed expert's input is scaled, the shared expert's is not.
    plan = plan_dispatch(add_shared_experts(admit_batch(normalize="none", score="sigmoid"), num_shared=1))
    rows = gather_rows(TOKENS, plan, weight_on="input")
    assert torch.equal(rows[plan.expert_ids == 3], TOKENS)
    assert torch.allclose(rows[0], torch.sigmoid(LOGITS[0, 0]) * TOKENS[0])
    outputs = combine(TOKENS, rows, plan, residual="none", weight_on="input").outputs
    assert torch.allclose(outputs, TOKENS * (1 + torch.sigmoid(LOGITS).amax(1, keepdim=True)))


def combine_batch(residual, served, *, exact=False):
    """Token 0 has expert 0 at weight 1, all have expert 3 at their gated weight; expert e gives ten to its power."""
    plan = plan_dispatch(add_shared_experts(admit_batch(), num_shared=1, weights=GATED[:, :1]))
    rows = torch.full((plan.num_planned, 2), torch.nan)
    keys = list(zip(plan.token_ids.tolist(), plan.expert_ids.tolist(), strict=True))
    answered = torch.tensor([key in served for key in keys])
    rows[answered] = (10.0 ** plan.expert_ids[answered])[:, None].expand(-1, 2)
    combined = combine(TOKENS, rows, plan, residual=residual, weight_on="output", served=answered, exact=exact)
    return combined.outputs[:, 0].tolist()


@pytest.mark.parametrize("exact", [False, True])
def test_a_token_passes_through_only_where_not_even_a_shared_expert_served_it(exact):
    served = {(0, 0), (1, 3)}
    assert combine_batch("passthrough", served, exact=exact) == pytest.approx([1.0, 800.0, 5.0])
    assert combine_batch("none", served, exact=exact) == pytest.approx([1.0, 800.0, 0.0])
    assert combine_batch("add", served, exact=exact) == pytest.approx([2.0, 803.0, 5.0])


def test_what_a_shared_expert_adds_takes_nothing_from_the_blend():
    served = {(0, 0), (0, 3), (1, 3)}
    # Token 0 is all of expert 0; token 1 lost its own expert and keeps all of itself; token 2 has nothing.
    assert combine_batch("blend", served) == pytest.approx([1.0 + 900.0, 800.0 + 3.0, 5.0])


def test_after_drop_normalises_over_the_served_choices_of_the_policy_alone():
    admission = add_shared_experts(admit_batch(k=2, normalize="after_drop"), num_shared=1, weights=GATED[:, :1])
    plan = plan_dispatch(admission)
    served = plan.expert_ids != 0
    combined = combine(TOKENS, torch.ones(9, 2), plan, residual="none", weight_on="output", served=served)
    weights = dict(zip(zip(plan.token_ids.tolist(), plan.expert_ids.tolist(), strict=True), combined.weights.tolist(),
                       strict=True))  # fmt: skip
    assert [weights[0, expert] for expert in (0, 1, 3)] == pytest.approx([0.0, 1.0, 0.9])
    assert [weights[1, expert] for expert in (0, 2, 3)] == pytest.approx([0.0, 1.0, 0.8])


def test_gradients_reach_the_weights_of_shared_experts_and_of_the_gate():
    gated, logits = GATED.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    for norm_p, mask in ((1.0, None), (0.5, torch.ones(3, dtype=torch.bool))):
        policy = build_policy(TopKPolicyConfig(k=2, norm_p=norm_p), num_experts=3)
        admission = admit(policy.assign(logits, TokenInfo(mask=mask)), CapacityConfig())
        plan = plan_dispatch(add_shared_experts(admission, num_shared=2, weights=gated, mask=mask))
        rows = gather_rows(TOKENS, plan, weight_on="output") * (1.0 + plan.expert_ids)[:, None]
        outputs = combine(TOKENS, rows, plan, residual="blend", weight_on="output").outputs
        gate_grad, shared_grad = torch.autograd.grad(outputs.square().sum(), [logits, gated])
        assert gate_grad.isfinite().all()
        # Of expert 3, which gives 4 x: the derivative of (y + 4 w x) ** 2.
        assert torch.allclose(shared_grad[:, 0], (2 * outputs * 4 * TOKENS).sum(1))


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match=r"weights of shared experts: expected shape \(3, 1\), found \(3, 2\)"):
        add_shared_experts(admit_batch(), num_shared=1, weights=GATED)
