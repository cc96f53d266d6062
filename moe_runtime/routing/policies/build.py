"""From a policy's block of the configuration to the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.config.policies import (
    CallerPolicyConfig,
    DensePolicyConfig,
    ExpertChoicePolicyConfig,
    GlobalAssignmentPolicyConfig,
    GShardPolicyConfig,
    HashPolicyConfig,
    HierarchicalPolicyConfig,
    RandomPolicyConfig,
    ReinforcePolicyConfig,
    RoundRobinPolicyConfig,
    SinkhornPolicyConfig,
    SparseMixerPolicyConfig,
    SwitchPolicyConfig,
    TopKPolicyConfig,
)
from moe_runtime.errors import ConfigError
from moe_runtime.routing.assignments import WeightRule
from moe_runtime.routing.policies.caller import CallerPolicy
from moe_runtime.routing.policies.expert_choice import ExpertChoicePolicy
from moe_runtime.routing.policies.gate_free import HashPolicy, RandomPolicy, RoundRobinPolicy
from moe_runtime.routing.policies.global_assignment import GlobalAssignmentPolicy
from moe_runtime.routing.policies.groups import GroupLimit
from moe_runtime.routing.policies.gshard import GShardPolicy
from moe_runtime.routing.policies.hierarchical import SharedFirstPolicy, TreePolicy
from moe_runtime.routing.policies.reinforce import ReinforcePolicy
from moe_runtime.routing.policies.sinkhorn import SinkhornPolicy
from moe_runtime.routing.policies.sparsemixer import SparseMixerPolicy, sparsemixer_rule
from moe_runtime.routing.policies.top_k import TopKPolicy

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from moe_runtime.config.policies import PolicyConfig
    from moe_runtime.routing.policy import Policy, RowFact

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
    return TopKPolicy(
        num_experts=num_experts,
        max_k=config.k,
        score=config.score,
        weight_rule=rule,
        groups=_group_limit(config, num_experts),
        uses_bias=config.expert_bias,
    )


def _group_limit(config: TopKPolicyConfig, num_experts: int) -> GroupLimit | None:
    groups = config.groups
    if groups is None:
        return None
    _check_divides("policy.groups.count", groups.count, num_experts)
    num_left = num_experts // groups.count * groups.keep
    if config.k > num_left:
        raise ConfigError(f"policy.k: expected at most the {num_left} experts of the groups kept, found {config.k}")
    score = groups.score or ("top2_sum" if config.expert_bias else "max")
    return GroupLimit(num_groups=groups.count, num_kept=groups.keep, score=score)


def _switch(config: SwitchPolicyConfig, num_experts: int) -> Policy:
    return TopKPolicy(num_experts=num_experts, max_k=1, weight_rule=_UNNORMALIZED)


def _gshard_top2(config: GShardPolicyConfig, num_experts: int) -> Policy:
    _check_pair(config.kind, num_experts)
    draws = {"threshold", "proportional"} & {config.second, config.second_in_evaluation}
    reads: frozenset[RowFact] = frozenset({"row_seeds"}) if draws else frozenset()
    return GShardPolicy(
        num_experts=num_experts,
        max_k=2,
        weight_rule=WeightRule(normalize=config.normalize),
        reads=reads,
        second=config.second,
        second_in_evaluation=config.second_in_evaluation,
        threshold=config.threshold,
    )


def _sparsemixer(config: SparseMixerPolicyConfig, num_experts: int) -> Policy:
    _check_pair(config.kind, num_experts)
    limit = 2 * config.jitter_eps
    return SparseMixerPolicy(num_experts=num_experts, max_k=2, weight_rule=sparsemixer_rule(limit), limit=limit)


def _hierarchical(config: HierarchicalPolicyConfig, num_experts: int) -> Policy:
    rule = WeightRule(normalize=config.normalize)
    if config.mode == "shared_first":
        if config.k >= num_experts:
            raise ConfigError(
                f"policy.k: expected at most the {num_experts - 1} experts that are not shared, found {config.k}"
            )
        return SharedFirstPolicy(num_experts=num_experts, max_k=config.k, weight_rule=rule)
    _check_divides("policy.num_groups", config.num_groups, num_experts)
    group_size = num_experts // config.num_groups
    if config.k_groups > config.num_groups:
        raise ConfigError(f"policy.k_groups: expected at most the {config.num_groups} groups, found {config.k_groups}")
    if config.k > group_size:
        raise ConfigError(f"policy.k: expected at most the {group_size} experts of a group, found {config.k}")
    return TreePolicy(
        num_experts=num_experts,
        max_k=config.k_groups * config.k,
        weight_rule=rule,
        num_groups=config.num_groups,
        k_groups=config.k_groups,
        k=config.k,
    )


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


def _caller(_config: CallerPolicyConfig, num_experts: int) -> Policy:
    return CallerPolicy(num_experts=num_experts, max_k=num_experts, weight_rule=_UNNORMALIZED)


def _check_divides(key: str, count: int, num_experts: int) -> None:
    if num_experts % count:
        raise ConfigError(f"{key}: expected a divisor of the layer's {num_experts} experts, found {count}")


def _check_pair(kind: str, num_experts: int) -> None:
    if num_experts < 2:
        raise ConfigError(f"policy.kind: {kind} expected a layer of at least 2 experts, found {num_experts}")


_BUILDERS: dict[type, Callable[[Any, int], Policy]] = {
    DensePolicyConfig: _dense,
    TopKPolicyConfig: _top_k,
    SwitchPolicyConfig: _switch,
    GShardPolicyConfig: _gshard_top2,
    SparseMixerPolicyConfig: _sparsemixer,
    HierarchicalPolicyConfig: _hierarchical,
    ExpertChoicePolicyConfig: _expert_choice,
    GlobalAssignmentPolicyConfig: _global_assignment,
    SinkhornPolicyConfig: _sinkhorn,
    HashPolicyConfig: _hash,
    RandomPolicyConfig: _random,
    RoundRobinPolicyConfig: _round_robin,
    ReinforcePolicyConfig: _reinforce,
    CallerPolicyConfig: _caller,
}
