"""What programs that route for themselves and the controller tell each other: plain values, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_runtime.service.routing_table import RoutingTable


@dataclass(frozen=True)
class CallerNote:
    """What a program that routes for itself says of itself whenever it asks for news.

    Attributes:
        caller: Random name of it; of another engine in its process it is another.
        node: Name of the node that it is on.
        pid: Its process id on that node.
        public_key: Key that hosts of other nodes must admit; None if they ask for none.
        oldest_used: The oldest version of the table that it still uses; 0 before it has one.
        known: The newest version that it was given.
        revision: Of what routers serve, as it knows it.
    """

    caller: str
    node: str
    pid: int
    public_key: str | None = None
    oldest_used: int = 0
    known: int = 0
    revision: str = ""


@dataclass(frozen=True)
class CallerNews:
    """What a program that routes for itself does not know yet.

    Attributes:
        table: The newest.
        revision: Of what routers serve by it.
        factory: A pickled ``RouterFactory`` of that, where the program knows another revision.
    """

    table: RoutingTable
    revision: str
    factory: bytes | None = None
