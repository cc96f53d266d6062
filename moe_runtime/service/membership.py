"""A program's own place among those who route for a runtime: how to reach its hosts, and what to route by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.ports import Transport
    from moe_runtime.service.routing_table import RoutingTable


@dataclass(frozen=True)
class Routes:
    """What to route by from now on.

    Attributes:
        table: Where each expert is.
        layers: All layers that the table was made for; None where they are those of the last time.
    """

    table: RoutingTable
    layers: Mapping[str, RoutedLayer] | None = None


class Membership(Protocol):
    """Lets one router engine outside of the runtime's own routers reach the hosts. ``news`` is for one thread only.

    Hosts that a newer table has not are kept, within reason, until the member says that it no longer uses theirs. A
    member that has not asked for news for some seconds is forgotten; it is one again as soon as it asks.
    """

    @property
    def node(self) -> str:
        """Name of the node that the member is on."""
        ...

    @property
    def transport(self) -> Transport:
        """The member's end of the data plane, which is the member's to close."""
        ...

    def news(self, *, oldest_used: int, timeout_s: float) -> Routes | None:
        """What is newer than what was given last; waits up to ``timeout_s`` for it, then None.

        The first time it gives what there is, once every host lets the member in.

        Args:
            oldest_used: The oldest version of the table that the member still uses; 0 before it has one.
            timeout_s: How long to wait.

        Raises:
            UnavailableError: If the runtime has ended, or the member has left.
        """
        ...

    def leave(self) -> None:
        """Be a member no longer; a ``news`` that waits ends soon. Thread-safe, safe to call twice."""
        ...
