"""``/experts``: the load of every expert of every layer as one screen, in as many columns as the terminal has room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_runtime.demos.chat.loads import max_over_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from moe_runtime.demos.chat.loads import Actor, Loads

_BARS = " ▁▂▃▄▅▆▇█"
#: Colours by load, in times the mean of the layer: up to which factor each is for.
_COLOURS = ((0.5, "blue"), (1.25, "cyan"), (2.0, "yellow"), (float("inf"), "red"))
#: More experts than this are bars without figures.
_MAX_WITH_FIGURES = 8
_CELL = 5
_RATIO_TITLE = "max÷mean"
_GAP = 4


def heat_map(loads: Loads, *, width: int, actors: Sequence[Actor] = ()) -> RenderableType:
    """A bar per expert and layer, with its share of the layer's assignments where there is room, and max÷mean.

    Args:
        loads: What to show.
        width: Columns of the terminal.
        actors: Those that have the experts.
    """
    if not any(loads.by_expert()):
        return Text("No expert has been asked yet.", style="dim")
    num_experts = len(loads.by_expert())
    group = _experts_per_bar(loads, width=width)
    return Group(_blocks(loads, group=group, width=width), Text(), *_notes(num_experts, group), *_totals(loads, actors))


def bar(count: int, highest: int) -> str:
    """One character, full at the highest; an expert that is asked at all has some bar."""
    return _BARS[-(-count * (len(_BARS) - 1) // max(highest, 1))]


def _experts_per_bar(loads: Loads, *, width: int) -> int:
    """How many neighbours share a bar: more than one only where a line has fewer columns than a layer experts."""
    room = width - _name_width(loads) - len(_RATIO_TITLE) - 3
    return -(-len(loads.by_expert()) // max(room, 1))


def _name_width(loads: Loads) -> int:
    return max(len("layer"), *map(len, loads.short_names().values()))


def _blocks(loads: Loads, *, group: int, width: int) -> Table:
    """Layers from top to bottom, and then on in the next block beside it."""
    names = loads.short_names()
    lines = [_line(names[layer].rjust(_name_width(loads)), counts, group) for layer, counts in loads.layers.items()]
    header = _header(loads, group)
    num_blocks = max(1, min(len(lines), (width + _GAP) // (header.cell_len + _GAP)))
    height = -(-len(lines) // num_blocks)
    blocks = [lines[start : start + height] for start in range(0, len(lines), height)]
    table = Table.grid(padding=(0, _GAP))
    table.add_row(*(Text("\n").join([header, *block]) for block in blocks))
    return table


def _header(loads: Loads, group: int) -> Text:
    num_experts = len(loads.by_expert())
    if num_experts <= _MAX_WITH_FIGURES:
        titles = "".join(f"{expert:>{_CELL}}" for expert in range(num_experts)) + " "
    else:
        num_bars = -(-num_experts // group)
        titles = "  " + f"experts 0-{num_experts - 1}"[:num_bars].ljust(num_bars)
    return Text(f"{'layer':>{_name_width(loads)}}{titles} {_RATIO_TITLE}", style="dim")


def _line(name: str, counts: Sequence[int], group: int) -> Text:
    line = Text.assemble((name, "dim"))
    total, mean = sum(counts), sum(counts) / len(counts)
    if len(counts) <= _MAX_WITH_FIGURES:
        for count in counts:
            share = f"{100 * count / max(total, 1):>2.0f}"
            line.append(bar(count, max(counts)).rjust(_CELL - len(share)), style=_colour(count, mean))
            line.append(share)
        line.append(" ")
    else:
        line.append("  ")
        for start in range(0, len(counts), group):
            busiest = max(counts[start : start + group])
            line.append(bar(busiest, max(counts)), style=_colour(busiest, mean))
    line.append(f"{max_over_mean(counts):>{len(_RATIO_TITLE) + 1}.2f}")
    return line


def _colour(count: int, mean: float) -> str:
    return next(colour for factor, colour in _COLOURS if count <= factor * mean)


def _notes(num_experts: int, group: int) -> list[Text]:
    if num_experts <= _MAX_WITH_FIGURES:
        return [Text("per expert: its share of the layer's assignments, in %", style="dim")]
    shared = f"; a bar is the busiest of {group} neighbours" if group > 1 else ""
    return [Text(f"a bar per expert, full for the layer's busiest{shared}", style="dim")]


def _totals(loads: Loads, actors: Sequence[Actor]) -> list[Text]:
    """What it comes to over all layers, and in each actor: it has the same experts of every layer."""
    counts = loads.by_expert()
    num_layers = len(loads.layers)
    over = f"over {num_layers} layer{'s' if num_layers > 1 else ''}"
    lines = [
        Text.assemble(("in all  ", "dim"), f"{sum(counts):,} assignments {over}, max÷mean {max_over_mean(counts):.2f}")
    ]
    for actor in actors:
        load = sum(counts[expert] for expert in actor.experts)
        line = Text.assemble(("actor   ", "dim"), f"pid {actor.pid}: {_named(actor.experts)}, {load:,} assignments")
        if actor.state != "ready":
            line.append(f", {actor.state}", style="yellow")
        if actor.num_restarts:
            line.append(f", restarts {actor.num_restarts}", style="yellow")
        lines.append(line)
    return lines


def _named(experts: Sequence[int]) -> str:
    if len(experts) == 1:
        return f"expert {experts[0]}"
    if tuple(experts) == tuple(range(experts[0], experts[-1] + 1)):
        return f"experts {experts[0]}-{experts[-1]}"
    return f"experts {', '.join(map(str, experts))}"
