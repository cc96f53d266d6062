from __future__ import annotations

import pytest

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import (
    DensePolicyConfig,
    ExpertChoicePolicyConfig,
    GlobalAssignmentPolicyConfig,
    HashPolicyConfig,
    RandomPolicyConfig,
    ReinforcePolicyConfig,
    RoundRobinPolicyConfig,
    SinkhornPolicyConfig,
    TopKPolicyConfig,
)
from moe_runtime.errors import ConfigError
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.rules import check_rules, resolve_residual

REROUTE = CapacityConfig(factor=1.0, overflow="reroute")


def check(policy=None, **changes):
    rules = {
        "capacity": CapacityConfig(), "residual": "none", "weight_on": "output",
        "item_shape": [4], "out_shape": [4], **changes,
    }  # fmt: skip
    check_rules(build_policy(policy or TopKPolicyConfig(), num_experts=3), **rules)


def test_rules_that_fit_pass():
    check()
    check(capacity=REROUTE, residual="add", weight_on="input")
    check(DensePolicyConfig(kind="dense"), capacity=CapacityConfig(factor=1.0))
    check(TopKPolicyConfig(normalize="after_drop"), out_shape=[3])


def test_rerouting_needs_scores_for_unselected_experts():
    with pytest.raises(ConfigError, match=r"^capacity\.overflow: expected drop, found reroute"):
        check(DensePolicyConfig(kind="dense"), capacity=REROUTE)


def test_a_policy_that_sets_the_capacity_leaves_none_to_the_layer():
    policy = ExpertChoicePolicyConfig(kind="expert_choice")
    check(policy)
    with pytest.raises(ConfigError, match=r"^capacity\.factor: expected null, found 1\.25: the policy itself decides"):
        check(policy, capacity=CapacityConfig(factor=1.25))


@pytest.mark.parametrize(
    "policy",
    [
        ExpertChoicePolicyConfig(kind="expert_choice"),
        GlobalAssignmentPolicyConfig(kind="global_assignment"),
        SinkhornPolicyConfig(kind="sinkhorn"),
        HashPolicyConfig(kind="hash"),
        RandomPolicyConfig(kind="random"),
        RoundRobinPolicyConfig(kind="round_robin"),
    ],
    ids=lambda policy: policy.kind,
)
def test_policies_without_scores_for_other_experts_refuse_rerouting(policy):
    with pytest.raises(ConfigError, match=r"capacity\.overflow: expected drop, found reroute"):
        check(policy, capacity=REROUTE)


def test_sampled_experts_may_be_rerouted_by_their_probabilities():
    check(ReinforcePolicyConfig(kind="reinforce"), capacity=REROUTE)


def test_weights_on_the_input_must_be_known_before_the_experts_answer():
    with pytest.raises(ConfigError, match=r"^weight_on: expected output, found input: with normalize after_drop"):
        check(TopKPolicyConfig(normalize="after_drop"), weight_on="input")


@pytest.mark.parametrize("residual", ["add", "passthrough", "blend"])
def test_a_residual_needs_outputs_of_the_tokens_shape(residual):
    with pytest.raises(ConfigError, match=rf"^residual: expected none, found {residual}: .*\[4\], outputs \[5\]"):
        check(residual=residual, out_shape=(5,))


def test_every_mistake_is_one_line():
    with pytest.raises(ConfigError) as caught:
        check(
            DensePolicyConfig(kind="dense", normalize="after_drop"),
            capacity=REROUTE, residual="add", weight_on="input", out_shape=[1],
        )  # fmt: skip
    keys = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert keys == ["capacity.overflow", "weight_on", "residual"]


def test_residual_defaults_to_passthrough_where_shapes_agree_and_none_elsewhere():
    assert resolve_residual(None, item_shape=[4], out_shape=(4,)) == "passthrough"
    assert resolve_residual(None, item_shape=[4], out_shape=(5,)) == "none"
    assert resolve_residual("add", item_shape=[4], out_shape=(5,)) == "add"
