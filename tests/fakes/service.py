"""Fakes of the service's ports, and a small layer whose routing is easy to work out by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import TopKPolicyConfig
from moe_runtime.errors import TransportError
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.service.layer import ExpertInfo, RoutedLayer
from moe_runtime.service.ports import Endpoint, HostLost, HostReply, HostRequest, SegmentResult
from moe_runtime.service.routing_table import Replica, ReplicaState, RoutingTable
from moe_runtime.transport.counters import TransportCounters

WIDTH = 3


class FakeClock:
    """Time stands still until the test moves it."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds


class GivenLogits(torch.nn.Module):
    """A gate whose router logits are its input."""

    tasks = ()
    default_task = None
    expert_bias = None
    shared_weight = None

    def forward(self, gate_input: torch.Tensor, *, tasks: torch.Tensor | None = None) -> torch.Tensor:
        return gate_input


@dataclass
class FakeTransport:
    """Keeps what was sent, and returns what the test puts into ``arrivals``."""

    sent: list[tuple[Endpoint, HostRequest]] = field(default_factory=list)
    arrivals: deque[HostReply | HostLost] = field(default_factory=deque)
    refusing: set[Endpoint] = field(default_factory=set)
    retained: Collection[Endpoint] = ()
    polled_for: list[float] = field(default_factory=list)

    public_key: str | None = None
    counters: TransportCounters = field(default_factory=TransportCounters)

    def allocate(self, endpoint: Endpoint, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def send(self, endpoint: Endpoint, request: HostRequest) -> None:
        if endpoint in self.refusing:
            raise TransportError("its queue is full")
        self.sent.append((endpoint, request))

    def poll(self, timeout_s: float) -> list[HostReply | HostLost]:
        self.polled_for.append(timeout_s)
        arrived = list(self.arrivals)
        self.arrivals.clear()
        return arrived

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        self.retained = endpoints

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def answer(self, request: HostRequest, times: float = 2.0) -> None:
        """Let the host of a request multiply its rows."""
        results = tuple(SegmentResult(s.replica_id, s.num_rows, compute_ms=1.0) for s in request.segments)
        self.arrivals.append(HostReply(request.ticket, results, request.rows * times))


def endpoint(number: int, node: str = "here") -> Endpoint:
    return Endpoint(number, node, local=f"host-{number}")


def replica(expert_id: int, host: int, *, state: ReplicaState = ReplicaState.READY, n: int = 0) -> Replica:
    return Replica(f"layer/{expert_id}/{n}", endpoint(host), state)


def table_of(version: int, *hosts: int) -> RoutingTable:
    """Expert i of ``layer`` is served by host ``hosts[i]``."""
    return RoutingTable(version, {("layer", i): (replica(i, host),) for i, host in enumerate(hosts)})


def make_layer(num_experts: int = 2, *, k: int = 1, **changes: object) -> RoutedLayer:
    """A layer whose router logits are the ``gate_input`` itself."""
    fields = {
        "name": "layer",
        "item_shape": (WIDTH,),
        "out_shape": (WIDTH,),
        "dtype": torch.float32,
        "gate": GivenLogits(),
        "gate_features": num_experts,
        "policy": build_policy(TopKPolicyConfig(kind="top_k", k=k), num_experts=num_experts),
        "policy_kind": "top_k",
        "capacity": CapacityConfig(),
        "residual": "none",
        "weight_on": "output",
        "timeout_s": 2.0,
        "allow_non_finite": False,
        "max_batches_in_flight": 2,
        "experts": tuple(ExpertInfo(i, f"expert-{i}", "feed_forward") for i in range(num_experts)),
    }
    return RoutedLayer(**{**fields, **changes})


def logits_for(*choices: int, num_experts: int = 2) -> torch.Tensor:
    """Router logits with which each token prefers the given expert, by far."""
    return 20.0 * torch.nn.functional.one_hot(torch.tensor(choices), num_experts).float()


def tokens_of(num_tokens: int) -> torch.Tensor:
    return torch.arange(num_tokens * WIDTH, dtype=torch.float32).reshape(num_tokens, WIDTH) + 1.0
