"""The depot: serves the files of a deployment's bundle to the nodes that need them, and counts what it served."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, BinaryIO

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_runtime.errors import WeightsError
from moe_runtime.ray_backend.names import NAMESPACE, depot_name
from moe_runtime.ray_backend.ray_spawner import actor_names, find_actor
from moe_runtime.ray_backend.whereabouts import locate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from moe_runtime.ray_backend.deployment import DepotPlan

CHUNK_BYTES = 4 << 20
#: Chunks that one reader asks for at once, so that it does not wait a round trip for each.
_WINDOW = 4
_READ_TIMEOUT_S = 60.0
_MAX_READERS = 16


class Depot:
    """Reads the files that a bundle lists, and no others: callers name a hash, never a path."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Serve these files, by their sha256."""
        self._files = dict(files)
        self._served: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def num_bytes(self, sha256: str) -> int | None:
        """Size of a file; None if the bundle does not list it, or it is gone."""
        path = self._files.get(sha256)
        return path.stat().st_size if path is not None and path.is_file() else None

    def read(self, sha256: str, offset: int, reader: str) -> bytes:
        """At most ``CHUNK_BYTES`` of a file from an offset on; nothing at its end, or of a file that is not listed.

        Args:
            sha256: The file's.
            offset: In bytes.
            reader: Name of the node that reads, for the counters.
        """
        path = self._files.get(sha256)
        if path is None:
            return b""
        with path.open("rb") as file:
            file.seek(offset)
            chunk = file.read(CHUNK_BYTES)
        with self._lock:
            self._served[reader, sha256] += len(chunk)
        return chunk

    def served(self) -> dict[str, dict[str, int]]:
        """Bytes that were served, by the reader's node and the file's sha256."""
        served: dict[str, dict[str, int]] = {}
        with self._lock:
            for (reader, sha256), num_bytes in self._served.items():
                served.setdefault(reader, {})[sha256] = num_bytes
        return served


def start_depot(runtime: str, plan: DepotPlan) -> None:
    """Start the depot of a runtime beside its bundle, to live as long as the runtime."""
    options: dict[str, Any] = {
        "name": depot_name(runtime, plan.deployment),
        # An upgrade that was interrupted has started it already.
        "get_if_exists": True,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": _MAX_READERS,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(plan.node_id, soft=False),
    }
    ray.remote(Depot).options(**options).remote(plan.files)


def end_depots(runtime: str, *, but: str | None) -> None:
    """End every depot of a runtime but that of one deployment."""
    kept = None if but is None else depot_name(runtime, but)
    for name in actor_names(runtime):
        if name.startswith(depot_name(runtime, "")) and name != kept:
            depot = find_actor(name)
            if depot is not None:
                ray.kill(depot, no_restart=True)


def read_from_depot(runtime: str, deployment: str, sha256: str, file: BinaryIO) -> None:
    """Write a file of a runtime's bundle into ``file``.

    Raises:
        WeightsError: If the bundle does not list it, or its depot does not answer.
    """
    where = f"the bundle {deployment[:12]} of runtime {runtime}"
    depot = find_actor(depot_name(runtime, deployment))
    if depot is None:
        raise WeightsError(f"{where}: expected its depot on this cluster, found none; deploy it again")
    try:
        num_bytes = ray.get(depot.num_bytes.remote(sha256), timeout=_READ_TIMEOUT_S)
        if num_bytes is None:
            raise WeightsError(f"{where}: expected a file with sha256 {sha256}, found none; deploy it again")
        _copy(depot, sha256, num_bytes, file)
    except (RayError, TimeoutError) as exc:
        raise WeightsError(f"{where}: its depot does not answer: {type(exc).__name__}") from exc


def _copy(depot: Any, sha256: str, num_bytes: int, file: BinaryIO) -> None:
    reader = locate().node
    coming: deque[Any] = deque()
    for offset in range(0, num_bytes, CHUNK_BYTES):
        if len(coming) == _WINDOW:
            file.write(ray.get(coming.popleft(), timeout=_READ_TIMEOUT_S))
        coming.append(depot.read.remote(sha256, offset, reader))
    while coming:
        file.write(ray.get(coming.popleft(), timeout=_READ_TIMEOUT_S))
