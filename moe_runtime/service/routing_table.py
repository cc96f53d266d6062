"""Where each expert of each layer can be reached: the versioned table that one batch uses from start to end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.service.online_bias import LayerBias
    from moe_runtime.service.ports import Endpoint


class ReplicaState(StrEnum):
    """Life of a replica: ``starting -> ready -> suspect -> out``; from ``out`` it starts again at its time."""

    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    OUT = "out"


@dataclass(frozen=True)
class Replica:
    """One copy of an expert, inside one expert host.

    Attributes:
        replica_id: Unique in the runtime, ``<layer>/<expert name>/<n>``.
        endpoint: Where its host listens; the endpoint's incarnation names the process.
        state: Only ``ready`` and ``suspect`` replicas are sent rows.
        weights_version: Hash of the weights that it serves, or ``seed:<n>`` when initialised.
        device: Device that it computes on.
        pid: Process id of its host on its node.
        num_restarts: How often its host came back, since the controller started.
        reason: Why it is in that state, in words, where it is not simply ready.
    """

    replica_id: str
    endpoint: Endpoint
    state: ReplicaState = ReplicaState.READY
    weights_version: str = ""
    device: str = "cpu"
    pid: int = 0
    num_restarts: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class RoutingTable:
    """All replicas of all experts, at one version.

    Attributes:
        version: Grows with every change; a router ignores a table older than its own.
        replicas: Replicas per ``(layer, expert_id)``; an expert without an entry, or with none usable, is out.
        biases: What serving has added to the selection bias of a layer's gate; nothing where a layer has no entry.
    """

    version: int = 0
    replicas: Mapping[tuple[str, int], tuple[Replica, ...]] = field(default_factory=dict)
    biases: Mapping[str, LayerBias] = field(default_factory=dict)

    def usable(self, layer: str, expert_id: int) -> tuple[Replica, ...]:
        """Replicas of an expert that rows may be sent to."""
        return self._usable.get((layer, expert_id), ())

    def num_reachable(self, layer: str) -> int:
        """Experts of a layer that have a usable replica."""
        return self._num_reachable.get(layer, 0)

    @cached_property
    def _num_reachable(self) -> Counter[str]:
        return Counter(layer for (layer, _), replicas in self._usable.items() if replicas)

    @cached_property
    def _usable(self) -> dict[tuple[str, int], tuple[Replica, ...]]:
        states = (ReplicaState.READY, ReplicaState.SUSPECT)
        return {key: tuple(r for r in replicas if r.state in states) for key, replicas in self.replicas.items()}

    def endpoints(self) -> frozenset[Endpoint]:
        """Endpoints of all usable replicas."""
        return frozenset(replica.endpoint for replicas in self._usable.values() for replica in replicas)

    def out_endpoints(self) -> frozenset[Endpoint]:
        """Endpoints of hosts that have replicas and none of them usable."""
        every = frozenset(replica.endpoint for replicas in self.replicas.values() for replica in replicas)
        return every - self.endpoints()
