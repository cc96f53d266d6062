"""What the controller is told to keep alive, and what the actors say about themselves: plain values, no Ray."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.logs import LogSettings
from moe_runtime.ray_backend.placer import ActorDemand
from moe_runtime.service.routing_table import RoutingTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.ray_backend.placer import Strategy
    from moe_runtime.service.online_bias import BiasRule
    from moe_runtime.service.ports import Endpoint

#: Ray's own label of every node.
NODE_ID_LABEL = "ray.io/node-id"


@dataclass(frozen=True)
class Demand:
    """What one actor asks of the cluster.

    Attributes:
        num_cpus: CPUs that Ray reserves.
        num_gpus: GPUs that Ray reserves.
        memory_bytes: Memory that Ray reserves, or None.
        max_rss_bytes: Resident memory of its process above which it is replaced; None for any.
        custom: Custom Ray resources.
        node_labels: Labels that the node must have.
    """

    num_cpus: float = 0.1
    num_gpus: float = 0.0
    memory_bytes: int | None = None
    max_rss_bytes: int | None = None
    custom: Mapping[str, float] = field(default_factory=dict)
    node_labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Location:
    """Where an actor's process runs.

    Attributes:
        node: Name of the node, unique in the cluster and readable: address and start of Ray's node id.
        ip: The node's address.
        num_cores: Cores that the process may use.
        pid: The process id on its node.
    """

    node: str
    ip: str
    num_cores: int
    pid: int


@dataclass(frozen=True)
class HostReport:
    """What a started expert host says of itself.

    Attributes:
        endpoint: Where routers find it.
        device: Device that it computes on.
        num_threads: Threads of one forward on the CPU.
        weights_versions: Hash of the weights, or ``seed:<n>``, per replica id.
    """

    endpoint: Endpoint
    device: str
    num_threads: int
    weights_versions: Mapping[str, str]


@dataclass(frozen=True)
class HostHealth:
    """How an expert host is, when it is asked.

    Attributes:
        busy_s: For how long the forward that is under way has run; 0 where none is.
        rss_bytes: Resident memory of its process.
        unfit: Why it should be replaced, such as a golden probe that fails; None while it is fit.
        num_faults: Outputs of the wrong kind since the start, per replica id that gave any.
        num_requests: Requests that it has received.
        num_waiting: Requests that wait, or are with its experts.
        inner: What its experts that are layers have counted of those, per replica id.
    """

    busy_s: float = 0.0
    rss_bytes: int = 0
    unfit: str | None = None
    num_faults: Mapping[str, int] = field(default_factory=dict)
    num_requests: int = 0
    num_waiting: int = 0
    inner: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterReport:
    """What a started router says of itself.

    Attributes:
        address: The ``host:port`` that it bound.
        public_key: Key that hosts must admit before it reaches them from another node; None if they ask for none.
            Each process has its own.
        metrics_address: The ``host:port`` of its metrics; None where it serves none.
    """

    address: str
    public_key: str | None = None
    metrics_address: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why an actor did not start: Ray reports what a constructor raises badly, so this travels as a value."""

    error: str
    message: str

    def __str__(self) -> str:
        """The error's class and its text."""
        return f"{self.error}: {self.message}"


@dataclass(frozen=True)
class ReplicaPlan:
    """One replica of an expert: ``replica_id`` is ``<layer>/<expert name>/<n>``."""

    layer: str
    expert_id: int
    replica_id: str


@dataclass(frozen=True)
class HostPlan:
    """One expert actor to keep alive.

    Attributes:
        host_id: Unique in the runtime.
        replicas: What it serves.
        demand: What it asks of the cluster.
        factory: A pickled ``HostFactory``: the controller hands it on unread, so it needs no torch, and an actor
            whose node lacks a module says so.
        strategy: Whether the actors of its layer are spread or packed.
        twins: Common to the hosts that serve replicas of the same experts; empty for one without.
        revision: Hash of everything that makes it what it is.
        generation: How often it was replaced by another of the same revision, to have a new process; two plans' hosts
            of equal id, revision and generation are one.
        max_forward_s: The longest that a forward may take, by its layers' timeouts; None for any time.
    """

    host_id: str
    replicas: tuple[ReplicaPlan, ...]
    demand: Demand
    factory: bytes
    strategy: Strategy = "spread"
    twins: str = ""
    revision: str = ""
    generation: int = 0
    max_forward_s: float | None = None

    @property
    def key(self) -> str:
        """Id, revision and generation: unique among the hosts of two plans, of which one takes the other's place."""
        edition = self.revision + (f"+{self.generation}" if self.generation else "")
        return f"{self.host_id}@{edition}" if edition else self.host_id

    @property
    def num_at_once(self) -> int:
        """Experts of it that a batch may want at once: those of the layer of which it has most."""
        return max(Counter(replica.layer for replica in self.replicas).values())

    @property
    def actor(self) -> ActorDemand:
        """The host as the placer sees it."""
        layer = self.replicas[0].layer
        return ActorDemand(self.host_id, self.demand, layer, self.twins or self.host_id, self.strategy)


@dataclass(frozen=True)
class RoutersPlan:
    """The routers to keep alive.

    Attributes:
        count: How many.
        address: ``HOST:PORT`` of the first on its node; the i-th on a node takes port + i; port 0 is any.
        factory: A pickled ``RouterFactory``.
        node_id: Ray's id of the node that all of them must run on; None spreads them over those that match.
        node_labels: Labels that their nodes must have.
        revision: Hash of what they serve; the same in two plans where a router need not change.
        fixed: What a router that runs cannot change, as text, by its key in the configuration.
        let_go_s: How long requests that were taken in before a change may take to be answered.
    """

    count: int
    address: str
    factory: bytes
    node_id: str | None = None
    node_labels: Mapping[str, str] = field(default_factory=dict)
    revision: str = ""
    fixed: Mapping[str, str] = field(default_factory=dict)
    let_go_s: float = 330.0

    @property
    def demand(self) -> Demand:
        """What each of them asks of the cluster."""
        pin = {} if self.node_id is None else {NODE_ID_LABEL: self.node_id}
        return Demand(num_cpus=0.0, node_labels={**self.node_labels, **pin})

    def actor(self, index: int) -> ActorDemand:
        """One of them as the placer sees it."""
        # No layer is called so.
        return ActorDemand(f"router {index}", self.demand, layer="/routers", twins="/routers")


@dataclass(frozen=True)
class RuntimePlan:
    """The desired state of one runtime.

    Attributes:
        name: The runtime's; its actors are ``<name>/...``.
        hosts: Expert actors.
        routers: Router actors.
        num_threads: Torch threads per expert actor; None is ``max(1, cores // experts on the node)``.
        start_timeout_s: Bounds every placement, and every start after it.
        lease_s: Without a renewal for so long, everything is torn down; None for a detached runtime.
        deployment: Id of the bundle that it was deployed from; None if it was served.
        logging: How its controller logs.
        balance: How the selection bias moves, of each layer where it does.
        source: What it was made from, pickled: whoever adds layers starts from it. Empty if that is not at hand.
    """

    name: str
    hosts: tuple[HostPlan, ...]
    routers: RoutersPlan
    num_threads: int | None = None
    start_timeout_s: float = 60.0
    lease_s: float | None = 10.0
    deployment: str | None = None
    logging: LogSettings = field(default_factory=LogSettings)
    balance: Mapping[str, BiasRule] = field(default_factory=dict)
    source: bytes = b""

    @property
    def next_generation(self) -> int:
        """One that none of its hosts has."""
        return max((host.generation for host in self.hosts), default=0) + 1

    @property
    def actors(self) -> tuple[ActorDemand, ...]:
        """Its routers and hosts as the placer sees them."""
        return (
            *(self.routers.actor(index) for index in range(self.routers.count)),
            *(host.actor for host in self.hosts),
        )


@dataclass(frozen=True)
class Snapshot:
    """What a controller last decided; every actor keeps the newest, and a restarted controller adopts it.

    Attributes:
        table: The routing table.
        addresses: Bound address per router index, which a restarted router binds again.
        public_keys: Key per router index, if routers have some; every host that is ready in the table admits them.
        caller_keys: Keys of programs that route for themselves; the hosts admit them, too.
        plan: The desired state that the table belongs to: an upgrade changes both at once.
    """

    table: RoutingTable = field(default_factory=RoutingTable)
    addresses: Mapping[int, str] = field(default_factory=dict)
    public_keys: Mapping[int, str] = field(default_factory=dict)
    caller_keys: frozenset[str] = frozenset()
    plan: RuntimePlan | None = None

    def is_for(self, public_key: str | None) -> bool:
        """Whether a router with this key may route by the table: hosts would refuse one that they do not know."""
        return public_key is None or public_key in self.public_keys.values()
