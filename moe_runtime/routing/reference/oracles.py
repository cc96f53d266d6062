"""The oracle of each policy, by the type of its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_runtime.config.policies import (
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
from moe_runtime.routing.reference.balanced import ExpertChoiceOracle, GlobalAssignmentOracle, SinkhornOracle
from moe_runtime.routing.reference.gate_free import GateFreeOracle
from moe_runtime.routing.reference.gshard import GShardOracle
from moe_runtime.routing.reference.hierarchical import HierarchicalOracle
from moe_runtime.routing.reference.sampled import ReinforceOracle
from moe_runtime.routing.reference.sparsemixer import SparseMixerOracle
from moe_runtime.routing.reference.token_choice import TopKOracle

if TYPE_CHECKING:
    from moe_runtime.config.policies import PolicyConfig
    from moe_runtime.routing.reference.choices import ChoiceOracle, RoutingInputs

_ORACLES: dict[type, type[ChoiceOracle[Any]]] = {
    DensePolicyConfig: TopKOracle,
    SwitchPolicyConfig: TopKOracle,
    TopKPolicyConfig: TopKOracle,
    GShardPolicyConfig: GShardOracle,
    SparseMixerPolicyConfig: SparseMixerOracle,
    HierarchicalPolicyConfig: HierarchicalOracle,
    ExpertChoicePolicyConfig: ExpertChoiceOracle,
    GlobalAssignmentPolicyConfig: GlobalAssignmentOracle,
    SinkhornPolicyConfig: SinkhornOracle,
    HashPolicyConfig: GateFreeOracle,
    RandomPolicyConfig: GateFreeOracle,
    RoundRobinPolicyConfig: GateFreeOracle,
    ReinforcePolicyConfig: ReinforceOracle,
}


def oracle_of(config: PolicyConfig, inputs: RoutingInputs) -> ChoiceOracle[Any]:
    """What a policy asks for in one batch."""
    return _ORACLES[type(config)](config, inputs)
