"""What the actors run, and what makes it: the launch layer brings both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from moe_runtime.ray_backend.plan import HostHealth, HostReport, Location, RouterReport
    from moe_runtime.service.ports import Transport
    from moe_runtime.service.routing_table import RoutingTable


class HostProcess(Protocol):
    """An expert host: what an expert actor runs. ``start`` is called once, from a thread of its own."""

    def start(self) -> HostReport:
        """Load the experts, listen, and begin to serve in a thread of its own.

        Raises:
            MoERuntimeError: If an expert cannot be built, or nothing can be bound.
        """
        ...

    def admit(self, public_keys: Collection[str]) -> None:
        """Let routers with these keys connect from other nodes, and no others. Thread-safe.

        Raises:
            MoERuntimeError: If it was not started, or a key is malformed.
        """
        ...

    def health(self) -> HostHealth:
        """How it is. Thread-safe; cheap, and never waits for an expert."""
        ...

    def join(self) -> str:
        """Wait until serving has ended, and say why."""
        ...

    def stop(self) -> None:
        """Stop after the run that is under way, and stop listening. Thread-safe, safe to call twice."""
        ...


class RouterProcess(Protocol):
    """A router: what a router actor runs. Every method is called from a thread that may block."""

    def start(self, address: str) -> RouterReport:
        """Bind and serve.

        Raises:
            MoERuntimeError: If a gate cannot be built, or the address cannot be bound.
        """
        ...

    def set_table(self, table: RoutingTable) -> None:
        """Route by this table from the next batch on, unless a newer one is there."""
        ...

    def replace_setup(self, setup: Any, table: RoutingTable) -> None:
        """Serve what a factory has prepared from the next batch on, by a table that was made for it."""
        ...

    def oldest_table_version(self) -> int:
        """The oldest version of the table that a request may still use.

        Raises:
            TimeoutError: If that cannot be told at the moment.
        """
        ...

    def standstill(self) -> str | None:
        """Which of its threads stands still, in words; None where none does. Never waits; asked every second."""
        ...

    def describe(self) -> dict[str, Any]:
        """Layers, experts and replicas, as plain values."""
        ...

    def status(self) -> dict[str, Any]:
        """Counters and load, as plain values."""
        ...

    def asked(self, layers: Collection[str]) -> Mapping[str, Mapping[str, int]]:
        """Assignments that each expert of these layers was asked for since the start, by name. Never waits."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those in flight; whether all were answered in time."""
        ...

    def close(self) -> None:
        """Stop serving. Safe to call twice."""
        ...


class HostFactory(Protocol):
    """Makes a host's process where the actor runs; picklable."""

    def __call__(self, location: Location, *, num_threads: int) -> HostProcess:
        """The process, not yet started."""
        ...


class RouterFactory(Protocol):
    """Makes a router's process where the actor runs; picklable."""

    def __call__(self, location: Location) -> RouterProcess:
        """The process, not yet started."""
        ...

    def open_transport(self, location: Location) -> Transport:
        """A router's end of the data plane, for a program that routes for itself."""
        ...

    def describe(self, table: RoutingTable) -> dict[str, Any]:
        """What a router that serves would say of its layers, by a table."""
        ...

    def prepare(self) -> Any:
        """What a router that runs needs to serve the same as the process would: for ``replace_setup``.

        Raises:
            MoERuntimeError: If a gate cannot be built.
        """
        ...
