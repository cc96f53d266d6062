"""That the policies which balance, sample or ask no gate compute what the slow oracle does, in every combination."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.draws import normal
from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import (
    ExpertChoicePolicyConfig,
    GlobalAssignmentPolicyConfig,
    HashPolicyConfig,
    RandomPolicyConfig,
    ReinforcePolicyConfig,
    RoundRobinPolicyConfig,
    SinkhornPolicyConfig,
)
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules

NORMALIZE = st.sampled_from(["before_drop", "after_drop", "none"])
EVALUATION = st.sampled_from(["greedy", "as_in_training"])
INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def policies(draw, kind, num_experts):
    k = draw(st.integers(1, num_experts))
    if kind == "expert_choice":
        factor = draw(st.sampled_from([0.1, 1.0, 1.1, 2.0, 9.0]))
        # The softmax over one expert is 1 for every token: ties, of which no order is promised.
        score = draw(st.sampled_from(["softmax", "sigmoid"])) if num_experts > 1 else "sigmoid"
        return ExpertChoicePolicyConfig(kind=kind, capacity_factor=factor, score=score, normalize=draw(NORMALIZE))
    if kind == "global_assignment":
        solver = draw(st.sampled_from(["auto", "exact"]))
        return GlobalAssignmentPolicyConfig(kind=kind, solver=solver, evaluation=draw(EVALUATION))
    if kind == "sinkhorn":
        rounds = draw(st.sampled_from([1, 3, 100]))
        return SinkhornPolicyConfig(kind=kind, k=k, max_iterations=rounds, evaluation=draw(EVALUATION))
    if kind == "hash":
        return HashPolicyConfig(kind=kind, k=k, seed=draw(st.integers(0, 2**31 - 1)))
    if kind == "reinforce":
        return ReinforcePolicyConfig(kind=kind, k=k, evaluation=draw(EVALUATION), normalize=draw(NORMALIZE))
    return {"random": RandomPolicyConfig, "round_robin": RoundRobinPolicyConfig}[kind](kind=kind, k=k)


@st.composite
def batches(draw, kind):
    """Tokens, inputs and rules: anything that a layer with such a policy may be asked."""
    num_tokens, num_experts = draw(st.integers(1, 10)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**31))
    policy = draw(policies(kind, num_experts))
    factor = None if kind == "expert_choice" else draw(st.sampled_from([None, 0.5, 1.0, 1.25]))
    capacity = CapacityConfig(
        factor=factor,
        min=draw(st.integers(1, 4)),
        drop=draw(st.sampled_from(["position", "priority", "score", "random"])),
        overflow=draw(st.sampled_from(["drop", "reroute"])) if kind == "reinforce" else "drop",
    )
    after_drop = getattr(policy, "normalize", "none") == "after_drop"
    weight_on = "output" if after_drop else draw(st.sampled_from(["output", "input"]))
    residual = draw(st.sampled_from(["add", "passthrough", "none", "blend"]))
    num_shared = draw(st.sampled_from([0, 0, 1, 3]))
    rules = RoutingRules(policy, capacity, residual, weight_on, num_shared=num_shared)

    def rows(values):
        return st.lists(values, min_size=num_tokens, max_size=num_tokens)

    most = getattr(policy, "k", 1)
    cells = [(token, expert) for token in range(num_tokens) for expert in range(num_experts + num_shared)]
    gated = normal(num_tokens, num_shared, seed=seed + 2).sigmoid().tolist()
    hot = torch.linspace(draw(st.sampled_from([0.0, 3.0])), 0.0, num_experts, dtype=torch.float64)
    inputs = RoutingInputs(
        normal(num_tokens, num_experts, seed=seed) + hot,
        k=None if kind == "expert_choice" else draw(st.none() | st.integers(1, most) | rows(st.integers(0, most))),
        mask=draw(st.none() | rows(st.booleans())),
        row_seeds=draw(rows(INT64)),
        row_ids=draw(st.none() | rows(st.integers(0, 2**40))),
        token_ids=draw(rows(INT64)),
        training=draw(st.booleans()),
        failed=frozenset(draw(st.lists(st.sampled_from(cells), max_size=10))),
        shared_weights=draw(st.sampled_from([None, gated])),
    )
    return normal(num_tokens, 2, seed=seed + 1), inputs, rules


@pytest.mark.parametrize(
    "kind", ["expert_choice", "global_assignment", "sinkhorn", "hash", "random", "round_robin", "reinforce"]
)
@given(data=st.data())
@settings(max_examples=80)
def test_fast_path_equals_the_slow_oracle(route_examples, kind, data):
    tokens, inputs, rules = data.draw(batches(kind))
    experts = [
        lambda x, scale=scale: scale * x + x**2
        for scale in range(1, inputs.router_logits.shape[1] + rules.num_shared + 1)
    ]
    routed = route_examples(tokens, inputs, rules, experts)
    assert routed.outputs.isfinite().all()
    pairs = [pair[:2] for pair in routed.pairs()]
    assert pairs == sorted(pairs, key=lambda pair: (pair[1], pair[0]))


@pytest.mark.parametrize(
    "config",
    [
        GlobalAssignmentPolicyConfig(kind="global_assignment"),
        SinkhornPolicyConfig(kind="sinkhorn", k=2),
        HashPolicyConfig(kind="hash", k=2),
        RandomPolicyConfig(kind="random", k=2),
        RoundRobinPolicyConfig(kind="round_robin", k=2),
        ReinforcePolicyConfig(kind="reinforce", k=2),
        ReinforcePolicyConfig(kind="reinforce", k=2, evaluation="as_in_training"),
    ],
    ids=lambda config: f"{config.kind}-{getattr(config, 'evaluation', '')}",
)
def test_a_policy_that_does_not_couple_its_batch_gives_each_token_the_same_in_any_other(config):
    policy = build_policy(config, num_experts=5)
    assert not policy.batch_coupled
    logits, keys = normal(30, 5, seed=3)[:, : policy.num_logits], torch.arange(30) * 31
    part = torch.tensor([20, 3, 11, 28])

    def assign(rows):
        info = TokenInfo(row_seeds=keys[rows], token_ids=keys[rows], row_ids=keys[rows])
        return policy.assign(logits[rows], info).choices

    whole, alone = assign(torch.arange(30)), assign(part)
    assert torch.equal(alone.expert_ids, whole.expert_ids[part])
    assert torch.equal(alone.scores, whole.scores[part])
