"""Ends a process whose node the cluster has given up: somebody else has its name and its work by now."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_REACH_TIMEOUT_S = 1.0
#: Ray's own patience with a head that does not answer is a minute.
_ASK_TIMEOUT_S = 90.0
#: Prints whether the cluster at an address counts a node as alive, as soon as it answers.
_ASK = """
import sys
import ray
from ray._raylet import GcsClient
print(*GcsClient(address=sys.argv[1]).check_alive([ray.NodeID.from_hex(sys.argv[2])], timeout=5))
"""


class ClusterView(Protocol):
    """What a process can find out about its node's standing."""

    def is_reached(self) -> bool:
        """Whether the head answers at all; bounded, and cheap."""
        ...

    def counts_us(self) -> bool | None:
        """Whether the cluster counts the node as alive, as soon as the head answers; None where it does not."""
        ...


class NodeWatch:
    """Looks whether the head can be reached; when it cannot, asks whether the node is given up, which may wait.

    Ray ends the processes of such a node too, but up to half a minute after it can be reached: its connections wait
    for the kernel to send again. While nobody answers, since the node is cut off or the head is away, nothing is
    settled, and the process goes on.
    """

    def __init__(self, view: ClusterView, *, end: Callable[[], None], look_every_s: float = _LOOK_EVERY_S) -> None:
        """Look at nothing yet.

        Args:
            view: Of the cluster.
            end: Ends the process.
            look_every_s: Time between two looks.
        """
        self._view = view
        self._end = end
        self._look_every_s = look_every_s
        self._stopped = threading.Event()

    def run(self) -> None:
        """Watch until the node was given up, or until ``stop``."""
        has_to_ask = False
        while not self._stopped.wait(self._look_every_s):
            if not has_to_ask and self._view.is_reached():
                continue
            is_counted = self._view.counts_us()
            if is_counted is False:
                _LOG.error("the cluster has given up this node while it was cut off: this process ends")
                self._end()
                return
            has_to_ask = is_counted is None

    def stop(self) -> None:
        """Make ``run`` return. Thread-safe."""
        self._stopped.set()


class RayView:
    """A node in the eyes of its Ray cluster; implements ``ClusterView``."""

    def __init__(self, address: str, node_id: str) -> None:
        """Look at nobody yet.

        Args:
            address: ``HOST:PORT`` of the cluster's head.
            node_id: Ray's id of the node, in hexadecimal.
        """
        self._address = address
        self._node_id = node_id

    def is_reached(self) -> bool:
        """Whether the head takes connections."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    def counts_us(self) -> bool | None:
        """Whether the cluster counts the node as alive, as soon as the head answers; None where it does not."""
        # A process of its own: in this one all clients of the head share the connection that still waits.
        command = [sys.executable, "-c", _ASK, self._address, self._node_id]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return {"True": True, "False": False}.get(done.stdout.strip())


def watch_own_node() -> None:
    """Have this process of a Ray actor end itself when its node was given up."""
    import ray

    context = ray.get_runtime_context()
    view = RayView(context.gcs_address, context.get_node_id())
    # No clean-up: its connections are to be closed now.
    watch = NodeWatch(view, end=lambda: os._exit(1))
    threading.Thread(target=watch.run, name="moe-node-watch", daemon=True).start()
