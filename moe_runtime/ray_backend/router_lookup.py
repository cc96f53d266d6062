"""Where the routers of a runtime are at the moment, from the side of one of its expert hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from moe_runtime.errors import UnavailableError
from moe_runtime.ray_backend.names import controller_name
from moe_runtime.ray_backend.ray_spawner import find_actor

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Within a batch's time; a controller that restarts answers the next one.
_TIMEOUT_S = 1.0


class RouterLookup:
    """Asks a runtime's controller for its routers. Used by one thread of an actor."""

    def __init__(self, runtime: str) -> None:
        """Ask nothing yet."""
        self._runtime = runtime
        self._controller: Any = None

    def __call__(self) -> Sequence[str]:
        """``HOST:PORT`` of every router that has started, as the controller knows them.

        Raises:
            UnavailableError: If the controller does not answer.
        """
        try:
            # Found once: it keeps its handle when it restarts, and to find it has no timeout.
            self._controller = self._controller or find_actor(controller_name(self._runtime))
            if self._controller is None:
                raise UnavailableError(f"runtime {self._runtime}: expected its controller on this cluster, found none")
            addresses: list[str] = ray.get(self._controller.addresses.remote(), timeout=_TIMEOUT_S)
        except RayError as exc:
            reason = type(exc).__name__
            raise UnavailableError(f"runtime {self._runtime}: its controller does not answer: {reason}") from exc
        return addresses
