"""What holds for every batch, whatever the rules: identities, permutations, and what no capacity can drop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.draws import normal
from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import (
    GroupsConfig,
    GShardPolicyConfig,
    HierarchicalPolicyConfig,
    SparseMixerPolicyConfig,
    TopKPolicyConfig,
)
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.combine import combine, gather_rows
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules

EXAMPLES = settings(max_examples=40)


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
