"""Reads a router's counters when it is scraped; on the way of a request nothing is done for it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client.registry import Collector

from moe_runtime.metrics import catalogue
from moe_runtime.metrics.layers import LayerCollector
from moe_runtime.service.routing_table import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.core import Metric as Family

    from moe_runtime.metrics.catalogue import Metric
    from moe_runtime.service.lineup import Lineup
    from moe_runtime.service.stats import RouterStats

    RpcCounts = Callable[[], Mapping[str, Mapping[str, int]]]


class Measured(Protocol):
    """What is measured: a ``RouterService``. Its members are read from any thread."""

    @property
    def lineup(self) -> Lineup:
        """Layers, their table and their counters."""
        ...

    @property
    def stats(self) -> RouterStats:
        """The router's counters."""
        ...

    def status(self) -> dict[str, Any]:
        """Load and uptime."""
        ...


class RouterCollector(Collector):
    """All families of the catalogue, from one router. One scrape at a time.

    Args:
        service: The router.
        info: Values of the labels of ``moe_build_info``.
        hottest_experts: Experts per layer that have series of their own.
        rpc_counts: ``num_calls`` by method and ``num_errors`` by error; none when it is left out.
    """

    def __init__(
        self,
        service: Measured,
        *,
        info: Mapping[str, str],
        hottest_experts: int,
        rpc_counts: RpcCounts | None = None,
    ) -> None:
        self._service = service
        self._info = dict(info)
        self._rpc_counts = rpc_counts or dict
        self._layers = LayerCollector(hottest_experts)

    def describe(self) -> Iterable[Family]:
        """Nothing: so that a registry does not collect in order to know the names."""
        return ()

    def collect(self) -> Iterator[Family]:
        """One family per metric of the catalogue."""
        status, lineup = self._service.status(), self._service.lineup
        yield from self._requests(self._service.stats, status)
        yield from self._rpc()
        yield from _queues(status)
        yield from self._layers.collect(lineup)
        yield from _replicas(lineup)
        yield from _data_plane(self._service.stats, status)
        yield _gauge(catalogue.TABLE_VERSION, status["table_version"])
        yield _gauge(catalogue.DRAINING, int(status["draining"]))
        yield _gauge(catalogue.UPTIME, status["uptime_s"])
        labels = [self._info[name] for name in catalogue.BUILD_INFO.labels]
        yield _gauge(catalogue.BUILD_INFO, 1, *labels)

    def _requests(self, stats: RouterStats, status: Mapping[str, Any]) -> Iterator[Family]:
        yield _counter(catalogue.REQUESTS_ACCEPTED, stats.num_requests)
        ended = catalogue.REQUESTS.counter()
        other_failures = stats.num_failed - stats.num_cancelled - stats.num_deadline_exceeded
        ended.add_metric(["answered"], stats.num_answered)
        # Counters of another thread: what is just being counted may be in one of them only.
        ended.add_metric(["failed"], max(0, other_failures))
        ended.add_metric(["cancelled"], stats.num_cancelled)
        ended.add_metric(["deadline_exceeded"], stats.num_deadline_exceeded)
        yield ended
        refused = catalogue.REQUESTS_REFUSED.counter()
        for reason, count in status["queue"]["refused"].items():
            refused.add_metric([reason], count)
        yield refused
        uncomputed = catalogue.REQUESTS_UNCOMPUTED.counter()
        uncomputed.add_metric(["expired"], status["queue"]["num_expired_before_compute"])
        uncomputed.add_metric(["cancelled"], status["queue"]["num_cancelled_before_compute"])
        yield uncomputed
        yield _counter(catalogue.REQUESTS_POISONED, stats.num_poisoned)
        yield _gauge(catalogue.OPEN_REQUESTS, status["open_requests"])

    def _rpc(self) -> Iterator[Family]:
        counts = self._rpc_counts()
        for metric, key in ((catalogue.RPC_CALLS, "num_calls"), (catalogue.RPC_ERRORS, "num_errors")):
            family = metric.counter()
            for label, count in sorted(counts.get(key, {}).items()):
                family.add_metric([label], count)
            yield family


def _queues(status: Mapping[str, Any]) -> Iterator[Family]:
    keys = (
        (catalogue.QUEUE_REQUESTS, "queued_requests"),
        (catalogue.QUEUE_TOKENS, "queued_tokens"),
        (catalogue.BATCHES_IN_FLIGHT, "batches_in_flight"),
    )
    for metric, key in keys:
        family = metric.gauge()
        for name, layer in status["layers"].items():
            # A layer that is just being added has counters before it has a queue.
            family.add_metric([name], layer.get(key, 0))
        yield family
    yield _gauge(catalogue.QUEUE_BYTES, status["queue"]["bytes"])


def _replicas(lineup: Lineup) -> Iterator[Family]:
    replicas, out = catalogue.REPLICAS.gauge(), catalogue.EXPERTS_OUT.gauge()
    restarts = catalogue.REPLICA_RESTARTS.counter()
    for name, layer in lineup.layers.items():
        table = lineup.table
        keys = [(name, expert.expert_id) for expert in layer.experts]
        listed = [replica for key in keys for replica in table.replicas.get(key, ())]
        states = Counter(replica.state for replica in listed)
        for state in ReplicaState:
            replicas.add_metric([name, str(state)], states[state])
        out.add_metric([name], sum(not table.usable(*key) for key in keys))
        restarts.add_metric([name], sum(replica.num_restarts for replica in listed))
    yield from (replicas, out, restarts)


def _data_plane(stats: RouterStats, status: Mapping[str, Any]) -> Iterator[Family]:
    transferred = catalogue.HOST_BYTES.counter()
    transferred.add_metric(["sent"], stats.num_bytes_sent)
    transferred.add_metric(["received"], stats.num_bytes_received)
    yield transferred
    yield _counter(catalogue.SEND_ERRORS, stats.num_send_errors)
    yield _counter(catalogue.LATE_REPLIES, stats.num_late_replies)
    events = catalogue.TRANSPORT_EVENTS.counter()
    for name, count in status["transport"].items():
        events.add_metric([name.removeprefix("num_")], count)
    yield events


def _counter(metric: Metric, value: float) -> CounterMetricFamily:
    family = metric.counter()
    family.add_metric([], value)
    return family


def _gauge(metric: Metric, value: float, *labels: str) -> GaugeMetricFamily:
    family = metric.gauge()
    family.add_metric(labels, value)
    return family
