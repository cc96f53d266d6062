"""The times by which the controller watches actors: the only place where they are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_runtime.ray_backend.replica_state import Backoff


@dataclass(frozen=True)
class Pace:
    """The times by which actors are watched.

    By these, a host or router whose process is frozen is killed about 6 s after its last answer.

    Attributes:
        ping_every_s: Between two pings of an actor.
        ping_timeout_s: An actor that takes longer is suspect.
        max_suspect_s: An actor that gives no answer, or a router of which a part stands still, for so long after it
            became suspect is killed and replaced.
        hang_factor: A forward that runs for so many times its layer's timeout hangs: its host is killed and replaced.
        min_hang_s: But none that runs for less.
        num_clean_pings: Pings in a row without a new output of the wrong kind that clear a host of its faults.
        num_faulty_pings: Pings in a row with new outputs of the wrong kind after which a host is replaced.
        drain_timeout_s: How long a host that has outgrown its memory may take to finish what it has.
        kill_timeout_s: How long a killed actor may take to be gone.
        start_timeout_s: Bounds a placement, and a start.
        backoff: How long a failed host or router stays out.
    """

    ping_every_s: float = 1.0
    ping_timeout_s: float = 2.0
    max_suspect_s: float = 2.5
    hang_factor: float = 3.0
    min_hang_s: float = 5.0
    num_clean_pings: int = 3
    num_faulty_pings: int = 5
    drain_timeout_s: float = 30.0
    kill_timeout_s: float = 5.0
    start_timeout_s: float = 60.0
    backoff: Backoff = field(default_factory=Backoff)
