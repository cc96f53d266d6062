"""Ends a process whose node the cluster has given up: somebody else has its name and its work by now."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger(__name__)

_ASK_EVERY_S = 0.5


class NodeWatch:
    """Asks again and again whether the cluster still counts a node as alive, in a thread of its own.

    Ray ends a stale process too, but takes up to half a minute after a cut-off node is back. What nobody
    answers, since the node is cut off, or the cluster's tables are away, settles nothing: the process goes on.
    """

    def __init__(self, is_alive: Callable[[], bool], *, end: Callable[[], None], ask_every_s: float = _ASK_EVERY_S) -> None:
        """Ask nothing yet.

        Args:
            is_alive: Asks the cluster; may wait for as long as nobody answers, and raise what it likes.
            end: Ends the process.
            ask_every_s: Time between two questions.
        """
        self._is_alive = is_alive
        self._end = end
        self._ask_every_s = ask_every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="moe-node-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._ask_every_s):
            try:
                is_alive = self._is_alive()
            except Exception:  # whatever Ray raises says that nobody knows
                continue
            if not is_alive and not self._stopped.is_set():
                _LOG.error("the cluster has given up this node; ending this process, which has a successor elsewhere")
                self._end()
                return


def watch_own_node() -> None:
    """Have this process end itself when its node was declared dead."""
    import ray

    # The public lists of nodes go through connections that a cut leaves waiting for half a minute.
    from ray._raylet import GcsClient

    context = ray.get_runtime_context()
    address, node_id = context.gcs_address, ray.NodeID.from_hex(context.get_node_id())

    def is_alive() -> bool:
        # Anew each time, which takes a millisecond: it waits until the cluster is reached, and is answered at once.
        (answer,) = GcsClient(address=address).check_alive([node_id], timeout=_ASK_EVERY_S)
        return bool(answer)

    # No clean-up: the sockets are to be closed now.
    NodeWatch(is_alive, end=lambda: os._exit(1)).start()
