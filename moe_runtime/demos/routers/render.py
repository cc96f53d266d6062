"""What the demo shows: progress while it works, then a line per policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from moe_runtime.demos.routers.policies import CAPACITY_FACTOR
from moe_runtime.demos.routers.result import MAX_DIFFERENCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from moe_runtime.demos.routers.result import RoutersResult

_BARS = " ▁▂▃▄▅▆▇█"


def show_title(console: Console) -> None:
    """One line on what is about to happen."""
    console.print("[bold]Routers[/]: one batch of handwritten digits through every policy, on the same five experts\n")


def show_result(console: Console, result: RoutersResult) -> None:
    """Everything that was found out."""
    console.print()
    console.print(_policy_table(result))
    console.print()
    for line in _notes(result):
        console.print(line, highlight=False)


def load_bars(loads: Sequence[int]) -> str:
    """A bar per expert, the busiest one full; an expert that is asked at all has some bar."""
    highest = max(*loads, 1)
    return "".join(_BARS[-(-load * (len(_BARS) - 1) // highest)] for load in loads)


def _policy_table(result: RoutersResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("policy", no_wrap=True)
    table.add_column("loads", no_wrap=True)
    for title in ("max÷mean", "drops", "no expert", "as dense", "|diff|", "accuracy"):
        table.add_column(title, justify="right", no_wrap=True)
    for policy in result.policies:
        table.add_row(
            policy.name,
            f"[cyan]{load_bars(policy.loads)}[/] [dim]{' '.join(f'{load:>3}' for load in policy.loads)}[/]",
            f"{policy.max_over_mean:.2f}",
            _percent(policy.dropped_share),
            f"{policy.num_unserved}",
            _percent(policy.agreement),
            f"{policy.mean_difference:.3f}",
            f"[bold]{_percent(policy.accuracy)}[/]",
        )
    return table


def _notes(result: RoutersResult) -> list[str]:
    worst = max(policy.max_difference for policy in result.policies)
    colour = "green" if worst <= MAX_DIFFERENCE else "red"
    processes = f"processes {', '.join(map(str, result.pids))}"
    where = processes if len(set(result.pids)) > 1 else "threads of this process"
    rolling = sorted(policy.rolling_s for policy in result.policies)[len(result.policies) // 2]
    return [
        f"[dim]loads[/]       of {', '.join(result.experts)}",
        f"[dim]experts[/]     {where}, for every policy; a policy took over in {rolling:.2f} s",
        f"[dim]batch[/]       {result.num_images} held-out images in one request; capacity factor {CAPACITY_FACTOR}",
        "[dim]as dense[/]    share of the images of the same digit as with all experts; |diff|: mean, of the logits",
        f"[dim]difference[/]  [bold {colour}]{worst:.1e}[/] at most from what experts and weights come to in one "
        f"process; allowed {MAX_DIFFERENCE:.1e}",
        f"[dim]took[/]        {result.seconds:.0f} s",
    ]


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")
