"""What a run holds while it runs and leaves when it has ended: memory, descriptors, processes, sockets, segments."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.chaos.processes import command_of, marked_pids, open_files, resident_bytes
from moe_runtime.transport.ipc_folder import default_ipc_folder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from moe_runtime.chaos.cluster import Cluster

_MIB = 1 << 20
_SAMPLE_EVERY_S = 1.0
#: A process is judged by what it held after its first half minute, over at least as long.
WARM_UP_S = 30.0
_JUDGED_S = 60.0
#: Above both of these, memory grows.
MAX_SLOPE_MIB_PER_MIN = 4.0
MAX_GROWTH_MIB = 24.0
#: Descriptors that a long-lived process may have more of at its end than at most in the first half of its life.
MAX_MORE_FILES = 24
#: Of a descriptor's target: which socket, which pipe.
_NUMBERS = re.compile(r"\[?\d+\]?")
#: Descriptors that libraries of this process open once and keep: event loops of gRPC, Ray's logs.
MAX_KEPT_FILES = 48
_GONE_WITHIN_S = 20.0
_POLL_EVERY_S = 0.2
_SHARED_MEMORY = Path("/dev/shm")  # nosec B108  # looked at, not written


@dataclass(frozen=True)
class Sample:
    """What a process held at a time, in seconds since the start of the run; its open descriptors by their sort."""

    at_s: float
    rss_mib: float
    files: Counter[str]

    @property
    def num_files(self) -> int:
        """Open descriptors."""
        return self.files.total()


@dataclass(frozen=True)
class Growth:
    """How a process of the run grew after its warm-up.

    Attributes:
        part: ``router 0``, ``controller``, or ``clients`` for this process.
        pid: Its.
        seconds: For how long it was watched, the warm-up included.
        rss_mib: Memory at the end.
        slope_mib_per_min: Of a line through its samples; None where it did not live long enough.
        growth_mib: By that line, from the end of its warm-up to its end.
        more_files: Descriptors at its end, less the most that it had in the first half of its life; None likewise. In
            between, hosts come and go, and with them their connections.
        more_by_sort: Those, by what they are open on.
    """

    part: str
    pid: int
    seconds: float
    rss_mib: float
    slope_mib_per_min: float | None
    growth_mib: float | None
    more_files: int | None
    more_by_sort: Mapping[str, int] = field(default_factory=dict)

    @property
    def mistakes(self) -> tuple[str, ...]:
        """Whether it leaks, in words. This process is not judged: it keeps the ledger."""
        if self.slope_mib_per_min is None or self.growth_mib is None or self.part == "clients":
            return ()
        found = []
        if self.slope_mib_per_min > MAX_SLOPE_MIB_PER_MIN and self.growth_mib > MAX_GROWTH_MIB:
            slope = f"{self.growth_mib:.0f} MiB at {self.slope_mib_per_min:.1f} MiB per minute"
            found.append(f"{self.part}, pid {self.pid}: its memory grew by {slope}")
        if self.more_files is not None and self.more_files > MAX_MORE_FILES:
            sorts = ", ".join(f"{count} {sort}" for sort, count in self.more_by_sort.items())
            found.append(f"{self.part}, pid {self.pid}: {self.more_files} more open descriptors than before: {sorts}")
        return tuple(found)


class FootprintMeter:
    """Samples the routers, the controller and this process."""

    def __init__(self) -> None:
        """No samples yet."""
        self._samples: dict[tuple[str, int], list[Sample]] = defaultdict(list)

    async def run(self, cluster: Cluster) -> None:
        """Sample until cancelled."""
        started_at = time.monotonic()
        while True:
            parts = [(f"router {router['index']}", router["pid"]) for router in cluster.routers()]
            for part, pid in [*parts, ("controller", cluster.controller_pid)]:
                if pid is not None:
                    self.sample(part, pid, at_s=time.monotonic() - started_at)
            await asyncio.sleep(_SAMPLE_EVERY_S)

    def sample(self, part: str, pid: int, *, at_s: float) -> None:
        """Look at one process; nothing happens if it is gone."""
        rss, files = resident_bytes(pid), open_files(pid)
        if rss is not None and files is not None:
            sorts = Counter(_NUMBERS.sub("", target).rstrip(":") for target in files.values())
            self._samples[part, pid].append(Sample(at_s, rss / _MIB, sorts))

    def growths(self) -> tuple[Growth, ...]:
        """One per process that was seen."""
        return tuple(growth_of(part, pid, samples) for (part, pid), samples in self._samples.items())


def growth_of(part: str, pid: int, samples: Sequence[Sample]) -> Growth:
    """How one process grew, by its samples: at least one, in order of time."""
    first, last = samples[0], samples[-1]
    seconds = last.at_s - first.at_s
    warm = [sample for sample in samples if sample.at_s >= first.at_s + WARM_UP_S]
    if seconds < WARM_UP_S + _JUDGED_S:
        return Growth(part, pid, seconds, last.rss_mib, None, None, None)
    slope, _ = np.polyfit([sample.at_s for sample in warm], [sample.rss_mib for sample in warm], 1)
    growth = float(slope) * (last.at_s - warm[0].at_s)
    half = [sample for sample in samples if sample.at_s <= first.at_s + seconds / 2]
    most = max(half, key=lambda sample: sample.num_files)
    return Growth(
        part,
        pid,
        seconds,
        last.rss_mib,
        60 * float(slope),
        growth,
        last.num_files - most.num_files,
        dict((last.files - most.files).most_common(5)),
    )


@dataclass(frozen=True)
class Traces:
    """What of this machine a run could leave something in, before it began.

    Attributes:
        segments: Names in ``/dev/shm``.
        files: What this process has open.
    """

    segments: frozenset[str]
    files: dict[int, str]

    @classmethod
    def now(cls) -> Traces:
        """As it is at the moment."""
        return cls(_segments(), open_files() or {})


def find_leaks(before: Traces, *, run_id: str, pids: Collection[int]) -> tuple[str, ...]:
    """What a run that has ended has left behind, one line each; processes are given a while to end.

    Args:
        before: What was there before it.
        run_id: Its mark.
        pids: Every process of its actors that was ever seen.
    """
    give_up_at = time.monotonic() + _GONE_WITHIN_S
    while (left := marked_pids(run_id)) and time.monotonic() < give_up_at:
        time.sleep(_POLL_EVERY_S)
    return (
        *(f"process {pid} is left: {command_of(pid)}" for pid in sorted(left)),
        *(f"socket {path} is left" for path in _sockets_of(pids)),
        *(f"segment /dev/shm/{name} is left" for name in sorted(_orphans(_segments() - before.segments))),
        *_kept_files(before.files, open_files() or {}),
    )


def _sockets_of(pids: Iterable[int]) -> list[Path]:
    """Sockets that bear the pid of a process of the run."""
    prefixes = tuple(f"{pid}-" for pid in pids)
    folder = default_ipc_folder()
    return sorted(path for path in folder.glob("*") if path.name.startswith(prefixes)) if prefixes else []


def _segments() -> frozenset[str]:
    return frozenset(path.name for path in _SHARED_MEMORY.glob("*"))


def _orphans(names: Collection[str]) -> set[str]:
    """Segments that no living process has mapped; others are in use, by whomever."""
    if not names:
        return set()
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += maps.read_text()
        except OSError:
            continue
    return {name for name in names if f"{_SHARED_MEMORY}/{name}" not in mapped}


def _kept_files(before: dict[int, str], after: dict[int, str]) -> list[str]:
    """Descriptors of this process that should not be there."""
    more = {number: target for number, target in after.items() if before.get(number) != target}
    kept = [f"descriptor {number} is left open on {target}" for number, target in more.items() if "memfd:" in target]
    if len(more) > MAX_KEPT_FILES:
        kept.append(f"{len(more)} more descriptors are open than before the run, expected at most {MAX_KEPT_FILES}")
    return kept
