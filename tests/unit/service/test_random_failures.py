"""Whatever hosts do, in whatever order: one result per batch, every assignment accounted for, and right rows only."""

from __future__ import annotations

import random
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.service import FakeClock, FakeTransport, endpoint, make_layer, replica
from moe_runtime.config.models import CapacityConfig, HedgeConfig, OnFailureConfig
from moe_runtime.config.policies import TopKPolicyConfig
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.service.batch import Batch, BatchResult
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.layer import RoutedLayer
from moe_runtime.service.ports import Endpoint, HostLost, HostReply, HostRequest, SegmentResult
from moe_runtime.service.report import BatchLedger
from moe_runtime.service.routing_table import RoutingTable
from moe_runtime.wire.messages import SERVED

NUM_EXPERTS, MOST_SHARED = 4, 2
COUNTERS = ("num_served", "num_dropped_capacity", "num_dropped_failure", "num_retried", "num_rerouted", "num_hedged")
ORDERS = [
    ("replica", "reroute", "drop"),
    ("reroute", "replica", "drop"),
    ("replica", "drop"),
    ("drop",),
    ("replica", "reroute", "error"),
]

layers = st.builds(
    lambda k, score, normalize, factor, order, residual, hedged, exact, num_shared: make_layer(
        NUM_EXPERTS + num_shared,
        num_shared=num_shared,
        gate_features=NUM_EXPERTS,
        policy=build_policy(TopKPolicyConfig(k=k, score=score, normalize=normalize), num_experts=NUM_EXPERTS),
        capacity=CapacityConfig(factor=factor, min=1, overflow="reroute" if factor == 1.0 else "drop"),
        on_failure=OnFailureConfig(order=order),
        residual=residual,
        hedge=HedgeConfig(quantile=0.5, times=1.0, max_share=1.0) if hedged and not exact else None,
        exact=exact,
    ),
    k=st.integers(1, 3),
    score=st.sampled_from(["softmax", "sigmoid", "softmax_after_topk"]),
    normalize=st.sampled_from(["before_drop", "after_drop", "none"]),
    factor=st.sampled_from([None, 0.5, 1.0]),
    order=st.sampled_from(ORDERS),
    residual=st.sampled_from(["add", "passthrough", "none", "blend"]),
    hedged=st.booleans(),
    exact=st.booleans(),
    num_shared=st.integers(0, MOST_SHARED),
)


class Hosts:
    """Two hosts per two experts, shared or not, and a third replica of expert 0; they misbehave as a seed says."""

    def __init__(self, seed: int, badness: float) -> None:
        self.clock = FakeClock()
        self.transport = FakeTransport()
        self._random = random.Random(seed)
        self._badness = badness

    @staticmethod
    def table() -> RoutingTable:
        replicas = {
            ("layer", e): [replica(e, 10 + e // 2), replica(e, 20 + e // 2, n=1)]
            for e in range(NUM_EXPERTS + MOST_SHARED)
        }
        replicas["layer", 0].append(replica(0, 30, n=2))
        return RoutingTable(1, {key: tuple(each) for key, each in replicas.items()})

    def work(self) -> None:
        """One host does something with one message, or time passes."""
        transport, draw = self.transport, self._random
        transport.refusing = {
            endpoint(host) for host in (10, 11, 12, 20, 21, 22, 30) if draw.random() < self._badness / 4
        }
        if not transport.sent or draw.random() < self._badness / 2:
            self.clock.advance(draw.choice([0.01, 0.3, 1.1]))
            return
        where, request = transport.sent.pop(draw.randrange(len(transport.sent)))
        deed = draw.choice([self._raise, self._spoil, self._garble, self._die, self._freeze, self._forget])
        (deed if draw.random() < self._badness else self._answer)(where, request)

    def _reply(self, request: HostRequest, results: list[SegmentResult], rows: torch.Tensor | None) -> None:
        self.transport.arrivals.append(HostReply(request.ticket, tuple(results), rows))

    def _answer(self, where: Endpoint, request: HostRequest) -> None:
        del where
        results = [SegmentResult(s.replica_id, s.num_rows) for s in request.segments]
        self._reply(request, results, scaled(request))

    def _raise(self, where: Endpoint, request: HostRequest) -> None:
        del where
        results = [SegmentResult(s.replica_id, s.num_rows, error="it raised") for s in request.segments]
        self._reply(request, results, None)

    def _spoil(self, where: Endpoint, request: HostRequest) -> None:
        del where
        rows, results, start = scaled(request), [], 0
        for s in request.segments:
            failed = tuple(row for row in range(s.num_rows) if self._random.random() < 0.5)[: s.num_rows - 1]
            rows[[start + row for row in failed]] = 0.0
            start += s.num_rows
            error = "not finite" if failed else None
            results.append(SegmentResult(s.replica_id, s.num_rows, error=error, failed_rows=failed))
        self._reply(request, results, rows)

    def _garble(self, where: Endpoint, request: HostRequest) -> None:
        del where
        self._reply(request, [], torch.full_like(request.rows, torch.nan))

    def _die(self, where: Endpoint, request: HostRequest) -> None:
        del request
        self.transport.sent = [each for each in self.transport.sent if each[0] != where]
        self.transport.arrivals.append(HostLost(where, "it died"))

    def _freeze(self, where: Endpoint, request: HostRequest) -> None:
        del request
        self.transport.sent = [each for each in self.transport.sent if each[0] != where]
        self.transport.arrivals.append(HostLost(where, "it froze", is_death=False))

    def _forget(self, where: Endpoint, request: HostRequest) -> None:
        """Never answer."""


def scaled(request: HostRequest) -> torch.Tensor:
    parts = request.rows.split([segment.num_rows for segment in request.segments])
    return torch.cat([(int(s.replica_id.split("/")[1]) + 1) * p for s, p in zip(request.segments, parts, strict=True)])


def check_part(result: BatchResult, layer: RoutedLayer, tokens: torch.Tensor, rows: range) -> dict[str, int]:
    """The counts of one request, after its rows were found to be what its report says."""
    report = BatchLedger(result, layer).part(first_row=rows.start, last_row=rows.stop, queue_s=0.0, return_routing=True)
    assert report.num_assignments == report.num_served + report.num_dropped_capacity + report.num_dropped_failure
    assert report.token_ids is not None
    assert report.expert_ids is not None
    assert report.expert_weights is not None
    assert report.outcomes is not None
    served = torch.from_numpy(report.outcomes == SERVED)
    scales = torch.from_numpy(report.expert_weights) * (torch.from_numpy(report.expert_ids) + 1.0) * served
    mine, own = torch.from_numpy(report.token_ids), tokens[rows.start : rows.stop]
    sums, num_served = (torch.zeros(len(rows)).index_add(0, mine, each) for each in (scales, served.float()))
    if layer.num_shared:
        assert report.num_shared_served + report.num_shared_dropped == len(rows) * layer.num_shared
        assert report.shared_weights is not None
        shared = torch.from_numpy(report.shared_weights)
        sums = sums + shared @ torch.arange(layer.num_routed + 1.0, layer.num_experts + 1.0)
        num_served = num_served + (shared > 0).sum(1)
    expected = own * sums[:, None]
    if layer.residual == "add":
        expected = expected + own
    elif layer.residual == "blend":
        weights = torch.from_numpy(report.expert_weights)
        expected = expected + (1.0 - torch.zeros(len(rows)).index_add(0, mine, weights))[:, None] * own
    elif layer.residual == "passthrough":
        expected[num_served == 0] = own[num_served == 0]
    torch.testing.assert_close(result.outputs[rows.start : rows.stop], expected, rtol=1e-4, atol=1e-4)
    held = list(zip(report.token_ids.tolist(), report.expert_ids.tolist(), strict=True))
    assert len(set(held)) == len(held)
    assert max(report.expert_ids) < layer.num_routed
    return {name: getattr(report, name) for name in (*COUNTERS, "num_shared_served", "num_shared_dropped")}


@settings(max_examples=80)
@given(
    layer=layers,
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    num_batches=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    badness=st.sampled_from([0.1, 0.4, 0.8]),
)
def test_every_batch_comes_back_once_and_adds_up(
    layer: RoutedLayer, sizes: list[int], num_batches: int, seed: int, badness: float
) -> None:
    hosts = Hosts(seed, badness)
    engine = RouterEngine({"layer": layer}, hosts.transport, clock=hosts.clock)
    engine.set_table(hosts.table())
    generator = torch.Generator().manual_seed(seed)
    starts = tuple(sum(sizes[:place]) for place in range(len(sizes)))
    tokens = torch.randn(sum(sizes), 3, generator=generator)
    ids = {}
    for _ in range(num_batches):
        logits = torch.randn(sum(sizes), NUM_EXPERTS, generator=generator)
        names = tuple(f"r{place}" for place in range(len(sizes)))
        batch = Batch("layer", tokens, gate_input=logits, row_starts=starts, request_ids=names)
        ids[engine.submit(batch)] = hosts.clock.now()
    sums = Counter[str]()
    while engine.num_in_flight:
        hosts.work()
        for result in engine.poll(0.0):
            ids.pop(result.batch_id)
            assert torch.isfinite(result.outputs).all()
            for start, size in zip(starts, sizes, strict=True):
                counts = check_part(result, layer, tokens, range(start, start + size))
                sums.update(counts)
    assert ids == {}
    assert hosts.clock.now() < 100.0 + layer.timeout_s + 2.0
    every_expert = engine.stats.layers["layer"].experts
    experts, shared = every_expert[: layer.num_routed], every_expert[layer.num_routed :]
    assert {name: sum(getattr(expert, name) for expert in experts) for name in COUNTERS} == {
        name: sums[name] for name in COUNTERS
    }
    assert sum(expert.num_served for expert in shared) == sums["num_shared_served"]
    assert sum(expert.num_dropped_failure for expert in shared) == sums["num_shared_dropped"]
    assert sum(expert.num_rerouted + expert.num_dropped_capacity for expert in shared) == 0
    assert engine.stats.layers["layer"].totals.num_rerouted == sums["num_rerouted"]
