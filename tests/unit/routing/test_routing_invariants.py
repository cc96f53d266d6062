"""What holds for every batch and every rule, and that the fast path computes what the slow oracle does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import (
    DensePolicyConfig,
    GroupsConfig,
    GShardPolicyConfig,
    HierarchicalPolicyConfig,
    SparseMixerPolicyConfig,
    SwitchPolicyConfig,
    TopKPolicyConfig,
)
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.combine import combine, gather_rows
from moe_runtime.routing.moved import move_rows
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.oracles import oracle_of
from moe_runtime.routing.reference.route import RoutingRules, forward_reference, route_reference
from moe_runtime.routing.weights import requested_weights

NORMALIZE = st.sampled_from(["before_drop", "after_drop", "none"])
SECOND = st.sampled_from(["threshold", "proportional", "always", "never"])
EXAMPLES = settings(max_examples=40, deadline=None)


def normal(*shape, seed):
    # float64: what is a tie in one of two computations must be one in the other.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divisors(number):
    return [count for count in range(2, number + 1) if number % count == 0]


@st.composite
def top_k_policies(draw, num_experts):
    k = draw(st.integers(1, num_experts))
    groups = None
    if divisors(num_experts) and draw(st.booleans()):
        count = draw(st.sampled_from(divisors(num_experts)))
        fewest = -(-k // (num_experts // count))
        rule = draw(st.sampled_from([None, "top2_sum", "max"]))
        groups = GroupsConfig(count=count, keep=draw(st.integers(fewest, count)), score=rule)
    return TopKPolicyConfig(
        k=k,
        score=draw(st.sampled_from(["softmax", "sigmoid", "softmax_after_topk"])),
        normalize=draw(NORMALIZE),
        norm_p=draw(st.sampled_from([1.0, 2.0, 3.5])),
        scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        expert_bias=draw(st.booleans()),
        groups=groups,
    )


@st.composite
def hierarchies(draw, num_experts):
    if not divisors(num_experts) or draw(st.booleans()):
        k = draw(st.integers(1, num_experts - 1))
        return HierarchicalPolicyConfig(kind="hierarchical", mode="shared_first", k=k, normalize=draw(NORMALIZE))
    num_groups = draw(st.sampled_from(divisors(num_experts)))
    return HierarchicalPolicyConfig(
        kind="hierarchical",
        num_groups=num_groups,
        k_groups=draw(st.integers(1, num_groups)),
        k=draw(st.integers(1, num_experts // num_groups)),
        normalize=draw(NORMALIZE),
    )


@st.composite
def policies(draw, num_experts):
    """Any policy that a layer of so many experts may have, in any of its forms."""
    kinds = ["top_k", "top_k", "top_k", "dense", "switch"]
    if num_experts > 1:
        kinds += ["gshard_top2", "sparsemixer", "hierarchical", "hierarchical"]
    kind = draw(st.sampled_from(kinds))
    if kind == "dense":
        return DensePolicyConfig(kind="dense", normalize=draw(NORMALIZE))
    if kind == "switch":
        return SwitchPolicyConfig(kind="switch")
    if kind == "gshard_top2":
        return GShardPolicyConfig(
            kind="gshard_top2",
            second=draw(SECOND),
            second_in_evaluation=draw(SECOND),
            threshold=draw(st.sampled_from([0.2, 0.5, 1.0])),
            normalize=draw(NORMALIZE),
        )
    if kind == "sparsemixer":
        # 0.6 is above what a positive logit can be away from a better one by; 0.01 is Phi's.
        return SparseMixerPolicyConfig(kind="sparsemixer", jitter_eps=draw(st.sampled_from([0.01, 0.2, 0.6])))
    return draw(hierarchies(num_experts) if kind == "hierarchical" else top_k_policies(num_experts))


@st.composite
def batches(draw):
    """Tokens, inputs and rules: anything that a layer may be asked."""
    num_tokens, num_experts = draw(st.integers(1, 14)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**31))
    policy = draw(policies(num_experts))
    built = build_policy(policy, num_experts=num_experts)
    overflow = "drop" if not built.can_reroute else draw(st.sampled_from(["drop", "reroute"]))
    capacity = CapacityConfig(
        factor=draw(st.sampled_from([None, 0.1, 0.5, 1.0, 1.25, 3.0])),
        min=draw(st.integers(1, 4)),
        drop=draw(st.sampled_from(["position", "priority", "score", "random"])),
        overflow=overflow,
        max_reroutes=draw(st.integers(1, 3)),
    )
    after_drop = getattr(policy, "normalize", "none") == "after_drop"
    weight_on = "output" if after_drop else draw(st.sampled_from(["output", "input"]))
    residual = draw(st.sampled_from(["add", "passthrough", "none", "blend"]))
    num_shared = draw(st.sampled_from([0, 0, 1, 3]))
    rules = RoutingRules(policy, capacity, residual, weight_on, num_shared=num_shared)
    rows = st.lists(st.integers(0, built.max_k), min_size=num_tokens, max_size=num_tokens)
    k = draw(st.none() | st.integers(1, built.max_k) | rows)
    mask = draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    seeds = draw(st.none() | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=num_tokens, max_size=num_tokens))
    cells = [(token, expert) for token in range(num_tokens) for expert in range(num_experts + num_shared)]
    failed = frozenset(draw(st.lists(st.sampled_from(cells), max_size=10)))
    gated = normal(num_tokens, num_shared, seed=seed + 2).sigmoid().tolist()
    biases = st.lists(st.floats(-1, 1, width=32), min_size=num_experts, max_size=num_experts)
    hot = torch.linspace(draw(st.sampled_from([0.0, 3.0])), 0.0, built.num_logits, dtype=torch.float64)
    inputs = RoutingInputs(
        normal(num_tokens, built.num_logits, seed=seed) + hot,
        k=k,
        mask=mask,
        row_seeds=seeds,
        expert_bias=draw(st.none() | biases),
        training=draw(st.booleans()),
        failed=failed,
        shared_weights=draw(st.sampled_from([None, gated])),
    )
    return normal(num_tokens, 2, seed=seed + 1), inputs, rules


@given(batches())
@settings(max_examples=400, deadline=None)
def test_fast_path_equals_the_slow_oracle_and_accounts_for_every_assignment(route_examples, batch):
    tokens, inputs, rules = batch
    num_experts = oracle_of(rules.policy, inputs).num_experts
    experts = [lambda x, scale=scale: scale * x + x**2 for scale in range(1, num_experts + rules.num_shared + 1)]
    routed = route_examples(tokens, inputs, rules, experts)
    assert routed.outputs.isfinite().all()

    admission, plan = routed.plan.admission, routed.plan
    per_expert = plan.expert_offsets.diff().tolist()
    assert sum(per_expert) == plan.num_planned == int(admission.admitted.sum())
    if admission.capacity is not None:
        assert max(per_expert[:num_experts]) <= admission.capacity
    num_valid = len(tokens) if inputs.mask is None else sum(inputs.mask)
    assert per_expert[num_experts:] == [num_valid] * rules.num_shared
    held = list(zip(plan.token_ids.tolist(), plan.expert_ids.tolist(), strict=True))
    assert len(set(held)) == len(held)
    assert held == sorted(held, key=lambda pair: (pair[1], pair[0]))


@given(batches())
@settings(max_examples=100, deadline=None)
def test_a_row_alone_gets_what_it_gets_among_batch_mates(plan_examples, batch):
    _, inputs, rules = batch
    num_tokens = inputs.router_logits.shape[0]
    seeds = list(range(num_tokens)) if inputs.row_seeds is None else inputs.row_seeds
    inputs, dropless = replace(inputs, row_seeds=seeds), RoutingRules(rules.policy)
    together = plan_examples(inputs, dropless).admission.assignments
    for token in range(num_tokens):
        row = replace(
            inputs,
            router_logits=inputs.router_logits[token : token + 1],
            k=inputs.k if inputs.k is None or isinstance(inputs.k, int) else inputs.k[token : token + 1],
            mask=None if inputs.mask is None else inputs.mask[token : token + 1],
            row_seeds=seeds[token : token + 1],
        )
        alone = plan_examples(row, dropless).admission.assignments
        own = together.token_ids == token
        assert torch.equal(alone.expert_ids, together.expert_ids[own])
        torch.testing.assert_close(requested_weights(alone), requested_weights(together)[own])


@given(seed=st.integers(0, 2**31), num_experts=st.integers(1, 8), score=st.sampled_from(["softmax", "sigmoid"]))
@EXAMPLES
def test_dropless_identity_experts_give_the_tokens_back(seed, num_experts, score):
    tokens = normal(9, 3, seed=seed).float()
    policy = build_policy(TopKPolicyConfig(k=min(2, num_experts), score=score), num_experts=num_experts)
    plan = plan_dispatch(admit(policy.assign(normal(9, num_experts, seed=seed + 1)), CapacityConfig()))
    rows = gather_rows(tokens, plan, weight_on="output")
    combined = combine(tokens, rows, plan, residual="none", weight_on="output")
    torch.testing.assert_close(combined.outputs, tokens, rtol=0, atol=1e-6)


GROUPS_SWAPPED = [2, 3, 0, 1]


@pytest.mark.parametrize(
    ("policy", "permutation", "columns"),
    [
        (TopKPolicyConfig(), [2, 0, 3, 1], [2, 0, 3, 1]),
        (TopKPolicyConfig(expert_bias=True, score="sigmoid"), [2, 0, 3, 1], [2, 0, 3, 1]),
        (TopKPolicyConfig(expert_bias=True, groups=GroupsConfig(count=2, keep=1)), GROUPS_SWAPPED, GROUPS_SWAPPED),
        (GShardPolicyConfig(kind="gshard_top2", second="proportional"), [2, 0, 3, 1], [2, 0, 3, 1]),
        (SparseMixerPolicyConfig(kind="sparsemixer", jitter_eps=0.2), [2, 0, 3, 1], [2, 0, 3, 1]),
        # The groups' logits come first.
        (HierarchicalPolicyConfig(kind="hierarchical"), GROUPS_SWAPPED, [1, 0, 4, 5, 2, 3]),
        (HierarchicalPolicyConfig(kind="hierarchical"), [1, 0, 2, 3], [0, 1, 3, 2, 4, 5]),
        # The shared expert, and the first level's logits, stay where they are.
        (HierarchicalPolicyConfig(kind="hierarchical", mode="shared_first"), [0, 2, 3, 1], [0, 1, 3, 4, 2]),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
@given(seed=st.integers(0, 2**31), drop=st.sampled_from(["position", "priority", "score", "random"]))
@EXAMPLES
def test_permuting_the_experts_permutes_the_plan_only(policy, permutation, columns, seed, drop):
    built = build_policy(policy, num_experts=4)
    logits, bias = normal(12, built.num_logits, seed=seed), normal(4, seed=seed + 1)
    rule = CapacityConfig(factor=0.75, min=1, drop=drop, overflow="reroute")
    info = TokenInfo(expert_bias=bias, training=True)
    admission = admit(built.assign(logits, info), rule)
    moved = TokenInfo(expert_bias=bias[permutation], training=True)
    permuted = admit(built.assign(logits[:, columns], moved), rule)
    assert permuted.admitted.tolist() == admission.admitted.tolist()
    back = torch.tensor(permutation)[permuted.assignments.expert_ids]
    assert back.tolist() == admission.assignments.expert_ids.tolist()


@given(seed=st.integers(0, 2**31), k=st.integers(1, 5), num_tokens=st.integers(0, 20))
@EXAMPLES
def test_a_capacity_factor_of_experts_over_k_is_dropless(seed, k, num_tokens):
    assignments = build_policy(TopKPolicyConfig(k=k), num_experts=5).assign(normal(num_tokens, 5, seed=seed))
    admission = admit(assignments, CapacityConfig(factor=5 / k, min=1))
    assert admission.capacity == num_tokens
    assert bool(admission.admitted.all())


@given(seed=st.integers(0, 2**31))
@EXAMPLES
def test_the_order_of_tokens_does_not_change_what_priority_drops(seed):
    logits = normal(10, 3, seed=seed)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    policy = build_policy(TopKPolicyConfig(), num_experts=3)
    rule = CapacityConfig(factor=0.5, min=1, drop="priority")

    def dropped(logits, names):
        admission = admit(policy.assign(logits), rule)
        lost, assignments = ~admission.admitted, admission.assignments
        pairs = zip(names[assignments.token_ids[lost]].tolist(), assignments.expert_ids[lost].tolist(), strict=True)
        return set(pairs)

    assert dropped(logits[order], order) == dropped(logits, torch.arange(10))


@pytest.mark.parametrize("num_tokens", [64, 300])
@pytest.mark.parametrize("drop", ["position", "priority", "score", "random"])
def test_a_large_hot_batch_is_rerouted_as_the_oracle_does_it(route, num_tokens, drop):
    # W7 of the reference, nearly: everybody prefers the first experts, so most assignments overflow.
    logits = normal(num_tokens, 16, seed=num_tokens) * 0.3 + torch.linspace(3, 0, 16, dtype=torch.float64)
    capacity = CapacityConfig(factor=0.9, min=1, drop=drop, overflow="reroute", max_reroutes=4)
    rules = RoutingRules(TopKPolicyConfig(k=3), capacity, "passthrough")
    routed = route(normal(num_tokens, 2, seed=0), RoutingInputs(logits), rules, [lambda x: x] * 16)
    assert int(routed.plan.admission.rerouted.sum()) > num_tokens // 2


@given(batches())
@settings(max_examples=250, deadline=None)
def test_rows_that_are_moved_after_the_dispatch_weigh_what_the_oracle_says(plan_examples, batch):
    tokens, inputs, rules = batch
    plan = plan_examples(inputs, rules)
    assignments = plan.admission.assignments
    assume(assignments.all_scores is not None)
    rules = replace(rules, reroutes_failures=True)
    pairs = route_reference(inputs, rules)
    assume(pairs)
    final = torch.tensor([pair.expert for pair in pairs])[plan.assignment_ids]
    rows = (final != plan.expert_ids).nonzero().squeeze(1)
    moved = move_rows(plan, rows, final[rows])

    assert torch.equal(moved.expert_ids, final)
    assert torch.equal(moved.token_ids, plan.token_ids)
    assert moved.rows_per_expert == tuple(torch.bincount(final, minlength=assignments.num_experts).tolist())
    assert moved.admission.rerouted.tolist() == [pair.rerouted for pair in pairs]
    assert moved.admission.asked_expert_ids.tolist() == [pair.requested for pair in pairs]
    untouched = ~torch.isin(plan.token_ids, plan.token_ids[rows])
    assert torch.equal(moved.weights[untouched], plan.weights[untouched])

    served = torch.tensor([pair.outcome == "served" for pair in pairs])[plan.assignment_ids]
    sent = gather_rows(tokens, moved, weight_on=rules.weight_on)
    answers = sent * (1.0 + final)[:, None]
    answers[~served] = torch.nan
    combined = combine(tokens, answers, moved, residual=rules.residual, weight_on=rules.weight_on, served=served)
    weights = torch.tensor([pair.weight for pair in pairs])[plan.assignment_ids]
    torch.testing.assert_close(combined.weights, weights.float(), rtol=1e-5, atol=1e-6)
    experts = [lambda x, scale=scale: scale * x for scale in range(1, assignments.num_experts + 1)]
    expected = forward_reference(tokens, inputs, rules, experts=experts)
    torch.testing.assert_close(combined.outputs.double(), expected, rtol=1e-5, atol=1e-5)
