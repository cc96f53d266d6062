"""``moe-runtime deploy`` and ``teardown``: their progress and their outcome, for people or as JSON."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moe_runtime.cli.consoles import stdout_console
from moe_runtime.cli.serving import leave_on_signals, print_welcome
from moe_runtime.errors import StartError
from moe_runtime.launch.deploy import DeployOptions, deploy, size_text
from moe_runtime.launch.remote import STEP_PREFIX, cluster_down, deploy_from_afar, teardown_from_afar
from moe_runtime.launch.teardown import teardown

#: Without a terminal: how often a line says how many actors are ready.
_SAY_EVERY_S = 5.0

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from moe_runtime.launch.deploy import Deployed
    from moe_runtime.launch.teardown import TornDown


@dataclass(frozen=True)
class Asked:
    """What ``moe-runtime deploy`` or ``upgrade`` was asked for; see their options."""

    config: Path
    cluster: Path | None = None
    ray_address: str | None = None
    install: bool = False
    wheel: Path | None = None
    num_nodes: int = 1


def deploy_and_report(asked: Asked, *, as_json: bool) -> None:
    """Deploy, and print where the runtime serves.

    Raises:
        ConfigError: If the configuration cannot work.
        StartError: If it was not deployed; what of it is there is cleared away or taken up by the next attempt.
    """
    expect_one(asked.cluster, asked.ray_address)
    with showing_progress(f"Deploying {asked.config.name}", as_json=as_json) as progress:
        options = DeployOptions(
            install=asked.install,
            wheel=asked.wheel,
            num_nodes=asked.num_nodes,
            on_step=progress.step,
            on_progress=progress.actors,
        )
        if asked.cluster is not None:
            outcome = deploy_from_afar(asked.config, cluster=asked.cluster, options=options)
        else:
            outcome = deploy(asked.config, ray_address=asked.ray_address, options=options)
    if as_json:
        print_json(asdict(outcome))
    else:
        _print_deployed(outcome, asked)


def tear_down_and_report(name: str, *, cluster: Path | None, ray_address: str | None, as_json: bool) -> None:
    """End a runtime, and print what was removed.

    Raises:
        StartError: If the cluster cannot be reached, or a node could not be cleaned.
    """
    expect_one(cluster, ray_address)
    with showing_progress(f"Tearing down {name}", as_json=as_json) as progress:
        if cluster is not None:
            outcome = teardown_from_afar(name, cluster=cluster, on_step=progress.step)
        else:
            outcome = teardown(name, ray_address=ray_address, on_step=progress.step)
    if as_json:
        print_json(asdict(outcome))
    else:
        stdout_console().print(_teardown_text(outcome), markup=False, soft_wrap=True)
    if outcome.unreachable:
        raise StartError("\n".join(outcome.unreachable))


def take_cluster_down(cluster: Path) -> None:
    """Stop Ray on every machine of a cluster file, and say so.

    Raises:
        StartError: If a machine could not be reached.
    """
    with showing_progress(f"Stopping the cluster of {cluster}", as_json=False) as progress:
        cluster_down(cluster, on_step=progress.step)
    stdout_console().print(f"{cluster}: its cluster is down", markup=False, soft_wrap=True)


def expect_one(cluster: Path | None, ray_address: str | None) -> None:
    """Raise ``StartError`` where the cluster is named in two ways."""
    if cluster is not None and ray_address is not None:
        raise StartError(f"expected --cluster or --ray-address, found both: {cluster} and {ray_address}")


class Progress:
    """Says how far it is: lines that stay, and one that changes; where there is no terminal, now and then a line."""

    def __init__(self, console: Console, doing: str, show: Callable[[str], None], *, prefix: str) -> None:
        self._console = console
        self._prefix = prefix
        self._doing = doing
        self._show = show
        self._is_animated = console.is_terminal and not console.is_dumb_terminal
        self._said, self._said_at = "", time.monotonic()

    def step(self, line: str) -> None:
        """A step is done: a line that stays."""
        self._console.print(self._prefix + line, markup=False, soft_wrap=True)

    def actors(self, num_ready: int, num_actors: int) -> None:
        """So many actors are ready."""
        line = f"{num_ready} of {num_actors} actors are ready"
        self._show(f"{self._doing}: {line}")
        if not self._is_animated and line != self._said and time.monotonic() - self._said_at > _SAY_EVERY_S:
            self._said, self._said_at = line, time.monotonic()
            self.step(line)


@contextmanager
def showing_progress(doing: str, *, as_json: bool) -> Iterator[Progress]:
    """Shows on the terminal what is being done; SIGTERM and SIGHUP are an orderly way out of it."""
    # With --json, stdout is for the one who parses it, and steps are told from what else is on stderr.
    # The streams as they are now: Ray's launcher code is silenced by redirecting stdout.
    console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False)
    leave_on_signals()
    with console.status(doing) as status:
        yield Progress(console, doing, status.update, prefix=STEP_PREFIX if as_json else "")


def _print_deployed(outcome: Deployed, asked: Asked) -> None:
    console = stdout_console()
    if outcome.ran_already:
        console.print(f"{outcome.name} runs already, from the same files", markup=False)
    at = "" if asked.ray_address is None else f" --ray-address {asked.ray_address}"
    at = at if asked.cluster is None else f" --cluster {asked.cluster}"
    last = ("end", f"moe-runtime teardown {outcome.name}{at}")
    print_welcome(outcome.addresses, layers=outcome.layers, console=console, last=last, config=asked.config)


def _teardown_text(outcome: TornDown) -> str:
    if outcome.did_nothing:
        return f"{outcome.name}: nothing to tear down"
    cleaned = outcome.cleaned
    counts = ((cleaned.bundles.num_files, "bundle"), (cleaned.weights.num_files, "cached weight file"))
    counted = [_counted(*count) for count in (*counts, (cleaned.num_sockets, "socket"))]
    removed = f"removed {', '.join(counted)}: {size_text(cleaned.weights.num_bytes + cleaned.bundles.num_bytes)}"
    if not outcome.ran:
        return f"{outcome.name}: it did not run; {removed}"
    answered = "every request was answered" if outcome.all_answered else "some requests were not answered in time"
    return f"tore down {outcome.name}: {answered}; {removed}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_json(values: dict[str, Any]) -> None:
    """Print an outcome for programs, as one line on stdout."""
    sys.stdout.write(json.dumps(values) + "\n")
