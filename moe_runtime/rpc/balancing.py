"""Which of several routers a client calls next."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0


@dataclass
class _Health:
    num_failures: int = 0
    is_lost: bool = False
    paused_until: float = float("-inf")


class AddressPool:
    """Router addresses in turn. Thread-safe.

    One whose router refuses is skipped for a while, longer each time; one that cannot be reached is skipped until it
    can, so that no call is spent on finding out.

    Args:
        addresses: ``HOST:PORT`` of each router.
        now: Tells the time in seconds.
    """

    def __init__(self, addresses: Sequence[str], *, now: Callable[[], float]) -> None:
        self.addresses = tuple(addresses)
        self._now = now
        self._lock = threading.Lock()
        self._health = {address: _Health() for address in self.addresses}
        self._turn = 0

    def pick(self) -> str:
        """The next address; where all have failed, the one whose pause ends first."""
        with self._lock:
            count = len(self.addresses)
            in_turn = [self.addresses[(self._turn + i) % count] for i in range(count)]
            usable = [address for address in in_turn if self._is_usable(address)]
            picked = usable[0] if usable else min(in_turn, key=lambda a: self._health[a].paused_until)
            self._turn = self.addresses.index(picked) + 1
            return picked

    def has_usable(self) -> bool:
        """Whether an address is left that has not failed lately."""
        with self._lock:
            return any(self._is_usable(address) for address in self.addresses)

    def mark_failed(self, address: str) -> None:
        """The router was reached, and refuses requests."""
        with self._lock:
            self._pause(self._health[address])

    def mark_lost(self, address: str) -> None:
        """The router could not be reached, or fell silent; whoever says so also watches for ``mark_connected``."""
        with self._lock:
            health = self._health[address]
            self._pause(health)
            health.is_lost = True

    def mark_connected(self, address: str) -> None:
        """A router that was lost can be reached again: maybe another process, which has refused nothing yet."""
        with self._lock:
            if self._health[address].is_lost:
                self._health[address] = _Health()

    def mark_answered(self, address: str) -> None:
        """The router answered."""
        with self._lock:
            self._health[address] = _Health()

    def _pause(self, health: _Health) -> None:
        pause_s = min(_FIRST_PAUSE_S * 2**health.num_failures, _LONGEST_PAUSE_S)
        health.num_failures = min(health.num_failures + 1, 16)
        health.paused_until = self._now() + pause_s

    def _is_usable(self, address: str) -> bool:
        health = self._health[address]
        return not health.is_lost and health.paused_until <= self._now()


def addresses_of(target: str | Sequence[str]) -> tuple[str, ...]:
    """The distinct addresses that a caller named, as one string or several.

    Raises:
        InvalidRequestError: If there is none, or one is not of the form ``HOST:PORT``.
    """
    if not isinstance(target, Iterable):
        raise InvalidRequestError(f"target: expected HOST:PORT or a list of them, found {target!r}")
    addresses = (target,) if isinstance(target, str) else tuple(target)
    if not addresses:
        raise InvalidRequestError("target: expected at least one HOST:PORT, found none")
    for address in addresses:
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InvalidRequestError(f"target: expected HOST:PORT, found {address!r}")
    return tuple(dict.fromkeys(addresses))
