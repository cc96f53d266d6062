"""The controller of a runtime: made, and told to start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from moe_runtime.errors import AlreadyRunningError, StartError
from moe_runtime.ray_backend.controller_actor import ControllerActor
from moe_runtime.ray_backend.names import NAMESPACE, controller_name
from moe_runtime.ray_backend.nodes import on_head
from moe_runtime.ray_backend.ray_spawner import find_actor

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.ray_backend.plan import Failure, RuntimePlan

_PROGRESS_EVERY_S = 0.2
#: Beyond what the controller allows itself.
_SPARE_S = 30.0


def create_controller(plan: RuntimePlan) -> Any:
    """The controller of a plan, as a detached actor that has still to be told to start.

    Raises:
        AlreadyRunningError: If a runtime of this name is there.
    """
    name = controller_name(plan.name)
    options = {"namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0, "max_restarts": -1, **on_head()}
    taken = f"runtime {plan.name}: one of this name is running on the cluster; close it, or choose another name"
    if find_actor(name) is not None:
        raise AlreadyRunningError(taken)
    try:
        return ray.remote(ControllerActor).options(name=name, **options).remote(plan)
    except ValueError as exc:
        # Somebody was faster: the name is what decides.
        raise AlreadyRunningError(taken) from exc


def await_start(controller: Any, plan: RuntimePlan, on_progress: Callable[[int, int], None] | None) -> Failure | None:
    """Have a controller start its plan; None when everything serves, or why it does not.

    Raises:
        StartError: If the controller died, or has not answered in time.
    """
    starting = controller.start.remote()
    deadline = time.monotonic() + 2 * plan.start_timeout_s + _SPARE_S
    try:
        while not ray.wait([starting], timeout=_PROGRESS_EVERY_S)[0]:
            if time.monotonic() > deadline:
                raise StartError(f"runtime {plan.name}: its controller has not answered in time")
            if on_progress is not None:
                num_ready, num_actors = ray.get(controller.progress.remote(), timeout=_SPARE_S)
                on_progress(num_ready, num_actors)
        failure: Failure | None = ray.get(starting)
    except RayError as exc:
        raise StartError(f"runtime {plan.name}: its controller died: {exc}") from exc
    if on_progress is not None and failure is None:
        num_actors = len(plan.hosts) + plan.routers.count
        on_progress(num_actors, num_actors)
    return failure
