"""What a checked configuration becomes: plain values from which any process can build its part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moe_runtime.config.observing import MetricsConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.config.balance import BalanceConfig
    from moe_runtime.config.experts import ResourcesConfig
    from moe_runtime.config.gates import GateConfig
    from moe_runtime.config.models import (
        CapacityConfig,
        DTypeName,
        HedgeConfig,
        OnFailureConfig,
        ResidualRule,
        SharedGate,
        Strategy,
        WeightOn,
    )
    from moe_runtime.config.policies import PolicyConfig
    from moe_runtime.config.runtime import LimitsConfig, RouterConfig
    from moe_runtime.config.security import SecurityConfig
    from moe_runtime.experts.spec import ExpertSpec
    from moe_runtime.transport.curve import Encryption

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class ExpertRecipe:
    """One expert, after ``count`` was expanded: what to build, what its actor asks for, and how many there are."""

    spec: ExpertSpec
    resources: ResourcesConfig
    replicas: int = 1


@dataclass(frozen=True)
class LayerRecipe:
    """One layer, checked: everything that a router builds its side from, and the experts for the hosts.

    Attributes:
        name: The layer's.
        item_shape: Shape of one token.
        out_shape: Shape of one output row, on which all experts agree.
        dtype: Of tokens, experts and answers.
        gate: The gate's block.
        gate_weights: Absolute path of its weights; None initialises it from ``gate_seed``.
        gate_seed: The layer's own stream of the runtime's seed.
        gate_features: Width of the gate's input.
        policy: The policy's block.
        capacity: The capacity's block.
        residual: The residual rule, resolved.
        weight_on: Where weights are applied.
        timeout_s: Bounds a batch, from its dispatch.
        allow_non_finite: Whether the input may hold NaN and infinities.
        max_batches_in_flight: Batches of this layer under way at once.
        exact: Whether answers are bit-identical to one process.
        wire_dtype: Of rows on their way to experts and back.
        on_failure: What becomes of an assignment whose expert fails.
        hedge: When a second replica is asked as well; never when None.
        experts_per_actor: Neighbouring experts that share an actor.
        actor_group: Name of the group of layers whose experts of the same places share actors; None is no group.
        strategy: Whether its actors spread over nodes or fill them one by one.
        allow_batch_coupled: Whether requests share a batch although the policy couples its tokens.
        experts: In the order of the gate's rows; the shared ones after them.
        num_shared: How many of the experts are shared.
        shared_gate: What the weight of a shared expert is.
        balance: How its selection bias moves while serving, if it does.
        level: 0 where it is no expert of another layer; see ``RoutedLayer``.
    """

    name: str
    item_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: DTypeName
    gate: GateConfig
    gate_weights: str | None
    gate_seed: int
    gate_features: int
    policy: PolicyConfig
    capacity: CapacityConfig
    residual: ResidualRule
    weight_on: WeightOn
    timeout_s: float
    allow_non_finite: bool
    max_batches_in_flight: int
    exact: bool
    wire_dtype: DTypeName
    on_failure: OnFailureConfig
    hedge: HedgeConfig | None
    experts_per_actor: int
    strategy: Strategy
    allow_batch_coupled: bool
    experts: tuple[ExpertRecipe, ...]
    num_shared: int
    shared_gate: SharedGate
    balance: BalanceConfig
    level: int = 0
    actor_group: str | None = None

    @property
    def num_routed(self) -> int:
        """Experts that the policy routes to."""
        return len(self.experts) - self.num_shared


@dataclass(frozen=True)
class HostedExpert:
    """One replica of an expert on a host: ``replica_id`` is ``<layer>/<expert name>/<n>``."""

    replica_id: str
    spec: ExpertSpec


@dataclass(frozen=True)
class HostSpec:
    """What one expert host builds and serves.

    Attributes:
        host_id: Unique in the runtime, ``<layer>/<name of its first expert>/<n>``, n as in its replica ids; or
            ``group:<actor group>/<place>/<n>``.
        experts: Its experts, those of a group layer by layer.
        device: Where they compute.
        resources: What its actor asks for; ``num_gpus`` is resolved.
        strategy: The layer's.
        encryption: What routers on other nodes must speak.
        port_range: Inclusive range of tcp ports to bind; any port when None.
        network: Binds the node's address in this network; the one that Ray knows when None.
        plug_ins: Distributions that its node must have, ``name`` or ``name==version``.
    """

    host_id: str
    experts: tuple[HostedExpert, ...]
    device: Device
    resources: ResourcesConfig
    strategy: Strategy = "spread"
    encryption: Encryption = "curve"
    port_range: tuple[int, int] | None = None
    network: str | None = None
    plug_ins: tuple[str, ...] = ()

    @property
    def twins(self) -> str:
        """Common to the hosts that serve replicas of the same experts."""
        return self.host_id.rpartition("/")[0]


@dataclass(frozen=True)
class RouterRecipe:
    """What every router of a runtime builds and serves, whom it lets in, and what it speaks to other nodes' hosts."""

    runtime: str
    layers: tuple[LayerRecipe, ...]
    router: RouterConfig
    limits: LimitsConfig
    security: SecurityConfig
    encryption: Encryption = "curve"
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


@dataclass(frozen=True)
class LayerSummary:
    """What ``validate`` says of one layer; ``experts`` and ``shared_experts`` map names to kinds.

    Its actors are also those of the other layers of its ``actor_group``.
    """

    name: str
    item_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str
    policy: str
    experts: dict[str, str]
    shared_experts: dict[str, str]
    num_actors: int
    actor_group: str | None = None


@dataclass(frozen=True)
class ConfigSummary:
    """What ``validate`` says of a configuration that can be served.

    ``unchecked_files`` are those of ``security``, by their key, that are not all on this machine: what they hold can be
    checked on the routers' nodes alone.
    """

    name: str
    layers: tuple[LayerSummary, ...]
    num_routers: int
    address: str
    unchecked_files: Mapping[str, str] = field(default_factory=dict)
