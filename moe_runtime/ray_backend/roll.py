"""One upgrade: a runtime's fleet gives way to that of a newer plan, while requests go on.

Until the snapshot with the new plan is out, the old one is what serves, and everything new can be ended again. From
then on it is the new one, and what is left of the old has only to be let go. A controller that comes back in between
finds in the newest snapshot which of both it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import ConfigError, StartError
from moe_runtime.ray_backend.fleet import ready_handles
from moe_runtime.ray_backend.retirement import Retirement, end_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_runtime.ray_backend.board import Board
    from moe_runtime.ray_backend.fleet import Fleet, Keeper
    from moe_runtime.ray_backend.plan import RuntimePlan
    from moe_runtime.ray_backend.router_keeper import RouterKeeper
    from moe_runtime.ray_backend.spawner import AsyncClock


class ChangedMeanwhileError(StartError):
    """A plan that was to take the place of one that does not run any more."""


class Step(StrEnum):
    """How far an upgrade is."""

    STARTING = "starting what is new"
    PREPARING = "preparing the routers"
    LETTING_GO = "ending what is old, after its last request"


@dataclass(frozen=True)
class Upgraded:
    """What an upgrade has done, by the ids of expert hosts.

    Attributes:
        kept: They need not change, and were left alone.
        added: Their ids are new.
        replaced: They were started anew beside the old ones, which have ended.
        removed: They have ended.
        num_routers: Routers that serve now.
        table_version: Version of the first table of the new plan; 0 where there was nothing to do.
    """

    kept: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    num_routers: int = 0
    table_version: int = 0

    @property
    def is_nothing(self) -> bool:
        """Whether the runtime was as asked already."""
        return self.table_version == 0


class Roll:
    """Brings one upgrade about.

    Attributes:
        step: How far it is.
        coming: The fleet of the new plan.
    """

    def __init__(
        self,
        coming: Fleet,
        *,
        board: Board,
        clock: AsyncClock,
        supervise: Callable[[Sequence[Keeper]], None],
        release: Callable[[Sequence[Keeper]], None],
    ) -> None:
        """Do nothing yet.

        Args:
            coming: The fleet of the new plan, made from the board's.
            board: Tells the actors.
            clock: Tells the time.
            supervise: Has keepers watch their actors from now on.
            release: Has keepers stop that.
        """
        self.step = Step.STARTING
        self.coming = coming
        self._board = board
        self._clock = clock
        self._supervise = supervise
        self._release = release

    def describe(self) -> dict[str, Any]:
        """How far it is, and what is new, as plain values."""
        return {"step": str(self.step), "new": [keeper.describe() for keeper in self.coming.new]}

    async def run(self) -> Upgraded:
        """Roll; afterwards nothing of the old plan is left that the new one does not have.

        Raises:
            PlacementError: If the cluster has no room for an actor in time, beside those that run.
            StartError: If an actor did not start, or a router cannot serve the new plan. Either way everything new
                was ended, and the runtime is as it was.
        """
        before, coming = self._board.fleet, self.coming
        hosts, routers = coming.left_behind()
        try:
            await coming.bring_up()
            self.step = Step.PREPARING
            await self._prepare([router for router in coming.routers if router not in coming.new])
        except BaseException:
            await end_all([keeper.end() for keeper in coming.new])
            raise
        # Nothing may come in between, and nothing can fail, until the new fleet is the one that is published.
        self._release([*hosts, *routers])
        coming.take_over()
        self._board.leaving_keys = {each.index: each.public_key for each in routers if each.public_key is not None}
        self._board.fleet = coming
        self._supervise(coming.new)
        await self._board.publish()
        version = self._board.snapshot.table.version
        let_go_s = max(before.plan.routers.let_go_s, coming.plan.routers.let_go_s)
        self.step = Step.LETTING_GO
        await Retirement(self._board, self._clock).run(hosts, routers, version=version, let_go_s=let_go_s)
        return _outcome(before.plan, coming.plan, version)

    async def _prepare(self, routers: Sequence[RouterKeeper]) -> None:
        plan, timeout_s = self.coming.plan.routers, self.coming.plan.start_timeout_s
        handles = ready_handles(routers)
        outcomes = await self._board.bounded((handle.prepare(plan) for handle in handles), timeout_s)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            text = "\n".join(dict.fromkeys(f"a router cannot serve the new configuration: {e}" for e in errors))
            raise StartError(text) from errors[0]


def check_fixed(running: RuntimePlan, asked: RuntimePlan) -> None:
    """Check that a plan changes nothing that cannot change while a runtime runs.

    Raises:
        ConfigError: With one line per key.
    """
    mistakes = [
        f"{key}: expected {value} as it runs, found {asked.routers.fixed.get(key)}"
        for key, value in running.routers.fixed.items()
        if asked.routers.fixed.get(key) != value
    ]
    if running.name != asked.name:
        mistakes.insert(0, f"name: expected {running.name} as it runs, found {asked.name}")
    if mistakes:
        how = f"`moe-runtime teardown {running.name}` and then `moe-runtime deploy`"
        lines = "\n".join(mistakes)
        raise ConfigError(f"{lines}\nthis cannot change while the runtime serves; {how} brings the new configuration")


def completed(running: RuntimePlan, asked: RuntimePlan) -> RuntimePlan:
    """A plan with what an upgrade takes over from the one that runs.

    That is: who answers for it, where its routers are, and hosts that are the same but for their generation.
    """
    generations = {(host.host_id, host.revision): host.generation for host in running.hosts}
    hosts = (replace(host, generation=generations.get((host.host_id, host.revision), 0)) for host in asked.hosts)
    routers = replace(asked.routers, node_id=running.routers.node_id)
    return replace(asked, lease_s=running.lease_s, hosts=tuple(hosts), routers=routers)


def renewed(running: RuntimePlan, host_id: str, *, generation: int) -> RuntimePlan:
    """The same plan, in which one host has a successor of a generation."""
    hosts = (replace(host, generation=generation) if host.host_id == host_id else host for host in running.hosts)
    return replace(running, hosts=tuple(hosts))


def is_same(running: RuntimePlan, asked: RuntimePlan) -> bool:
    """Whether an upgrade from one plan to the other has nothing to do."""

    def essence(plan: RuntimePlan) -> tuple[object, ...]:
        hosts = frozenset((host.key, host.replicas) for host in plan.hosts)
        rest = replace(plan, hosts=(), routers=running.routers, source=b"")
        return hosts, plan.routers.revision, plan.routers.count, rest

    return essence(running) == essence(asked)


def _outcome(running: RuntimePlan, plan: RuntimePlan, version: int) -> Upgraded:
    old, new = ({host.host_id: host.key for host in each.hosts} for each in (running, plan))
    return Upgraded(
        kept=tuple(host for host, key in new.items() if old.get(host) == key),
        added=tuple(host for host in new if host not in old),
        replaced=tuple(host for host, key in new.items() if host in old and old[host] != key),
        removed=tuple(host for host in old if host not in new),
        num_routers=plan.routers.count,
        table_version=version,
    )
