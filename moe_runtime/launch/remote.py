"""``deploy``, ``upgrade``, ``teardown`` and ``cluster down`` from any machine that has the cluster's ``ray up`` file.

The submitting machine brings the bundle to the head, and runs the same command there, on the cluster.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import StartError
from moe_runtime.experts.weights_cache import Removed
from moe_runtime.launch.bundle import MANIFEST_FILE, collect_bundle
from moe_runtime.launch.deploy import Deployed, DeployOptions, size_text
from moe_runtime.launch.teardown import Cleaned, TornDown
from moe_runtime.ray_backend.roll import Upgraded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_runtime.launch.bundle import Bundle
    from moe_runtime.ray_backend.launcher import Machine

_HOME = "~/.moe_runtime"
_MAIN = "from moe_runtime.cli import main; main()"
_ERROR = "error: "
#: Begins each line about the progress on stderr, where the outcome is printed as JSON.
STEP_PREFIX = "step: "
_MAX_OTHER_LINES = 10
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_AT_ONCE = 32


@dataclass
class _Relay:
    """What a command of ours prints on another machine: steps, errors, and the outcome as JSON."""

    on_step: Callable[[str], None]
    errors: list[str] = field(default_factory=list)
    outcome: dict[str, Any] | None = None
    others: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_OTHER_LINES))

    def line(self, line: str) -> None:
        if line.startswith(_ERROR):
            self.errors.append(line.removeprefix(_ERROR))
        elif line.startswith("{"):
            self.outcome = json.loads(line)
        elif line.startswith(STEP_PREFIX):
            self.on_step(line.removeprefix(STEP_PREFIX))
        elif line.strip():
            self.others.append(line)


def deploy_from_afar(config: Path, *, cluster: Path, options: DeployOptions) -> Deployed:
    """Bring a configuration and its files to the head of a cluster, and deploy it there.

    Files that the head has already are not sent again. Where the file lists its machines, all of them are waited for:
    `ray up` returns before the head has started the others.

    Args:
        config: The YAML file, on this machine.
        cluster: The cluster's ``ray up`` file.
        options: As for ``deploy``.

    Raises:
        ConfigError: If the configuration or a file that it names cannot be bundled.
        StartError: If the head cannot be reached, or with what ``deploy`` says there.
    """
    return Deployed(**_roll_out("deploy", config, cluster=cluster, options=options))


def upgrade_from_afar(config: Path, *, cluster: Path, options: DeployOptions) -> Upgraded:
    """Bring a configuration and its files to the head of a cluster, and roll the runtime of its name to it.

    Args:
        config: The YAML file, on this machine.
        cluster: The cluster's ``ray up`` file.
        options: As for ``upgrade``.

    Raises:
        ConfigError: If the configuration or a file that it names cannot be bundled.
        StartError: If the head cannot be reached, or with what ``upgrade`` says there.
    """
    return Upgraded(**_roll_out("upgrade", config, cluster=cluster, options=options))


def _roll_out(command: str, config: Path, *, cluster: Path, options: DeployOptions) -> dict[str, Any]:
    """The outcome of a command on a configuration that was brought to the head; tuples where JSON has lists."""
    from moe_runtime.ray_backend.launcher import machines_of

    bundle = collect_bundle(config)
    with machines_of(cluster) as machines:
        head = machines.head()
        num_bytes = ship_bundle(bundle, config.expanduser().absolute().parent, head)
        options.on_step(f"sent {size_text(num_bytes)} to the head {head.name}")
        arguments = [command, f"{_HOME}/bundles/{bundle.id}.{MANIFEST_FILE}"]
        # An upgrade makes do with the nodes that are there.
        arguments += ["--nodes", str(max(options.num_nodes, machines.num_listed))] if command == "deploy" else []
        arguments += ["--install"] if options.install else []
        if options.install and options.wheel is not None:
            arguments += ["--wheel", _install_on_head(head, options.wheel)]
        outcome = run_on_head(head, arguments, on_step=options.on_step)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in outcome.items()}


def teardown_from_afar(name: str, *, cluster: Path, on_step: Callable[[str], None]) -> TornDown:
    """Tear a runtime down from any machine: ``teardown``, run on the head.

    Raises:
        StartError: If the head cannot be reached, or with what ``teardown`` says there.
    """
    from moe_runtime.ray_backend.launcher import machines_of

    with machines_of(cluster) as machines:
        outcome = run_on_head(machines.head(), ["teardown", name], on_step=on_step)
    cleaned = outcome["cleaned"]
    return TornDown(
        name=outcome["name"],
        ran=outcome["ran"],
        all_answered=outcome["all_answered"],
        unreachable=tuple(outcome["unreachable"]),
        cleaned=Cleaned(Removed(**cleaned["weights"]), Removed(**cleaned["bundles"]), cleaned["num_sockets"]),
    )


def cluster_down(cluster: Path, *, on_step: Callable[[str], None]) -> None:
    """Stop Ray on every machine of a ``ray up`` file, workers first, then do what ``ray down`` does. May be repeated.

    Where the file lists its machines (provider ``local``), ``ray down`` alone stops the head only.

    Raises:
        StartError: If a machine could not be reached, after all others were stopped; one line each.
    """
    from moe_runtime.ray_backend.launcher import machines_of

    with machines_of(cluster) as machines:
        workers = machines.workers()
        with ThreadPoolExecutor(_MAX_AT_ONCE) as stopping:
            errors = [error for error in stopping.map(_stop_ray, workers) if error is not None]
        if workers:
            on_step(f"stopped Ray on {len(workers) - len(errors)} of {len(workers)} workers")
        if machines.is_local and (error := _stop_ray(machines.head())) is not None:
            errors.append(error)
        machines.take_down()
    if errors:
        raise StartError("\n".join(errors))


def _stop_ray(machine: Machine) -> str | None:
    """None, or why it could not be stopped."""
    try:
        machine.output("ray stop")
    except StartError as exc:
        return f"{exc}; if it is up, run this again when it can be reached"
    return None


def ship_bundle(bundle: Bundle, folder: Path, head: Machine) -> int:
    """Bring to the head what it lacks of a bundle; the number of bytes sent.

    Args:
        bundle: Its files are those of ``folder``.
        folder: The configuration's.
        head: Gets each file under its hash, and last the bundle's manifest.

    Raises:
        StartError: If the head cannot be reached; what has arrived is not sent again.
    """
    listed = head.output(f"mkdir -p -m 700 {_HOME} && mkdir -p {_HOME}/blobs {_HOME}/bundles && ls {_HOME}/blobs")
    there = {name for line in listed for name in line.split() if _SHA256.fullmatch(name)}
    lacking = {file.sha256: file for file in bundle.files if file.sha256 not in there}
    with tempfile.TemporaryDirectory(prefix="moe-bundle-") as stage:
        blobs, manifests = Path(stage, "blobs"), Path(stage, "bundles")
        blobs.mkdir()
        manifests.mkdir()
        for sha256, file in lacking.items():
            _link(folder / file.path, blobs / sha256)
        (manifests / f"{bundle.id}.{MANIFEST_FILE}").write_text(bundle.to_json(), encoding="utf-8")
        if lacking:
            head.send(blobs, f"{_HOME}/blobs")
        # Last: what has a manifest on the head has its files there.
        head.send(manifests, f"{_HOME}/bundles")
    return sum(file.num_bytes for file in lacking.values())


def _link(source: Path, target: Path) -> None:
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        # Another file system.
        shutil.copyfile(real, target)


def _install_on_head(head: Machine, wheel: Path) -> str:
    """Install a wheel of this package on the head, which runs the rest; its path there."""
    with tempfile.TemporaryDirectory(prefix="moe-wheel-") as stage:
        shutil.copyfile(wheel, Path(stage, wheel.name))
        head.output(f"mkdir -p {_HOME}/wheels")
        head.send(Path(stage), f"{_HOME}/wheels")
    target = f"{_HOME}/wheels/{wheel.name}"
    head.output(f"python3 -m pip install --quiet --disable-pip-version-check {target}")
    return target


def run_on_head(head: Machine, arguments: Sequence[str], *, on_step: Callable[[str], None]) -> dict[str, Any]:
    """The outcome of a command of ours on the head.

    Raises:
        StartError: With the errors that it told there.
    """
    # A tilde stays unquoted, for the head's shell to resolve.
    words = [argument if argument.startswith("~/") else shlex.quote(argument) for argument in arguments]
    line = " ".join([*words, "--ray-address", "auto", "--json"])
    command = (
        "export TERM=dumb NO_COLOR=1; if command -v moe-runtime >/dev/null; "
        f"then moe-runtime {line}; else python3 -c {shlex.quote(_MAIN)} {line}; fi"
    )
    relay = _Relay(on_step)
    returncode = head.run(command, on_line=relay.line)
    # A teardown that could not reach a node has an outcome too, which names it.
    if relay.outcome is not None:
        return relay.outcome
    if relay.errors:
        raise StartError("\n".join(relay.errors))
    said = "; ".join(relay.others) or "nothing"
    raise StartError(f"{head.name}: expected an outcome of `moe-runtime {line}`, it ended with {returncode}: {said}")
