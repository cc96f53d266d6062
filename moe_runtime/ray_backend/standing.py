"""What runs under a runtime's name already, and what a new deployment under that name has to do about it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from moe_runtime.errors import AlreadyRunningError, StartError
from moe_runtime.ray_backend.deployment import Phase
from moe_runtime.ray_backend.ending import end_actors
from moe_runtime.ray_backend.names import controller_name
from moe_runtime.ray_backend.ray_spawner import find_actor
from moe_runtime.ray_backend.session import RaySession, attach

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.ray_backend.deployment import DeploymentStanding

_POLL_EVERY_S = 0.2
_ANSWER_TIMEOUT_S = 10.0
#: A controller is told to start within moments of its creation; one that was not has lost whoever created it.
_ABANDONED_AFTER_S = 5.0


def join_deployment(
    name: str, deployment: str, *, timeout_s: float, on_progress: Callable[[int, int], None] | None = None
) -> RaySession | None:
    """The runtime of that name, if it serves this deployment; None where there is none, and one may be launched.

    A controller goes on with its start when whoever asked for it is gone: it is waited for, as one is that is ending.
    One that was never told to start is cleared away.

    Args:
        name: The runtime's.
        deployment: Id of the bundle.
        timeout_s: How long a start that is under way may take.
        on_progress: Called with the number of actors that are ready, and of all.

    Raises:
        AlreadyRunningError: If another deployment, or a runtime that was served, has the name.
        StartError: If what runs there does not answer or does not get ready in time.
    """
    deadline = time.monotonic() + timeout_s
    abandoned_at = time.monotonic() + _ABANDONED_AFTER_S
    while (controller := find_actor(controller_name(name))) is not None:
        standing = _ask(controller)
        if standing is not None:
            if standing.phase in (Phase.STARTING, Phase.SERVING):
                _expect(standing, name, deployment)
            if standing.phase is Phase.SERVING:
                return attach(name)
            if standing.phase is Phase.STARTING and on_progress is not None:
                on_progress(*ray.get(controller.progress.remote(), timeout=_ANSWER_TIMEOUT_S))
            if standing.phase is Phase.NEW and time.monotonic() > abandoned_at:
                end_actors(name)
                return None
        if time.monotonic() > deadline:
            raise StartError(
                f"runtime {name}: expected its controller to get ready within {timeout_s:g} s, it did not; "
                f"`moe-runtime teardown {name}` clears it away"
            )
        time.sleep(_POLL_EVERY_S)
    return None


def _ask(controller: Any) -> DeploymentStanding | None:
    """None where it does not answer just now: it died, or is being restarted."""
    try:
        standing: DeploymentStanding = ray.get(controller.standing.remote(), timeout=_ANSWER_TIMEOUT_S)
    except (RayError, TimeoutError):
        return None
    return standing


def _expect(standing: DeploymentStanding, name: str, deployment: str) -> None:
    if standing.deployment == deployment:
        return
    what = "a runtime that was served" if standing.deployment is None else f"deployment {standing.deployment[:12]}"
    raise AlreadyRunningError(
        f"runtime {name}: expected nothing or deployment {deployment[:12]} on this cluster, found {what}; "
        f"`moe-runtime upgrade` rolls to another configuration, `moe-runtime teardown {name}` ends it"
    )
