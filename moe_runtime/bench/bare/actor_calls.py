"""The baseline of the data plane: the same rows as arguments and results of Ray actor calls."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray


class EchoActor:
    """Gives back what it is given."""

    def echo(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows."""
        return rows


class ActorFleet:
    """Actors that echo."""

    def __init__(self, actors: Sequence[Any]) -> None:
        """Take over the actors' handles."""
        self._actors = actors

    def exchange(self, parts: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Call the i-th actor with the i-th part, where it has rows, and wait for all results."""
        pairs = zip(self._actors, parts, strict=True)
        results: list[NDArray[np.float32]] = ray.get([actor.echo.remote(part) for actor, part in pairs if len(part)])
        return results


@contextlib.contextmanager
def actor_fleet(num_actors: int) -> Iterator[ActorFleet]:
    """So many echoing actors on the cluster that is connected, until the end of the ``with``."""
    actor_class = ray.remote(EchoActor)
    actors: list[Any] = [actor_class.options(num_cpus=0).remote() for _ in range(num_actors)]
    try:
        ray.get([actor.__ray_ready__.remote() for actor in actors])
        yield ActorFleet(actors)
    finally:
        for actor in actors:
            ray.kill(actor)
