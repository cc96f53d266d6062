"""From a policy's block of the configuration to the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.config.policies import (
    DensePolicyConfig,
    ExpertChoicePolicyConfig,
    GlobalAssignmentPolicyConfig,
    HashPolicyConfig,
    RandomPolicyConfig,
    ReinforcePolicyConfig,
    RoundRobinPolicyConfig,
    SinkhornPolicyConfig,
    SwitchPolicyConfig,
    TopKPolicyConfig,
)
from moe_runtime.errors import ConfigError
from moe_runtime.routing.assignments import WeightRule
from moe_runtime.routing.policies.expert_choice import ExpertChoicePolicy
from moe_runtime.routing.policies.gate_free import HashPolicy, RandomPolicy, RoundRobinPolicy
from moe_runtime.routing.policies.global_assignment import GlobalAssignmentPolicy
from moe_runtime.routing.policies.reinforce import ReinforcePolicy
from moe_runtime.routing.policies.sinkhorn import SinkhornPolicy
from moe_runtime.routing.policies.top_k import TopKPolicy

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from moe_runtime.config.policies import PolicyConfig
    from moe_runtime.routing.policy import Policy

_UNNORMALIZED = WeightRule(normalize="none")


def build_policy(config: PolicyConfig, *, num_experts: int) -> Policy:
    """The policy that a configuration block describes, for a layer of ``num_experts``.

    Raises:
        ConfigError: If it cannot route to so many experts, with ``policy.`` and the key at the start.
    """
    k = getattr(config, "k", 1)
    if k > num_experts:
        raise ConfigError(f"policy.k: expected at most the layer's {num_experts} experts, found {k}")
    return _BUILDERS[type(config)](config, num_experts)


def _dense(config: DensePolicyConfig, num_experts: int) -> Policy:
    rule = WeightRule(normalize=config.normalize)
    return TopKPolicy(num_experts=num_experts, max_k=num_experts, weight_rule=rule, can_reroute=False)


def _top_k(config: TopKPolicyConfig, num_experts: int) -> Policy:
    rule = WeightRule(
        normalize=config.normalize,
        norm_p=config.norm_p,
        scaling_factor=config.scaling_factor,
        softmax_over_set=config.score == "softmax_after_topk",
    )
    return TopKPolicy(num_experts=num_experts, max_k=config.k, score=config.score, weight_rule=rule)


def _switch(config: SwitchPolicyConfig, num_experts: int) -> Policy:
    return TopKPolicy(num_experts=num_experts, max_k=1, weight_rule=_UNNORMALIZED)


def _expert_choice(config: ExpertChoicePolicyConfig, num_experts: int) -> Policy:
    return ExpertChoicePolicy(
        num_experts=num_experts,
        max_k=num_experts,
        capacity_factor=config.capacity_factor,
        score=config.score,
        weight_rule=WeightRule(normalize=config.normalize),
    )


def _global_assignment(config: GlobalAssignmentPolicyConfig, num_experts: int) -> Policy:
    return GlobalAssignmentPolicy(
        num_experts=num_experts,
        max_k=1,
        weight_rule=_UNNORMALIZED,
        batch_coupled=config.evaluation == "as_in_training",
        solver=config.solver,
    )


def _sinkhorn(config: SinkhornPolicyConfig, num_experts: int) -> Policy:
    return SinkhornPolicy(
        num_experts=num_experts,
        max_k=config.k,
        weight_rule=_UNNORMALIZED,
        batch_coupled=config.evaluation == "as_in_training",
        tolerance=config.tolerance,
        max_iterations=config.max_iterations,
    )


def _hash(config: HashPolicyConfig, num_experts: int) -> Policy:
    return HashPolicy(num_experts=num_experts, max_k=config.k, weight_rule=_UNNORMALIZED, seed=config.seed)


def _random(config: RandomPolicyConfig, num_experts: int) -> Policy:
    return RandomPolicy(num_experts=num_experts, max_k=config.k, weight_rule=_UNNORMALIZED)


def _round_robin(config: RoundRobinPolicyConfig, num_experts: int) -> Policy:
    return RoundRobinPolicy(num_experts=num_experts, max_k=config.k, weight_rule=_UNNORMALIZED)


def _reinforce(config: ReinforcePolicyConfig, num_experts: int) -> Policy:
    return ReinforcePolicy(
        num_experts=num_experts,
        max_k=config.k,
        weight_rule=WeightRule(normalize=config.normalize),
        samples=config.evaluation == "as_in_training",
    )


_BUILDERS: dict[type, Callable[[Any, int], Policy]] = {
    DensePolicyConfig: _dense,
    TopKPolicyConfig: _top_k,
    SwitchPolicyConfig: _switch,
    ExpertChoicePolicyConfig: _expert_choice,
    GlobalAssignmentPolicyConfig: _global_assignment,
    SinkhornPolicyConfig: _sinkhorn,
    HashPolicyConfig: _hash,
    RandomPolicyConfig: _random,
    RoundRobinPolicyConfig: _round_robin,
    ReinforcePolicyConfig: _reinforce,
}
