"""Expert actors that a benchmark freezes and kills, and Ray's own notice of their death."""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError

from moe_runtime.bench.errors import BenchError
from moe_runtime.launch.factories import ExpertProcessFactory
from moe_runtime.ray_backend.expert_actor import ExpertActor
from moe_runtime.ray_backend.plan import Failure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moe_runtime.launch.recipes import HostSpec
    from moe_runtime.service.ports import Endpoint

_NOTICE_WITHIN_S = 60.0


@dataclass(frozen=True)
class Victim:
    """One expert actor, made as the controller makes them, with a call that is pending until it dies.

    Attributes:
        host: What it serves.
        endpoint: Where.
        pid: Its process.
    """

    host: HostSpec
    endpoint: Endpoint
    pid: int
    _actor: Any
    _pending: Any

    def admit(self, public_key: str | None) -> None:
        """Let a router in from other nodes, if it has a key."""
        ray.get(self._actor.admit.remote([] if public_key is None else [public_key]))

    def wait_for_death(self) -> None:
        """Return once Ray says to the caller of the pending call that the actor has died.

        Raises:
            BenchError: If it says something else, or nothing.
        """
        try:
            found = ray.get(self._pending, timeout=_NOTICE_WITHIN_S)
        except ActorDiedError:
            return
        except ray.exceptions.GetTimeoutError as exc:
            raise BenchError(f"expected Ray's notice of a death within {_NOTICE_WITHIN_S:g} s, found none") from exc
        raise BenchError(f"expected Ray's notice of a death, found an answer: {found}")

    def is_known_to_be_dead(self) -> bool:
        """Whether Ray has said so by now."""
        ready, _ = ray.wait([self._pending], timeout=0)
        return bool(ready)


@contextlib.contextmanager
def expert_victims(hosts: Sequence[HostSpec]) -> Iterator[list[Victim]]:
    """One actor per host on the connected cluster; whoever still lives at the end of the ``with`` is killed.

    Raises:
        BenchError: If one does not start.
    """
    actor_class: Any = ray.remote(ExpertActor)
    factories = [pickle.dumps(ExpertProcessFactory(host)) for host in hosts]
    actors = [actor_class.options(num_cpus=0).remote(factory) for factory in factories]
    try:
        reports = ray.get([actor.start.remote(1) for actor in actors])
        locations = ray.get([actor.locate.remote() for actor in actors])
        for report in reports:
            if isinstance(report, Failure):
                raise BenchError(f"an expert actor has not started: {report}")
        yield [
            Victim(host, report.endpoint, location.pid, actor, actor.wait.remote())
            for host, report, location, actor in zip(hosts, reports, locations, actors, strict=True)
        ]
    finally:
        for actor in actors:
            ray.kill(actor)
