"""The end of a runtime's actors, whatever state they are in."""

from __future__ import annotations

import logging
import time

import ray

from moe_runtime.ray_backend.names import controller_name
from moe_runtime.ray_backend.ray_spawner import actor_names, find_actor

_LOG = logging.getLogger(__name__)

_GONE_WITHIN_S = 10.0
_POLL_EVERY_S = 0.05


def has_actors(name: str) -> bool:
    """Whether any actor of a runtime is there."""
    return bool(actor_names(name))


def end_actors(name: str, *, but: str | None = None) -> None:
    """Kill every actor of a runtime, the controller first, and wait until their names are free."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    while names := [actor for actor in actor_names(name) if actor != but]:
        # The controller first: it would replace the others.
        for actor_name in sorted(names, key=lambda actor: actor != controller_name(name)):
            actor = find_actor(actor_name)
            if actor is not None:
                ray.kill(actor, no_restart=True)
        if time.monotonic() > deadline:
            _LOG.warning("runtime %s: still there after %g s: %s", name, _GONE_WITHIN_S, ", ".join(names))
            return
        time.sleep(_POLL_EVERY_S)
