"""A whole run: arm, serve, storm, measure recovery, close, look for leaks, report."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.chaos.arming import armed
from moe_runtime.chaos.cluster import Cluster
from moe_runtime.chaos.errors import ChaosError
from moe_runtime.chaos.footprint import Traces, find_leaks
from moe_runtime.chaos.layer import chaos_config, draw_weights, write_weights
from moe_runtime.chaos.processes import marked
from moe_runtime.chaos.recovery import measure_recovery
from moe_runtime.chaos.reference import Reference
from moe_runtime.chaos.render import progress_note, show_result, show_title
from moe_runtime.chaos.result import ChaosResult, Spread, sums_of
from moe_runtime.chaos.schedule import make_schedule
from moe_runtime.chaos.storm import Storm
from moe_runtime.launch.runtime import serve
from moe_runtime.progress import make_progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import Console
    from rich.progress import Progress

    from moe_runtime.chaos.schedule import FaultKind
    from moe_runtime.chaos.storm import Progress as StormProgress
    from moe_runtime.launch.served import Runtime

_DRAIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ChaosSettings:
    """What to run.

    Attributes:
        minutes: Of load.
        seed: Of the schedule, the weights and the requests.
        without: Kinds of faults that are left out.
        measures_recovery: Whether recovery times are measured apart, afterwards.
    """

    minutes: float
    seed: int
    without: frozenset[FaultKind] = field(default_factory=frozenset)
    measures_recovery: bool = True


@dataclass(frozen=True)
class _Served:
    """What was found out while the runtime served."""

    storm: Storm
    cluster: Cluster
    recovery: Mapping[str, Spread | None] | None


def run(
    settings: ChaosSettings,
    *,
    json_path: Path | None = None,
    machine: Mapping[str, Any] | None = None,
    console: Console,
) -> ChaosResult:
    """Serve a layer on a Ray of its own, bring faults over it under load, and show what came of it.

    ``KeyboardInterrupt`` ends the load in order, and what was found until then is reported.

    Args:
        settings: What to run.
        json_path: Where to write the result as well, as JSON; its folder must be there.
        machine: What is written there about the machine.
        console: Where to print.

    Raises:
        ChaosError: If a request was answered wrongly, lost or late, or something leaked; after the result is shown
            and written. Also if the result cannot be written, before anything starts.
        MoERuntimeError: If the runtime does not start.
    """
    if json_path is not None and not json_path.parent.is_dir():
        raise ChaosError(f"--json {json_path}: expected an existing folder, found none at {json_path.parent}")
    show_title(console, seed=settings.seed, minutes=settings.minutes)
    run_id = uuid.uuid4().hex
    before = Traces.now()
    with make_progress(console) as progress, _expected_warnings_hidden():
        served = _serve(settings, run_id, progress)
        task = progress.add_task("Looking for what is left", total=None, note="")
        leaks = find_leaks(before, run_id=run_id, pids=served.cluster.seen_pids)
        progress.update(task, total=1, completed=1)
    result = _result(settings, served, leaks)
    show_result(console, result)
    if json_path is not None:
        result.write_json(json_path, machine=machine or {})
    result.check()
    return result


@contextmanager
def _expected_warnings_hidden() -> Iterator[None]:
    """Not log each loss: every one of them is on purpose. Where somebody asked for details, they are logged."""
    log = logging.getLogger("moe_runtime.ray_backend")
    before = log.level
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _serve(settings: ChaosSettings, run_id: str, progress: Progress) -> _Served:
    weights = draw_weights(settings.seed)
    task = progress.add_task("Starting Ray and actors", total=None, note="")

    def on_progress(num_ready: int, num_actors: int) -> None:
        progress.update(task, total=num_actors, completed=num_ready, note=f"{num_ready} of {num_actors} ready")

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-chaos-")))
        stack.enter_context(marked(run_id))
        stack.enter_context(armed(folder))
        write_weights(folder, weights)
        # Of its own, whatever RAY_ADDRESS says: what a run kills is nobody else's.
        runtime = serve(chaos_config(f"chaos-{os.getpid()}", folder), ray_address="local", on_progress=on_progress)
        stack.callback(_close, runtime, progress)
        cluster = Cluster(runtime, run_id=run_id)
        storm, recovery = asyncio.run(_storm(settings, cluster, Reference(weights), progress))
    return _Served(storm, cluster, recovery)


async def _storm(
    settings: ChaosSettings, cluster: Cluster, reference: Reference, progress: Progress
) -> tuple[Storm, Mapping[str, Spread | None] | None]:
    duration_s = 60.0 * settings.minutes
    storm = Storm(cluster, seed=settings.seed, reference=reference)
    loop = asyncio.get_running_loop()

    def on_interrupt() -> None:
        # The first interrupt ends the run in order; the next is Python's own.
        loop.remove_signal_handler(signal.SIGINT)
        storm.stop()

    loop.add_signal_handler(signal.SIGINT, on_interrupt)
    task = progress.add_task("Storm", total=duration_s, note="")

    def on_progress(state: StormProgress) -> None:
        progress.update(task, completed=duration_s - state.left_s, note=progress_note(state))

    try:
        schedule = make_schedule(settings.seed, duration_s, without=settings.without)
        # A line of its own: where there is no terminal, bars are shown at the end only.
        progress.console.print(f"[dim]Storm began: {len(schedule)} faults in {duration_s:.0f} s[/]")
        await storm.run(schedule, duration_s=duration_s, on_progress=on_progress)
        if not settings.measures_recovery or storm.was_stopped or not storm.is_whole_again:
            return storm, None
        measuring = progress.add_task("Measuring recovery", total=None, note="")
        times_s: dict[str, list[float]] = {}
        try:
            await measure_recovery(cluster, storm, seed=settings.seed, reference=reference, times_s=times_s)
        except ChaosError as exc:
            # A cluster that does not recover is a finding: what else was found is still reported.
            storm.ledger.note_mistake(f"recovery: {exc}")
        progress.update(measuring, total=1, completed=1)
        return storm, {name: Spread.of(times) for name, times in times_s.items()}
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _close(runtime: Runtime, progress: Progress) -> None:
    task = progress.add_task("Stopping actors and Ray", total=None, note="")
    runtime.close(_DRAIN_TIMEOUT_S)
    progress.update(task, total=1, completed=1)


def _result(settings: ChaosSettings, served: _Served, leaks: tuple[str, ...]) -> ChaosResult:
    storm, cluster = served.storm, served.cluster
    growths = storm.footprint.growths()
    leaks = (*leaks, *(mistake for growth in growths for mistake in growth.mistakes))
    return ChaosResult(
        seed=settings.seed,
        minutes=settings.minutes,
        load_s=round(storm.load_s, 1),
        was_stopped=storm.was_stopped,
        num_leaks=len(leaks),
        mistakes=(*storm.ledger.examples(), *leaks),
        messages=storm.ledger.messages(),
        num_kills=storm.injector.num_kills,
        num_faults={str(kind): count for kind, count in sorted(storm.injector.num_faults.items())},
        latency_ms=Spread.of(storm.ledger.latencies_s()),
        worst_lag_ms=round(1e3 * storm.lag.worst_s, 3),
        counters_compared={str(how): count for how, count in sorted(storm.comparisons.items())},
        is_whole_again=storm.is_whole_again,
        back_ms={str(kind): Spread.of(times_s) for kind, times_s in sorted(cluster.recovery_s.items())},
        growth=tuple(asdict(growth) for growth in growths),
        recovery_ms=served.recovery,
        **sums_of(storm.ledger.sums()),
    )
