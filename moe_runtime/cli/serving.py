"""``moe-runtime serve``: starts a runtime, says where it is, and ends it in order when a signal asks for it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.cli.consoles import report_error, stdout_console
from moe_runtime.cli.log_wishes import LogWishes
from moe_runtime.config.load import load_config
from moe_runtime.errors import StartError
from moe_runtime.logs import LogIdentity, install

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import FrameType

    from rich.console import Console

    from moe_runtime.launch.served import Runtime

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Where:
    """Where a configuration is to be served.

    Attributes:
        address: Of the first router, instead of the configuration's.
        ray_address: Of the Ray cluster.
        detach: Whether it outlives this process.
        ray: Whether its parts are Ray actors.
    """

    address: str | None = None
    ray_address: str | None = None
    detach: bool = False
    ray: bool = True


def serve_until_stopped(config: Path, where: Where, *, wishes: LogWishes | None = None) -> None:
    """Serve a configuration until the first SIGINT or SIGTERM, then drain; a second one ends the process at once.

    With ``detach``, return as soon as the runtime serves. Logs are written as the configuration says, but for the
    wishes of the command line.

    Raises:
        ConfigError: If the configuration cannot work.
        StartError: If the runtime did not start; nothing of it is left behind.
    """
    if where.detach and not where.ray:
        raise StartError("--detach: expected Ray, found --no-ray: threads of this process cannot outlive it")
    from moe_runtime.launch.runtime import serve

    loaded = load_config(config).config
    logs = (wishes or LogWishes()).over(loaded.logging.settings)
    install(logs, LogIdentity("command", loaded.name))
    console = stdout_console()
    leave_on_signals()
    with console.status(f"Starting {config.name}") as starting:

        def show(num_ready: int, num_actors: int) -> None:
            # Ray, which has started by now, has put handlers of its own in their place.
            leave_on_signals()
            starting.update(f"Starting {config.name}: {num_ready} of {num_actors} actors are ready")

        runtime = serve(
            config,
            ray=where.ray,
            ray_address=where.ray_address,
            address=where.address,
            detach=where.detach,
            on_progress=show,
            logging=logs,
        )
    with runtime:
        if where.detach:
            name = runtime.describe()["name"]
            at = "" if where.ray_address is None else f" --ray-address {where.ray_address}"
            _print_welcome(runtime, config=config, console=console, stop=f"moe-runtime stop {name}{at}")
            return
        # After Ray's own handlers, which the start has installed.
        stop = StopSignals()
        runtime.when_lost(_end_as_lost)
        _print_welcome(
            runtime, config=config, console=console, stop="Ctrl-C or SIGTERM; requests in flight are answered first"
        )
        received = stop.wait()
        console.print(f"{received.name}: draining; the same signal again ends this at once", markup=False)
    console.print("stopped", markup=False)


def leave_on_signals() -> None:
    """Make SIGTERM, and the end of a remote terminal, as orderly a way out of a start as SIGINT is.

    Call it before anything runs.
    """
    signal.signal(signal.SIGTERM, _leave)
    # Started with nohup, it stays ignored.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _leave)


class StopSignals:
    """SIGINT and SIGTERM of this process from now on: the first is awaited, the second ends the process."""

    def __init__(self) -> None:
        self._received: list[signal.Signals] = []
        # A signal may be delivered to any thread, and then interrupts no lock that this one waits for; but whichever
        # thread it is, a byte is written here.
        self._wakes, self._writes = socket.socketpair()
        self._writes.setblocking(False)
        signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            signal.signal(number, self._first)

    def wait(self) -> signal.Signals:
        """The first signal, when it has come."""
        while not self._received:
            self._wakes.recv(1)
        return self._received[0]

    def _first(self, number: int, _frame: FrameType | None) -> None:
        for each in _STOP_SIGNALS:
            signal.signal(each, _end_at_once)
        self._received.append(signal.Signals(number))


def _end_as_lost(reason: str) -> None:
    """End this process with an error: whatever is left to be done in order would wait for the cluster."""
    report_error(StartError(reason))
    sys.stderr.flush()
    os._exit(1)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


def print_welcome(
    addresses: Sequence[str], *, layers: Sequence[str], console: Console, last: tuple[str, str], config: Path
) -> None:
    """Print where a runtime serves and what to do next.

    Args:
        addresses: Of its routers; none where it has none.
        layers: Its layers' names.
        console: Where to.
        last: What a last line says, and of what: how the runtime is ended.
        config: The configuration, or the manifest of a bundle.
    """
    end = f"  {last[0] + ':':<9}{last[1]}"
    if addresses:
        lines = [*_for_clients(addresses, layers[0]), *_what_calls_need(config), end]
        lines.insert(0, f"serving {', '.join(layers)} at {', '.join(addresses)}")
    else:
        lines = [f"serving {', '.join(layers) or 'no layer yet'} to programs that use it as a library", end]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _for_clients(addresses: Sequence[str], layer: str) -> list[str]:
    target = addresses[0] if len(addresses) == 1 else list(addresses)
    options = " ".join(f"--address {address}" for address in addresses)
    return [
        f"  status:  moe-runtime status {options}",
        f'  Python:  moe_runtime.MoEClient({target!r}).forward(inputs, layer="{layer}")',
    ]


def _what_calls_need(config: Path) -> list[str]:
    from moe_runtime.config.load import load_config
    from moe_runtime.launch.bundle import MANIFEST_FILE

    if config.name.endswith(MANIFEST_FILE):
        return []
    security = load_config(config).config.security
    needs = []
    if security.tls is not None:
        needs.append("TLS (--ca PATH; tls=moe_runtime.ClientTLS(ca=PATH))")
        if security.tls.client_ca is not None:
            needs.append("a certificate (--cert PATH --key PATH; cert=PATH, key=PATH)")
    if security.tokens is not None:
        needs.append("a token (--token-file PATH; token=TOKEN)")
    return [f"  both with {', '.join(needs)}"] if needs else []


def _print_welcome(runtime: Runtime, *, config: Path, console: Console, stop: str) -> None:
    layers = list(runtime.describe()["layers"])
    print_welcome(runtime.addresses, layers=layers, console=console, last=("stop", stop), config=config)
