"""The commands that show what the runtime does, on input of their own; what they do loads when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.consoles import stderr_console, stdout_console

FoundPath = Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write what was found to this file.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Train again instead of using what was cached.")]


def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(metavar="SUITE", help="Which to run; all when none is named.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write the machine and every figure to this file.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and rounds: under a minute per suite.")] = False,
) -> None:
    """Measure the runtime beside its peers, in turns, in one run."""
    from moe_runtime.bench.runner import run

    run(suites or (), json_path=json_path, quick=quick, console=stdout_console())


def chaos(
    *,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the load lasts.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the schedule of faults, the weights and the requests.")] = 0,
    json_path: FoundPath = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="FAULT", help="A kind of fault to leave out; may be given again.")
    ] = None,
    recovery: Annotated[
        bool, typer.Option("--recovery/--no-recovery", help="Measure recovery times apart, after the storm.")
    ] = True,
) -> None:
    """Kill, freeze and poison a cluster of its own under load, and check every answer; exit 1 if one is wrong."""
    from moe_runtime.bench.machine import describe_machine
    from moe_runtime.chaos.runner import ChaosSettings, run
    from moe_runtime.chaos.schedule import fault_kinds

    settings = ChaosSettings(minutes, seed, without=fault_kinds(without or ()), measures_recovery=recovery)
    run(settings, json_path=json_path, machine=describe_machine(), console=stdout_console())


def demo_digits(
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write what was measured to this file.")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Classify handwritten digits with five kinds of experts, each in a Ray actor of its own."""
    from moe_runtime.demos import digits

    digits.run(json_path=json_path, fresh=fresh, console=stdout_console())


def demo_routers(
    json_path: FoundPath = None,
    fresh: Fresh = False,
) -> None:
    """Send the same images through every policy, over one pool of experts in Ray actors, and show how each does."""
    from moe_runtime.demos import routers

    routers.run(json_path=json_path, fresh=fresh, console=stdout_console())


def demo_chat(  # noqa: PLR0913  # each argument is an option
    *,
    prompt: Annotated[str | None, typer.Option(help="Answer this and end; else chat.")] = None,
    json_path: FoundPath = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0 takes the likeliest token each time.")] = 0.2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens per answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn at random.")] = 0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with the dense model.")] = True,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another Hugging Face MoE model, instead of the one it fetches.")
    ] = None,
    experts_per_actor: Annotated[int, typer.Option(min=1, metavar="N", help="Neighbours that share an actor.")] = 1,
) -> None:
    """Chat with a real language model whose experts are Ray actors; /help lists what else may be typed."""
    from moe_runtime.demos import chat

    settings = chat.ChatSettings(
        prompt=prompt,
        json_path=json_path,
        checkpoint=checkpoint,
        experts_per_actor=experts_per_actor,
        system=system,
        sampling=chat.Sampling(temperature, max_new_tokens=max_new_tokens, seed=seed),
        checks=check,
    )
    chat.run(settings, out=stdout_console(), notes=stderr_console())
