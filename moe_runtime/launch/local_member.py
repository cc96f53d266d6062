"""Membership in a runtime of this process's threads: the newest routes are a notice on a wall."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from moe_runtime.errors import UnavailableError
from moe_runtime.service.membership import Routes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.ports import Transport
    from moe_runtime.service.routing_table import RoutingTable


class RoutesBoard:
    """The newest routes of a runtime, and who uses which. Thread-safe."""

    def __init__(self, name: str) -> None:
        """Post nothing yet.

        Args:
            name: The runtime's.
        """
        self._name = name
        self._changed = threading.Condition()
        self._newest: Routes | None = None
        self._uses: dict[LocalMember, int] = {}
        self._end: str | None = None

    def post(self, table: RoutingTable, layers: Mapping[str, RoutedLayer]) -> None:
        """Have every member route by these from now on."""
        with self._changed:
            self._newest = Routes(table, layers)
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Tell every member that there will be no more news, and why."""
        with self._changed:
            self._end = self._end or reason
            self._changed.notify_all()

    def await_let_go(self, version: int, *, timeout_s: float) -> bool:
        """Whether no member uses a table older than this version; waits up to ``timeout_s`` for it."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(not used or used >= version for used in self._uses.values()), timeout_s
            )

    def news(self, member: LocalMember, *, known: int, oldest_used: int, timeout_s: float) -> Routes | None:
        """Routes with a newer table than the known one, for a member."""
        with self._changed:
            if not member.has_left:
                self._uses[member] = oldest_used
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_news(member, known), timeout_s)
            if self._end is not None:
                raise UnavailableError(f"runtime {self._name}: {self._end}")
            if member.has_left:
                raise UnavailableError(f"runtime {self._name}: expected a member of it, found one that has left")
            newest = self._newest
            return newest if newest is not None and newest.table.version > known else None

    def remove(self, member: LocalMember) -> None:
        """A member has left."""
        with self._changed:
            self._uses.pop(member, None)
            self._changed.notify_all()

    def _is_news(self, member: LocalMember, known: int) -> bool:
        is_newer = self._newest is not None and self._newest.table.version > known
        return is_newer or self._end is not None or member.has_left


class LocalMember:
    """A member of a runtime in this process; implements the port ``Membership``."""

    def __init__(self, board: RoutesBoard, transport: Transport, *, node: str) -> None:
        """Join.

        Args:
            board: Where the newest routes are.
            transport: The member's own.
            node: Name of this node.
        """
        self.has_left = False
        self._board = board
        self._transport = transport
        self._node = node
        self._known = 0

    @property
    def node(self) -> str:
        """Name of this node."""
        return self._node

    @property
    def transport(self) -> Transport:
        """The member's end of the data plane, which is the member's to close."""
        return self._transport

    def news(self, *, oldest_used: int, timeout_s: float) -> Routes | None:
        """Routes with a newer table than the last; waits up to ``timeout_s`` for them, then None.

        Raises:
            UnavailableError: If the runtime was closed, or the member has left.
        """
        routes = self._board.news(self, known=self._known, oldest_used=oldest_used, timeout_s=timeout_s)
        if routes is not None:
            self._known = routes.table.version
        return routes

    def leave(self) -> None:
        """Be a member no longer. Thread-safe, safe to call twice."""
        self.has_left = True
        self._board.remove(self)
