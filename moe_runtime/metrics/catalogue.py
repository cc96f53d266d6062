"""Every metric of a router: name, type, labels and meaning. The page in docs/ is written from this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from moe_runtime.service.queue_stats import REFUSAL_REASONS
from moe_runtime.service.routing_table import ReplicaState

MetricType = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: As it is scraped; a histogram's without ``_bucket``, ``_sum`` and ``_count``.
        type: What Prometheus calls it.
        meaning: What it counts, in one sentence.
        labels: Names of its labels.
    """

    name: str
    type: MetricType
    meaning: str
    labels: tuple[str, ...] = ()

    def counter(self) -> CounterMetricFamily:
        """An empty family of this counter."""
        return CounterMetricFamily(self.name, self.meaning, labels=self.labels)

    def gauge(self) -> GaugeMetricFamily:
        """An empty family of this gauge."""
        return GaugeMetricFamily(self.name, self.meaning, labels=self.labels)

    def histogram(self) -> HistogramMetricFamily:
        """An empty family of this histogram."""
        return HistogramMetricFamily(self.name, self.meaning, labels=self.labels)


_REASONS = ", ".join(f"`{reason}`" for reason in REFUSAL_REASONS)
_STATES = ", ".join(f"`{state}`" for state in ReplicaState)

REQUESTS_ACCEPTED = Metric("moe_requests_accepted_total", "counter", "Requests taken into the queue.")
REQUESTS = Metric(
    "moe_requests_total",
    "counter",
    "Accepted requests that have ended: `answered`, `failed`, `cancelled` by their caller, or `deadline_exceeded`.",
    ("outcome",),
)
REQUESTS_REFUSED = Metric(
    "moe_requests_refused_total",
    "counter",
    f"Requests refused before they were queued, because of: {_REASONS}.",
    ("reason",),
)
REQUESTS_UNCOMPUTED = Metric(
    "moe_requests_uncomputed_total",
    "counter",
    "Accepted requests that ended before any of their rows was computed: `expired` or `cancelled`.",
    ("cause",),
)
REQUESTS_POISONED = Metric(
    "moe_requests_poisoned_total", "counter", "Requests that failed because two expert hosts died of them."
)
RPC_CALLS = Metric("moe_rpc_calls_total", "counter", "gRPC calls, by method.", ("method",))
RPC_ERRORS = Metric(
    "moe_rpc_errors_total",
    "counter",
    "gRPC calls that were refused or failed, by reason: the name of the error that the client raises.",
    ("error",),
)
OPEN_REQUESTS = Metric("moe_open_requests", "gauge", "Requests taken in and not answered yet.")
QUEUE_REQUESTS = Metric("moe_queue_requests", "gauge", "Requests that wait for a batch.", ("layer",))
QUEUE_TOKENS = Metric("moe_queue_tokens", "gauge", "Tokens that wait for a batch.", ("layer",))
QUEUE_BYTES = Metric("moe_queue_bytes", "gauge", "Bytes of tokens that wait, of all layers.")
BATCHES_IN_FLIGHT = Metric("moe_batches_in_flight", "gauge", "Batches dispatched and not combined yet.", ("layer",))
BATCHES = Metric("moe_batches_total", "counter", "Batches combined.", ("layer",))
TOKENS = Metric("moe_tokens_total", "counter", "Tokens in those batches.", ("layer",))
BATCH_TOKENS = Metric("moe_batch_tokens", "histogram", "Tokens per batch.", ("layer",))
BATCH_LOAD = Metric(
    "moe_batch_load_ratio",
    "histogram",
    "Per batch: rows of the busiest expert over the mean of all that are not shared; 1 is perfect balance.",
    ("layer",),
)
STAGE_SECONDS = Metric(
    "moe_stage_seconds",
    "histogram",
    "Time per stage: `queue` (per request and batch: waiting for the batch), and per batch `gate` (gate, policy, "
    "capacity, plan), `experts` (dispatch to last answer) and `combine`.",
    ("layer", "stage"),
)
ASSIGNMENTS = Metric(
    "moe_assignments_total",
    "counter",
    "Assignments of tokens to experts: `served`, `dropped_capacity` (expert full) or `dropped_failure`.",
    ("layer", "outcome"),
)
ASSIGNMENTS_REROUTED = Metric(
    "moe_assignments_rerouted_total",
    "counter",
    "Assignments moved to another expert than the gate's choice.",
    ("layer",),
)
SHARED_ASSIGNMENTS = Metric(
    "moe_shared_assignments_total",
    "counter",
    "Tokens at shared experts, which are not in `moe_assignments_total`: `served` or `dropped_failure`.",
    ("layer", "outcome"),
)
EXPERT_ASSIGNMENTS = Metric(
    "moe_expert_assignments_total", "counter", "Assignments per expert, by outcome.", ("layer", "expert", "outcome")
)
EXPERT_STEPS = Metric(
    "moe_expert_steps_total",
    "counter",
    "Assignments that took more than one attempt, by the expert that was asked: `retried` at another replica, "
    "`rerouted` to another expert, `hedged` to a second replica; and by the expert that got the rows: `timed_out`, "
    "`failed_attempt` (timed out ones included).",
    ("layer", "expert", "step"),
)
EXPERT_COMPUTE = Metric(
    "moe_expert_compute_seconds",
    "histogram",
    "Time of a matrix product, measured by its host; rows of several requests may share one.",
    ("layer", "expert"),
)
EXPERT_WAIT = Metric(
    "moe_expert_wait_seconds",
    "histogram",
    "Rows sent to rows answered, without the product itself: the way there and back, and the queue at the host.",
    ("layer", "expert"),
)
EXPERT_BIAS = Metric(
    "moe_expert_bias",
    "gauge",
    "What serving has added to the selection bias of an expert, where `balance.online_bias` is on.",
    ("layer", "expert"),
)
BIAS_STEPS = Metric("moe_bias_steps_total", "counter", "Steps of the selection bias.", ("layer",))
BIAS_LARGEST = Metric("moe_bias_largest", "gauge", "Largest absolute value among those biases.", ("layer",))
BIAS_LOAD = Metric(
    "moe_bias_load_ratio",
    "gauge",
    "Largest over mean load of the experts, over all routers, that the last step was made of; 1 is perfect balance.",
    ("layer",),
)
REPLICAS = Metric("moe_replicas", "gauge", f"Replicas of experts by state: {_STATES}.", ("layer", "state"))
EXPERTS_OUT = Metric("moe_experts_out", "gauge", "Experts without a replica that rows can be sent to.", ("layer",))
REPLICA_RESTARTS = Metric(
    "moe_replica_restarts_total",
    "counter",
    "Times that hosts of present replicas came back; starts anew with the controller.",
    ("layer",),
)
HOST_BYTES = Metric(
    "moe_host_bytes_total", "counter", "Bytes of rows `sent` to expert hosts and `received` from them.", ("direction",)
)
SEND_ERRORS = Metric("moe_send_errors_total", "counter", "Messages that could not be handed to the transport.")
LATE_REPLIES = Metric("moe_late_replies_total", "counter", "Replies of hosts that nobody waited for any more.")
TRANSPORT_EVENTS = Metric(
    "moe_transport_events_total",
    "counter",
    "The transport's own counters of messages and connections: `sent`, `received`, `lost` (connections to hosts), "
    "`full`, `malformed`, `refused`, `strangers` and others; see moe_runtime/transport/counters.py.",
    ("event",),
)
TABLE_VERSION = Metric("moe_table_version", "gauge", "Version of the routing table in use.")
DRAINING = Metric("moe_draining", "gauge", "1 while new requests are refused, else 0.")
UPTIME = Metric("moe_uptime_seconds", "gauge", "Time since the router started.")
BUILD_INFO = Metric(
    "moe_build_info", "gauge", "Always 1; says what the router is.", ("version", "runtime", "node", "address")
)

#: In the order of the page.
CATALOGUE: tuple[Metric, ...] = (
    REQUESTS_ACCEPTED, REQUESTS, REQUESTS_REFUSED, REQUESTS_UNCOMPUTED, REQUESTS_POISONED, RPC_CALLS, RPC_ERRORS,
    OPEN_REQUESTS, QUEUE_REQUESTS, QUEUE_TOKENS, QUEUE_BYTES,
    BATCHES_IN_FLIGHT, BATCHES, TOKENS, BATCH_TOKENS, BATCH_LOAD, STAGE_SECONDS,
    ASSIGNMENTS, ASSIGNMENTS_REROUTED, SHARED_ASSIGNMENTS,
    EXPERT_ASSIGNMENTS, EXPERT_STEPS, EXPERT_COMPUTE, EXPERT_WAIT,
    EXPERT_BIAS, BIAS_STEPS, BIAS_LARGEST, BIAS_LOAD,
    REPLICAS, EXPERTS_OUT, REPLICA_RESTARTS,
    HOST_BYTES, SEND_ERRORS, LATE_REPLIES, TRANSPORT_EVENTS,
    TABLE_VERSION, DRAINING, UPTIME, BUILD_INFO,
)  # fmt: skip
