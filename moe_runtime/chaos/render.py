"""What a chaos run shows: how it goes while it goes, then one screen of results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from moe_runtime.chaos.result import ChaosResult, Spread
    from moe_runtime.chaos.storm import Progress as StormProgress


def show_title(console: Console, *, seed: int, minutes: float) -> None:
    """One line on what is about to happen."""
    what = "3 experts x 2 replicas and 2 routers under 16 clients, while parts of them are killed, frozen and poisoned"
    console.print(f"[bold]Chaos[/], seed {seed}, {minutes:g} min: {what}\n")


def progress_note(progress: StormProgress) -> str:
    """The figures beside the bar."""
    return (
        f"{progress.left_s:.0f} s left, {progress.num_requests:,} requests, {progress.num_faults} faults, "
        f"{progress.num_errors:,} errors, {progress.num_wrong} wrong"
    )


def show_result(console: Console, result: ChaosResult) -> None:
    """Everything that was found out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in _lines(result).items():
        table.add_row(name, text)
    console.print()
    console.print(table)
    for mistake in result.mistakes:
        console.print(Text(f"  {mistake}", style="red"), soft_wrap=True)


def _lines(result: ChaosResult) -> dict[str, str]:
    errors = f"{result.num_typed_errors:,} typed errors, {result.num_transport_errors:,} without a router"
    dropped = f"{result.dropped_failure:,} dropped by failure, {result.dropped_capacity:,} by capacity"
    moved = f"{result.retried:,} retried, {result.rerouted:,} rerouted, {result.hedged:,} hedged"
    verdict = ", ".join(
        f"{_judged(count)} {name}"
        for name, count in (
            ("wrong", result.num_wrong),
            ("lost", result.num_lost),
            ("late", result.num_late),
            ("leaked", result.num_leaks),
        )
    )
    whole = "every part is back" if result.is_whole_again else "[red]not every part was back[/] when it ended"
    return {
        "requests": f"[bold]{result.num_requests:,}[/] in {result.load_s:.0f} s: {result.num_ok:,} answered, {errors}",
        "errors": _errors(result),
        "faults": f"{sum(result.num_faults.values())}: {_counts(result.num_faults)}; {result.num_kills} killed",
        "assignments": f"{result.served:,} served, {moved}, {dropped}",
        "latency": f"{_spread(result.latency_ms)}, at the client",
        "back after": _spreads(result.back_ms),
        "recovery": _spreads(result.recovery_ms or {}),
        "deadlines": f"passed by {result.worst_overshoot_ms:.0f} ms at most; this process lagged by up to "
        f"{result.worst_lag_ms:.0f} ms ({result.num_late_excused} excused)",
        "counters": f"{_counts(result.counters_compared)} windows compared with the ledger",
        "cluster": whole,
        "ledger": verdict,
    }


def _errors(result: ChaosResult) -> str:
    lines = (f"{count:,} {name}: {escape(result.messages.get(name, ''))}" for name, count in result.errors.items())
    return "\n".join(lines) or "none"


def _spreads(spreads: Mapping[str, Spread | None]) -> str:
    lines = (f"{name.replace('_', ' ')}: {_spread(spread)}" for name, spread in spreads.items())
    return "\n".join(lines) or "not measured"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "none"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "none"
    return f"p50 {spread.p50:,.0f}, p99 {spread.p99:,.0f}, worst {spread.max:,.0f} ms of {spread.count:,}"


def _judged(count: int) -> str:
    return f"[bold {'red' if count else 'green'}]{count:,}[/]"
