"""The configuration of a whole runtime: its layers, its routers and what they allow."""

from __future__ import annotations

import ipaddress
import itertools
from typing import Literal

from pydantic import Field, field_validator, model_validator

from moe_runtime.config.hosts import is_loopback
from moe_runtime.config.models import LayerConfig
from moe_runtime.config.observing import LoggingConfig, MetricsConfig
from moe_runtime.config.security import SecurityConfig
from moe_runtime.config.strict import MAX_BYTES, MAX_COUNT, MAX_SECONDS, MAX_THREADS, Name, StrictModel


class RouterConfig(StrictModel):
    """The router processes and their batcher."""

    replicas: int = Field(
        1,
        ge=0,
        le=1024,
        description="Router processes; replica i on a node takes port + i. 0: no client is served, programs use the "
        "layers as a library.",
    )
    address: str = Field(
        "127.0.0.1:50051",
        description="HOST:PORT of the first router; port 0 is any; the host `node` is the address that the cluster "
        "knows each router's node by.",
    )
    node_labels: dict[str, str] = Field(
        default_factory=dict, description="Labels that the routers' nodes must have; routers spread over those nodes."
    )
    max_batch_tokens: int = Field(4096, ge=1, le=MAX_COUNT, description="Tokens that one batch holds at most.")
    max_wait_ms: float = Field(
        2.0,
        ge=0,
        le=MAX_SECONDS * 1000,
        description="How long a request waits for batch-mates at most; for callers that were answered just now "
        "as long as their batch took, 50 times this at most.",
    )
    max_queued_tokens: int = Field(
        65536, ge=1, le=MAX_COUNT, description="Queued tokens above which requests are refused."
    )
    max_queued_bytes: int = Field(
        1 << 30, ge=1, le=MAX_BYTES, description="Queued bytes above which requests are refused."
    )
    max_queued_s: float = Field(
        0.5,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds of work, at the pace measured lately, that may wait before a request; it is refused "
        "beyond that, unless it would be in the next batch, and where its answer would probably be late.",
    )
    max_client_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the queue and of the open requests that one client may hold while others are active.",
    )
    drain_s: float = Field(
        30.0, gt=0, le=MAX_SECONDS, description="How long requests in flight may take when a router is ended."
    )
    drain_notice_s: float = Field(
        0.0,
        ge=0,
        le=MAX_SECONDS,
        description="How long a router that is to end tells health checks so before it refuses requests; for load "
        "balancers that look rarely.",
    )

    @model_validator(mode="after")
    def _notice_within_drain(self) -> RouterConfig:
        if self.drain_notice_s >= self.drain_s:
            raise ValueError(
                f"drain_notice_s: expected less than {self.drain_s}, the drain_s, found {self.drain_notice_s}"
            )
        return self

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"expected HOST:PORT with a port of 0 to 65535, found {address!r}")
        return address


class LimitsConfig(StrictModel):
    """What one request may ask for."""

    max_request_bytes: int = Field(
        256 << 20, ge=1, le=MAX_BYTES, description="Bytes of one request, streamed ones included."
    )
    max_request_tokens: int = Field(65536, ge=1, le=MAX_COUNT, description="Tokens of one request.")
    max_concurrent_requests: int = Field(
        1024, ge=1, le=MAX_COUNT, description="Requests that a router holds; more are refused."
    )
    max_metadata_bytes: int = Field(
        16384, ge=1024, le=1 << 20, description="Bytes of a call's metadata (HTTP/2 headers); calls with more fail."
    )
    default_timeout_s: float = Field(10.0, gt=0, le=MAX_SECONDS, description="Deadline of a request that has none.")
    max_timeout_s: float = Field(300.0, gt=0, le=MAX_SECONDS, description="Longest deadline that a request may have.")

    @model_validator(mode="after")
    def _default_within_maximum(self) -> LimitsConfig:
        if self.default_timeout_s > self.max_timeout_s:
            raise ValueError(
                f"default_timeout_s: expected at most {self.max_timeout_s}, the max_timeout_s, "
                f"found {self.default_timeout_s}"
            )
        return self


class DataPlaneConfig(StrictModel):
    """How tokens travel between routers and expert hosts."""

    port_range: tuple[int, int] | None = Field(
        None, description="Inclusive range of tcp ports that expert hosts bind; any port when not given."
    )
    encryption: Literal["curve", "none"] = Field(
        "curve", description="Between nodes; with `curve`, hosts let only their runtime's routers in."
    )

    network: str | None = Field(
        None,
        description="In CIDR notation: expert hosts bind their node's address in this network; the one that the "
        "cluster knows the node by when not given.",
    )

    @field_validator("network")
    @classmethod
    def _cidr(cls, network: str | None) -> str | None:
        if network is None:
            return None
        try:
            return str(ipaddress.ip_network(network))
        except ValueError as exc:
            raise ValueError(f"expected a network such as 10.0.0.0/16, found {network!r}: {exc}") from exc

    @field_validator("port_range")
    @classmethod
    def _ports(cls, port_range: tuple[int, int] | None) -> tuple[int, int] | None:
        if port_range is not None and not 1 <= port_range[0] <= port_range[1] <= 65535:
            raise ValueError(f"expected [first, last] with 1 <= first <= last <= 65535, found {list(port_range)}")
        return port_range


class RuntimeConfig(StrictModel):
    """One runtime: layers of experts and the routers in front of them."""

    name: Name = Field("default", description="Names the runtime on its cluster; one runtime per name.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` is cuda where there is a GPU.")
    threads: Literal["auto"] | int = Field(
        "auto", description="Torch threads per expert actor; `auto` is max(1, cores // experts on the node)."
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Initialises what has no weights.")
    start_timeout_s: float = Field(60.0, gt=0, le=MAX_SECONDS, description="Bounds every placement and start.")
    plug_ins: list[str] = Field(
        default_factory=list, description="Distributions that must be installed: `name` or `name==version`."
    )
    layers: dict[Name, LayerConfig] = Field(
        description="The layers, by name; may be empty where `router.replicas` is 0: a program adds some later."
    )
    router: RouterConfig = Field(default_factory=RouterConfig, description="Router processes.")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="Limits on one request.")
    data_plane: DataPlaneConfig = Field(default_factory=DataPlaneConfig, description="Token transport.")
    security: SecurityConfig = Field(default_factory=SecurityConfig, description="Who may call the routers, and how.")
    metrics: MetricsConfig = Field(default_factory=MetricsConfig, description="Metrics for Prometheus.")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="Logs of all processes.")

    @field_validator("threads")
    @classmethod
    def _bounded_threads(cls, threads: Literal["auto"] | int) -> Literal["auto"] | int:
        if threads != "auto" and not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"expected auto or 1 to {MAX_THREADS}, found {threads}")
        return threads

    @model_validator(mode="after")
    def _routers_have_layers(self) -> RuntimeConfig:
        if self.router.replicas and not self.layers:
            raise ValueError(
                f"layers: expected 1 or more entries with router.replicas {self.router.replicas}, "
                "found an empty mapping"
            )
        return self

    @model_validator(mode="after")
    def _callers_layers_have_no_routers(self) -> RuntimeConfig:
        called = next((name for name, layer in self.layers.items() if layer.policy.kind == "caller"), None)
        if called is not None and self.router.replicas:
            raise ValueError(
                f"router.replicas: expected 0, since layer {called} has policy caller, which only a program that uses "
                f"the runtime as a library can route, found {self.router.replicas}"
            )
        return self

    @model_validator(mode="after")
    def _plain_text_stays_on_its_machine(self) -> RuntimeConfig:
        if self.router.replicas == 0:
            return self
        host = self.router.address.rpartition(":")[0]
        if self.security.tls is None and not self.security.insecure and not is_loopback(host):
            raise ValueError(
                f"security.tls: expected cert and key, since others reach router.address {self.router.address}, found "
                "none; `moe-runtime certs DIR` makes them, and `security: {insecure: true}` serves in plain text"
            )
        return self

    @model_validator(mode="after")
    def _ports_do_not_collide(self) -> RuntimeConfig:
        taken = {
            "router.address": _ports(self.router.address, self.router.replicas),
            "metrics.address": _ports(self.metrics.address, self.router.replicas),
        }
        if self.data_plane.port_range is not None:
            first, last = self.data_plane.port_range
            taken["data_plane.port_range"] = range(first, last + 1)
        for (one, ours), (other, theirs) in itertools.combinations(taken.items(), 2):
            start, stop = max(ours.start, theirs.start), min(ours.stop, theirs.stop)
            if start < stop:
                raise ValueError(
                    f"{other}: expected other ports than {one}'s {ours.start} to {ours.stop - 1} (replica i takes port "
                    f"+ i), found {theirs.start} to {theirs.stop - 1}"
                )
        return self

    @model_validator(mode="after")
    def _metrics_are_for_those_let_in(self) -> RuntimeConfig:
        self.metrics.check(self.security)
        return self


def _ports(address: str | None, replicas: int) -> range:
    """The ports that an address's replicas take on one node; none where any free ones do."""
    port = 0 if address is None else int(address.rpartition(":")[2])
    return range(port, port + replicas) if port else range(0)
