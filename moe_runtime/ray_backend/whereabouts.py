"""Where the present process runs, in Ray's terms."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import ray
from ray.util import get_node_ip_address

from moe_runtime.ray_backend.plan import Location

_NODE_ID_CHARS = 8
#: How Ray calls the processes of its actors.
_ACTOR_TITLE = b"ray::"


def locate() -> Location:
    """The node, address, cores and pid of this process."""
    ip = get_node_ip_address()
    node = node_name(ip, ray.get_runtime_context().get_node_id())
    return Location(node=node, ip=ip, num_cores=len(os.sched_getaffinity(0)), pid=os.getpid())


def node_name(ip: str, node_id: str) -> str:
    """What a node is called: unique in the cluster, and readable."""
    return f"{ip}/{node_id[:_NODE_ID_CHARS]}"


def end_process_here(location: Location) -> bool:
    """End the process of an actor at once, if it runs on this node; whether it was there."""
    if location.node != locate().node:
        return False
    with contextlib.suppress(OSError):
        # It may have ended by itself, and the number may be somebody else's by now.
        if Path(f"/proc/{location.pid}/cmdline").read_bytes().startswith(_ACTOR_TITLE):
            os.kill(location.pid, signal.SIGKILL)
            return True
    return False
