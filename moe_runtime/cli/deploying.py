"""``moe-runtime deploy`` and ``teardown``: their progress and their outcome, for people or as JSON."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moe_runtime.cli.consoles import stdout_console
from moe_runtime.cli.serving import leave_on_sigterm, print_welcome
from moe_runtime.errors import StartError
from moe_runtime.launch.deploy import DeployOptions, deploy, size_text
from moe_runtime.launch.teardown import teardown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from moe_runtime.launch.deploy import Deployed
    from moe_runtime.launch.teardown import TornDown


@dataclass(frozen=True)
class Asked:
    """What ``moe-runtime deploy`` was asked for; see its options."""

    config: Path
    cluster: Path | None = None
    ray_address: str | None = None
    install: bool = False
    wheel: Path | None = None


def deploy_and_report(asked: Asked, *, as_json: bool) -> None:
    """Deploy, and print where the runtime serves.

    Raises:
        ConfigError: If the configuration cannot work.
        StartError: If it was not deployed; what of it is there is cleared away or taken up by the next attempt.
    """
    with _progress(f"Deploying {asked.config.name}", as_json=as_json) as progress:
        options = DeployOptions(
            install=asked.install,
            wheel=asked.wheel,
            on_step=progress.step,
            on_progress=progress.actors,
        )
        outcome = deploy(asked.config, ray_address=asked.ray_address, options=options)
    if as_json:
        _print_json(asdict(outcome))
    else:
        _print_deployed(outcome, asked)


def tear_down_and_report(name: str, *, cluster: Path | None, ray_address: str | None, as_json: bool) -> None:
    """End a runtime, and print what was removed.

    Raises:
        StartError: If the cluster cannot be reached, or a node could not be cleaned.
    """
    with _progress(f"Tearing down {name}", as_json=as_json) as progress:
        outcome = teardown(name, ray_address=ray_address, on_step=progress.step)
    if as_json:
        _print_json(asdict(outcome))
    else:
        stdout_console().print(_teardown_text(outcome), markup=False, soft_wrap=True)
    if outcome.unreachable:
        raise StartError("\n".join(outcome.unreachable))


@dataclass(frozen=True)
class _Progress:
    """Says how far it is: lines that stay, and one that changes where there is a terminal."""

    console: Console
    doing: str
    show: Callable[[str], None]

    def step(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def actors(self, num_ready: int, num_actors: int) -> None:
        self.show(f"{self.doing}: {num_ready} of {num_actors} actors are ready")


@contextmanager
def _progress(doing: str, *, as_json: bool) -> Iterator[_Progress]:
    # With --json, stdout is for the one who parses it.
    console = Console(stderr=True, highlight=False) if as_json else stdout_console()
    leave_on_sigterm()
    with console.status(doing) as status:
        yield _Progress(console, doing, status.update)


def _print_deployed(outcome: Deployed, asked: Asked) -> None:
    console = stdout_console()
    if outcome.ran_already:
        console.print(f"{outcome.name} runs already, from the same files", markup=False)
    at = "" if asked.ray_address is None else f" --ray-address {asked.ray_address}"
    at = at if asked.cluster is None else f" --cluster {asked.cluster}"
    last = ("teardown", f"moe-runtime teardown {outcome.name}{at}")
    print_welcome(outcome.addresses, layers=outcome.layers, console=console, last=last)


def _teardown_text(outcome: TornDown) -> str:
    if outcome.did_nothing:
        return f"{outcome.name}: nothing to tear down"
    cleaned = outcome.cleaned
    removed = (
        f"removed {cleaned.bundles.num_files} bundles, {cleaned.weights.num_files} cached weight files "
        f"({size_text(cleaned.weights.num_bytes + cleaned.bundles.num_bytes)}) and {cleaned.num_sockets} sockets"
    )
    if not outcome.ran:
        return f"{outcome.name}: it did not run; {removed}"
    answered = "every request was answered" if outcome.all_answered else "some requests were not answered in time"
    return f"tore down {outcome.name}: {answered}; {removed}"


def _print_json(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
