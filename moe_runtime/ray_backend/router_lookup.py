"""Where the routers of a runtime are at the moment, from the side of one of its expert hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError

from moe_runtime.errors import UnavailableError
from moe_runtime.ray_backend.names import controller_name
from moe_runtime.ray_backend.ray_spawner import find_actor

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Within a batch's time; a controller that restarts answers the next one.
_TIMEOUT_S = 1.0


def find_routers(runtime: str) -> Sequence[str]:
    """``HOST:PORT`` of every router that has started, as the runtime's controller knows them.

    Raises:
        UnavailableError: If the controller does not answer.
    """
    controller = find_actor(controller_name(runtime))
    if controller is None:
        raise UnavailableError(f"runtime {runtime}: expected its controller on this cluster, found none")
    try:
        addresses: list[str] = ray.get(controller.addresses.remote(), timeout=_TIMEOUT_S)
    except RayError as exc:
        raise UnavailableError(f"runtime {runtime}: its controller does not answer: {type(exc).__name__}") from exc
    return addresses
