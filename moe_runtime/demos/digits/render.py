"""What the demo shows: progress while it works, then one screen of results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from moe_runtime.demos.digits.commands import call_command, serve_command
from moe_runtime.demos.digits.result import MAX_DIFFERENCE, MIN_ACCURACY

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from moe_runtime.demos.digits.result import DigitsResult


def show_title(console: Console) -> None:
    """One line on what is about to happen."""
    console.print("[bold]Handwritten digits[/]: one gate, five kinds of experts, each in its own Ray actor\n")


def show_result(console: Console, result: DigitsResult, *, address: str) -> None:
    """Everything that was found out.

    Args:
        console: Where to print.
        result: What to print.
        address: Where the configuration serves when it is served again.
    """
    console.print()
    console.print(_expert_table(result))
    console.print()
    console.print(_figures(result))
    console.print()
    _show_commands(console, result.config_path, address=address)


def _expert_table(result: DigitsResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", show_footer=True, footer_style="bold")
    drops = result.num_dropped_capacity + result.num_dropped_failure
    table.add_column("expert", "all together", no_wrap=True)
    table.add_column("actor", no_wrap=True)
    table.add_column("device")
    table.add_column("accuracy", _percent(result.accuracy), justify="right")
    table.add_column("assigned", f"{result.num_assignments:,}", justify="right")
    table.add_column("share", "100.0 %", justify="right")
    table.add_column("drops", f"{drops:,}", justify="right")
    table.add_column("mean ms", justify="right")
    for expert in result.experts:
        table.add_row(
            expert.kind,
            f"pid {expert.pid}",
            expert.device,
            _percent(expert.accuracy),
            f"{expert.num_assignments:,}",
            _percent(expert.share),
            f"{expert.num_dropped_capacity + expert.num_dropped_failure:,}",
            f"{expert.mean_ms:.2f}",
        )
    return table


def _figures(result: DigitsResult) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    smallest, largest = result.request_sizes
    table.add_row(
        "accuracy",
        _judged(_percent(result.accuracy), good=result.accuracy >= MIN_ACCURACY)
        + f" of {result.num_images} held-out images; expected at least {_percent(MIN_ACCURACY)}",
    )
    table.add_row(
        "difference",
        _judged(f"{result.max_difference:.1e}", good=result.max_difference <= MAX_DIFFERENCE)
        + f" at most from the reference in one process; allowed {MAX_DIFFERENCE:.1e}",
    )
    table.add_row(
        "requests",
        f"{result.num_requests:,} of {smallest} to {largest} images, {result.concurrency} at a time",
    )
    table.add_row(
        "latency", f"p50 [bold]{result.p50_ms:.1f} ms[/]   p99 [bold]{result.p99_ms:.1f} ms[/]   at the client"
    )
    table.add_row("throughput", f"[bold]{result.tokens_per_s:,.0f}[/] tokens/s; a token is an image")
    table.add_row("batches", _batches(result.batch_sizes))
    table.add_row("drops", _drops(result))
    return table


def _batches(sizes: dict[int, int]) -> str:
    num_batches = sum(sizes.values())
    mean = sum(size * count for size, count in sizes.items()) / num_batches
    return f"{num_batches:,} of {min(sizes)} to {max(sizes)} tokens, {mean:.0f} on average"


def _drops(result: DigitsResult) -> str:
    full, failed = result.num_dropped_capacity, result.num_dropped_failure
    share = _percent((full + failed) / result.num_assignments)
    return (
        f"{full + failed:,} of {result.num_assignments:,} assignments, {share}: "
        f"{full:,} full, {_judged(f'{failed:,}', good=not failed)} failed"
    )


def _show_commands(console: Console, config_path: Path, *, address: str) -> None:
    """Plain text without borders or wrapping, so that it can be pasted."""
    lines = [
        Text.assemble(("config      ", "dim"), str(config_path)),
        Text(),
        Text("Serve it again:", style="dim"),
        Text(serve_command(config_path)),
        Text(),
        Text("And call it from Python, in another shell:", style="dim"),
        Text(call_command(address)),
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _judged(text: str, *, good: bool) -> str:
    return f"[bold {'green' if good else 'red'}]{text}[/]"
