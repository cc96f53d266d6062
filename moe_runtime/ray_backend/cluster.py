"""Which Ray cluster is used, and whether it is ours to shut down."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.errors import StartError

_AUTH_MODE, _AUTH_TOKEN, _AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
#: Tokens never pass through Ray's object store; what does are descriptions.
_EMBEDDED_STORE_BYTES = 128 << 20
_PROBE_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray.

    Attributes:
        address: Of the cluster.
        node_id: Ray's id of the node that this process is attached to.
        num_gpus: GPUs of the whole cluster.
        embedded: This process started the cluster, and it ends with this process.
        connected_here: ``connect`` made the connection, so ``disconnect`` ends it.
    """

    address: str
    node_id: str
    num_gpus: float
    embedded: bool
    connected_here: bool

    def disconnect(self) -> None:
        """Leave the cluster, and end it if it is embedded; Ray that was initialised before stays as it was."""
        import ray

        if self.connected_here and ray.is_initialized():
            ray.shutdown()


def existing_address(ray_address: str | None) -> str | None:
    """The address of the cluster to join, or None where a local one has to be started.

    An address of ``local`` asks for a local one, whatever the environment says.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def is_initialised() -> bool:
    """Whether this process uses Ray already."""
    # Not imported means not initialised, and importing takes a moment.
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def connect(ray_address: str | None = None, *, total_cpus: float = 0.0) -> Cluster:
    """Use Ray as it is initialised; else join ``ray_address`` or ``RAY_ADDRESS``; else start it here.

    Args:
        ray_address: Address of an existing cluster.
        total_cpus: What all actors ask for; a cluster that is started here has at least so many.

    Raises:
        StartError: If the cluster cannot be joined or started.
    """
    address = existing_address(ray_address)
    initialised = is_initialised()
    if not initialised:
        if address is not None:
            _expect_answer(address)
        # Ray reads the mode when it is imported, and without one would write a world-readable token file.
        _set_auth_mode(embedded=address is None)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's default of 15 lets any other process of the machine starve experts and routers.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # A page on standard output for each; the controller says the same in one line of the log.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed while executing a task")
    import ray

    if not initialised:
        try:
            _init(address, total_cpus=total_cpus)
        except Exception as exc:
            # Ray raises Exception itself where its own processes take too long.
            if address == "auto" and isinstance(exc, ConnectionError):
                raise StartError(
                    f"no Ray runs on {socket.gethostname()}: start the cluster with `ray up FILE`, or with "
                    f"`ray start --head`"
                ) from exc
            where = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started here"
            raise StartError(f"{where}: {exc}") from exc
    context = ray.get_runtime_context()
    return Cluster(
        address=context.gcs_address,
        node_id=context.get_node_id(),
        num_gpus=float(ray.cluster_resources().get("GPU", 0.0)),
        embedded=not initialised and address is None,
        connected_here=not initialised,
    )


def _init(address: str | None, *, total_cpus: float) -> None:
    import ray

    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        return
    ray.init(
        address="local",
        # Reservations, not cores: on one machine many small experts must not wait for each other.
        num_cpus=max(len(os.sched_getaffinity(0)), math.ceil(total_cpus)),
        include_dashboard=False,
        object_store_memory=_EMBEDDED_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def _expect_answer(address: str) -> None:
    """Fail now where nobody listens: Ray would try for a minute, and then end the process."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        # ``auto`` and ``ray://``, which Ray resolves itself.
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as exc:
        raise StartError(
            f"no Ray cluster answers at {address}; start one with `ray start --head` or leave the address out"
        ) from exc


def _set_auth_mode(*, embedded: bool) -> None:
    if _AUTH_MODE in os.environ:
        return
    has_token = bool(
        os.environ.get(_AUTH_TOKEN)
        or os.environ.get(_AUTH_TOKEN_PATH)
        or (not embedded and Path("~/.ray/auth_token").expanduser().is_file())
    )
    if embedded and not has_token and "ray" not in sys.modules:
        # Whoever reaches Ray's ports runs code; this token lives in this process and its children only.
        os.environ[_AUTH_TOKEN] = secrets.token_hex(32)
        has_token = True
    os.environ[_AUTH_MODE] = "token" if has_token else "disabled"
