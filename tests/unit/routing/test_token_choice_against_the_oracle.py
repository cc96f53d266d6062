"""That the policies by which tokens choose compute what the slow oracle does, in every combination of rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fakes.draws import normal
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
from moe_runtime.routing.combine import combine, gather_rows
from moe_runtime.routing.moved import move_rows
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.oracles import oracle_of
from moe_runtime.routing.reference.route import RoutingRules, forward_reference, route_reference
from moe_runtime.routing.weights import requested_weights

NORMALIZE = st.sampled_from(["before_drop", "after_drop", "none"])
SECOND = st.sampled_from(["threshold", "proportional", "always", "never"])


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


def forms(config, **options):
    return lambda _: st.builds(config, **options)


#: The policies of each kind, in any of their forms, for a layer of so many experts; and the fewest it may have.
POLICIES = {
    "dense": (1, forms(DensePolicyConfig, kind=st.just("dense"), normalize=NORMALIZE)),
    "top_k": (1, top_k_policies),
    "switch": (1, forms(SwitchPolicyConfig, kind=st.just("switch"))),
    "gshard_top2": (
        2,
        forms(
            GShardPolicyConfig,
            kind=st.just("gshard_top2"),
            second=SECOND,
            second_in_evaluation=SECOND,
            threshold=st.sampled_from([0.2, 0.5, 1.0]),
            normalize=NORMALIZE,
        ),
    ),
    # With 0.6 every positive logit is near; 0.01 is Phi's.
    "sparsemixer": (
        2,
        forms(SparseMixerPolicyConfig, kind=st.just("sparsemixer"), jitter_eps=st.sampled_from([0.01, 0.2, 0.6])),
    ),
    "hierarchical": (2, hierarchies),
}


@st.composite
def batches(draw, kind):
    """Tokens, inputs and rules: anything that a layer with such a policy may be asked."""
    fewest, policies = POLICIES[kind]
    num_tokens, num_experts = draw(st.integers(1, 14)), draw(st.integers(fewest, 6) | st.sampled_from([6, 8, 9]))
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

    def rows(values, number=num_tokens):
        return st.lists(values, min_size=number, max_size=number)

    cells = [(token, expert) for token in range(num_tokens) for expert in range(num_experts + num_shared)]
    gated = normal(num_tokens, num_shared, seed=seed + 2).sigmoid().tolist()
    hot = torch.linspace(draw(st.sampled_from([0.0, 3.0])), 0.0, built.num_logits, dtype=torch.float64)
    inputs = RoutingInputs(
        normal(num_tokens, built.num_logits, seed=seed) + hot,
        k=draw(st.none() | st.integers(1, built.max_k) | rows(st.integers(0, built.max_k))),
        mask=draw(st.none() | rows(st.booleans())),
        row_seeds=draw(st.none() | rows(st.integers(-(2**63), 2**63 - 1))),
        expert_bias=draw(st.none() | rows(st.floats(-1, 1, width=32), num_experts)),
        training=draw(st.booleans()),
        failed=frozenset(draw(st.lists(st.sampled_from(cells), max_size=10))),
        shared_weights=draw(st.sampled_from([None, gated])),
    )
    return normal(num_tokens, 2, seed=seed + 1), inputs, rules


@pytest.mark.parametrize("kind", POLICIES)
@given(data=st.data())
@settings(max_examples=120)
def test_fast_path_equals_the_slow_oracle_and_accounts_for_every_assignment(route_examples, kind, data):
    tokens, inputs, rules = data.draw(batches(kind))
    num_experts = oracle_of(rules.policy, inputs).num_experts
    experts = [lambda x, scale=scale: scale * x + x**2 for scale in range(1, num_experts + rules.num_shared + 1)]
    routed = route_examples(tokens, inputs, rules, experts)
    assert routed.outputs.isfinite().all()

    admission, plan = routed.plan.admission, routed.plan
    per_expert = list(plan.rows_per_expert)
    assert sum(per_expert) == plan.num_planned == int(admission.admitted.sum())
    if admission.capacity is not None:
        assert max(per_expert[:num_experts]) <= admission.capacity
    num_valid = len(tokens) if inputs.mask is None else sum(inputs.mask)
    assert per_expert[num_experts:] == [num_valid] * rules.num_shared
    held = list(zip(plan.token_ids.tolist(), plan.expert_ids.tolist(), strict=True))
    assert len(set(held)) == len(held)
    assert held == sorted(held, key=lambda pair: (pair[1], pair[0]))


@pytest.mark.parametrize("kind", POLICIES)
@given(data=st.data())
@settings(max_examples=25)
def test_a_row_alone_gets_what_it_gets_among_batch_mates(plan_examples, kind, data):
    _, inputs, rules = data.draw(batches(kind))
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


@pytest.mark.parametrize("kind", [kind for kind in POLICIES if kind != "dense"])
@given(data=st.data())
@settings(max_examples=80)
def test_rows_that_are_moved_after_the_dispatch_weigh_what_the_oracle_says(plan_examples, kind, data):
    tokens, inputs, rules = data.draw(batches(kind))
    plan = plan_examples(inputs, rules)
    assignments = plan.admission.assignments
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
