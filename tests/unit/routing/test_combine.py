from __future__ import annotations

import pytest
import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import TopKPolicyConfig
from moe_runtime.errors import ShapeError
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.combine import combine, gather_rows
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy

# Token 0 asks for expert 0 (0.5) then 1 (0.3); token 1 for expert 2 (0.6) then 0 (0.3).
LOGITS = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.1, 0.6]]).log()
TOKENS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def make_plan(logits=LOGITS, *, capacity=None, **policy):
    built = build_policy(TopKPolicyConfig(k=2, **policy), num_experts=logits.shape[1])
    return plan_dispatch(admit(built.assign(logits), capacity or CapacityConfig()))


def test_plan_orders_rows_by_expert_then_token():
    plan = make_plan(normalize="none")
    assert plan.token_ids.tolist() == [0, 1, 0, 1]
    assert plan.expert_ids.tolist() == [0, 0, 1, 2]
    assert plan.rows_per_expert == (2, 1, 1)
    assert plan.assignment_ids.tolist() == [0, 3, 2, 1]
    assert plan.weights.tolist() == pytest.approx([0.5, 0.3, 0.3, 0.6])
    assert plan.num_planned == 4


def test_gathered_rows_follow_the_plan_or_the_part_that_is_asked_for():
    plan = make_plan()
    assert gather_rows(TOKENS, plan, weight_on="output")[:, 0].tolist() == [1.0, 3.0, 1.0, 3.0]
    assert gather_rows(TOKENS, plan, weight_on="output", planned_ids=slice(1, 3))[:, 0].tolist() == [3.0, 1.0]
    part = gather_rows(TOKENS, plan, weight_on="output", planned_ids=torch.tensor([3, 0]))
    assert part.tolist() == [[3.0, 4.0], [1.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_on_input_scales_what_the_expert_sees_and_not_what_comes_back(dtype):
    plan = make_plan(normalize="none")
    rows = gather_rows(TOKENS.to(dtype), plan, weight_on="input", planned_ids=torch.tensor([2, 1]))
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.float(), torch.tensor([[0.3, 0.6], [0.9, 1.2]]), rtol=1e-2, atol=1e-2)
    every_row = gather_rows(TOKENS, plan, weight_on="input")
    combined = combine(TOKENS, every_row**2, plan, residual="none", weight_on="input")
    # Token 0: (0.5 * 1) ** 2 + (0.3 * 1) ** 2.
    assert combined.outputs[0, 0].item() == pytest.approx(0.34)
    assert combined.weights.tolist() == pytest.approx([0.5, 0.3, 0.3, 0.6])


def test_outputs_are_weighted_sums_and_may_have_another_shape_than_the_tokens():
    plan = make_plan(normalize="none")
    rows = torch.arange(4.0)[:, None, None].expand(4, 3, 2)
    combined = combine(TOKENS, rows, plan, residual="none", weight_on="output")
    assert combined.outputs.shape == (2, 3, 2)
    # Rows in plan order are 0, 1, 2, 3: token 0 is 0.5 * 0 + 0.3 * 2, token 1 is 0.3 * 1 + 0.6 * 3.
    assert combined.outputs[:, 0, 0].tolist() == pytest.approx([0.6, 2.1])


@pytest.mark.parametrize(
    ("normalize", "weights"),
    [("before_drop", [0, 1 / 3, 3 / 8, 2 / 3]), ("after_drop", [0, 1 / 3, 1, 2 / 3]), ("none", [0, 0.3, 0.3, 0.6])],
)
def test_rows_that_were_not_served_do_not_leak_and_only_after_drop_renormalises(normalize, weights):
    plan = make_plan(normalize=normalize)
    rows = torch.full((4, 2), torch.nan)
    served = torch.tensor([False, True, True, True])
    rows[served] = 1.0
    combined = combine(TOKENS, rows, plan, residual="none", weight_on="output", served=served)
    assert combined.weights.tolist() == pytest.approx(weights)
    assert combined.outputs[:, 0].tolist() == pytest.approx([weights[2], weights[1] + weights[3]])


@pytest.mark.parametrize("normalize", ["before_drop", "after_drop", "none"])
@pytest.mark.parametrize(
    ("residual", "expected"),
    [("none", [0.0, 0.0]), ("passthrough", [1.0, 2.0]), ("add", [1.0, 2.0]), ("blend", [1.0, 2.0])],
)
def test_token_with_nothing_served_gets_its_residual(normalize, residual, expected):
    plan = make_plan(normalize=normalize)
    served = plan.token_ids == 1
    combined = combine(
        TOKENS, torch.full((4, 2), torch.nan).where(~served[:, None], 1.0), plan,
        residual=residual, weight_on="output", served=served,
    )  # fmt: skip
    assert combined.outputs[0].tolist() == expected
    assert combined.outputs.isfinite().all()


@pytest.mark.parametrize(
    ("residual", "expected"),
    [("none", torch.zeros(2, 2)), ("passthrough", TOKENS), ("add", TOKENS), ("blend", TOKENS)],
)
def test_batch_in_which_nobody_was_served_is_its_residual(residual, expected):
    plan = make_plan()
    served = torch.zeros(4, dtype=torch.bool)
    combined = combine(TOKENS, TOKENS.new_empty(4, 2), plan, residual=residual, weight_on="output", served=served)
    assert torch.equal(combined.outputs, expected)
    assert combined.weights.tolist() == [0.0] * 4


def test_empty_batch_combines_to_nothing():
    plan = make_plan(torch.zeros(0, 3))
    combined = combine(torch.zeros(0, 2), torch.zeros(0, 5), plan, residual="none", weight_on="output")
    assert combined.outputs.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_keep_their_dtype_and_sums_run_in_float32_at_least(dtype):
    plan = make_plan(torch.zeros(1, 2))
    # 2048 + 1 is 2048 in float16, and 256 + 1 is 256 in bfloat16: the sum has to be made before rounding.
    rows = torch.tensor([[4096.0], [4.0]], dtype=dtype)
    combined = combine(torch.ones(1, 1, dtype=dtype), rows, plan, residual="none", weight_on="output")
    assert combined.outputs.dtype == dtype
    assert combined.weights.dtype == torch.float32
    assert combined.outputs.item() == torch.tensor(2050.0, dtype=dtype).item()


@pytest.mark.parametrize("normalize", ["before_drop", "after_drop", "none"])
@pytest.mark.parametrize("residual", ["add", "passthrough", "none"])
@pytest.mark.parametrize("norm_p", [1.0, 2.0])
def test_gradients_reach_tokens_rows_and_logits(normalize, residual, norm_p):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    capacity = CapacityConfig(factor=0.75, min=1, overflow="reroute")

    def layer(logits, tokens, scale):
        plan = make_plan(logits, capacity=capacity, normalize=normalize, norm_p=norm_p)
        rows = torch.tanh(gather_rows(tokens, plan, weight_on="output") * scale[plan.expert_ids])
        served = torch.arange(plan.num_planned) % 4 != 1
        return combine(tokens, rows, plan, residual=residual, weight_on="output", served=served).outputs

    assert torch.autograd.gradcheck(layer, (logits, tokens, scale))


def test_gradients_reach_logits_through_weighted_inputs():
    logits = LOGITS.double().requires_grad_()
    tokens = TOKENS.double().requires_grad_()

    def layer(logits, tokens):
        plan = make_plan(logits)
        rows = gather_rows(tokens, plan, weight_on="input") ** 2
        return combine(tokens, rows, plan, residual="none", weight_on="input").outputs

    assert torch.autograd.gradcheck(layer, (logits, tokens))


def test_wrong_shapes_are_refused():
    plan = make_plan()
    rules = {"residual": "none", "weight_on": "output"}
    with pytest.raises(ShapeError, match="tokens: the plan was made for 2 rows, found 3"):
        combine(torch.ones(3, 2), torch.ones(4, 2), plan, **rules)
    with pytest.raises(ShapeError, match="tokens: the plan was made for 2 rows, found 3"):
        gather_rows(torch.ones(3, 2), plan, weight_on="output")
    with pytest.raises(ShapeError, match="expert_outputs: expected the plan's 4 rows, found 5"):
        combine(TOKENS, torch.ones(5, 2), plan, **rules)
    with pytest.raises(ShapeError, match=r"served: expected shape \(4,\), found \(3,\)"):
        combine(TOKENS, torch.ones(4, 2), plan, served=torch.ones(3, dtype=torch.bool), **rules)
    with pytest.raises(ShapeError, match=r"residual add: expected outputs of the item shape \(2,\), found \(3,\)"):
        combine(TOKENS, torch.ones(4, 3), plan, residual="add", weight_on="output")


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_exact_gives_the_bits_of_a_layer_that_multiplies_and_then_sums_its_slots(k):
    tokens = torch.randn(9, 33, generator=torch.Generator().manual_seed(k))
    logits = torch.randn(9, 8, generator=torch.Generator().manual_seed(k + 10))
    policy = build_policy(TopKPolicyConfig(k=k), num_experts=8)
    plan = plan_dispatch(admit(policy.assign(logits), CapacityConfig()))
    outputs = gather_rows(tokens, plan, weight_on="output") * (plan.expert_ids[:, None] + 1.7)
    combined = combine(tokens, outputs, plan, residual="none", weight_on="output", exact=True)

    scores, expert_ids = torch.topk(torch.softmax(logits, dim=-1), k)
    weights = scores / scores.sum(dim=-1, keepdim=True)
    slots = tokens.repeat_interleave(k, dim=0) * (expert_ids.reshape(-1, 1) + 1.7)
    assert torch.equal(combined.outputs, (slots * weights.reshape(-1, 1)).view(9, k, 33).sum(dim=1))


def test_exact_leaves_out_rows_that_were_not_served_and_a_batch_without_any_is_zero():
    plan = make_plan()
    outputs = torch.tensor([[1.0, 1.0], [torch.nan, torch.nan], [1.0, 1.0], [1.0, 1.0]])
    served = torch.tensor([True, False, True, True])
    combined = combine(TOKENS, outputs, plan, residual="none", weight_on="output", served=served, exact=True)
    usual = combine(TOKENS, outputs, plan, residual="none", weight_on="output", served=served)
    torch.testing.assert_close(combined.outputs, usual.outputs)
    nobody = combine(
        TOKENS, outputs, plan, residual="none", weight_on="output", served=torch.zeros(4, dtype=torch.bool), exact=True
    )
    assert nobody.outputs.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_gathered_into_memory_of_the_callers_in_its_dtype(weight_on, dtype):
    plan = make_plan()
    out = torch.full((2, 2), torch.nan, dtype=dtype)
    rows = gather_rows(TOKENS, plan, weight_on=weight_on, planned_ids=slice(1, 3), out=out)
    assert rows.data_ptr() == out.data_ptr()
    expected = gather_rows(TOKENS, plan, weight_on=weight_on, planned_ids=slice(1, 3))
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("exact", [False, True])
def test_blend_keeps_of_a_token_what_its_served_weights_leave(exact):
    # Token 0 has 0.5 and 0.3; token 1 has 0.6 and 0.3, of which expert 0 fails.
    plan = make_plan(normalize="none")
    rows, served = torch.full((4, 2), 10.0), torch.tensor([True, False, True, True])
    combined = combine(TOKENS, rows, plan, residual="blend", weight_on="output", served=served, exact=exact)
    assert combined.outputs[0].tolist() == pytest.approx([8.0 + 0.2 * 1.0, 8.0 + 0.2 * 2.0])
    assert combined.outputs[1].tolist() == pytest.approx([6.0 + 0.4 * 3.0, 6.0 + 0.4 * 4.0])


def test_blend_counts_weights_that_were_applied_to_the_input():
    plan = make_plan(normalize="none")
    rows = gather_rows(TOKENS, plan, weight_on="input")
    outputs = combine(TOKENS, rows, plan, residual="blend", weight_on="input").outputs
    assert torch.allclose(outputs, TOKENS)


def test_blend_needs_outputs_of_the_tokens_shape():
    with pytest.raises(ShapeError, match="residual blend: expected outputs of the item shape"):
        combine(TOKENS, torch.ones(4, 3), make_plan(), residual="blend", weight_on="output")
