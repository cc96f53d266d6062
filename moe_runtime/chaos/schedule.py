"""Which faults a run brings, and when: a function of its seed and length alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from moe_runtime.chaos.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Collection

#: Nothing happens before: every client has been answered once by then.
FIRST_AT_S = 2.0
#: Nor within so many seconds of the end: what was broken last is to be mended again under load.
QUIET_END_S = 10.0
#: Seconds between two faults.
GAP_S = (1.0, 5.0)
#: A client that knows both routers is promised an answer while one of them lives.
_ROUTER_GAP_S = 10.0


class FaultKind(StrEnum):
    """What can be done to a cluster."""

    KILL_EXPERT = "kill_expert"
    FREEZE_EXPERT = "freeze_expert"
    KILL_ROUTER = "kill_router"
    FREEZE_ROUTER = "freeze_router"
    KILL_CONTROLLER = "kill_controller"
    SLOW = "slow"
    POISON_RAISE = "poison_raise"
    POISON_NAN = "poison_nan"
    POISON_EXIT = "poison_exit"
    POISON_HANG = "poison_hang"
    FLOOD = "flood"


#: How often each kind comes, relative to the others.
_WEIGHTS: dict[FaultKind, float] = {
    FaultKind.KILL_EXPERT: 4.0,
    FaultKind.FREEZE_EXPERT: 3.0,
    FaultKind.KILL_ROUTER: 1.0,
    FaultKind.FREEZE_ROUTER: 1.0,
    FaultKind.KILL_CONTROLLER: 1.0,
    FaultKind.SLOW: 2.0,
    FaultKind.POISON_RAISE: 2.0,
    FaultKind.POISON_NAN: 2.0,
    FaultKind.POISON_EXIT: 1.0,
    FaultKind.POISON_HANG: 0.5,
    FaultKind.FLOOD: 1.0,
}
_ON_ROUTERS = (FaultKind.KILL_ROUTER, FaultKind.FREEZE_ROUTER)
_FROZEN_S = {FaultKind.FREEZE_EXPERT: (0.5, 3.0), FaultKind.FREEZE_ROUTER: (0.2, 0.8)}


@dataclass(frozen=True)
class Fault:
    """One thing that is done to the cluster.

    Attributes:
        at_s: When, from the start of the load.
        kind: What.
        target: To which expert host or router: an index, to be taken modulo their number.
        duration_s: For how long; 0 where it is done at once.
    """

    at_s: float
    kind: FaultKind
    target: int
    duration_s: float = 0.0


def fault_kinds(names: Collection[str]) -> frozenset[FaultKind]:
    """The kinds of some names.

    Raises:
        ChaosError: If there is no such kind.
    """
    unknown = sorted(set(names) - set(FaultKind))
    if unknown:
        raise ChaosError(f"fault: expected one of {', '.join(FaultKind)}, found {', '.join(unknown)}")
    return frozenset(FaultKind(name) for name in names)


def make_schedule(seed: int, duration_s: float, *, without: Collection[FaultKind] = ()) -> tuple[Fault, ...]:
    """The faults of a run, in order of time; the same arguments give the same faults.

    Every kind comes once before any comes again, in an order drawn from the seed; after that they are drawn by
    weight. Routers are left alone for a while after one was killed or frozen.

    Args:
        seed: Of the run.
        duration_s: How long the load lasts.
        without: Kinds that are left out.
    """
    rng = random.Random(f"chaos schedule {seed}")  # nosec B311  # to be repeated
    kinds = [kind for kind in FaultKind if kind not in without]
    unseen = rng.sample(kinds, len(kinds))
    faults: list[Fault] = []
    at_s, routers_from_s = FIRST_AT_S, 0.0
    while kinds and at_s <= duration_s - QUIET_END_S:
        kind = _next_kind(rng, kinds, unseen, may_hit_router=at_s >= routers_from_s)
        if kind is not None:
            duration_range_s = _FROZEN_S.get(kind, (0.0, 0.0))
            faults.append(Fault(round(at_s, 3), kind, rng.randrange(1 << 16), round(rng.uniform(*duration_range_s), 3)))
            if kind in _ON_ROUTERS:
                routers_from_s = at_s + _ROUTER_GAP_S
        at_s += rng.uniform(*GAP_S)
    return tuple(faults)


def _next_kind(
    rng: random.Random, kinds: list[FaultKind], unseen: list[FaultKind], *, may_hit_router: bool
) -> FaultKind | None:
    """The next kind; taken off ``unseen`` if it is one of those. None if it would hit a router too early."""
    for kind in unseen:
        if may_hit_router or kind not in _ON_ROUTERS:
            unseen.remove(kind)
            return kind
    allowed = [kind for kind in kinds if may_hit_router or kind not in _ON_ROUTERS]
    if not allowed:
        return None
    return rng.choices(allowed, [_WEIGHTS[kind] for kind in allowed])[0]
